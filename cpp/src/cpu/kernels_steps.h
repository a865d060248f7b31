// How a kernel goes along a row: step by step, in turns with what is done beside, asking for what comes next. Part of
// kernels.cpp.
#pragma once

#include <limits>
#include <type_traits>

#include "kernels_stores.h"

namespace {

// What is done beside a sum: the next row is read while this one is written, and neither memory nor arithmetic waits
// for the other. They take turns, short ones, so that both are in the window of instructions that a core reorders: 128
// elements took 1.4 times as long as 64 on layer norm 4096 x 768 (one thread of a Zen 4).
constexpr index_t kTurn = 64;
struct Nothing {
    static constexpr bool kBehindHead = false;  // for_steps_behind
    static constexpr bool kHasOthers = false;   // things to do beside when this is done
    bool asking = false;
    NK_INLINE bool asks() const { return asking; }  // whether lines are to be asked for ahead
    NK_INLINE index_t turns() const { return std::numeric_limits<index_t>::max(); }
    NK_INLINE void turn() {}
};
template <class X>
struct NothingBehind : Nothing {
    static constexpr bool kBehindHead = true;
    index_t head;
    NK_INLINE index_t head_of_leaf(const char*) const { return head; }
};

// Asks for the next lines, if those of the lanes before `end` have not all been asked for. None may be left out: the
// wait for one is as long as the arithmetic of hundreds of elements.
template <class B>
NK_INLINE void ask_up_to(index_t end, index_t& asked, B& block) {
    if (asked >= end) return;
    block.ask_ahead(asked);
    asked += kTurn;
}

// `todo` steps of B::kLanes elements from lane `at` on; for each turn of the block, B::kShare turns of what is done
// beside it.
template <class B, class Beside>
NK_INLINE void full_steps(index_t todo, index_t& at, index_t& asked, bool asks, B& block, Beside& beside) {
    constexpr bool kTurns = !std::is_base_of_v<Nothing, Beside>;
    if (kTurns || asks) {
        constexpr index_t kStepsOfTurn = kTurn / B::kLanes;
        index_t turns = todo / kStepsOfTurn;
        if (turns > beside.turns() / B::kShare) turns = beside.turns() / B::kShare;
        todo -= turns * kStepsOfTurn;
        for (; turns > 0; --turns) {
            if (asks) {
                if constexpr (Beside::kBehindHead) {  // else it is clear that they have not: runs of 28^2 took 1.06
                    ask_up_to(at + kTurn, asked, block);
                } else {
                    block.ask_ahead(at);
                    asked = at + kTurn;
                }
            }
#pragma GCC unroll 2
            for (int i = 0; i < kStepsOfTurn; ++i, at += B::kLanes) block.full(at);
#pragma GCC unroll 2
            for (int i = 0; i < B::kShare; ++i) beside.turn();
        }
        if constexpr (Beside::kHasOthers) return full_steps(todo, at, asked, asks, block, beside.others());
        for (; asks && todo > 0; --todo, at += B::kLanes) {
            ask_up_to(at + 1, asked, block);
            block.full(at);
        }
    }
    for (; todo > 0; --todo, at += B::kLanes) block.full(at);
}

// Walks `rows` runs of `lanes` elements in steps of B::kLanes; each run starts again at virtual lane 0. After B::kSteps
// steps the block's short sums go over to its long ones, so that no chain of additions in X is longer than kDepth.
template <class B, class Beside>
NK_INLINE void for_steps(index_t rows, index_t lanes, B& block, Beside& beside) {
    const bool asks = beside.asks();
    index_t steps = 0;
    for (index_t r = 0; r < rows; ++r) {
        block.row(r);
        index_t at = 0, asked = 0;
        while (lanes - at >= B::kLanes) {
            index_t todo = (lanes - at) / B::kLanes;
            if (todo > B::kSteps - steps) todo = B::kSteps - steps;
            steps += todo;
            full_steps(todo, at, asked, asks, block, beside);
            if (steps == B::kSteps) {
                block.flush();
                steps = 0;
            }
        }
        if (at < lanes) {
            if (asks) ask_up_to(at + 1, asked, block);
            block.tail(at, static_cast<int>(lanes - at));
            if (++steps == B::kSteps) {
                block.flush();
                steps = 0;
            }
        }
    }
    if (steps > 0) block.flush();
}

// The same for one run, with the same sums, whose first `head` lanes go by themselves, so that no vector crosses a
// line. They are the last lanes of a step then, and all lanes are turned round by as many; that changes no sum, because
// each lane has its elements in the same order, and lanes that are half of all apart are added up, whichever is first.
template <class B, class Beside>
NK_INLINE void for_steps_behind(index_t head, index_t lanes, B& block, Beside& beside) {
    const bool asks = beside.asks();
    block.row(0);
    index_t asked = 0;
    for (index_t first = 0, end; first < lanes; first = end) {
        end = lanes - first < B::kSteps * B::kLanes ? lanes : first + B::kSteps * B::kLanes;
        index_t at = first;
        if (head > 0 && head <= end - first) {
            if (asks) ask_up_to(at + head, asked, block);
            block.head(at, static_cast<int>(head));
            at += head;
        }
        full_steps((end - at) / B::kLanes, at, asked, asks, block, beside);
        if (at < end) {
            if (asks) ask_up_to(end, asked, block);
            block.tail(at, static_cast<int>(end - at));
#pragma GCC unroll 2
            for (int i = 0; i < B::kShare; ++i) {
                if (beside.turns() > 0) beside.turn();
            }
        }
        block.flush();
    }
}

template <class B>
NK_INLINE void for_steps(index_t rows, index_t lanes, B& block) {
    Nothing nothing;
    for_steps(rows, lanes, block, nothing);
}

// Asks for the lines of a turn.
template <class X, bool ToL1>
NK_INLINE void ask_for_turn(const char* p) {
    for (index_t line = 0; line < bytes<X>(kTurn); line += kLine) prefetch<ToL1>(p + line);
}
// Of the one that lies some way ahead in memory: of the next row, or of a later set at the end of one. Two operands are
// asked for less far each, if it is to L1, which has room for as much (docs/decisions/0002-schedule.md, "To which
// cache").
constexpr index_t kAhead = 8192, kAheadOfTwo = 6144;  // bytes
NK_INLINE index_t ahead_of_two(index_t to_l1) { return ahead_to_l1 ? to_l1 : kAhead; }
template <class X>
NK_INLINE void ask_for_turn(const char* p, index_t at, index_t ahead = kAhead) {
    p += bytes<X>(at) + ahead;
    ahead_to_l1 ? ask_for_turn<X, true>(p) : ask_for_turn<X, false>(p);
}

// Whether runs lie so far apart that what follows one in memory is another set's. Backward sums with nothing beside ask
// for lines only then; batch norm, with asking over without: 32 x 2048 x 7^2, 32 x 128 x 28^2 0.7, 32 x 64 x 56^2 0.85;
// but instance norm 4 x 128 x 128^2, whose runs follow each other, 1.2.
NK_INLINE bool far_apart(In x) { return x.row > 16 * 1024; }

// Asks for what such sums read next, a turn for each turn that they read, in the order in which they read: when the
// turn of what follows in memory comes, it may have left the cache. Speed with it over speed with what follows in
// memory, one thread of a Zen 5; two: batch norm 32 x 128 x 28^2 1.23; 1.28, 32 x 512 x 28^2 1.23; 1.17, 32 x 1024 x
// 14^2 1.1; 1.21, 32 x 64 x 56^2 1.2; 1.26, 32 x 256 x 56^2 1.06; 1.04, 32 x 64 x 112^2 1.01; 1.0.
//
// How it gets ahead: all at once, or by two turns for each until it is. Where that begins anew every few dozen KB, the
// latter takes 0.87 of the time (32 x 1024 x 14^2 backward), else 1.02 (32 x 256 x 56^2).
//
// ToL1 is not asked for turn by turn: batch norm backward 0.89 to 0.93, NCHW 14^2 to 56^2.
enum class Start { at_once, by_and_by };
template <class X, Start How, bool ToL1>
class Asker {
  public:
    NK_INLINE Asker(const SumSeries* series, index_t n) : series_(series), last_(series + n - 1) {
        begin_run();
        for (; owed_ > (How == Start::at_once ? 0 : kTurns - kFirst); --owed_) ask();
    }
    NK_INLINE void turn() {
        ask();
        if (How == Start::by_and_by && owed_ > 0) {
            --owed_;
            ask();
        }
    }

  private:
    static constexpr index_t kTurns = kAhead / (kTurn * index_t{sizeof(X)}), kFirst = 4;

    NK_INLINE void ask() {
        ask_for_turn<X, ToL1>(dy_);
        ask_for_turn<X, ToL1>(x_);
        dy_ += bytes<X>(kTurn);
        x_ += bytes<X>(kTurn);
        if (--turns_ == 0) next_run();
    }
    NK_INLINE void begin_run() {
        dy_ = series_->dy.at(row_) + leaf_ * series_->leaf_dy;
        x_ = series_->x.at(row_) + leaf_ * series_->leaf_x;
        turns_ = (series_->lanes + kTurn - 1) / kTurn;
    }
    NK_INLINE void next_run() {
        if (++row_ == series_->rows) {
            row_ = 0;
            if (++leaf_ == series_->leaves) {
                leaf_ = 0;
                if (series_ == last_) {  // from here on what follows in memory
                    turns_ = std::numeric_limits<index_t>::max();
                    return;
                }
                ++series_;
            }
        }
        begin_run();
    }

    const SumSeries *series_, *const last_;
    const char *dy_, *x_;
    index_t row_ = 0, leaf_ = 0, turns_, owed_ = kTurns;
};

// f(asker), of one that asks for the series from here on.
template <class X, Start How, class F>
NK_INLINE void with_asker(const SumSeries* series, index_t n, F f) {
    if (ahead_to_l1) {
        Asker<X, How, true> asker(series, n);
        f(&asker);
    } else {
        Asker<X, How, false> asker(series, n);
        f(&asker);
    }
}

// Without an order: nothing is asked for, or what follows in memory.
struct NoAsker {};
struct AsksInMemory {};

}  // namespace
