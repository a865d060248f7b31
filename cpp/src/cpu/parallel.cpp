#include "parallel.h"

#include <atomic>

#if defined(_OPENMP)
#include <omp.h>
#include <pthread.h>
#endif

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace normkit {
namespace {

std::atomic<int> chosen_threads{0};

// libgomp's threads do not live on in a forked child, but it waits for them: a parallel region there never returns. The
// child of a process that has started them works on one thread; the bits are the same.
std::atomic<bool> is_forked_child{false};

#if defined(_OPENMP)
void watch_forks() {
    static const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked_child = true; });
    (void)registered;
}
#endif

int default_threads() {
#if defined(_OPENMP)
    return omp_get_max_threads();
#else
    return 1;
#endif
}

}  // namespace

void set_num_threads(int threads) { chosen_threads = threads > 0 ? threads : 0; }

int get_num_threads() {
    if (is_forked_child) return 1;
    const int threads = chosen_threads;
    return threads > 0 ? threads : default_threads();
}

namespace cpu {

void finish_stores() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

void run_pieces(index_t pieces, int threads, PieceFunction piece, const void* context) {
#if defined(_OPENMP)
    watch_forks();
    if (is_forked_child) threads = 1;
    if (threads > pieces) threads = static_cast<int>(pieces);
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic, 1)
        for (index_t i = 0; i < pieces; ++i) piece(context, i);
        finish_stores();
    }
#else
    (void)threads;
    for (index_t i = 0; i < pieces; ++i) piece(context, i);
    finish_stores();
#endif
}

}  // namespace cpu
}  // namespace normkit
