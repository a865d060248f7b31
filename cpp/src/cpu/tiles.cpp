#include "tiles.h"

#include <cstring>

namespace normkit::cpu {
namespace {

// A patch: what goes through the buffers at a time. Its rows are those of a leaf of sums.
constexpr index_t kPatchRows = kSumRows;
constexpr index_t kPatchLanes = 64;

constexpr index_t kConstantLanes = 2048;

template <class T>
struct Constants {
    T one[kConstantLanes], zero[kConstantLanes];
    Constants() {
        for (index_t i = 0; i < kConstantLanes; ++i) one[i] = 1, zero[i] = 0;
    }
    static const Constants& get() {
        static const Constants constants;
        return constants;
    }
};

template <class T>
T value(const char* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
}

template <class T>
bool contiguous(const Strided& a, index_t lanes) {
    return a.lane == static_cast<index_t>(sizeof(T)) || lanes == 1 || !a.p;
}

template <class T>
bool per_row(const Strided& a, index_t lanes) {
    return a.lane == 0 || lanes == 1;
}

In in(const Strided& a) { return {a.p, a.row}; }
Out out(const Strided& a) { return {const_cast<char*>(a.p), a.row}; }

Strided shifted(const Strided& a, index_t r, index_t l) { return {a.p ? a.at(r, l) : a.p, a.row, a.lane}; }

template <class T>
TileStatistics<T> shifted(TileStatistics<T> s, index_t r, index_t l) {
    const index_t by = r * s.row + l * s.lane;
    for (const T** p : {&s.hi, &s.lo, &s.rstd, &s.mean_g, &s.mean_g_xhat, &s.scale}) {
        if (*p) *p += by;
    }
    return s;
}

template <class T>
void scatter(const T* from, index_t rows, index_t lanes, Strided to) {
    for (index_t r = 0; r < rows; ++r) {
        for (index_t l = 0; l < lanes; ++l)
            std::memcpy(const_cast<char*>(to.at(r, l)), &from[r * lanes + l], sizeof(T));
    }
}

template <class T>
void multiply(const TileStatistics<T>& s, index_t rows, index_t lanes, T* v) {
    if (!s.scale) return;
    for (index_t r = 0; r < rows; ++r) {
        for (index_t l = 0; l < lanes; ++l) v[r * lanes + l] *= s.scale[r * s.row + l * s.lane];
    }
}

// f(r, l, rows, lanes) for every patch of a tile.
template <class F>
void for_patches(index_t rows, index_t lanes, F f) {
    for (index_t r = 0; r < rows; r += kPatchRows) {
        const index_t n_rows = rows - r < kPatchRows ? rows - r : kPatchRows;
        for (index_t l = 0; l < lanes; l += kPatchLanes) {
            f(r, l, n_rows, lanes - l < kPatchLanes ? lanes - l : kPatchLanes);
        }
    }
}

template <class T>
using Patch = T[kPatchRows * kPatchLanes];

template <class T>
In packed(const T* patch, index_t lanes) {
    return {reinterpret_cast<const char*>(patch), lanes * static_cast<index_t>(sizeof(T))};
}

}  // namespace

template <class T>
Strided one() {
    return {reinterpret_cast<const char*>(Constants<T>::get().one), 0, 0};
}

template <class T>
Strided zero() {
    return {reinterpret_cast<const char*>(Constants<T>::get().zero), 0, 0};
}

template <class T>
void gather(Strided from, index_t rows, index_t lanes, T* to) {
    for (index_t r = 0; r < rows; ++r, to += lanes) {
        if (from.lane == static_cast<index_t>(sizeof(T))) {
            std::memcpy(to, from.at(r, 0), lanes * sizeof(T));
        } else {
            for (index_t l = 0; l < lanes; ++l) to[l] = value<T>(from.at(r, l));
        }
    }
}

template <class T>
void apply(ApplyKernel<T> (&kernel)[2], Strided x, Strided y, Strided w, Strided b, const TileStatistics<T>& s,
           index_t rows, index_t lanes, bool stream) {
    if (!s.scale && contiguous<T>(x, lanes) && contiguous<T>(y, lanes)) {
        if (per_row<T>(w, lanes) && per_row<T>(b, lanes)) {
            kernel[0](in(x), out(y), in(w), in(b), s, rows, lanes, stream);
            return;
        }
        const bool no_w = w.p == one<T>().p, no_b = b.p == zero<T>().p;
        if ((no_w || contiguous<T>(w, lanes)) && (no_b || contiguous<T>(b, lanes))) {
            // The absent one of the two as a vector of constants, as far as those reach.
            if (no_w) w.lane = sizeof(T);
            if (no_b) b.lane = sizeof(T);
            const index_t reach = no_w || no_b ? kConstantLanes : lanes;
            for (index_t l = 0; l < lanes; l += reach) {
                kernel[1](in(shifted(x, 0, l)), out(shifted(y, 0, l)), in(no_w ? w : shifted(w, 0, l)),
                          in(no_b ? b : shifted(b, 0, l)), shifted(s, 0, l), rows,
                          lanes - l < reach ? lanes - l : reach, stream);
            }
            return;
        }
    }
    for_patches(rows, lanes, [&](index_t r, index_t l, index_t n_rows, index_t n) {
        Patch<T> px, py, pw, pb;
        const TileStatistics<T> ps = shifted(s, r, l);
        gather(shifted(x, r, l), n_rows, n, px);
        multiply(ps, n_rows, n, px);
        gather(shifted(w, r, l), n_rows, n, pw);
        gather(shifted(b, r, l), n_rows, n, pb);
        kernel[1](packed(px, n), {reinterpret_cast<char*>(py), n * static_cast<index_t>(sizeof(T))}, packed(pw, n),
                  packed(pb, n), ps, n_rows, n, false);
        scatter(py, n_rows, n, shifted(y, r, l));
    });
}

template <class T>
void backward(const Kernels<T>& k, Strided dy, Strided x, Strided w, Strided dx, const TileStatistics<T>& s,
              index_t rows, index_t lanes, double* sum_g, double* sum_g_xhat, bool stream) {
    if (!s.scale && contiguous<T>(dy, lanes) && contiguous<T>(x, lanes) && contiguous<T>(dx, lanes) &&
        (per_row<T>(w, lanes) || contiguous<T>(w, lanes))) {
        const bool w_lane = !per_row<T>(w, lanes);
        if (!sum_g && s.lane == 0) {
            k.dx_along[w_lane](in(dy), in(x), in(w), out(dx), s, rows, lanes, stream);
        } else {
            k.backward_down[s.lane][w_lane](in(dy), in(x), in(w), out(dx), s, rows, lanes, sum_g, sum_g_xhat, stream);
        }
        return;
    }
    for_patches(rows, lanes, [&](index_t r, index_t l, index_t n_rows, index_t n) {
        Patch<T> pdy, px, pw, pdx;
        const TileStatistics<T> ps = shifted(s, r, l);
        gather(shifted(dy, r, l), n_rows, n, pdy);
        gather(shifted(x, r, l), n_rows, n, px);
        multiply(ps, n_rows, n, px);
        gather(shifted(w, r, l), n_rows, n, pw);
        const Out to = {dx.p ? reinterpret_cast<char*>(pdx) : nullptr, n * static_cast<index_t>(sizeof(T))};
        k.backward_down[s.lane][1](packed(pdy, n), packed(px, n), packed(pw, n), to, ps, n_rows, n,
                                   sum_g ? sum_g + l : nullptr, sum_g ? sum_g_xhat + l : nullptr, false);
        if (!dx.p) return;
        multiply(ps, n_rows, n, pdx);
        scatter(pdx, n_rows, n, shifted(dx, r, l));
    });
}

template <class T>
Sums sums_along(const Kernels<T>& k, Strided dy, Strided x, Strided w, const TileStatistics<T>& s, index_t rows,
                index_t lanes) {
    Sums sums;
    if (!s.scale && contiguous<T>(dy, lanes) && contiguous<T>(x, lanes) &&
        (per_row<T>(w, lanes) || contiguous<T>(w, lanes))) {
        k.sums_along[!per_row<T>(w, lanes)](in(dy), in(x), in(w), s, rows, lanes, 0, 0, 1, &sums);
        return sums;
    }
    T pdy[kLeafLanes], px[kLeafLanes], pw[kLeafLanes];
    gather(dy, rows, lanes, pdy);
    gather(x, rows, lanes, px);
    multiply(s, rows, lanes, px);
    gather(w, rows, lanes, pw);
    k.sums_along[1](packed(pdy, lanes), packed(px, lanes), packed(pw, lanes), s, rows, lanes, 0, 0, 1, &sums);
    return sums;
}

template <class T>
void sums_of_rows(const Kernels<T>& k, Strided dy, Strided x, Strided w, const TileStatistics<T>& s, index_t leaves,
                  index_t lanes, Sums* out) {
    if (!s.scale && contiguous<T>(dy, lanes) && contiguous<T>(x, lanes) &&
        (per_row<T>(w, lanes) || contiguous<T>(w, lanes))) {
        k.sums_along[!per_row<T>(w, lanes)](in(dy), in(x), in(w), s, 1, lanes, dy.row, x.row, leaves, out);
        return;
    }
    for (index_t i = 0; i < leaves; ++i) {
        TileStatistics<T> one = shifted(s, i, 0);
        one.row = 0;
        out[i] = sums_along(k, shifted(dy, i, 0), shifted(x, i, 0), w, one, 1, lanes);
    }
}

template <class T>
void moments_along(const Kernels<T>& k, Strided x, index_t rows, index_t lanes, index_t leaf, index_t leaves,
                   bool center, Moments* out) {
    if (contiguous<T>(x, lanes)) {
        k.moments_along(in(x), rows, lanes, leaf, leaves, center, out);
        return;
    }
    T px[kLeafLanes];
    for (index_t i = 0; i < leaves; ++i, x.p += leaf) {
        gather(x, rows, lanes, px);
        k.moments_along(packed(px, lanes), rows, lanes, 0, 1, center, out + i);
    }
}

template <class T>
void moments_down(const Kernels<T>& k, Strided x, index_t rows, index_t lanes, index_t seen, bool center, double* mean,
                  double* m2) {
    if (contiguous<T>(x, lanes)) {
        k.moments_down(in(x), rows, lanes, seen, center, mean, m2);
        return;
    }
    T px[kLeafRows * kPatchLanes];
    for (index_t r = 0; r < rows; r += kLeafRows) {
        const index_t n_rows = rows - r < kLeafRows ? rows - r : kLeafRows;
        for (index_t l = 0; l < lanes; l += kPatchLanes) {
            const index_t n = lanes - l < kPatchLanes ? lanes - l : kPatchLanes;
            gather(shifted(x, r, l), n_rows, n, px);
            k.moments_down(packed(px, n), n_rows, n, seen + r, center, mean + l, m2 + l);
        }
    }
}

#define NORMKIT_INSTANTIATE(T)                                                                                      \
    template Strided one<T>();                                                                                      \
    template Strided zero<T>();                                                                                     \
    template void gather<T>(Strided, index_t, index_t, T*);                                                         \
    template void apply<T>(ApplyKernel<T>(&)[2], Strided, Strided, Strided, Strided, const TileStatistics<T>&,      \
                           index_t, index_t, bool);                                                                 \
    template void backward<T>(const Kernels<T>&, Strided, Strided, Strided, Strided, const TileStatistics<T>&,      \
                              index_t, index_t, double*, double*, bool);                                            \
    template Sums sums_along<T>(const Kernels<T>&, Strided, Strided, Strided, const TileStatistics<T>&, index_t,    \
                                index_t);                                                                           \
    template void sums_of_rows<T>(const Kernels<T>&, Strided, Strided, Strided, const TileStatistics<T>&, index_t,  \
                                  index_t, Sums*);                                                                  \
    template void moments_along<T>(const Kernels<T>&, Strided, index_t, index_t, index_t, index_t, bool, Moments*); \
    template void moments_down<T>(const Kernels<T>&, Strided, index_t, index_t, index_t, bool, double*, double*);

NORMKIT_INSTANTIATE(float)

}  // namespace normkit::cpu
