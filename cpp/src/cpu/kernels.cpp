// The kernels, compiled once per instruction set and dtype: CMake defines NORMKIT_ISA_NAME and NORMKIT_DTYPE_NAME. Read
// kernels.h first. Elements of x, y, dy and dx are of type X, everything else is of type T = Compute<X>.
//
// Why the order of memory is as it is: along a row everything is contiguous, so a row is read front to back; down the
// rows a chunk of a few vectors of lanes keeps its statistics and sums in registers while kRowsAtOnce rows go by.
//
// Same bits on every instruction set: sums run in a fixed number of virtual lanes (along: kStep, for the one sum of
// squares twice that) or one lane each (down), partial vectors select and never multiply, -ffp-contract=off, and no
// code depends on alignment except the choice of the store.

#include "kernels.h"

#include <limits>
#include <type_traits>

#include "simd.h"

// `kernels_avx2_float32`, for NORMKIT_ISA_NAME = avx2, NORMKIT_DTYPE_NAME = float32.
#define NORMKIT_JOIN(isa, dtype) kernels_##isa##_##dtype
#define NORMKIT_EXPAND(isa, dtype) NORMKIT_JOIN(isa, dtype)
#define NORMKIT_TABLE NORMKIT_EXPAND(NORMKIT_ISA_NAME, NORMKIT_DTYPE_NAME)

#define NK_INLINE_LAMBDA __attribute__((always_inline))

namespace {

using normkit::index_t;
using normkit::kDepth;
using normkit::kLeafLanes;
using normkit::kLeafRows;
using normkit::kLeafSteps;
using normkit::kStep;
using normkit::kSumRows;
using normkit::Moments;
using normkit::cpu::BackwardRows;
using normkit::cpu::FinishRow;
using normkit::cpu::In;
using normkit::cpu::Kernels;
using normkit::cpu::Out;
using normkit::cpu::Rows;
using normkit::cpu::Statistics;
using normkit::cpu::Sums;
using normkit::cpu::WholeRows;

template <class T>
NK_INLINE T value_at(const char* p) {
    T v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

// NORMKIT_LOOSE compiles the contracts out, for bench/compare.py to measure what they cost: the mean is one float, sums
// run in one chain each, a leaf is read once (its first element for a pilot), and the compiler may fuse.
#if defined(NORMKIT_LOOSE)
constexpr bool kLoose = true;
#else
constexpr bool kLoose = false;
#endif

// The formula, for a vector of lanes or for one number of a row. With d = x - hi and a = rstd * w,
//
//     y  = w * ((d - lo) * rstd) + b                                    = d * a + (b - lo * a)
//     dx = rstd * (w * dy - mean_g - (d - lo) * rstd * mean_g_xhat)     = (dy * a - d * rstd * e) + c
//
// with e = rstd * mean_g_xhat and c = lo * rstd * e - rstd * mean_g (d * rstd is of the size of 1, where rstd * e could
// leave the range of X). The right-hand sides are what is computed, everywhere, so that all paths agree to the
// bit: what does not depend on x or dy is taken out of the loop. Nothing cancels, because d is already centred.
template <class V>
NK_INLINE V bias_term(V a, V lo, V b) {
    return kLoose ? b : b - lo * a;
}

template <class V>
struct DxTerms {
    V e, c;
};
template <class V>
NK_INLINE DxTerms<V> dx_terms(V lo, V rstd, V mean_g, V mean_g_xhat) {
    const V e = rstd * mean_g_xhat;
    return {e, (kLoose ? V{} : (lo * rstd) * e) - rstd * mean_g};
}

// ---------------------------------------------------------------------------------------------------- along the lanes

// What is done beside a sum: the next row is read while this one is written, and neither memory nor arithmetic waits
// for the other. They take turns, short ones, so that both are in the window of instructions that a core reorders: 128
// elements took 1.4 times as long as 64 on layer norm 4096 x 768 (one thread of a Zen 4).
constexpr index_t kTurn = 64;
struct Nothing {};

// Walks `rows` runs of `lanes` elements in steps of B::kLanes; each run starts again at virtual lane 0. After B::kSteps
// steps the block's short sums go over to its long ones, so that no chain of additions in X is longer than kDepth.
template <class B, class Beside>
NK_INLINE void for_steps(index_t rows, index_t lanes, B& block, Beside& beside) {
    index_t steps = 0;
    for (index_t r = 0; r < rows; ++r) {
        block.row(r);
        index_t at = 0;
        while (lanes - at >= B::kLanes) {
            index_t todo = (lanes - at) / B::kLanes;
            if (todo > B::kSteps - steps) todo = B::kSteps - steps;
            steps += todo;
            if constexpr (!std::is_same_v<Beside, Nothing>) {
                constexpr index_t kStepsOfTurn = kTurn / B::kLanes;
                index_t turns = todo / kStepsOfTurn;
                if (turns > beside.turns()) turns = beside.turns();
                todo -= turns * kStepsOfTurn;
                for (; turns > 0; --turns) {
                    block.ask_ahead(at);
#pragma GCC unroll 2
                    for (int i = 0; i < kStepsOfTurn; ++i, at += B::kLanes) block.full(at);
                    beside.turn();
                }
            }
            for (; todo > 0; --todo, at += B::kLanes) block.full(at);
            if (steps == B::kSteps) {
                block.flush();
                steps = 0;
            }
        }
        if (at < lanes) {
            block.tail(at, static_cast<int>(lanes - at));
            if (++steps == B::kSteps) {
                block.flush();
                steps = 0;
            }
        }
    }
    if (steps > 0) block.flush();
}

template <class B>
NK_INLINE void for_steps(index_t rows, index_t lanes, B& block) {
    Nothing nothing;
    for_steps(rows, lanes, block, nothing);
}

template <class X>
NK_INLINE index_t bytes(index_t elements) {
    return elements * static_cast<index_t>(sizeof(X));
}

// Vector i of a step that has only `n` elements: whole, in part, or (n <= 0) not there.
template <class X>
NK_INLINE Vec<X> load_rest(const char* p, int n) {
    return n >= kWidth<X> ? load<X>(p) : load_first<X>(p, n);
}

// Whether means are taken about an element of the set, the origin. Other data has a mean in double with digits to
// spare; float64 data gets them here, because no element is further from the mean than sqrt(n) standard deviations.
template <class X>
constexpr bool kAboutOrigin = std::is_same_v<X, double>;

// Asks for the lines of a turn some way ahead, which are those of the next row at the end of one.
template <class X>
NK_INLINE void ask_for_turn(const char* p, index_t at) {
    constexpr index_t kAhead = 2048, kLine = 64;
    for (index_t line = 0; line < bytes<X>(kTurn); line += kLine) __builtin_prefetch(p + bytes<X>(at) + kAhead + line);
}

// The sum of x in double: its mean is exact to the last bits of a double, as a mean that is multiplied by a large gamma
// has to be (a sum of x - pilot in float was 1.8e-7 standard deviations off on stepped data).
template <class X>
struct MeanBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLeafSteps;
    static constexpr int K = kLanes / kWidth<X>;
    static constexpr int W = Widened<Compute<X>>::kVectors;
    In x;
    Vec<double> origin;
    const char* p = nullptr;
    Vec<double> sum[K * W] = {};
    double total = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void ask_ahead(index_t at) { ask_for_turn<X>(p, at); }
    NK_INLINE void add(int i, Widened<Compute<X>> wide) {
#pragma GCC unroll 2
        for (int j = 0; j < W; ++j) sum[i * W + j] += wide.v[j];
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            if constexpr (kAboutOrigin<X>) {
                sum[i] += load<X>(p + bytes<X>(at + i * kWidth<X>)) - origin;
            } else {
                add(i, load_widened<X>(p + bytes<X>(at + i * kWidth<X>)));
            }
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> v = load_rest<X>(p + bytes<X>(at + i * kWidth<X>), n);
            if constexpr (kAboutOrigin<X>) {
                sum[i] += n >= kWidth<X> ? v - origin : keep_first<X>(v - origin, n);
            } else {
                add(i, widened<Compute<X>>(v));
            }
        }
    }
    NK_INLINE void flush() { total += sum_by_halves<double, K * W>(sum); }
};

// The sum of (x - pilot)^2.
template <class X>
struct SquaresBlock {
    static constexpr index_t kLanes = 2 * kStep;  // one sum has registers for more chains
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int K = kLanes / kWidth<X>;
    In x;
    Vec<X> pilot;
    const char* p = nullptr;
    Vec<X> sum[K] = {};
    double total = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void ask_ahead(index_t) {}
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) {
            const Vec<X> d = load<X>(p + bytes<X>(at + i * kWidth<X>)) - pilot;
            sum[i] += d * d;
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> d = load_rest<X>(p + bytes<X>(at + i * kWidth<X>), n) - pilot;
            sum[i] += n >= kWidth<X> ? d * d : keep_first<Compute<X>>(d * d, n);
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<Compute<X>, K>(sum);
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) sum[i] = Vec<X>{};
    }
};

// NORMKIT_LOOSE: sums of d and d^2 in one reading, about the first element.
template <class X>
struct LooseBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = 1 << 20;
    static constexpr int K = kLanes / kWidth<X>;
    In x;
    Vec<X> pilot;
    const char* p = nullptr;
    Vec<X> sum[K] = {}, squares[K] = {};
    double total = 0, total_squares = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void add(int i, Vec<X> d) {
        sum[i] += d;
        squares[i] += d * d;
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add(i, load<X>(p + bytes<X>(at + i * kWidth<X>)) - pilot);
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> d = load_rest<X>(p + bytes<X>(at + i * kWidth<X>), n) - pilot;
            add(i, n >= kWidth<X> ? d : keep_first<Compute<X>>(d, n));
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<Compute<X>, K>(sum);
        total_squares += sum_by_halves<Compute<X>, K>(squares);
    }
};

// M2 from squares about a pilot, `off` being the mean less the pilot. The pilot is the mean rounded to X, so nothing
// that matters cancels; for a constant leaf it is exactly 0.
template <class V>
NK_INLINE V M2_about_mean(V squares, V off, double count) {
    const V M2 = squares - off * off * count;
    return M2 < 0 ? V{} : M2;
}

template <class X, class Beside>
NK_INLINE double leaf_mean(In x, index_t rows, index_t lanes, double origin, Beside& beside) {
    MeanBlock<X> sum{x, splat<double>(origin), {}, {}, 0};
    for_steps(rows, lanes, sum, beside);
    return sum.total / static_cast<double>(rows * lanes);
}

template <class X, class Beside>
NK_INLINE double leaf_squares(In x, index_t rows, index_t lanes, Compute<X> pilot, Beside& beside) {
    SquaresBlock<X> squares{x, splat<X>(pilot), {}, {}, 0};
    for_steps(rows, lanes, squares, beside);
    return squares.total;
}

template <class X>
NK_INLINE Moments loose_leaf(In x, index_t rows, index_t lanes) {
    const double count = static_cast<double>(rows * lanes);
    const Compute<X> pilot = load_first<X>(x.p, 1)[0];
    LooseBlock<X> block{x, splat<X>(pilot), {}, {}, {}, 0, 0};
    for_steps(rows, lanes, block);
    const double off = block.total / count;
    return {count, pilot + off, M2_about_mean(block.total_squares, off, count)};
}

template <class X, class Beside>
NK_INLINE void moments_of_leaves(In x, In origin, index_t rows, index_t lanes, index_t leaf, index_t leaves,
                                 bool center, Moments* out, Beside& beside) {
    using T = Compute<X>;
    const double count = static_cast<double>(rows * lanes);
    if (!center || kLoose) {
        for (index_t i = 0; i < leaves; ++i, x.p += leaf) {
            out[i] =
                center ? loose_leaf<X>(x, rows, lanes) : Moments{count, 0, leaf_squares<X>(x, rows, lanes, 0, beside)};
        }
        return;
    }
    const auto origin_of = [&](index_t i) NK_INLINE_LAMBDA {
        if constexpr (kAboutOrigin<X>) return value_at<T>(origin.at(i));
        return T{0};
    };
    // The mean of the next leaf before the squares of this one: what is left of a sum at its end, folding and a
    // division, is latency, and hides behind other work.
    double next = leaf_mean<X>(x, rows, lanes, origin_of(0), beside);
    for (index_t i = 0; i < leaves; ++i, x.p += leaf) {
        const double mean = next;
        if (i + 1 < leaves) next = leaf_mean<X>(In{x.p + leaf, x.row}, rows, lanes, origin_of(i + 1), beside);
        const T from = origin_of(i), pilot = static_cast<T>(from + mean);
        const double squares = leaf_squares<X>(x, rows, lanes, pilot, beside);
        out[i] = {count, mean, M2_about_mean(squares, mean - static_cast<double>(pilot - from), count)};
    }
}

template <class X>
void moments_along(In x, In origin, index_t rows, index_t lanes, index_t leaf, index_t leaves, bool center,
                   Moments* out) {
    Nothing nothing;
    moments_of_leaves<X>(x, origin, rows, lanes, leaf, leaves, center, out, nothing);
}

// Sums of g and of g * (x - hi): what makes of the second the sum of g * xhat is the same for the whole set.
template <class X, bool WLane>
struct SumsBlock {
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int K = kLanes / kWidth<X>;
    In dy, x, w;
    Vec<X> hi, w_row;
    const char *p_dy = nullptr, *p_x = nullptr, *p_w = nullptr;
    Vec<X> sum[K] = {}, sum_d[K] = {};
    double total = 0, total_d = 0;

    NK_INLINE void row(index_t r) {
        p_dy = dy.at(r);
        p_x = x.at(r);
        p_w = w.at(r);
        if constexpr (!WLane) w_row = splat<X>(value_at<T>(p_w));
    }
    NK_INLINE void ask_ahead(index_t at) {
        ask_for_turn<X>(p_dy, at);
        ask_for_turn<X>(p_x, at);
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            const index_t lane = at + i * kWidth<X>;
            const Vec<X> g = load<X>(p_dy + bytes<X>(lane)) * (WLane ? load<T>(p_w + bytes<T>(lane)) : w_row);
            sum[i] += g;
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

template <class X, bool WLane>
void sums_along(In dy, In x, In w, Statistics<Compute<X>> s, index_t rows, index_t lanes, index_t leaf_dy,
                index_t leaf_x, index_t leaves, Sums* out) {
    for (index_t i = 0; i < leaves; ++i, dy.p += leaf_dy, x.p += leaf_x) {
        const index_t k = i * s.row;
        SumsBlock<X, WLane> block{dy, x, w, splat<X>(s.hi[k]), {}, {}, {}, {}, {}, {}, 0, 0};
        for_steps(rows, lanes, block);
        out[i] = {block.total, xhat_sum<double>(block.total, block.total_d, s.lo[k], s.rstd[k])};
    }
}

// Applies f to every vector of a row of `lanes` elements: f(first lane, n), n < kWidth<X> for the last,
// part-filled one. Where the stores are to be non-temporal, p is brought to a vector boundary first.
template <class X, class F>
NK_INLINE void for_vectors(index_t lanes, const char* aligned_for, F f) {
    index_t at = 0;
    if (aligned_for) {
        const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(aligned_for) % kMemoryBytes<X>);
        if (past) {
            index_t head = (kMemoryBytes<X> - past) / static_cast<index_t>(sizeof(X));
            if (head > lanes) head = lanes;
            if (head > 0) f(0, static_cast<int>(head));
            at = head;
        }
    }
    for (; lanes - at >= kWidth<X>; at += kWidth<X>) f(at, kWidth<X>);
    if (at < lanes) f(at, static_cast<int>(lanes - at));
}

// Lanes before the first vector boundary.
template <class X>
NK_INLINE index_t head_of(Out y) {
    const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(y.p) % kMemoryBytes<X>);
    return past == 0 ? 0 : (kMemoryBytes<X> - past) / static_cast<index_t>(sizeof(X));
}

// Non-temporal stores need elements that can reach a vector boundary at all, and take whole lines: where rows are short
// and begin within a line, their ends cost more than is gained (layer norm backward 4096 x 768, 16 bytes past a line,
// one thread of a Zen 4: 3.4 ms with them, 3.1 without; on a line 2.2 and 3.0).
template <class X>
NK_INLINE bool can_stream(Out y, index_t lanes) {
    constexpr index_t kLine = 64, kLongRow = 16 * 1024;
    const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(y.p));
    if (past % kLine == 0 && y.row % kLine == 0) return true;
    return past % sizeof(X) == 0 && y.row % sizeof(X) == 0 && bytes<X>(lanes) >= kLongRow;
}

template <class X, bool Stream>
NK_INLINE void put(char* p, Vec<X> v, int n) {
    if (n < kWidth<X>) {
        store_first<X>(p, v, n);
    } else if constexpr (Stream) {
        stream<X>(p, v);
    } else {
        store<X>(p, v);
    }
}

// R rows at once: with w and b one a lane they share the loads of those, which else are half of all.
template <class X, bool WLane, bool Stream, bool Centred, int R>
NK_INLINE void apply_rows(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t r, index_t lanes) {
    using T = Compute<X>;
    Vec<X> hi[R], lo[R], rstd[R], a[R], c[R];
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
        const index_t k = (r + j) * s.row;
        hi[j] = splat<X>(s.hi[k]);
        lo[j] = splat<X>(s.lo[k]);
        rstd[j] = splat<X>(s.rstd[k]);
        if constexpr (!WLane) {
            const T a_row = s.rstd[k] * value_at<T>(w.at(r + j));
            a[j] = splat<X>(a_row);
            c[j] = splat<X>(bias_term<T>(a_row, s.lo[k], value_at<T>(b.at(r + j))));
        }
    }
    const char *px = x.at(r), *pw = w.at(r), *pb = b.at(r);
    char* py = y.at(r);
    for_vectors<X>(lanes, Stream ? py : nullptr, [&](index_t lane, int n) NK_INLINE_LAMBDA {
        const index_t o = bytes<X>(lane);
        Vec<X> wv = {}, bv = {};
        if constexpr (WLane) {
            wv = load_rest<T>(pw + bytes<T>(lane), n);
            bv = load_rest<T>(pb + bytes<T>(lane), n);
        }
#pragma GCC unroll 4
        for (int j = 0; j < R; ++j) {
            const Vec<X> xv = load_rest<X>(px + j * x.row + o, n);
            const Vec<X> d = Centred ? xv - hi[j] : xv;
            const Vec<X> av = WLane ? rstd[j] * wv : a[j];
            const Vec<X> cv = !WLane ? c[j] : Centred ? bias_term<Vec<X>>(av, lo[j], bv) : bv;
            put<X, Stream>(py + j * y.row + o, d * av + cv, n);
        }
    });
}

#if defined(__AVX512F__)
constexpr int kRowsTogether = 4;
#else
constexpr int kRowsTogether = 2;
#endif

template <class X, bool WLane, bool Stream>
NK_INLINE void apply_along_rows(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    // Rms: without a mean there are two subtractions less.
    const auto centred = [&](index_t r) { return s.hi[r * s.row] != 0 || s.lo[r * s.row] != 0; };
    // Not past the caches: those stores want one stream.
    const bool together = WLane && !Stream && w.row == 0 && b.row == 0;
    index_t r = 0;
    while (r < rows) {
        bool all_centred = together && rows - r >= kRowsTogether, none_centred = all_centred;
        for (int j = 0; j < kRowsTogether && (all_centred || none_centred); ++j) {
            (centred(r + j) ? none_centred : all_centred) = false;
        }
        if (all_centred) {
            apply_rows<X, WLane, Stream, true, kRowsTogether>(x, y, w, b, s, r, lanes);
            r += kRowsTogether;
        } else if (none_centred) {
            apply_rows<X, WLane, Stream, false, kRowsTogether>(x, y, w, b, s, r, lanes);
            r += kRowsTogether;
        } else if (centred(r)) {
            apply_rows<X, WLane, Stream, true, 1>(x, y, w, b, s, r++, lanes);
        } else {
            apply_rows<X, WLane, Stream, false, 1>(x, y, w, b, s, r++, lanes);
        }
    }
}

template <class X, bool WLane>
void apply_along(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<X>(y, lanes)) {
        apply_along_rows<X, WLane, true>(x, y, w, b, s, rows, lanes);
    } else {
        apply_along_rows<X, WLane, false>(x, y, w, b, s, rows, lanes);
    }
}

// A row to be written, a few vectors at a time; half as many as its moments, which are two readings, take.
template <class X, bool WLane, bool Stream>
struct Applying {
    using T = Compute<X>;
    static constexpr index_t kElements = kTurn / 2;
    index_t lanes = 0, lane = 0;
    const char *x = nullptr, *w = nullptr, *b = nullptr;
    char* y = nullptr;
    Vec<X> hi = {}, lo = {}, rstd = {}, a = {}, c = {};

    // lanes = 0: nothing to write.
    NK_INLINE Applying(const WholeRows<X>& all, index_t r, const T (&hi_lo_rstd)[3], bool write)
        : lanes(write ? all.lanes : 0), x(all.x.at(r)), w(all.w.at(r)), b(all.b.at(r)), y(all.y.at(r)) {
        hi = splat<X>(hi_lo_rstd[0]);
        lo = splat<X>(hi_lo_rstd[1]);
        rstd = splat<X>(hi_lo_rstd[2]);
        if constexpr (!WLane) {
            const T a_row = hi_lo_rstd[2] * value_at<T>(w);
            a = splat<X>(a_row);
            c = splat<X>(bias_term<T>(a_row, hi_lo_rstd[1], value_at<T>(b)));
        }
        const index_t head = Stream ? head_of<X>(Out{y, 0}) : 0;
        if (head > 0 && lanes > 0) vector(static_cast<int>(head < lanes ? head : lanes));
    }
    NK_INLINE void vector(int n) {
        const Vec<X> av = WLane ? rstd * load_rest<T>(w + bytes<T>(lane), n) : a;
        const Vec<X> cv = WLane ? bias_term<Vec<X>>(av, lo, load_rest<T>(b + bytes<T>(lane), n)) : c;
        put<X, Stream>(y + bytes<X>(lane), (load_rest<X>(x + bytes<X>(lane), n) - hi) * av + cv, n);
        lane += n;
    }
    NK_INLINE index_t turns() const { return (lanes - lane) / kElements; }
    NK_INLINE void turn() {
#pragma GCC unroll 8
        for (int i = 0; i < kElements / kWidth<X>; ++i) vector(kWidth<X>);
    }
    NK_INLINE void rest() {
        while (lanes - lane >= kWidth<X>) vector(kWidth<X>);
        if (lane < lanes) vector(static_cast<int>(lanes - lane));
    }
};

// Row r is written beside the moments of row r + 2, so that r's statistics, a chain of divisions and a root, are ready.
template <class X, bool WLane, bool Stream>
NK_INLINE void forward_row_by_row(const WholeRows<X>& all, FinishRow<Compute<X>> finish) {
    constexpr index_t kLag = 2;
    Compute<X> statistics[kLag][3] = {};
    bool write[kLag] = {};
    for (index_t r = 0; r < all.rows + kLag; ++r) {
        const bool late = r >= kLag;
        Applying<X, WLane, Stream> applying(all, late ? r - kLag : 0, statistics[r % kLag], late && write[r % kLag]);
        if (r < all.rows) {
            Moments moments;
            moments_of_leaves<X>({all.x.at(r), 0}, {all.origin.at(r), 0}, 1, all.lanes, 0, 1, all.center, &moments,
                                 applying);
            write[r % kLag] = finish.finish(finish.context, r, moments, statistics[r % kLag]);
        }
        applying.rest();
    }
}

template <class X, bool WLane>
void forward_rows(const WholeRows<X>& all, FinishRow<Compute<X>> finish) {
    if (all.stream && can_stream<X>(all.y, all.lanes)) {
        forward_row_by_row<X, WLane, true>(all, finish);
    } else {
        forward_row_by_row<X, WLane, false>(all, finish);
    }
}

template <class X, bool WLane, bool Stream>
NK_INLINE void dx_along_rows(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    for (index_t r = 0; r < rows; ++r) {
        const char *pdy = dy.at(r), *px = x.at(r), *pw = w.at(r);
        char* pdx = dx.at(r);
        const index_t i = r * s.row;
        const DxTerms<T> terms = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
        const Vec<X> hi = splat<X>(s.hi[i]), rstd = splat<X>(s.rstd[i]), e = splat<X>(terms.e), c = splat<X>(terms.c);
        Vec<X> a = {};
        if constexpr (!WLane) a = splat<X>(s.rstd[i] * value_at<T>(pw));
        for_vectors<X>(lanes, Stream ? pdx : nullptr, [=](index_t lane, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            const Vec<X> d = load_rest<X>(px + o, n) - hi;
            const Vec<X> av = WLane ? rstd * load_rest<T>(pw + bytes<T>(lane), n) : a;
            put<X, Stream>(pdx + o, (load_rest<X>(pdy + o, n) * av - (d * rstd) * e) + c, n);
        });
    }
}

template <class X, bool WLane>
void dx_along(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<X>(dx, lanes)) {
        dx_along_rows<X, WLane, true>(dy, x, w, dx, s, rows, lanes);
    } else {
        dx_along_rows<X, WLane, false>(dy, x, w, dx, s, rows, lanes);
    }
}

// dx of a row, a few vectors at a time, and dy and dy * xhat added to what earlier rows have left in `sum`, `sum_xhat`.
// Those are whole vectors; what comes into lanes beyond the row's last is never looked at.
template <class X, bool Sum, bool Stream>
struct WritingDx {
    using T = Compute<X>;
    static constexpr index_t kElements = kTurn;
    index_t lanes = 0, lane = 0;
    const char *dy = nullptr, *x = nullptr, *w = nullptr;
    char* dx = nullptr;
    T *sum = nullptr, *sum_xhat = nullptr;
    Vec<X> hi = {}, lo = {}, rstd = {}, e = {}, c = {};

    NK_INLINE WritingDx(const BackwardRows<T>& all, index_t r, T* sums, T* sums_xhat)
        : lanes(all.lanes),
          dy(all.dy.at(r)),
          x(all.x.at(r)),
          w(all.w.at(r)),
          dx(all.dx.at(r)),
          sum(sums),
          sum_xhat(sums_xhat) {
        const Statistics<T>& s = all.s;
        const index_t i = r * s.row;
        const DxTerms<T> terms = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
        hi = splat<X>(s.hi[i]);
        lo = splat<X>(s.lo[i]);
        rstd = splat<X>(s.rstd[i]);
        e = splat<X>(terms.e);
        c = splat<X>(terms.c);
        const index_t head = Stream ? head_of<X>(Out{dx, 0}) : 0;
        if (head > 0) vector(static_cast<int>(head < lanes ? head : lanes));
    }
    NK_INLINE void add(T* to, Vec<X> v) {
        char* const p = reinterpret_cast<char*>(to + lane);
        store<T>(p, load<T>(p) + v);
    }
    NK_INLINE void vector(int n) {
        const Vec<X> dyv = load_rest<X>(dy + bytes<X>(lane), n);
        const Vec<X> d = load_rest<X>(x + bytes<X>(lane), n) - hi;
        const Vec<X> a = rstd * load_rest<T>(w + bytes<T>(lane), n);
        put<X, Stream>(dx + bytes<X>(lane), (dyv * a - (d * rstd) * e) + c, n);
        if constexpr (Sum) {
            const Vec<X> xhat = (kLoose ? d : d - lo) * rstd;
            add(sum, n < kWidth<X> ? keep_first<T>(dyv, n) : dyv);
            add(sum_xhat, n < kWidth<X> ? keep_first<T>(dyv * xhat, n) : dyv * xhat);
        }
        lane += n;
    }
    NK_INLINE index_t turns() const { return (lanes - lane) / kElements; }
    NK_INLINE void turn() {
#pragma GCC unroll 16
        for (int i = 0; i < kElements / kWidth<X>; ++i) vector(kWidth<X>);
    }
    NK_INLINE void rest() {
        while (lanes - lane >= kWidth<X>) vector(kWidth<X>);
        if (lane < lanes) vector(static_cast<int>(lanes - lane));
    }
};

// Row r is written beside the sums of row r + 1.
template <class X, bool Sum, bool Stream>
NK_INLINE void backward_row_by_row(const BackwardRows<Compute<X>>& all) {
    using T = Compute<X>;
    alignas(64) T sum[kLeafLanes + kWidth<X>], sum_xhat[kLeafLanes + kWidth<X>];
    for (index_t l = 0; Sum && l < all.lanes + kWidth<X>; ++l) sum[l] = sum_xhat[l] = 0;
    const auto sums_of = [&](index_t r, auto& beside) NK_INLINE_LAMBDA {
        const index_t k = r * all.s.row;
        SumsBlock<X, true> block{
            {all.dy.at(r), 0}, {all.x.at(r), 0}, {all.w.at(r), 0}, splat<X>(all.s.hi[k]), {}, {}, {}, {}, {}, {}, 0, 0};
        for_steps(1, all.lanes, block, beside);
        all.finish(all.context, r,
                   {block.total, xhat_sum<double>(block.total, block.total_d, all.s.lo[k], all.s.rstd[k])});
    };
    Nothing nothing;
    sums_of(0, nothing);
    for (index_t r = 0; r < all.rows; ++r) {
        WritingDx<X, Sum, Stream> writing(all, r, sum, sum_xhat);
        if (r + 1 < all.rows) sums_of(r + 1, writing);
        writing.rest();
    }
    for (index_t l = 0; Sum && l < all.lanes; ++l) all.sum_g[l] += static_cast<double>(sum[l]);
    for (index_t l = 0; Sum && l < all.lanes; ++l) all.sum_g_xhat[l] += static_cast<double>(sum_xhat[l]);
}

template <class X>
void backward_rows(const BackwardRows<Compute<X>>& all) {
    const bool streamed = all.stream && can_stream<X>(all.dx, all.lanes);
    if (!all.sum_g) {
        streamed ? backward_row_by_row<X, false, true>(all) : backward_row_by_row<X, false, false>(all);
    } else {
        streamed ? backward_row_by_row<X, true, true>(all) : backward_row_by_row<X, true, false>(all);
    }
}

template <class X, bool Stream>
NK_INLINE void copy_rows(In x, Out y, index_t rows, index_t lanes) {
    for (index_t r = 0; r < rows; ++r) {
        const char* px = x.at(r);
        char* py = y.at(r);
        for_vectors<X>(lanes, Stream ? py : nullptr, [=](index_t lane, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            put<X, Stream>(py + o, load_rest<X>(px + o, n), n);
        });
    }
}

template <class X>
void copy(In x, Out y, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<X>(y, lanes)) {
        copy_rows<X, true>(x, y, rows, lanes);
    } else {
        copy_rows<X, false>(x, y, rows, lanes);
    }
}

// ------------------------------------------------------------------------------------------------------ down the rows

// Vectors of lanes that one pass down the rows takes: a backward pass holds 8 values for each, and AVX2 has 16
// registers, AVX-512 32.
#if defined(__AVX512F__)
constexpr int kChunk = 4;
#else
constexpr int kChunk = 2;
#endif

// Rows whose lanes are taken together before the next chunk of lanes: enough to pay for loading the statistics, few
// enough that the rows are read and written as so many forward streams.
constexpr index_t kRowsAtOnce = 8;

// Calls f(first lane, vectors in the chunk as a constant, elements in its last vector). The first `head` lanes, fewer
// than a vector, go by themselves.
template <class X, class F>
NK_INLINE void for_chunks(index_t lanes, F f, index_t head = 0) {
    constexpr index_t width = kWidth<X>;
    index_t at = head < lanes ? head : lanes;
    if (at > 0) f(index_t{0}, std::integral_constant<int, 1>{}, static_cast<int>(at));
    for (; lanes - at >= kChunk * width; at += kChunk * width) {
        f(at, std::integral_constant<int, kChunk>{}, static_cast<int>(width));
    }
    for (; lanes - at >= width; at += width) f(at, std::integral_constant<int, 1>{}, static_cast<int>(width));
    if (at < lanes) f(at, std::integral_constant<int, 1>{}, static_cast<int>(lanes - at));
}

// Vector i of a chunk of V vectors; only the last may be part-filled.
template <class X, int V>
NK_INLINE Vec<X> load_chunk(const char* p, int i, int n) {
    p += i * kMemoryBytes<X>;
    return V > 1 ? load<X>(p) : load_rest<X>(p, n);
}

// Asks for a cache line to come to L2: the rows of the next leaf lie a row's length apart, in other pages, where the
// hardware does not look ahead. To L1 it would push out what is being read, where rows lie a power of two apart.
NK_INLINE void prefetch_far(const char* p) { __builtin_prefetch(p, 0, 2); }

// One entry a lane of the statistics.
template <class X, int V>
NK_INLINE void load_lanes(Vec<X> (&v)[V], const Compute<X>* p, int n) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) v[i] = load_chunk<Compute<X>, V>(reinterpret_cast<const char*>(p), i, n);
}

// The doubles that go with a chunk: for each of its vectors of n lanes a Widened.
template <class X, int V>
using Doubles = Widened<Compute<X>>[V];

template <class X, int V>
NK_INLINE void load_doubles(Doubles<X, V>& v, const double* p, int n) {
    constexpr int W = Widened<Compute<X>>::kVectors;
#pragma GCC unroll 8
    for (int i = 0; i < V * W; ++i, n -= kWidth<double>) {
        const char* at = reinterpret_cast<const char*>(p + i * kWidth<double>);
        if constexpr (V > 1) {
            v[i / W].v[i % W] = load<double>(at);
        } else {
            v[i / W].v[i % W] = n > 0 ? load_rest<double>(at, n) : Vec<double>{};
        }
    }
}

template <class X, int V>
NK_INLINE void store_doubles(double* p, const Doubles<X, V>& v, int n) {
    constexpr int W = Widened<Compute<X>>::kVectors;
#pragma GCC unroll 8
    for (int i = 0; i < V * W; ++i, n -= kWidth<double>) {
        char* at = reinterpret_cast<char*>(p + i * kWidth<double>);
        if (V > 1 || n >= kWidth<double>) {
            store<double>(at, v[i / W].v[i % W]);
        } else if (n > 0) {
            store_first<double>(at, v[i / W].v[i % W], n);
        }
    }
}

// One leaf of `rows` <= kLeafRows rows, V vectors of lanes: the mean in double, the squares about it in X (two chains),
// merged in double. As in leaf_along.
template <class X, bool Center, int V>
NK_INLINE void leaf_down(In x, const Compute<X>* origin, index_t rows, int n, double seen, double* mean, double* M2) {
    using T = Compute<X>;
    constexpr int W = Widened<T>::kVectors;
    const double count = static_cast<double>(rows);
    Doubles<X, V> means = {};
    // What is read twice is put side by side in L1, where rows a power of two apart would not stay: forward 15 % on
    // batch NHWC 32 x 14^2 x 1024, 10 % on group NHWC 1 x 64^2 x 512, nothing where x is in L2.
    constexpr bool kStaged = Center && !kLoose && V > 1;
    [[maybe_unused]] Vec<X> staged[kStaged ? V * kLeafRows : 1];
    const auto again = [&](index_t r, int i) NK_INLINE_LAMBDA {
        if constexpr (kStaged) {
            return staged[r * V + i];
        } else {
            return load_chunk<X, V>(x.at(r), i, n);
        }
    };
    // About which squares are taken, and the same less the origin.
    Vec<X> pilot[V] = {}, pilot_off[V] = {};
    if constexpr (Center && !kLoose) {
        Vec<X> from[V] = {};
        if constexpr (kAboutOrigin<X>) load_lanes<X, V>(from, origin, n);
        for (index_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                if constexpr (V > 1) prefetch_far(x.at(r + kLeafRows) + i * kMemoryBytes<X>);
                const Vec<X> v = load_chunk<X, V>(x.at(r), i, n);
                if constexpr (kStaged) staged[r * V + i] = v;
                if constexpr (kAboutOrigin<X>) {
                    means[i].v[0] += v - from[i];
                } else {
                    const Widened<T> wide = V > 1 ? load_widened<X>(x.at(r) + i * kMemoryBytes<X>) : widened<T>(v);
#pragma GCC unroll 2
                    for (int j = 0; j < W; ++j) means[i].v[j] += wide.v[j];
                }
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < W; ++j) {
                // A power of two: multiplying is dividing, bit for bit.
                means[i].v[j] = rows == kLeafRows ? means[i].v[j] * (1.0 / kLeafRows) : means[i].v[j] / count;
            }
            pilot[i] = pilot_off[i] = narrowed<T>(means[i]);
            if constexpr (kAboutOrigin<X>) {
                pilot[i] = pilot[i] + from[i];
                pilot_off[i] = pilot[i] - from[i];
            }
        }
    }
    Vec<X> squares[2][V] = {}, loose_sum[V] = {};
    if constexpr (Center && kLoose) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) pilot[i] = pilot_off[i] = load_chunk<X, V>(x.p, i, n);
    }
    index_t r = 0;
    for (; r + 1 < rows; r += 2) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Vec<X> even = again(r, i) - pilot[i];
            const Vec<X> odd = again(r + 1, i) - pilot[i];
            squares[0][i] += even * even;
            squares[1][i] += odd * odd;
            if constexpr (kLoose) loose_sum[i] += even + odd;
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        if (r < rows) {
            const Vec<X> even = again(r, i) - pilot[i];
            squares[0][i] += even * even;
            if constexpr (kLoose) loose_sum[i] += even;
        }
        squares[0][i] += squares[1][i];
    }
    // Moments::merge, with the divisions of the counts taken out of the loop (all lanes have seen the same rows).
    const double share = count / (seen + count);
    const double weight = seen * share;
    Doubles<X, V> old_mean, old_M2;
    load_doubles<X, V>(old_mean, mean, n);
    load_doubles<X, V>(old_M2, M2, n);
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        const Widened<T> all = widened<T>(squares[0][i]), about = widened<T>(pilot_off[i]);
        [[maybe_unused]] const Widened<T> loose = widened<T>(loose_sum[i]);
#pragma GCC unroll 2
        for (int j = 0; j < W; ++j) {
            if constexpr (!Center) {
                old_M2[i].v[j] += all.v[j];
            } else {
                const Vec<double> here = kLoose ? about.v[j] + loose.v[j] / count : means[i].v[j];
                const Vec<double> off = here - about.v[j], delta = here - old_mean[i].v[j];
                old_mean[i].v[j] += delta * share;
                old_M2[i].v[j] += M2_about_mean(all.v[j], off, count) + delta * delta * weight;
            }
        }
    }
    if constexpr (Center) store_doubles<X, V>(mean, old_mean, n);
    store_doubles<X, V>(M2, old_M2, n);
}

template <class X>
void moments_down(In x, const Compute<X>* origin, index_t rows, index_t lanes, index_t seen, bool center, double* mean,
                  double* M2) {
    for (index_t r = 0; r < rows; r += kLeafRows) {
        const index_t n_rows = rows - r < kLeafRows ? rows - r : kLeafRows;
        const double before = static_cast<double>(seen + r);
        for_chunks<X>(lanes, [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
            const In at{x.at(r) + bytes<X>(lane), x.row};
            const Compute<X>* from = kAboutOrigin<X> ? origin + lane : nullptr;
            if (center) {
                leaf_down<X, true, v>(at, from, n_rows, n, before, mean + lane, M2 + lane);
            } else {
                leaf_down<X, false, v>(at, from, n_rows, n, before, mean + lane, M2 + lane);
            }
        });
    }
}

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
            a[i] = rstd[i] * load_parameter<X, WLane, V>(w, r, i, n);
            c[i] = bias_term<Vec<X>>(a[i], lo[i], load_parameter<X, WLane, V>(b, r, i, n));
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

// Non-temporal stores down the rows need all rows to reach a vector boundary after the same number of lanes.
template <class X>
NK_INLINE bool can_stream_down(Out y) {
    return reinterpret_cast<std::uintptr_t>(y.p) % sizeof(X) == 0 && y.row % kMemoryBytes<X> == 0;
}

// What is one a lane in the formula, N arrays of it; five leave room in L1 for what goes by.
template <class X>
constexpr index_t kTermLanes = 4096 / static_cast<index_t>(sizeof(Compute<X>));
template <class X, int N>
struct Terms {
    alignas(64) Compute<X> of[N][kTermLanes<X> + kWidth<X>];
};

template <class X>
NK_INLINE Vec<X> load_term(const Compute<X>* p, int n) {
    return load_rest<Compute<X>>(reinterpret_cast<const char*>(p), n);
}

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
// them crosses no cache line.
struct Bundle {
    index_t rows, lanes, head;
};
template <class X, bool Stream>
NK_INLINE Bundle bundle_of(Out y, index_t rows, index_t lanes, bool without_gap) {
    constexpr index_t width = kWidth<X>, few = kChunk * width;
    index_t n = 1;
    if (without_gap && (lanes % width != 0 || lanes < few)) {
        index_t whole = 1;  // rows that fill whole vectors
        while (whole * lanes % width != 0) whole *= 2;
        n = (whole * lanes <= few ? few : kTermLanes<X>) / lanes;
        if (n > rows) n = rows;
        if (n > whole) n -= n % whole;
        if (n < 1) n = 1;
    }
    const bool aligned_alike = y.row * n % kMemoryBytes<X> == 0;
    return {n, n * lanes, Stream || (aligned_alike && n * lanes > few) ? head_of<X>(y) : 0};
}

template <class X>
NK_INLINE index_t first_term(Bundle b) {
    return b.head == 0 ? 0 : kWidth<X> - b.head;
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
    for (; r < rows; r += b.rows) {
        const char* px = x.at(r);
        char* py = y.at(r);
        for_row<X>(rows - r < b.rows ? (rows - r) * lanes : b.lanes, b.head, [=](index_t l, int n) NK_INLINE_LAMBDA {
            const Vec<X> d = load_rest<X>(px + bytes<X>(l), n) - load_term<X>(hi + l, n);
            put<X, Stream>(py + bytes<X>(l), d * load_term<X>(a + l, n) + load_term<X>(c + l, n), n);
        });
    }
}

// w and b are the same for all rows; at most kTermLanes lanes.
template <class X, bool WLane, bool Stream>
NK_INLINE void apply_down_along(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    const Bundle bundle = bundle_of<X, Stream>(y, rows, lanes, x.row == bytes<X>(lanes) && y.row == x.row);
    Terms<X, 3> terms;
    for_row<X>(lanes, 0, [&](index_t l, int n) NK_INLINE_LAMBDA {
        const index_t ow = WLane ? bytes<T>(l) : 0, at = first_term<X>(bundle) + l;
        const Vec<X> a = load_term<X>(s.rstd + l, n) * load_parameter<X, WLane, 1>({w.p + ow, 0}, 0, 0, n);
        const Vec<X> bv = load_parameter<X, WLane, 1>({b.p + ow, 0}, 0, 0, n);
        put<T, false>(reinterpret_cast<char*>(terms.of[0] + at), load_term<X>(s.hi + l, n), n);
        put<T, false>(reinterpret_cast<char*>(terms.of[1] + at), a, n);
        put<T, false>(reinterpret_cast<char*>(terms.of[2] + at), bias_term<Vec<X>>(a, load_term<X>(s.lo + l, n), bv),
                      n);
    });
    repeat<X, 3>(terms, bundle);
    apply_terms<X, Stream>(x, y, terms, bundle, rows);
}

template <class X, bool WLane, bool Stream>
NK_INLINE void apply_down_rows(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    if (w.row == 0 && b.row == 0) {
        for (index_t l = 0; l < lanes; l += kTermLanes<X>) {
            const index_t o = bytes<X>(l), ow = WLane ? bytes<Compute<X>>(l) : 0;
            apply_down_along<X, WLane, Stream>(shifted(x, 0, o), shifted(y, 0, o), shifted(w, 0, ow), shifted(b, 0, ow),
                                               shifted(s, l), rows,
                                               lanes - l < kTermLanes<X> ? lanes - l : kTermLanes<X>);
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
            Stream ? head_of<X>(y) : 0);
    }
}

template <class X, bool WLane>
void apply_down(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream_down<X>(y)) {
        apply_down_rows<X, WLane, true>(x, y, w, b, s, rows, lanes);
    } else {
        apply_down_rows<X, WLane, false>(x, y, w, b, s, rows, lanes);
    }
}

template <class V>
NK_INLINE V dx_of(V dy, V d, V rstd, V a, V e, V c) {
    return (dy * a - (d * rstd) * e) + c;
}

template <class X, bool SLane, bool WLane, bool Dx, bool Sum, bool Stream, int V>
NK_INLINE void backward_down_chunk(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, int n,
                                   double* sum_g, double* sum_g_xhat) {
    using T = Compute<X>;
    Vec<X> hi[V] = {}, lo[V] = {}, rstd[V] = {}, a[V] = {}, e[V] = {}, c[V] = {}, wv[V];
    Vec<X> sum[V] = {}, sum_xhat[V] = {};  // statistics one a lane: of g * (x - hi)
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
            if constexpr (Sum && !Dx && V > 1) {
                prefetch_far(dy.at(r + kSumRows) + i * kMemoryBytes<X>);
                prefetch_far(x.at(r + kSumRows) + i * kMemoryBytes<X>);
            }
            const Vec<X> dyv = load_chunk<X, V>(dy.at(r), i, n);
            const Vec<X> d = load_chunk<X, V>(x.at(r), i, n) - hi[i];
            if constexpr (Dx)
                put<X, Stream>(dx.at(r) + i * kMemoryBytes<X>, dx_of<Vec<X>>(dyv, d, rstd[i], a[i], e[i], c[i]), n);
            if constexpr (Sum) {
                const Vec<X> term = Dx ? dyv : dyv * wv[i];
                sum[i] += term;
                sum_xhat[i] += term * (SLane ? d : (kLoose ? d : d - lo[i]) * rstd[i]);
            }
        }
    }
    if constexpr (Sum) {
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
}

// As apply_terms.
template <class X, bool Stream>
void dx_terms_down(In dy, In x, Out dx, const Terms<X, 5>& terms, Bundle b, index_t rows) {
    const index_t off = first_term<X>(b), lanes = b.lanes / b.rows;
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
    for (; r < rows; r += b.rows) {
        const char *pdy = dy.at(r), *px = x.at(r);
        char* pdx = dx.at(r);
        for_row<X>(rows - r < b.rows ? (rows - r) * lanes : b.lanes, b.head, [=](index_t l, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(l);
            put<X, Stream>(pdx + o,
                           dx_of<Vec<X>>(load_rest<X>(pdy + o, n), load_rest<X>(px + o, n) - load_term<X>(hi + l, n),
                                         load_term<X>(rstd + l, n), load_term<X>(a + l, n), load_term<X>(e + l, n),
                                         load_term<X>(c + l, n)),
                           n);
        });
    }
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
            for (index_t lane = 0; lane < lanes; lane += kTermLanes<X>) {
                const index_t o = bytes<X>(lane);
                dx_down_along<X, WLane, Stream>(shifted(dy, 0, o), shifted(x, 0, o),
                                                shifted(w, 0, WLane ? bytes<Compute<X>>(lane) : 0), shifted(dx, 0, o),
                                                shifted(s, lane), rows,
                                                lanes - lane < kTermLanes<X> ? lanes - lane : kTermLanes<X>);
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
            Stream ? head_of<X>(dx) : 0);
    }
}

// The same with statistics one a row, for rows so long that reading them row by row is better than a few lanes of all:
// the sums of kLeafLanes lanes wait in L1. A tile is two or three streams then, not as many as it has rows, which lie a
// power of two apart more often than not.
template <class X, bool Stream>
NK_INLINE void backward_by_row(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes,
                               double* sum_g, double* sum_g_xhat) {
    using T = Compute<X>;
    alignas(64) T sum[kLeafLanes + kWidth<X>], sum_xhat[kLeafLanes + kWidth<X>];
    for (index_t lane = 0; lane < lanes; lane += kLeafLanes) {
        const index_t n = lanes - lane < kLeafLanes ? lanes - lane : kLeafLanes, o = bytes<X>(lane);
        for (index_t l = 0; l < n + kWidth<X>; ++l) sum[l] = sum_xhat[l] = 0;
        const BackwardRows<T> part{
            shifted(dy, 0, o), shifted(x, 0, o), shifted(w, 0, bytes<T>(lane)), shifted(dx, 0, o), s, rows, n};
        for (index_t r = 0; r < rows; ++r) WritingDx<X, true, Stream>(part, r, sum, sum_xhat).rest();
        for (index_t l = 0; l < n; ++l) sum_g[lane + l] += static_cast<double>(sum[l]);
        for (index_t l = 0; l < n; ++l) sum_g_xhat[lane + l] += static_cast<double>(sum_xhat[l]);
    }
}

constexpr index_t kRowByRow = 256;  // lanes

template <class X, bool SLane, bool WLane>
void backward_down(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes, double* sum_g,
                   double* sum_g_xhat, bool stream) {
    const bool streamed = stream && can_stream_down<X>(dx);
    if constexpr (!SLane && WLane) {
        if (dx.p && sum_g && lanes >= kRowByRow) {
            if (stream && can_stream<X>(dx, lanes)) {
                backward_by_row<X, true>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
            } else {
                backward_by_row<X, false>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
            }
            return;
        }
    }
    if (!dx.p) {
        backward_down_rows<X, SLane, WLane, false, true, false>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
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

template <class X>
constexpr Kernels<X> table() {
    return {
        moments_along<X>,
        moments_down<X>,
        {apply_along<X, false>, apply_along<X, true>},
        {forward_rows<X, false>, forward_rows<X, true>},
        {apply_down<X, false>, apply_down<X, true>},
        {sums_along<X, false>, sums_along<X, true>},
        {dx_along<X, false>, dx_along<X, true>},
        backward_rows<X>,
        {{backward_down<X, false, false>, backward_down<X, false, true>},
         {backward_down<X, true, false>, backward_down<X, true, true>}},
        copy<X>,
    };
}

}  // namespace

namespace normkit::cpu {

using Element = ElementOf<Dtype::NORMKIT_DTYPE_NAME>;
extern const Kernels<Element> NORMKIT_TABLE;
const Kernels<Element> NORMKIT_TABLE = table<Element>();

}  // namespace normkit::cpu
