// The only file that knows OpenMP: numbered pieces of work, shared out among threads.
#pragma once

#include <chrono>

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

// While it lives, this thread's loops are one long call: none of them may be long enough to ask whether to give up, so
// the time since the last question goes on from one to the next.
class OneCall {
  public:
    OneCall();
    ~OneCall();
    std::chrono::steady_clock::time_point asked;

  private:
    OneCall* const outer_;
};

// Whether the operation in progress is to be given up: for pieces that may be long. Costs about as much as reading a
// clock.
bool gives_up();

}  // namespace normkit::cpu
