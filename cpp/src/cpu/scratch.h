// Scratch memory of a call: taken before the first result is written, so that running out of it changes nothing.
#pragma once

#include <algorithm>
#include <memory>
#include <new>
#include <type_traits>

#include "../formula.h"
#include "tiles.h"

namespace normkit::cpu {

// Cache-line aligned, uninitialized.
template <class E>
class Buffer {
  public:
    Buffer() = default;
    explicit Buffer(index_t n)
        : data_(n > 0 ? static_cast<E*>(::operator new(n * sizeof(E), std::align_val_t{64})) : nullptr) {}
    E* get() const { return data_.get(); }
    E& operator[](index_t i) const { return data_.get()[i]; }

  private:
    struct Free {
        void operator()(E* p) const { ::operator delete(p, std::align_val_t{64}); }
    };
    std::unique_ptr<E, Free> data_;
};

// An array on the stack, uninitialized. Where results go past the caches, ordinary stores wait behind them: clearing
// 1.5 KiB for every five rows of rms norm 4096 x 768 took 1.25 times as long (one thread of a Zen 5).
template <class E, index_t n>
class Room {
  public:
    E* get() { return std::launder(reinterpret_cast<E*>(bytes_)); }
    E& operator[](index_t i) { return get()[i]; }

  private:
    static_assert(std::is_trivially_copyable_v<E> && std::is_aggregate_v<E>, "objects that begin with their values");
    alignas(E) unsigned char bytes_[n * sizeof(E)];
};

// The statistics of a range of sets as kernels read them: six arrays of the same length, filled set by set.
template <class T>
class SetStatistics {
  public:
    SetStatistics(T* storage, index_t sets) : p_(storage), sets_(sets) {}
    static constexpr index_t kArrays = 6;

    // n entries alike.
    void put(index_t first, const Statistic& statistic, index_t n = 1) {
        const Split<T> s = split<T>(statistic);
        std::fill_n(hi() + first, n, s.hi);
        std::fill_n(lo() + first, n, s.lo);
        std::fill_n(this->rstd() + first, n, s.rstd);
        std::fill_n(scale() + first, n, s.scale);
    }
    // Sets first, first + 1, ... of n, from mean (null: 0) and rstd, each a double and `step` of them apart. Compilers
    // make vectors of the loops.
    void put(index_t first, index_t n, const double* mean, const double* rstd, index_t step) {
        double plain = step == 1;  // not bool: finish_sets
        for (index_t i = 0; i < n; ++i) plain = is_unscaled<T>(rstd[i * step]) ? plain : 0;
        if (plain == 0) {
            for (index_t i = 0; i < n; ++i) put(first + i, Statistic{mean ? mean[i * step] : 0, 0, rstd[i * step]});
            return;
        }
        T *const h = hi() + first, *const l = lo() + first, *const r = this->rstd() + first;
        std::fill_n(scale() + first, n, T{1});
        for (index_t i = 0; i < n; ++i) r[i] = static_cast<T>(rstd[i]);
        if (!mean) {
            std::fill_n(h, n, T{0});
            std::fill_n(l, n, T{0});
            return;
        }
        for (index_t i = 0; i < n; ++i) {
            const T rounded = static_cast<T>(mean[i]);
            h[i] = rounded + 0;
            l[i] = static_cast<T>(mean[i] - static_cast<double>(rounded)) + 0;
        }
    }
    void put_sums(index_t first, double mean_g, double mean_g_xhat, index_t n = 1) {
        std::fill_n(this->mean_g() + first, n, static_cast<T>(mean_g));
        std::fill_n(this->mean_g_xhat() + first, n, static_cast<T>(mean_g_xhat));
    }
    T* mean_g() const { return p_ + 4 * sets_; }
    T* mean_g_xhat() const { return p_ + 5 * sets_; }

    // For a tile that begins with `set`; `row` and `lane`: how the set number goes on; `sets`: how many sets it has.
    TileStatistics<T> tile(index_t set, index_t row, index_t lane, index_t sets) const {
        TileStatistics<T> s;
        s.hi = hi() + set;
        s.lo = lo() + set;
        s.rstd = rstd() + set;
        s.mean_g = mean_g() + set;
        s.mean_g_xhat = mean_g_xhat() + set;
        s.row = row;
        s.lane = lane;
        const T* const p = scale() + set;
        const index_t step = row + lane;
        int scaled = 0;  // not bool: compilers make a vector of the sum, and there are many tiles of many sets
        for (index_t i = 0; i < sets; ++i) scaled += p[i * step] != 1;
        if (scaled) s.scale = p;
        return s;
    }

  private:
    T* hi() const { return p_; }
    T* lo() const { return p_ + sets_; }
    T* rstd() const { return p_ + 2 * sets_; }
    T* scale() const { return p_ + 3 * sets_; }
    T* p_;
    index_t sets_;
};

// Moments of x * scale in double, for sets that the kernels can't do. The scale, a power of two, brings the largest
// magnitude to about 1 where the data is float64; no other number is so large or small that a double could overflow or
// lose its square, and the scale is 1. The mean is less the origin, the first element. `set`: the axes of the set.
struct ScaledMoments {
    Moments moments;
    double origin = 0;
    double scale = 1;
};
template <class X>
ScaledMoments moments_in_double(const Nest& set, const char* x, bool center);

}  // namespace normkit::cpu
