// The table of kernels: what one instruction set and one dtype offer to the walks. A kernel works on a tile, a
// rectangle of rows x lanes whose lanes are contiguous in memory, and knows nothing of norms, axes or threads. x, y, dy
// and dx are elements X; w, b and the statistics are of the type that X is computed in.
//
//   along   the lanes of a row belong to one set   (rows walk: sums run along the lanes)
//   down    neighbouring lanes are different sets  (columns walk: sums run down the rows)
//
// A call covers a tile of thousands of elements, so that going through a function pointer costs nothing.
#pragma once

#include <cstdint>

#include "../dtype.h"
#include "../plan.h"

namespace normkit::cpu {

// A pair of backward sums: of g and of g * xhat.
struct Sums {
    double g = 0;
    double g_xhat = 0;

    Sums& operator+=(const Sums& more) {
        g += more.g;
        g_xhat += more.g_xhat;
        return *this;
    }
};

// Sums down the rows, one a lane, that more rows are added to; null: not wanted. fresh: there are none yet, and what
// lies there is not read. (Clearing it first is no matter of arithmetic: those stores wait behind results that go past
// the caches, and took a third of the backward pass of one row of 10^6.)
struct DownSums {
    double *g = nullptr, *g_xhat = nullptr;
    bool fresh = false;

    NORMKIT_HOST_DEVICE DownSums at(index_t lane) const { return g ? DownSums{g + lane, g_xhat + lane, fresh} : *this; }
};

// Where the gradients of w and b belong, as T, one a lane; null: not wanted.
struct Gradients {
    char *dweight = nullptr, *dbias = nullptr;

    NORMKIT_HOST_DEVICE Gradients at(index_t bytes) const {
        return {dweight ? dweight + bytes : nullptr, dbias ? dbias + bytes : nullptr};
    }
};

// Rows of bytes with a fixed distance. Lanes are contiguous.
template <class P>
struct Rows {
    P p = nullptr;
    index_t row = 0;  // bytes from one row to the next

    P at(index_t r) const { return p + r * row; }
};
using In = Rows<const char*>;
using Out = Rows<char*>;

constexpr index_t kLine = 64;  // bytes of a cache line

// Whether what is read next is best asked for to L1, and not to L2 (docs/decisions/0002-schedule.md, "To which cache").
extern const bool ahead_to_l1;

// Whether dx is best written beside the sums of what comes next also where that means more streams: from memory where
// L1 has no room for two rows, or sets wait in L2; and in L2 itself, of rows that fit beside (docs/decisions/
// 0002-schedule.md, "Row by row", "Results between other stores").
extern const bool dx_beside;

// Bytes of a row that begins and ends within lines from which on it goes past the caches: its ends are ordinary stores,
// a core waits for the line of each, and the non-temporal stores behind it wait too. Time with them over time without,
// rows 16 bytes past a line, layer norm forward and backward (one thread of a Zen 4): 128 lanes 2.0 and 1.7, 384 1.3
// and 0.95, 768 0.75 and 0.8.
constexpr index_t kLongRow = 3 * 1024;
// The same on the processor at hand: 512 bytes on an Intel. Time without over time with them, one thread of an Emerald
// Rapids: batch norm down rows with gaps, evaluation and backward, 50 lanes 0.87 and 0.85, 100 1.29 and 0.99, 200 2.15
// and 1.18, 300 3.0 and 1.2 to 1.34, 1,000 3.0 and 1.25 to 1.37; backward in NCHW 128 x 64 x 23^2 1.6, 27^2 1.7.
extern const index_t least_ragged_row;

NORMKIT_HOST_DEVICE bool on_line(const char* p) { return reinterpret_cast<std::uintptr_t>(p) % kLine == 0; }
template <class P>
NORMKIT_HOST_DEVICE bool on_lines(Rows<P> a) {
    return on_line(a.p) && a.row % kLine == 0;
}

// Whether the vectors of rows that are written past the caches begin where lines of x do, behind the first lanes of a
// row, and not with the row. Between such stores each load that crosses a line takes some cycles more, also in L1: time
// with loads that do over time without, rows 16 bytes past a line (one thread of a Zen 5): rms norm 4096 x 1023 1.3,
// its backward pass 1.1; layer norm 4096 x 768 0.92 if stores lie on lines, else 1.1; backward 6272 x 256 0.8. If
// stores lie on lines, also: float16 512 x 4096 0.9 (twice as many shuffles for the bytes); 8192 x 4096 rms norm 0.9,
// layer norm 1.08, backward 1.06.
NORMKIT_HOST_DEVICE bool begins_on_lines(In x, Out y, index_t bytes, std::size_t element) {
    if (on_lines(x)) return false;
    return on_lines(y) ? bytes >= 3584 && bytes <= 8192 && element >= 4 && x.row % kLine == 0 : bytes >= 2048;
}

// Lanes of a part where a row of more than `most` is cut into even parts, each a multiple of `piece`: of 64 lanes,
// which are whole cache lines whatever the element. They are at most `most` if that is such a multiple too.
NORMKIT_HOST_DEVICE index_t lanes_of_part(index_t lanes, index_t most, index_t piece = 64) {
    if (lanes <= most) return lanes;
    const index_t parts = (lanes + most - 1) / most;
    return ((lanes + parts - 1) / parts + piece - 1) / piece * piece;
}

// Leaves of one shape at one distance: `leaves` of them, `leaf` bytes apart, each `rows` runs of `lanes` contiguous
// elements. Preconditions: 1 <= rows * ceil(lanes / kStep) <= kLeafSteps; where there are several rows, all series of a
// call have as many lanes.
// float64: the means are less the origin, an element of the set; origin.at(i) is where that of leaf i lies. Other
// dtypes don't look at it.
struct LeafSeries {
    In x, origin;
    index_t rows = 0, lanes = 0, leaf = 0, leaves = 0;
};

// Leaves of a series, at most, that backward sums take side by side where their runs lie so.
constexpr index_t kSideBySide = 64;

// The same of a backward pass. Leaf i has the statistics number set + i * next_set, and w is the same for all.
struct SumSeries {
    In dy, x, w;
    index_t rows = 0, lanes = 0, leaf_dy = 0, leaf_x = 0, leaves = 0;
    index_t set = 0, next_set = 0;
};

// What the formula needs to know of each set, in the data's dtype: x is centred as (x - hi) - lo, because a mean
// rounded to one T costs |mean| / std half-ulps (docs/decisions/0001-reductions.md). In `along` kernels one entry a row
// (`row` elements apart: 0 when all rows are of one set), in `down` kernels one entry a lane or one a row.
template <class T>
struct Statistics {
    const T* hi = nullptr;
    const T* lo = nullptr;
    const T* rstd = nullptr;
    const T* mean_g = nullptr;       // backward: mean of g over the set
    const T* mean_g_xhat = nullptr;  // backward: mean of g * xhat over the set
    index_t row = 0;
};

// The beginning of a vector in memory that waits for its end: where rows that are written past the caches begin and end
// within vectors, the end of one and the beginning of the next make one store. `bytes` of it are there; they belong to
// `at`.
struct Seam {
    alignas(64) char vector[64];
    char* at = nullptr;
    index_t bytes = 0;
};

// A tile that is written a little at a time, beside other work: the arguments of apply_along, or, if there is a dy, of
// dx_along (to y), and where to go on.
template <class X>
struct Unwritten {
    In x;
    Out y;
    In w, b;
    Statistics<Compute<X>> s;
    index_t rows = 0, lanes = 0;
    bool stream = false, far = false;             // far: what is summed beside comes from memory;
    bool beyond_l3 = false;                       // nor has any L3 room for it
    bool lines = false;                           // all rows of y, of tiles that come next too, begin on lines
    bool in_step = true;                          // a row may be written beside the leaves of one row, to its end
    bool w_lane = false;                          // w, b: one a row, or one a lane,
    bool w_constant = false, b_constant = false;  // of which one vector may stand for all
    index_t row = 0, lane = 0;
    Seam* seam = nullptr;  // whoever has written the last row stores what is left of it
    // Puts the tile that comes next in the place of this one; false, or null: there is none. It has the same w_lane and
    // stream, and lies whole elements from this one.
    bool (*next)(void* writer) = nullptr;
    void* writer = nullptr;
    In dy{};

    bool done() const { return row == rows; }
};

// Whether dx of a row is best written beside the sums of the next, wherever they come from: while L1 has room for both,
// the sums down the lanes and w; of 16 bits always, since such rows are half as long, and their conversions are worth
// doing meanwhile. Time beside / in turn, rms norm of 2^24 elements (one thread of a Zen 5): rows of 1024 0.8,
// 1536 1.0, 2048 1.35, 4096 1.45, of 16 bits 0.65. On an Emerald Rapids (dx_beside) 3072 to 8192 0.8 to 0.86 from
// memory, but 4096 in L2 1.12.
NORMKIT_HOST_DEVICE bool fits_beside(index_t lanes, index_t element) {
    return element == 2 || lanes * element <= 6 * 1024;
}

// Sets that are one row each, of at most kMostSums bytes, for a backward pass. The means that dx needs are computed on
// the way, to where s.mean_g and s.mean_g_xhat point.
constexpr index_t kMostSums = 32 * 1024;
template <class T>
struct BackwardRows {
    In dy, x, w;
    Out dx;
    Statistics<T> s;
    index_t rows = 0, lanes = 0;
    bool stream = false, far = false;  // far: dy and x come from memory, and what is read next is asked for
    bool center = true;
    DownSums sums;
    T *mean_g = nullptr, *mean_g_xhat = nullptr;
};

// Sets that are one row each, of at most kMostOfEight elements, forward. w, b: one a row, or one a lane. mean, rstd,
// M2: one a row, or null.
constexpr int kEight = 8;
constexpr index_t kMostOfEight = 1024;
template <class T>
struct ForwardEights {
    In x, w, b;
    Out y;
    index_t rows = 0, lanes = 0;
    bool w_lane = false, center = true;
    bool stream = false, far = false;  // far: x comes from memory, and what is read next is asked for
    double eps = 0;
    double *mean = nullptr, *rstd = nullptr, *M2 = nullptr;
};

// And backward, of half as many. w is one a lane; mean is null where there is none.
struct BackwardEights {
    In dy, x, w;
    Out dx;
    index_t rows = 0, lanes = 0;
    bool stream = false, far = false;
    const double *mean = nullptr, *rstd = nullptr;
    DownSums sums;
};

template <class X>
struct Kernels {
    using Element = X;
    using T = Compute<X>;

    // Moments of the leaves of n series, one after another.
    // center = false: moments about zero. far: they come from memory, and what is read next is asked for.
    void (*moments_along)(const LeafSeries* series, index_t n, bool center, bool far, Moments* out);

    // The same while `tile` is written, as far as that goes. Index: its w_lane, with which leaves have one run each.
    void (*moments_beside[2])(const LeafSeries* series, index_t n, bool center, Moments* out, Unwritten<X>& tile);

    // Adds `rows` rows to the moments of each lane, which have seen `seen` rows so far. `rows` may be any number, but
    // only the last call for a lane may bring one that is not a multiple of kLeafRows. origin: as above, one a lane.
    // far: x comes from memory, and the rows that follow are asked for.
    void (*moments_down)(In x, const T* origin, index_t rows, index_t lanes, index_t seen, bool center, bool far,
                         double* mean, double* M2);

    // y = ((x - hi) - lo) * rstd * w + b. Index 0: w, b are one value a row; 1: one a lane.
    // stream: non-temporal stores.
    void (*apply_along[2])(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes, bool stream);

    void (*apply_down[2])(In x, Out y, In w, In b, Statistics<T> s, index_t rows, index_t lanes, bool stream);

    // Sums of g = w * dy and g * xhat over the leaves of n series, n >= 1. Index: as above. far: as for moments, where
    // runs lie far apart.
    void (*sums_along[2])(const SumSeries* series, index_t n, Statistics<T> s, bool far, Sums* out);

    // The same with w one a row while `tile`, of dx, is written, as far as that goes.
    void (*sums_beside)(const SumSeries* series, index_t n, Statistics<T> s, Sums* out, Unwritten<X>& tile);

    // Adds to out[r] the sums of dy and dy * xhat over the lanes of row r, which are different sets: statistics are one
    // a lane. Precondition: lanes <= kLeafLanes.
    void (*sums_across)(In dy, In x, Statistics<T> s, index_t rows, index_t lanes, Sums* out);

    // dx = rstd * (w * dy - mean_g - xhat * mean_g_xhat).
    void (*dx_along[2])(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes, bool stream);

    // sums_along and dx_along, row by row, and the sums of dy and dy * xhat down the lanes; w is one a lane.
    // Precondition: rows <= kSumRows.
    void (*backward_rows)(const BackwardRows<T>& rows);

    // All of a pass over rows that are sets, eight at a time, as far as their statistics are plain (are_plain,
    // is_unscaled). They return how many rows have been done: a multiple of kEight, backward of kSumRows; of float64
    // none.
    index_t (*forward_in_eights)(const ForwardEights<T>& rows);
    index_t (*backward_in_eights)(const BackwardEights& rows);

    // Down the rows: dx, or the sums of each lane, or both in one reading. First index: statistics are one entry a row
    // (0) or a lane (1); second: w likewise. Sums alone (dx.p null) are of g = w * dy, as the mean over S wants; beside
    // dx they are of dy, as the gradient of w wants. stream: dx goes past the caches; for sums alone: dy and x come
    // from memory, and the rows that follow are asked for. Precondition for sums beside dx: rows <= kSumRows.
    void (*backward_down[2][2])(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes, DownSums sums,
                                bool stream);

    // dx, row by row, and the gradients of w and b, where these rows are all that share them: sums of so few rows are
    // what they would be rounded to. Statistics are one a row, w is one a lane. Precondition: 1 <= rows <= kSumRows.
    void (*backward_of_block)(In dy, In x, In w, Out dx, Statistics<T> s, index_t rows, index_t lanes, Gradients to,
                              bool stream);

    // n elements that follow each other, as T.
    void (*widen)(const char* from, index_t n, T* to);

    // n doubles, each rounded once, to the nearest number of X. stream: past the caches, if that is as wide as T.
    void (*narrow)(const double* from, index_t n, char* to, bool stream);

    // y = x: the yardstick of the benchmarks.
    void (*copy)(In x, Out y, index_t rows, index_t lanes, bool stream);
};

// One row of the list of instruction sets (isa.cpp), with its tables in the order of the dtypes.
struct Isa {
    const char* name;
    bool (*available)();
#define NORMKIT_ROW(dtype, element, arithmetic) const Kernels<element>* for_##dtype;
    NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW
};

template <class X>
const Kernels<X>& kernels_of(const Isa& isa) {
#define NORMKIT_ROW(dtype, element, arithmetic) \
    if constexpr (kDtype<X> == Dtype::dtype) return *isa.for_##dtype;
    NORMKIT_FOR_DTYPES(NORMKIT_ROW)
#undef NORMKIT_ROW
}

const Isa& isa_in_force();

}  // namespace normkit::cpu
