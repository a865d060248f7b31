// The numerics of a leaf, for one lane and for the warp. The same code on host and device: the tests run it on both.
//
// A leaf takes a pilot k in the type of arithmetic, then sums of d = x - k and d^2; mean = k + sum(d) / n, M2 =
// sum(d^2)
// - sum(d)^2 / n. The subtraction is safe because k is within rounding of the mean. Chains of additions in float32 have
// at most 16 links, and five more where lanes are added up by halves; everything above a leaf is in double. The
// compiler does not contract (-fmad=false): a fused multiply-add stands where it is written, so every kernel, and the
// host, has the same bits.
#pragma once

#include <cmath>

#include "work.h"

#if defined(__CUDACC__)
#define NORMKIT_PRAGMA(text) _Pragma(#text)
#define NORMKIT_UNROLL _Pragma("unroll")
#define NORMKIT_UNROLL_BY(n) NORMKIT_PRAGMA(unroll n)
#define NORMKIT_ROLLED _Pragma("unroll 1")
#else
#define NORMKIT_UNROLL
#define NORMKIT_UNROLL_BY(n)
#define NORMKIT_ROLLED
#endif

namespace normkit::cuda {

NORMKIT_HOST_DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
NORMKIT_HOST_DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// The sum of value(i) - less over the first `valid` of kN elements of a lane, in two chains.
template <int kN, class A, class F>
NORMKIT_HOST_DEVICE A lane_sum(int valid, A less, F value) {
    A even = 0, odd = 0;
    NORMKIT_UNROLL
    for (int i = 0; i < kN; i += 2) {
        if (i < valid) even += value(i) - less;
        if (i + 1 < valid) odd += value(i + 1) - less;
    }
    return even + odd;
}

template <class A>
struct Deviations {
    A d, dd;
};
template <int kN, class A, class F>
NORMKIT_HOST_DEVICE Deviations<A> lane_deviations(int valid, A pilot, F value) {
    A d0 = 0, d1 = 0, dd0 = 0, dd1 = 0;
    NORMKIT_UNROLL
    for (int i = 0; i < kN; i += 2) {
        if (i < valid) {
            const A d = value(i) - pilot;
            d0 += d;
            dd0 = fused(d, d, dd0);
        }
        if (i + 1 < valid) {
            const A d = value(i + 1) - pilot;
            d1 += d;
            dd1 = fused(d, d, dd1);
        }
    }
    return {d0 + d1, dd0 + dd1};
}

// From the sums of all n elements. `inverse`: 1 / n; one division serves all lanes of a column.
template <class A>
NORMKIT_HOST_DEVICE Moments leaf_moments(double n, double inverse, A pilot, A d, A dd, bool center) {
    if (!center) return {n, 0, static_cast<double>(dd)};
    const double k = static_cast<double>(pilot), sum = static_cast<double>(d), rest = sum * inverse;
    double M2 = static_cast<double>(dd) - sum * rest;
    if (M2 < 0) M2 = 0;
    return {n, std::isfinite(k) ? k + rest : k, M2};
}

// Moments::merge where many lanes have the same counts.
struct Merging {
    double share, weight;
    NORMKIT_HOST_DEVICE Merging(double count, double other) : share(other / (count + other)), weight(count * share) {}
    NORMKIT_HOST_DEVICE void merge(double* mean, double* M2, double other_mean, double other_M2) const {
        const double delta = other_mean - *mean;
        *mean += delta * share;
        *M2 += other_M2 + delta * delta * weight;
    }
};

// Lanes are merged in pairs, the lower lane's part first: `lower` says whether mine is that.
NORMKIT_HOST_DEVICE Moments merged_pair(const Moments& mine, const Moments& other, bool lower) {
    // By value: a choice between references would put both into memory.
    Moments m{lower ? mine.count : other.count, lower ? mine.mean : other.mean, lower ? mine.M2 : other.M2};
    m.merge({lower ? other.count : mine.count, lower ? other.mean : mine.mean, lower ? other.M2 : mine.M2});
    return m;
}

// How many lanes share the merging of n entries: a power of two.
NORMKIT_HOST_DEVICE int merging_lanes(index_t n) {
    int lanes = 1;
    while (lanes < kWarp && lanes < n) lanes *= 2;
    return lanes;
}

// (x - mean) * scale, less what the high part of the mean lacks.
template <class T>
NORMKIT_HOST_DEVICE T centred(T x, const Split<T>& s) {
    return fused(x, s.scale, -s.hi);
}
template <class T>
NORMKIT_HOST_DEVICE T xhat_of(T x, const Split<T>& s) {
    return (centred(x, s) - s.lo) * s.rstd;
}

// y = w * ((d - lo) * rstd) + b with d = x - hi: d is centred, so nothing cancels in d * a + (b - lo * a).
template <class T>
NORMKIT_HOST_DEVICE T y_of(T x, const Split<T>& s, T w, T b) {
    const T a = s.rstd * w;
    return fused(centred(x, s), a, fused(-s.lo, a, b));
}

// dx = rstd * (g - mean_g - xhat * mean_g_xhat) = (dy * a - d * rstd * e) + c, with e = rstd * mean_g_xhat and
// c = lo * rstd * e - rstd * mean_g. A scaled set has rstd / scale for rstd, so its dx comes out that much too small.
template <class T>
struct DxTerms {
    T e, c;
};
template <class T>
NORMKIT_HOST_DEVICE DxTerms<T> dx_terms(const Split<T>& s, const Pair<T>& mean) {
    const T e = s.rstd * mean.g_xhat;
    return {e, fused(s.lo * s.rstd, e, -(s.rstd * mean.g))};
}
template <class T>
NORMKIT_HOST_DEVICE T dx_of(T x, T dy, T w, const Split<T>& s, const DxTerms<T>& t) {
    const T a = s.rstd * w;
    return (fused(dy, a, -(centred(x, s) * s.rstd * t.e)) + t.c) * s.scale;
}

// The scale that brings the largest magnitude of a float64 set to about 1; 1 where it is 0, infinity or NaN.
NORMKIT_HOST_DEVICE double scale_for(double largest) {
    if (!(largest > 0) || !std::isfinite(largest)) return 1;
    const int exponent = std::ilogb(largest);
    return std::ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
}

}  // namespace normkit::cuda
