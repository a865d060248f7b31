// Elements from one dtype to another, and copies. Part of kernels.cpp.
#pragma once

#include <cstdint>

#include "kernels_stores.h"

namespace {

template <class X>
void widen(const char* from, index_t n, Compute<X>* to) {
    for_vectors<X>(n, 0, [=](index_t i, int count) NK_INLINE_LAMBDA {
        put<Compute<X>, false>(reinterpret_cast<char*>(to + i), load_rest<X>(from + bytes<X>(i), count), count);
    });
}

template <class T, bool Stream>
NK_INLINE void narrow_all(const double* from, index_t n, char* to) {
    constexpr int W = kWidth<double>;
    for_vectors<T>(n, Stream ? head_of_row<T>(to, n) : 0, [=](index_t i, int count) NK_INLINE_LAMBDA {
        Widened<T> wide;
#pragma GCC unroll 2
        for (int j = 0; j < Widened<T>::kVectors; ++j) {
            const int left = count - j * W;
            const char* const p = reinterpret_cast<const char*>(from + i + j * W);
            wide.v[j] = left > 0 ? load_rest<double>(p, left) : Vec<double>{};
        }
        put<T, Stream>(to + bytes<T>(i), narrowed<T>(wide), count);
    });
}

template <class X>
NK_INLINE void narrow_to_16_bits(const double* from, index_t n, char* to) {
    for_vectors<double>(n, 0, [=](index_t i, int count) NK_INLINE_LAMBDA {
        const char* const p = reinterpret_cast<const char*>(from + i);
        const Narrow v = rounded_to_16_bits<X>(load_rest<double>(p, count));
        if (count == kWidth<double>) {
            __builtin_memcpy(to + bytes<X>(i), &v, sizeof v);
        } else {
            for (int lane = 0; lane < count; ++lane) {
                const std::uint16_t one = v[lane];
                __builtin_memcpy(to + bytes<X>(i + lane), &one, sizeof one);
            }
        }
    });
}

template <class X>
void narrow(const double* from, index_t n, char* to, bool stream) {
    if constexpr (sizeof(X) == sizeof(Narrow{}[0])) {
        narrow_to_16_bits<X>(from, n, to);  // too few bytes for stores past the caches to matter
    } else if (stream && reinterpret_cast<std::uintptr_t>(to) % sizeof(X) == 0) {
        narrow_all<X, true>(from, n, to);
    } else {
        narrow_all<X, false>(from, n, to);
    }
}

template <class X, bool Stream>
NK_INLINE void copy_rows(In x, Out y, index_t rows, index_t lanes) {
    for (index_t r = 0; r < rows; ++r) {
        const char* px = x.at(r);
        char* py = y.at(r);
        for_vectors<X>(lanes, Stream ? head_of_row<X>(py, lanes) : 0, [=](index_t lane, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            put<X, Stream>(py + o, load_rest<X>(px + o, n), n);
        });
    }
}

template <class X>
void copy(In x, Out y, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<X>(y, lanes)) {
        copy_rows<X, true>(x, y, rows, lanes);
    } else {
        copy_rows<X, false>(x, y, rows, lanes);
    }
}

}  // namespace
