#include "tiles.h"

#include <cstring>
#include <type_traits>

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

template <class X>
void scatter(const Compute<X>* from, index_t rows, index_t lanes, Strided to) {
    for (index_t r = 0; r < rows; ++r) {
        for (index_t l = 0; l < lanes; ++l) {
            X v;
            from_double(to_double(from[r * lanes + l]), &v);
            std::memcpy(const_cast<char*>(to.at(r, l)), &v, sizeof v);
        }
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
void gather(Strided from, index_t rows, index_t lanes, E* to) {
    with_dtype(from.dtype, [&](auto element) {
        using X = decltype(element);
        for (index_t r = 0; r < rows; ++r, to += lanes) {
            if constexpr (std::is_same_v<X, E>) {
                if (from.lane == static_cast<index_t>(sizeof(E))) {
                    std::memcpy(to, from.at(r, 0), lanes * sizeof(E));
                    continue;
                }
                for (index_t l = 0; l < lanes; ++l) to[l] = read<E>(from.at(r, l));
            } else if constexpr (std::is_floating_point_v<E>) {
                for (index_t l = 0; l < lanes; ++l) to[l] = static_cast<E>(to_double(read<X>(from.at(r, l))));
            }
        }
    });
}

template <class T>
void fetch(const Isa& isa, Strided from, index_t rows, index_t lanes, T* to) {
    const bool by_kernel = with_dtype(from.dtype, [&](auto element) {
        using X = decltype(element);
        if (std::is_same_v<X, T> || from.lane != index_t{sizeof(X)}) return false;
        for (index_t r = 0; r < rows; ++r, to += lanes) {
            if constexpr (std::is_same_v<X, double>) {
                kernels_of<T>(isa).narrow(reinterpret_cast<const double*>(from.at(r, 0)), lanes,
                                          reinterpret_cast<char*>(to), false);
            } else if constexpr (std::is_same_v<T, Compute<X>>) {
                kernels_of<X>(isa).widen(from.at(r, 0), lanes, to);
            } else {
                gather({from.at(r, 0), 0, from.lane, from.dtype}, 1, lanes, to);
            }
        }
        return true;
    });
    if (!by_kernel) gather(from, rows, lanes, to);
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
        fetch(isa, shifted(from, 0, l), 1, n, to);
        return {reinterpret_cast<const char*>(to), 0, sizeof(T), kDtype<T>};
    };
    for (index_t l = 0; l < lanes; l += kMost) {
        const index_t n = lanes - l < kMost ? lanes - l : kMost;
        f(l, n, fetched(w, l, n, pw), fetched(b, l, n, pb));
    }
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
    // Parameters that are one a row are gathered as such.
    const bool one_a_row = lanes == 1 || (w.lane == 0 && b.lane == 0);
    const auto& packed_kernel = (s.lane ? k.packed.apply_down : k.packed.apply_along)[!one_a_row];
    for_patches(rows, lanes, [&](index_t r, index_t l, index_t n_rows, index_t n) {
        Patch<T> px, py, pw, pb;
        const TileStatistics<T> ps = shifted(s, r, l);
        const index_t n_of_row = one_a_row ? 1 : n;
        fetch(k.isa, shifted(x, r, l), n_rows, n, px);
        multiply(ps, n_rows, n, px);
        fetch(k.isa, shifted(w, r, l), n_rows, n_of_row, pw);
        fetch(k.isa, shifted(b, r, l), n_rows, n_of_row, pb);
        packed_kernel(packed(px, n), {reinterpret_cast<char*>(py), n * static_cast<index_t>(sizeof(T))},
                      packed(pw, n_of_row), packed(pb, n_of_row), ps, n_rows, n, false);
        scatter<X>(py, n_rows, n, shifted(y, r, l));
    });
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
    for_patches(rows, lanes, [&](index_t r, index_t l, index_t n_rows, index_t n) {
        Patch<T> pdy, px, pw, pdx;
        const TileStatistics<T> ps = shifted(s, r, l);
        fetch(k.isa, shifted(dy, r, l), n_rows, n, pdy);
        fetch(k.isa, shifted(x, r, l), n_rows, n, px);
        multiply(ps, n_rows, n, px);
        fetch(k.isa, shifted(w, r, l), n_rows, n, pw);
        const Out to = {dx.p ? reinterpret_cast<char*>(pdx) : nullptr, n * static_cast<index_t>(sizeof(T))};
        k.packed.backward_down[s.lane][1](packed(pdy, n), packed(px, n), packed(pw, n), to, ps, n_rows, n, sums.at(l),
                                          false);
        if (!dx.p) return;
        multiply(ps, n_rows, n, pdx);
        scatter<X>(pdx, n_rows, n, shifted(dx, r, l));
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
    T pdy[kLeafLanes], px[kLeafLanes], pw[kLeafLanes];
    fetch(k.isa, w, rows, lanes, pw);
    if (!s.scale && contiguous<X>(dy, lanes) && contiguous<X>(x, lanes)) {
        const SumSeries one{in(dy), in(x), packed(pw, lanes), rows, lanes, 0, 0, 1};
        k.direct.sums_along[1](&one, 1, s, far, &sums);
        return sums;
    }
    fetch(k.isa, dy, rows, lanes, pdy);
    fetch(k.isa, x, rows, lanes, px);
    multiply(s, rows, lanes, px);
    const SumSeries one{packed(pdy, lanes), packed(px, lanes), packed(pw, lanes), rows, lanes, 0, 0, 1};
    k.packed.sums_along[1](&one, 1, s, false, &sums);
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
    Compute<X> px[kLeafLanes];
    for (const LeafSeries* s = series; s < series + n; ++s) {
        LeafSeries one{packed(px, s->lanes), s->origin, s->rows, s->lanes, 0, 1};
        Strided x{s->x.p, s->x.row, lane, kDtype<X>};
        for (index_t i = 0; i < s->leaves; ++i, x.p += s->leaf, one.origin.p += s->origin.row) {
            fetch(k.isa, x, s->rows, s->lanes, px);
            k.packed.moments_along(&one, 1, center, false, out++);
        }
    }
}

template <class X>
bool to_write_beside(const ApplyTo<X>& t, Unwritten<X>* out) {
    using T = Compute<X>;
    if (t.s.lane || !contiguous<X>(t.x, t.lanes) || !contiguous<X>(t.y, t.lanes)) return false;
    *out = {in(t.x), out_of(t.y), in(t.w), in(t.b), t.s, t.rows, t.lanes, t.stream, t.far, t.beyond_l3, t.lines};
    if (per_row<T>(t.w, t.lanes) && per_row<T>(t.b, t.lanes)) return true;
    out->w_lane = true;
    out->w_constant = t.w.p == one<T>().p;
    out->b_constant = t.b.p == zero<T>().p;
    return (out->w_constant || contiguous<T>(t.w, t.lanes)) && (out->b_constant || contiguous<T>(t.b, t.lanes));
}

template <class X>
void write_rest(const KernelPair<X>& k, const ApplyTo<X>& t, Unwritten<X>* written) {
    const auto write = [&](index_t rows, index_t lane) {
        const index_t r = written->row;
        apply(k, shifted(t.x, r, lane), shifted(t.y, r, lane), shifted(t.w, r, lane), shifted(t.b, r, lane),
              shifted(t.s, r, lane), rows, t.lanes - lane, t.stream);
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
    Compute<X> px[kLeafRows * kPatchLanes];
    for (index_t r = 0; r < rows; r += kLeafRows) {
        const index_t n_rows = rows - r < kLeafRows ? rows - r : kLeafRows;
        for (index_t l = 0; l < lanes; l += kPatchLanes) {
            const index_t n = lanes - l < kPatchLanes ? lanes - l : kPatchLanes;
            fetch(k.isa, shifted(x, r, l), n_rows, n, px);
            k.packed.moments_down(packed(px, n), origin ? origin + l : origin, n_rows, n, seen + r, center, false,
                                  mean + l, M2 + l);
        }
    }
}

template Strided one<float>();
template Strided one<double>();
template Strided zero<float>();
template Strided zero<double>();

#define NORMKIT_INSTANTIATE(name, X, T)                                                                                \
    template void gather<X>(Strided, index_t, index_t, X*);                                                            \
    template void apply<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided, const TileStatistics<T>&,         \
                           index_t, index_t, bool);                                                                    \
    template void backward<X>(const KernelPair<X>&, Strided, Strided, Strided, Strided, const TileStatistics<T>&,      \
                              index_t, index_t, DownSums, bool);                                                       \
    template Sums sums_along<X>(const KernelPair<X>&, Strided, Strided, Strided, const TileStatistics<T>&, index_t,    \
                                index_t, bool);                                                                        \
    template void sums_of_rows<X>(const KernelPair<X>&, Strided, Strided, Strided, const TileStatistics<T>&, index_t,  \
                                  index_t, bool, Sums*);                                                               \
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
template void fetch<float>(const Isa&, Strided, index_t, index_t, float*);
template void fetch<double>(const Isa&, Strided, index_t, index_t, double*);

}  // namespace normkit::cpu
