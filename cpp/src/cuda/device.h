// What kernels are written in: qualifiers, vectors of 16 bytes, conversions in registers, exchange between the lanes of
// a warp. Kernels are headers, and where no CUDA compiler reads them the tests put an emulator in the place of the
// machine (cpp/tests/cuda_emulator.h), which runs every thread of a block on the host.
#pragma once

#include "leaf.h"

#if defined(__CUDACC__)

#define NK_DEVICE __device__ __forceinline__
// `blocks` of a multiprocessor, at least, say how many registers a thread may have. Left to itself ptxas would spill a
// few for one block more, or take so many that only one fits.
#define NK_KERNEL(threads, blocks) __global__ __launch_bounds__(threads, blocks)
#define NK_WORK(Type) const __grid_constant__ Type

namespace normkit::cuda {

NK_DEVICE float as_float(unsigned bits) { return __uint_as_float(bits); }
NK_DEVICE unsigned as_bits(float v) { return __float_as_uint(v); }
NK_DEVICE double as_double(unsigned low, unsigned high) { return __hiloint2double(high, low); }
NK_DEVICE unsigned low_bits(double v) { return __double2loint(v); }
NK_DEVICE unsigned high_bits(double v) { return __double2hiint(v); }

NK_DEVICE float float_of_half(unsigned bits) {
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(static_cast<unsigned short>(bits)));
    return v;
}
NK_DEVICE unsigned half_of(float v) {
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
NK_DEVICE unsigned bfloat_of(float v) {
    unsigned short bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}

template <class T>
NK_DEVICE T from_lane(T v, int lane) {
    return __shfl_sync(0xffffffffu, v, lane);
}
template <class T>
NK_DEVICE T from_lane_xor(T v, int mask) {
    return __shfl_xor_sync(0xffffffffu, v, mask);
}
NK_DEVICE void warp_barrier() { __syncwarp(); }
NK_DEVICE void block_barrier() { __syncthreads(); }

// Shared memory of a block, as much as the launch asked for.
NK_DEVICE char* shared_memory() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}

}  // namespace normkit::cuda

#else
#include NORMKIT_CUDA_EMULATOR
#endif

namespace normkit::cuda {

// ------------------------------------------------------------------------------------------------- elements of a
// vector

NK_DEVICE unsigned word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }
NK_DEVICE void set_word(uint4& v, int i, unsigned bits) {
    if (i == 0) v.x = bits;
    if (i == 1) v.y = bits;
    if (i == 2) v.z = bits;
    if (i == 3) v.w = bits;
}

// Element k of a vector of X; k is known when the loop around is unrolled.
template <class X>
struct Lanes;

template <>
struct Lanes<float> {
    static NK_DEVICE float get(const uint4& v, int k) { return as_float(word(v, k)); }
    static NK_DEVICE void set(uint4& v, int k, float value) { set_word(v, k, as_bits(value)); }
    static NK_DEVICE float load(const char* p) { return *reinterpret_cast<const float*>(p); }
    static NK_DEVICE void store(char* p, float value) { *reinterpret_cast<float*>(p) = value; }
};

template <>
struct Lanes<double> {
    static NK_DEVICE double get(const uint4& v, int k) { return as_double(word(v, 2 * k), word(v, 2 * k + 1)); }
    static NK_DEVICE void set(uint4& v, int k, double value) {
        set_word(v, 2 * k, low_bits(value));
        set_word(v, 2 * k + 1, high_bits(value));
    }
    static NK_DEVICE double load(const char* p) { return *reinterpret_cast<const double*>(p); }
    static NK_DEVICE void store(char* p, double value) { *reinterpret_cast<double*>(p) = value; }
};

template <class X>
struct HalfLanes {
    static NK_DEVICE float get(const uint4& v, int k) {
        return X::widen(k % 2 == 0 ? word(v, k / 2) & 0xffffu : word(v, k / 2) >> 16);
    }
    static NK_DEVICE void set(uint4& v, int k, float value) {
        const unsigned bits = X::narrow(value), old = word(v, k / 2);
        set_word(v, k / 2, k % 2 == 0 ? (old & 0xffff0000u) | bits : (old & 0xffffu) | bits << 16);
    }
    static NK_DEVICE float load(const char* p) { return X::widen(*reinterpret_cast<const std::uint16_t*>(p)); }
    static NK_DEVICE void store(char* p, float value) {
        *reinterpret_cast<std::uint16_t*>(p) = static_cast<std::uint16_t>(X::narrow(value));
    }
};
struct OfFloat16 {
    static NK_DEVICE float widen(unsigned bits) { return float_of_half(bits); }
    static NK_DEVICE unsigned narrow(float v) { return half_of(v); }
};
struct OfBfloat16 {
    static NK_DEVICE float widen(unsigned bits) { return as_float(bits << 16); }
    static NK_DEVICE unsigned narrow(float v) { return bfloat_of(v); }
};
template <>
struct Lanes<float16> : HalfLanes<OfFloat16> {};
template <>
struct Lanes<bfloat16> : HalfLanes<OfBfloat16> {};

NK_DEVICE uint4 load_vector(const char* p) { return *reinterpret_cast<const uint4*>(p); }
NK_DEVICE void store_vector(char* p, const uint4& v) { *reinterpret_cast<uint4*>(p) = v; }

// Numbers of any dtype, for kernels that touch few of them.
NK_DEVICE double load_any(const char* p, Dtype dtype) {
    switch (dtype) {
        case Dtype::float64: return Lanes<double>::load(p);
        case Dtype::float32: return Lanes<float>::load(p);
        case Dtype::float16: return Lanes<float16>::load(p);
        default: return Lanes<bfloat16>::load(p);
    }
}
// From double at once: two roundings are not one (dtype.h).
NK_DEVICE void store_any(char* p, Dtype dtype, double v) {
    switch (dtype) {
        case Dtype::float64: Lanes<double>::store(p, v); break;
        case Dtype::float32: Lanes<float>::store(p, static_cast<float>(v)); break;
        case Dtype::float16: *reinterpret_cast<std::uint16_t*>(p) = rounded_to_16_bits<float16>(v); break;
        default: *reinterpret_cast<std::uint16_t*>(p) = rounded_to_16_bits<bfloat16>(v);
    }
}

NK_DEVICE int size_on_device(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

// ------------------------------------------------------------------------------------------------------------
// addresses

// Where element i of axis[begin, end) of an operand lies.
template <Operand o>
NK_DEVICE index_t offset_along(const Work& w, int begin, int end, index_t i) {
    index_t at = 0;
    NORMKIT_ROLLED
    for (int k = end - 1; k > begin; --k) {
        const index_t q = w.axis[k].extent.quotient(i);
        at += (i - q * w.axis[k].extent.divisor) * w.axis[k].stride[o];
        i = q;
    }
    return begin < end ? at + i * w.axis[begin].stride[o] : at;
}
template <Operand o>
NK_DEVICE index_t set_offset(const Work& w, index_t set) {
    return offset_along<o>(w, 0, w.kept, set);
}
template <Operand o>
NK_DEVICE index_t element_offset(const Work& w, index_t e) {
    return offset_along<o>(w, w.kept, w.axes, e);
}

// ----------------------------------------------------------------------------------------------------- a leaf in a
// warp

// Element number i of a lane is element element_of(...) of the leaf: packed, vectors of neighbours; else one by one.
template <class X>
NK_DEVICE int element_of(bool packed, int i, int lane) {
    constexpr int V = kVector<X>;
    return packed ? (i / V * kWarp + lane) * V + i % V : i * kWarp + lane;
}
// How many elements a lane has of a leaf of n; they are its first. Packed leaves are whole vectors.
template <class X>
NK_DEVICE int valid_of(bool packed, int n, int lane) {
    constexpr int V = kVector<X>;
    return packed ? (n / V - lane + kWarp - 1) / kWarp * V : (n - lane + kWarp - 1) / kWarp;
}

// One lane's part of a leaf, as it lies in memory.
template <class X, int kItems>
struct Held {
    static constexpr int kElements = kItems * kVector<X>;
    uint4 item[kItems];

    NK_DEVICE Compute<X> operator[](int i) const { return Lanes<X>::get(item[i / kVector<X>], i % kVector<X>); }

    // `base`: the operand at the set; `first`: the leaf's first element.
    template <Operand o>
    NK_DEVICE void load(const Work& w, const char* base, index_t first, int valid, int lane) {
        constexpr int V = kVector<X>;
        NORMKIT_UNROLL
        for (int j = 0; j < kItems; ++j) item[j] = uint4{0, 0, 0, 0};
        if (w.vector) {
            NORMKIT_UNROLL
            for (int j = 0; j < kItems; ++j) {
                if (j * V < valid) item[j] = load_vector(base + element_offset<o>(w, first + (j * kWarp + lane) * V));
            }
        } else {
            NORMKIT_UNROLL
            for (int i = 0; i < kElements; ++i) {
                if (i >= valid) continue;
                const index_t e = first + element_of<X>(w.packed, i, lane);
                Lanes<X>::set(item[i / V], i % V, Lanes<X>::load(base + element_offset<o>(w, e)));
            }
        }
    }
};

// Writes vector j of a lane's part of a leaf.
template <class X>
NK_DEVICE void write_item(const Work& w, char* base, index_t first, int j, int valid, int lane, const uint4& item) {
    constexpr int V = kVector<X>;
    if (w.vector) {
        store_vector(base + element_offset<kY>(w, first + (j * kWarp + lane) * V), item);
        return;
    }
    NORMKIT_UNROLL
    for (int k = 0; k < V; ++k) {
        if (j * V + k >= valid) continue;
        const index_t e = first + element_of<X>(w.packed, j * V + k, lane);
        Lanes<X>::store(base + element_offset<kY>(w, e), Lanes<X>::get(item, k));
    }
}

// One number of a parameter, in the type of arithmetic or x's.
template <class X>
NK_DEVICE Compute<X> load_parameter(const Parameter& p, index_t offset) {
    return p.arithmetic ? Lanes<Compute<X>>::load(p.data + offset) : Lanes<X>::load(p.data + offset);
}

// The parameter of vector j of a lane's part. `base`: its offset at the set.
template <Operand o, class X>
NK_DEVICE void read_parameter(const Work& w, const Parameter& p, index_t base, index_t first, int j, int valid,
                              int lane, Compute<X> absent, Compute<X>* out) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    if (p.reading == Reading::element) {
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            out[k] = absent;
            if (j * V + k >= valid) continue;
            const index_t e = first + element_of<X>(w.packed, j * V + k, lane);
            out[k] = load_parameter<X>(p, base + element_offset<o>(w, e));
        }
    } else if (p.reading == Reading::vector) {
        const char* at = p.data + base + element_offset<o>(w, first + element_of<X>(w.packed, j * V, lane));
        if (p.arithmetic) {
            constexpr int kPer = kVector<T>;
            NORMKIT_UNROLL
            for (int i = 0; i < V / kPer; ++i) {
                const uint4 v = load_vector(at + 16 * i);
                NORMKIT_UNROLL
                for (int k = 0; k < kPer; ++k) out[i * kPer + k] = Lanes<T>::get(v, k);
            }
        } else {
            const uint4 v = load_vector(at);
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) out[k] = Lanes<X>::get(v, k);
        }
    } else {
        T one = absent;
        if (p.reading == Reading::uniform) {
            const index_t e = first + element_of<X>(w.packed, j * V, lane);
            one = load_parameter<X>(p, base + element_offset<o>(w, e));
        }
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) out[k] = one;
    }
}

// ------------------------------------------------------------------------------------------------- sums over the lanes

// By halves; every lane gets the same bits, because an addition is commutative.
template <class A>
NK_DEVICE A warp_sum(A v) {
    NORMKIT_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v += from_lane_xor(v, mask);
    return v;
}
NK_DEVICE double warp_max(double v) {
    NORMKIT_UNROLL
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        const double other = from_lane_xor(v, mask);
        v = other > v ? other : v;
    }
    return v;
}

// Moments of a leaf of n elements; value(i) is element i of this lane, in type A. `shift`: take the pilot about the
// leaf's first element, so that its sum is as short as the spread; without it infinities come out as they should.
template <class A, int kElements, class F>
NK_DEVICE Moments warp_moments(int n, int valid, bool center, bool shift, F value) {
    A pilot = 0;
    if (center) {
        const A first = shift ? from_lane(value(0), 0) : A(0);
        pilot = first + warp_sum(lane_sum<kElements>(valid, first, value)) / static_cast<A>(n);
    }
    const Deviations<A> lane = lane_deviations<kElements>(valid, pilot, value);
    return leaf_moments<A>(n, 1.0 / n, pilot, center ? warp_sum(lane.d) : lane.d, warp_sum(lane.dd), center);
}

NK_DEVICE Moments merge_lanes(Moments m, int lanes, int lane) {
    NORMKIT_ROLLED
    for (int mask = 1; mask < lanes; mask *= 2) {
        const Moments other{from_lane_xor(m.count, mask), from_lane_xor(m.mean, mask), from_lane_xor(m.M2, mask)};
        m = merged_pair(m, other, (lane & mask) == 0);
    }
    return m;
}

// Merges entries 0 to n - 1, each lane those that are a power of two apart, and then the lanes. All lanes get the
// result.
template <class F>
NK_DEVICE Moments merge_entries(index_t n, int lane, F entry) {
    const int lanes = merging_lanes(n), mine = lane & (lanes - 1);
    Moments m;
    NORMKIT_ROLLED
    for (index_t i = mine; i < n; i += lanes) m.merge(entry(i));
    return merge_lanes(m, lanes, lane);
}
template <class F>
NK_DEVICE Pair<double> add_entries(index_t n, int lane, F entry) {
    const int lanes = merging_lanes(n), mine = lane & (lanes - 1);
    Pair<double> sum{0, 0};
    NORMKIT_ROLLED
    for (index_t i = mine; i < n; i += lanes) {
        const Pair<double> other = entry(i);
        sum.g += other.g;
        sum.g_xhat += other.g_xhat;
    }
    NORMKIT_ROLLED
    for (int mask = 1; mask < lanes; mask *= 2) {
        sum.g += from_lane_xor(sum.g, mask);
        sum.g_xhat += from_lane_xor(sum.g_xhat, mask);
    }
    return sum;
}

// -----------------------------------------------------------------------------------------------------------
// statistics

// What the caller wants of a set, and what kernels read of it.
NK_DEVICE Statistic statistic_of(const Moments& m, double origin, double scale, double eps) {
    return scale == 1 ? statistic_from(m, origin, eps) : statistic_from(m, origin, scale, eps);
}
NK_DEVICE void write_statistic(const Work& w, index_t set, const Statistic& s, double M2) {
    const index_t i = set_offset<kStatistic>(w, set);
    if (w.mean) w.mean[i] = s.mean;
    if (w.rstd) w.rstd[i] = s.rstd;
    if (w.M2) w.M2[i] = M2;
}
template <class X>
NK_DEVICE Split<Compute<X>> given_split(const Work& w, index_t set) {
    const index_t i = set_offset<kStatistic>(w, set);
    return split<Compute<X>>({w.mean ? w.mean[i] : 0, 0, w.rstd[i]});
}

// Number of the first element of leaf `leaf` of a cell, and how many it has.
NK_DEVICE index_t leaf_first(const Work& w, index_t cell, index_t leaf) { return cell * w.cell_step + leaf * w.leaf; }
NK_DEVICE int leaf_size(const Work& w, index_t leaf) {
    const index_t left = w.cell_size - leaf * w.leaf;
    return static_cast<int>(left < w.leaf ? left : w.leaf);
}
// Entry i of a cell: its size, and where it stands among all.
NK_DEVICE index_t entry_size(const Work& w, index_t i) {
    const index_t left = w.cell_size - i * w.entry_size;
    return left < w.entry_size ? left : w.entry_size;
}
NK_DEVICE index_t entry_place(const Work& w, index_t cell, index_t i) {
    const index_t lanes = w.lanes.divisor, outer = w.lanes.quotient(cell);
    return (outer * w.entries.divisor + i) * lanes + (cell - outer * lanes);
}

// The sums of a cell as its set takes them: times the cell's weight, where that is not in them yet.
template <class X>
NK_DEVICE Pair<double> weighted_cell(const Work& w, index_t set, index_t cell, Pair<double> sum) {
    if (w.weight_in_sums || !w.weight.data) return sum;
    const index_t at = set_offset<kWeight>(w, set) + element_offset<kWeight>(w, cell * w.cell_step);
    const double weight = static_cast<double>(load_parameter<X>(w.weight, at));
    return {weight * sum.g, weight * sum.g_xhat};
}
template <class X>
NK_DEVICE Pair<Compute<X>> set_means(const Work& w, const Pair<double>& sum) {
    using T = Compute<X>;
    if (w.constant_statistics) return {0, 0};
    const double n = static_cast<double>(w.set_size);
    return {w.center ? static_cast<T>(sum.g / n) : T(0), static_cast<T>(sum.g_xhat / n)};
}

// The leaf as doubles for a set that is done again.
template <class X, class F>
NK_DEVICE Moments scaled_moments(int n, int valid, bool center, double scale, double origin, F value) {
    return warp_moments<double, kLeafItems<X> * kVector<X>>(
        n, valid, center, false, [&](int i) { return fused(static_cast<double>(value(i)), scale, -origin); });
}

}  // namespace normkit::cuda
