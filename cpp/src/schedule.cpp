#include "schedule.h"

#include <unistd.h>

#include <algorithm>

#include "cpu/kernels.h"

namespace normkit {
namespace {

// Less work than this for each thread costs more to hand out than it saves.
constexpr index_t kElementsPerThread = 16 * 1024;

// More threads than this help nobody, and an OpenMP library that can't start as many as it is asked for ends the
// process.
constexpr int kMostThreads = 1024;

// Bytes of all arrays of a call from which on they are taken to come from memory: what is read next is asked for, and
// results are written past the caches, if their rows are so long that whole cache lines are most of what is written.
// Measured, as what the system says of L3 is no guide where machines are shared: docs/decisions/0002-schedule.md.
enum class Writes {
    beside,  // a forward pass that writes one set beside the sums of another
    after,   // one that writes when all sums have been taken, or evaluation
    runs,    // the same, of sums over rows that are short or cut
    dx,
};
index_t far_bytes(Writes writes, int threads) {
    constexpr index_t kMiB = index_t{1} << 20;
    const bool one = threads == 1;  // two have more cache between them
    switch (writes) {
        case Writes::beside: return (one ? 8 : 24) * kMiB;
        case Writes::after: return (one ? 20 : 32) * kMiB;
        default: return (one ? 12 : 18) * kMiB;
    }
}
constexpr index_t kStreamRow = 32;

// Bytes of x and y together, for which no L3 has room. From then on rms norm writes its longest rows in parts (on
// several threads nothing is gained by it, and nothing lost), and sets of long runs are written beside mean and squares
// at once.
constexpr index_t kBeyondL3 = index_t{48} << 20;

// The samples that the threads have in hand, in the columns walk, if their second sweep is to find them in the
// last-level cache. Time with two sweeps of everything / sample by sample, one thread: group NHWC 2 x 64^2 x 320
// forward 1.0 to 1.15; instance NHWC 256 x 28^2 x 128 backward 1.12 to 1.15, 4 x 128^2 x 128 forward 1.0 to 1.1.
constexpr index_t kNearSamples = index_t{16} << 20;

// Larger samples, and those of which each thread has none to itself: both sweeps over as many as these bytes hold, then
// over the next, if there are so many turns. Time with two sweeps of everything over time so, one thread of a Zen 5;
// two: instance NHWC 8 x 256^2 x 64 backward 1.11; 1.08 to 1.15, forward (on one thread resident) 1.06 to 1.1, 4 x
// 128^2 x 128 backward -; 0.95 to 1.06, group NHWC 32 x 56^2 x 256 1.0 to 1.03. Of two samples nothing: what a call
// ends with, the next of the same arrays begins with, which a benchmark makes much of (2 x 64^3 x 32 0.98; 0.97).
constexpr index_t kTogether = index_t{16} << 20, kLeastTurns = 4;

// Bytes of a set of one row from which on it pays to do its sums beside the writing of another, as a rule where all of
// them come from beyond L2. More for a forward pass that is not written past the caches. Time row by row / in batches,
// float32: layer norm 25088 x 128 forward 0.7, backward 0.55 (two threads); 6272 x 256 backward 0.7, but forward 1.2;
// 4096 x 768 0.75. Backward on an Emerald Rapids (dx_beside) in L2 too, while rows fit beside: 8 x 768 to 700 x 768
// 0.75 to 0.95, on two threads 0.74 to 1.0; one to four rows 0.9 to 1.0; float16 0.85 to 1.0, float64 0.77 to 1.1.
constexpr index_t kLeastRow = 512, kLeastRowNear = 2048;

// Bytes of a row, backward, from which on L1 has no room for two rows of x and dy, the sums down the lanes and w. Up to
// the second, and of one leaf, sums of kSumRows rows and then their dx is faster. Time row by row over time so, one
// thread of a Zen 5; two: layer norm (rms norm is alike) of 1400 float32 1.0; 0.95, 1536 1.12; 1.02, 1600 1.27; 1.1,
// 1792 1.14, 2048 1.08; 1.09; float64 768 1.29, 1024 1.14, 1536 1.02, 2048 0.94. Longer float32 rows, of several
// leaves: 2500 0.82, 4096 0.8; 256 x 1536, in a cache, 0.95.
constexpr index_t kTooLongBeside = 5632, kTooLongInTurn = 8192;

// Bytes of a row, of all arrays that are read, beyond which it does not go eight at a time from memory: the rows in
// hand leave L1 between their readings. Rms norm backward, rows of 256 float32: 135 ns in place of 66 (one thread of a
// Zen 5).
constexpr index_t kFarEights = 1024;

// Elements of a row beyond which it is not in L2 any more when it is written.
constexpr index_t kLongestRow = index_t{1} << 16;

// Elements of a run, where a set has several. Those of batch norm, if shorter, are written as one (joins), which cannot
// be done beside: time beside / in turn, NCHW 14^2 1.2, 15^2 1.5, but 17^2 0.93. For runs of so many and less, what is
// done once a run costs more than is gained unless results go past the caches: group norm with runs of 8^2, 2 x 2560
// 1.25, 8 x 2560 1.14, 32 x 2560 0.93; of 14^2, 16 x 640 1.08; on two threads 1.14, 1.23, 1.0; 1.09; of 16^2, 2 x 1280
// 1.1, batch norm 8 x 128 x 16^2 1.2 (a Zen 5).
constexpr index_t kLeastRun = 256;

// Elements of a set of such runs, or what is done once a set costs more than that. Group norm, time beside / in turn,
// one thread of an Emerald Rapids: sets of 64 (512 x 512 x 4^2 in 32 groups) 1.7 (two threads 1.8), of 256 (512 x 128 x
// 8^2) 1.6; 1.7, of 400 (512 x 128 x 10^2) 2.4, of 576 1.3, of 1,024 0.95 to 1.16, of 1,280 0.96, of 1,568 (14^2) 1.1,
// of 2,560 0.9.
constexpr index_t kLeastSet = 2048;

// Elements of a run below which sums over several are short (Writes::runs).
constexpr index_t kShortRun = 64;

// Elements of a set.
constexpr index_t kLongSet = index_t{1} << 25;

// Whole rows where they are not too long, so that memory is read and written without gaps; else even parts of them, of
// whole sets and, where that can be, whole cache lines.
index_t lanes_of_unit(index_t all, index_t merge) {
    constexpr index_t kLines = 64;  // lanes that are whole cache lines, whatever the element
    index_t whole = merge;
    while (whole % kLines != 0 && whole <= kMostLanes / 4) whole *= 2;
    const index_t even = cpu::lanes_of_part(all, kMostLanes, whole);
    return even <= kMostLanes ? even : kMostLanes / merge * merge;
}

index_t l2_bytes() {
    static const index_t bytes = [] {
        long size = -1;
#if defined(_SC_LEVEL2_CACHE_SIZE)
        size = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
        return index_t{size > 0 ? size : 1 << 20};
    }();
    return bytes;
}

// Bytes of x from which on it pays to write one of several sets beside the sums of another: of one run each, or of
// several longer ones. The latter, time beside / in turn, one thread of a Zen 5; two: batch norm 8 x 64 x 28^2 (1.6 MB)
// 1.16; 1.12, 8 x 64 x 32^2 (2.1 MB) 1.18; 1.11, 4 x 40 x 64^2 (2.6 MB) 1.0; 1.0, 4 x 64 x 56^2 (3.2 MB) 0.96; 0.93, 32
// x 64 x 28^2 (6.4 MB) 0.73; 0.92.
index_t least_of_one_run(int threads) { return l2_bytes() / 2 * threads; }
index_t least_of_several(int threads) { return std::max(2 * l2_bytes(), least_of_one_run(threads)); }

bool set_is_row(const Plan& plan) { return plan.walk == Walk::rows && plan.runs.size() == 1; }

// Backward, whether parameters are one a row, not one an element (as RowsBackward goes about it): batch, instance,
// group.
bool by_cell(const Plan& plan, int arrays) {
    return arrays > 1 && (plan.run.n == 0 || plan.run.inner().stride[kGradient] == 0);
}

// Whether sums of one set can be taken beside the writing of another. Kernels take contiguous rows, with parameters
// that are one a row, or along rows that are sets; backward the latter of not too many bytes.
bool can_go_by_row(const Plan& plan, index_t element, int arrays) {
    if (plan.walk != Walk::rows || plan.run.n == 0) return false;
    const Nest run = collapse(plan.run, kElementOperands);
    const Axis& lanes = run.inner();
    if (lanes.extent > 1 && (lanes.stride[kX] != element || lanes.stride[kY] != element)) return false;
    if (lanes.extent > 1 && arrays > 1 && lanes.stride[kDy] != element) return false;
    if (arrays == 1 && lanes.stride[kWeight] == 0 && lanes.stride[kBias] == 0) return true;
    if (by_cell(plan, arrays)) return true;
    if (!set_is_row(plan) || run.n > 1) return false;
    if (arrays == 1) return lanes.extent <= kLongestRow;
    return lanes.extent * std::max(element, index_t{sizeof(float)}) <= cpu::kMostSums;
}

// Whether sets are short rows for the kernels that have eight in hand. Those want them at one distance; where few are,
// most would be left over. Backward, that they share their parameters too.
bool can_go_in_eights(const Plan& plan, index_t element, int arrays) {
    if (!set_is_row(plan) || element > 4 || plan.set_size * arrays > cpu::kMostOfEight) return false;
    if (plan.sets < kSumRows || collapse(plan.run, kElementOperands).n > 1 || by_cell(plan, arrays)) return false;
    Nest sets;
    for (int i = 0; i < plan.kept.n; ++i) {
        if (arrays == 1 || plan.kept.axis[i].stride[kGradient] == 0) sets.push(plan.kept.axis[i]);
    }
    return SetRows(sets).along().extent >= kSumRows;
}

// Non-temporal stores want whole vectors, which elements between multiples of their size never are: one kernel goes on
// from tile to tile.
bool lies_on_elements(const Plan& plan, index_t element) {
    const auto on_elements = [element](const Axis& a) { return a.extent == 1 || a.stride[kY] % element == 0; };
    for (const Nest* nest : {&plan.kept, &plan.runs, &plan.run}) {
        if (!std::all_of(nest->axis, nest->axis + nest->n, on_elements)) return false;
    }
    return on_elements(plan.lane) && on_elements(plan.merge);
}

// Whether rows that are written past the caches are written in parts, so that what is one a lane stays in L1: those of
// two leaves that differ in length, and of rms norm long ones. Not of 16 bits, nor where each part of a row would begin
// and end within a line, if there is not much of it. docs/decisions/0002-schedule.md, "Long rows".
bool parts_pay(const Plan& plan, index_t element, bool beyond_l3) {
    if (!set_is_row(plan) || element < 4) return false;
    constexpr index_t kLongEnough = 2560;
    const index_t lanes = plan.run.size();
    const bool whole_lines = plan.kept.inner().stride[kY] % cpu::kLine == 0;
    if (!plan.center) return lanes >= 2 * kLeafLanes && whole_lines && beyond_l3;
    return lanes > kLeafLanes && lanes < 2 * kLeafLanes && (whole_lines || lanes >= kLongEnough);
}

// Whether it pays to take the sums of one set beside the writing of another.
bool beside_pays(const Plan& plan, index_t element, int arrays, index_t all, int threads) {
    const Nest run = collapse(plan.run, kElementOperands);
    const index_t bytes = plan.total * element;
    if (by_cell(plan, arrays)) {
        // Sets that wait in L2 meanwhile. Several runs of 16 bits are better off in turn, and those of up to 256
        // elements, which are summed in the order of memory; single short ones if not all come from memory
        // (docs/decisions/0002-schedule.md, "Row by row", with the measurements).
        if (!cpu::dx_beside || all < far_bytes(Writes::dx, threads)) return false;
        if (plan.set_size * arrays * element > l2_bytes() * 3 / 8) return false;
        const index_t lanes = run.inner().extent;
        if (!set_is_row(plan)) return lanes > kLeastRun && element >= 4;
        return lanes > kLeastRun || (lanes >= kStreamRow && all >= 2 * kBeyondL3);
    }
    if (set_is_row(plan) && run.n == 1) {
        // In a cache, layer norm's rows that are too long for eight at a time are better off in turn, four of them
        // sharing the loads of w and b. Time beside / in turn, x of 1 to 4 MB, one thread of a Zen 5; two: 1100 float32
        // 1.15; -, 1280 1.06 to 1.16; 1.07 to 1.24, 1600 1.06 to 1.27; 0.94 to 1.34, 2048 1.3; 1.08 to 1.35, 4096 1.35;
        // 1.29 to 1.43, 8192 1.2; 1.2 to 1.4; float16 1280 to 4096 1.03 to 1.15; without w and b 0.95 to 1.05; rms norm
        // 1280 to 3072 0.9 to 1.05, 4096 1.15, 8192 0.9.
        const bool per_lane = run.inner().stride[kWeight] != 0 || run.inner().stride[kBias] != 0;
        const bool in_cache = arrays == 1 && all < far_bytes(Writes::beside, threads);
        if (in_cache && plan.center && per_lane && plan.set_size > cpu::kMostOfEight) return false;
        const index_t least = in_cache ? kLeastRowNear : kLeastRow, row = plan.set_size * element;
        const bool too_long = !cpu::dx_beside && arrays > 1 && row > kTooLongBeside && row <= kTooLongInTurn &&
                              plan.set_size <= kLeafLanes && all >= far_bytes(Writes::dx, threads);
        const bool in_l2_too = cpu::dx_beside && arrays > 1 && cpu::fits_beside(plan.set_size, element);
        return (in_l2_too || bytes > least_of_one_run(threads)) && row >= least && !too_long;
    }
    if (plan.run.size() < kLeastRun) return false;
    if (run.inner().extent <= kLeastRun) return plan.set_size >= kLeastSet && all >= far_bytes(Writes::after, threads);
    return bytes > least_of_several(threads);
}

// Whether runs are short, but those of neighbouring sets are written as one. Speed past the caches over speed with
// ordinary stores, batch norm forward, backward, evaluation, one thread of an Emerald Rapids; two: 4096 x 128 x
// 4^2 1.49, 1.29, 1.73; 1.36, 1.27, 1.47, 4000 x 512 x 2^2 1.32, 1.16, 1.98; 1.26, 1.19, 1.50, 512 x 512 x
// 5^2 1.44, 1.04, 1.51; 1.25, 0.97, 1.29.
bool short_images(const Plan& plan, index_t element) {
    if (plan.walk != Walk::rows || plan.runs.size() == 1) return false;
    const Axis& next = plan.kept.inner();
    const index_t run = plan.run.size();
    return next.stride[kY] == run * element && run * next.extent >= kStreamRow;
}

// Whether the rows of the columns walk follow each other in all arrays and have their parameters in common: however
// short, kernels write several as one. docs/decisions/0002-schedule.md, "Down the rows".
bool rows_follow(const Plan& plan, index_t row_bytes, int arrays) {
    if (plan.walk != Walk::columns || plan.runs.n == 0) return false;
    const index_t* const stride = plan.runs.inner().stride;
    return stride[kX] == row_bytes && stride[kY] == row_bytes && (arrays == 1 || stride[kDy] == row_bytes) &&
           stride[kWeight] == 0 && (arrays > 1 || stride[kBias] == 0);
}

bool choose(int forced, bool automatic) { return forced < 0 ? automatic : forced != 0; }

}  // namespace

Schedule make_schedule(const Plan& plan, index_t element, int arrays, bool write, bool in_place, bool given) {
    const Choices& forced = this_thread_choices();
    Schedule s;
    const index_t most = plan.total / kElementsPerThread;
    s.threads = get_num_threads();
    if (s.threads > kMostThreads) s.threads = kMostThreads;
    if (s.threads > most) s.threads = most < 1 ? 1 : static_cast<int>(most);

    if (plan.walk == Walk::rows) {
        // A set belongs to one thread unless that leaves threads without work, or it is so long that its elements are
        // in no cache when it is read again; then a call can be interrupted between its pieces.
        const bool uneven = plan.sets < s.threads || (plan.sets < 4 * s.threads && plan.sets % s.threads != 0);
        s.split = choose(forced.split, (s.threads > 1 && uneven) || plan.set_size >= kLongSet);
        s.resident = choose(forced.resident, true) && !s.split;
    } else {
        // Resident only with all lanes of a sample at once: a few lanes of many rows lie a power of two apart more
        // often than not, share the same few sets of the cache and do not stay there.
        const index_t merge = plan.merge.extent, lanes = plan.lane.extent * merge;
        s.lanes = lanes_of_unit(lanes, merge);
        const index_t units = plan.kept.size() * ((lanes + s.lanes - 1) / s.lanes);
        const bool near = plan.runs.size() * lanes * arrays * element * s.threads <= kNearSamples;
        const bool even = units % s.threads == 0 || units >= 4 * s.threads;
        s.resident = choose(forced.resident, near && even) && forced.split != 1;
        s.split = !s.resident;
        const index_t samples = plan.kept.size();
        s.samples = std::max(index_t{1}, kTogether / std::max(index_t{1}, plan.total / samples * arrays * element));
        // Forced, in some turns too, of more than one sample if there are so many.
        if (forced.by_sample == 1) s.samples = (samples + kLeastTurns - 1) / kLeastTurns;
        s.by_sample = !s.resident && !given && choose(forced.by_sample, write && samples >= kLeastTurns * s.samples);
        if (!s.by_sample) s.samples = samples;
    }
    const index_t all = plan.total * element * (arrays + (write ? 1 : 0));
    const bool in_eights = can_go_in_eights(plan, element, arrays);
    const bool worth = in_eights || beside_pays(plan, element, arrays, all, s.threads);
    s.by_row = can_go_by_row(plan, element, arrays) && write && !given && s.resident && choose(forced.by_row, worth);
    const index_t row = plan.walk == Walk::rows ? plan.run.size() : plan.lane.extent * plan.merge.extent;
    const bool in_short_runs = plan.walk == Walk::rows ? row < kShortRun : s.lanes < row;
    const Writes writes = arrays > 1                ? Writes::dx
                          : s.by_row                ? Writes::beside
                          : in_short_runs && !given ? Writes::runs
                                                    : Writes::after;
    s.far = choose(forced.stream, all >= far_bytes(writes, s.threads));
    s.in_eights = s.by_row && in_eights && (!s.far || plan.set_size * element * arrays <= kFarEights);
    s.stream = choose(forced.stream, write && !in_place && s.far &&
                                         (row >= kStreamRow || short_images(plan, element) ||
                                          rows_follow(plan, row * element, arrays))) &&
               lies_on_elements(plan, element);
    s.beyond_l3 = choose(forced.stream, all >= kBeyondL3);
    s.in_parts = s.by_row && s.stream && arrays == 1 && parts_pay(plan, element, s.beyond_l3);
    return s;
}

}  // namespace normkit
