// Runs CUDA kernels on the host: what src/cuda/device.h takes from the CUDA compiler, for tests without a GPU. Every
// thread of a block is a fiber; they run one after another, from barrier to barrier and from exchange to exchange, in
// either order of their numbers. A barrier that not all reach is found, and shared memory starts as NaN.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include "../src/dtype.h"

#define NK_DEVICE inline
#define NK_KERNEL(threads, blocks) inline
#define NK_WORK(Type) const Type

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct EmulatedIndex {
    unsigned x = 0;
};
inline EmulatedIndex blockIdx, blockDim, gridDim, threadIdx;

namespace normkit::cuda {

class Emulator {
  public:
    static Emulator& get() {
        static Emulator emulator;
        return emulator;
    }
    bool backwards = false;  // the order of the threads

    template <class F>
    void launch(unsigned grid, unsigned threads, std::size_t shared, F kernel) {
        body_ = kernel;
        gridDim.x = grid;
        blockDim.x = threads;
        while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
        for (unsigned block = 0; block < grid; ++block) {
            blockIdx.x = backwards ? grid - 1 - block : block;
            // Exactly as large as asked for, so that a sanitizer sees what is beyond.
            shared_.reset(new char[shared + 16]);
            std::memset(shared_.get(), 0xff, shared);
            run_block(threads);
        }
    }

    char* shared() { return shared_.get() + (16 - reinterpret_cast<std::uintptr_t>(shared_.get()) % 16) % 16; }

    // Waits for the threads of a group; `threads`: how many it has.
    void wait(int group, int threads) {
        Barrier& barrier = barriers_[group];
        const unsigned generation = barrier.generation;
        if (++barrier.arrived == threads) {
            barrier.arrived = 0;
            ++barrier.generation;
            ++progress_;
        }
        while (barrier.generation == generation) yield();
    }
    void block_barrier() { wait(0, static_cast<int>(blockDim.x)); }
    void warp_barrier() { wait(1 + warp(), 32); }

    std::uint64_t exchange(std::uint64_t bits, int lane) {
        Fiber& me = *fibers_[threadIdx.x];
        std::uint64_t* const slots = exchange_[warp()][me.parity];
        me.parity ^= 1;
        slots[threadIdx.x % 32] = bits;
        warp_barrier();
        return slots[lane & 31];
    }

  private:
    struct Fiber {
        ucontext_t context;
        jmp_buf at;
        bool started = false, done = false;
        int parity = 0;
        std::vector<char> stack = std::vector<char>(64 * 1024);
    };
    struct Barrier {
        int arrived = 0;
        unsigned generation = 0;
    };

    static int warp() { return static_cast<int>(threadIdx.x / 32); }

    static void enter() {
        Emulator& e = get();
        const unsigned me = threadIdx.x;
        e.body_();
        e.fibers_[me]->done = true;
        _longjmp(e.scheduler_, 1);
    }

    void yield() {
        Fiber& me = *fibers_[threadIdx.x];
        if (_setjmp(me.at) == 0) _longjmp(scheduler_, 1);
    }

    void resume(unsigned thread) {
        Fiber& f = *fibers_[thread];
        threadIdx.x = thread;
        if (_setjmp(scheduler_) != 0) return;
        if (f.started) _longjmp(f.at, 1);
        f.started = true;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, reinterpret_cast<void (*)()>(&Emulator::enter), 0);
        setcontext(&f.context);
    }

    void run_block(unsigned threads) {
        for (Barrier& b : barriers_) b = {};
        for (unsigned t = 0; t < threads; ++t) {
            fibers_[t]->started = fibers_[t]->done = false;
            fibers_[t]->parity = 0;
        }
        unsigned left = threads;
        while (left > 0) {
            const unsigned long before = progress_;
            const unsigned left_before = left;
            for (unsigned i = 0; i < threads; ++i) {
                const unsigned t = backwards ? threads - 1 - i : i;
                if (fibers_[t]->done) continue;
                resume(t);
                if (fibers_[t]->done) --left;
            }
            if (progress_ == before && left == left_before) {
                std::printf("not all threads of a block or warp reach a barrier\n");
                std::exit(1);
            }
        }
    }

    std::function<void()> body_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::unique_ptr<char[]> shared_;
    Barrier barriers_[33];
    std::uint64_t exchange_[32][2][32];
    unsigned long progress_ = 0;
    jmp_buf scheduler_;
};

// ------------------------------------------------------------------------------------------------- what device.h needs

template <class To, class From>
To bits_to(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "a copy of the bits");
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline float as_float(unsigned bits) { return bits_to<float>(bits); }
inline unsigned as_bits(float v) { return bits_to<unsigned>(v); }
inline double as_double(unsigned low, unsigned high) {
    return bits_to<double>(std::uint64_t{high} << 32 | std::uint64_t{low});
}
inline unsigned low_bits(double v) { return static_cast<unsigned>(bits_to<std::uint64_t>(v)); }
inline unsigned high_bits(double v) { return static_cast<unsigned>(bits_to<std::uint64_t>(v) >> 32); }
inline float float_of_half(unsigned bits) {
    return static_cast<float>(to_double(float16{static_cast<std::uint16_t>(bits)}));
}
inline unsigned half_of(float v) {
    float16 out;
    from_double(static_cast<double>(v), &out);
    return out.bits;
}
inline unsigned bfloat_of(float v) {
    bfloat16 out;
    from_double(static_cast<double>(v), &out);
    return out.bits;
}

template <class T>
T from_lane(T v, int lane) {
    std::uint64_t bits = 0;
    std::memcpy(&bits, &v, sizeof v);
    bits = Emulator::get().exchange(bits, lane);
    std::memcpy(&v, &bits, sizeof v);
    return v;
}
template <class T>
T from_lane_xor(T v, int mask) {
    return from_lane(v, static_cast<int>(threadIdx.x % 32) ^ mask);
}
inline void warp_barrier() { Emulator::get().warp_barrier(); }
inline void block_barrier() { Emulator::get().block_barrier(); }
inline char* shared_memory() { return Emulator::get().shared(); }

}  // namespace normkit::cuda
