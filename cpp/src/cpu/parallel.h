// The only file that knows OpenMP: numbered pieces of work, handed to threads in any order.
#pragma once

#include "normkit/normkit.h"

namespace normkit::cpu {

using PieceFunction = void (*)(const void* context, index_t piece);
void run_pieces(index_t pieces, int threads, PieceFunction piece, const void* context);

// Non-temporal stores are weakly ordered: they must be visible before anyone is told that the work is done.
void finish_stores();

// f(piece) for 0 <= piece < pieces. f must not throw, and results must not depend on the order.
template <class F>
void parallel_for(index_t pieces, int threads, const F& f) {
    if (threads <= 1 || pieces <= 1) {
        for (index_t i = 0; i < pieces; ++i) f(i);
        finish_stores();
        return;
    }
    run_pieces(pieces, threads, [](const void* context, index_t i) { (*static_cast<const F*>(context))(i); }, &f);
}

}  // namespace normkit::cpu
