// Results of one set beside the moments, or sums, of another. Part of kernels.cpp.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels_along.h"
#include "kernels_moments.h"
#include "kernels_sums.h"

namespace {

template <class X>
__attribute__((noinline, cold)) bool next_tile(const Unwritten<X>& tile) {
    return tile.next && tile.next(tile.writer);
}

// A tile, and those that come next, as something to write beside other work, which ends in the midst of its rows. Row:
// Applying or WritingDx.
template <class X, class Row>
class RowsOfTile {
  public:
    static constexpr bool kBehindHead = Row::kBehindHead, kHasOthers = false;
    NK_INLINE static index_t head_of_leaf(const char* x) { return head_of<X>(x); }
    NK_INLINE RowsOfTile(Unwritten<X>& tile, typename Row::Ends& ends) : tile_(tile), ends_(ends), row_(tile, ends) {}
    NK_INLINE bool asks() const { return row_.asks(); }
    NK_INLINE index_t turns() const { return tile_.done() ? 0 : std::numeric_limits<index_t>::max(); }
    NK_INLINE void turn() {
        if (tile_.done()) return;
        if (row_.turns() > 0) row_.turn();
        if (row_.turns() > 0) return;
        row_.rest();
        tile_.lane = 0;
        if (++tile_.row < tile_.rows || next_tile(tile_)) row_ = Row(tile_, ends_);
    }
    NK_INLINE void leave() {
        if (!tile_.done()) tile_.lane = row_.lane;
    }

  private:
    Unwritten<X>& tile_;
    typename Row::Ends& ends_;
    Row row_;
};

template <class X, Leaf As, bool WLane, Stores How>
void moments_beside_tile(const LeafSeries* series, index_t n, bool center, Moments* out, Unwritten<X>& tile) {
    const LeafSeries rows = *series;
    const index_t left = tile.rows - tile.row, per_row = rows.leaves / left;
    EndsOf<X, How, WLane> ends;
    if constexpr (How == Stores::joined) ends.go_on(*tile.seam);
    if (As != Leaf::overlapped && As != Leaf::whole && tile.in_step && n == 1 && per_row * left == rows.leaves &&
        tile.lane == 0) {
        // In step, row by row: what is known of a row then stays in registers.
        In x = rows.x, origin = rows.origin;
        for (; !tile.done(); ++tile.row) {
            Applying<X, WLane, How> applying(tile, ends);
            for (index_t i = 0; i < per_row; ++i, x.p += rows.leaf, origin.p += origin.row) {
                const Compute<X> from = kAboutOrigin<X> ? value_at<Compute<X>>(origin.p) : 0;
                *out++ = moments_of_leaf<X, As == Leaf::about_zero>(x, rows.rows, rows.lanes, from, center, applying);
            }
            applying.rest();
        }
    } else {
        RowsOfTile<X, Applying<X, WLane, How>> applying(tile, ends);
        moments_of_leaves<X, As>(series, n, center, out, applying);
        applying.leave();
    }
    if constexpr (How == Stores::joined) ends.leave(tile.seam);
}

template <class X, bool WLane, Stores How>
NK_INLINE void moments_beside_as(const LeafSeries* series, index_t n, bool center, Moments* out, Unwritten<X>& tile) {
    // Rows of layer norm go in step; of 16 bits 28^2 and 56^2 took 1.05 to 1.12 times as long overlapped.
    constexpr bool kMayOverlap = !WLane && How != Stores::cached && sizeof(X) == 4;
    constexpr Leaf kOverlapped = kMayOverlap ? kAnyOverlapped<X> : Leaf::in_turn;
    const bool overlaps = kMayOverlap && tile.beyond_l3;
    for_alike(series, n, center, overlaps, out, [&](Leaf as, const LeafSeries* alike, index_t m, Moments* to) {
        if (tile.done()) return moments_along<X>(alike, m, center, tile.far, to);
        const auto kernel = as == Leaf::about_zero ? moments_beside_tile<X, Leaf::about_zero, WLane, How>
                            : as == Leaf::whole    ? moments_beside_tile<X, kWholeOverlapped, WLane, How>
                            : as == Leaf::in_turn  ? moments_beside_tile<X, Leaf::in_turn, WLane, How>
                                                   : moments_beside_tile<X, kOverlapped, WLane, How>;
        kernel(alike, m, center, to, tile);
    });
}

template <class X, bool WLane>
void moments_beside(const LeafSeries* series, index_t n, bool center, Moments* out, Unwritten<X>& tile) {
    with_row_stores<X, WLane>(tile.stream, tile.x, tile.y, tile.lanes, tile.lines, [&](auto how) NK_INLINE_LAMBDA {
        moments_beside_as<X, WLane, how>(series, n, center, out, tile);
    });
}

// Row r is written beside the sums of row r + 1; or before them, where that is too much for L1.
template <class X, Down Add, Stores How, bool IsBeside>
void backward_row_by_row(const BackwardRows<Compute<X>>& of) {
    using T = Compute<X>;
    const BackwardRows<T> all = of;  // which no store can change
    const index_t head = How == Stores::joined ? head_of_joined<X, true>(all.x, all.dx, 0, all.lanes) : 0;
    ShortDownSums<X, kMostSums / static_cast<index_t>(sizeof(T))> down(head);
    const double count = static_cast<double>(all.lanes);
    const auto sums_of = [&](index_t r, auto& beside) NK_INLINE_LAMBDA {
        Sums sums;
        for (index_t lane = 0; lane < all.lanes; lane += kLeafLanes) {
            const index_t lanes = all.lanes - lane < kLeafLanes ? all.lanes - lane : kLeafLanes;
            const Sums leaf =
                sums_of_leaf<X, true>({all.dy.at(r) + bytes<X>(lane), 0}, {all.x.at(r) + bytes<X>(lane), 0},
                                      {all.w.at(r) + bytes<T>(lane), 0}, all.s, r * all.s.row, 1, lanes, beside);
            sums.g += leaf.g;
            sums.g_xhat += leaf.g_xhat;
        }
        const index_t i = r * all.s.row;
        all.mean_g[i] = static_cast<T>(all.center ? sums.g / count : 0);
        all.mean_g_xhat[i] = static_cast<T>(sums.g_xhat / count);
    };
    std::conditional_t<How == Stores::joined, NothingBehind<X>, Nothing> nothing;
    if constexpr (How == Stores::joined) nothing.head = head;
    EndsOf<X, How, true> ends;
    sums_of(0, nothing);
    for (index_t r = 0; r < all.rows; ++r) {
        WritingDx<X, Add, How> writing(all, r, r == 0, down, ends);
        if constexpr (IsBeside) {
            if (r + 1 < all.rows) sums_of(r + 1, writing);
            writing.rest();
        } else {
            writing.rest();
            if (r + 1 < all.rows) sums_of(r + 1, nothing);
        }
    }
    ends.finish();
    if constexpr (Add == Down::kept) down.add_to(all.sums, all.lanes);
}

template <class X>
void backward_rows(const BackwardRows<Compute<X>>& all) {
    with_row_stores<X, true>(all.stream, all.x, all.dx, all.lanes, on_lines(all.dx), [&](auto how) NK_INLINE_LAMBDA {
        const bool is_beside = fits_beside(all.lanes, sizeof(X)) || (all.far && dx_beside);
        const auto kernel = is_beside ? (all.sums.g ? backward_row_by_row<X, Down::kept, how, true>
                                                    : backward_row_by_row<X, Down::none, how, true>)
                                      : (all.sums.g ? backward_row_by_row<X, Down::kept, how, false>
                                                    : backward_row_by_row<X, Down::none, how, false>);
        kernel(all);
    });
}

// The sums of leaves, each turn of them beside one of dx.
template <class X, Stores How, class Asks>
__attribute__((noinline)) void sums_beside_tile(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s,
                                                Sums* out, Unwritten<X>& tile, Asks* asker) {
    using Row = WritingDx<X, Down::none, How, false>;
    typename Row::Ends ends;
    if constexpr (How == Stores::joined) ends.go_on(*tile.seam);
    RowsOfTile<X, Row> writing(tile, ends);
    for (; n > 0; --n, ++series) {
        const SumSeries all = *series;
        In dy = all.dy, x = all.x;
        for (index_t i = 0; i < all.leaves; ++i, dy.p += all.leaf_dy, x.p += all.leaf_x) {
            const index_t k = all.set + i * all.next_set;
            *out++ = sums_of_leaf<X, false>(dy, x, all.w, s, k, all.rows, all.lanes, writing, asker);
        }
    }
    writing.leave();
    if constexpr (How == Stores::joined) ends.leave(tile.seam);
}

// To L2: where this pays (dx_beside), it does not matter to which cache.
template <class X>
void sums_beside(const SumSeries* series, index_t n, Statistics<Compute<X>> s, Sums* out, Unwritten<X>& tile) {
    if (tile.done()) return sums_along<X, false>(series, n, s, tile.far, out);
    with_row_stores<X, false>(tile.stream, tile.x, tile.y, tile.lanes, tile.lines, [&](auto how) NK_INLINE_LAMBDA {
        if (far_apart(series->x)) {
            Asker<X, Start::at_once, /*ToL1=*/false> asker(series, n);
            sums_beside_tile<X, how>(series, n, s, out, tile, &asker);
        } else {
            AsksInMemory* const in_memory = nullptr;
            sums_beside_tile<X, how>(series, n, s, out, tile, in_memory);
        }
    });
}

}  // namespace
