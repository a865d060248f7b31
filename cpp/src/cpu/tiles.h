// Tiles with any strides, brought before the kernels. A kernel wants contiguous lanes, and w and b that are both one a
// row or both one a lane. Where an operand is not like that, or a set has to be scaled, the tile goes through buffers
// in L1, a patch at a time; the bits are the same. Nothing is ever copied as a whole.
#pragma once

#include "../nest.h"
#include "kernels.h"

namespace normkit::cpu {

// Rows of any strides, in bytes.
struct Strided {
    const char* p = nullptr;
    index_t row = 0, lane = 0;

    const char* at(index_t r, index_t l) const { return p + r * row + l * lane; }
};

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

template <class T>
using ApplyKernel = void (*const)(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes, bool stream);

// kernel: k.apply_along (s.lane = 0) or k.apply_down (s.lane = 1).
template <class T>
void apply(ApplyKernel<T> (&kernel)[2], Strided x, Strided y, Strided w, Strided b, const TileStatistics<T>& s,
           index_t rows, index_t lanes, bool stream);

// dx, the sums down each lane, or both: k.dx_along where only dx is wanted and the statistics are one a row, else
// k.backward_down. dx.p or sum_g may be null.
template <class T>
void backward(const Kernels<T>& k, Strided dy, Strided x, Strided w, Strided dx, const TileStatistics<T>& s,
              index_t rows, index_t lanes, double* sum_g, double* sum_g_xhat, bool stream);

// One leaf of one set: s.row = s.lane = 0.
template <class T>
Sums sums_along(const Kernels<T>& k, Strided dy, Strided x, Strided w, const TileStatistics<T>& s, index_t rows,
                index_t lanes);

// The same for `leaves` sets that are one run each: rows of dy and x, and number i * s.row of the statistics.
template <class T>
void sums_of_rows(const Kernels<T>& k, Strided dy, Strided x, Strided w, const TileStatistics<T>& s, index_t leaves,
                  index_t lanes, Sums* out);

// `leaves` leaves of one shape, `leaf` bytes apart.
template <class T>
void moments_along(const Kernels<T>& k, Strided x, index_t rows, index_t lanes, index_t leaf, index_t leaves,
                   bool center, Moments* out);

// As the kernel.
template <class T>
void moments_down(const Kernels<T>& k, Strided x, index_t rows, index_t lanes, index_t seen, bool center, double* mean,
                  double* m2);

// Copies a tile into rows of `lanes` elements.
template <class T>
void gather(Strided from, index_t rows, index_t lanes, T* out);

}  // namespace normkit::cpu
