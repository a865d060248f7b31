#include "plan.h"

namespace normkit {
namespace {

index_t magnitude(index_t v) { return v < 0 ? -v : v; }

// The axes longer than 1 in the order of x's memory, outermost first. A broadcast axis (stride 0) says nothing about
// that order and stays beside the neighbours that the order of dimensions gives it.
Nest in_memory_order(const Nest& axes) {
    Nest out;
    for (int i = 0; i < axes.n; ++i) {
        if (axes.axis[i].extent == 1) continue;
        const index_t stride = magnitude(axes.axis[i].stride[kX]);
        int place = out.n;
        for (int j = out.n - 1; j >= 0 && stride != 0; --j) {
            const index_t other = magnitude(out.axis[j].stride[kX]);
            if (other == 0) continue;
            if (other >= stride) break;
            place = j;
        }
        for (int j = out.n; j > place; --j) out.axis[j] = out.axis[j - 1];
        out.axis[place] = axes.axis[i];
        ++out.n;
    }
    return out;
}

// Whether the runs of a set lie one distance apart, with those of the kept axes from number `kept_begin` on in between.
// What is kept outside all that is reduced does not count: of one sample alone, it is gone.
bool lie_as_images(const Nest& axes, int kept_begin) {
    int i = 0;
    while (i < kept_begin && !axes.axis[i].reduced) ++i;
    Nest outside;
    for (; i < kept_begin && axes.axis[i].reduced && !axes.axis[i].grouped; ++i) outside.push(axes.axis[i]);
    return i == kept_begin && collapse(outside, bit(kX)).n == 1;
}

// Backward of group norm with one group in NHWC, a set being one run of so many elements: whether each of its pixels is
// taken for a row of channels, as with several groups.
bool goes_by_pixels(const Nest& axes, int run_begin, index_t run) {
    if (run_begin >= axes.n - 1) return false;
    const Axis& channels = axes.inner();
    return channels.grouped && channels.stride[kGradient] != 0 && channels.extent <= kMostMerged &&
           run >= kLeastPixels * channels.extent;
}

}  // namespace

Plan make_plan(const Problem& problem) {
    Plan plan;
    plan.center = problem.center;
    Nest axes = in_memory_order(problem.axes);
    for (int i = axes.n - 1; i >= 0; --i) {
        Axis& a = axes.axis[i];
        if (!a.reduced) a.stride[kSet] = plan.sets;
        (a.reduced ? plan.set_size : plan.sets) *= a.extent;
    }
    plan.total = plan.sets * plan.set_size;

    // The innermost group of reduced axes, and whether there are kept and then again reduced axes outside it.
    int run_begin = axes.n;
    while (run_begin > 0 && axes.axis[run_begin - 1].reduced) --run_begin;
    index_t run = 1;
    for (int i = run_begin; i < axes.n; ++i) run *= axes.axis[i].extent;
    int kept_begin = run_begin;
    while (kept_begin > 0 && !axes.axis[kept_begin - 1].reduced) --kept_begin;
    const bool reduced_outside = kept_begin > 0;

    const bool by_pixels = !reduced_outside && goes_by_pixels(axes, run_begin, run);
    if (by_pixels) run_begin = axes.n - 1;
    // Sets of one element (batch norm of one vector) are columns of one row.
    const bool channels = run_begin == axes.n - 1 && axes.axis[run_begin].grouped && run <= kMostMerged;
    const bool rows = run_begin < axes.n && !by_pixels &&
                      (!reduced_outside || (!channels && (run >= kShortestRun || lie_as_images(axes, kept_begin))));
    plan.walk = rows ? Walk::rows : Walk::columns;

    if (plan.walk == Walk::rows) {
        for (int i = 0; i < axes.n; ++i) {
            const Axis& a = axes.axis[i];
            (i >= run_begin ? plan.run : a.reduced ? plan.runs : plan.kept).push(a);
        }
        plan.kept = collapse(plan.kept, kElementOperands | bit(kStatistic) | bit(kSet));
        return plan;
    }
    // Lanes are the innermost kept axis as far as it is one for every operand; the short run inside it is merged. A
    // run of several axes that are not one in memory keeps its innermost axis; the others only change where a lane is.
    Nest kept, merge;
    for (int i = 0; i < axes.n; ++i) {
        const Axis& a = axes.axis[i];
        (i >= run_begin ? merge : a.reduced ? plan.runs : kept).push(a);
    }
    merge = collapse(merge, kElementOperands);
    if (merge.n > 1) {  // several short reduced axes: walk the outer ones as rows
        for (int i = 0; i < merge.n - 1; ++i) plan.runs.push(merge.axis[i]);
    }
    plan.merge = merge.inner();
    kept = collapse(kept, kElementOperands | bit(kStatistic) | bit(kSet));
    if (by_pixels) kept.push(Axis{});  // the group
    plan.lane = kept.inner();
    plan.kept = kept.without_inner();
    return plan;
}

SetRows::SetRows(const Nest& sets) {
    if (sets.n == 1) {
        rows = sets;
        return;
    }
    const Nest axes = collapse(sets, kElementOperands | bit(kSet));
    int along = axes.n - 1;
    for (int i = axes.n - 2; i >= 0 && axes.axis[along].extent < kLongAxis; --i) {
        if (axes.axis[i].extent > axes.axis[along].extent) along = i;
    }
    for (int i = 0; i < axes.n; ++i) (i <= along ? rows : inside).push(axes.axis[i]);
}

Leaves::Leaves(index_t runs_, index_t run_) : runs(runs_), run(run_) {
    const index_t steps = (run + kStep - 1) / kStep;
    if (steps > kLeafSteps) {
        per_run = (run + kLeafLanes - 1) / kLeafLanes;
    } else if (steps > 0) {
        rows = kLeafSteps / steps;
    }
}

Leaves::Leaf Leaves::operator[](index_t i) const {
    if (rows > 1) {
        const index_t first = i * rows;
        return {first, runs - first < rows ? runs - first : rows, 0, run};
    }
    const index_t lane = i % per_run * kLeafLanes;
    return {i / per_run, 1, lane, run - lane < kLeafLanes ? run - lane : kLeafLanes};
}

RowBlocks::RowBlocks(index_t rows_, index_t least, index_t multiple) : rows(rows_), block((rows_ + 63) / 64) {
    if (block < least) block = least;
    block = (block + multiple - 1) / multiple * multiple;
}

}  // namespace normkit
