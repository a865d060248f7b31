// Memory of results. Of large ones: the system finds a fresh page when it is first written to, and zeroes it: to write
// 134 MB takes 5 ms where pages are there, 17 ms in fresh huge ones, 65 ms in fresh small ones (one thread of an AMD
// EPYC, Zen 4). So large results lie in huge pages, and their memory is kept for the next one. They also begin at a
// cache line, as stores past the caches want it: NumPy's begin 16 bytes after one, and 32 MiB of layer norm take 1.6
// times as long.

#pragma once

#include <cstddef>

namespace normkit::output_memory {

// Bytes from which on a result is worth it: four fifths of a huge page. malloc keeps what is smaller, too.
constexpr std::size_t kLeast = (std::size_t{2} << 20) / 5 * 4;

// And from which on it is worth it to begin at a line: entering a context costs 0.2 us. Time of layer norm without over
// with, one thread of an Emerald Rapids, forward; backward: 1 x 3072 float32 0.9; 1.1, 1 x 4096 1.3; 1.6, 8 x 4096 1.7;
// 1.3, 64 x 768 1.6; 1.4, 32 x 4096 1.8; 1.1, 256 x 1024 1.5; 1.2.
constexpr std::size_t kLeastLinedUp = std::size_t{16} << 10;

constexpr std::size_t kDefaultLimit = std::size_t{256} << 20;

// Any thread may call these, and a forked child; they touch none of the memory, which may hold anything.
void* allocate(std::size_t bytes) noexcept;            // nullptr: no memory
void* resize(void* data, std::size_t bytes) noexcept;  // as realloc
void release(void* data) noexcept;

// To be freed, and resized, as what malloc gives.
void* allocate_lined_up(std::size_t bytes) noexcept;

// Bytes that may be kept without being used. Gives the former limit.
std::size_t set_limit(std::size_t bytes) noexcept;

// Bytes that are kept without being used.
std::size_t kept() noexcept;

}  // namespace normkit::output_memory
