// Sums of a backward pass along the lanes. Part of kernels.cpp.
#pragma once

#include <type_traits>

#include "kernels_moments.h"

namespace {

// Sums of g and of g * (x - hi): what makes of the second the sum of g * xhat is the same for the whole set.
template <class X, bool WLane, class Asks = NoAsker>
struct SumsBlock {
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int kShare = 1;
    static constexpr int K = kLanes / kWidth<X>;
    In dy, x, w;
    Vec<X> hi, w_row;
    const char *p_dy = nullptr, *p_x = nullptr, *p_w = nullptr;
    Vec<X> sum[K] = {}, sum_d[K] = {};
    double total = 0, total_d = 0;
    Adder<T> plus;
    Asks* asker = nullptr;

    NK_INLINE void row(index_t r) {
        p_dy = dy.at(r);
        p_x = x.at(r);
        p_w = w.at(r);
        if constexpr (!WLane) w_row = splat<X>(value_at<T>(p_w));
    }
    NK_INLINE void ask_ahead(index_t at) {
        if constexpr (std::is_empty_v<Asks>) {
            ask_for_turn<X>(p_dy, at, ahead_of_two(kAheadOfTwo));
            ask_for_turn<X>(p_x, at, ahead_of_two(kAheadOfTwo));
        } else {
            asker->turn();
        }
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            const index_t lane = at + i * kWidth<X>;
            const Vec<X> g = load<X>(p_dy + bytes<X>(lane)) * (WLane ? load<T>(p_w + bytes<T>(lane)) : w_row);
            sum[i] = plus.by_turns(i, sum[i], g);
            sum_d[i] += g * (load<X>(p_x + bytes<X>(lane)) - hi);
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const index_t lane = at + i * kWidth<X>;
            const Vec<X> g =
                load_rest<X>(p_dy + bytes<X>(lane), n) * (WLane ? load_rest<T>(p_w + bytes<T>(lane), n) : w_row);
            const Vec<X> g_d = g * (load_rest<X>(p_x + bytes<X>(lane), n) - hi);
            sum[i] += n >= kWidth<X> ? g : keep_first<T>(g, n);
            sum_d[i] += n >= kWidth<X> ? g_d : keep_first<T>(g_d, n);
        }
    }
    NK_INLINE void head(index_t at, int n) {
        const Vec<X> g = load_last<X>(p_dy + bytes<X>(at), n) * (WLane ? load_last<T>(p_w + bytes<T>(at), n) : w_row);
        const Vec<X> g_d = g * (load_last<X>(p_x + bytes<X>(at), n) - hi);
        sum[K - 1] += keep_last<T>(g, n);
        sum_d[K - 1] += keep_last<T>(g_d, n);
    }
    NK_INLINE void flush() {
        total += sum_by_halves<Compute<X>, K>(sum);
        total_d += sum_by_halves<Compute<X>, K>(sum_d);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) sum[i] = sum_d[i] = Vec<X>{};
    }
};

// From sums of g and g * (x - hi) to the sum of g * xhat.
template <class V>
NK_INLINE V xhat_sum(V g, V g_d, V lo, V rstd) {
    return (kLoose ? g_d : g_d - lo * g) * rstd;
}

template <class X, bool WLane, class Beside, class Asks = NoAsker>
NK_INLINE Sums sums_of_leaf(In dy, In x, In w, const Statistics<Compute<X>>& s, index_t k, index_t rows, index_t lanes,
                            Beside& beside, Asks* asker = nullptr) {
    SumsBlock<X, WLane, Asks> block{dy, x, w, splat<X>(s.hi[k]), {}, {}, {}, {}, {}, {}, 0, 0, {}, asker};
    for_leaf<X>(x, rows, lanes, block, beside);
    return {block.total, xhat_sum<double>(block.total, block.total_d, s.lo[k], s.rstd[k])};
}

// A function for each way to ask, and `asker` not of this one: GCC 12 then keeps sums in registers.
template <class X, bool WLane, class Asks>
__attribute__((noinline)) void sums_along_as(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s,
                                             Sums* out, Asks* asker) {
    Nothing nothing;
    nothing.asking = !std::is_same_v<Asks, NoAsker>;
    for (; n > 0; --n, ++series) {
        const SumSeries all = *series;
        In dy = all.dy, x = all.x;
        for (index_t i = 0; i < all.leaves; ++i, dy.p += all.leaf_dy, x.p += all.leaf_x) {
            const index_t k = all.set + i * all.next_set;
            *out++ = sums_of_leaf<X, WLane>(dy, x, all.w, s, k, all.rows, all.lanes, nothing, asker);
        }
    }
}

// Sums of leaves of one run of up to kStep elements, eight at a time: folding the lanes of a sum to a number is as much
// as the arithmetic of 64. The same sums as those of SumsBlock. V: vectors of a run.
template <class X, int V>
NK_INLINE void sums_of_eight(const SumSeries& of, index_t first, const Statistics<Compute<X>>& s, Sums* out) {
    using T = Compute<X>;
    const index_t k = of.set + first * of.next_set;
    const Vec<X> w = splat<X>(value_at<T>(of.w.p));
    Vec<X> g[kEight], g_d[kEight];
#pragma GCC unroll 8
    for (int j = 0; j < kEight; ++j) {
        const char *const dy = of.dy.p + (first + j) * of.leaf_dy, *const x = of.x.p + (first + j) * of.leaf_x;
        const Vec<X> hi = splat<X>(s.hi[k + j * of.next_set]);
        Vec<X> sum[V] = {}, sum_d[V] = {};
        int n = static_cast<int>(of.lanes);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> gv = load_rest<X>(dy + i * kMemoryBytes<X>, n) * w;
            sum[i] = keep_first<T>(gv, n);
            sum_d[i] = keep_first<T>(gv * (load_rest<X>(x + i * kMemoryBytes<X>, n) - hi), n);
        }
        g[j] = vectors_by_halves(sum);
        g_d[j] = vectors_by_halves(sum_d);
    }
    const auto of_sets = [&](const T* p) { return of.next_set == 0 ? Eight<T>{} + p[k] : load_eight(p + k); };
    const Eight<double> sum_g = 0.0 + widened(lanes_by_halves<T>(g)), sum_d = 0.0 + widened(lanes_by_halves<T>(g_d));
    const Eight<double> xhat = xhat_sum<Eight<double>>(sum_g, sum_d, widened(of_sets(s.lo)), widened(of_sets(s.rstd)));
    static_assert(sizeof(Sums) == 2 * sizeof(double));
    store_eight(&out[0].g, __builtin_shufflevector(sum_g, xhat, 0, 8, 1, 9, 2, 10, 3, 11));
    store_eight(&out[4].g, __builtin_shufflevector(sum_g, xhat, 4, 12, 5, 13, 6, 14, 7, 15));
}

template <class X, int V>
__attribute__((noinline)) void sums_of_short_leaves(const SumSeries& of, const Statistics<Compute<X>>& s, Sums* out) {
    const SumSeries all = of;  // which no store can change
    index_t i = 0;
    for (; all.leaves - i >= kEight; i += kEight) sums_of_eight<X, V>(all, i, s, out + i);
    Nothing nothing;
    for (; i < all.leaves; ++i) {
        const In dy{all.dy.p + i * all.leaf_dy, 0}, x{all.x.p + i * all.leaf_x, 0};
        out[i] = sums_of_leaf<X, false>(dy, x, all.w, s, all.set + i * all.next_set, 1, all.lanes, nothing);
    }
}

NK_INLINE bool are_short_leaves(const SumSeries& of) {
    return of.rows == 1 && of.lanes <= kStep && of.leaves >= kEight && of.next_set <= 1;
}

// Sums of leaves whose runs lie side by side, row by row of all of them: memory is read in its order, and the sums of a
// leaf wait in L1 for its next run. The same sums as those of SumsBlock: they go over to double every kDepth steps,
// also in the midst of a run. docs/decisions/0002-schedule.md, "Small images".
template <class X>
class SideBySide {
  public:
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep * kDepth;  // of a run at most, so that it goes over once at most

    NK_INLINE SideBySide(const SumSeries& all, const Statistics<T>& s) : all_(all), s_(s) {}

    template <class Asks>
    NK_INLINE void sum(Sums* out, [[maybe_unused]] Asks* asker) {
        const index_t steps = (all_.lanes + kStep - 1) / kStep;
        const Vec<X> w = splat<X>(value_at<T>(all_.w.p));
        for (index_t i = 0; i < all_.leaves; ++i) {
            chains_[i] = {};
            out[i] = {};
        }
        index_t done = 0;  // steps since the last time that sums went over
        for (index_t r = 0; r < all_.rows; ++r) {
            const char *dy = all_.dy.at(r), *x = all_.x.at(r);
            const index_t left = kLoose ? steps + 1 : kDepth - done;
            [[maybe_unused]] index_t asked = 0;
            for (index_t i = 0; i < all_.leaves; ++i, dy += all_.leaf_dy, x += all_.leaf_x) {
                if constexpr (!std::is_same_v<Asks, NoAsker>) {
                    for (; asked < (i + 1) * all_.lanes; asked += kTurn) asker->turn();
                }
                const Run run{dy, x, w, splat<X>(s_.hi[number(i)])};
                Chains chains = chains_[i];
                index_t step = 0;
                if (left <= steps) {
                    for (; step < left; ++step) add(chains, run, step);
                    go_over(chains, out[i]);
                }
                for (; (step + 1) * kStep <= all_.lanes; ++step) add_full(chains, run, step);
                if (step < steps) add(chains, run, step);
                chains_[i] = chains;
            }
            done += left <= steps ? steps - kDepth : steps;
        }
        for (index_t i = 0; i < all_.leaves; ++i) {
            if (done > 0) go_over(chains_[i], out[i]);
            out[i].g_xhat = xhat_sum<double>(out[i].g, out[i].g_xhat, s_.lo[number(i)], s_.rstd[number(i)]);
        }
    }

  private:
    static constexpr int K = kStep / kWidth<X>;
    struct Chains {
        Vec<X> g[K], g_d[K];
    };
    struct Run {
        const char *dy, *x;
        Vec<X> w, hi;
    };
    NK_INLINE index_t number(index_t i) const { return all_.set + i * all_.next_set; }
    NK_INLINE void add_full(Chains& c, const Run& run, index_t step) const {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            const index_t o = bytes<X>(step * kStep + i * kWidth<X>);
            const Vec<X> g = load<X>(run.dy + o) * run.w;
            c.g[i] = plus_.by_turns(i, c.g[i], g);
            c.g_d[i] += g * (load<X>(run.x + o) - run.hi);
        }
    }
    NK_INLINE void add(Chains& c, const Run& run, index_t step) const {
        int n = static_cast<int>(all_.lanes - step * kStep);
        if (n >= kStep) return add_full(c, run, step);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const index_t o = bytes<X>(step * kStep + i * kWidth<X>);
            const Vec<X> g = load_rest<X>(run.dy + o, n) * run.w, g_d = g * (load_rest<X>(run.x + o, n) - run.hi);
            c.g[i] += n >= kWidth<X> ? g : keep_first<T>(g, n);
            c.g_d[i] += n >= kWidth<X> ? g_d : keep_first<T>(g_d, n);
        }
    }
    NK_INLINE static void go_over(Chains& c, Sums& to) {
        to.g += sum_by_halves<T, K>(c.g);
        to.g_xhat += sum_by_halves<T, K>(c.g_d);
        c = {};
    }

    const SumSeries all_;  // which no store can change
    const Statistics<T> s_;
    const Adder<T> plus_;
    Chains chains_[kSideBySide];
};

template <class X, class Asks>
__attribute__((noinline)) void sums_side_by_side_as(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s,
                                                    Sums* out, Asks* asker) {
    for (; n > 0; --n, out += series++->leaves) SideBySide<X>(*series, s).sum(out, asker);
}

// False: they do not all lie so.
template <class X>
NK_INLINE bool sums_side_by_side(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s, bool far,
                                 Sums* out) {
    using Sides = SideBySide<X>;
    if (series->rows == 1) return false;  // of a last leaf it may be one
    for (index_t i = 0; i < n; ++i) {
        const SumSeries& all = series[i];
        if (all.leaves == 1 || all.leaves > kSideBySide || all.lanes > Sides::kLanes || all.w.row != 0) return false;
        if (all.leaf_dy != bytes<X>(all.lanes) || all.leaf_x != all.leaf_dy) return false;
    }
    NoAsker* const none = nullptr;
    if (!far) {
        sums_side_by_side_as<X>(series, n, s, out, none);
        return true;
    }
    constexpr index_t kAtOnce = 16;  // series of rows for one asker
    for (index_t first = 0; first < n; first += kAtOnce) {
        const index_t some = n - first < kAtOnce ? n - first : kAtOnce;
        SumSeries rows[kAtOnce];
        for (index_t i = 0; i < some; ++i) {
            rows[i] = series[first + i];
            rows[i].lanes *= rows[i].leaves;
            rows[i].leaves = 1;
        }
        with_asker<X, Start::by_and_by>(
            rows, some, [&](auto* asker) { sums_side_by_side_as<X>(series + first, some, s, out, asker); });
        for (index_t i = 0; i < some; ++i) out += series[first + i].leaves;
    }
    return true;
}

// Runs of up to so many bytes, whose turns are few and half empty, ask for what follows in memory. In order over that:
// 32 x 2048 x 7^2 1.25; float64 32 x 600 x 8^2, of 512 bytes, 1.15; float32 runs of 544 to 576 bytes 0.75 to 0.87.
constexpr index_t kShortRunBytes = 512;

template <class X, bool WLane>
void sums_along(const SumSeries* series, index_t n, Statistics<Compute<X>> s, bool far, Sums* out) {
    if constexpr (!WLane) {
        if (sums_side_by_side<X>(series, n, s, far, out)) return;
        if constexpr (!kAboutOrigin<X>) {
            for (; n > 0 && are_short_leaves(*series); --n, out += series++->leaves) {
                const auto kernel = series->lanes <= kWidth<X> ? sums_of_short_leaves<X, 1>
                                                               : sums_of_short_leaves<X, kStep / kWidth<X>>;
                kernel(*series, s, out);
            }
            if (n == 0) return;
        }
    }
    NoAsker* const none = nullptr;
    AsksInMemory* const in_memory = nullptr;
    if (!far || !far_apart(series->x)) {
        sums_along_as<X, WLane>(series, n, s, out, none);
    } else if (WLane || bytes<X>(series->lanes) <= kShortRunBytes) {
        sums_along_as<X, WLane>(series, n, s, out, in_memory);
    } else if constexpr (!WLane) {
        with_asker<X, Start::at_once>(series, n,
                                      [&](auto* asker) { sums_along_as<X, WLane>(series, n, s, out, asker); });
    }
}

// Sums of dy and dy * xhat of a row whose lanes are different sets.
template <class X>
struct AcrossBlock {
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int kShare = 1;
    static constexpr int K = kLanes / kWidth<X>;
    const char *dy, *x;
    Statistics<T> s;
    Vec<X> sum[K] = {}, sum_xhat[K] = {};
    double total = 0, total_xhat = 0;

    NK_INLINE void row(index_t) {}
    NK_INLINE void ask_ahead(index_t) {}
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add(i, at + i * kWidth<X>, kWidth<X>);
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n > 0) add(i, at + i * kWidth<X>, n);
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<T, K>(sum);
        total_xhat += sum_by_halves<T, K>(sum_xhat);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) sum[i] = sum_xhat[i] = Vec<X>{};
    }

  private:
    NK_INLINE void add(int i, index_t lane, int n) {
        const auto of_set = [=](const T* p)
                                NK_INLINE_LAMBDA { return load_rest<T>(reinterpret_cast<const char*>(p + lane), n); };
        // Where there is nothing, all of them are 0, and so is what is added.
        const Vec<X> v = load_rest<X>(dy + bytes<X>(lane), n), d = load_rest<X>(x + bytes<X>(lane), n) - of_set(s.hi);
        sum[i] += v;
        sum_xhat[i] += v * ((d - of_set(s.lo)) * of_set(s.rstd));
    }
};

template <class X>
void sums_across(In dy, In x, Statistics<Compute<X>> s, index_t rows, index_t lanes, Sums* out) {
    for (index_t r = 0; r < rows; ++r) {
        AcrossBlock<X> block{dy.at(r), x.at(r), s};
        for_steps(1, lanes, block);
        out[r] += {block.total, block.total_xhat};
    }
}

}  // namespace
