#include "schedule.h"

#include <unistd.h>

namespace normkit {
namespace {

// Less work than this for each thread costs more to hand out than it saves.
constexpr index_t kElementsPerThread = 16 * 1024;

// Results at least this large are written past the caches; smaller ones stay in the last-level cache and are cheaper to
// read next. What the system says of L3 is no guide where machines are shared: measured, see docs/decisions/0002.
constexpr index_t kStreamBytes = index_t{24} << 20;

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

Schedule make_schedule(const Plan& plan, int arrays, bool write, bool in_place) {
    constexpr index_t kElement = sizeof(float);
    const Choices& forced = this_thread_choices();
    Schedule s;
    const index_t most = plan.total / kElementsPerThread;
    s.threads = get_num_threads();
    if (s.threads > most) s.threads = most < 1 ? 1 : static_cast<int>(most);

    if (plan.walk == Walk::rows) {
        // A set belongs to one thread unless that leaves threads without work.
        const bool uneven = plan.sets < s.threads || (plan.sets < 4 * s.threads && plan.sets % s.threads != 0);
        s.split = choose(forced.split, s.threads > 1 && uneven);
        s.resident = choose(forced.resident, true) && !s.split;
    } else {
        // As many lanes as let all their rows stay in half of L2, if that makes whole cache lines and work for all.
        const index_t rows = plan.runs.size(), merge = plan.merge.extent;
        const index_t all = plan.lane.extent * merge;
        const index_t most_lanes = 512 / merge * merge;
        index_t lanes = l2_bytes() / 2 / (rows * arrays * kElement) / merge * merge;
        const bool fits = lanes >= 64 || lanes >= all;
        if (lanes > most_lanes) lanes = most_lanes;
        const index_t fair = (all * plan.kept.size() / s.threads + 63) / 64 * 64;
        if (fits && lanes > fair && fair >= 64) lanes = fair / merge * merge;
        const index_t units = fits && lanes > 0 ? plan.kept.size() * ((all + lanes - 1) / lanes) : 0;
        s.resident = choose(forced.resident, fits && units >= s.threads);
        if (forced.split == 1) s.resident = false;
        s.split = !s.resident;
        s.lanes = s.resident && fits && lanes >= merge ? lanes : most_lanes;
        if (s.lanes > all) s.lanes = all;
    }
    s.stream = choose(forced.stream, write && !in_place && plan.total * kElement >= kStreamBytes);
    return s;
}

}  // namespace normkit
