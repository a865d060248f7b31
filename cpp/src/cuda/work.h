// What a kernel is told: memory, the split of every sum, and where in the workspace partial results lie. Plain data,
// filled by the planner (launch.cpp) and passed by value.
//
// The elements of a set are numbered 0 to set_size - 1 in the order of the plan. A *leaf* is a piece of them that the
// 32 lanes of one warp hold in registers. An *entry* is the sum of one leaf or, in sets of more than kMostEntries
// leaves, of several one after another. A *cell* is the part of a set with one weight; entries don't cross it. All this
// follows from shape, strides and dtype, so bits don't depend on which kernel computes a leaf, on which multiprocessor,
// nor when.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../formula.h"
#include "../nest.h"

namespace normkit::cuda {

constexpr int kWarp = 32;
constexpr int kMostEntries = 1024;  // of a cell: 32 for each lane of the warp that merges them
constexpr int kHeldWarps = 8;       // of a set whose leaves are held in registers, one in each
constexpr int kBlock = 256;         // threads of the kernels that are not told otherwise

// Accesses are of 16 bytes: so many elements.
template <class X>
constexpr int kVector = 16 / int{sizeof(X)};
// Vectors of a leaf that a lane holds: 1,024 elements a leaf for moments, 512 of float64 (64 or 32 registers of 4
// bytes would not leave room for 1,024 threads); half as many for the backward sums, which hold x and dy.
template <class X>
constexpr int kLeafItems = sizeof(X) == 2 ? 4 : 8;
template <class X>
constexpr int kSumItems = kLeafItems<X> / 2;
// Warps of a resident set: registers of a thread are limited to 128, or 255 where two make a number.
template <class X>
constexpr int kMostWarps = sizeof(X) == 8 ? 8 : 16;
constexpr int kColumnRows = 8;  // rows of a leaf in the columns walk: one lane of it is in one thread

// Division by a constant, without a branch: Granlund and Montgomery, "Division by invariant integers using
// multiplication" (1994), fig. 4.1, for numerators below 2^63, where the sum can't overflow.
struct Division {
    __extension__ using Wide = unsigned __int128;

    index_t divisor = 1;
    std::uint64_t multiplier = 1;
    index_t shift = 0;

    Division() = default;
    explicit Division(index_t d) : divisor(d) {
        while ((std::uint64_t{1} << shift) < static_cast<std::uint64_t>(d)) ++shift;
        const Wide rest = (std::uint64_t{1} << shift) - static_cast<std::uint64_t>(d);
        multiplier = static_cast<std::uint64_t>((rest << 64) / static_cast<Wide>(d)) + 1;
    }
    NORMKIT_HOST_DEVICE index_t quotient(index_t n) const {
        const std::uint64_t numerator = static_cast<std::uint64_t>(n);
#if defined(__CUDA_ARCH__)
        const std::uint64_t high = __umul64hi(numerator, multiplier);
#else
        const std::uint64_t high = static_cast<std::uint64_t>(static_cast<Wide>(numerator) * multiplier >> 64);
#endif
        return static_cast<index_t>((high + numerator) >> shift);
    }
    NORMKIT_HOST_DEVICE index_t remainder(index_t n) const { return n - quotient(n) * divisor; }
};

struct Line {  // an axis
    Division extent;
    index_t stride[kOperands];
};

// How a thread comes by the weight (bias) of the elements it holds.
enum class Reading : int {
    absent,
    uniform,  // one for the whole vector
    vector,   // in 128-bit accesses
    element,
};
struct Parameter {
    const char* data;
    Reading reading;
    bool arithmetic;  // of the type of arithmetic, else of x's
};

template <class T>
struct alignas(2 * sizeof(T)) Pair {
    T g, g_xhat;
};
// Moments of an entry; how many elements it has, the geometry says.
struct alignas(16) Partial {
    double mean, M2;
};

struct Work {
    // axis[0, kept): where set s lies; axis[kept, axes): the elements of a set. Columns: the last of the kept axes are
    // groups of lanes, the last of all the lanes of a group, and what is between are rows.
    Line axis[kMaxAxes + 2];
    int kept, axes;

    const char* x;
    const char* dy;
    char* y;  // dx in a backward pass; null: not wanted
    Parameter weight, bias;
    double eps;
    double* mean;  // the caller's statistics: out, null where not wanted; in where they are given
    double* rstd;
    double* M2;
    bool center;
    bool constant_statistics;

    index_t sets, set_size;

    // Rows. packed: a lane holds 16 bytes of neighbours at a time (else neighbouring lanes hold neighbours): a matter
    // of extents. vector: and they are aligned, so they are one access: a matter of addresses too.
    bool packed, vector;
    bool weight_in_sums;  // cells have no one weight: the backward sums are of w * dy
    int leaf;             // elements
    int slots;            // vectors that a lane holds of the largest leaf
    Division leaves;      // of a cell
    index_t chunk;        // leaves of an entry

    // Entries, of rows and columns alike: entry i of cell c (cells are numbered through) is number
    // (c / lanes * entries + i) * lanes + c % lanes; it has entry_size elements, the last what is left of cell_size.
    Division cells;  // of a set
    index_t cell_step, cell_size, entry_size;
    Division entries;
    Division lanes;  // rows: 1

    // Columns: threads of a block along the lanes and down the rows; entries are of entry_size rows. lanes_packed and
    // lanes_vector: as above, of the lanes.
    bool lanes_packed, lanes_vector;
    int width, height;
    Division tiles;                   // blocks side by side
    bool weight_by_row, bias_by_row;  // the parameter is one for all lanes of a row

    // Resident rows: warps of a set; reload: it is read again, from the L2 cache, instead of being held. Sets that a
    // team of warps does one after another, summing their gradients by element; the same number of sets in rows_dx.
    int warps;
    bool reload;
    bool by_element;
    index_t sets_per_team;

    // In the workspace; what a call does not need is null.
    void* statistics;    // Split<T> of a set
    Partial* moments;    // of entries
    Pair<double>* sums;  // of entries
    Pair<double>* cell_sums;
    void* set_sums;      // Pair<T>: mean_g, mean_g_xhat of a set
    void* element_sums;  // Pair<T> of element e, summed over the sets of team t: [t * set_size + e]
};

// Gradients of parameters from cells, or from the partial sums of teams: parameter i adds up the entries that lie along
// axis[index, axes), in their order.
struct Fold {
    struct Line {
        Division extent;
        index_t gradient, entry;  // strides, in elements
    };
    Line axis[kMaxAxes + 2];
    int index, axes;
    index_t parameters, summands;
    const void* from;
    bool in_double;
    char* dweight;
    char* dbias;
    Dtype dweight_dtype, dbias_dtype;
};

// A parameter of neither x's dtype nor the type of arithmetic: to the latter.
struct Pack {
    struct Line {
        Division extent;
        index_t stride;
    };
    Line axis[kMaxAxes + 2];
    int axes;
    index_t count;
    const char* from;
    Dtype dtype;
    void* to;
    bool to_double;
};

// Running statistics, updated from the moments of a call or turned into the statistics of one.
struct Running {
    char* mean;
    char* var;
    Dtype mean_dtype, var_dtype;
    index_t mean_stride, var_stride;  // bytes
    index_t channels, samples, set_size;
    double momentum, ddof, eps;
    const double* new_mean;
    const double* new_M2;
    double* out_mean;  // evaluation: by statistic number
    double* out_rstd;
};

struct Fill {  // NaN in the statistics of nothing
    double* to[3];
    index_t count;
};

}  // namespace normkit::cuda
