// The formula, once: from moments to what a kernel needs to know of a set. Plain scalar code, fit for any backend.
#pragma once

#include <cmath>

#include "normkit/moments.h"

namespace normkit {

inline double rstd_of(const Moments& m, double eps) { return 1 / std::sqrt(m.m2 / m.count + eps); }

// Whether moments taken in float can't be trusted: sums that overflowed (or met NaN or infinity), or squares so small
// that float has lost them (2^-126 is the least normal number; 2^-26 of the variance is the contract's last digit).
// Then the set is done again in double (moments_in_double). eps counts, because beside it a lost square does no harm.
inline bool is_doubtful(const Moments& m, double eps) {
    return !(std::isfinite(m.mean) && std::isfinite(m.m2) && m.m2 + eps * m.count >= 0x1p-100 * m.count);
}

// One set's statistics in the dtype of the data. Where rstd is so large or small that (x - mean) or rstd would leave
// the range of T, everything is scaled by an exact power of two: xhat = ((x * scale - hi) - lo) * rstd.
template <class T>
struct Split {
    T hi, lo, rstd, scale;
};

template <class T>
Split<T> split(double mean, double rstd) {
    double scale = 1;
    if (sizeof(T) == 4 && std::isfinite(rstd) && rstd > 0 && !(rstd >= 0x1p-60 && rstd <= 0x1p60)) {
        const int exponent = std::ilogb(rstd);
        scale = std::ldexp(1.0, exponent < -126 ? -126 : exponent > 126 ? 126 : exponent);
    }
    Split<T> s;
    s.hi = static_cast<T>(mean * scale);
    s.lo = static_cast<T>(mean * scale - static_cast<double>(s.hi));
    s.rstd = static_cast<T>(rstd / scale);
    s.scale = static_cast<T>(scale);
    return s;
}

}  // namespace normkit
