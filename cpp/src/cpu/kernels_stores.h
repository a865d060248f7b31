// How lines are asked for and results are stored: past the caches, where that can be, in whole vectors on boundaries.
// Part of kernels.cpp.
#pragma once

#include <type_traits>

#include "kernels_formula.h"

namespace {

// Whether there is a shuffle that is told how far.
#if defined(__AVX512BW__)
constexpr bool kCanJoin = true;
#else
constexpr bool kCanJoin = false;
#endif

template <bool ToL1>
NK_INLINE void prefetch(const char* p) {
    __builtin_prefetch(p, 0, ToL1 ? 3 : 2);
}

// Asks for a cache line to come to L2: what is read so much later that L1 would have lost it.
NK_INLINE void prefetch_far(const char* p) { prefetch<false>(p); }

// For what is read soon: to L1, on cores that can wait for enough lines there.
NK_INLINE void prefetch_near(const char* p) {
    if (ahead_to_l1) {
        prefetch<true>(p);
    } else {
        prefetch_far(p);
    }
}

template <class X>
NK_INLINE index_t bytes(index_t elements) {
    return elements * static_cast<index_t>(sizeof(X));
}

// Vector i of a step that has only `n` elements: whole, in part, or (n <= 0) not there.
template <class X>
NK_INLINE Vec<X> load_rest(const char* p, int n) {
    return n >= kWidth<X> ? load<X>(p) : load_first<X>(p, n);
}

// Lanes before the first vector boundary,
template <class X>
NK_INLINE index_t head_of(const char* p) {
    const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(p) % kMemoryBytes<X>);
    return past == 0 ? 0 : (kMemoryBytes<X> - past) / static_cast<index_t>(sizeof(X));
}

// of a row of so many.
template <class X>
NK_INLINE index_t head_of_row(const char* p, index_t lanes) {
    const index_t head = head_of<X>(p);
    return head < lanes ? head : lanes;
}

// The lanes of row r that go by themselves where rows are joined (EndsOf): to a boundary of y; or of x, if all rows
// begin alike, and with them what is one a lane.
template <class X, bool PerLane>
NK_INLINE index_t head_of_joined(In x, Out y, index_t r, index_t lanes) {
    if (!kCanJoin || !PerLane) return head_of_row<X>(y.at(r), lanes);
    if (!begins_on_lines(x, y, bytes<X>(lanes), sizeof(X)) || x.row % kMemoryBytes<X> != 0) return 0;
    return head_of_row<X>(x.at(r), lanes);
}

// The same of rows that are written to a cache, if all begin alike: a store that crosses a line takes as long as two,
// and longer where lines come from L2. Layer norm into rows 16 bytes past a line over rows that begin on one, one
// thread of an Emerald Rapids: 32 x 4096 1.7, 64 x 2048 1.8, 256 x 1024 1.5. Without masks, parts of vectors are loops.
template <class X>
NK_INLINE index_t head_in_cache(Out y, index_t r, index_t lanes) {
    return kCanJoin && y.row % kMemoryBytes<X> == 0 ? head_of_row<X>(y.at(r), lanes) : 0;
}

// Where an array of one a lane begins, from a boundary, if none of the vectors behind `head` lanes is to cross one.
template <class X>
NK_INLINE index_t first_lane(index_t head) {
    return head == 0 ? 0 : kWidth<X> - head;
}

// Applies f to every vector of a row of `lanes` elements, the first `head` of them by themselves: f(first lane, n),
// n < kWidth<X> for the last, part-filled one.
template <class X, class F>
NK_INLINE void for_vectors(index_t lanes, index_t head, F f) {
    index_t at = head;
    if (at > 0) f(0, static_cast<int>(at));
    for (; lanes - at >= kWidth<X>; at += kWidth<X>) f(at, kWidth<X>);
    if (at < lanes) f(at, static_cast<int>(lanes - at));
}

// Non-temporal stores need elements that can reach a vector boundary at all, and rows that begin and end on lines, or
// are long.
template <class X>
NK_INLINE bool can_stream(Out y, index_t lanes, index_t least = least_ragged_row) {
    const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(y.p));
    if (on_lines(y)) return true;
    return past % sizeof(X) == 0 && y.row % sizeof(X) == 0 && bytes<X>(lanes) >= least;
}

template <class X, bool Stream>
NK_INLINE void put(char* p, Vec<X> v, int n) {
    if (n < kWidth<X>) {
        store_first<X>(p, v, n);
    } else if constexpr (Stream) {
        stream<X>(p, v);
    } else {
        store<X>(p, v);
    }
}

// The same, with the line of an ordinary store asked for. Stores leave a core in their order: behind one whose line is
// still on its way from L2 or L3 those to L1 wait too, and at last the core. Asking runs ahead. docs/decisions/
// 0002-schedule.md, "Results between other stores".
template <class X, bool Stream>
NK_INLINE void put_asking(char* p, Vec<X> v, int n) {
    if constexpr (!Stream) __builtin_prefetch(p, /*rw=*/1, /*locality=*/3);
    put<X, Stream>(p, v, n);
}

// Elements that follow each other in memory, vector by vector, past the caches, wherever they begin: what a vector has
// beyond a boundary waits for the next. `begin` says where the next ones belong; `finish` stores what is left. Where an
// instruction set can join vectors (kCanJoin), whole ones may begin anywhere; else they have to lie on boundaries.
#if defined(__AVX512BW__)
template <class X>
class Joined {
  public:
    NK_INLINE void begin(char* p) {
        if (p == to_ + count_ * kSize) return;
        finish();
        count_ = first_ = static_cast<int>(reinterpret_cast<std::uintptr_t>(p) % kMemoryBytes<X> / sizeof(X));
        to_ = p - count_ * kSize;
        from_ = lanes_from(kWidth<X> - count_);
    }
    NK_INLINE void put(char*, Vec<X> v) {
        const Raw<X> now = encoded<X>(v);
        store_line(window(now, from_));
        last_ = now;
    }
    NK_INLINE void put_part(char*, Vec<X> v, int n) {
        const Raw<X> now = encoded<X>(v);
        count_ += n;
        if (count_ >= kWidth<X>) {
            store_line(window(now, from_));
            count_ -= kWidth<X>;
        }
        last_ = window(now, lanes_from(n));
        from_ = lanes_from(kWidth<X> - count_);
    }
    NK_INLINE void finish() {
        if (first_ < count_) store_lanes(window(last_, from_), (1u << count_) - (1u << first_));
        first_ = count_;
    }

    // For another to go on.
    NK_INLINE void leave(Seam* seam) {
        seam->at = to_ + first_ * kSize;
        seam->bytes = (count_ - first_) * kSize;
        const Raw<X> line = window(window(last_, from_), lanes_from(kWidth<X> + first_));
        __builtin_memcpy(seam->vector, &line, sizeof line);
    }
    NK_INLINE void go_on(const Seam& seam) {
        if (seam.bytes == 0) return;
        begin(seam.at);
        Raw<X> line;
        __builtin_memcpy(&line, seam.vector, sizeof line);
        const int n = static_cast<int>(seam.bytes) / kSize;
        last_ = window(line, lanes_from(n));
        count_ += n;
        from_ = lanes_from(kWidth<X> - count_);
    }

  private:
    static constexpr int kSize = sizeof(X);
    using Number =
        std::conditional_t<kSize == 2, std::uint16_t, std::conditional_t<kSize == 4, std::uint32_t, std::uint64_t>>;
    typedef Number Numbers __attribute__((vector_size(kMemoryBytes<X>)));

    static NK_INLINE Numbers lanes_from(int first) {
        Numbers lanes;
        for (int i = 0; i < kWidth<X>; ++i) lanes[i] = static_cast<Number>(i);
        return lanes + static_cast<Number>(first);
    }
    // Of the last vector and this one, side by side, the lanes that are given.
    NK_INLINE Raw<X> window(Raw<X> now, Numbers lanes) const {
        if constexpr (kSize == 2) {
            return (Raw<X>)_mm256_permutex2var_epi16((__m256i)last_, (__m256i)lanes, (__m256i)now);
        } else if constexpr (kSize == 4) {
            return (Raw<X>)_mm512_permutex2var_ps((__m512)last_, (__m512i)lanes, (__m512)now);
        } else {
            return (Raw<X>)_mm512_permutex2var_pd((__m512d)last_, (__m512i)lanes, (__m512d)now);
        }
    }
    NK_INLINE void store_lanes(Raw<X> line, unsigned mask) {
        if constexpr (kSize == 2) {
            _mm256_mask_storeu_epi16(to_, static_cast<__mmask16>(mask), (__m256i)line);
        } else if constexpr (kSize == 4) {
            _mm512_mask_storeu_ps(to_, static_cast<__mmask16>(mask), (__m512)line);
        } else {
            _mm512_mask_storeu_pd(to_, static_cast<__mmask8>(mask), (__m512d)line);
        }
    }
    NK_INLINE void store_line(Raw<X> line) {
        if (first_ == 0) {
            stream_raw<X>(to_, line);
        } else {
            store_lanes(line, ~0u << first_);
            first_ = 0;
        }
        to_ += kMemoryBytes<X>;
    }

    // The vector in memory that is being filled: elements first_ to count_ of it wait, the last count_ lanes of last_.
    char* to_ = nullptr;
    int count_ = 0, first_ = 0;
    Numbers from_ = {};
    Raw<X> last_ = {};
};
#else
template <class X>
class Joined {};
#endif

// The same of whole vectors that lie on boundaries, with parts of them in between.
template <class X>
class Seamed {
  public:
    NK_INLINE void begin(char*) {}
    NK_INLINE void put(char* p, Vec<X> v) { stream<X>(p, v); }
    // Out of the way of whole vectors, and of their registers.
    __attribute__((noinline, cold)) void put_part(char* p, Vec<X> v, int n) {
        const bool goes_on = seam_.bytes > 0 && seam_.at + seam_.bytes == p;
        if (!goes_on) {
            finish();
            if (reinterpret_cast<std::uintptr_t>(p) % kMemoryBytes<X> != 0) return store_first<X>(p, v, n);
            seam_.at = p;
        }
        store_first<X>(seam_.vector + seam_.bytes, v, n);
        seam_.bytes += n * static_cast<int>(sizeof(X));
        if (seam_.bytes < kMemoryBytes<X>) return;
        stream<X>(seam_.at, load<X>(seam_.vector));
        seam_.bytes = 0;
    }
    NK_INLINE void finish() {
        if (seam_.bytes > 0) __builtin_memcpy(seam_.at, seam_.vector, static_cast<std::size_t>(seam_.bytes));
        seam_.bytes = 0;
    }
    NK_INLINE void leave(Seam* seam) { *seam = seam_; }
    NK_INLINE void go_on(const Seam& seam) { seam_ = seam; }

  private:
    Seam seam_;
};

// How a kernel stores: to the caches; or past them whole vectors on boundaries, or vectors that are joined.
enum class Stores { cached, lines, joined };

// Of rows that begin on lines: whole vectors lie on boundaries.
template <class X>
struct OnLines {
    NK_INLINE void begin(char*) {}
    NK_INLINE void finish() {}
};

// PerLane: there are arrays of one a lane, w or sums, so that vectors can't begin where it suits y.
template <class X, Stores How, bool PerLane>
using EndsOf = std::conditional_t<How != Stores::joined, OnLines<X>,
                                  std::conditional_t<kCanJoin && PerLane, Joined<X>, Seamed<X>>>;

// The vectors of a row, one after another.
template <class X, Stores How, bool PerLane>
NK_INLINE void put([[maybe_unused]] EndsOf<X, How, PerLane>& ends, [[maybe_unused]] char* p, Vec<X> v, int n) {
    if constexpr (How != Stores::joined) {
        put<X, How == Stores::lines>(p, v, n);
    } else if (n < kWidth<X>) {
        ends.put_part(p, v, n);
    } else {
        ends.put(p, v);
    }
}

// The same; Ask: with the lines of ordinary stores asked for.
template <class X, Stores How, bool PerLane, bool Ask>
NK_INLINE void put_asking(EndsOf<X, How, PerLane>& ends, char* p, Vec<X> v, int n) {
    if constexpr (Ask && How == Stores::cached) {
        put_asking<X, false>(p, v, n);
    } else {
        put<X, How, PerLane>(ends, p, v, n);
    }
}

// f(how, as a constant). CanJoin: whether it can be other than on lines.
template <class X, bool CanJoin = true, class F>
NK_INLINE auto with_stores(bool stream, bool lines, F f) {
    if (!stream) return f(std::integral_constant<Stores, Stores::cached>{});
    if constexpr (CanJoin) {
        if (!lines) return f(std::integral_constant<Stores, Stores::joined>{});
    }
    return f(std::integral_constant<Stores, Stores::lines>{});
}

// The same, past the caches where rows can be joined or are long. Time with such stores over time without, rows 16
// bytes past a line, backward (one thread of a Zen 5): 64 lanes 1.2, 128 0.75.
template <class X, bool PerLane, class F>
NK_INLINE void with_row_stores(bool stream, In x, Out y, index_t lanes, bool lines, F f) {
    constexpr index_t kRow = 512;
    const bool can = stream && can_stream<X>(y, lanes, y.row == bytes<X>(lanes) ? kRow : least_ragged_row);
    if constexpr (kCanJoin) {
        with_stores<X>(can, lines && !(PerLane && begins_on_lines(x, y, bytes<X>(lanes), sizeof(X))), f);
    } else if (can) {
        f(std::integral_constant<Stores, Stores::joined>{});  // with vectors on boundaries, that is all
    } else {
        f(std::integral_constant<Stores, Stores::cached>{});
    }
}

}  // namespace
