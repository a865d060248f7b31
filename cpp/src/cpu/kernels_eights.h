// Kernels of sets that are one short row each, for a whole pass: eight rows are in hand at a time. Part of kernels.cpp.
//
// What is done once a row, to end its sums, find its statistics and begin to write it, is as much as the arithmetic of
// 64 elements, and each step waits for the one before. So the lanes of eight sums are folded together, the statistics
// of eight rows are one vector, and while they are on their way a core has the next eight to add up and the last to
// write. The sums, their order and the formula are those of the kernels along the lanes.
#pragma once

#include "kernels_along.h"
#include "kernels_moments.h"
#include "kernels_sums.h"

namespace {

// Forward, the squares of a row are one chain, backward its sums are.
static_assert(kMostOfEight == kDepth * 2 * kStep && kMostOfEight <= kLeafLanes);

// A block whose lanes are folded elsewhere.
template <class B>
struct Unfolded : B {
    NK_INLINE void flush() {}
};

// A row, by a block that was empty.
template <class B>
NK_INLINE B row_of(B block, index_t lanes) {
    block.row(0);
    index_t at = 0;
    for (; lanes - at >= B::kLanes; at += B::kLanes) block.full(at);
    if (at < lanes) block.tail(at, static_cast<int>(lanes - at));
    return block;
}

// f(how rows are stored, as a constant): past the caches where they are whole vectors that begin on a line, or that
// follow each other without gaps.
template <class X, class F>
NK_INLINE auto with_stores_of_eights(bool stream, Out y, index_t lanes, F f) {
    const bool lines = on_lines(y), on_elements = reinterpret_cast<std::uintptr_t>(y.p) % sizeof(X) == 0;
    const bool can_join = kCanJoin && on_elements && y.row == bytes<X>(lanes);
    return with_stores<X, kCanJoin>(stream && lanes % kWidth<X> == 0 && (lines || can_join), lines, f);
}

// The two parts of eight means, as normkit::split makes them.
template <class T>
struct MeansOfEight {
    Eight<T> hi = {}, lo = {};

    MeansOfEight() = default;
    NK_INLINE explicit MeansOfEight(const Eight<double>& mean) {
        const Eight<T> rounded = narrowed(mean);
        hi = rounded + T{0};
        lo = narrowed(mean - widened(rounded)) + T{0};
    }
};

// ------------------------------------------------------------------------------------------------------------ forward

// What becomes known of eight rows: their means, then what they vary by, then what it takes to write them. One step for
// each turn of the loop, so that none waits for a division of the one before.
template <class T>
struct EightForward {
    Eight<double> mean = {}, M2, variance;
    Eight<T> pilot = {}, rstd;
    MeansOfEight<T> split;
    bool centred;  // all of them, as in apply_along_rows

    NK_INLINE void find_means(Eight<double> sums, double count) {
        mean = (0.0 + sums) / count;
        pilot = narrowed(mean);
    }
    template <bool Center>
    NK_INLINE void find_variances(Eight<T> squares, double count) {
        M2 = 0.0 + widened(squares);
        if constexpr (Center) M2 = M2_about_mean<Eight<double>>(M2, mean - widened(pilot), count);
        variance = M2 / count;
    }
    // For the rows from r on. False: not all of them are plain.
    template <bool Center>
    NK_INLINE bool find_rstd(double count, const ForwardEights<T>& all, index_t r) {
        const Eight<double> exact = 1.0 / square_roots(variance + all.eps);
        if (!all_of(normkit::are_plain<T>(mean, M2, count, all.eps) & normkit::is_unscaled<T>(exact))) return false;
        rstd = narrowed(exact);
        if constexpr (Center) {
            split = MeansOfEight<T>(mean);
            centred = all_of((widened(split.hi) != 0.0) | (widened(split.lo) != 0.0));
        }
        if (all.mean) store_eight<double>(all.mean + r, 0.0 + mean);
        if (all.rstd) store_eight<double>(all.rstd + r, exact);
        if (all.M2) store_eight<double>(all.M2 + r, M2);
        return true;
    }
};

// A row of y. Centred: as in apply_rows.
template <class X, bool WLane, Stores How, bool Centred>
NK_INLINE void write_row(const char* x, const char* w, const char* b, char* y, index_t lanes, Split<Compute<X>> s,
                         EndsOf<X, How, true>& ends) {
    using T = Compute<X>;
    const Vec<X> hi = splat<X>(s.hi), lo = splat<X>(s.lo), rstd = splat<X>(s.rstd);
    Vec<X> a = {}, c = {};
    if constexpr (!WLane) {
        const YTerms<T> terms = y_terms<T>(s.hi, s.lo, s.rstd, value_at<T>(w), value_at<T>(b));
        a = splat<X>(terms.a);
        c = splat<X>(terms.c);
    }
    const auto vector = [&](index_t lane, int n) NK_INLINE_LAMBDA {
        Vec<X> d = load_rest<X>(x + bytes<X>(lane), n), av = a, cv = c;
        if constexpr (Centred) d -= hi;
        if constexpr (WLane) {
            av = rstd * load_rest<T>(w + bytes<T>(lane), n);
            cv = load_rest<T>(b + bytes<T>(lane), n);
            if constexpr (Centred) cv = bias_term<Vec<X>>(av, lo, cv);
        }
        put<X, How, true>(ends, y + bytes<X>(lane), d * av + cv, n);
    };
    ends.begin(y);
    constexpr int kUnroll = 4;
    index_t lane = 0;
    for (; lanes - lane >= kUnroll * kWidth<X>; lane += kUnroll * kWidth<X>) {
#pragma GCC unroll 4
        for (int i = 0; i < kUnroll; ++i) vector(lane + i * kWidth<X>, kWidth<X>);
    }
    for (; lanes - lane >= kWidth<X>; lane += kWidth<X>) vector(lane, kWidth<X>);
    if (lane < lanes) vector(lane, static_cast<int>(lanes - lane));
}

template <class X, bool Center, bool WLane, Stores How>
index_t forward_in_eights_as(const ForwardEights<Compute<X>>& of) {
    using T = Compute<X>;
    const ForwardEights<T> all = of;  // which no store can change
    const index_t lanes = all.lanes, eights = all.rows / kEight;
    const double count = static_cast<double>(lanes);
    const Adder<double> plus;
    const Adder<T> plus_squares;
    Vec<double> sums[kEight];
    Vec<X> squares[kEight];
    EightForward<T> in_hand[4];
    EndsOf<X, How, true> ends;

    const char *x_next = all.x.p, *x_now = x_next, *x_last = x_next, *w = all.w.p, *b = all.b.p;
    char* y = all.y.p;
    // On a Zen 5 rms norm asks further ahead than layer norm: 4096 x 1000 and 1023 1.05.
    const auto ask_ahead = [&](const char* x) NK_INLINE_LAMBDA {
        if (!all.far) return;
        const index_t ahead = Center || !ahead_to_l1 ? kAhead : kAhead * 3 / 2;
        for (index_t at = 0; at < lanes; at += kTurn) ask_for_turn<X>(x, at, ahead);
    };
    const auto add_up = [&](int j) NK_INLINE_LAMBDA {
        ask_ahead(x_next);
        sums[j] = vectors_by_halves(row_of(MeanBlock<X>{{x_next, 0}, {}, {}, {}, 0, plus}, lanes).sum);
        x_next += all.x.row;
    };
    const auto square = [&](int j, const EightForward<T>& e) NK_INLINE_LAMBDA {
        if constexpr (!Center) ask_ahead(x_now);
        const SquaresBlock<X, !Center> empty{{x_now, 0}, splat<X>(e.pilot[j]), {}, {}, 0, plus_squares};
        squares[j] = vectors_by_halves(row_of(empty, lanes).sum);
        x_now += all.x.row;
    };
    const auto write = [&](int j, const EightForward<T>& e) NK_INLINE_LAMBDA {
        const Split<T> s{e.split.hi[j], e.split.lo[j], e.rstd[j], 1};
        if (Center && (e.centred || s.hi != 0 || s.lo != 0)) {
            write_row<X, WLane, How, true>(x_last, w, b, y, lanes, s, ends);
        } else {
            write_row<X, WLane, How, false>(x_last, w, b, y, lanes, s, ends);
        }
        x_last += all.x.row;
        y += all.y.row;
        w += all.w.row;
        b += all.b.row;
    };

    // Each turn adds up eight number i + 1, squares number i, and writes number i - 2.
    for (index_t i = -1; i < eights + 2; ++i) {
        EightForward<T>&next = in_hand[(i + 1) & 3], &now = in_hand[i & 3], &last = in_hand[(i - 1) & 3];
        const EightForward<T>& written = in_hand[(i - 2) & 3];
        const bool adds = Center && i + 1 < eights, squaring = i >= 0 && i < eights, writes = i >= 2;
        for (int j = 0; j < kEight; ++j) {
            if (adds) add_up(j);
            if (writes) write(j, written);
            if (squaring) square(j, now);
        }
        if (i >= 1 && i <= eights) {
            const index_t r = (i - 1) * kEight;
            if (!last.template find_rstd<Center>(count, all, r)) {
                ends.finish();
                return r;
            }
        }
        if (squaring) now.template find_variances<Center>(lanes_by_halves<T>(squares), count);
        if (adds) next.find_means(lanes_by_halves<double>(sums), count);
    }
    ends.finish();
    return eights * kEight;
}

template <class X>
index_t forward_in_eights(const ForwardEights<Compute<X>>& all) {
    if constexpr (kAboutOrigin<X> || kLoose) {
        return 0;
    } else {
        return with_stores_of_eights<X>(all.stream, all.y, all.lanes, [&](auto how) {
            const auto kernel = all.center ? (all.w_lane ? forward_in_eights_as<X, true, true, how>
                                                         : forward_in_eights_as<X, true, false, how>)
                                           : (all.w_lane ? forward_in_eights_as<X, false, true, how>
                                                         : forward_in_eights_as<X, false, false, how>);
            return kernel(all);
        });
    }
}

// ----------------------------------------------------------------------------------------------------------- backward

// What dx needs of eight rows.
template <class T>
struct EightBackward {
    MeansOfEight<T> mean;
    Eight<T> rstd;
    DxTerms<Eight<T>> terms;

    // From the sums of g and of g * (x - hi).
    template <bool Center>
    NK_INLINE void find_terms(Eight<T> sum_g, Eight<T> sum_d, double count) {
        const Eight<double> g = 0.0 + widened(sum_g), d = 0.0 + widened(sum_d);
        const Eight<double> g_xhat = 0.0 + xhat_sum<Eight<double>>(g, d, widened(mean.lo), widened(rstd));
        const Eight<T> mean_g = Center ? narrowed(g / count) : Eight<T>{};
        terms = dx_terms<Eight<T>>(mean.lo, rstd, mean_g, narrowed(g_xhat / count));
    }
};

template <class X, bool Center, bool Sum, Stores How>
index_t backward_in_eights_as(const BackwardEights& of) {
    using T = Compute<X>;
    const BackwardEights all = of;  // which no store can change
    constexpr index_t kMost = kMostOfEight / 2;
    ShortDownSums<X, kMost> down;
    if constexpr (Sum) down.clear(all.lanes);
    const double count = static_cast<double>(all.lanes);
    const Adder<T> plus;
    Vec<X> sums_g[kEight], sums_d[kEight];
    EightBackward<T> in_hand[2];
    EndsOf<X, How, true> ends;

    constexpr index_t kInChain = kSumRows / kEight;  // eights that are added up, lane by lane, in one chain
    static_assert(kSumRows % kEight == 0);
    index_t eights = all.rows / kSumRows * kInChain;
    // Each turn takes the sums of eight number i + 1 beside dx of number i.
    for (index_t i = -1; i < eights; ++i) {
        EightBackward<T>& next = in_hand[(i + 1) & 1];
        const EightBackward<T>& now = in_hand[i & 1];
        const index_t r = i * kEight, r_next = r + kEight;
        for (index_t k = 0; (i + 1) % kInChain == 0 && k < kInChain && i + 1 < eights; ++k) {
            if (!all_of(normkit::is_unscaled<T>(load_eight(all.rstd + r_next + k * kEight)))) eights = i + 1;
        }
        const bool adds = i + 1 < eights;
        if (adds) {
            if constexpr (Center) next.mean = MeansOfEight<T>(load_eight(all.mean + r_next));
            next.rstd = narrowed(load_eight(all.rstd + r_next));
        }
        for (int j = 0; j < kEight; ++j) {
            const auto add_up = [&](auto& beside) NK_INLINE_LAMBDA {
                const In dy{all.dy.at(r_next + j), 0}, x{all.x.at(r_next + j), 0}, w{all.w.at(r_next + j), 0};
                Unfolded<SumsBlock<X, true>> row{
                    {dy, x, w, splat<X>(next.mean.hi[j]), {}, {}, {}, {}, {}, {}, 0, 0, plus}};
                for_steps(1, all.lanes, row, beside);
                sums_g[j] = vectors_by_halves(row.sum);
                sums_d[j] = vectors_by_halves(row.sum_d);
            };
            if (i < 0) {
                Nothing nothing;
                if (adds) add_up(nothing);
                continue;
            }
            const Split<T> s{now.mean.hi[j], now.mean.lo[j], now.rstd[j], 1};
            WritingDx<X, Sum ? Down::kept : Down::none, How> writing(
                all, r + j, s, DxTerms<T>{now.terms.e[j], now.terms.c[j]}, false, down, ends);
            if (adds) add_up(writing);
            writing.rest();
        }
        if (adds) next.template find_terms<Center>(lanes_by_halves<T>(sums_g), lanes_by_halves<T>(sums_d), count);
        if (Sum && i >= 0 && (i + 1) % kInChain == 0) {
            DownSums sums = all.sums;
            sums.fresh = sums.fresh && i + 1 == kInChain;
            down.add_to(sums, all.lanes);
            down.clear(all.lanes);
        }
    }
    ends.finish();
    return eights * kEight;
}

template <class X>
index_t backward_in_eights(const BackwardEights& all) {
    if constexpr (kAboutOrigin<X>) {
        return 0;
    } else {
        return with_stores_of_eights<X>(all.stream, all.dx, all.lanes, [&](auto how) {
            const auto kernel = all.mean ? (all.sums.g ? backward_in_eights_as<X, true, true, how>
                                                       : backward_in_eights_as<X, true, false, how>)
                                         : (all.sums.g ? backward_in_eights_as<X, false, true, how>
                                                       : backward_in_eights_as<X, false, false, how>);
            return kernel(all);
        });
    }
}

}  // namespace
