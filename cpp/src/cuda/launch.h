// The planner: which kernels an operation launches, with what grid and memory. Plain host code that needs no CUDA.
//
// All that decides bits (leaves, entries, cells, teams; the family by walk) follows from the plan: extents, strides,
// dtype. The device decides what changes none: whether a set stays on the chip, which its shared memory allows, or is
// split.
#pragma once

#include "../operation.h"
#include "work.h"

namespace normkit::cuda {

struct Device {
    int multiprocessors = 132;
    index_t shared_bytes = 232448;  // of a block, the most that it can ask for
    index_t l2_bytes = 50 << 20;
};

#define NORMKIT_FOR_CUDA_KERNELS(ROW) \
    ROW(pack_weight)                  \
    ROW(pack_bias)                    \
    ROW(rows_forward)                 \
    ROW(rows_forward_shared)          \
    ROW(rows_moments)                 \
    ROW(rows_apply)                   \
    ROW(rows_backward)                \
    ROW(rows_backward_shared)         \
    ROW(rows_sums)                    \
    ROW(rows_dx)                      \
    ROW(columns_moments)              \
    ROW(columns_apply)                \
    ROW(columns_sums)                 \
    ROW(columns_dx)                   \
    ROW(finish_sets)                  \
    ROW(finish_sums)                  \
    ROW(given_statistics)             \
    ROW(fold_parameters)              \
    ROW(sum_parameters)               \
    ROW(update_running)               \
    ROW(use_running)                  \
    ROW(fill_with_nan)

enum class Kernel {
#define NORMKIT_ROW(name) name,
    NORMKIT_FOR_CUDA_KERNELS(NORMKIT_ROW)
#undef NORMKIT_ROW
};
const char* name_of(Kernel kernel);

struct Launch {
    Kernel kernel;
    index_t grid;
    int threads;
    index_t shared;  // bytes
};

struct Launches {
    Launch list[10];
    int count = 0;
    Work work;             // of every kernel but these:
    Pack pack[2];          // weight, bias
    Fold fold;             // fold_parameters, sum_parameters
    Work parameters_work;  // sum_parameters
    Running running;       // update_running, use_running
    Fill fill;             // fill_with_nan
    Dtype dtype;
    index_t workspace = 0;  // bytes
    index_t shared_bytes;   // what the device allows a block

    // The workspace has been allocated. Until then pointers into it are offsets.
    void place(char* workspace);

    void add(Kernel kernel, index_t grid, int threads, index_t shared = 0) {
        list[count++] = {kernel, grid, threads, shared};
    }
};

void plan_forward(const Plan& plan, const ForwardCall& call, const Device& device, Launches* out);
void plan_backward(const Plan& plan, const BackwardCall& call, const Device& device, Launches* out);

}  // namespace normkit::cuda
