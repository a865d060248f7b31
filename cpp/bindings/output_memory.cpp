#include "output_memory.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <list>
#include <mutex>
#include <new>
#include <unordered_map>

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#endif

namespace normkit::output_memory {
namespace {

constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kPage = 64 << 10;  // a multiple of every system's

// Of the idle blocks the latest stay as they are up to so many bytes in all, as they do in malloc; the others are
// offered to the system. That costs 0.02 ms, 0.3 ms more when 128 MiB of huge pages are written to again (small ones:
// twice the time), and an interrupt of every core that has used them: a fifth of a layer norm of 6 MiB on two threads.
constexpr std::size_t kPlain = std::size_t{32} << 20;

// A block is at most this much larger than what is asked for, as a fraction of that.
constexpr std::size_t kWaste = 4;

std::size_t round_up(std::size_t bytes, std::size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Whole huge pages where they are not too large: what is left over has to be found in small ones.
std::size_t size_of_block(std::size_t bytes) {
    const std::size_t huge = round_up(bytes, kHugePage);
    return huge - bytes <= bytes / kWaste ? huge : round_up(bytes, kPage);
}

// ---------------------------------------------------------------------------------------------------------- the system

#if defined(__linux__)

void* take(std::size_t bytes) {
    void* const mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) return nullptr;
    char* const begin = static_cast<char*>(mapped);
    const std::size_t before = -reinterpret_cast<std::uintptr_t>(begin) % kHugePage, after = kHugePage - before;
    if (before > 0) munmap(begin, before);
    if (after > 0) munmap(begin + before + bytes, after);
    madvise(begin + before, bytes, MADV_HUGEPAGE);  // small pages will do where it fails
    return begin + before;
}

void give(void* data, std::size_t bytes) { munmap(data, bytes); }

// From now on the system may take the pages back when it runs short, until they are written to.
void offer(void* data, std::size_t bytes) {
#if defined(MADV_FREE)
    madvise(data, bytes, MADV_FREE);
#else
    static_cast<void>(data), static_cast<void>(bytes);
#endif
}

#else

constexpr std::align_val_t kAlignment{kPage};

void* take(std::size_t bytes) { return ::operator new(bytes, kAlignment, std::nothrow); }
void give(void* data, std::size_t) { ::operator delete(data, kAlignment); }
void offer(void*, std::size_t) {}

#endif

// ------------------------------------------------------------------------------------------------------------ the pool

struct Block {
    void* data;
    std::size_t bytes;
    unsigned forks;        // of this process before the block was made
    bool offered = false;  // an idle one
};

// Blocks in use and idle ones. Moving a block from one list to the other allocates nothing, so it can't fail.
class Pool {
  public:
    Pool() {
#if defined(__linux__)
        if (pthread_atfork([] { pool().before_fork(); }, [] { pool().mutex_.unlock(); },
                           [] { pool().mutex_.unlock(); }) != 0) {
            throw std::bad_alloc();
        }
#endif
    }

    // Never destroyed: arrays may outlive everything.
    static Pool& pool() {
        static Pool* const p = new Pool;
        return *p;
    }

    void* allocate(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto best = idle_.end();
        for (auto b = idle_.begin(); b != idle_.end(); ++b) {
            // Of two that fit as well the later one, which caches may still hold.
            if (b->bytes >= bytes && (best == idle_.end() || b->bytes <= best->bytes)) best = b;
        }
        if (best != idle_.end() && best->bytes - bytes <= bytes / kWaste) {
            forget(*best);
            best->offered = false;
            used_.splice(used_.end(), idle_, best);
            return best->data;
        }
        const std::size_t size = size_of_block(bytes);
        std::list<Block> made(1);
        void* data = take(size);
        if (!data) {
            shrink(0);
            data = take(size);
        }
        if (!data) return nullptr;
        made.front() = {data, size, forks_, false};
        try {
            places_.emplace(data, made.begin());
        } catch (...) {
            give(data, size);
            throw;
        }
        used_.splice(used_.end(), made);
        return data;
    }

    std::size_t size(void* data) {
        const std::lock_guard<std::mutex> lock(mutex_);
        return places_.find(data)->second->bytes;
    }

    void release(void* data) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const auto block = places_.find(data)->second;
        idle_.splice(idle_.end(), used_, block);
        kept_ += block->bytes;
        plain_ += block->bytes;
        // After a fork pages are shared: to write to them is to copy them first.
        if (block->forks != forks_ || block->bytes > limit_) {
            drop(block);
        } else {
            shrink(limit_);
            offer_oldest();
        }
    }

    std::size_t set_limit(std::size_t bytes) {
        const std::lock_guard<std::mutex> lock(mutex_);
        const std::size_t before = limit_;
        limit_ = bytes;
        shrink(limit_);
        return before;
    }

    std::size_t kept() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return kept_;
    }

  private:
    void forget(const Block& idle) {
        kept_ -= idle.bytes;
        if (!idle.offered) plain_ -= idle.bytes;
    }

    void drop(std::list<Block>::iterator idle) {
        forget(*idle);
        give(idle->data, idle->bytes);
        places_.erase(idle->data);
        idle_.erase(idle);
    }

    void shrink(std::size_t limit) {
        while (kept_ > limit) drop(idle_.begin());
    }

    void offer_oldest() {
        for (Block& idle : idle_) {
            if (plain_ <= kPlain) return;
            if (idle.offered) continue;
            offer(idle.data, idle.bytes);
            idle.offered = true;
            plain_ -= idle.bytes;
        }
    }

    // Held by another thread at the fork, the lock would stay locked in the child. Idle blocks are of no use to it.
    void before_fork() {
        mutex_.lock();
        ++forks_;
        shrink(0);
    }

    std::mutex mutex_;
    std::list<Block> used_, idle_;  // idle: the oldest first
    std::unordered_map<void*, std::list<Block>::iterator> places_;
    std::size_t kept_ = 0, plain_ = 0, limit_ = kDefaultLimit;  // plain: kept and not offered
    unsigned forks_ = 0;
};

}  // namespace

void* allocate(std::size_t bytes) noexcept try {
    return bytes <= PTRDIFF_MAX / 2 ? Pool::pool().allocate(bytes) : nullptr;
} catch (const std::bad_alloc&) {
    return nullptr;
}

void* resize(void* data, std::size_t bytes) noexcept {
    if (!data) return allocate(bytes);
    const std::size_t size = Pool::pool().size(data);
    if (bytes <= size) return data;
    void* const larger = allocate(bytes);
    if (!larger) return nullptr;
    std::memcpy(larger, data, size);
    release(data);
    return larger;
}

void release(void* data) noexcept {
    if (data) Pool::pool().release(data);
}

void* allocate_lined_up(std::size_t bytes) noexcept {
    void* data = nullptr;
    return posix_memalign(&data, 64, bytes) == 0 ? data : nullptr;
}

std::size_t set_limit(std::size_t bytes) noexcept { return Pool::pool().set_limit(bytes); }

std::size_t kept() noexcept { return Pool::pool().kept(); }

}  // namespace normkit::output_memory
