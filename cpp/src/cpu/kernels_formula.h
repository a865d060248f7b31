// What all kernels have in common: the formula for a vector of lanes or one number of a row, and the constant that
// compiles the contracts out. Part of kernels.cpp, so everything is in its anonymous namespace.
#pragma once

#include "../formula.h"
#include "kernels.h"
#include "simd.h"

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
using normkit::Split;
using normkit::cpu::ahead_to_l1;
using normkit::cpu::BackwardEights;
using normkit::cpu::BackwardRows;
using normkit::cpu::begins_on_lines;
using normkit::cpu::DownSums;
using normkit::cpu::dx_beside;
using normkit::cpu::fits_beside;
using normkit::cpu::ForwardEights;
using normkit::cpu::Gradients;
using normkit::cpu::In;
using normkit::cpu::kEight;
using normkit::cpu::Kernels;
using normkit::cpu::kLine;
using normkit::cpu::kMostOfEight;
using normkit::cpu::kMostSums;
using normkit::cpu::kSideBySide;
using normkit::cpu::lanes_of_part;
using normkit::cpu::LeafSeries;
using normkit::cpu::least_ragged_row;
using normkit::cpu::on_line;
using normkit::cpu::on_lines;
using normkit::cpu::Out;
using normkit::cpu::Rows;
using normkit::cpu::Seam;
using normkit::cpu::Statistics;
using normkit::cpu::Sums;
using normkit::cpu::SumSeries;
using normkit::cpu::Unwritten;

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

// The same where the mean may be exactly 0. Then b is added as it is, so that kernels which leave the subtraction of 0
// out agree with those that don't, also where b is -0 or a infinite.
template <class V>
NK_INLINE V bias_term(V a, V hi, V lo, V b) {
    return (hi == V{}) & (lo == V{}) ? b : bias_term<V>(a, lo, b);
}

// a and c of y.
template <class V>
struct YTerms {
    V a, c;
};
template <class V>
NK_INLINE YTerms<V> y_terms(V hi, V lo, V rstd, V w, V b) {
    const V a = rstd * w;
    return {a, bias_term<V>(a, hi, lo, b)};
}

// e and c of dx.
template <class V>
struct DxTerms {
    V e, c;
};
template <class V>
NK_INLINE DxTerms<V> dx_terms(V lo, V rstd, V mean_g, V mean_g_xhat) {
    const V e = rstd * mean_g_xhat;
    return {e, (kLoose ? V{} : (lo * rstd) * e) - rstd * mean_g};
}
template <class V>
NK_INLINE V dx_of(V dy, V d, V rstd, V a, V e, V c) {
    return (dy * a - (d * rstd) * e) + c;
}

}  // namespace
