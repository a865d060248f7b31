// Kernels down the rows: neighbouring lanes are different sets. Results are written row by row. Part of kernels.cpp.
#pragma once

#include "kernels_along.h"
#include "kernels_leaves.h"
#include "kernels_sums.h"

namespace {

// Rows whose lanes are taken together before the next chunk of lanes: enough to pay for loading the statistics, few
// enough that the rows are read and written as so many forward streams.
constexpr index_t kRowsAtOnce = 8;

// w (or b) of row r: one value for all lanes, or one a lane.
template <class X, bool WLane, int V>
NK_INLINE Vec<X> load_parameter(In w, index_t r, int i, int n) {
    using T = Compute<X>;
    return WLane ? load_chunk<T, V>(w.at(r), i, n) : splat<T>(value_at<T>(w.at(r)));
}

template <class X, bool WLane, bool Stream, int V>
NK_INLINE void apply_down_chunk(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, int n) {
    Vec<X> hi[V], lo[V], rstd[V], a[V], c[V];
    load_lanes<X, V>(hi, s.hi, n);
    load_lanes<X, V>(lo, s.lo, n);
    load_lanes<X, V>(rstd, s.rstd, n);
    const auto load_row_parameters = [&](index_t r) NK_INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const YTerms<Vec<X>> terms = y_terms<Vec<X>>(hi[i], lo[i], rstd[i], load_parameter<X, WLane, V>(w, r, i, n),
                                                         load_parameter<X, WLane, V>(b, r, i, n));
            a[i] = terms.a;
            c[i] = terms.c;
        }
    };
    load_row_parameters(0);
    for (index_t r = 0; r < rows; ++r) {
        if (r > 0 && (w.row != 0 || b.row != 0)) load_row_parameters(r);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            put<X, Stream>(y.at(r) + i * kMemoryBytes<X>, (load_chunk<X, V>(x.at(r), i, n) - hi[i]) * a[i] + c[i], n);
        }
    }
}

template <class P>
NK_INLINE Rows<P> shifted(Rows<P> t, index_t row, index_t bytes) {
    return {t.p ? t.at(row) + bytes : t.p, t.row};
}

template <class T>
NK_INLINE Statistics<T> shifted(Statistics<T> s, index_t by) {
    const auto move = [by](const T* p) { return p ? p + by : p; };
    return {move(s.hi), move(s.lo), move(s.rstd), move(s.mean_g), move(s.mean_g_xhat), s.row};
}

// What is one a lane in the formula, N arrays of it, so short that together they leave room in L1 for what goes by.
template <class X, int N>
constexpr index_t kTermLanes = 20480 / N / 256 * 256 / static_cast<index_t>(sizeof(Compute<X>));
template <class X, int N>
struct Terms {
    static_assert(kTermLanes<X, N> % 64 == 0, "or lanes_of_part may give more");
    alignas(64) Compute<X> of[N][kTermLanes<X, N> + 2 * kWidth<X>];
};

// f(lane, n) for the vectors of a row, its first `head` lanes by themselves.
template <class X, class F>
NK_INLINE void for_row(index_t lanes, index_t head, F f) {
    constexpr index_t width = kWidth<X>;
    index_t at = head < lanes ? head : lanes;
    if (at > 0) f(index_t{0}, static_cast<int>(at));
    for (; lanes - at >= 4 * width; at += 4 * width) {
#pragma GCC unroll 4
        for (index_t i = 0; i < 4; ++i) f(at + i * width, static_cast<int>(width));
    }
    for (; lanes - at >= width; at += width) f(at, static_cast<int>(width));
    if (at < lanes) f(at, static_cast<int>(lanes - at));
}

// How rows go by that have their terms in common. `rows` of them, where memory has no gap in between, are taken for one
// of `lanes` lanes with the terms repeated: vectors are part-filled where lanes are few or no multiple of a vector.
// The first `head` lanes bring the result to a vector boundary; the terms are stored as far from one, so that loading
// them crosses no cache line. Seamless: only those of the first bundle do, and all vectors behind them are whole,
// across the ends of bundles, whose terms go on with those of the next (a part-filled store at the ends of each row
// between non-temporal ones: batch norm 32 x 64 x 56^2 in evaluation took 3.5 times as long). Not alike: each bundle
// has a head of its own, in a cache single long rows (evaluation of 1000 x 2049 took 1.8 times as long without;
// several rows of 251 float16 1.15 times with).
struct Bundle {
    index_t rows, lanes, head;
    bool seamless, alike;
};
template <class X>
constexpr index_t kBundleLanes = kTermLanes<X, 5>;
template <class X, bool Stream>
NK_INLINE Bundle bundle_of(Out y, index_t rows, index_t lanes, bool without_gap) {
    constexpr index_t width = kWidth<X>, few = kChunk * width;
    index_t n = 1;
    if (without_gap && (lanes % width != 0 || lanes < few)) {
        index_t whole = 1;  // rows that fill whole vectors
        while (whole * lanes % width != 0) whole *= 2;
        n = (whole * lanes <= few ? few : kBundleLanes<X>) / lanes;
        if (n > rows) n = rows;
        if (n > whole) n -= n % whole;
        if (n < 1) n = 1;
    }
    const bool aligned_alike = y.row * n % kMemoryBytes<X> == 0;
    const index_t head = Stream || (aligned_alike && n * lanes > few) ? head_of<X>(y.p) : 0;
    const bool seamless = Stream && without_gap && (head > 0 || n * lanes % width != 0);
    return {n, n * lanes, head, seamless, aligned_alike || (!Stream && (n > 1 || lanes <= few))};
}

// Non-temporal stores down the rows need all rows to reach a vector boundary after the same number of lanes, unless
// they go by in bundles: those are seamless, or, where rows have gaps in between or come in parts, so long that their
// ends, ordinary stores, cost less than is gained.
template <class X>
NK_INLINE bool can_stream_down(Out y, index_t lanes, bool without_gap, bool in_bundles) {
    const bool whole = y.row % kMemoryBytes<X> == 0;
    if (whole ? without_gap : in_bundles && without_gap && lanes <= kBundleLanes<X>) {
        return reinterpret_cast<std::uintptr_t>(y.p) % sizeof(X) == 0;
    }
    return (whole || in_bundles) && can_stream<X>(y, lanes);
}

template <class X>
NK_INLINE index_t first_term(Bundle b) {
    return first_lane<X>(b.head);
}

template <class X, int N>
NK_INLINE void repeat(Terms<X, N>& terms, Bundle b) {
    const index_t lanes = b.lanes / b.rows;
    for (auto& term : terms.of) {
        Compute<X>* const first = term + first_term<X>(b);
        for (index_t done = 1; done < b.rows;) {
            const index_t more = b.rows - done < done ? b.rows - done : done;
            __builtin_memcpy(first + done * lanes, first, more * lanes * sizeof *first);
            done += more;
        }
        if (b.seamless) {
            const index_t more = kWidth<X> < b.lanes ? kWidth<X> : b.lanes;
            __builtin_memcpy(first + b.lanes, first, more * sizeof *first);
        }
    }
}

// f(vectors as a constant), if a bundle is so few whole vectors that its terms can stay in registers.
template <class X, class F>
NK_INLINE bool in_registers(Bundle b, F f) {
    if (b.lanes % kWidth<X> != 0 || b.lanes > kChunk * kWidth<X> || b.head > 0) return false;
    const index_t vectors = b.lanes / kWidth<X>;
    if (vectors == 1) f(std::integral_constant<int, 1>{});
    if (vectors == 2) f(std::integral_constant<int, 2>{});
    if constexpr (kChunk == 4) {
        if (vectors == 3) f(std::integral_constant<int, 3>{});
        if (vectors == 4) f(std::integral_constant<int, 4>{});
    }
    return true;
}

// f(row, element behind its beginning, term, n) for the vectors of `rows` rows of y from number r on, bundle by bundle.
template <class X, class F>
NK_INLINE void for_bundles(Bundle b, Out y, index_t r, index_t rows, F f) {
    const index_t lanes = b.lanes / b.rows;
    if (b.seamless) {
        const index_t all = rows * lanes, head = b.head < all ? b.head : all;
        if (head > 0) f(index_t{0}, index_t{0}, index_t{0}, static_cast<int>(head));
        // The vectors that begin in one bundle, the last of which may end in the next.
        for (index_t at = head, t = head, n; at < all; at += n, t += n - b.lanes) {
            const index_t begun = (b.lanes - t + kWidth<X> - 1) / kWidth<X> * kWidth<X>;
            n = all - at < begun ? all - at : begun;
            for_row<X>(n, 0, [=](index_t l, int m) NK_INLINE_LAMBDA { f(index_t{0}, at + l, t + l, m); });
        }
        return;
    }
    for (; r < rows; r += b.rows) {
        for_row<X>(rows - r < b.rows ? (rows - r) * lanes : b.lanes, b.alike ? b.head : head_of<X>(y.at(r)),
                   [=](index_t l, int n) NK_INLINE_LAMBDA { f(r, l, l, n); });
    }
}

// Where arrays come from memory and rows follow each other, what lies kAhead bytes ahead is asked for (backward:
// ask_down). Time with it over time without, one thread of a Zen 4: dx of batch norm 32 x 2048 x 7^2 0.72, 32 x 1024 x
// 14^2 0.82, of group norm 2 x 960 x 64^2 0.79, of 64 to 256 channels 0.98 to 1.02; where arrays are in a cache 1.03 to
// 1.1.

// Row by row, so that memory sees one stream of each operand.
template <class X, bool Stream>
void apply_terms(In x, Out y, const Terms<X, 3>& terms, Bundle b, index_t rows) {
    const index_t off = first_term<X>(b), lanes = b.lanes / b.rows;
    const Compute<X>*hi = terms.of[0] + off, *a = terms.of[1] + off, *c = terms.of[2] + off;
    index_t r = 0;
    in_registers<X>(b, [&](auto v) NK_INLINE_LAMBDA {
        constexpr int V = v;
        Vec<X> hi_v[V], a_v[V], c_v[V];
        load_lanes<X, V>(hi_v, hi, kWidth<X>);
        load_lanes<X, V>(a_v, a, kWidth<X>);
        load_lanes<X, V>(c_v, c, kWidth<X>);
        for (; rows - r >= b.rows; r += b.rows) {
            const char* px = x.at(r);
            char* py = y.at(r);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                const index_t o = i * kMemoryBytes<X>;
                put<X, Stream>(py + o, (load<X>(px + o) - hi_v[i]) * a_v[i] + c_v[i], kWidth<X>);
            }
        }
    });
    const bool apart = x.row != bytes<X>(lanes);
    // In a cache two rows at a time, which read the terms once for both: 0.95 to 0.97 of the time of group norm 2 x
    // 2560 x 8^2 and 2 x 1280 x 16^2. Rows without gaps 1.0 to 1.1 times as long so.
    for (; !Stream && apart && b.alike && rows - r >= 2; r += 2) {
        for_row<X>(b.lanes, b.head, [&](index_t l, int n) NK_INLINE_LAMBDA {
            const Vec<X> mean = load_term<X>(hi + l, n), w = load_term<X>(a + l, n), bias = load_term<X>(c + l, n);
#pragma GCC unroll 2
            for (int k = 0; k < 2; ++k) {
                const Vec<X> d = load_rest<X>(x.at(r + k) + bytes<X>(l), n) - mean;
                put<X, Stream>(y.at(r + k) + bytes<X>(l), d * w + bias, n);
            }
        });
    }
    // From memory, where rows lie apart, the next one is asked for: it is a page or more away, where no hardware looks
    // ahead (0.85 of the time of batch norm 32 x 1024 x 14^2 in evaluation).
    for_bundles<X>(b, y, r, rows, [=](index_t row, index_t l, index_t t, int n) NK_INLINE_LAMBDA {
        const char* px = x.at(row) + bytes<X>(l);
        if constexpr (Stream) {
            if (apart) {
                prefetch_far(px + b.rows * x.row);
            } else {
                prefetch_near(px + kAhead);
            }
        }
        const Vec<X> d = load_rest<X>(px, n) - load_term<X>(hi + t, n);
        put<X, Stream>(y.at(row) + bytes<X>(l), d * load_term<X>(a + t, n) + load_term<X>(c + t, n), n);
    });
}

// w and b are the same for all rows; at most kTermLanes lanes.
template <class X, bool WLane, bool Stream>
NK_INLINE void apply_down_along(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    const Bundle bundle = bundle_of<X, Stream>(y, rows, lanes, x.row == bytes<X>(lanes) && y.row == x.row);
    Terms<X, 3> terms;
    for_row<X>(lanes, 0, [&](index_t l, int n) NK_INLINE_LAMBDA {
        const index_t ow = WLane ? bytes<T>(l) : 0, at = first_term<X>(bundle) + l;
        const Vec<X> hi = load_term<X>(s.hi + l, n);
        const YTerms<Vec<X>> y = y_terms<Vec<X>>(hi, load_term<X>(s.lo + l, n), load_term<X>(s.rstd + l, n),
                                                 load_parameter<X, WLane, 1>({w.p + ow, 0}, 0, 0, n),
                                                 load_parameter<X, WLane, 1>({b.p + ow, 0}, 0, 0, n));
        put<T, false>(reinterpret_cast<char*>(terms.of[0] + at), hi, n);
        put<T, false>(reinterpret_cast<char*>(terms.of[1] + at), y.a, n);
        put<T, false>(reinterpret_cast<char*>(terms.of[2] + at), y.c, n);
    });
    repeat<X, 3>(terms, bundle);
    apply_terms<X, Stream>(x, y, terms, bundle, rows);
}

// Rows of more lanes than there is room for go so many at a time, so that memory is written in order.
constexpr index_t kWideRows = 32;

template <class X, bool WLane, bool Stream>
NK_INLINE void apply_down_rows(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    if (w.row == 0 && b.row == 0) {
        const index_t per = lanes_of_part(lanes, kTermLanes<X, 3>), at_once = per < lanes ? kWideRows : rows;
        for (index_t r = 0; r < rows; r += at_once) {
            for (index_t l = 0; l < lanes; l += per) {
                const index_t o = bytes<X>(l), ow = WLane ? bytes<Compute<X>>(l) : 0;
                apply_down_along<X, WLane, Stream>(
                    shifted(x, r, o), shifted(y, r, o), shifted(w, 0, ow), shifted(b, 0, ow), shifted(s, l),
                    rows - r < at_once ? rows - r : at_once, lanes - l < per ? lanes - l : per);
            }
        }
        return;
    }
    for (index_t r = 0; r < rows; r += kRowsAtOnce) {
        const index_t n_rows = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
        for_chunks<X>(
            lanes,
            [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
                const index_t o = bytes<X>(lane), ow = WLane ? bytes<Compute<X>>(lane) : 0;
                apply_down_chunk<X, WLane, Stream, v>(shifted(x, r, o), shifted(y, r, o), shifted(w, r, ow),
                                                      shifted(b, r, ow), shifted(s, lane), n_rows, n);
            },
            Stream ? head_of<X>(y.p) : 0);
    }
}

template <class X, bool WLane>
void apply_down(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    const bool in_bundles = w.row == 0 && b.row == 0;
    const bool without_gap = in_bundles && x.row == bytes<X>(lanes) && y.row == x.row;
    if (stream && can_stream_down<X>(y, lanes, without_gap, in_bundles)) {
        apply_down_rows<X, WLane, true>(x, y, w, b, s, rows, lanes);
    } else {
        apply_down_rows<X, WLane, false>(x, y, w, b, s, rows, lanes);
    }
}

// Sums of a leaf of g and g * (x - hi), or, where statistics are one a row, of g * xhat: to those of all leaves.
template <class X, bool SLane, int V>
NK_INLINE void add_sums(const Vec<X> (&sum)[V], const Vec<X> (&sum_xhat)[V], const Vec<X> (&lo)[V],
                        const Vec<X> (&rstd)[V], int n, double* sum_g, double* sum_g_xhat) {
    using T = Compute<X>;
    Doubles<X, V> g_all, xhat_all;
    load_doubles<X, V>(g_all, sum_g, n);
    load_doubles<X, V>(xhat_all, sum_g_xhat, n);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        const Widened<T> g = widened<T>(sum[i]), g_d = widened<T>(sum_xhat[i]);
        const Widened<T> wide_lo = widened<T>(lo[i]), wide_rstd = widened<T>(rstd[i]);
#pragma GCC unroll 2
        for (int j = 0; j < Widened<T>::kVectors; ++j) {
            g_all[i].v[j] += g.v[j];
            xhat_all[i].v[j] += SLane ? xhat_sum(g.v[j], g_d.v[j], wide_lo.v[j], wide_rstd.v[j]) : g_d.v[j];
        }
    }
    store_doubles<X, V>(sum_g, g_all, n);
    store_doubles<X, V>(sum_g_xhat, xhat_all, n);
}

template <class X, bool SLane, bool WLane, bool Dx, bool Sum, bool Stream, int V>
NK_INLINE void backward_down_chunk(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, int n,
                                   double* sum_g, double* sum_g_xhat) {
    using T = Compute<X>;
    Vec<X> hi[V] = {}, lo[V] = {}, rstd[V] = {}, a[V] = {}, e[V] = {}, c[V] = {}, wv[V];
    Vec<X> sum[V] = {}, sum_xhat[V] = {};  // statistics one a lane: of g * (x - hi)
    const Adder<T> plus;
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) wv[i] = load_parameter<X, WLane, V>(w, 0, i, n);
    if constexpr (SLane) {
        load_lanes<X, V>(hi, s.hi, n);
        load_lanes<X, V>(lo, s.lo, n);
        load_lanes<X, V>(rstd, s.rstd, n);
        if constexpr (Dx) {
            Vec<X> mean_g[V], mean_g_xhat[V];
            load_lanes<X, V>(mean_g, s.mean_g, n);
            load_lanes<X, V>(mean_g_xhat, s.mean_g_xhat, n);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                const DxTerms<Vec<X>> terms = dx_terms<Vec<X>>(lo[i], rstd[i], mean_g[i], mean_g_xhat[i]);
                e[i] = terms.e;
                c[i] = terms.c;
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) a[i] = rstd[i] * wv[i];
    }
    for (index_t r = 0; r < rows; ++r) {
        if constexpr (!SLane) {
            const index_t k = r * s.row;
            DxTerms<Compute<X>> terms = {};
            if constexpr (Dx) terms = dx_terms<Compute<X>>(s.lo[k], s.rstd[k], s.mean_g[k], s.mean_g_xhat[k]);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                hi[i] = splat<X>(s.hi[k]);
                lo[i] = splat<X>(s.lo[k]);
                rstd[i] = splat<X>(s.rstd[k]);
                e[i] = splat<X>(terms.e);
                c[i] = splat<X>(terms.c);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            if (r > 0 && w.row != 0) wv[i] = load_parameter<X, WLane, V>(w, r, i, n);
            if (!SLane || (r > 0 && w.row != 0)) a[i] = rstd[i] * wv[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            if constexpr (Sum && !Dx && Stream && V > 1) {
                prefetch_near(dy.at(r + kSumRows) + i * kMemoryBytes<X>);
                prefetch_near(x.at(r + kSumRows) + i * kMemoryBytes<X>);
            }
            const Vec<X> dyv = load_chunk<X, V>(dy.at(r), i, n);
            const Vec<X> d = load_chunk<X, V>(x.at(r), i, n) - hi[i];
            if constexpr (Dx)
                put<X, Stream>(dx.at(r) + i * kMemoryBytes<X>, dx_of<Vec<X>>(dyv, d, rstd[i], a[i], e[i], c[i]), n);
            if constexpr (Sum) {
                const Vec<X> term = Dx ? dyv : dyv * wv[i];
                sum[i] = Dx ? sum[i] + term : plus.by_turns(i, sum[i], term);
                sum_xhat[i] += term * (SLane ? d : (kLoose ? d : d - lo[i]) * rstd[i]);
            }
        }
    }
    if constexpr (Sum) add_sums<X, SLane, V>(sum, sum_xhat, lo, rstd, n, sum_g, sum_g_xhat);
}

// What a backward pass reads next from memory: some way ahead; of rows that lie apart the next one. Where those asked
// for what follows in memory, which is another unit's, batch norm 128 x 8192 took 1.6 times as long (an Emerald
// Rapids).
constexpr index_t kAheadDown = 4096;  // bytes
NK_INLINE void ask_down(const char* p, index_t row, bool apart) {
    if (apart) {
        prefetch_far(p + row);
    } else {
        prefetch_near(p + ahead_of_two(kAheadDown));
    }
}

// As apply_terms.
template <class X, bool Stream>
void dx_terms_down(In dy, In x, Out dx, const Terms<X, 5>& terms, Bundle b, index_t rows) {
    const index_t off = first_term<X>(b);
    const Compute<X>*hi = terms.of[0] + off, *rstd = terms.of[1] + off, *a = terms.of[2] + off, *e = terms.of[3] + off,
          *c = terms.of[4] + off;
    index_t r = 0;
    in_registers<X>(b, [&](auto v) NK_INLINE_LAMBDA {
        constexpr int V = v;
        Vec<X> hi_v[V], rstd_v[V], a_v[V], e_v[V], c_v[V];
        load_lanes<X, V>(hi_v, hi, kWidth<X>);
        load_lanes<X, V>(rstd_v, rstd, kWidth<X>);
        load_lanes<X, V>(a_v, a, kWidth<X>);
        load_lanes<X, V>(e_v, e, kWidth<X>);
        load_lanes<X, V>(c_v, c, kWidth<X>);
        for (; rows - r >= b.rows; r += b.rows) {
            const char *pdy = dy.at(r), *px = x.at(r);
            char* pdx = dx.at(r);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                const index_t o = i * kMemoryBytes<X>;
                put<X, Stream>(
                    pdx + o,
                    dx_of<Vec<X>>(load<X>(pdy + o), load<X>(px + o) - hi_v[i], rstd_v[i], a_v[i], e_v[i], c_v[i]),
                    kWidth<X>);
            }
        }
    });
    const index_t without_gap = bytes<X>(b.lanes / b.rows);
    const bool apart = x.row != without_gap || dy.row != without_gap;
    for_bundles<X>(b, dx, r, rows, [=](index_t row, index_t l, index_t t, int n) NK_INLINE_LAMBDA {
        const char *pdy = dy.at(row) + bytes<X>(l), *px = x.at(row) + bytes<X>(l);
        if constexpr (Stream) {
            ask_down(pdy, dy.row, apart);
            ask_down(px, x.row, apart);
        }
        put<X, Stream>(dx.at(row) + bytes<X>(l),
                       dx_of<Vec<X>>(load_rest<X>(pdy, n), load_rest<X>(px, n) - load_term<X>(hi + t, n),
                                     load_term<X>(rstd + t, n), load_term<X>(a + t, n), load_term<X>(e + t, n),
                                     load_term<X>(c + t, n)),
                       n);
    });
}

// w is the same for all rows; at most kTermLanes lanes.
template <class X, bool WLane, bool Stream>
NK_INLINE void dx_down_along(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    const Bundle bundle =
        bundle_of<X, Stream>(dx, rows, lanes, x.row == bytes<X>(lanes) && dy.row == x.row && dx.row == x.row);
    Terms<X, 5> terms;
    for_row<X>(lanes, 0, [&](index_t l, int n) NK_INLINE_LAMBDA {
        const index_t ow = WLane ? bytes<T>(l) : 0, at = first_term<X>(bundle) + l;
        const Vec<X> rstd = load_term<X>(s.rstd + l, n);
        const DxTerms<Vec<X>> more = dx_terms<Vec<X>>(load_term<X>(s.lo + l, n), rstd, load_term<X>(s.mean_g + l, n),
                                                      load_term<X>(s.mean_g_xhat + l, n));
        put<T, false>(reinterpret_cast<char*>(terms.of[0] + at), load_term<X>(s.hi + l, n), n);
        put<T, false>(reinterpret_cast<char*>(terms.of[1] + at), rstd, n);
        put<T, false>(reinterpret_cast<char*>(terms.of[2] + at),
                      rstd * load_parameter<X, WLane, 1>({w.p + ow, 0}, 0, 0, n), n);
        put<T, false>(reinterpret_cast<char*>(terms.of[3] + at), more.e, n);
        put<T, false>(reinterpret_cast<char*>(terms.of[4] + at), more.c, n);
    });
    repeat<X, 5>(terms, bundle);
    dx_terms_down<X, Stream>(dy, x, dx, terms, bundle, rows);
}

template <class X, bool SLane, bool WLane, bool Dx, bool Sum, bool Stream>
NK_INLINE void backward_down_rows(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes,
                                  double* sum_g, double* sum_g_xhat) {
    if constexpr (SLane && Dx && !Sum) {
        if (w.row == 0) {
            const index_t per = lanes_of_part(lanes, kTermLanes<X, 5>);
            for (index_t lane = 0; lane < lanes; lane += per) {
                const index_t o = bytes<X>(lane);
                dx_down_along<X, WLane, Stream>(shifted(dy, 0, o), shifted(x, 0, o),
                                                shifted(w, 0, WLane ? bytes<Compute<X>>(lane) : 0), shifted(dx, 0, o),
                                                shifted(s, lane), rows, lanes - lane < per ? lanes - lane : per);
            }
            return;
        }
    }
    const index_t at_once = Sum ? rows : kRowsAtOnce;
    for (index_t r = 0; r < rows; r += at_once) {
        const index_t n_rows = rows - r < at_once ? rows - r : at_once;
        for_chunks<X>(
            lanes,
            [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
                const index_t o = bytes<X>(lane), ow = WLane ? bytes<Compute<X>>(lane) : 0;
                backward_down_chunk<X, SLane, WLane, Dx, Sum, Stream, v>(
                    shifted(dy, r, o), shifted(x, r, o), shifted(w, r, ow), shifted(dx, r, o),
                    shifted(s, SLane ? lane : r * s.row), n_rows, n, Sum ? sum_g + lane : sum_g,
                    Sum ? sum_g_xhat + lane : sum_g_xhat);
            },
            Dx && Stream ? head_of<X>(dx.p) : 0);
    }
}

// The same with statistics one a row, for rows so long that reading them row by row is better than a few lanes of all:
// the sums of kLeafLanes lanes wait in L1. A tile is two or three streams then, not as many as it has rows, which lie a
// power of two apart more often than not.
template <class X, Stores How, bool Given>
NK_INLINE void backward_by_row(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes,
                               DownSums sums, Gradients to) {
    using T = Compute<X>;
    for (index_t lane = 0; lane < lanes; lane += kLeafLanes) {
        const index_t n = lanes - lane < kLeafLanes ? lanes - lane : kLeafLanes, o = bytes<X>(lane);
        BackwardRows<T> part;
        part.dy = shifted(dy, 0, o);
        part.x = shifted(x, 0, o);
        part.w = shifted(w, 0, bytes<T>(lane));
        part.dx = shifted(dx, 0, o);
        part.s = s;
        part.rows = rows;
        part.lanes = n;
        const index_t head = How == Stores::joined ? head_of_joined<X, true>(part.x, part.dx, 0, n) : 0;
        ShortDownSums<X, kLeafLanes> down(head);
        EndsOf<X, How, true> ends;
        const index_t kept = Given ? rows - 1 : rows;
        for (index_t r = 0; r < kept; ++r) {
            WritingDx<X, Down::kept, How>(part, r, r == 0, down, ends).rest();
        }
        ends.finish();
        if constexpr (Given) {
            const Gradients here = to.at(bytes<T>(lane));
            // Its vectors begin where those of the gradients do.
            const bool lines = on_line(part.dx.at(kept)) && on_line(here.dweight) && on_line(here.dbias);
            with_stores<X, false>(How != Stores::cached && lines, true, [&](auto how) NK_INLINE_LAMBDA {
                OnLines<X> whole;
                WritingDx<X, Down::given, how> last(part, kept, kept == 0, down, whole);
                static_cast<Gradients&>(last) = here;
                last.rest();
            });
        } else {
            down.add_to(sums.at(lane), n);
        }
    }
}

// As backward_down, with what becomes of the sums.
template <class X, bool Given>
NK_INLINE void backward_down_by_row(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes,
                                    DownSums sums, Gradients to, bool stream) {
    with_row_stores<X, true>(stream, x, dx, lanes, on_lines(dx), [&](auto how) NK_INLINE_LAMBDA {
        backward_by_row<X, how, Given>(dy, x, w, dx, s, rows, lanes, sums, to);
    });
}

template <class X>
void backward_of_block(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes, Gradients to,
                       bool stream) {
    backward_down_by_row<X, true>(dy, x, w, dx, s, rows, lanes, {}, to, stream);
}

constexpr index_t kRowByRow = 256;  // lanes

// Sums alone, of at least one row, row by row: those of the lanes wait in L1, and memory is read in order. A few lanes
// of all rows, with sums in registers, wait for memory. Asked for kAhead bytes ahead, as what is written later: the
// whole pass of 2 x 960 x 64^2 0.9 of the time, of batch norm 32 x 1024 x 14^2 and 32 x 512 x 28^2 0.92. Time of those
// / row by row, group norm NHWC 2 x 64^2, sums alone (one thread of a Zen 5): 960 channels 1.3, 1024 1.65; of the whole
// backward pass 1.04, 1.15. Where arrays are in a cache 0.97, and below this many lanes 0.9.
constexpr index_t kSumsByRow = 512;  // lanes
template <class X, bool SLane, bool WLane>
NK_INLINE void sums_by_row(In dy, In x, In w, Statistics<Compute<X>> s, index_t rows, index_t lanes, double* sum_g,
                           double* sum_g_xhat) {
    using T = Compute<X>;
    constexpr index_t kLanes = 1024;
    alignas(64) T sum[kLanes], sum_xhat[kLanes];
    const Adder<T> plus;
    const bool apart = x.row != bytes<X>(lanes) || dy.row != x.row;
    for (index_t first = 0; first < lanes; first += kLanes) {
        const index_t all = lanes - first < kLanes ? lanes - first : kLanes;
        const auto row_at = [&](index_t r, auto is_first) NK_INLINE_LAMBDA {
            const index_t k = SLane ? first : r * s.row;
            const char *const pdy = dy.at(r) + bytes<X>(first), *const px = x.at(r) + bytes<X>(first);
            const char* const pw = w.at(r) + (WLane ? bytes<T>(first) : 0);
            Vec<X> hi = {}, lo = {}, rstd = {}, wv = {};
            if constexpr (!SLane) {
                hi = splat<X>(s.hi[k]);
                lo = splat<X>(s.lo[k]);
                rstd = splat<X>(s.rstd[k]);
            }
            if constexpr (!WLane) wv = splat<X>(value_at<T>(pw));
            const auto before = [&](const T* of, index_t lane) NK_INLINE_LAMBDA {
                return is_first ? Vec<X>{} : load<T>(reinterpret_cast<const char*>(of + lane));
            };
            for_vectors<X>(all, 0, [&](index_t lane, int n) NK_INLINE_LAMBDA {
                ask_down(pdy + bytes<X>(lane), dy.row, apart);
                ask_down(px + bytes<X>(lane), x.row, apart);
                const Vec<X> g =
                    load_rest<X>(pdy + bytes<X>(lane), n) * (WLane ? load_rest<T>(pw + bytes<T>(lane), n) : wv);
                const Vec<X> d = load_rest<X>(px + bytes<X>(lane), n) - (SLane ? load_term<X>(s.hi + k + lane, n) : hi);
                const Vec<X> g_xhat = g * (SLane ? d : (kLoose ? d : d - lo) * rstd);
                store<T>(reinterpret_cast<char*>(sum + lane), plus(before(sum, lane), g));
                store<T>(reinterpret_cast<char*>(sum_xhat + lane), before(sum_xhat, lane) + g_xhat);
            });
        };
        row_at(0, std::true_type{});
        for (index_t r = 1; r < rows; ++r) row_at(r, std::false_type{});
        for_chunks<X>(all, [&](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
            Vec<X> g[v], g_xhat[v], lo[v] = {}, rstd[v] = {};
            load_lanes<X, v>(g, sum + lane, n);
            load_lanes<X, v>(g_xhat, sum_xhat + lane, n);
            if constexpr (SLane) {
                load_lanes<X, v>(lo, s.lo + first + lane, n);
                load_lanes<X, v>(rstd, s.rstd + first + lane, n);
            }
            add_sums<X, SLane, v>(g, g_xhat, lo, rstd, n, sum_g + first + lane, sum_g_xhat + first + lane);
        });
    }
}

// The sums of the leaves of a chunk to those of all leaves, one after another.
template <class X, class S>
NK_INLINE void add_leaves(const Doubles<X, S::V>& of, double* all, index_t leaves, int n) {
    if constexpr (S::P == 1) {
        Doubles<X, 1> sum;
        load_doubles<X, 1>(sum, all, n);
#pragma GCC unroll 4
        for (int v = 0; v < S::V; ++v) {
#pragma GCC unroll 2
            for (int j = 0; j < Widened<Compute<X>>::kVectors; ++j) sum[0].v[j] += of[v].v[j];
        }
        store_doubles<X, 1>(all, sum, n);
    } else {
        constexpr index_t kLanes = Slots<X, S::P>::kLanes;
        char* const p = reinterpret_cast<char*>(all);
        Vec<double> sum = load_rest<double>(p, n);
        LaneDoubles<X> lanes;
        for (int v = 0; v < S::V; ++v) {
            lanes.put(of[v]);
            for (index_t k = 0; k < S::P && v * S::P + k < leaves; ++k) sum += lanes.from(k * kLanes);
        }
        put<double, false>(p, sum, n);
    }
}

// Sums of the leaves of one chunk; statistics are those of its lanes.
template <class X, class S, class From>
NK_INLINE void sums_of_chunk(const From& dy, const From& x, Vec<X> w, Statistics<Compute<X>> s, index_t leaves, int n,
                             double* sum_g, double* sum_g_xhat) {
    using T = Compute<X>;
    constexpr int V = S::V;
    const Vec<X> hi = From::spread(s.hi, n), lo = From::spread(s.lo, n), rstd = From::spread(s.rstd, n);
    const Adder<T> plus;
    Vec<X> sum[V] = {}, sum_d[V] = {};
    for (index_t r = 0; r < kSumRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            dy.ask(r, v);
            x.ask(r, v);
            const Vec<X> g = dy.load(r, v) * w, d = x.load(r, v) - hi;
            sum[v] = plus.by_turns(v, sum[v], g);
            sum_d[v] += g * d;
        }
    }
    const Widened<T> wide_lo = widened<T>(lo), wide_rstd = widened<T>(rstd);
    Doubles<X, V> g, g_xhat;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
        g[v] = widened<T>(sum[v]);
        const Widened<T> g_d = widened<T>(sum_d[v]);
#pragma GCC unroll 2
        for (int j = 0; j < Widened<T>::kVectors; ++j) {
            g_xhat[v].v[j] = xhat_sum(g[v].v[j], g_d.v[j], wide_lo.v[j], wide_rstd.v[j]);
        }
    }
    add_leaves<X, S>(g, sum_g, leaves, n);
    add_leaves<X, S>(g_xhat, sum_g_xhat, leaves, n);
}

// Sums of whole leaves of few lanes, statistics one a lane, w one for all; to those of all leaves.
template <class X>
void sums_of_few_lanes(In dy, In x, Compute<X> w, Statistics<Compute<X>> s, index_t leaves, index_t lanes, bool far,
                       double* sum_g, double* sum_g_xhat) {
    const Vec<X> wv = splat<Compute<X>>(w);
    for_few_lanes<X>(leaves, lanes, [&](auto chunks) NK_INLINE_LAMBDA {
        using S = typename decltype(chunks)::Shape;
        using From = typename S::template From<X>;
        for (index_t k = 0; k < chunks.count(); ++k) {
            const index_t i = chunks.leaf(k), l = chunks.lane(k);
            const auto from = [&](In of) NK_INLINE_LAMBDA {
                const index_t leaf = kSumRows * of.row, ahead = far ? ahead_in_chunks(S::kLeaves, leaf) : 0;
                return From({{of.p + i * leaf + bytes<X>(l), of.row}, leaf, leaves - i, chunks.n, ahead});
            };
            sums_of_chunk<X, S>(from(dy), from(x), wv, shifted(s, l), leaves - i, chunks.n, sum_g + l, sum_g_xhat + l);
        }
    });
}

// Sums alone, of any number of rows, leaf by leaf.
template <class X, bool SLane, bool WLane>
NK_INLINE void sums_down(In dy, In x, In w, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool far,
                         double* sum_g, double* sum_g_xhat) {
    using T = Compute<X>;
    constexpr index_t kLanes = kChunk * kWidth<X>;
    const bool by_row = far && lanes >= kSumsByRow;
    const bool alike = SLane && !WLane && w.row == 0 && !by_row;
    const index_t in_chunks = alike ? lanes / kLanes * kLanes : lanes, few = lanes - in_chunks;
    const index_t at_once = few > 0 ? leaves_at_once<X>(few, kSumRows * (x.row + dy.row), in_chunks == 0) : index_t{1};
    for (index_t r = 0; r < rows;) {
        const index_t whole = (rows - r) / kSumRows, leaves = whole < at_once ? whole : at_once;
        const index_t n = leaves > 0 ? leaves * kSumRows : rows - r;
        const auto leaf_by_leaf = [&](index_t lane, index_t all) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            for (index_t i = r; i < r + n; i += kSumRows) {
                const index_t of_leaf = r + n - i < kSumRows ? r + n - i : kSumRows;
                const In here_dy = shifted(dy, i, o), here_x = shifted(x, i, o);
                const In here_w = shifted(w, i, WLane ? bytes<T>(lane) : 0);
                const Statistics<T> here = shifted(s, SLane ? lane : i * s.row);
                if (by_row) {
                    sums_by_row<X, SLane, WLane>(here_dy, here_x, here_w, here, of_leaf, all, sum_g + lane,
                                                 sum_g_xhat + lane);
                } else if (far) {
                    backward_down_rows<X, SLane, WLane, false, true, true>(here_dy, here_x, here_w, {}, here, of_leaf,
                                                                           all, sum_g + lane, sum_g_xhat + lane);
                } else {
                    backward_down_rows<X, SLane, WLane, false, true, false>(here_dy, here_x, here_w, {}, here, of_leaf,
                                                                            all, sum_g + lane, sum_g_xhat + lane);
                }
            }
        };
        if (in_chunks > 0) leaf_by_leaf(0, in_chunks);
        if constexpr (SLane && !WLane) {
            if (few > 0 && leaves >= kWorthTogether) {
                const index_t o = bytes<X>(in_chunks);
                sums_of_few_lanes<X>(shifted(dy, r, o), shifted(x, r, o), value_at<T>(w.p), shifted(s, in_chunks),
                                     leaves, few, far, sum_g + in_chunks, sum_g_xhat + in_chunks);
            } else if (few > 0) {
                leaf_by_leaf(in_chunks, few);
            }
        }
        r += n;
    }
}

template <class X, bool SLane, bool WLane>
void backward_down(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes, DownSums sums,
                   bool stream) {
    double *const sum_g = sums.g, *const sum_g_xhat = sums.g_xhat;
    const bool in_bundles = SLane && !sum_g && w.row == 0;
    const bool without_gap = in_bundles && x.row == bytes<X>(lanes) && dy.row == x.row && dx.row == x.row;
    const bool streamed = stream && can_stream_down<X>(dx, lanes, without_gap, in_bundles);
    if constexpr (!SLane && WLane) {
        if (dx.p && sum_g && lanes >= kRowByRow) {
            backward_down_by_row<X, false>(dy, x, w, dx, s, rows, lanes, sums, {}, stream);
            return;
        }
    }
    if (sum_g && sums.fresh) {
        __builtin_memset(sum_g, 0, static_cast<std::size_t>(bytes<double>(lanes)));
        __builtin_memset(sum_g_xhat, 0, static_cast<std::size_t>(bytes<double>(lanes)));
    }
    if (!dx.p) {
        sums_down<X, SLane, WLane>(dy, x, w, s, rows, lanes, stream, sum_g, sum_g_xhat);
    } else if (!sum_g) {
        if (streamed) {
            backward_down_rows<X, SLane, WLane, true, false, true>(dy, x, w, dx, s, rows, lanes, nullptr, nullptr);
        } else {
            backward_down_rows<X, SLane, WLane, true, false, false>(dy, x, w, dx, s, rows, lanes, nullptr, nullptr);
        }
    } else if (streamed) {
        backward_down_rows<X, SLane, WLane, true, true, true>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
    } else {
        backward_down_rows<X, SLane, WLane, true, true, false>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
    }
}

}  // namespace
