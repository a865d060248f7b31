// The kernels, compiled once per instruction set: CMake defines NORMKIT_ISA_NAME. Read kernels.h first.
//
// Why the order of memory is as it is: along a row everything is contiguous, so a row is read front to back; down the
// rows a chunk of a few vectors of lanes keeps its statistics and sums in registers while kRowsAtOnce rows go by.
//
// Same bits on every instruction set: sums run in a fixed number of virtual lanes (along: kStep, for the one sum of
// squares twice that) or one lane each (down), partial vectors select and never multiply, -ffp-contract=off, and no
// code depends on alignment except the choice of the store.

#include "kernels.h"

#include <type_traits>

#include "simd.h"

// `kernels_avx2_float32`, for NORMKIT_ISA_NAME = avx2.
#define NORMKIT_JOIN(isa, dtype) kernels_##isa##_##dtype
#define NORMKIT_EXPAND(isa, dtype) NORMKIT_JOIN(isa, dtype)
#define NORMKIT_KERNELS(dtype) NORMKIT_EXPAND(NORMKIT_ISA_NAME, dtype)

#define NK_INLINE_LAMBDA __attribute__((always_inline))

namespace {

using normkit::index_t;
using normkit::kDepth;
using normkit::kLeafRows;
using normkit::kLeafSteps;
using normkit::kStep;
using normkit::Moments;
using normkit::cpu::In;
using normkit::cpu::Kernels;
using normkit::cpu::Out;
using normkit::cpu::Rows;
using normkit::cpu::Statistics;
using normkit::cpu::Sums;

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
// leave the range of T). The right-hand sides are what is computed, everywhere, so that all paths agree to the
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

// Walks `rows` runs of `lanes` elements in steps of B::kLanes; each run starts again at virtual lane 0. After B::kSteps
// steps the block's short sums go over to its long ones, so that no chain of additions in T is longer than kDepth.
template <class B>
NK_INLINE void for_steps(index_t rows, index_t lanes, B& block) {
    index_t steps = 0;
    for (index_t r = 0; r < rows; ++r) {
        block.row(r);
        index_t at = 0;
        while (lanes - at >= B::kLanes) {
            index_t todo = (lanes - at) / B::kLanes;
            if (todo > B::kSteps - steps) todo = B::kSteps - steps;
            steps += todo;
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

// Vector i of a step that has only `n` elements: whole, in part, or (n <= 0) not there.
template <class T>
NK_INLINE Vec<T> load_rest(const char* p, int n) {
    return n >= kWidth<T> ? load<T>(p) : load_first<T>(p, n);
}

// The sum of x in double: its mean is exact to the last bits of a double, as a mean that is multiplied by a large gamma
// has to be (a sum of x - pilot in float was 1.8e-7 standard deviations off on stepped data).
template <class T>
struct MeanBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLeafSteps;
    static constexpr int K = kLanes / kWidth<T>;
    static constexpr int W = Widened<T>::kVectors;
    In x;
    const char* p = nullptr;
    Vec<double> sum[K * W] = {};
    double total = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void add(int i, Widened<T> wide) {
#pragma GCC unroll 2
        for (int j = 0; j < W; ++j) sum[i * W + j] += wide.v[j];
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add(i, load_widened<T>(p + (at + i * kWidth<T>)*sizeof(T)));
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<T>) {
            if (n > 0) add(i, widened<T>(load_rest<T>(p + (at + i * kWidth<T>)*sizeof(T), n)));
        }
    }
    NK_INLINE void flush() { total += sum_by_halves<double, K * W>(sum); }
};

// The sum of (x - pilot)^2.
template <class T>
struct SquaresBlock {
    static constexpr index_t kLanes = 2 * kStep;  // one sum has registers for more chains
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth / 2;
    static constexpr int K = kLanes / kWidth<T>;
    In x;
    Vec<T> pilot;
    const char* p = nullptr;
    Vec<T> sum[K] = {};
    double total = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) {
            const Vec<T> d = load<T>(p + (at + i * kWidth<T>)*sizeof(T)) - pilot;
            sum[i] += d * d;
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i, n -= kWidth<T>) {
            if (n <= 0) continue;
            const Vec<T> d = load_rest<T>(p + (at + i * kWidth<T>)*sizeof(T), n) - pilot;
            sum[i] += n >= kWidth<T> ? d * d : keep_first<T>(d * d, n);
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<T, K>(sum);
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) sum[i] = Vec<T>{};
    }
};

// NORMKIT_LOOSE: sums of d and d^2 in one reading, about the first element.
template <class T>
struct LooseBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = 1 << 20;
    static constexpr int K = kLanes / kWidth<T>;
    In x;
    Vec<T> pilot;
    const char* p = nullptr;
    Vec<T> sum[K] = {}, squares[K] = {};
    double total = 0, total_squares = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void add(int i, Vec<T> d) {
        sum[i] += d;
        squares[i] += d * d;
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add(i, load<T>(p + (at + i * kWidth<T>)*sizeof(T)) - pilot);
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<T>) {
            if (n <= 0) continue;
            const Vec<T> d = load_rest<T>(p + (at + i * kWidth<T>)*sizeof(T), n) - pilot;
            add(i, n >= kWidth<T> ? d : keep_first<T>(d, n));
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<T, K>(sum);
        total_squares += sum_by_halves<T, K>(squares);
    }
};

// M2 from squares about a pilot, `off` being the mean less the pilot. The pilot is the mean rounded to T, so nothing
// that matters cancels; for a constant leaf it is exactly 0.
NK_INLINE double m2_about_mean(double squares, double off, double count) {
    const double m2 = squares - off * off * count;
    return m2 < 0 ? 0 : m2;
}

template <class T>
NK_INLINE double leaf_mean(In x, index_t rows, index_t lanes) {
    MeanBlock<T> sum{x, {}, {}, 0};
    for_steps(rows, lanes, sum);
    return sum.total / static_cast<double>(rows * lanes);
}

template <class T>
NK_INLINE double leaf_squares(In x, index_t rows, index_t lanes, T pilot) {
    SquaresBlock<T> squares{x, splat<T>(pilot), {}, {}, 0};
    for_steps(rows, lanes, squares);
    return squares.total;
}

template <class T>
NK_INLINE Moments loose_leaf(In x, index_t rows, index_t lanes) {
    const double count = static_cast<double>(rows * lanes);
    const T pilot = value_at<T>(x.p);
    LooseBlock<T> block{x, splat<T>(pilot), {}, {}, {}, 0, 0};
    for_steps(rows, lanes, block);
    const double off = block.total / count;
    return {count, pilot + off, m2_about_mean(block.total_squares, off, count)};
}

template <class T>
void moments_along(In x, index_t rows, index_t lanes, index_t leaf, index_t leaves, bool center, Moments* out) {
    const double count = static_cast<double>(rows * lanes);
    if (!center || kLoose) {
        for (index_t i = 0; i < leaves; ++i, x.p += leaf) {
            out[i] = center ? loose_leaf<T>(x, rows, lanes) : Moments{count, 0, leaf_squares<T>(x, rows, lanes, 0)};
        }
        return;
    }
    // The mean of the next leaf before the squares of this one: what is left of a sum at its end, folding and a
    // division, is latency, and hides behind other work.
    double next = leaf_mean<T>(x, rows, lanes);
    for (index_t i = 0; i < leaves; ++i, x.p += leaf) {
        const double mean = next;
        if (i + 1 < leaves) next = leaf_mean<T>(In{x.p + leaf, x.row}, rows, lanes);
        const T pilot = static_cast<T>(mean);
        const double squares = leaf_squares<T>(x, rows, lanes, pilot);
        out[i] = {count, mean, m2_about_mean(squares, mean - static_cast<double>(pilot), count)};
    }
}

// Sums of g and of g * (x - hi): what makes of the second the sum of g * xhat is the same for the whole set.
template <class T, bool WLane>
struct SumsBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int K = kLanes / kWidth<T>;
    In dy, x, w;
    Vec<T> hi, w_row;
    const char *p_dy = nullptr, *p_x = nullptr, *p_w = nullptr;
    Vec<T> sum[K] = {}, sum_d[K] = {};
    double total = 0, total_d = 0;

    NK_INLINE void row(index_t r) {
        p_dy = dy.at(r);
        p_x = x.at(r);
        p_w = w.at(r);
        if constexpr (!WLane) w_row = splat<T>(value_at<T>(p_w));
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            const index_t o = (at + i * kWidth<T>)*sizeof(T);
            const Vec<T> g = load<T>(p_dy + o) * (WLane ? load<T>(p_w + o) : w_row);
            sum[i] += g;
            sum_d[i] += g * (load<T>(p_x + o) - hi);
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<T>) {
            if (n <= 0) continue;
            const index_t o = (at + i * kWidth<T>)*sizeof(T);
            const Vec<T> g = load_rest<T>(p_dy + o, n) * (WLane ? load_rest<T>(p_w + o, n) : w_row);
            const Vec<T> g_d = g * (load_rest<T>(p_x + o, n) - hi);
            sum[i] += n >= kWidth<T> ? g : keep_first<T>(g, n);
            sum_d[i] += n >= kWidth<T> ? g_d : keep_first<T>(g_d, n);
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<T, K>(sum);
        total_d += sum_by_halves<T, K>(sum_d);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) sum[i] = sum_d[i] = Vec<T>{};
    }
};

// From sums of g and g * (x - hi) to the sum of g * xhat.
template <class T>
NK_INLINE double xhat_sum(double g, double g_d, T lo, T rstd) {
    return (kLoose ? g_d : g_d - static_cast<double>(lo) * g) * static_cast<double>(rstd);
}

template <class T, bool WLane>
void sums_along(In dy, In x, In w, Statistics<T> s, index_t rows, index_t lanes, index_t leaf_dy, index_t leaf_x,
                index_t leaves, Sums* out) {
    for (index_t i = 0; i < leaves; ++i, dy.p += leaf_dy, x.p += leaf_x) {
        const index_t k = i * s.row;
        SumsBlock<T, WLane> block{dy, x, w, splat<T>(s.hi[k]), {}, {}, {}, {}, {}, {}, 0, 0};
        for_steps(rows, lanes, block);
        out[i] = {block.total, xhat_sum<T>(block.total, block.total_d, s.lo[k], s.rstd[k])};
    }
}

// Applies f to every vector of a row of `lanes` elements: f(offset in bytes, n), n < kWidth<T> for the last,
// part-filled one. Where the stores are to be non-temporal, p is brought to a vector boundary first.
template <class T, class F>
NK_INLINE void for_vectors(index_t lanes, const char* aligned_for, F f) {
    index_t at = 0;
    if (aligned_for) {
        const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(aligned_for) % kVectorBytes);
        if (past) {
            index_t head = (kVectorBytes - past) / static_cast<index_t>(sizeof(T));
            if (head > lanes) head = lanes;
            if (head > 0) f(0, static_cast<int>(head));
            at = head;
        }
    }
    for (; lanes - at >= kWidth<T>; at += kWidth<T>) f(at * static_cast<index_t>(sizeof(T)), kWidth<T>);
    if (at < lanes) f(at * static_cast<index_t>(sizeof(T)), static_cast<int>(lanes - at));
}

// Non-temporal stores need elements that can reach a vector boundary at all.
template <class T>
NK_INLINE bool can_stream(Out y) {
    return reinterpret_cast<std::uintptr_t>(y.p) % sizeof(T) == 0 && y.row % sizeof(T) == 0;
}

template <class T, bool Stream>
NK_INLINE void put(char* p, Vec<T> v, int n) {
    if (n < kWidth<T>) {
        store_first<T>(p, v, n);
    } else if constexpr (Stream) {
        stream<T>(p, v);
    } else {
        store<T>(p, v);
    }
}

// R rows at once: with w and b one a lane they share the loads of those, which else are half of all.
template <class T, bool WLane, bool Stream, bool Centred, int R>
NK_INLINE void apply_rows(In x, Out y, In w, In b, Statistics<T> s, index_t r, index_t lanes) {
    Vec<T> hi[R], lo[R], rstd[R], a[R], c[R];
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
        const index_t k = (r + j) * s.row;
        hi[j] = splat<T>(s.hi[k]);
        lo[j] = splat<T>(s.lo[k]);
        rstd[j] = splat<T>(s.rstd[k]);
        if constexpr (!WLane) {
            const T a_row = s.rstd[k] * value_at<T>(w.at(r + j));
            a[j] = splat<T>(a_row);
            c[j] = splat<T>(bias_term<T>(a_row, s.lo[k], value_at<T>(b.at(r + j))));
        }
    }
    const char *px = x.at(r), *pw = w.at(r), *pb = b.at(r);
    char* py = y.at(r);
    for_vectors<T>(lanes, Stream ? py : nullptr, [&](index_t o, int n) NK_INLINE_LAMBDA {
        Vec<T> wv = {}, bv = {};
        if constexpr (WLane) {
            wv = load_rest<T>(pw + o, n);
            bv = load_rest<T>(pb + o, n);
        }
#pragma GCC unroll 4
        for (int j = 0; j < R; ++j) {
            const Vec<T> xv = load_rest<T>(px + j * x.row + o, n);
            const Vec<T> d = Centred ? xv - hi[j] : xv;
            const Vec<T> av = WLane ? rstd[j] * wv : a[j];
            const Vec<T> cv = !WLane ? c[j] : Centred ? bias_term<Vec<T>>(av, lo[j], bv) : bv;
            put<T, Stream>(py + j * y.row + o, d * av + cv, n);
        }
    });
}

#if defined(__AVX512F__)
constexpr int kRowsTogether = 4;
#else
constexpr int kRowsTogether = 2;
#endif

template <class T, bool WLane, bool Stream>
NK_INLINE void apply_along_rows(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes) {
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
            apply_rows<T, WLane, Stream, true, kRowsTogether>(x, y, w, b, s, r, lanes);
            r += kRowsTogether;
        } else if (none_centred) {
            apply_rows<T, WLane, Stream, false, kRowsTogether>(x, y, w, b, s, r, lanes);
            r += kRowsTogether;
        } else if (centred(r)) {
            apply_rows<T, WLane, Stream, true, 1>(x, y, w, b, s, r++, lanes);
        } else {
            apply_rows<T, WLane, Stream, false, 1>(x, y, w, b, s, r++, lanes);
        }
    }
}

template <class T, bool WLane>
void apply_along(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<T>(y)) {
        apply_along_rows<T, WLane, true>(x, y, w, b, s, rows, lanes);
    } else {
        apply_along_rows<T, WLane, false>(x, y, w, b, s, rows, lanes);
    }
}

template <class T, bool WLane, bool Stream>
NK_INLINE void dx_along_rows(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes) {
    for (index_t r = 0; r < rows; ++r) {
        const char *pdy = dy.at(r), *px = x.at(r), *pw = w.at(r);
        char* pdx = dx.at(r);
        const index_t i = r * s.row;
        const DxTerms<T> terms = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
        const Vec<T> hi = splat<T>(s.hi[i]), rstd = splat<T>(s.rstd[i]), e = splat<T>(terms.e), c = splat<T>(terms.c);
        Vec<T> a = {};
        if constexpr (!WLane) a = splat<T>(s.rstd[i] * value_at<T>(pw));
        for_vectors<T>(lanes, Stream ? pdx : nullptr, [=](index_t o, int n) NK_INLINE_LAMBDA {
            const Vec<T> d = load_rest<T>(px + o, n) - hi;
            const Vec<T> av = WLane ? rstd * load_rest<T>(pw + o, n) : a;
            put<T, Stream>(pdx + o, (load_rest<T>(pdy + o, n) * av - (d * rstd) * e) + c, n);
        });
    }
}

template <class T, bool WLane>
void dx_along(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<T>(dx)) {
        dx_along_rows<T, WLane, true>(dy, x, w, dx, s, rows, lanes);
    } else {
        dx_along_rows<T, WLane, false>(dy, x, w, dx, s, rows, lanes);
    }
}

template <class T, bool Stream>
NK_INLINE void copy_rows(In x, Out y, index_t rows, index_t lanes) {
    for (index_t r = 0; r < rows; ++r) {
        const char* px = x.at(r);
        char* py = y.at(r);
        for_vectors<T>(lanes, Stream ? py : nullptr,
                       [=](index_t o, int n) NK_INLINE_LAMBDA { put<T, Stream>(py + o, load_rest<T>(px + o, n), n); });
    }
}

template <class T>
void copy(In x, Out y, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<T>(y)) {
        copy_rows<T, true>(x, y, rows, lanes);
    } else {
        copy_rows<T, false>(x, y, rows, lanes);
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
template <class T, class F>
NK_INLINE void for_chunks(index_t lanes, F f, index_t head = 0) {
    constexpr index_t width = kWidth<T>;
    index_t at = head < lanes ? head : lanes;
    if (at > 0) f(index_t{0}, std::integral_constant<int, 1>{}, static_cast<int>(at));
    for (; lanes - at >= kChunk * width; at += kChunk * width) {
        f(at, std::integral_constant<int, kChunk>{}, static_cast<int>(width));
    }
    for (; lanes - at >= width; at += width) f(at, std::integral_constant<int, 1>{}, static_cast<int>(width));
    if (at < lanes) f(at, std::integral_constant<int, 1>{}, static_cast<int>(lanes - at));
}

// Vector i of a chunk of V vectors; only the last may be part-filled.
template <class T, int V>
NK_INLINE Vec<T> load_chunk(const char* p, int i, int n) {
    p += i * kVectorBytes;
    return V > 1 ? load<T>(p) : load_rest<T>(p, n);
}

template <class T, int V>
NK_INLINE void unload_chunk(T* out, const Vec<T> (&v)[V]) {
    __builtin_memcpy(out, &v[0], sizeof v);
}

// One leaf of `rows` <= kLeafRows rows, V vectors of lanes: the mean in double, the squares about it in T (two chains),
// merged in double. As in leaf_along.
template <class T, bool Center, int V>
NK_INLINE void leaf_down(In x, index_t rows, int n, double seen, double* mean, double* m2) {
    constexpr int W = Widened<T>::kVectors;
    constexpr int kLanes = V * kWidth<T>;
    const double count = static_cast<double>(rows);
    const int lanes = V > 1 ? kLanes : n;
    double means[kLanes];
    T pilots[kLanes];
    Vec<T> pilot[V] = {};
    if constexpr (Center && !kLoose) {
        Vec<double> sum[V * W] = {};
        for (index_t r = 0; r < rows; ++r) {
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                const Widened<T> wide =
                    V > 1 ? load_widened<T>(x.at(r) + i * kVectorBytes) : widened<T>(load_chunk<T, V>(x.at(r), i, n));
#pragma GCC unroll 2
                for (int j = 0; j < W; ++j) sum[i * W + j] += wide.v[j];
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < V * W; ++i) {
            // A power of two: multiplying is dividing, bit for bit.
            sum[i] = rows == kLeafRows ? sum[i] * (1.0 / kLeafRows) : sum[i] / count;
        }
        __builtin_memcpy(means, &sum[0], sizeof means);
        for (int i = 0; i < kLanes; ++i) pilots[i] = static_cast<T>(means[i]);
        __builtin_memcpy(&pilot[0], pilots, sizeof pilot);
    }
    Vec<T> squares[2][V] = {}, loose_sum[V] = {};
    if constexpr (Center && kLoose) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) pilot[i] = load_chunk<T, V>(x.p, i, n);
    }
    index_t r = 0;
    for (; r + 1 < rows; r += 2) {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Vec<T> even = load_chunk<T, V>(x.at(r), i, n) - pilot[i];
            const Vec<T> odd = load_chunk<T, V>(x.at(r + 1), i, n) - pilot[i];
            squares[0][i] += even * even;
            squares[1][i] += odd * odd;
            if constexpr (kLoose) loose_sum[i] += even + odd;
        }
    }
    T all_squares[kLanes];
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) {
        if (r < rows) {
            const Vec<T> even = load_chunk<T, V>(x.at(r), i, n) - pilot[i];
            squares[0][i] += even * even;
            if constexpr (kLoose) loose_sum[i] += even;
        }
        squares[0][i] += squares[1][i];
    }
    unload_chunk<T, V>(all_squares, squares[0]);
    if constexpr (!Center) {
        for (int i = 0; i < lanes; ++i) m2[i] += static_cast<double>(all_squares[i]);
        return;
    }
    if constexpr (kLoose) {
        T sums[kLanes];
        unload_chunk<T, V>(sums, loose_sum);
        unload_chunk<T, V>(pilots, pilot);
        for (int i = 0; i < kLanes; ++i)
            means[i] = static_cast<double>(pilots[i]) + static_cast<double>(sums[i]) / count;
    }
    // Moments::merge, with the divisions of the counts taken out of the loop (all lanes have seen the same rows).
    const double share = count / (seen + count);
    const double weight = seen * share;
    for (int i = 0; i < lanes; ++i) {
        const double off = means[i] - static_cast<double>(pilots[i]);
        const double delta = means[i] - mean[i];
        mean[i] += delta * share;
        m2[i] += m2_about_mean(static_cast<double>(all_squares[i]), off, count) + delta * delta * weight;
    }
}

template <class T>
void moments_down(In x, index_t rows, index_t lanes, index_t seen, bool center, double* mean, double* m2) {
    for (index_t r = 0; r < rows; r += kLeafRows) {
        const index_t n_rows = rows - r < kLeafRows ? rows - r : kLeafRows;
        const double before = static_cast<double>(seen + r);
        for_chunks<T>(lanes, [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
            const In at{x.at(r) + lane * static_cast<index_t>(sizeof(T)), x.row};
            if (center) {
                leaf_down<T, true, v>(at, n_rows, n, before, mean + lane, m2 + lane);
            } else {
                leaf_down<T, false, v>(at, n_rows, n, before, mean + lane, m2 + lane);
            }
        });
    }
}

template <class T, int V>
NK_INLINE void load_lanes(Vec<T> (&v)[V], const T* p, int n) {
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) v[i] = load_chunk<T, V>(reinterpret_cast<const char*>(p), i, n);
}

// w (or b) of row r: one value for all lanes, or one a lane.
template <class T, bool WLane, int V>
NK_INLINE Vec<T> load_parameter(In w, index_t r, int i, int n) {
    return WLane ? load_chunk<T, V>(w.at(r), i, n) : splat<T>(value_at<T>(w.at(r)));
}

template <class T, bool WLane, bool Stream, int V>
NK_INLINE void apply_down_chunk(In x, Out y, In w, In b, Statistics<T> s, index_t rows, int n) {
    Vec<T> hi[V], lo[V], rstd[V], a[V], c[V];
    load_lanes<T, V>(hi, s.hi, n);
    load_lanes<T, V>(lo, s.lo, n);
    load_lanes<T, V>(rstd, s.rstd, n);
    const auto load_row_parameters = [&](index_t r) NK_INLINE_LAMBDA {
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            a[i] = rstd[i] * load_parameter<T, WLane, V>(w, r, i, n);
            c[i] = bias_term<Vec<T>>(a[i], lo[i], load_parameter<T, WLane, V>(b, r, i, n));
        }
    };
    load_row_parameters(0);
    for (index_t r = 0; r < rows; ++r) {
        if (r > 0 && (w.row != 0 || b.row != 0)) load_row_parameters(r);
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            put<T, Stream>(y.at(r) + i * kVectorBytes, (load_chunk<T, V>(x.at(r), i, n) - hi[i]) * a[i] + c[i], n);
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
template <class T>
NK_INLINE bool can_stream_down(Out y) {
    return can_stream<T>(y) && y.row % kVectorBytes == 0;
}

// Lanes before the first vector boundary.
template <class T>
NK_INLINE index_t head_of(Out y) {
    const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(y.p) % kVectorBytes);
    return past == 0 ? 0 : (kVectorBytes - past) / static_cast<index_t>(sizeof(T));
}

template <class T, bool WLane, bool Stream>
NK_INLINE void apply_down_rows(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes) {
    for (index_t r = 0; r < rows; r += kRowsAtOnce) {
        const index_t n_rows = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
        for_chunks<T>(
            lanes,
            [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
                const index_t o = lane * static_cast<index_t>(sizeof(T));
                const index_t ow = WLane ? o : 0;
                apply_down_chunk<T, WLane, Stream, v>(shifted(x, r, o), shifted(y, r, o), shifted(w, r, ow),
                                                      shifted(b, r, ow), shifted(s, lane), n_rows, n);
            },
            Stream ? head_of<T>(y) : 0);
    }
}

template <class T, bool WLane>
void apply_down(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream_down<T>(y)) {
        apply_down_rows<T, WLane, true>(x, y, w, b, s, rows, lanes);
    } else {
        apply_down_rows<T, WLane, false>(x, y, w, b, s, rows, lanes);
    }
}

template <class T, bool SLane, bool WLane, bool Dx, bool Sum, bool Stream, int V>
NK_INLINE void backward_down_chunk(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, int n, double* sum_g,
                                   double* sum_g_xhat) {
    Vec<T> hi[V] = {}, lo[V] = {}, rstd[V] = {}, a[V] = {}, e[V] = {}, c[V] = {}, wv[V];
    Vec<T> sum[V] = {}, sum_xhat[V] = {};  // statistics one a lane: of g * (x - hi)
#pragma GCC unroll 4
    for (int i = 0; i < V; ++i) wv[i] = load_parameter<T, WLane, V>(w, 0, i, n);
    if constexpr (SLane) {
        load_lanes<T, V>(hi, s.hi, n);
        load_lanes<T, V>(lo, s.lo, n);
        load_lanes<T, V>(rstd, s.rstd, n);
        if constexpr (Dx) {
            Vec<T> mean_g[V], mean_g_xhat[V];
            load_lanes<T, V>(mean_g, s.mean_g, n);
            load_lanes<T, V>(mean_g_xhat, s.mean_g_xhat, n);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                const DxTerms<Vec<T>> terms = dx_terms<Vec<T>>(lo[i], rstd[i], mean_g[i], mean_g_xhat[i]);
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
            DxTerms<T> terms = {};
            if constexpr (Dx) terms = dx_terms<T>(s.lo[k], s.rstd[k], s.mean_g[k], s.mean_g_xhat[k]);
#pragma GCC unroll 4
            for (int i = 0; i < V; ++i) {
                hi[i] = splat<T>(s.hi[k]);
                lo[i] = splat<T>(s.lo[k]);
                rstd[i] = splat<T>(s.rstd[k]);
                e[i] = splat<T>(terms.e);
                c[i] = splat<T>(terms.c);
            }
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            if (r > 0 && w.row != 0) wv[i] = load_parameter<T, WLane, V>(w, r, i, n);
            if (!SLane || (r > 0 && w.row != 0)) a[i] = rstd[i] * wv[i];
        }
#pragma GCC unroll 4
        for (int i = 0; i < V; ++i) {
            const Vec<T> dyv = load_chunk<T, V>(dy.at(r), i, n);
            const Vec<T> d = load_chunk<T, V>(x.at(r), i, n) - hi[i];
            if constexpr (Dx)
                put<T, Stream>(dx.at(r) + i * kVectorBytes, (dyv * a[i] - (d * rstd[i]) * e[i]) + c[i], n);
            if constexpr (Sum) {
                const Vec<T> term = Dx ? dyv : dyv * wv[i];
                sum[i] += term;
                sum_xhat[i] += term * (SLane ? d : (kLoose ? d : d - lo[i]) * rstd[i]);
            }
        }
    }
    if constexpr (Sum) {
        constexpr int kLanes = V * kWidth<T>;
        T sums[kLanes], sums_xhat[kLanes];
        unload_chunk<T, V>(sums, sum);
        unload_chunk<T, V>(sums_xhat, sum_xhat);
        const int lanes = V > 1 ? kLanes : n;
        for (int i = 0; i < lanes; ++i) {
            const double g = static_cast<double>(sums[i]), g_xhat = static_cast<double>(sums_xhat[i]);
            sum_g[i] += g;
            sum_g_xhat[i] += SLane ? xhat_sum<T>(g, g_xhat, s.lo[i], s.rstd[i]) : g_xhat;
        }
    }
}

template <class T, bool SLane, bool WLane, bool Dx, bool Sum, bool Stream>
NK_INLINE void backward_down_rows(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes,
                                  double* sum_g, double* sum_g_xhat) {
    const index_t at_once = Sum ? rows : kRowsAtOnce;
    for (index_t r = 0; r < rows; r += at_once) {
        const index_t n_rows = rows - r < at_once ? rows - r : at_once;
        for_chunks<T>(
            lanes,
            [=](index_t lane, auto v, int n) NK_INLINE_LAMBDA {
                const index_t o = lane * static_cast<index_t>(sizeof(T));
                backward_down_chunk<T, SLane, WLane, Dx, Sum, Stream, v>(
                    shifted(dy, r, o), shifted(x, r, o), shifted(w, r, WLane ? o : 0), shifted(dx, r, o),
                    shifted(s, SLane ? lane : r * s.row), n_rows, n, sum_g + lane, sum_g_xhat + lane);
            },
            Stream ? head_of<T>(dx) : 0);
    }
}

template <class T, bool SLane, bool WLane>
void backward_down(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes, double* sum_g,
                   double* sum_g_xhat, bool stream) {
    const bool streamed = stream && can_stream_down<T>(dx);
    if (!dx.p) {
        backward_down_rows<T, SLane, WLane, false, true, false>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
    } else if (!sum_g) {
        if (streamed) {
            backward_down_rows<T, SLane, WLane, true, false, true>(dy, x, w, dx, s, rows, lanes, nullptr, nullptr);
        } else {
            backward_down_rows<T, SLane, WLane, true, false, false>(dy, x, w, dx, s, rows, lanes, nullptr, nullptr);
        }
    } else if (streamed) {
        backward_down_rows<T, SLane, WLane, true, true, true>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
    } else {
        backward_down_rows<T, SLane, WLane, true, true, false>(dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat);
    }
}

template <class T>
constexpr Kernels<T> table() {
    return {
        moments_along<T>,
        moments_down<T>,
        {apply_along<T, false>, apply_along<T, true>},
        {apply_down<T, false>, apply_down<T, true>},
        {sums_along<T, false>, sums_along<T, true>},
        {dx_along<T, false>, dx_along<T, true>},
        {{backward_down<T, false, false>, backward_down<T, false, true>},
         {backward_down<T, true, false>, backward_down<T, true, true>}},
        copy<T>,
    };
}

}  // namespace

namespace normkit::cpu {

extern const Kernels<float> NORMKIT_KERNELS(float32);
const Kernels<float> NORMKIT_KERNELS(float32) = table<float>();

}  // namespace normkit::cpu
