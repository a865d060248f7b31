#include "schedule.h"

#include <unistd.h>

namespace normkit {
namespace {

// Less work than this for each thread costs more to hand out than it saves.
constexpr index_t kElementsPerThread = 16 * 1024;

// More threads than this help nobody, and an OpenMP library that can't start as many as it is asked for ends the
// process.
constexpr int kMostThreads = 1024;

// Results at least this large are written past the caches, if their rows are long enough that whole cache lines are
// most of what is written. What the system says of L3 is no guide where machines are shared: measured, see
// docs/decisions/0002-schedule.md.
constexpr index_t kStreamBytes = index_t{16} << 20;
constexpr index_t kStreamRow = 256;

// Elements.
constexpr index_t kLongSet = index_t{1} << 25;

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

bool choose(int forced, bool automatic) { return forced < 0 ? automatic : forced != 0; }

}  // namespace

Schedule make_schedule(const Plan& plan, index_t element, int arrays, bool write, bool in_place) {
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
        // Resident only where all lanes of a sample fit at once: a few lanes of many rows lie a power of two apart more
        // often than not, share the same few sets of the cache and do not stay there.
        const index_t merge = plan.merge.extent, all = plan.lane.extent * merge;
        const bool fits = plan.runs.size() * all * arrays * element <= l2_bytes() / 2;
        s.resident = choose(forced.resident, fits && plan.kept.size() >= s.threads) && forced.split != 1;
        s.split = !s.resident;
        s.lanes = kMostLanes / merge * merge;
        if (s.lanes > all) s.lanes = all;
    }
    const index_t row = plan.walk == Walk::rows ? plan.run.size() : plan.lane.extent * plan.merge.extent;
    const bool streams = plan.total * element >= kStreamBytes && row >= kStreamRow;
    s.stream = choose(forced.stream, write && !in_place && streams);
    return s;
}

}  // namespace normkit
