// The only file that knows OpenMP: numbered pieces of work, handed to threads in any order.
#pragma once

#include "normkit/normkit.h"

namespace normkit::cpu {

using PieceFunction = void (*)(const void* context, index_t piece);
void run_pieces(index_t pieces, int threads, PieceFunction piece, const void* context);

// f(piece) for 0 <= piece < pieces. f must not throw, and results must not depend on the order. Throws Interrupted,
// with some pieces not done, where the caller's ShouldStop says so.
template <class F>
void parallel_for(index_t pieces, int threads, const F& f) {
    run_pieces(pieces, threads, [](const void* context, index_t i) { (*static_cast<const F*>(context))(i); }, &f);
}

// Whether the operation in progress is to be given up: for pieces that may be long. Costs about as much as reading a
// clock.
bool gives_up();

}  // namespace normkit::cpu
