// Kernels of the rows: a set is walked along its elements, leaf by leaf, a warp to a leaf.
//
// rows_forward, rows_backward: a set stays on the chip, in registers (a leaf to a warp) or in shared memory (kShared,
// where every thread keeps what it holds in slots of its own) or at least in the L2 cache (reload), so memory is read
// once and written once. The others are
// for sets that are too large for that or too few to fill the machine: sums of entries to the workspace, merged there,
// and then a second reading that writes. The leaves and the order of merging are the same, so the bits are too.
#pragma once

#include "device.h"

namespace normkit::cuda {

// y of one leaf. `weight`, `bias`: their offsets at the set.
template <class X>
NK_DEVICE void write_y(const Work& w, char* y, index_t weight, index_t bias, index_t first, int valid, int lane,
                       const Held<X, kLeafItems<X>>& h, const Split<Compute<X>>& s) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    NORMKIT_UNROLL
    for (int j = 0; j < kLeafItems<X>; ++j) {
        if (j * V >= valid) continue;
        T weights[V], biases[V];
        read_parameter<kWeight, X>(w, w.weight, weight, first, j, valid, lane, T(1), weights);
        read_parameter<kBias, X>(w, w.bias, bias, first, j, valid, lane, T(0), biases);
        uint4 out{0, 0, 0, 0};
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) Lanes<X>::set(out, k, y_of(h[j * V + k], s, weights[k], biases[k]));
        write_item<X>(w, y, first, j, valid, lane, out);
    }
}

// Shared memory: Partial[leaves] where more than one warp works on a set; kShared: the vectors held.
template <class X, bool kShared>
NK_KERNEL(kMostWarps<X>* kWarp, 1)
void rows_forward(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int kItems = kLeafItems<X>, kElements = kItems * kVector<X>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int leaves = static_cast<int>(w.leaves.divisor);
    const bool alone = !kShared && w.warps == 1;  // a warp to a set: no barrier is passed
    const int rank = alone ? 0 : warp;
    Partial* const parts = reinterpret_cast<Partial*>(shared_memory());
    uint4* const slots = reinterpret_cast<uint4*>(parts + leaves);
    const index_t per_block = alone ? blockDim.x / kWarp : 1, stride = gridDim.x * per_block;

    for (index_t set = blockIdx.x * per_block + (alone ? warp : 0); set < w.sets; set += stride) {
        const char* const x = w.x + set_offset<kX>(w, set);
        Held<X, kItems> h;
        const auto keep = [&](int l) {
            NORMKIT_UNROLL
            for (int j = 0; j < kItems; ++j) slots[(l * kItems + j) * kWarp + lane] = h.item[j];
        };
        const auto take = [&](int l) {
            if (!kShared) return;
            if (w.reload) {
                h.template load<kX>(w, x, index_t{l} * w.leaf, valid_of<X>(w.packed, leaf_size(w, l), lane), lane);
                return;
            }
            NORMKIT_UNROLL
            for (int j = 0; j < kItems; ++j) h.item[j] = slots[(l * kItems + j) * kWarp + lane];
        };
        const auto merged = [&](const Moments& own) {
            if (alone) return own;
            block_barrier();
            return merge_entries(leaves, lane, [&](index_t i) {
                return Moments{static_cast<double>(leaf_size(w, i)), parts[i].mean, parts[i].M2};
            });
        };

        double origin = 0, scale = 1;
        if (sizeof(T) == 8 && w.center) origin = Lanes<X>::load(x);
        Moments m;
        NORMKIT_ROLLED
        for (int l = rank; l < leaves; l += w.warps) {
            const int n = leaf_size(w, l), valid = valid_of<X>(w.packed, n, lane);
            h.template load<kX>(w, x, index_t{l} * w.leaf, valid, lane);
            if (kShared && !w.reload) keep(l);
            m = warp_moments<T, kElements>(
                n, valid, w.center, true, [&](int i) { return sizeof(T) == 8 ? h[i] - static_cast<T>(origin) : h[i]; });
            if (!alone && lane == 0) parts[l] = {m.mean, m.M2};
        }
        m = merged(m);

        if (is_doubtful<T>(m, w.eps)) {  // all threads that share the set agree
            if (!alone) block_barrier();
            if (sizeof(T) == 8) {
                double largest = 0;
                NORMKIT_ROLLED
                for (int l = rank; l < leaves; l += w.warps) {
                    const int valid = valid_of<X>(w.packed, leaf_size(w, l), lane);
                    take(l);
                    NORMKIT_UNROLL
                    for (int i = 0; i < kElements; ++i) {
                        const double v = std::fabs(static_cast<double>(h[i]));
                        if (i < valid && v > largest) largest = v;
                    }
                }
                largest = warp_max(largest);
                if (!alone) {
                    if (lane == 0) parts[rank].mean = largest;
                    block_barrier();
                    for (int i = 0; i < w.warps; ++i) largest = parts[i].mean > largest ? parts[i].mean : largest;
                    block_barrier();
                }
                scale = scale_for(largest);
                origin *= scale;
            }
            NORMKIT_ROLLED
            for (int l = rank; l < leaves; l += w.warps) {
                const int n = leaf_size(w, l);
                take(l);
                m = scaled_moments<X>(n, valid_of<X>(w.packed, n, lane), w.center, scale, origin,
                                      [&](int i) { return h[i]; });
                if (!alone && lane == 0) parts[l] = {m.mean, m.M2};
            }
            m = merged(m);
        }

        const Statistic statistic = statistic_of(m, origin, scale, w.eps);
        if (rank == 0 && lane == 0) write_statistic(w, set, statistic, m.M2 / scale / scale);
        if (w.y) {
            const Split<T> s = split<T>(statistic);
            const index_t weight = set_offset<kWeight>(w, set), bias = set_offset<kBias>(w, set);
            char* const y = w.y + set_offset<kY>(w, set);
            NORMKIT_ROLLED
            for (int l = rank; l < leaves; l += w.warps) {
                take(l);
                write_y<X>(w, y, weight, bias, index_t{l} * w.leaf, valid_of<X>(w.packed, leaf_size(w, l), lane), lane,
                           h, s);
            }
        }
        if (!alone && set + stride < w.sets) block_barrier();  // parts are written again
    }
}

// Moments of entries to the workspace, a warp to each.
template <class X>
NK_KERNEL(kBlock, 2)
void rows_moments(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int kItems = kLeafItems<X>;
    const int lane = threadIdx.x % kWarp;
    const index_t entries = w.entries.divisor, per_block = blockDim.x / kWarp;
    for (index_t id = blockIdx.x * per_block + threadIdx.x / kWarp; id < w.sets * entries;
         id += gridDim.x * per_block) {
        const index_t set = w.entries.quotient(id), first = (id - set * entries) * w.chunk;
        const char* const x = w.x + set_offset<kX>(w, set);
        const T origin = sizeof(T) == 8 && w.center ? static_cast<T>(Lanes<X>::load(x)) : T(0);
        Moments m;
        NORMKIT_ROLLED
        for (index_t l = first; l < first + w.chunk && l < w.leaves.divisor; ++l) {
            const int n = leaf_size(w, l), valid = valid_of<X>(w.packed, n, lane);
            Held<X, kItems> h;
            h.template load<kX>(w, x, l * w.leaf, valid, lane);
            m.merge(warp_moments<T, kItems * kVector<X>>(n, valid, w.center, true,
                                                         [&](int i) { return sizeof(T) == 8 ? h[i] - origin : h[i]; }));
        }
        if (lane == 0) w.moments[id] = {m.mean, m.M2};
    }
}

// y, a warp to a leaf. From the end: what was read last is still in the L2 cache.
template <class X>
NK_KERNEL(kBlock, 2)
void rows_apply(NK_WORK(Work) w) {
    using T = Compute<X>;
    const int lane = threadIdx.x % kWarp;
    const index_t leaves = w.leaves.divisor, total = w.sets * leaves, per_block = blockDim.x / kWarp;
    for (index_t id = blockIdx.x * per_block + threadIdx.x / kWarp; id < total; id += gridDim.x * per_block) {
        const index_t back = total - 1 - id, set = w.leaves.quotient(back), l = back - set * leaves;
        const int valid = valid_of<X>(w.packed, leaf_size(w, l), lane);
        Held<X, kLeafItems<X>> h;
        h.template load<kX>(w, w.x + set_offset<kX>(w, set), l * w.leaf, valid, lane);
        const Split<T> s = static_cast<const Split<T>*>(w.statistics)[set];
        write_y<X>(w, w.y + set_offset<kY>(w, set), set_offset<kWeight>(w, set), set_offset<kBias>(w, set), l * w.leaf,
                   valid, lane, h, s);
    }
}

// ----------------------------------------------------------------------------------------------------------- backward

template <class X>
using HeldSum = Held<X, kSumItems<X>>;

// Sums of g and g * xhat over a leaf, g = dy or weight * dy.
template <class X>
NK_DEVICE Pair<double> leaf_sums(const Work& w, index_t weight, index_t first, int valid, int lane, const HeldSum<X>& x,
                                 const HeldSum<X>& dy, const Split<Compute<X>>& s) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    T g[2] = {0, 0}, g_xhat[2] = {0, 0};
    NORMKIT_UNROLL
    for (int j = 0; j < kSumItems<X>; ++j) {
        T weights[V];
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) weights[k] = 1;
        if (w.weight_in_sums && j * V < valid) {
            read_parameter<kWeight, X>(w, w.weight, weight, first, j, valid, lane, T(1), weights);
        }
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            const int i = j * V + k;
            if (i >= valid) continue;
            const T v = weights[k] * dy[i];
            g[k % 2] += v;
            g_xhat[k % 2] = fused(v, xhat_of(x[i], s), g_xhat[k % 2]);
        }
    }
    return {static_cast<double>(warp_sum(g[0] + g[1])), static_cast<double>(warp_sum(g_xhat[0] + g_xhat[1]))};
}

// dx of one leaf, and f(j, terms of dgamma and dbeta) for each of its vectors, for those who sum them.
template <class X, class F>
NK_DEVICE void write_dx(const Work& w, char* dx, index_t weight, index_t first, int valid, int lane,
                        const HeldSum<X>& x, const HeldSum<X>& dy, const Split<Compute<X>>& s,
                        const DxTerms<Compute<X>>& terms, F for_gradients) {
    using T = Compute<X>;
    constexpr int V = kVector<X>;
    NORMKIT_UNROLL
    for (int j = 0; j < kSumItems<X>; ++j) {
        if (j * V >= valid) continue;
        if (w.by_element) for_gradients(j);
        if (!dx) continue;
        T weights[V];
        read_parameter<kWeight, X>(w, w.weight, weight, first, j, valid, lane, T(1), weights);
        uint4 out{0, 0, 0, 0};
        NORMKIT_UNROLL
        for (int k = 0; k < V; ++k) {
            Lanes<X>::set(out, k, dx_of(x[j * V + k], dy[j * V + k], weights[k], s, terms));
        }
        write_item<X>(w, dx, first, j, valid, lane, out);
    }
}

// V numbers of T, 16 bytes at a time.
template <class T, int V>
NK_DEVICE void add_to(T* at, const T* terms) {
    constexpr int kPer = kVector<T>;
    NORMKIT_UNROLL
    for (int i = 0; i < V / kPer; ++i) {
        uint4 v = reinterpret_cast<uint4*>(at)[i];
        NORMKIT_UNROLL
        for (int k = 0; k < kPer; ++k) Lanes<T>::set(v, k, Lanes<T>::get(v, k) + terms[i * kPer + k]);
        reinterpret_cast<uint4*>(at)[i] = v;
    }
}

// Shared memory: Pair<double>[2 * leaves of the set + cells] where more than one warp works on a set; then what is
// summed by element (two numbers for each element of a leaf), or with kShared the vectors held.
template <class X, bool kShared>
NK_KERNEL(kMostWarps<X>* kWarp, 1)
void rows_backward(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>, kItems = kSumItems<X>;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int leaves = static_cast<int>(w.leaves.divisor), cells = static_cast<int>(w.cells.divisor);
    const int total = leaves * cells;
    const bool alone = !kShared && w.warps == 1;
    const int rank = alone ? 0 : warp;
    Pair<double>* const parts = reinterpret_cast<Pair<double>*>(shared_memory());
    Pair<double>* const cell_parts = parts + (alone ? 0 : 2 * total);
    uint4* const slots = reinterpret_cast<uint4*>(cell_parts + (alone ? 0 : cells));
    // By element, of leaf l: sums of g, and behind them of g * xhat.
    T* const sums = reinterpret_cast<T*>(slots) + (alone ? warp * (2 * kItems * V * kWarp) : 0);
    const auto sum_g = [&](int l, int j) { return sums + ((l * 2 * kItems + j) * kWarp + lane) * V; };
    const auto sum_g_xhat = [&](int l, int j) { return sum_g(l, kItems + j); };

    const index_t per_block = alone ? blockDim.x / kWarp : 1, stride = gridDim.x * per_block;
    const index_t teams = (w.sets + w.sets_per_team - 1) / w.sets_per_team;
    for (index_t team = blockIdx.x * per_block + (alone ? warp : 0); team < teams; team += stride) {
        for (int l = rank; w.by_element && l < total; l += w.warps) {
            for (int j = 0; j < kItems; ++j) {
                for (int k = 0; k < V; ++k) sum_g(l, j)[k] = sum_g_xhat(l, j)[k] = 0;
            }
        }
        const index_t begin = team * w.sets_per_team;
        const index_t end = begin + w.sets_per_team < w.sets ? begin + w.sets_per_team : w.sets;
        NORMKIT_ROLLED
        for (index_t set = begin; set < end; ++set) {
            const Split<T> s = given_split<X>(w, set);
            const index_t weight = set_offset<kWeight>(w, set);
            const char* const x = w.x + set_offset<kX>(w, set);
            const char* const dy = w.dy + set_offset<kDy>(w, set);
            HeldSum<X> hx, hdy;
            const auto slot = [&](int l, int j) { return slots + ((l * 2) * w.slots + j) * kWarp + lane; };
            // Two sets after another have a buffer each: one barrier parts them.
            Pair<double>* const buffer = parts + ((set - begin) % 2) * total;
            Pair<double> sum{0, 0};
            NORMKIT_ROLLED
            for (int l = rank; l < total; l += w.warps) {
                const index_t cell = w.leaves.quotient(l), leaf = l - cell * leaves, first = leaf_first(w, cell, leaf);
                const int valid = valid_of<X>(w.packed, leaf_size(w, leaf), lane);
                hx.template load<kX>(w, x, first, valid, lane);
                hdy.template load<kDy>(w, dy, first, valid, lane);
                if (kShared && !w.reload) {
                    NORMKIT_UNROLL
                    for (int j = 0; j < kItems; ++j) {
                        if (j >= w.slots) continue;
                        *slot(l, j) = hx.item[j];
                        *slot(l, w.slots + j) = hdy.item[j];
                    }
                }
                sum = leaf_sums<X>(w, weight, first, valid, lane, hx, hdy, s);
                if (total > 1 && lane == 0) buffer[l] = sum;
            }
            if (total > 1) {
                block_barrier();
                if (cells > 1) {
                    for (int c = rank; c < cells; c += w.warps) {
                        sum = add_entries(leaves, lane, [&](index_t i) { return buffer[c * leaves + i]; });
                        if (lane == 0) cell_parts[c] = sum;
                        if (lane == 0 && w.cell_sums) w.cell_sums[set * cells + c] = sum;
                    }
                    block_barrier();
                } else {
                    sum = add_entries(leaves, lane, [&](index_t i) { return buffer[i]; });
                }
            }
            if (cells == 1 && w.cell_sums && rank == 0 && lane == 0) w.cell_sums[set] = sum;
            sum = add_entries(cells, lane,
                              [&](index_t c) { return weighted_cell<X>(w, set, c, cells > 1 ? cell_parts[c] : sum); });
            const DxTerms<T> terms = dx_terms(s, set_means<X>(w, sum));

            if (!w.y && !w.by_element) continue;
            char* const dx = w.y ? w.y + set_offset<kY>(w, set) : nullptr;
            NORMKIT_ROLLED
            for (int l = rank; l < total; l += w.warps) {
                const index_t cell = w.leaves.quotient(l), leaf = l - cell * leaves, first = leaf_first(w, cell, leaf);
                const int valid = valid_of<X>(w.packed, leaf_size(w, leaf), lane);
                if (kShared && w.reload) {
                    hx.template load<kX>(w, x, first, valid, lane);
                    hdy.template load<kDy>(w, dy, first, valid, lane);
                } else if (kShared) {
                    NORMKIT_UNROLL
                    for (int j = 0; j < kItems; ++j) {
                        if (j >= w.slots) continue;
                        hx.item[j] = *slot(l, j);
                        hdy.item[j] = *slot(l, w.slots + j);
                    }
                }
                write_dx<X>(w, dx, weight, first, valid, lane, hx, hdy, s, terms, [&](int j) {
                    T g[V], g_xhat[V];
                    NORMKIT_UNROLL
                    for (int k = 0; k < V; ++k) {
                        g[k] = hdy[j * V + k];
                        g_xhat[k] = g[k] * xhat_of(hx[j * V + k], s);
                    }
                    add_to<T, V>(sum_g(l, j), g);
                    add_to<T, V>(sum_g_xhat(l, j), g_xhat);
                });
            }
        }
        for (int l = rank; w.by_element && l < total; l += w.warps) {
            Pair<T>* const out = static_cast<Pair<T>*>(w.element_sums) + team * w.set_size + index_t{l} * w.leaf;
            const int valid = valid_of<X>(w.packed, leaf_size(w, l), lane);
            NORMKIT_UNROLL
            for (int i = 0; i < kItems * V; ++i) {
                if (i >= valid) continue;
                out[element_of<X>(w.packed, i, lane)] = {sum_g(l, i / V)[i % V], sum_g_xhat(l, i / V)[i % V]};
            }
        }
        if (!alone && team + stride < teams) block_barrier();
    }
}

// Sums of entries to the workspace, a warp to each.
template <class X>
NK_KERNEL(kBlock, 2)
void rows_sums(NK_WORK(Work) w) {
    using T = Compute<X>;
    const int lane = threadIdx.x % kWarp;
    const index_t entries = w.entries.divisor, per_block = blockDim.x / kWarp;
    const index_t total = w.sets * w.cells.divisor * entries;
    for (index_t id = blockIdx.x * per_block + threadIdx.x / kWarp; id < total; id += gridDim.x * per_block) {
        const index_t cell = w.entries.quotient(id), set = w.cells.quotient(cell);
        const index_t begin = (id - cell * entries) * w.chunk;
        const Split<T> s = static_cast<const Split<T>*>(w.statistics)[set];
        const index_t weight = set_offset<kWeight>(w, set);
        const char* const x = w.x + set_offset<kX>(w, set);
        const char* const dy = w.dy + set_offset<kDy>(w, set);
        Pair<double> sum{0, 0};
        NORMKIT_ROLLED
        for (index_t l = begin; l < begin + w.chunk && l < w.leaves.divisor; ++l) {
            const index_t first = leaf_first(w, cell - set * w.cells.divisor, l);
            const int valid = valid_of<X>(w.packed, leaf_size(w, l), lane);
            HeldSum<X> hx, hdy;
            hx.template load<kX>(w, x, first, valid, lane);
            hdy.template load<kDy>(w, dy, first, valid, lane);
            const Pair<double> part = leaf_sums<X>(w, weight, first, valid, lane, hx, hdy, s);
            sum.g += part.g;
            sum.g_xhat += part.g_xhat;
        }
        if (lane == 0) w.sums[id] = sum;
    }
}

// dx, a warp to a leaf of each set of a team; by_element: and the sums down these sets, in registers.
template <class X>
NK_KERNEL(kBlock, 2)
void rows_dx(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int V = kVector<X>, kElements = kSumItems<X> * V;
    const int lane = threadIdx.x % kWarp;
    const index_t leaves = w.leaves.divisor, of_set = w.cells.divisor * leaves, per_block = blockDim.x / kWarp;
    const index_t teams = (w.sets + w.sets_per_team - 1) / w.sets_per_team, total = teams * of_set;
    for (index_t id = blockIdx.x * per_block + threadIdx.x / kWarp; id < total; id += gridDim.x * per_block) {
        const index_t back = total - 1 - id, team = back / of_set, l = back - team * of_set;
        const index_t cell = w.leaves.quotient(l), leaf = l - cell * leaves, first = leaf_first(w, cell, leaf);
        const int valid = valid_of<X>(w.packed, leaf_size(w, leaf), lane);
        T g[kElements], g_xhat[kElements];
        NORMKIT_UNROLL
        for (int i = 0; i < kElements; ++i) g[i] = g_xhat[i] = 0;
        const index_t begin = team * w.sets_per_team;
        const index_t end = begin + w.sets_per_team < w.sets ? begin + w.sets_per_team : w.sets;
        NORMKIT_ROLLED
        for (index_t set = begin; set < end; ++set) {
            const Split<T> s = static_cast<const Split<T>*>(w.statistics)[set];
            Pair<T> mean{0, 0};
            if (!w.constant_statistics && w.set_sums) mean = static_cast<const Pair<T>*>(w.set_sums)[set];
            HeldSum<X> hx, hdy;
            hx.template load<kX>(w, w.x + set_offset<kX>(w, set), first, valid, lane);
            hdy.template load<kDy>(w, w.dy + set_offset<kDy>(w, set), first, valid, lane);
            write_dx<X>(w, w.y ? w.y + set_offset<kY>(w, set) : nullptr, set_offset<kWeight>(w, set), first, valid,
                        lane, hx, hdy, s, dx_terms(s, mean), [&](int j) {
                            NORMKIT_UNROLL
                            for (int k = 0; k < V; ++k) {
                                const T v = hdy[j * V + k];
                                g[j * V + k] += v;
                                g_xhat[j * V + k] += v * xhat_of(hx[j * V + k], s);
                            }
                        });
        }
        if (!w.by_element) continue;
        Pair<T>* const out = static_cast<Pair<T>*>(w.element_sums) + team * w.set_size;
        NORMKIT_UNROLL
        for (int i = 0; i < kElements; ++i) {
            if (i < valid) out[first + element_of<X>(w.packed, i, lane)] = {g[i], g_xhat[i]};
        }
    }
}

}  // namespace normkit::cuda
