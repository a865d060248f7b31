// Tiles with any strides, brought before the kernels. A kernel wants contiguous lanes, and w and b that are both one a
// row or both one a lane, and of the type of arithmetic. Where an operand is not like that, or a set has to be scaled,
// the tile goes through buffers in L1, a patch at a time; the bits are the same. So do w and b alone, if nothing else
// is in the way. Nothing is ever copied as a whole.
#pragma once

#include "../nest.h"
#include "kernels.h"

namespace normkit::cpu {

// Rows of any strides, in bytes.
struct Strided {
    const char* p = nullptr;
    index_t row = 0, lane = 0;
    Dtype dtype = Dtype::none;

    const char* at(index_t r, index_t l) const { return p + r * row + l * lane; }
};

// Rows of `lanes` elements without gaps.
template <class E>
Strided packed_tile(const E* p, index_t lanes) {
    return {reinterpret_cast<const char*>(p), lanes * index_t{sizeof(E)}, sizeof(E), kDtype<E>};
}

// The statistics of a tile, with their distance from row to row and from lane to lane (0 or 1, in elements).
template <class T>
struct TileStatistics : Statistics<T> {
    const T* scale = nullptr;  // null: no set of the tile is scaled
    index_t lane = 0;
};

// An operand that is not there: a constant, as Strided of strides 0.
template <class T>
Strided one();
template <class T>
Strided zero();

// A tile to be written: the arguments of `apply`, or, if there is a dy, of `backward` (dx to y).
template <class X>
struct ApplyTo {
    Strided x, y, w, b;
    TileStatistics<Compute<X>> s;
    index_t rows = 0, lanes = 0;
    bool stream = false, far = false, beyond_l3 = false, lines = false;  // as in Unwritten
    Strided dy{};
};

// The kernels for elements as they lie in memory, and for buffers of scaled sets, which are of the type of arithmetic.
template <class X>
struct KernelPair {
    const Kernels<X>& direct;
    const Kernels<Compute<X>>& packed;
    const Isa& isa;  // of both: workers are not told what the calling thread forces
};

// k.apply_along where the statistics are one a row (s.lane = 0), k.apply_down where they are one a lane (1).
template <class X>
void apply(const KernelPair<X>& k, Strided x, Strided y, Strided w, Strided b, const TileStatistics<Compute<X>>& s,
           index_t rows, index_t lanes, bool stream);

template <class X>
void apply(const KernelPair<X>& k, const ApplyTo<X>& t) {
    apply(k, t.x, t.y, t.w, t.b, t.s, t.rows, t.lanes, t.stream);
}

// dx, the sums down each lane, or both: k.dx_along where only dx is wanted and the statistics are one a row, else
// k.backward_down. dx.p may be null.
template <class X>
void backward(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx, const TileStatistics<Compute<X>>& s,
              index_t rows, index_t lanes, DownSums sums, bool stream);

// The kernels on rows as they lie; they return how many have been done, 0 where they can't. Forward, t.s is what they
// find out.
template <class X>
index_t forward_in_eights(const KernelPair<X>& k, const ApplyTo<X>& t, bool center, double eps, double* mean,
                          double* rstd, double* M2);
template <class X>
index_t backward_in_eights(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx, index_t rows,
                           index_t lanes, const double* mean, const double* rstd, DownSums sums, bool stream, bool far);

// k.backward_rows on rows as they lie. False, and nothing done, where the kernels can't.
template <class X>
bool backward_rows(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx,
                   const TileStatistics<Compute<X>>& s, index_t rows, index_t lanes, DownSums sums, bool stream,
                   bool far, bool center, Compute<X>* mean_g, Compute<X>* mean_g_xhat);

// k.backward_of_block likewise.
template <class X>
bool backward_of_block(const KernelPair<X>& k, Strided dy, Strided x, Strided w, Strided dx,
                       const TileStatistics<Compute<X>>& s, index_t rows, index_t lanes, Gradients to, bool stream);

// One leaf of one set: s.row = s.lane = 0.
template <class X>
Sums sums_along(const KernelPair<X>& k, Strided dy, Strided x, Strided w, const TileStatistics<Compute<X>>& s,
                index_t rows, index_t lanes, bool far);

// The same for `leaves` sets that are one run each: rows of dy and x, and number i * s.row of the statistics.
template <class X>
void sums_of_rows(const KernelPair<X>& k, Strided dy, Strided x, Strided w, const TileStatistics<Compute<X>>& s,
                  index_t leaves, index_t lanes, bool far, Sums* out);

// As the kernel.
template <class X>
void sums_across(const KernelPair<X>& k, const Strided& dy, const Strided& x, const TileStatistics<Compute<X>>& s,
                 index_t rows, index_t lanes, Sums* out);

// As the kernels, of lanes that lie `lane` bytes apart. beside: a tile to be written meanwhile.
template <class X>
void moments_along(const KernelPair<X>& k, const LeafSeries* series, index_t n, index_t lane, bool center, bool far,
                   Moments* out, Unwritten<X>* beside = nullptr);

// As the kernels, of elements that they can read as they lie and sets that are not scaled; w is one a row.
// beside: a tile of dx to be written meanwhile.
template <class X>
void sums_along(const KernelPair<X>& k, const SumSeries* series, index_t n, const Statistics<Compute<X>>& s, bool far,
                Sums* out, Unwritten<X>* beside = nullptr) {
    if (beside) {
        k.direct.sums_beside(series, n, s, out, *beside);
    } else {
        k.direct.sums_along[0](series, n, s, far, out);
    }
}

// A tile that kernels can write as it lies, unless a set is scaled: to `out`. False where it is not like that.
template <class X>
bool to_write_beside(const ApplyTo<X>& tile, Unwritten<X>* out);

// What `written` has left of the tile that it was made of.
template <class X>
void write_rest(const KernelPair<X>& k, const ApplyTo<X>& tile, Unwritten<X>* written);

// As the kernel.
template <class X>
void moments_down(const KernelPair<X>& k, Strided x, const Compute<X>* origin, index_t rows, index_t lanes,
                  index_t seen, bool center, bool far, double* mean, double* M2);

// Copies a tile into rows of `lanes` elements: as they are (E: the element type of `from`), or converted (E: a type of
// arithmetic), by kernels but for parameters of float64 data.
template <class E>
void gather(const Isa& isa, const Strided& from, index_t rows, index_t lanes, E* out);

// The same for elements [first, first + n) of an operand that a nest describes, in its order.
template <class E>
void gather(const Isa& isa, const Nest& nest, Operand o, const char* base, Dtype dtype, index_t first, index_t n,
            E* out);

}  // namespace normkit::cpu
