// Memory of large results. The system finds a fresh page when it is first written to, and zeroes it: to write 134 MB
// takes 5 ms where pages are there, 17 ms in fresh huge ones, 65 ms in fresh small ones (one thread of an AMD EPYC, Zen
// 4). So large results lie in huge pages, and their memory is kept for the next one. They also begin at a cache line,
// as stores past the caches want it: NumPy's begin 16 bytes after one, and 32 MiB of layer norm take 1.6 times as long.

#pragma once

#include <cstddef>

namespace normkit::output_memory {

// Bytes from which on a result is worth it: four fifths of a huge page. malloc keeps what is smaller, too.
constexpr std::size_t kLeast = (std::size_t{2} << 20) / 5 * 4;

constexpr std::size_t kDefaultLimit = std::size_t{256} << 20;

// Any thread may call these, and a forked child; they touch none of the memory, which may hold anything.
void* allocate(std::size_t bytes) noexcept;            // nullptr: no memory
void* resize(void* data, std::size_t bytes) noexcept;  // as realloc
void release(void* data) noexcept;

// Bytes that may be kept without being used. Gives the former limit.
std::size_t set_limit(std::size_t bytes) noexcept;

// Bytes that are kept without being used.
std::size_t kept() noexcept;

}  // namespace normkit::output_memory
