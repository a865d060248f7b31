#include "tiles.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <utility>

namespace normkit::cpu {
namespace {

// A patch: what goes through the buffers at a time. Its rows are those of a leaf of sums.
constexpr index_t kPatchRows = kSumRows;
constexpr index_t kPatchLanes = 64;

// As many as backward_rows takes.
template <class T>
constexpr index_t kConstantLanes = kMostSums / static_cast<index_t>(sizeof(T));

template <class T>
struct Constants {
    alignas(64) T one[kConstantLanes<T>];
    alignas(64) T zero[kConstantLanes<T>];
    Constants() {
        for (index_t i = 0; i < kConstantLanes<T>; ++i) one[i] = 1, zero[i] = 0;
    }
    static const Constants& get() {
        static const Constants constants;
        return constants;
    }
};

// Whether kernels that read elements E can take it as it lies; an operand that is not there is no hindrance.
template <class E>
bool contiguous(const Strided& a, index_t lanes) {
    return !a.p || (a.dtype == kDtype<E> && (a.lane == static_cast<index_t>(sizeof(E)) || lanes == 1));
}

// For parameters: one value a row.
template <class T>
bool per_row(const Strided& a, index_t lanes) {
    return a.dtype == kDtype<T> && (a.lane == 0 || lanes == 1);
}

In in(const Strided& a) { return {a.p, a.row}; }
Out out_of(const Strided& a) { return {const_cast<char*>(a.p), a.row}; }

Strided shifted(const Strided& a, index_t r, index_t l) { return {a.p ? a.at(r, l) : a.p, a.row, a.lane, a.dtype}; }

template <class T>
TileStatistics<T> shifted(TileStatistics<T> s, index_t r, index_t l) {
    const index_t by = r * s.row + l * s.lane;
    for (const T** p : {&s.hi, &s.lo, &s.rstd, &s.mean_g, &s.mean_g_xhat, &s.scale}) {
        if (*p) *p += by;
    }
    return s;
}

// Elements as they are. strange: which of the two tiles is not packed; its memory decides on the order, so that each
// line is touched once, also where rows are neighbours and lanes are not.
template <class E>
void copy_tile(Strided from, Strided to, const Strided& strange, index_t rows, index_t lanes) {
    const bool across = strange.row != 0 && std::abs(strange.row) < std::abs(strange.lane);
    if (rows > 1 && (across || lanes == 1)) {
        std::swap(from.row, from.lane);
        std::swap(to.row, to.lane);
        std::swap(rows, lanes);
    }
    for (index_t r = 0; r < rows; ++r) {
        const char* p = from.at(r, 0);
        char* q = const_cast<char*>(to.at(r, 0));
        if (from.lane == index_t{sizeof(E)} && to.lane == index_t{sizeof(E)}) {
            std::memcpy(q, p, static_cast<std::size_t>(lanes) * sizeof(E));
            continue;
        }
        for (index_t l = 0; l < lanes; ++l, p += from.lane, q += to.lane) std::memcpy(q, p, sizeof(E));
    }
}

// Back from a buffer.
template <class X, class E>
void scatter(const E* from, index_t rows, index_t lanes, const Strided& to) {
    if constexpr (std::is_same_v<E, X>) {
        copy_tile<X>(packed_tile(from, lanes), to, to, rows, lanes);
    } else {
        for (index_t r = 0; r < rows; ++r) {
            for (index_t l = 0; l < lanes; ++l) {
                X v;
                from_double(to_double(from[r * lanes + l]), &v);
                std::memcpy(const_cast<char*>(to.at(r, l)), &v, sizeof v);
            }
        }
    }
}

// n elements that follow each other, to a type of arithmetic.
template <class X, class T>
void convert(const Isa& isa, const char* from, index_t n, T* to) {
    if constexpr (std::is_same_v<X, double>) {
        kernels_of<T>(isa).narrow(reinterpret_cast<const double*>(from), n, reinterpret_cast<char*>(to), false);
    } else if constexpr (std::is_same_v<T, Compute<X>>) {
        kernels_of<X>(isa).widen(from, n, to);
    } else {
        for (index_t i = 0; i < n; ++i) to[i] = static_cast<T>(to_double(read<X>(from + i * index_t{sizeof(X)})));
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
    return {reinterpret_cast<const char*>(Constants<T>::get().one), 0, 0, kDtype<T>};
}

template <class T>
Strided zero() {
    return {reinterpret_cast<const char*>(Constants<T>::get().zero), 0, 0, kDtype<T>};
}

template <class E>
void gather(const Isa& isa, const Strided& from, index_t rows, index_t lanes, E* to) {
    with_dtype(from.dtype, [&](auto element) {
        using X = decltype(element);
        if constexpr (std::is_same_v<X, E>) {
            copy_tile<E>(from, packed_tile(to, lanes), from, rows, lanes);
        } else if constexpr (std::is_floating_point_v<E>) {
            constexpr index_t kMost = 512;
            X some[kMost];
            for (index_t r = 0; r < rows; ++r, to += lanes) {
                if (from.lane == index_t{sizeof(X)}) {
                    convert<X>(isa, from.at(r, 0), lanes, to);
                    continue;
                }
                for (index_t l = 0; l < lanes; l += kMost) {
                    const index_t n = lanes - l < kMost ? lanes - l : kMost;
                    copy_tile<X>(shifted(from, r, l), packed_tile(some, n), from, 1, n);
                    convert<X>(isa, reinterpret_cast<const char*>(some), n, to + l);
                }
            }
        }
    });
}

template <class E>
void gather(const Isa& isa, const Nest& nest, Operand o, const char* base, Dtype dtype, index_t first, index_t n,
            E* to) {
    const Axis& lanes = nest.inner();
    for (index_t some; n > 0; first += some, n -= some, to += some) {
        const index_t lane = first % lanes.extent;
        Strided from{base + nest.offset(o, first), 0, lanes.stride[o], dtype};
        if (nest.n > 1 && lane == 0 && n >= lanes.extent) {
            const Axis& outer = nest.axis[nest.n - 2];
            const index_t rows = std::min(n / lanes.extent, outer.extent - first / lanes.extent % outer.extent);
            from.row = outer.stride[o];
            gather(isa, from, rows, lanes.extent, to);
            some = rows * lanes.extent;
        } else {
            some = std::min(n, lanes.extent - lane);
            gather(isa, from, 1, some, to);
        }
    }
}

namespace {

// Where parameters of one a lane are all that has to be fetched: f(l, n, w, b) with those of n lanes at a time.
template <class T, class F>
void with_fetched(const Isa& isa, const Strided& w, const Strided& b, index_t lanes, F f) {
    constexpr index_t kMost = 512;
    T pw[kMost], pb[kMost];
    static_assert(kMost <= kConstantLanes<T>);
    const auto fetched = [&](const Strided& from, index_t l, index_t n, T* to) -> Strided {
        if (from.p == one<T>().p || from.p == zero<T>().p) return {from.p, 0, sizeof(T), kDtype<T>};
        gather(isa, shifted(from, 0, l), 1, n, to);
        return {reinterpret_cast<const char*>(to), 0, sizeof(T), kDtype<T>};
    };
    for (index_t l = 0; l < lanes; l += kMost) {
        const index_t n = lanes - l < kMost ? lanes - l : kMost;
        f(l, n, fetched(w, l, n, pw), fetched(b, l, n, pb));
    }
}

// f(the kernels for what lies in buffers): elements X, or, where a set is scaled, the type of arithmetic.
template <class X, class F>
void with_buffers(const KernelPair<X>& k, bool scaled, F f) {
    if constexpr (!std::is_same_v<X, Compute<X>>) {
        if (!scaled) return f(k.direct);
    }
    f(k.packed);
}

// What all rows have in common goes to the buffer once.
template <class T>
In packed_parameter(const Isa& isa, const Strided& from, index_t rows, index_t lanes, T* buffer) {
    const bool alike = from.row == 0;
    gather(isa, from, alike ? 1 : rows, lanes, buffer);
    return {reinterpret_cast<const char*>(buffer), alike ? 0 : lanes * index_t{sizeof(T)}};
}

// `apply` through buffers of elements E.
template <class X, class E>
void apply_to_patches(const Isa& isa, const Kernels<E>& kernels, const Strided& x, const Strided& y, const Strided& w,
                      const Strided& b, const TileStatistics<Compute<X>>& s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    // Parameters that are one a row are gathered as such.
    const bool one_a_row = lanes == 1 || (w.lane == 0 && b.lane == 0);
    const auto& kernel = (s.lane ? kernels.apply_down : kernels.apply_along)[!one_a_row];
    for_patches(rows, lanes, [&](index_t r, index_t l, index_t n_rows, index_t n) {
        Patch<E> px, py;
        Patch<T> pw, pb;
        const TileStatistics<T> ps = shifted(s, r, l);
        const index_t n_of_row = one_a_row ? 1 : n;
        gather(isa, shifted(x, r, l), n_rows, n, px);
        if constexpr (std::is_same_v<E, T>) multiply(ps, n_rows, n, px);
        const In w_rows = packed_parameter(isa, shifted(w, r, l), n_rows, n_of_row, pw);
        const In b_rows = packed_parameter(isa, shifted(b, r, l), n_rows, n_of_row, pb);
        kernel(packed(px, n), {reinterpret_cast<char*>(py), n * index_t{sizeof(E)}}, w_rows, b_rows, ps, n_rows, n,
               false);
        scatter<X>(py, n_rows, n, shifted(y, r, l));
    });
}

}  // namespace

template <class X>
void apply(const KernelPair<X>& k, Strided x, Strided y, Strided w, Strided b, const TileStatistics<Compute<X>>& s,
           index_t rows, index_t lanes, bool stream) {
    using T = Compute<X>;
    const auto& kernel = s.lane ? k.direct.apply_down : k.direct.apply_along;
    if (!s.scale && contiguous<X>(x, lanes) && contiguous<X>(y, lanes)) {
        if (per_row<T>(w, lanes) && per_row<T>(b, lanes)) {
            kernel[0](in(x), out_of(y), in(w), in(b), s, rows, lanes, stream);
            return;
        }
        const bool no_w = w.p == one<T>().p, no_b = b.p == zero<T>().p;
        if ((no_w || contiguous<T>(w, lanes)) && (no_b || contiguous<T>(b, lanes))) {
            // The absent one of the two as a vector of constants, as far as those reach.
            if (no_w) w.lane = sizeof(T);
            if (no_b) b.lane = sizeof(T);
            const index_t reach = no_w || no_b ? kConstantLanes<T> : lanes;
            for (index_t l = 0; l < lanes; l += reach) {
                kernel[1](in(shifted(x, 0, l)), out_of(shifted(y, 0, l)), in(no_w ? w : shifted(w, 0, l)),
                          in(no_b ? b : shifted(b, 0, l)), shifted(s, 0, l), rows,
                          lanes - l < reach ? lanes - l : reach, stream);
            }
            return;
        }
        if (w.row == 0 && b.row == 0) {
            with_fetched<T>(k.isa, w, b, lanes, [&](index_t l, index_t n, const Strided& pw, const Strided& pb) {
                kernel[1](in(shifted(x, 0, l)), out_of(shifted(y, 0, l)), in(pw), in(pb), shifted(s, 0, l), rows, n,
                          stream);
            });
            return;
        }
    }
    with_buffers(k, s.scale,
                 [&](const auto& kernels) { apply_to_patches<X>(k.isa, kernels, x, y, w, b, s, rows, lanes); });
}

// `backward` with operands as they lie.
template <class X>
void backward_in_place(const KernelPair<X>& k, const Strided& dy, const Strided& x, const Strided& w, const Strided& dx,
                       const TileStatistics<Compute<X>>& s, index_t rows, index_t lanes, DownSums sums, bool stream) {
    const bool w_lane = !per_row<Compute<X>>(w, lanes);
    if (!sums.g && s.lane == 0) {
        k.direct.dx_along[w_lane](in(dy), in(x), in(w), out_of(dx), s, rows, lanes, stream);
    } else {
        k.direct.backward_down[s.lane][w_lane](in(dy), in(x), in(w), out_of(dx), s, rows, lanes, sums, stream);
    }
}

// `backward` through buffers, as apply_to_patches.
template <class X, class E>
void backward_of_patches(const Isa& isa, const Kernels<E>& kernels, const Strided& dy, const Strided& x,
                         const Strided& w, const Strided& dx, const TileStatistics<Compute<X>>& s, index_t rows,
                         index_t lanes, DownSums sums) {
    using T = Compute<X>;
    for_patches(rows, lanes, [&](index_t r, index_t l, index_t n_rows, index_t n) {
        Patch<E> pdy, px, pdx;
        Patch<T> pw;
        const TileStatistics<T> ps = shifted(s, r, l);
        gather(isa, shifted(dy, r, l), n_rows, n, pdy);
        gather(isa, shifted(x, r, l), n_rows, n, px);
        if constexpr (std::is_same_v<E, T>) multiply(ps, n_rows, n, px);
        const In w_rows = packed_parameter(isa, shifted(w, r, l), n_rows, n, pw);
        const Out to = {dx.p ? reinterpret_cast<char*>(pdx) : nullptr, n * index_t{sizeof(E)}};
        kernels.backward_down[s.lane][1](packed(pdy, n), packed(px, n), w_rows, to, ps, n_rows, n, sums.at(l), false);
        if (!dx.p) return;
        if constexpr (std::is_same_v<E, T>) multiply(ps, n_rows, n, pdx);
        scatter<X>(pdx, n_rows, n, shifted(dx, r, l));
    });
}

template <class X>
void backward(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx, const TileStatistics<Compute<X>>& s,
              index_t rows, index_t lanes, DownSums sums, bool stream) {
    using T = Compute<X>;
    if (!s.scale && contiguous<X>(dy, lanes) && contiguous<X>(x, lanes) && contiguous<X>(dx, lanes)) {
        if (per_row<T>(w, lanes) || contiguous<T>(w, lanes)) {
            return backward_in_place(k, dy, x, w, dx, s, rows, lanes, sums, stream);
        }
        if (w.row == 0) {
            with_fetched<T>(k.isa, w, zero<T>(), lanes, [&](index_t l, index_t n, const Strided& pw, const Strided&) {
                backward_in_place(k, shifted(dy, 0, l), shifted(x, 0, l), pw, shifted(dx, 0, l), shifted(s, 0, l), rows,
                                  n, sums.at(l), stream);
            });
            return;
        }
    }
    with_buffers(k, s.scale, [&](const auto& kernels) {
        backward_of_patches<X>(k.isa, kernels, dy, x, w, dx, s, rows, lanes, sums);
    });
}

template <class X>
index_t forward_in_eights(const KernelPair<X>& k, const ApplyTo<X>& t, bool center, double eps, double* mean,
                          double* rstd, double* M2) {
    using T = Compute<X>;
    Strided w = t.w, b = t.b;
    const bool w_lane = !(per_row<T>(w, t.lanes) && per_row<T>(b, t.lanes));
    if (w_lane) {
        if (w.p == one<T>().p) w.lane = sizeof(T);
        if (b.p == zero<T>().p) b.lane = sizeof(T);
        if (!contiguous<T>(w, t.lanes) || !contiguous<T>(b, t.lanes)) return 0;
    }
    if (t.lanes > kMostOfEight || !contiguous<X>(t.x, t.lanes) || !contiguous<X>(t.y, t.lanes)) return 0;
    static_assert(kMostOfEight <= kConstantLanes<T>);
    return k.direct.forward_in_eights(
        {in(t.x), in(w), in(b), out_of(t.y), t.rows, t.lanes, w_lane, center, t.stream, t.far, eps, mean, rstd, M2});
}

template <class X>
bool backward_rows(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx,
                   const TileStatistics<Compute<X>>& s, index_t rows, index_t lanes, DownSums sums, bool stream,
                   bool far, bool center, Compute<X>* mean_g, Compute<X>* mean_g_xhat) {
    using T = Compute<X>;
    if (w.p == one<T>().p && lanes <= kConstantLanes<T>) w.lane = sizeof(T);
    if (s.scale || !contiguous<X>(dy, lanes) || !contiguous<X>(x, lanes) || !contiguous<X>(dx, lanes) ||
        !contiguous<T>(w, lanes) || lanes * index_t{sizeof(T)} > kMostSums) {
        return false;
    }
    k.direct.backward_rows(
        {in(dy), in(x), in(w), out_of(dx), s, rows, lanes, stream, far, center, sums, mean_g, mean_g_xhat});
    return true;
}

template <class X>
bool backward_of_block(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx,
                       const TileStatistics<Compute<X>>& s, index_t rows, index_t lanes, Gradients to, bool stream) {
    if (s.scale || !contiguous<X>(dy, lanes) || !contiguous<X>(x, lanes) || !contiguous<X>(dx, lanes) ||
        !contiguous<Compute<X>>(w, lanes)) {
        return false;
    }
    k.direct.backward_of_block(in(dy), in(x), in(w), out_of(dx), s, rows, lanes, to, stream);
    return true;
}

template <class X>
index_t backward_in_eights(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx, index_t rows,
                           index_t lanes, const double* mean, const double* rstd, DownSums sums, bool stream,
                           bool far) {
    using T = Compute<X>;
    if (w.p == one<T>().p) w.lane = sizeof(T);
    if (lanes > kMostOfEight / 2 || !contiguous<X>(dy, lanes) || !contiguous<X>(x, lanes) ||
        !contiguous<X>(dx, lanes) || !contiguous<T>(w, lanes)) {
        return 0;
    }
    return k.direct.backward_in_eights({in(dy), in(x), in(w), out_of(dx), rows, lanes, stream, far, mean, rstd, sums});
}

// `sums_along` through buffers, in a function of its own: they are much of what a call takes of the stack.
template <class X>
__attribute__((noinline)) Sums sums_of_gathered(const KernelPair<X>& k, const Strided& dy, const Strided& x,
                                                const Strided& w, const TileStatistics<Compute<X>>& s, index_t rows,
                                                index_t lanes, bool far) {
    using T = Compute<X>;
    Sums sums;
    T pw[kLeafLanes];
    gather(k.isa, w, rows, lanes, pw);
    if (!s.scale && contiguous<X>(dy, lanes) && contiguous<X>(x, lanes)) {
        const SumSeries one{in(dy), in(x), packed(pw, lanes), rows, lanes, 0, 0, 1};
        k.direct.sums_along[1](&one, 1, s, far, &sums);
        return sums;
    }
    with_buffers(k, s.scale, [&](const auto& kernels) {
        using E = typename std::decay_t<decltype(kernels)>::Element;
        E pdy[kLeafLanes], px[kLeafLanes];
        gather(k.isa, dy, rows, lanes, pdy);
        gather(k.isa, x, rows, lanes, px);
        if constexpr (std::is_same_v<E, T>) multiply(s, rows, lanes, px);
        const SumSeries one{packed(pdy, lanes), packed(px, lanes), packed(pw, lanes), rows, lanes, 0, 0, 1};
        kernels.sums_along[1](&one, 1, s, false, &sums);
    });
    return sums;
}

template <class X>
Sums sums_along(const KernelPair<X>& k, Strided dy, Strided x, Strided w, const TileStatistics<Compute<X>>& s,
                index_t rows, index_t lanes, bool far) {
    using T = Compute<X>;
    if (s.scale || !contiguous<X>(dy, lanes) || !contiguous<X>(x, lanes) ||
        !(per_row<T>(w, lanes) || contiguous<T>(w, lanes))) {
        return sums_of_gathered(k, dy, x, w, s, rows, lanes, far);
    }
    Sums sums;
    const SumSeries one{in(dy), in(x), in(w), rows, lanes, 0, 0, 1};
    k.direct.sums_along[!per_row<T>(w, lanes)](&one, 1, s, far, &sums);
    return sums;
}

template <class X>
void sums_of_rows(const KernelPair<X>& k, Strided dy, Strided x, Strided w, const TileStatistics<Compute<X>>& s,
                  index_t leaves, index_t lanes, bool far, Sums* out) {
    using T = Compute<X>;
    if (!s.scale && contiguous<X>(dy, lanes) && contiguous<X>(x, lanes) &&
        (per_row<T>(w, lanes) || contiguous<T>(w, lanes))) {
        const SumSeries all{in(dy), in(x), in(w), 1, lanes, dy.row, x.row, leaves, 0, s.row};
        k.direct.sums_along[!per_row<T>(w, lanes)](&all, 1, s, far, out);
        return;
    }
    for (index_t i = 0; i < leaves; ++i) {
        TileStatistics<T> one = shifted(s, i, 0);
        one.row = 0;
        out[i] = sums_along(k, shifted(dy, i, 0), shifted(x, i, 0), w, one, 1, lanes, far);
    }
}

template <class X>
void sums_across(const KernelPair<X>& k, const Strided& dy, const Strided& x, const TileStatistics<Compute<X>>& s,
                 index_t rows, index_t lanes, Sums* out) {
    using T = Compute<X>;
    if (!s.scale && contiguous<X>(dy, lanes) && contiguous<X>(x, lanes)) {
        k.direct.sums_across(in(dy), in(x), s, rows, lanes, out);
        return;
    }
    with_buffers(k, s.scale, [&](const auto& kernels) {
        using E = typename std::decay_t<decltype(kernels)>::Element;
        constexpr index_t kMost = 2 * kLeafLanes;
        E pdy[kMost], px[kMost];
        const index_t some = kMost / lanes;
        for (index_t r = 0; r < rows; r += some) {
            const index_t n = rows - r < some ? rows - r : some;
            gather(k.isa, shifted(dy, r, 0), n, lanes, pdy);
            gather(k.isa, shifted(x, r, 0), n, lanes, px);
            if constexpr (std::is_same_v<E, T>) multiply(s, n, lanes, px);
            kernels.sums_across(packed(pdy, lanes), packed(px, lanes), s, n, lanes, out + r);
        }
    });
}

template <class X>
void moments_along(const KernelPair<X>& k, const LeafSeries* series, index_t n, index_t lane, bool center, bool far,
                   Moments* out, Unwritten<X>* beside) {
    if (lane == index_t{sizeof(X)}) {
        if (beside) {
            k.direct.moments_beside[beside->w_lane](series, n, center, out, *beside);
        } else {
            k.direct.moments_along(series, n, center, far, out);
        }
        return;
    }
    X px[kLeafLanes];
    for (const LeafSeries* s = series; s < series + n; ++s) {
        LeafSeries one{packed(px, s->lanes), s->origin, s->rows, s->lanes, 0, 1};
        Strided x{s->x.p, s->x.row, lane, kDtype<X>};
        for (index_t i = 0; i < s->leaves; ++i, x.p += s->leaf, one.origin.p += s->origin.row) {
            gather(k.isa, x, s->rows, s->lanes, px);
            k.direct.moments_along(&one, 1, center, false, out++);
        }
    }
}

template <class X>
bool to_write_beside(const ApplyTo<X>& t, Unwritten<X>* out) {
    using T = Compute<X>;
    if (t.s.lane || !contiguous<X>(t.x, t.lanes) || !contiguous<X>(t.y, t.lanes)) return false;
    *out = {in(t.x), out_of(t.y), in(t.w), in(t.b), t.s, t.rows, t.lanes, t.stream, t.far, t.beyond_l3, t.lines};
    if (t.dy.p) {
        out->dy = in(t.dy);
        return contiguous<X>(t.dy, t.lanes) && per_row<T>(t.w, t.lanes);
    }
    if (per_row<T>(t.w, t.lanes) && per_row<T>(t.b, t.lanes)) return true;
    out->w_lane = true;
    out->w_constant = t.w.p == one<T>().p;
    out->b_constant = t.b.p == zero<T>().p;
    return (out->w_constant || contiguous<T>(t.w, t.lanes)) && (out->b_constant || contiguous<T>(t.b, t.lanes));
}

template <class X>
void write_rest(const KernelPair<X>& k, const ApplyTo<X>& t, Unwritten<X>* written) {
    const auto write = [&](index_t rows, index_t lane) {
        const index_t r = written->row, lanes = t.lanes - lane;
        const auto from_here = [=](const Strided& a) { return shifted(a, r, lane); };
        const Strided x = from_here(t.x), y = from_here(t.y), w = from_here(t.w);
        const TileStatistics<Compute<X>> s = shifted(t.s, r, lane);
        if (t.dy.p) {
            backward(k, from_here(t.dy), x, w, y, s, rows, lanes, {}, t.stream);
        } else {
            apply(k, x, y, w, from_here(t.b), s, rows, lanes, t.stream);
        }
        written->row += rows;
    };
    if (written->lane > 0 && !written->done()) write(1, written->lane);
    if (!written->done()) write(written->rows - written->row, 0);
}

template <class X>
void moments_down(const KernelPair<X>& k, Strided x, const Compute<X>* origin, index_t rows, index_t lanes,
                  index_t seen, bool center, bool far, double* mean, double* M2) {
    if (contiguous<X>(x, lanes)) {
        k.direct.moments_down(in(x), origin, rows, lanes, seen, center, far, mean, M2);
        return;
    }
    X px[kLeafRows * kPatchLanes];
    for (index_t r = 0; r < rows; r += kLeafRows) {
        const index_t n_rows = rows - r < kLeafRows ? rows - r : kLeafRows;
        for (index_t l = 0; l < lanes; l += kPatchLanes) {
            const index_t n = lanes - l < kPatchLanes ? lanes - l : kPatchLanes;
            gather(k.isa, shifted(x, r, l), n_rows, n, px);
            k.direct.moments_down(packed(px, n), origin ? origin + l : origin, n_rows, n, seen + r, center, false,
                                  mean + l, M2 + l);
        }
    }
}

template Strided one<float>();
template Strided one<double>();
template Strided zero<float>();
template Strided zero<double>();

#define NORMKIT_INSTANTIATE(name, X, T)                                                                                \
    template void gather<X>(const Isa&, const Strided&, index_t, index_t, X*);                                         \
    template void gather<X>(const Isa&, const Nest&, Operand, const char*, Dtype, index_t, index_t, X*);               \
    template void apply<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided, const TileStatistics<T>&,         \
                           index_t, index_t, bool);                                                                    \
    template void backward<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided, const TileStatistics<T>&,      \
                              index_t, index_t, DownSums, bool);                                                       \
    template Sums sums_along<X>(const KernelPair<X>&, Strided, Strided, Strided, const TileStatistics<T>&, index_t,    \
                                index_t, bool);                                                                        \
    template void sums_of_rows<X>(const KernelPair<X>&, Strided, Strided, Strided, const TileStatistics<T>&, index_t,  \
                                  index_t, bool, Sums*);                                                               \
    template void sums_across<X>(const KernelPair<X>&, const Strided&, const Strided&, const TileStatistics<T>&,       \
                                 index_t, index_t, Sums*);                                                             \
    template void moments_along<X>(const KernelPair<X>&, const LeafSeries*, index_t, index_t, bool, bool, Moments*,    \
                                   Unwritten<X>*);                                                                     \
    template bool to_write_beside<X>(const ApplyTo<X>&, Unwritten<X>*);                                                \
    template void write_rest<X>(const KernelPair<X>&, const ApplyTo<X>&, Unwritten<X>*);                               \
    template index_t forward_in_eights<X>(const KernelPair<X>&, const ApplyTo<X>&, bool, double, double*, double*,     \
                                          double*);                                                                    \
    template bool backward_rows<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided, const TileStatistics<T>&, \
                                   index_t, index_t, DownSums, bool, bool, bool, T*, T*);                              \
    template bool backward_of_block<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided,                       \
                                       const TileStatistics<T>&, index_t, index_t, Gradients, bool);                   \
    template index_t backward_in_eights<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided, index_t, index_t, \
                                           const double*, const double*, DownSums, bool, bool);                        \
    template void moments_down<X>(const KernelPair<X>&, Strided, const T*, index_t, index_t, index_t, bool, bool,      \
                                  double*, double*);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
