// What the two walks have in common.
#pragma once

#include <cstring>

#include "../operation.h"
#include "../schedule.h"
#include "parallel.h"
#include "scratch.h"

namespace normkit::cpu {

constexpr index_t kPieceBytes = 256 * 1024;  // of work handed to a thread at a time
constexpr index_t kNearBytes = 64 * 1024;    // of small sets whose moments are taken before they are applied
constexpr index_t kSetsAtOnce = 64;
static_assert(kSetsAtOnce <= kSideBySide);

// Of rows whose moments are taken beside the writing of as many. Time with other numbers over time with this one, layer
// norm 4096 x 768: 1 row 1.3, 8 KiB 1.1, 24 KiB 1.1 (float32, one thread of a Zen 4).
constexpr index_t kBesideBytes = 16 * 1024;
// The same of rows that are a whole leaf each, or go in parts: as many leaves follow each other in a call of a kernel.
// Layer norm 16384 x 2048, 2 rows at a time over 8: 1.1 (one thread of a Zen 5).
constexpr index_t kWholeLeavesBeside = 64 * 1024;

// Elements that are worked on without a look at whether to give up: about a millisecond.
constexpr index_t kLongestPiece = index_t{1} << 20;

template <class X>
void rows_forward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule);
template <class X>
void rows_backward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule);
template <class X>
void columns_forward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule);
template <class X>
void columns_backward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels,
                      const Schedule& schedule);

// An operand on a tile of a nest; null stays null.
inline Strided operand(const char* base, Dtype dtype, const Offsets& at, const Tiles& tiles, Operand o) {
    return {base ? base + at[o] : nullptr, tiles.rows.stride[o], tiles.lanes.stride[o], dtype};
}

// Weight or bias on a tile; `absent` where there is none.
inline Strided parameter(const char* base, Dtype dtype, const Offsets& at, const Tiles& tiles, Operand o,
                         Strided absent) {
    return base ? operand(base, dtype, at, tiles, o) : absent;
}

// What the means of a set of float64 are less of (kernels.h): its first element. Other dtypes: 0.
template <class X>
double origin_of(const char* set, bool center) {
    return center && kDtype<X> == Dtype::float64 ? to_double(read<X>(set)) : 0;
}

// A set's statistics from its moments: to whichever of the caller's arrays there are, as number i, and back for the
// kernels. `axes`, `x`: the set, in case it has to be done again.
template <class X>
Statistic finish_set(const ForwardCall& call, const Nest& axes, const char* x, bool center, const Moments& m,
                     index_t i) {
    double M2 = m.M2;
    Statistic s;
    // Only float64 can overflow a sum in double: where that of other data is not finite, neither is x, and doing it
    // again would change nothing.
    if (kDtype<X> != Dtype::float64 && !std::isfinite(m.mean)) {
        M2 = std::nan("");
        s = {m.mean, 0, M2};
    } else if (is_doubtful<Compute<X>>(m, call.eps)) {
        const ScaledMoments again = moments_in_double<X>(axes, x, center);
        s = statistic_from(again.moments, again.origin, again.scale, call.eps);
        M2 = again.moments.M2 / again.scale / again.scale;
    } else {
        s = statistic_from(m, origin_of<X>(x, center), call.eps);
    }
    if (call.mean) call.mean[i] = s.mean;
    if (call.rstd) call.rstd[i] = s.rstd;
    if (call.M2) call.M2[i] = M2;
    return s;
}

// The same for n neighbouring sets, each of `count` elements and x_step bytes after the one before, to `statistics`
// from number `slot` on. Where all of them are plain, compilers make vectors of the loops.
template <class X, class Statistics>
void finish_sets(const ForwardCall& call, const Nest& axes, const char* x, index_t x_step, bool center, double count,
                 const double* mean, const double* M2, index_t n, index_t i, index_t step, Statistics& statistics,
                 index_t slot) {
    if (n > kSetsAtOnce) {
        for (index_t k = 0; k < n; k += kSetsAtOnce) {
            finish_sets<X>(call, axes, x + k * x_step, x_step, center, count, mean + k, M2 + k,
                           n - k < kSetsAtOnce ? n - k : kSetsAtOnce, i + k * step, step, statistics, slot + k);
        }
        return;
    }
    double rstd[kSetsAtOnce];
    constexpr bool kMayBePlain = kDtype<X> != Dtype::float64;
    const double eps = call.eps;
    double plain =
        kMayBePlain;  // of the type of the rest: for a bool, or with an end before n, GCC 12 makes no vectors
    for (index_t k = 0; kMayBePlain && k < n; ++k) {
        const Moments m{count, mean[k], M2[k]};
        rstd[k] = rstd_of(m, eps);
        plain = is_doubtful<Compute<X>>(m, eps) ? 0 : plain;
    }
    if (plain == 0) {
        for (index_t k = 0; k < n; ++k) {
            statistics.put(slot + k,
                           finish_set<X>(call, axes, x + k * x_step, center, {count, mean[k], M2[k]}, i + k * step));
        }
        return;
    }
    for (index_t k = 0; call.mean && k < n; ++k) call.mean[i + k * step] = 0 + mean[k];  // no -0, as with an origin
    for (index_t k = 0; call.rstd && k < n; ++k) call.rstd[i + k * step] = rstd[k];
    for (index_t k = 0; call.M2 && k < n; ++k) call.M2[i + k * step] = M2[k];
    statistics.put(slot, n, mean, rstd, 1);
}

// dx on a tile (if wanted), and the sums of dy and dy * xhat down its lanes (where those are wanted).
// Constant statistics: dx = rstd * w * dy is the forward formula on dy with mean 0; of lanes (where s.lane is 1) or
// rows (where s.row is) there may be no more than `zero` has.
template <class X>
void write_dx(const KernelPair<X>& k, const BackwardCall& call, const Offsets& at, const Tiles& tiles, index_t rows,
              index_t lanes, const Strided& w, const TileStatistics<Compute<X>>& s, DownSums sums, bool stream) {
    using T = Compute<X>;
    const Strided dy = operand(call.dy, call.dtype, at, tiles, kDy), x = operand(call.x, call.dtype, at, tiles, kX);
    const Strided dx = operand(call.dx, call.dtype, at, tiles, kY);
    if (call.dx && !call.constant_statistics) {
        backward(k, dy, x, w, dx, s, rows, lanes, sums, stream);
        return;
    }
    if (sums.g) backward(k, dy, x, one<T>(), Strided{}, s, rows, lanes, sums, stream);
    if (call.dx) {
        TileStatistics<T> about_zero = s;
        about_zero.hi = about_zero.lo = reinterpret_cast<const T*>(zero<T>().p);
        apply(k, dy, dx, w, zero<T>(), about_zero, rows, lanes, stream);
    }
}
template <class X>
void write_dx(const KernelPair<X>& k, const BackwardCall& call, const Offsets& at, const Tiles& tiles, index_t rows,
              index_t lanes, const TileStatistics<Compute<X>>& s, DownSums sums, bool stream) {
    const Strided w = parameter(call.weight, call.weight_dtype, at, tiles, kWeight, one<Compute<X>>());
    write_dx(k, call, at, tiles, rows, lanes, w, s, sums, stream);
}

// n numbers, `step` apart, to an array (null: none), `stride` elements apart.
inline void write_doubles(char* to, Dtype dtype, index_t first, index_t stride, index_t n, const double* v,
                          index_t step = 1) {
    if (!to) return;
    with_dtype(dtype, [&](auto element) {
        using E = decltype(element);
        char* const p = to + first * index_t{sizeof(E)};
        for (index_t i = 0; i < n; ++i) {
            E value;
            from_double(v[i * step], &value);
            std::memcpy(p + i * stride * index_t{sizeof(E)}, &value, sizeof value);
        }
    });
}

// The same by a kernel, if they follow each other. stream: past the caches, if it can.
inline void write_doubles(const Isa& isa, char* to, Dtype dtype, index_t first, index_t stride, index_t n,
                          const double* v, bool stream) {
    if (!to || stride != 1) return write_doubles(to, dtype, first, stride, n, v);
    with_dtype(dtype, [&](auto element) {
        using E = decltype(element);
        kernels_of<E>(isa).narrow(v, n, to + first * index_t{sizeof(E)}, stream);
    });
}

// f(weight_at), where weight_at(offset) is a weight in the type of arithmetic T, without weights 1. The dtype is asked
// for once: group norm has a weight for each of a few dozen lanes.
template <class T, class F>
void with_weights(const char* weight, Dtype dtype, F f) {
    if (!weight) return f([](index_t) { return 1.0; });
    with_dtype(dtype, [&](auto element) {
        f([weight](index_t at) { return double{static_cast<T>(to_double(read<decltype(element)>(weight + at)))}; });
    });
}

// The gradients of n parameters, `stride` apart, to whichever of the caller's arrays there are.
inline void write_parameters(const BackwardCall& call, index_t first, index_t stride, index_t n, const Sums* sums) {
    constexpr index_t kStep = sizeof(Sums) / sizeof(double);
    write_doubles(call.dweight, call.dweight_dtype, first, stride, n, &sums->g_xhat, kStep);
    write_doubles(call.dbias, call.dbias_dtype, first, stride, n, &sums->g, kStep);
}

inline Buffer<Sums> zeroed_sums(const BackwardCall& call) {
    Buffer<Sums> sums(call.parameters);
    for (index_t p = 0; p < call.parameters; ++p) sums[p] = {};
    return sums;
}

}  // namespace normkit::cpu
