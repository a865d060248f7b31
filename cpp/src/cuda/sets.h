// Kernels between the readings of x: entries to statistics, sums to means, cells to gradients, running statistics.
// They touch little memory, and every order of addition in them is fixed.
#pragma once

#include "device.h"

namespace normkit::cuda {

// A warp for each set: merges its entries; does the set again in double where they can't be trusted.
template <class X>
NK_KERNEL(kBlock, 1)
void finish_sets(NK_WORK(Work) w) {
    using T = Compute<X>;
    constexpr int kItems = kLeafItems<X>, kElements = kItems * kVector<X>;
    const int lane = threadIdx.x % kWarp;
    const index_t entries = w.entries.divisor, cells = w.cells.divisor, per_block = blockDim.x / kWarp;
    for (index_t set = blockIdx.x * per_block + threadIdx.x / kWarp; set < w.sets; set += gridDim.x * per_block) {
        Moments m = merge_entries(cells * entries, lane, [&](index_t k) {
            const index_t i = w.entries.remainder(k);
            const Partial p = w.moments[entry_place(w, set * cells + w.entries.quotient(k), i)];
            return Moments{static_cast<double>(entry_size(w, i)), p.mean, p.M2};
        });
        const char* const x = w.x + set_offset<kX>(w, set);
        double origin = 0, scale = 1;
        if (sizeof(T) == 8 && w.center) origin = Lanes<X>::load(x);
        if (is_doubtful<T>(m, w.eps)) {
            // Leaves along the elements of the set, in the order of merge_entries: rows_forward has the same bits.
            const index_t leaves = w.leaves.divisor;
            const auto for_leaves = [&](index_t begin, index_t end, auto f) {
                NORMKIT_ROLLED
                for (index_t l = begin; l < end; ++l) {
                    const index_t left = w.set_size - l * w.leaf;
                    const int n = static_cast<int>(left < w.leaf ? left : w.leaf);
                    Held<X, kItems> h;
                    const int valid = valid_of<X>(w.packed, n, lane);
                    h.template load<kX>(w, x, l * w.leaf, valid, lane);
                    f(n, valid, h);
                }
            };
            if (sizeof(T) == 8) {
                double largest = 0;
                for_leaves(0, leaves, [&](int, int valid, const Held<X, kItems>& h) {
                    NORMKIT_UNROLL
                    for (int i = 0; i < kElements; ++i) {
                        const double v = std::fabs(static_cast<double>(h[i]));
                        if (i < valid && v > largest) largest = v;
                    }
                });
                scale = scale_for(warp_max(largest));
                origin *= scale;
            }
            const index_t n = (leaves + w.chunk - 1) / w.chunk;
            const int lanes = merging_lanes(n);
            Moments mine;
            NORMKIT_ROLLED
            for (index_t i = 0; i < n; ++i) {
                Moments entry;
                const index_t end = (i + 1) * w.chunk < leaves ? (i + 1) * w.chunk : leaves;
                for_leaves(i * w.chunk, end, [&](int count, int valid, const Held<X, kItems>& h) {
                    entry.merge(scaled_moments<X>(count, valid, w.center, scale, origin, [&](int e) { return h[e]; }));
                });
                if ((i & (lanes - 1)) == (lane & (lanes - 1))) mine.merge(entry);
            }
            m = merge_lanes(mine, lanes, lane);
        }
        const Statistic statistic = statistic_of(m, origin, scale, w.eps);
        if (lane != 0) continue;
        write_statistic(w, set, statistic, m.M2 / scale / scale);
        if (w.statistics) static_cast<Split<T>*>(w.statistics)[set] = split<T>(statistic);
    }
}

// Statistics that are given, as kernels read them; a thread for each set.
template <class X>
NK_KERNEL(kBlock, 1)
void given_statistics(NK_WORK(Work) w) {
    for (index_t set = index_t{blockIdx.x} * blockDim.x + threadIdx.x; set < w.sets;
         set += index_t{gridDim.x} * blockDim.x) {
        static_cast<Split<Compute<X>>*>(w.statistics)[set] = given_split<X>(w, set);
    }
}

// A warp for each set: entries to cells, cells to the two means of the set.
template <class X>
NK_KERNEL(kBlock, 1)
void finish_sums(NK_WORK(Work) w) {
    const int lane = threadIdx.x % kWarp;
    const index_t cells = w.cells.divisor, per_block = blockDim.x / kWarp;
    for (index_t set = blockIdx.x * per_block + threadIdx.x / kWarp; set < w.sets; set += gridDim.x * per_block) {
        NORMKIT_ROLLED
        for (index_t c = 0; c < cells; ++c) {
            const Pair<double> sum = add_entries(w.entries.divisor, lane,
                                                 [&](index_t i) { return w.sums[entry_place(w, set * cells + c, i)]; });
            if (lane == 0) w.cell_sums[set * cells + c] = sum;
        }
        warp_barrier();
        const Pair<double> sum = add_entries(
            cells, lane, [&](index_t c) { return weighted_cell<X>(w, set, c, w.cell_sums[set * cells + c]); });
        if (lane == 0) static_cast<Pair<Compute<X>>*>(w.set_sums)[set] = set_means<X>(w, sum);
    }
}

// Gradients of parameters where neither walk comes by them: a team of w.height threads sums the elements of one. Here
// axis[0, kept) tells parameters apart and axis[kept, axes) is summed. Shared memory: Pair<double> for each warp.
template <class X>
NK_KERNEL(kBlock, 1)
void sum_parameters(NK_WORK(Work) w, NK_WORK(Fold) fold) {
    using T = Compute<X>;
    Pair<double>* const parts = reinterpret_cast<Pair<double>*>(shared_memory());
    const int per_block = blockDim.x / w.height, team = threadIdx.x / w.height, rank = threadIdx.x % w.height;
    for (index_t first = index_t{blockIdx.x} * per_block; first < fold.parameters;
         first += index_t{gridDim.x} * per_block) {
        const index_t p = first + team;
        Pair<double> sum{0, 0};
        if (p < fold.parameters) {
            const char* const x = w.x + set_offset<kX>(w, p);
            const char* const dy = w.dy + set_offset<kDy>(w, p);
            const index_t set = set_offset<kSet>(w, p);
            for (index_t e = rank; e < fold.summands; e += w.height) {
                const Split<T> s = static_cast<const Split<T>*>(w.statistics)[set + element_offset<kSet>(w, e)];
                const double g = static_cast<double>(Lanes<X>::load(dy + element_offset<kDy>(w, e)));
                sum.g += g;
                sum.g_xhat += g * static_cast<double>(xhat_of(Lanes<X>::load(x + element_offset<kX>(w, e)), s));
            }
        }
        if (w.height >= kWarp) sum = {warp_sum(sum.g), warp_sum(sum.g_xhat)};
        if (w.height > kWarp) {  // one team to a block
            if (rank % kWarp == 0) parts[rank / kWarp] = sum;
            block_barrier();
            sum = {0, 0};
            for (int i = 0; i < w.height / kWarp; ++i) {
                sum.g += parts[i].g;
                sum.g_xhat += parts[i].g_xhat;
            }
            block_barrier();
        }
        if (rank != 0 || p >= fold.parameters) continue;
        const index_t to = set_offset<kGradient>(w, p);
        if (fold.dweight)
            store_any(fold.dweight + to * size_on_device(fold.dweight_dtype), fold.dweight_dtype, sum.g_xhat);
        if (fold.dbias) store_any(fold.dbias + to * size_on_device(fold.dbias_dtype), fold.dbias_dtype, sum.g);
    }
}

// Gradients of parameters from partial sums: 32 parameters by 32 threads, which take every 32nd summand; then these in
// order. Shared memory: Pair<double>[32][33].
template <class T>
NK_KERNEL(1024, 1)
void fold_parameters(NK_WORK(Fold) fold) {
    Pair<double>* const parts = reinterpret_cast<Pair<double>*>(shared_memory());
    const int x = threadIdx.x % kWarp, y = threadIdx.x / kWarp;
    const auto place = [&](int begin, int end, index_t i, bool gradient) {
        index_t at = 0;
        NORMKIT_ROLLED
        for (int k = end - 1; k >= begin; --k) {
            const index_t q = fold.axis[k].extent.quotient(i);
            at += (i - q * fold.axis[k].extent.divisor) * (gradient ? fold.axis[k].gradient : fold.axis[k].entry);
            i = q;
        }
        return at;
    };
    for (index_t first = index_t{blockIdx.x} * kWarp; first < fold.parameters; first += index_t{gridDim.x} * kWarp) {
        const index_t p = first + x;
        Pair<double> sum{0, 0};
        if (p < fold.parameters) {
            const Pair<T>* const from = static_cast<const Pair<T>*>(fold.from) + place(0, fold.index, p, false);
            NORMKIT_UNROLL_BY(4)
            for (index_t i = y; i < fold.summands; i += kWarp) {
                const Pair<T> part = from[place(fold.index, fold.axes, i, false)];
                sum.g += static_cast<double>(part.g);
                sum.g_xhat += static_cast<double>(part.g_xhat);
            }
        }
        parts[y * (kWarp + 1) + x] = sum;
        block_barrier();
        if (y == 0 && p < fold.parameters) {
            sum = {0, 0};
            for (int i = 0; i < kWarp; ++i) {
                sum.g += parts[i * (kWarp + 1) + x].g;
                sum.g_xhat += parts[i * (kWarp + 1) + x].g_xhat;
            }
            const index_t to = place(0, fold.index, p, true);
            if (fold.dweight)
                store_any(fold.dweight + to * size_on_device(fold.dweight_dtype), fold.dweight_dtype, sum.g_xhat);
            if (fold.dbias) store_any(fold.dbias + to * size_on_device(fold.dbias_dtype), fold.dbias_dtype, sum.g);
        }
        block_barrier();
    }
}

NK_KERNEL(kBlock, 1) void pack_parameter(NK_WORK(Pack) pack) {
    for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < pack.count;
         i += index_t{gridDim.x} * blockDim.x) {
        index_t at = 0, rest = i;
        NORMKIT_ROLLED
        for (int k = pack.axes - 1; k >= 0; --k) {
            const index_t q = pack.axis[k].extent.quotient(rest);
            at += (rest - q * pack.axis[k].extent.divisor) * pack.axis[k].stride;
            rest = q;
        }
        const double v = load_any(pack.from + at, pack.dtype);
        if (pack.to_double) {
            static_cast<double*>(pack.to)[i] = v;
        } else {
            static_cast<float*>(pack.to)[i] = static_cast<float>(v);
        }
    }
}

// running = (1 - momentum) * running + momentum * new, the new variance divided by n - ddof. Instance norm averages
// over the samples.
NK_KERNEL(kBlock, 1) void update_running(NK_WORK(Running) r) {
    for (index_t c = index_t{blockIdx.x} * blockDim.x + threadIdx.x; c < r.channels;
         c += index_t{gridDim.x} * blockDim.x) {
        double mean = 0, var = 0;
        for (index_t n = 0; n < r.samples; ++n) {
            mean += r.new_mean[n * r.channels + c] / static_cast<double>(r.samples);
            var += r.new_M2[n * r.channels + c] / (static_cast<double>(r.set_size) - r.ddof) /
                   static_cast<double>(r.samples);
        }
        const double old = 1 - r.momentum;
        char *const to_mean = r.mean + c * r.mean_stride, *const to_var = r.var + c * r.var_stride;
        store_any(to_mean, r.mean_dtype, old * load_any(to_mean, r.mean_dtype) + r.momentum * mean);
        store_any(to_var, r.var_dtype, old * load_any(to_var, r.var_dtype) + r.momentum * var);
    }
}

// The statistics of an evaluation: every sample has those of its channels.
NK_KERNEL(kBlock, 1) void use_running(NK_WORK(Running) r) {
    const index_t count = r.channels * r.samples;
    for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += index_t{gridDim.x} * blockDim.x) {
        const index_t c = i % r.channels;
        const double var = load_any(r.var + c * r.var_stride, r.var_dtype);
        r.out_mean[i] = load_any(r.mean + c * r.mean_stride, r.mean_dtype);
        // A negative variance would, with a larger eps, look like one that is right.
        r.out_rstd[i] = var < 0 ? as_double(0, 0x7ff80000u) : 1 / std::sqrt(var + r.eps);
    }
}

NK_KERNEL(kBlock, 1) void fill_with_nan(NK_WORK(Fill) fill) {
    for (index_t i = index_t{blockIdx.x} * blockDim.x + threadIdx.x; i < fill.count;
         i += index_t{gridDim.x} * blockDim.x) {
        NORMKIT_ROLLED
        for (int k = 0; k < 3; ++k) {
            if (fill.to[k]) fill.to[k][i] = as_double(0, 0x7ff80000u);
        }
    }
}

}  // namespace normkit::cuda
