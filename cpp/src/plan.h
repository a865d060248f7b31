// The plan: how the elements of a problem are visited and summed. It follows from extents, strides and dtype alone, and
// so do the bits of every result. What may look at the machine is the schedule (schedule.h).
#pragma once

#include "norms.h"

namespace normkit {

// The shape of every reduction, the same for every instruction set (cpp/README.md, "Same bits"; measured reasons in
// docs/decisions/0001-reductions.md).
constexpr index_t kStep = 32;       // virtual lanes of a float reduction along a row
constexpr index_t kDepth = 16;      // additions in the data's dtype before a sum goes over to double
constexpr index_t kLeafSteps = 64;  // a leaf along a row: at most 64 steps, 2,048 elements
constexpr index_t kLeafLanes = kStep * kLeafSteps;
constexpr index_t kLeafRows = 2 * kDepth;  // a leaf of moments down the rows: two chains of squares
constexpr index_t kSumRows = kDepth;       // a leaf of backward sums down the rows: one chain

// Rows: a set is made of contiguous runs. Columns: neighbouring lanes belong to different sets.
enum class Walk { rows, columns };

struct Plan {
    Walk walk = Walk::rows;
    bool center = true;
    index_t sets = 1;      // number of means and variances
    index_t set_size = 1;  // elements that share one
    index_t total = 1;

    // Rows: set `s` is at kept.offsets(s); it has `runs.size()` runs of `run.size()` elements.
    // Columns: block `o` of lanes is at kept.offsets(o); its sets are lane.extent groups of merge.extent neighbouring
    // lanes, and `runs.size()` rows go down each. Set number: o * lane.extent + group.
    Nest kept;
    Nest runs;
    Nest run;    // rows
    Axis lane;   // columns
    Axis merge;  // columns
};

// A run of at least this many elements is walked as rows although other axes of the set lie outside it, and so are the
// images of batch norm and what else lies like them, however small: one distance apart, with those of other sets in
// between. Other runs that are shorter become lanes that are merged. So do the channels of a group (NHWC) if they are
// no more than kMostMerged: neighbouring groups are neighbours in memory, where neighbouring images of batch norm lie
// apart (docs/decisions/0002-schedule.md).
constexpr index_t kShortestRun = 48;
constexpr index_t kMostMerged = 256;

// Backward, where all pixels share their parameters, so do the channels of a single group in NHWC, no more than as
// many, if a set has so many pixels. Forward they don't: one group has the bits of layer norm over channels and pixels.
constexpr index_t kLeastPixels = 32;

Plan make_plan(const Problem& problem);

// The axes of sets that are one row each, as they lie in memory, whatever the order of their statistics (whose strides
// mean nothing here: they are found by the number of the set), in two parts: `rows`, of which the innermost is the one
// along which kernels take row after row, and what lies `inside` it. It is the innermost axis that is long enough, or
// else the longest: of the heads of attention, if they are few, the tokens.
struct SetRows {
    Nest rows, inside;

    explicit SetRows(const Nest& sets);
    const Axis& along() const { return rows.inner(); }
};
constexpr index_t kLongAxis = 32;  // docs/decisions/0002-schedule.md, "Short rows"

// Leaves of a reduction over `runs` runs of `run` elements: `rows` whole runs in a leaf where they are short, else
// `per_run` pieces of a run, of kLeafLanes elements but for the last.
struct Leaves {
    index_t runs, run;
    index_t rows = 1;
    index_t per_run = 1;

    Leaves(index_t runs, index_t run);
    index_t count() const { return rows > 1 ? (runs + rows - 1) / rows : runs * per_run; }
    // From a leaf to the next of the same shape, where runs are `row` apart and lanes `lane`.
    index_t step(index_t row, index_t lane) const { return per_run > 1 ? kLeafLanes * lane : rows * row; }
    struct Leaf {
        index_t first_run, rows, lane, lanes;
    };
    Leaf operator[](index_t i) const;
};

// Rows that are summed lane by lane (moments and sums of the columns walk, gradients of layer norm) are taken in at
// most 64 blocks, whose partial results are merged in order.
struct RowBlocks {
    index_t rows, block;
    RowBlocks(index_t rows, index_t least, index_t multiple);
    index_t count() const { return (rows + block - 1) / block; }
    index_t first(index_t i) const { return i * block; }
    index_t size(index_t i) const { return rows - first(i) < block ? rows - first(i) : block; }
};

}  // namespace normkit
