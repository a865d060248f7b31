// Kernels of the columns: neighbouring lanes belong to different sets, and sums go down the rows.
//
// A block is `width` threads along the lanes, each with a vector of them, by `height` down the rows; warps read whole
// lines. A thread sums leaves of kColumnRows rows (its rows of a sweep of height * kColumnRows), merges them one after
// another in double, and the block merges its threads by halves: that is an entry for each lane, of w.entry_size rows.
#pragma once

#include "device.h"

namespace normkit::cuda {

// Pieces of the tiles of all outer blocks.
NK_DEVICE index_t columns_of(const Work& w) {
    return w.sets / w.axis[w.kept - 1].extent.divisor * w.entries.divisor * w.tiles.divisor;
}

// Where a thread is: a piece of rows of a tile of lanes of an outer block.
template <class X>
struct Column {
    static constexpr int V = kVector<X>;
    index_t outer, piece, rows, first_row;  // rows: of the piece
    index_t lane;                           // lane k of the thread, k < valid, is lane + k * step
    int step, valid;
    int x, y;  // of the thread in the block

    NK_DEVICE Column(const Work& w, index_t id) {
        const index_t block = w.tiles.quotient(id), tile = id - block * w.tiles.divisor;
        outer = w.entries.quotient(block);
        piece = block - outer * w.entries.divisor;
        rows = entry_size(w, piece);
        first_row = piece * w.entry_size;
        x = threadIdx.x % w.width;
        y = threadIdx.x / w.width;
        step = w.lanes_packed ? 1 : w.width;
        lane = tile * w.width * V + (w.lanes_packed ? x * V : x);
        const index_t left = w.lanes.divisor - lane;
        valid = left <= 0 ? 0 : left >= index_t{V} * step ? V : static_cast<int>((left + step - 1) / step);
    }
    NK_DEVICE index_t group(const Work& w, int k) const { return w.cells.quotient(lane + k * step); }

    // Of the outer block, and of lane k in it.
    template <Operand o>
    NK_DEVICE index_t outer_offset(const Work& w) const {
        return offset_along<o>(w, 0, w.kept - 1, outer);
    }
    template <Operand o>
    NK_DEVICE index_t lane_offset(const Work& w, int k) const {
        const index_t g = group(w, k), in_group = lane + k * step - g * w.cells.divisor;
        return g * w.axis[w.kept - 1].stride[o] + in_group * w.axis[w.axes - 1].stride[o];
    }
    NK_DEVICE index_t set(const Work& w, int k) const {
        return outer * w.axis[w.kept - 1].extent.divisor + group(w, k);
    }
    // In the workspace: the piece's entry of lane k.
    NK_DEVICE index_t entry(const Work& w, int k) const {
        return (outer * w.entries.divisor + piece) * w.lanes.divisor + lane + k * step;
    }
    // Of x and its like at the thread's first lane, where lanes lie side by side.
    template <Operand o>
    NK_DEVICE index_t offset(const Work& w) const {
        return outer_offset<o>(w) + (valid > 0 ? lane * index_t{sizeof(X)} : 0);
    }
};

// A parameter of each lane; `absent` where it is not there, or is one for a row.
template <Operand o, class X>
NK_DEVICE void read_lanes(const Work& w, const Column<X>& c, const Parameter& p, bool by_row, Compute<X> absent,
                          Compute<X>* out) {
    const index_t outer = c.template outer_offset<o>(w);
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) {
        out[k] = absent;
        if (p.data && !by_row && k < c.valid) {
            out[k] = load_parameter<X>(p, outer + c.template lane_offset<o>(w, k));
        }
    }
}
template <class X>
NK_DEVICE void read_splits(const Work& w, const Column<X>& c, Split<Compute<X>>* s) {
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) {
        s[k] = {0, 0, 0, 1};
        if (k < c.valid) s[k] = static_cast<const Split<Compute<X>>*>(w.statistics)[c.set(w, k)];
    }
}

// Of row r of the rows of a set.
template <Operand o>
NK_DEVICE index_t row_offset(const Work& w, index_t row) {
    return offset_along<o>(w, w.kept, w.axes - 1, row);
}

// A parameter that is one for all lanes of a row, as `read_lanes` gives it; `at`: its offset there.
template <class X>
NK_DEVICE void read_row(const Parameter& p, index_t at, Compute<X>* out) {
    const Compute<X> one = load_parameter<X>(p, at);
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) out[k] = one;
}

// `at`: the operand at the thread's first lane.
template <class X>
NK_DEVICE uint4 load_lanes(const Work& w, const Column<X>& c, const char* at) {
    if (w.lanes_vector) return load_vector(at);
    uint4 v{0, 0, 0, 0};
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) {
        if (k < c.valid) Lanes<X>::set(v, k, Lanes<X>::load(at + k * c.step * int{sizeof(X)}));
    }
    return v;
}
template <class X>
NK_DEVICE void store_lanes(const Work& w, const Column<X>& c, char* at, const uint4& v) {
    if (w.lanes_vector) return store_vector(at, v);
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) {
        if (k < c.valid) Lanes<X>::store(at + k * c.step * int{sizeof(X)}, Lanes<X>::get(v, k));
    }
}

// Moments of entries to the workspace. Shared memory: a double and Partial[V] for each thread.
template <class X>
NK_KERNEL(kBlock, 1)
void columns_moments(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    Partial* const parts = reinterpret_cast<Partial*>(shared_memory());
    double* const counts = reinterpret_cast<double*>(parts + kBlock * V);
    const index_t total = columns_of(w);
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, id);
        const char* const x = w.x + c.template offset<kX>(w);
        T origin[V];
        double count = 0, mean[V], M2[V];
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            origin[k] = 0;
            mean[k] = M2[k] = 0;
            if (sizeof(T) == 8 && w.center && k < c.valid) {  // the first element of the set
                const char* const outer = w.x + c.template outer_offset<kX>(w);
                origin[k] = static_cast<T>(Lanes<X>::load(outer + c.group(w, k) * w.axis[w.kept - 1].stride[kX]));
            }
        }
        const index_t sweep = w.height * kColumnRows;
        NORMKIT_ROLLED
        for (index_t r = c.y; c.valid > 0 && r < c.rows; r += sweep) {
            const index_t left = (c.rows - r + w.height - 1) / w.height;
            const int n = left < kColumnRows ? static_cast<int>(left) : kColumnRows;
            uint4 item[kColumnRows];
            NORMKIT_UNROLL
            for (int j = 0; j < kColumnRows; ++j) {
                item[j] = uint4{0, 0, 0, 0};
                if (j < n) item[j] = load_lanes(w, c, x + row_offset<kX>(w, c.first_row + r + j * w.height));
            }
            const double inverse = 1.0 / n;
            const Merging merging(count, n);
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) {
                const auto value = [&](int j) {
                    const T v = Lanes<X>::get(item[j], k);
                    return sizeof(T) == 8 ? v - origin[k] : v;
                };
                T pilot = 0;
                if (w.center) {
                    const T first = value(0), sum = lane_sum<kColumnRows>(n, first, value);
                    pilot = first + sum * static_cast<T>(inverse);
                }
                const Deviations<T> lane = lane_deviations<kColumnRows>(n, pilot, value);
                const Moments leaf = leaf_moments<T>(n, inverse, pilot, lane.d, lane.dd, w.center);
                merging.merge(&mean[k], &M2[k], leaf.mean, leaf.M2);
            }
            count += n;
        }
        NORMKIT_ROLLED
        for (int half = w.height / 2; half > 0; half /= 2) {
            if (c.y >= half && c.y < 2 * half) {
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) parts[k * kBlock + threadIdx.x] = {mean[k], M2[k]};
                counts[threadIdx.x] = count;
            }
            block_barrier();
            const int other = threadIdx.x + half * w.width;
            if (c.y < half && counts[other] > 0) {
                const Merging merging(count, counts[other]);
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) {
                    merging.merge(&mean[k], &M2[k], parts[k * kBlock + other].mean, parts[k * kBlock + other].M2);
                }
                count += counts[other];
            }
        }
        if (c.y == 0) {
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) {
                if (k >= c.valid) continue;
                w.moments[c.entry(w, k)] = {mean[k], M2[k]};
            }
        }
        block_barrier();
    }
}

// y, from the end: what was read last is still in the L2 cache.
template <class X>
NK_KERNEL(kBlock, 2)
void columns_apply(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    const index_t total = columns_of(w);
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, total - 1 - id);
        if (c.valid == 0) continue;
        Split<T> s[V];
        T weights[V], biases[V];
        read_splits<X>(w, c, s);
        read_lanes<kWeight, X>(w, c, w.weight, w.weight_by_row, T(1), weights);
        read_lanes<kBias, X>(w, c, w.bias, w.bias_by_row, T(0), biases);
        const index_t weight = c.template outer_offset<kWeight>(w), bias = c.template outer_offset<kBias>(w);
        const char* const x = w.x + c.template offset<kX>(w);
        char* const y = w.y + c.template offset<kY>(w);
        NORMKIT_UNROLL_BY(2)
        for (index_t r = c.y; r < c.rows; r += w.height) {
            const index_t row = c.first_row + r;
            const uint4 v = load_lanes(w, c, x + row_offset<kX>(w, row));
            if (w.weight_by_row) read_row<X>(w.weight, weight + row_offset<kWeight>(w, row), weights);
            if (w.bias_by_row) read_row<X>(w.bias, bias + row_offset<kBias>(w, row), biases);
            uint4 out{0, 0, 0, 0};
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) Lanes<X>::set(out, k, y_of(Lanes<X>::get(v, k), s[k], weights[k], biases[k]));
            store_lanes(w, c, y + row_offset<kY>(w, row), out);
        }
    }
}

// ----------------------------------------------------------------------------------------------------------- backward

// Sums of g and g * xhat of entries to the workspace. Shared memory: Pair<double>[V] for each thread.
template <class X>
NK_KERNEL(kBlock, 1)
void columns_sums(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    Pair<double>* const parts = reinterpret_cast<Pair<double>*>(shared_memory());
    const index_t total = columns_of(w);
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, id);
        Split<T> s[V];
        Pair<double> sum[V];
        read_splits<X>(w, c, s);
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) sum[k] = {0, 0};
        const index_t weight = c.template outer_offset<kWeight>(w);
        const char* const x = w.x + c.template offset<kX>(w);
        const char* const dy = w.dy + c.template offset<kDy>(w);
        const index_t sweep = w.height * kColumnRows;
        NORMKIT_ROLLED
        for (index_t first = c.y; c.valid > 0 && first < c.rows; first += sweep) {
            T g[V], g_xhat[V];
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) g[k] = g_xhat[k] = 0;
            NORMKIT_UNROLL_BY(2)
            for (int j = 0; j < kColumnRows; ++j) {
                const index_t r = first + j * w.height, row = c.first_row + r;
                if (r >= c.rows) break;
                const uint4 vx = load_lanes(w, c, x + row_offset<kX>(w, row));
                const uint4 vdy = load_lanes(w, c, dy + row_offset<kDy>(w, row));
                T factor = 1;
                if (w.weight_in_sums) factor = load_parameter<X>(w.weight, weight + row_offset<kWeight>(w, row));
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) {
                    const T v = factor * Lanes<X>::get(vdy, k);
                    g[k] += v;
                    g_xhat[k] = fused(v, xhat_of(Lanes<X>::get(vx, k), s[k]), g_xhat[k]);
                }
            }
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) {
                sum[k].g += static_cast<double>(g[k]);
                sum[k].g_xhat += static_cast<double>(g_xhat[k]);
            }
        }
        NORMKIT_ROLLED
        for (int half = w.height / 2; half > 0; half /= 2) {
            if (c.y >= half && c.y < 2 * half) {
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) parts[k * kBlock + threadIdx.x] = sum[k];
            }
            block_barrier();
            if (c.y < half) {
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) {
                    const Pair<double> other = parts[k * kBlock + threadIdx.x + half * w.width];
                    sum[k].g += other.g;
                    sum[k].g_xhat += other.g_xhat;
                }
            }
        }
        if (c.y == 0) {
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) {
                if (k >= c.valid) continue;
                w.sums[c.entry(w, k)] = sum[k];
            }
        }
        block_barrier();
    }
}

template <class X>
NK_KERNEL(kBlock, 2)
void columns_dx(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    const index_t total = columns_of(w);
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, total - 1 - id);
        if (c.valid == 0) continue;
        Split<T> s[V];
        DxTerms<T> terms[V];
        T weights[V];
        read_splits<X>(w, c, s);
        read_lanes<kWeight, X>(w, c, w.weight, w.weight_by_row, T(1), weights);
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            terms[k] = {0, 0};
            if (k < c.valid && !w.constant_statistics && w.set_sums) {
                terms[k] = dx_terms(s[k], static_cast<const Pair<T>*>(w.set_sums)[c.set(w, k)]);
            }
        }
        const index_t weight = c.template outer_offset<kWeight>(w);
        const char* const x = w.x + c.template offset<kX>(w);
        const char* const dy = w.dy + c.template offset<kDy>(w);
        char* const dx = w.y + c.template offset<kY>(w);
        NORMKIT_UNROLL_BY(2)
        for (index_t r = c.y; r < c.rows; r += w.height) {
            const index_t row = c.first_row + r;
            const uint4 vx = load_lanes(w, c, x + row_offset<kX>(w, row));
            const uint4 vdy = load_lanes(w, c, dy + row_offset<kDy>(w, row));
            if (w.weight_by_row) read_row<X>(w.weight, weight + row_offset<kWeight>(w, row), weights);
            uint4 out{0, 0, 0, 0};
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) {
                Lanes<X>::set(out, k, dx_of(Lanes<X>::get(vx, k), Lanes<X>::get(vdy, k), weights[k], s[k], terms[k]));
            }
            store_lanes(w, c, dx + row_offset<kY>(w, row), out);
        }
    }
}

}  // namespace normkit::cuda
