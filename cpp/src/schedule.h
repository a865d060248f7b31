// The schedule: how a plan is carried out on this machine. It may look at caches and threads; it never changes a bit.
#pragma once

#include "plan.h"

namespace normkit {

// Lanes of a unit of the columns walk, at most: their statistics stay in L1.
constexpr index_t kMostLanes = 1024;

struct Schedule {
    int threads = 1;
    bool split = false;      // a set is shared by several units of work
    bool resident = true;    // moments and apply (or sums and dx) on one unit before the next
    bool stream = false;     // non-temporal stores
    bool by_row = false;     // the sums of one set beside the writing of another
    bool by_sample = false;  // two sweeps of some samples before those of the next
    bool in_eights = false;  // and sets are short rows, of which a kernel has eight in hand
    bool in_parts = false;   // long rows: some of their lanes of a few rows, and then the next lanes (kPartLanes)
    bool far = false;        // arrays come from memory: what is read next is asked for
    bool beyond_l3 = false;  // and are more than any last-level cache has room for
    index_t lanes = 0;       // columns: neighbouring lanes in a unit, a multiple of merge.extent
    index_t samples = 1;     // columns: that are swept together
};

// `element`: bytes of one. `arrays`: how many arrays of x's size are read (1 forward, 2 backward). `write`: a result of
// x's size is written. `given`: so are the statistics.
Schedule make_schedule(const Plan& plan, index_t element, int arrays, bool write, bool in_place, bool given);

}  // namespace normkit
