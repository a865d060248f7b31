// The formula, once: from moments to what a kernel needs to know of a set. Plain scalar code, for every backend: host
// and device compile the same lines.
#pragma once

#include <cmath>
#include <limits>

#include "normkit/moments.h"

namespace normkit {

NORMKIT_HOST_DEVICE double rstd_of(const Moments& m, double eps) { return 1 / std::sqrt(m.M2 / m.count + eps); }

// Whether moments whose squares were taken in T can be trusted: not where sums overflowed (or met NaN or infinity), nor
// squares so small that T has lost them (2^-126 is the least normal float, 2^-26 of the variance the contract's last
// digit). Then the set is done again in double, scaled (moments_in_double). eps counts, because beside it a lost square
// does no harm. V: of one set or, as a vector, of several.
template <class T, class V>
NORMKIT_HOST_DEVICE auto are_plain(V mean, V M2, double count, double eps) {
    constexpr double kLost = sizeof(T) == 4 ? 0x1p-100 : 0x1p-960;
    // Without branches: many sets are asked about in one loop, of vectors. A finite number less itself is 0.
    return (mean - mean == 0.0) & (M2 - M2 == 0.0) & (M2 + eps * count >= kLost * count);
}
template <class T>
NORMKIT_HOST_DEVICE bool is_doubtful(const Moments& m, double eps) {
    return !are_plain<T>(m.mean, m.M2, m.count, eps);
}

// The statistics of a set. The mean is mean + mean_lo: beside a standard deviation a millionth of it, the rounding of a
// single double would be 6e-11.
struct Statistic {
    double mean = 0, mean_lo = 0, rstd = 0;
};

// About zero, from a mean about `origin`: the sum of the two and what its rounding lost (Knuth's TwoSum).
NORMKIT_HOST_DEVICE Statistic statistic_from(const Moments& m, double origin, double eps) {
    const double mean = origin + m.mean, rounded = mean - origin;
    return {mean, (origin - (mean - rounded)) + (m.mean - rounded), rstd_of(m, eps)};
}

// sqrt(a^2 + b^2) without leaving the range; not std::hypot, whose last bit is the library's.
NORMKIT_HOST_DEVICE double root_of_squares(double a, double b) {
    const double larger = a > b ? a : b;
    if (!(larger > 0) || !std::isfinite(larger)) return std::sqrt(a * a + b * b);
    const int exponent = std::ilogb(larger);
    a = std::ldexp(a, -exponent);
    b = std::ldexp(b, -exponent);
    return std::ldexp(std::sqrt(a * a + b * b), exponent);
}

// The same from the moments of x * scale, a power of two, whatever the magnitude of x.
NORMKIT_HOST_DEVICE Statistic statistic_from(const Moments& m, double origin, double scale, double eps) {
    Statistic s = statistic_from(m, origin, 0);
    s.mean /= scale;
    s.mean_lo /= scale;
    s.rstd = 1 / root_of_squares(std::sqrt(m.M2 / m.count) / scale, std::sqrt(eps));
    return s;
}

// One set's statistics in the type of arithmetic. Where rstd is so large or small that (x - mean) or rstd would leave
// the range of T, everything is scaled by an exact power of two: xhat = ((x * scale - hi) - lo) * rstd.
template <class T>
struct Split {
    T hi, lo, rstd, scale;
};

// Whether a set with this rstd surely is done as it is.
template <class T, class V>
NORMKIT_HOST_DEVICE auto is_unscaled(V rstd) {
    constexpr double kFar = sizeof(T) == 4 ? 0x1p60 : 0x1p500;
    return (rstd >= 1 / kFar) & (rstd <= kFar);
}

template <class T>
NORMKIT_HOST_DEVICE Split<T> split(const Statistic& s) {
    constexpr int kMost = std::numeric_limits<T>::max_exponent - 2;  // of a normal power of two and its inverse
    const double rstd = s.rstd;
    Split<T> out{static_cast<T>(s.mean), 0, static_cast<T>(rstd), 1};
    double scale = 1, mean = s.mean;
    if (!is_unscaled<T>(rstd) && std::isfinite(rstd) && rstd > 0) {
        const int exponent = std::ilogb(rstd);
        scale = std::ldexp(1.0, exponent < -kMost ? -kMost : exponent > kMost ? kMost : exponent);
        mean *= scale;
        out = {static_cast<T>(mean), 0, static_cast<T>(rstd / scale), static_cast<T>(scale)};
    }
    out.lo = static_cast<T>((mean - static_cast<double>(out.hi)) + s.mean_lo * scale);
    // No -0, so that subtracting a zero mean and not subtracting it are the same.
    out.hi += 0;
    out.lo += 0;
    return out;
}

}  // namespace normkit
