#include "parallel.h"

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace normkit {
namespace {

std::atomic<int> chosen_threads{0};

// libgomp's threads do not live on in a forked child, but it waits for them: a parallel region there never returns.
// Whether they had been started can't be known, for another user of the library may have done it (torch shares it). So
// every forked child works on one thread; the bits are the same.
std::atomic<bool> is_forked_child{false};

#if defined(_OPENMP)
[[maybe_unused]] const int watches_forks = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
#endif

int default_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

thread_local ShouldStop should_stop = nullptr;

}  // namespace

void set_num_threads(int threads) { chosen_threads = threads > 0 ? threads : 0; }

int get_num_threads() {
    if (is_forked_child) return 1;
    const int threads = chosen_threads;
    return threads > 0 ? threads : default_threads();
}

ShouldStop& this_thread_should_stop() { return should_stop; }

namespace cpu {
namespace {

using Clock = CoarseClock;
constexpr std::chrono::milliseconds kBetweenQuestions{50};

// Shared by the threads of one run_pieces; only the calling thread asks.
struct Watch {
    ShouldStop ask;
    Clock::time_point asked = ask ? Clock::now() : Clock::time_point{};
    std::atomic<bool> stop{false};
};
thread_local Watch* watch = nullptr;
thread_local bool asks = false;
thread_local OneCall* one_call = nullptr;

// Sets this thread's watch while pieces are worked on. They nest: whoever is asked may call normkit before answering.
class Watching {
  public:
    Watching(Watch* w, bool asking) : outer_watch_(watch), outer_asks_(asks) {
        watch = w;
        asks = asking;
    }
    ~Watching() {
        watch = outer_watch_;
        asks = outer_asks_;
    }

  private:
    Watch* const outer_watch_;
    const bool outer_asks_;
};

// Non-temporal stores are weakly ordered: they must be visible before anyone is told that the work is done.
void finish_stores() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// Pieces in even shares of neighbours. Taken one by one instead, by whoever comes first, they go to another thread in
// the second sweep over an array than in the first, and in the next call again: where the cores of two threads have no
// cache in common (chiplets, sockets), half of the lines then have to come from the other's.
class Shares {
  public:
    Shares(index_t pieces, int threads, Order order)
        : count_(threads < kMostShares ? threads : kMostShares), order_(order) {
        index_t first = 0;
        for (int s = 0; s < count_; ++s) {
            const index_t end = first + pieces / count_ + (s < pieces % count_ ? 1 : 0);
            shares_[s].next.store(first, std::memory_order_relaxed);
            shares_[s].first = first;
            shares_[s].end = end;
            first = end;
        }
    }

    // The work of one thread: its share, and what others have left of theirs.
    template <class F>
    void work(int thread, const F& f) {
        for (int s = 0; s < count_; ++s) {
            Share& share = shares_[(thread + s) % count_];
            // Looked at before it is written, for a counter that is only read is no bother to the others.
            while (share.next.load(std::memory_order_relaxed) < share.end) {
                const index_t i = share.next.fetch_add(1, std::memory_order_relaxed);
                if (i >= share.end) break;
                f(order_ == Order::forwards ? i : share.first + share.end - 1 - i);
            }
        }
    }

  private:
    static constexpr int kMostShares = 64;  // more threads than this have one in common
    struct alignas(64) Share {              // a cache line
        std::atomic<index_t> next;
        index_t first, end;
    };
    Share shares_[kMostShares];
    const int count_;
    const Order order_;
};

#if defined(_OPENMP)
// The threads of a parallel region, where there is a core for each: they come to cores of their own, and wait for each
// other without keeping anyone from his.
//
// A kernel may wake a thread on the core of the one that called it, although others are idle: some do it to save cores.
// At the end of a region libgomp's threads spin, for 4 to 8 ms, and the one that spins keeps the other from running: a
// call that takes 60 us on one thread took 7,800 us on two after each pause of 20 ms (torch: up to 15,800). Where
// threads are more than cores they must share, and moving them about costs more than it gains: three threads on two
// cores beside another busy process took 28 times as long.
class Team {
  public:
    explicit Team(int threads) : one_each_(threads <= omp_get_num_procs()) {}

    // Called by each of its threads before and after the work.
    void enter() {
#if defined(__linux__)
        if (!one_each_ || omp_get_thread_num() == 0) return;
        const int core = sched_getcpu();
        if (core >= 0 && core == callers_core_) move_from(core);
#endif
    }
    void leave() {
        if (!one_each_) return;
        // Whoever has not come after so many looks is not waiting for this core; libgomp's own barrier then waits
        // longer.
        constexpr int kSpins = 200, kYields = 100;
        const int all = omp_get_num_threads();
        done_.fetch_add(1, std::memory_order_acq_rel);
        for (int i = 0; i < kSpins + kYields && done_.load(std::memory_order_acquire) < all; ++i) {
            if (i < kSpins) {
                relax();
            } else {
                sched_yield();
            }
        }
    }

  private:
#if defined(__linux__)
    // By forbidding it for a moment.
    static void move_from(int core) {
        cpu_set_t allowed, others;
        if (core >= CPU_SETSIZE || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
        others = allowed;
        CPU_CLR(core, &others);
        if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof others, &others) != 0) return;
        sched_setaffinity(0, sizeof allowed, &allowed);
    }
    const int callers_core_ = sched_getcpu();
#endif
    static void relax() {
#if defined(__SSE2__)
        _mm_pause();
#endif
    }
    const bool one_each_;
    std::atomic<int> done_{0};
};
#endif

}  // namespace

OneCall::OneCall() : asked(Clock::now()), outer_(one_call) { one_call = this; }
OneCall::~OneCall() { one_call = outer_; }

bool gives_up() {
    if (!watch) return false;
    if (watch->stop.load(std::memory_order_relaxed)) return true;
    if (!asks) return false;
    const Clock::time_point now = Clock::now();
    if (now - watch->asked < kBetweenQuestions) return false;
    watch->asked = now;
    if (!watch->ask()) return false;
    watch->stop.store(true, std::memory_order_relaxed);
    return true;
}

void run_pieces(index_t pieces, int threads, Order order, PieceFunction piece, const void* context) {
    if (pieces <= 0) return;
    if (threads > pieces) threads = static_cast<int>(pieces);
#if defined(_OPENMP)
    if (is_forked_child) threads = 1;
#else
    threads = 1;
#endif
    Watch shared{should_stop};
    if (one_call) shared.asked = one_call->asked;
    Watch* const watched = should_stop ? &shared : nullptr;
    if (threads <= 1) {
        const Watching watching(watched, true);
        for (index_t i = 0; i < pieces && !gives_up(); ++i) {
            piece(context, order == Order::forwards ? i : pieces - 1 - i);
        }
        finish_stores();
    }
#if defined(_OPENMP)
    else {
        Shares shares(pieces, threads, order);
        Team team(threads);
#pragma omp parallel num_threads(threads)
        {
            team.enter();
            const Watching watching(watched, omp_get_thread_num() == 0);
            shares.work(omp_get_thread_num(), [&](index_t i) {
                if (!gives_up()) piece(context, i);
            });
            finish_stores();
            team.leave();
        }
    }
#endif
    if (one_call) one_call->asked = shared.asked;
    if (shared.stop) throw Interrupted();
}

}  // namespace cpu
}  // namespace normkit
