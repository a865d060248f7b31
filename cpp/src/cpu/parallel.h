// The only file that knows OpenMP: numbered pieces of work, shared out among threads.
#pragma once

#include <chrono>
#include <ctime>

#include "normkit/normkit.h"

namespace normkit::cpu {

// Which of its pieces a thread takes first.
enum class Order { forwards, backwards };

using PieceFunction = void (*)(const void* context, index_t piece);
void run_pieces(index_t pieces, int threads, Order order, PieceFunction piece, const void* context);

// f(piece) for 0 <= piece < pieces. f must not throw, and results must not depend on the order. Throws Interrupted,
// with some pieces not done, where the caller's ShouldStop says so.
//
// A thread starts with its share of the pieces, which are neighbours, and then helps the others. So where pieces are
// numbered in the order of memory, it comes to the same memory in every loop over it, in either order and in the next
// call too, and finds in its core's caches what it left there.
template <class F>
void parallel_for(index_t pieces, int threads, Order order, const F& f) {
    run_pieces(
        pieces, threads, order, [](const void* context, index_t i) { (*static_cast<const F*>(context))(i); }, &f);
}
template <class F>
void parallel_for(index_t pieces, int threads, const F& f) {
    parallel_for(pieces, threads, Order::forwards, f);
}

// A steady clock that may be some milliseconds late, where there is one: it is read in 6 ns, std::chrono's in 33 (on an
// Emerald Rapids), and the smallest call reads it three times.
struct CoarseClock {
    using duration = std::chrono::nanoseconds;
    using rep = duration::rep;
    using period = duration::period;
    using time_point = std::chrono::time_point<CoarseClock>;
    static constexpr bool is_steady = true;

    static time_point now() noexcept {
#if defined(CLOCK_MONOTONIC_COARSE)
        std::timespec t;
        if (clock_gettime(CLOCK_MONOTONIC_COARSE, &t) == 0) {
            return time_point(std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec));
        }
#endif
        return time_point(std::chrono::steady_clock::now().time_since_epoch());
    }
};

// While it lives, this thread's loops are one long call: none of them may be long enough to ask whether to give up, so
// the time since the last question goes on from one to the next.
class OneCall {
  public:
    OneCall();
    ~OneCall();
    CoarseClock::time_point asked;

  private:
    OneCall* const outer_;
};

// Whether the operation in progress is to be given up: for pieces that may be long. Costs about as much as reading a
// clock.
bool gives_up();

}  // namespace normkit::cpu
