// Kernels of the columns: neighbouring lanes belong to different sets, and sums go down the rows.
//
// A block is `width` threads along the lanes, each with a vector of them, by `height` down the rows; warps read whole
// lines. A thread sums leaves of kColumnRows rows (its rows of a sweep of height * kColumnRows), merges them one after
// another in double, and the block merges its threads by halves: that is an entry for each lane, of w.entry_size rows.
#pragma once

#include "device.h"

namespace normkit::cuda {

// Where a thread is: a piece of rows of a tile of lanes of an outer block.
template <class X>
struct Column {
    static constexpr int V = kVector<X>;
    index_t outer, piece, rows, first_row;  // rows: of the piece
    index_t lane, step, lanes;              // lane k of the thread is lane + k * step, if it is less than lanes
    int x, y;                               // of the thread in the block

    NK_DEVICE Column(const Work& w, index_t id) {
        const index_t block = w.tiles.quotient(id), tile = id - block * w.tiles.divisor;
        outer = w.entries.quotient(block);
        piece = block - outer * w.entries.divisor;
        rows = entry_size(w, piece);
        first_row = piece * w.entry_size;
        x = threadIdx.x % w.width;
        y = threadIdx.x / w.width;
        lanes = w.lanes.divisor;
        lane = tile * w.width * V + (w.lanes_packed ? x * V : x);
        step = w.lanes_packed ? 1 : w.width;
    }
    NK_DEVICE bool has(int k) const { return lane + k * step < lanes; }

    // Of lane k of the thread, without its row.
    template <Operand o>
    NK_DEVICE index_t offset(const Work& w, int k) const {
        const index_t group = w.cells.quotient(lane + k * step), in_group = lane + k * step - group * w.cells.divisor;
        return offset_along<o>(w, 0, w.kept - 1, outer) + group * w.axis[w.kept - 1].stride[o] +
               in_group * w.axis[w.axes - 1].stride[o];
    }
    NK_DEVICE index_t set(const Work& w, int k) const {
        return outer * w.axis[w.kept - 1].extent.divisor + w.cells.quotient(lane + k * step);
    }
};

// Of row r of the rows of a set.
template <Operand o>
NK_DEVICE index_t row_offset(const Work& w, index_t row) {
    return offset_along<o>(w, w.kept, w.axes - 1, row);
}

// `at`: the operand at the thread's first lane.
template <class X>
NK_DEVICE uint4 load_lanes(const Work& w, const Column<X>& c, const char* at) {
    if (w.lanes_vector) return load_vector(at);
    uint4 v{0, 0, 0, 0};
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) {
        if (c.has(k)) Lanes<X>::set(v, k, Lanes<X>::load(at + k * c.step * index_t{sizeof(X)}));
    }
    return v;
}
template <class X>
NK_DEVICE void store_lanes(const Work& w, const Column<X>& c, char* at, const uint4& v) {
    if (w.lanes_vector) return store_vector(at, v);
    NORMKIT_UNROLL
    for (int k = 0; k < kVector<X>; ++k) {
        if (c.has(k)) Lanes<X>::store(at + k * c.step * index_t{sizeof(X)}, Lanes<X>::get(v, k));
    }
}

// Moments of entries to the workspace. Shared memory: a double and Partial[V] for each thread.
template <class X>
NK_KERNEL(kBlock) columns_moments(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    Partial* const parts = reinterpret_cast<Partial*>(shared_memory());
    double* const counts = reinterpret_cast<double*>(parts + kBlock * V);
    const index_t total = w.sets / w.axis[w.kept - 1].extent.divisor * w.entries.divisor * w.tiles.divisor;
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, id);
        const bool here = c.has(0);
        const char* const x = w.x + (here ? c.template offset<kX>(w, 0) : 0);
        T origin[V];
        double count = 0, mean[V], M2[V];
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            origin[k] = 0;
            mean[k] = M2[k] = 0;
            if (sizeof(T) == 8 && w.center && c.has(k)) {  // the first element of the set
                const index_t in_group = w.cells.remainder(c.lane + k * c.step);
                const index_t back = in_group * w.axis[w.axes - 1].stride[kX];
                origin[k] = static_cast<T>(Lanes<X>::load(w.x + c.template offset<kX>(w, k) - back));
            }
        }
        const index_t sweep = w.height * kColumnRows;
        NORMKIT_ROLLED
        for (index_t r = c.y; here && r < c.rows; r += sweep) {
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
                if (!c.has(k)) continue;
                w.moments[(c.outer * w.entries.divisor + c.piece) * c.lanes + c.lane + k * c.step] = {mean[k], M2[k]};
            }
        }
        block_barrier();
    }
}

// y, from the end: what was read last is still in the L2 cache.
template <class X>
NK_KERNEL(kBlock) columns_apply(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    const index_t total = w.sets / w.axis[w.kept - 1].extent.divisor * w.entries.divisor * w.tiles.divisor;
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, total - 1 - id);
        if (!c.has(0)) continue;
        Split<T> s[V];
        T weights[V], biases[V];
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            s[k] = {0, 0, 0, 1};
            weights[k] = 1;
            biases[k] = 0;
            if (!c.has(k)) continue;
            s[k] = static_cast<const Split<T>*>(w.statistics)[c.set(w, k)];
            if (w.weight.data && !w.weight_by_row) {
                weights[k] = load_parameter<X>(w.weight, c.template offset<kWeight>(w, k));
            }
            if (w.bias.data && !w.bias_by_row) {
                biases[k] = load_parameter<X>(w.bias, c.template offset<kBias>(w, k));
            }
        }
        const char* const x = w.x + c.template offset<kX>(w, 0);
        char* const y = w.y + c.template offset<kY>(w, 0);
        NORMKIT_UNROLL_BY(4)
        for (index_t r = c.y; r < c.rows; r += w.height) {
            const index_t row = c.first_row + r;
            const uint4 v = load_lanes(w, c, x + row_offset<kX>(w, row));
            if (w.weight_by_row || w.bias_by_row) {
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) {
                    if (!c.has(k)) continue;
                    if (w.weight_by_row) {
                        weights[k] = load_parameter<X>(
                            w.weight, c.template offset<kWeight>(w, k) + row_offset<kWeight>(w, row));
                    }
                    if (w.bias_by_row) {
                        biases[k] =
                            load_parameter<X>(w.bias, c.template offset<kBias>(w, k) + row_offset<kBias>(w, row));
                    }
                }
            }
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
NK_KERNEL(kBlock) columns_sums(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    Pair<double>* const parts = reinterpret_cast<Pair<double>*>(shared_memory());
    const index_t total = w.sets / w.axis[w.kept - 1].extent.divisor * w.entries.divisor * w.tiles.divisor;
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, id);
        const bool here = c.has(0);
        Split<T> s[V];
        Pair<double> sum[V];
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            s[k] = {0, 0, 0, 1};
            if (c.has(k)) s[k] = static_cast<const Split<T>*>(w.statistics)[c.set(w, k)];
            sum[k] = {0, 0};
        }
        const char* const x = w.x + (here ? c.template offset<kX>(w, 0) : 0);
        const char* const dy = w.dy + (here ? c.template offset<kDy>(w, 0) : 0);
        const index_t sweep = w.height * kColumnRows;
        NORMKIT_ROLLED
        for (index_t first = c.y; here && first < c.rows; first += sweep) {
            T g[V], g_xhat[V];
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) g[k] = g_xhat[k] = 0;
            NORMKIT_UNROLL_BY(4)
            for (int j = 0; j < kColumnRows; ++j) {
                const index_t r = first + j * w.height, row = c.first_row + r;
                if (r >= c.rows) break;
                const uint4 vx = load_lanes(w, c, x + row_offset<kX>(w, row));
                const uint4 vdy = load_lanes(w, c, dy + row_offset<kDy>(w, row));
                NORMKIT_UNROLL
                for (int k = 0; k < V; ++k) {
                    T v = Lanes<X>::get(vdy, k);
                    if (w.weight_in_sums && c.has(k)) {
                        v *= load_parameter<X>(w.weight,
                                               c.template offset<kWeight>(w, k) + row_offset<kWeight>(w, row));
                    }
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
                if (!c.has(k)) continue;
                w.sums[(c.outer * w.entries.divisor + c.piece) * c.lanes + c.lane + k * c.step] = sum[k];
            }
        }
        block_barrier();
    }
}

template <class X>
NK_KERNEL(kBlock) columns_dx(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    const index_t total = w.sets / w.axis[w.kept - 1].extent.divisor * w.entries.divisor * w.tiles.divisor;
    for (index_t id = blockIdx.x; id < total; id += gridDim.x) {
        const Column<X> c(w, total - 1 - id);
        if (!c.has(0)) continue;
        Split<T> s[V];
        DxTerms<T> terms[V];
        T weights[V];
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            s[k] = {0, 0, 0, 1};
            terms[k] = {0, 0};
            weights[k] = 1;
            if (!c.has(k)) continue;
            const index_t set = c.set(w, k);
            s[k] = static_cast<const Split<T>*>(w.statistics)[set];
            if (!w.constant_statistics && w.set_sums) {
                terms[k] = dx_terms(s[k], static_cast<const Pair<T>*>(w.set_sums)[set]);
            }
            if (w.weight.data && !w.weight_by_row) {
                weights[k] = load_parameter<X>(w.weight, c.template offset<kWeight>(w, k));
            }
        }
        const char* const x = w.x + c.template offset<kX>(w, 0);
        const char* const dy = w.dy + c.template offset<kDy>(w, 0);
        char* const dx = w.y + c.template offset<kY>(w, 0);
        NORMKIT_UNROLL_BY(2)
        for (index_t r = c.y; r < c.rows; r += w.height) {
            const index_t row = c.first_row + r;
            const uint4 vx = load_lanes(w, c, x + row_offset<kX>(w, row));
            const uint4 vdy = load_lanes(w, c, dy + row_offset<kDy>(w, row));
            uint4 out{0, 0, 0, 0};
            NORMKIT_UNROLL
            for (int k = 0; k < V; ++k) {
                if (w.weight_by_row && c.has(k)) {
                    weights[k] =
                        load_parameter<X>(w.weight, c.template offset<kWeight>(w, k) + row_offset<kWeight>(w, row));
                }
                Lanes<X>::set(out, k, dx_of(Lanes<X>::get(vx, k), Lanes<X>::get(vdy, k), weights[k], s[k], terms[k]));
            }
            store_lanes(w, c, dx + row_offset<kY>(w, row), out);
        }
    }
}

}  // namespace normkit::cuda
