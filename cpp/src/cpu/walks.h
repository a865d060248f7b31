// What the two walks have in common.
#pragma once

#include "../operation.h"
#include "../schedule.h"
#include "parallel.h"
#include "scratch.h"

namespace normkit::cpu {

constexpr index_t kPieceBytes = 256 * 1024;  // of work handed to a thread at a time
constexpr index_t kNearBytes = 64 * 1024;    // of small sets whose moments are taken before they are applied
constexpr index_t kSetsAtOnce = 64;

template <class T>
void rows_forward(const Plan& plan, const ForwardCall& call, const Kernels<T>& kernels, const Schedule& schedule);
template <class T>
void rows_backward(const Plan& plan, const BackwardCall& call, const Kernels<T>& kernels, const Schedule& schedule);
template <class T>
void columns_forward(const Plan& plan, const ForwardCall& call, const Kernels<T>& kernels, const Schedule& schedule);
template <class T>
void columns_backward(const Plan& plan, const BackwardCall& call, const Kernels<T>& kernels, const Schedule& schedule);

// An operand on a tile of a nest; null stays null.
inline Strided operand(const char* base, const Offsets& at, const Tiles& tiles, Operand o) {
    return {base ? base + at[o] : nullptr, tiles.rows.stride[o], tiles.lanes.stride[o]};
}

// Statistic number i, to whichever of the caller's arrays there are.
inline void write_statistics(const ForwardCall& call, index_t i, const Moments& m, double rstd) {
    if (call.mean) call.mean[i] = m.mean;
    if (call.rstd) call.rstd[i] = rstd;
    if (call.m2) call.m2[i] = m.m2;
}

// dx on a tile (if wanted), and the sums of dy and dy * xhat down its lanes (where sum_g is not null).
// Constant statistics: dx = rstd * w * dy is the forward formula on dy with mean 0; it needs lanes <= 2048 where s.lane
// is 1, and s.row = 0 where it is 0.
template <class T>
void write_dx(const Kernels<T>& k, const BackwardCall& call, const Offsets& at, const Tiles& tiles, index_t rows,
              index_t lanes, const TileStatistics<T>& s, double* sum_g, double* sum_g_xhat, bool stream) {
    const Strided dy = operand(call.dy, at, tiles, kDy), x = operand(call.x, at, tiles, kX);
    const Strided w = call.weight ? operand(call.weight, at, tiles, kWeight) : one<T>();
    const Strided dx = operand(call.dx, at, tiles, kY);
    if (call.dx && !call.constant_statistics) {
        backward(k, dy, x, w, dx, s, rows, lanes, sum_g, sum_g_xhat, stream);
        return;
    }
    if (sum_g) backward(k, dy, x, one<T>(), Strided{}, s, rows, lanes, sum_g, sum_g_xhat, false);
    if (call.dx) {
        TileStatistics<T> about_zero = s;
        about_zero.hi = about_zero.lo = reinterpret_cast<const T*>(zero<T>().p);
        apply(s.lane ? k.apply_down : k.apply_along, dy, dx, w, zero<T>(), about_zero, rows, lanes, stream);
    }
}

// The gradient of parameter number p, to whichever of the caller's arrays there are.
inline void write_parameter(const BackwardCall& call, index_t p, const Sums& sums) {
    if (call.dweight) call.dweight[p] = static_cast<float>(sums.g_xhat);
    if (call.dbias) call.dbias[p] = static_cast<float>(sums.g);
}

inline Buffer<Sums> zeroed_sums(const BackwardCall& call) {
    Buffer<Sums> sums(call.parameters);
    for (index_t p = 0; p < call.parameters; ++p) sums[p] = {};
    return sums;
}

inline void write_parameters(const BackwardCall& call, const Sums* sums) {
    for (index_t p = 0; p < call.parameters; ++p) write_parameter(call, p, sums[p]);
}

// The gradients of the parameters where neither walk comes by them on its way (axes that carry parameters lie outside
// or between the ones that are summed): each in double, over all elements that share it.
template <class T>
void sum_parameters(const Plan& plan, const BackwardCall& call, int threads);

}  // namespace normkit::cpu
