// Moments {count, mean, M2} of a set of numbers: the monoid on which every reduction of normkit rests.
#pragma once

#include "normkit/host_device.h"

namespace normkit {

struct Moments {
    double count = 0;
    double mean = 0;
    double M2 = 0;  // sum of (x - mean)^2

    // The moments of the union of two disjoint sets: Chan, Golub, LeVeque, "Updating formulae and a pairwise
    // algorithm for computing sample variances" (1979), eq. 2.1. Exact for constant sets: delta is then 0.
    // An empty set is neutral on either side.
    NORMKIT_HOST_DEVICE void merge(const Moments& other) {
        if (other.count == 0) return;
        if (count == 0) {
            *this = other;
            return;
        }
        const double total = count + other.count;
        const double share = other.count / total;
        const double delta = other.mean - mean;
        mean += delta * share;
        M2 += other.M2 + delta * delta * (count * share);
        count = total;
    }

    // Divides by count - ddof. NaN where that is not positive.
    NORMKIT_HOST_DEVICE double var(double ddof = 0) const {
        return count > ddof ? M2 / (count - ddof) : __builtin_nan("");
    }
};

}  // namespace normkit
