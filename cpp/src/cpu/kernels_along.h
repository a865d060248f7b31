// Kernels along the lanes: everything is contiguous, so a row is read front to back. Part of kernels.cpp.
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

// Whether means are taken about an element of the set, the origin. Other data has a mean in double with digits to
// spare; float64 data gets them here, because no element is further from the mean than sqrt(n) standard deviations.
template <class X>
constexpr bool kAboutOrigin = std::is_same_v<X, double>;

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

// The sum of x in double: its mean is exact to the last bits of a double, as a mean that is multiplied by a large gamma
// has to be (a sum of x - pilot in float was 1.8e-7 standard deviations off on stepped data).
template <class X>
struct MeanBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLeafSteps;
    static constexpr int kShare = 1;
    static constexpr int K = kLanes / kWidth<X>;
    static constexpr int W = Widened<Compute<X>>::kVectors;
    In x;
    Vec<double> origin;
    const char* p = nullptr;
    Vec<double> sum[K * W] = {};
    double total = 0;
    Adder<double> plus;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void ask_ahead(index_t at) { ask_for_turn<X>(p, at); }
    NK_INLINE void add(int i, Widened<Compute<X>> wide) {
#pragma GCC unroll 2
        for (int j = 0; j < W; ++j) sum[i * W + j] = plus(sum[i * W + j], wide.v[j]);
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            if constexpr (kAboutOrigin<X>) {
                sum[i] += load<X>(p + bytes<X>(at + i * kWidth<X>)) - origin;
            } else {
                add(i, load_widened<X>(p + bytes<X>(at + i * kWidth<X>)));
            }
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> v = load_rest<X>(p + bytes<X>(at + i * kWidth<X>), n);
            if constexpr (kAboutOrigin<X>) {
                sum[i] += n >= kWidth<X> ? v - origin : keep_first<X>(v - origin, n);
            } else {
                add(i, widened<Compute<X>>(v));
            }
        }
    }
    NK_INLINE void head(index_t at, int n) {
        const Vec<X> v = load_last<X>(p + bytes<X>(at), n);
        if constexpr (kAboutOrigin<X>) {
            sum[K - 1] += keep_last<X>(v - origin, n);
        } else {
            add(K - 1, widened<Compute<X>>(v));
        }
    }
    NK_INLINE void flush() { total += sum_by_halves<double, K * W>(sum); }
};

// The sum of (x - pilot)^2. FirstReading: of a leaf; nobody knows its mean then, and the pilot is 0.
template <class X, bool FirstReading>
struct SquaresBlock {
    static constexpr index_t kLanes = 2 * kStep;  // one sum has registers for more chains
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int kShare = FirstReading ? 2 : 1;
    static constexpr int K = kLanes / kWidth<X>;
    In x;
    Vec<X> pilot;
    const char* p = nullptr;
    Vec<X> sum[K] = {};
    double total = 0;
    Adder<Compute<X>> plus;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void ask_ahead(index_t at) {
        if constexpr (FirstReading) ask_for_turn<X>(p, at);
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) {
            Vec<X> d = load<X>(p + bytes<X>(at + i * kWidth<X>));
            if constexpr (!FirstReading) d -= pilot;
            sum[i] = FirstReading ? sum[i] + d * d : plus.by_turns(i, sum[i], d * d);
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> d = load_rest<X>(p + bytes<X>(at + i * kWidth<X>), n) - pilot;
            sum[i] += n >= kWidth<X> ? d * d : keep_first<Compute<X>>(d * d, n);
        }
    }
    NK_INLINE void head(index_t at, int n) {
        const Vec<X> d = load_last<X>(p + bytes<X>(at), n) - pilot;
        sum[K - 1] += keep_last<Compute<X>>(d * d, n);
    }
    NK_INLINE void flush() {
        total += sum_by_halves<Compute<X>, K>(sum);
#pragma GCC unroll 32
        for (int i = 0; i < K; ++i) sum[i] = Vec<X>{};
    }
};

// NORMKIT_LOOSE: sums of d and d^2 in one reading, about the first element.
template <class X>
struct LooseBlock {
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = 1 << 20;
    static constexpr int kShare = 1;
    static constexpr int K = kLanes / kWidth<X>;
    In x;
    Vec<X> pilot;
    const char* p = nullptr;
    Vec<X> sum[K] = {}, squares[K] = {};
    double total = 0, total_squares = 0;

    NK_INLINE void row(index_t r) { p = x.at(r); }
    NK_INLINE void ask_ahead(index_t) {}
    NK_INLINE void add(int i, Vec<X> d) {
        sum[i] += d;
        squares[i] += d * d;
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add(i, load<X>(p + bytes<X>(at + i * kWidth<X>)) - pilot);
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> d = load_rest<X>(p + bytes<X>(at + i * kWidth<X>), n) - pilot;
            add(i, n >= kWidth<X> ? d : keep_first<Compute<X>>(d, n));
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<Compute<X>, K>(sum);
        total_squares += sum_by_halves<Compute<X>, K>(squares);
    }
};

// M2 from squares about a pilot, `off` being the mean less the pilot. The pilot is the mean rounded to X, so nothing
// that matters cancels; for a constant leaf it is exactly 0.
template <class V>
NK_INLINE V M2_about_mean(V squares, V off, double count) {
    const V M2 = squares - off * off * count;
    return M2 < 0 ? V{} : M2;
}

// One way or the other, for kernels that write rows past the caches beside (kBehindHead): those have leaves of one run.
template <class X, class B, class Beside>
NK_INLINE void for_leaf(In x, index_t rows, index_t lanes, B& block, Beside& beside) {
    if constexpr (kCanJoin && Beside::kBehindHead) {
        for_steps_behind(beside.head_of_leaf(x.p), lanes, block, beside);
    } else {
        for_steps(rows, lanes, block, beside);
    }
}

template <class X, class Beside>
NK_INLINE double leaf_mean(In x, index_t rows, index_t lanes, double origin, Beside& beside) {
    MeanBlock<X> sum{x, splat<double>(origin), {}, {}, 0, {}};
    for_leaf<X>(x, rows, lanes, sum, beside);
    return sum.total / static_cast<double>(rows * lanes);
}

template <class X, bool FirstReading, class Beside>
NK_INLINE double leaf_squares(In x, index_t rows, index_t lanes, Compute<X> pilot, Beside& beside) {
    SquaresBlock<X, FirstReading> squares{x, splat<X>(pilot), {}, {}, 0, {}};
    for_leaf<X>(x, rows, lanes, squares, beside);
    return squares.total;
}

// The squares of a leaf, a step of kTurn lanes at a time: of a whole leaf of one run, whose length compilers know,
template <class X>
class SquaresOfWhole {
  public:
    static constexpr bool kWhole = true;
    NK_INLINE SquaresOfWhole(In x, index_t, index_t, Compute<X> pilot) : block_{x, splat<X>(pilot), {}, {}, 0, {}} {
        block_.row(0);
    }
    NK_INLINE index_t left() const { return (kLeafLanes - at_) / Block::kLanes; }
    NK_INLINE void step() {
        block_.full(at_);
        at_ += Block::kLanes;
        if (at_ % kShort == 0) block_.flush();
    }
    NK_INLINE double total() const { return block_.total; }

  private:
    using Block = SquaresBlock<X, false>;
    static constexpr index_t kShort = Block::kLanes * Block::kSteps;  // lanes of a sum in X
    static_assert(Block::kLanes == kTurn && (kLoose || kLeafLanes % kShort == 0));

    Block block_;
    index_t at_ = 0;
};

// or of any.
template <class X>
class SquaresOfAny {
  public:
    static constexpr bool kWhole = false;
    NK_INLINE SquaresOfAny(In x, index_t rows, index_t lanes, Compute<X> pilot)
        : block_{x, splat<X>(pilot), {}, {}, 0, {}},
          lanes_(lanes),
          left_(rows * ((lanes + Block::kLanes - 1) / Block::kLanes)) {
        block_.row(0);
    }
    NK_INLINE index_t left() const { return left_; }
    NK_INLINE void step() {
        if (lanes_ - at_ >= Block::kLanes) {
            block_.full(at_);
        } else {
            block_.tail(at_, static_cast<int>(lanes_ - at_));
        }
        at_ += Block::kLanes;
        if (at_ >= lanes_) {
            at_ = 0;
            block_.row(++row_);
        }
        --left_;
        if (++steps_ == Block::kSteps) {
            block_.flush();
            steps_ = 0;
        }
    }
    NK_INLINE double total() {
        if (steps_ > 0) block_.flush();
        return block_.total;
    }

  private:
    using Block = SquaresBlock<X, false>;
    static_assert(Block::kLanes == kTurn);

    Block block_;
    const index_t lanes_;
    index_t at_ = 0, row_ = 0, left_, steps_ = 0;  // left_: of all runs; steps_: of the sum in X
};

// Squares as something to do beside the mean of another leaf, and beside both whatever there is.
template <class Squares, class Beside>
class Squaring {
  public:
    static constexpr bool kBehindHead = false, kHasOthers = !Squares::kWhole;
    template <class T>
    NK_INLINE Squaring(In x, index_t rows, index_t lanes, T pilot, Beside& beside)
        : squares_(x, rows, lanes, pilot), beside_(beside) {}
    NK_INLINE bool asks() const { return beside_.asks(); }
    NK_INLINE index_t turns() const {
        const index_t own = squares_.left(), others = beside_.turns() / 2;
        return own < others ? own : others;
    }
    NK_INLINE void turn() {
        squares_.step();
        beside_.turn();  // as many turns as the mean and the squares would have had one after the other
        beside_.turn();
    }
    NK_INLINE Beside& others() const { return beside_; }
    NK_INLINE double rest() {
        for (; squares_.left() > 0 && beside_.turns() > 0; beside_.turn()) squares_.step();
        while (squares_.left() > 0) squares_.step();
        return squares_.total();
    }

  private:
    Squares squares_;
    Beside& beside_;
};

template <class X>
NK_INLINE Moments loose_leaf(In x, index_t rows, index_t lanes) {
    const double count = static_cast<double>(rows * lanes);
    const Compute<X> pilot = load_first<X>(x.p, 1)[0];
    LooseBlock<X> block{x, splat<X>(pilot), {}, {}, {}, 0, 0};
    for_steps(rows, lanes, block);
    const double off = block.total / count;
    return {count, pilot + off, M2_about_mean(block.total_squares, off, count)};
}

// How leaves are summed: about zero, in one reading; about their means, in two, one after the other; or the squares of
// one beside the mean of the next, which keeps all units of a core busy (one does conversions to double, the others
// squares) and memory never idle: any leaves, or whole ones of one run. One thread of a Zen 5, time of one after the
// other over time with it: group NCHW 1 x 128 x 512^2 1.3, 32 x 256 x 56^2 1.17, instance 2 x 32 x 64^3 1.28; in L3
// 1.0. Other instruction sets have too few registers, and float64 has no conversions.
enum class Leaf { about_zero, in_turn, overlapped, whole };
constexpr bool kCanOverlap = kVectorBytes == 64;

// overlaps: whether those of other than whole leaves should be, where there is a function for it (kAnyOverlapped).
// docs/decisions/0002-schedule.md, "Squares beside the next mean".
NK_INLINE Leaf leaf_of(const LeafSeries& s, bool center, bool overlaps) {
    if (!center || kLoose) return Leaf::about_zero;
    if (!kCanOverlap) return Leaf::in_turn;
    if (s.rows == 1 && s.leaves > 1 && s.lanes == kLeafLanes) return Leaf::whole;
    return overlaps ? Leaf::overlapped : Leaf::in_turn;
}

// Goes through the leaves of some series.
template <class X>
class LeafCursor {
  public:
    using T = Compute<X>;

    NK_INLINE LeafCursor(const LeafSeries* series, index_t n) : now_(series), end_(series + n) {
        if (now_ != end_) begin();
    }
    NK_INLINE bool done() const { return now_ == end_; }
    NK_INLINE void next() {
        at_.x.p += at_.leaf;
        at_.origin.p += at_.origin.row;
        if (--at_.leaves == 0 && ++now_ != end_) begin();
    }
    NK_INLINE In x() const { return at_.x; }
    NK_INLINE index_t rows() const { return at_.rows; }
    NK_INLINE index_t lanes() const { return at_.lanes; }
    NK_INLINE T origin() const {
        if constexpr (kAboutOrigin<X>) return value_at<T>(at_.origin.p);
        return T{0};
    }

  private:
    NK_INLINE void begin() { at_ = *now_; }

    const LeafSeries *now_, *const end_;
    LeafSeries at_;  // what is left of it
};

// The same through one series of whole leaves of one run, whose length compilers know.
template <class X>
class WholeLeaves {
  public:
    NK_INLINE explicit WholeLeaves(const LeafSeries& s) : x_(s.x), origin_(s.origin), leaf_(s.leaf), left_(s.leaves) {}
    NK_INLINE bool done() const { return left_ == 0; }
    NK_INLINE void next() {
        x_.p += leaf_;
        origin_.p += origin_.row;
        --left_;
    }
    NK_INLINE In x() const { return x_; }
    NK_INLINE static index_t rows() { return 1; }
    NK_INLINE static index_t lanes() { return kLeafLanes; }
    NK_INLINE Compute<X> origin() const {
        if constexpr (kAboutOrigin<X>) return value_at<Compute<X>>(origin_.p);
        return 0;
    }

  private:
    In x_, origin_;
    const index_t leaf_;
    index_t left_;
};

// How any leaves are overlapped, where that is worth a function, and whole ones.
template <class X>
constexpr Leaf kAnyOverlapped = kCanOverlap && !kAboutOrigin<X> ? Leaf::overlapped : Leaf::in_turn;
constexpr Leaf kWholeOverlapped = kCanOverlap ? Leaf::whole : Leaf::in_turn;

template <Leaf How, class X>
NK_INLINE auto leaves_of(const LeafSeries* series, index_t n) {
    if constexpr (How == Leaf::whole) {
        return WholeLeaves<X>(*series);
    } else {
        return LeafCursor<X>(series, n);
    }
}

template <class X, bool AboutZero, class Beside>
NK_INLINE Moments moments_of_leaf(In x, index_t rows, index_t lanes, Compute<X> origin, [[maybe_unused]] bool center,
                                  Beside& beside) {
    using T = Compute<X>;
    const double count = static_cast<double>(rows * lanes);
    if constexpr (AboutZero) {
        if (kLoose && center) return loose_leaf<X>(x, rows, lanes);
        return {count, 0, leaf_squares<X, true>(x, rows, lanes, 0, beside)};
    } else {
        const double mean = leaf_mean<X>(x, rows, lanes, origin, beside);
        const T pilot = static_cast<T>(origin + mean);
        const double squares = leaf_squares<X, false>(x, rows, lanes, pilot, beside);
        return {count, mean, M2_about_mean(squares, mean - static_cast<double>(pilot - origin), count)};
    }
}

template <class X, Leaf How, class Beside>
NK_INLINE void moments_of_leaves(const LeafSeries* series, index_t n, bool center, Moments* out, Beside& beside) {
    using T = Compute<X>;
    auto leaf = leaves_of<How, X>(series, n);
    if constexpr (How == Leaf::about_zero) {
        for (; !leaf.done(); leaf.next()) {
            *out++ = moments_of_leaf<X, true>(leaf.x(), leaf.rows(), leaf.lanes(), 0, center, beside);
        }
        return;
    }
    // From memory one leaf after another, as its lines come, if at all in turn. Nanoseconds for 16 elements, a sketch
    // of moments alone (one thread of a Zen 5): 2.2, next mean first 3.8; with lines asked for 1.5 and 1.8.
    if (How == Leaf::in_turn && beside.asks()) {
        for (; !leaf.done(); leaf.next()) {
            *out++ = moments_of_leaf<X, false>(leaf.x(), leaf.rows(), leaf.lanes(), leaf.origin(), center, beside);
        }
        return;
    }
    // In a cache the mean of the next leaf before the squares of this one: what is left of a sum at its end, folding
    // and a division, is latency, and hides behind other work.
    const auto mean_beside = [&](auto& work) NK_INLINE_LAMBDA {
        return leaf_mean<X>(leaf.x(), leaf.rows(), leaf.lanes(), leaf.origin(), work);
    };
    double next = mean_beside(beside);
    while (!leaf.done()) {
        const double mean = next;
        const In here = leaf.x();
        const index_t rows = leaf.rows(), lanes = leaf.lanes();
        const T from = leaf.origin(), pilot = static_cast<T>(from + mean);
        leaf.next();
        double squares;
        if constexpr (How != Leaf::in_turn) {
            using Squares = std::conditional_t<How == Leaf::whole, SquaresOfWhole<X>, SquaresOfAny<X>>;
            Squaring<Squares, Beside> squaring(here, rows, lanes, pilot, beside);
            if (!leaf.done()) next = mean_beside(squaring);
            squares = squaring.rest();
        } else {
            if (!leaf.done()) next = mean_beside(beside);
            squares = leaf_squares<X, false>(here, rows, lanes, pilot, beside);
        }
        const double count = static_cast<double>(rows * lanes);
        *out++ = {count, mean, M2_about_mean(squares, mean - static_cast<double>(pilot - from), count)};
    }
}

// Leaves of many short runs, as those of batch norm in NCHW: a run is so many groups of the vectors of two steps and R
// vectors more, of which the last may be part-filled, so that nothing is counted or asked within one. The same sums as
// MeanBlock and SquaresBlock: those go over to double after kDepth groups, here a whole number of runs.
//
// Run by run the mean of a leaf beside the squares of the one before, as in LeafChunk; and as there, squares read what
// the mean has put side by side: runs lie a multiple of 4 KiB apart more often than not, and L1 has room for few lines
// that do.
template <class X, int R>
class ShortRuns {
  public:
    using T = Compute<X>;
    static constexpr int K = kStep / kWidth<X>, W = Widened<T>::kVectors, G = 2 * K;
    using Block = SquaresBlock<X, false>;
    static_assert(kLoose || (Block::kLanes == G * kWidth<X> && Block::kSteps == kDepth));
    using Staged = Vec<X>[kLeafSteps * K];

    NK_INLINE explicit ShortRuns(index_t lanes)
        : lanes_(lanes),
          groups_((lanes - 1) / (2 * kStep)),
          vectors_(groups_ * G + R),
          last_(static_cast<int>(lanes - groups_ * 2 * kStep) - (R - 1) * kWidth<X>),
          at_once_(kDepth / (groups_ + 1)) {}

    // The mean of `rows` runs, which are put to `staged`, and the squares of `before` runs that were put to
    // staged_before, about `pilot`.
    template <bool Asks>
    NK_INLINE double mean_beside(In x, index_t rows, Staged& staged, const Staged& staged_before, index_t before,
                                 T pilot, double* squares) const {
        Mean mean;
        index_t r = 0;
        for (index_t first = 0; first < before; first += at_once_) {
            Squares sums;
            const index_t end = before - first < at_once_ ? before : first + at_once_;
            for (const index_t both = end < rows ? end : rows; r < both; ++r) {
                add_run<Asks>(mean, x.at(r), staged + r * vectors_);
                add_squares(sums, staged_before + r * vectors_, pilot);
            }
            for (index_t i = r > first ? r : first; i < end; ++i) {
                add_squares(sums, staged_before + i * vectors_, pilot);
            }
            *squares += sum_by_halves<T, G>(sums.of);
        }
        for (; r < rows; ++r) add_run<Asks>(mean, x.at(r), staged + r * vectors_);
        if (rows == 0) return 0;
        return (0 + sum_by_halves<double, K * W>(mean.of)) / static_cast<double>(rows * lanes_);
    }

  private:
    struct Mean {
        Vec<double> of[K * W] = {};
    };
    struct Squares {
        Vec<X> of[G] = {};
    };

    template <bool Asks>
    NK_INLINE void add_run(Mean& sum, const char* p, Vec<X>* to) const {
        // To L2: so far ahead in memory are channels whose turn comes dozens of runs later (7^2 forward 0.95 if to L1).
        for (index_t at = 0; Asks && at < lanes_; at += kTurn) ask_for_turn<X, false>(p + bytes<X>(at) + kAhead);
        const auto add_wide = [&](int i, const Widened<T>& wide) NK_INLINE_LAMBDA {
#pragma GCC unroll 2
            for (int j = 0; j < W; ++j) sum.of[i % K * W + j] = plus_(sum.of[i % K * W + j], wide.v[j]);
        };
        const auto add = [&](int i, const char* from) NK_INLINE_LAMBDA {
            to[i] = load<X>(from);
            add_wide(i, load_widened<X>(from));
        };
        for (index_t g = 0; g < groups_; ++g, p += G * kMemoryBytes<X>, to += G) {
#pragma GCC unroll 8
            for (int i = 0; i < G; ++i) add(i, p + i * kMemoryBytes<X>);
        }
#pragma GCC unroll 8
        for (int i = 0; i + 1 < R; ++i) add(i, p + i * kMemoryBytes<X>);
        to[R - 1] = load_first<X>(p + (R - 1) * kMemoryBytes<X>, last_);
        add_wide(R - 1, widened<T>(to[R - 1]));
    }
    NK_INLINE void add_squares(Squares& sum, const Vec<X>* from, T pilot) const {
        const auto add = [&](int i, auto is_whole) NK_INLINE_LAMBDA {
            const Vec<X> d = from[i] - splat<X>(pilot), square = d * d;
            sum.of[i] = plus_squares_.by_turns(i, sum.of[i], is_whole ? square : keep_first<T>(square, last_));
        };
        for (index_t g = 0; g < groups_; ++g, from += G) {
#pragma GCC unroll 8
            for (int i = 0; i < G; ++i) add(i, std::true_type{});
        }
#pragma GCC unroll 8
        for (int i = 0; i + 1 < R; ++i) add(i, std::true_type{});
        add(R - 1, std::false_type{});
    }

    const index_t lanes_, groups_, vectors_;  // of a run
    const int last_;
    const index_t at_once_;  // runs of a sum of squares in X
    const Adder<double> plus_;
    const Adder<T> plus_squares_;
};

template <class X, int R, bool Asks>
NK_INLINE void moments_of_short_runs_as(const LeafSeries* series, index_t n, Moments* out) {
    using T = Compute<X>;
    LeafCursor<X> leaf(series, n);
    const index_t lanes = leaf.lanes();
    const ShortRuns<X, R> runs(lanes);
    typename ShortRuns<X, R>::Staged staged[2];
    double squares = 0,
           next = runs.template mean_beside<Asks>(leaf.x(), leaf.rows(), staged[0], staged[1], 0, 0, &squares);
    for (int now = 0; !leaf.done(); now = 1 - now) {
        const double mean = next;
        const index_t rows = leaf.rows();
        const T pilot = static_cast<T>(mean);
        leaf.next();
        const In x = leaf.done() ? In{} : leaf.x();
        const index_t next_rows = leaf.done() ? 0 : leaf.rows();
        squares = 0;
        next = runs.template mean_beside<Asks>(x, next_rows, staged[1 - now], staged[now], rows, pilot, &squares);
        const double count = static_cast<double>(rows * lanes);
        *out++ = {count, mean, M2_about_mean(squares, mean - static_cast<double>(pilot), count)};
    }
}

template <class X, int R>
void moments_of_short_runs(const LeafSeries* series, index_t n, bool far, Moments* out) {
    (far ? moments_of_short_runs_as<X, R, true> : moments_of_short_runs_as<X, R, false>)(series, n, out);
}

// Null where runs of so many lanes have no such kernel: a sum of squares takes a whole number of runs, so these have
// one, two or four groups; other instruction sets have too few registers.
template <class X>
NK_INLINE void (*short_runs_kernel([[maybe_unused]] index_t lanes))(const LeafSeries*, index_t, bool, Moments*) {
    if constexpr (kVectorBytes == 64 && !kAboutOrigin<X>) {
        constexpr index_t kGroup = 2 * kStep;
        const index_t groups = (lanes + kGroup - 1) / kGroup;
        if (groups > 4 || kDepth % groups != 0) return nullptr;
        switch ((lanes - (groups - 1) * kGroup + kWidth<X> - 1) / kWidth<X>) {
            case 1: return moments_of_short_runs<X, 1>;
            case 2: return moments_of_short_runs<X, 2>;
            case 3: return moments_of_short_runs<X, 3>;
            default: return moments_of_short_runs<X, 4>;
        }
    }
    return nullptr;
}

// f(how, series, n, out) for some series after another that are summed alike; those of whole leaves go alone.
template <class F>
NK_INLINE void for_alike(const LeafSeries* series, index_t n, bool center, bool overlaps, Moments* out, F f) {
    for (index_t first = 0, last; first < n; first = last) {
        const Leaf how = leaf_of(series[first], center, overlaps);
        index_t leaves = series[first].leaves;
        last = first + 1;
        if (how != Leaf::whole) {
            for (; last < n && leaf_of(series[last], center, overlaps) == how; ++last) leaves += series[last].leaves;
        }
        f(how, series + first, last - first, out);
        out += leaves;
    }
}

// A function for each way: GCC 12 keeps sums in registers only where functions are not too large.
template <class X, Leaf How>
void moments_along_as(const LeafSeries* series, index_t n, bool center, bool far, Moments* out) {
    Nothing nothing;
    nothing.asking = far;
    moments_of_leaves<X, How>(series, n, center, out, nothing);
}

template <class X>
void moments_along(const LeafSeries* series, index_t n, bool center, bool far, Moments* out) {
    const bool overlaps = far || sizeof(X) == 4;
    for_alike(series, n, center, overlaps, out, [=](Leaf how, const LeafSeries* alike, index_t m, Moments* to) {
        if (how != Leaf::about_zero && alike->rows > 1) {
            if (const auto short_runs = short_runs_kernel<X>(alike->lanes)) return short_runs(alike, m, far, to);
        }
        const auto kernel = how == Leaf::about_zero ? moments_along_as<X, Leaf::about_zero>
                            : how == Leaf::in_turn  ? moments_along_as<X, Leaf::in_turn>
                            : how == Leaf::whole    ? moments_along_as<X, kWholeOverlapped>
                                                    : moments_along_as<X, kAnyOverlapped<X>>;
        kernel(alike, m, center, far, to);
    });
}

// Sums of g and of g * (x - hi): what makes of the second the sum of g * xhat is the same for the whole set.
template <class X, bool WLane, class Asks = NoAsker>
struct SumsBlock {
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int kShare = 1;
    static constexpr int K = kLanes / kWidth<X>;
    In dy, x, w;
    Vec<X> hi, w_row;
    const char *p_dy = nullptr, *p_x = nullptr, *p_w = nullptr;
    Vec<X> sum[K] = {}, sum_d[K] = {};
    double total = 0, total_d = 0;
    Adder<T> plus;
    Asks* asker = nullptr;

    NK_INLINE void row(index_t r) {
        p_dy = dy.at(r);
        p_x = x.at(r);
        p_w = w.at(r);
        if constexpr (!WLane) w_row = splat<X>(value_at<T>(p_w));
    }
    NK_INLINE void ask_ahead(index_t at) {
        if constexpr (std::is_empty_v<Asks>) {
            ask_for_turn<X>(p_dy, at, ahead_of_two(kAheadOfTwo));
            ask_for_turn<X>(p_x, at, ahead_of_two(kAheadOfTwo));
        } else {
            asker->turn();
        }
    }
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            const index_t lane = at + i * kWidth<X>;
            const Vec<X> g = load<X>(p_dy + bytes<X>(lane)) * (WLane ? load<T>(p_w + bytes<T>(lane)) : w_row);
            sum[i] = plus.by_turns(i, sum[i], g);
            sum_d[i] += g * (load<X>(p_x + bytes<X>(lane)) - hi);
        }
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const index_t lane = at + i * kWidth<X>;
            const Vec<X> g =
                load_rest<X>(p_dy + bytes<X>(lane), n) * (WLane ? load_rest<T>(p_w + bytes<T>(lane), n) : w_row);
            const Vec<X> g_d = g * (load_rest<X>(p_x + bytes<X>(lane), n) - hi);
            sum[i] += n >= kWidth<X> ? g : keep_first<T>(g, n);
            sum_d[i] += n >= kWidth<X> ? g_d : keep_first<T>(g_d, n);
        }
    }
    NK_INLINE void head(index_t at, int n) {
        const Vec<X> g = load_last<X>(p_dy + bytes<X>(at), n) * (WLane ? load_last<T>(p_w + bytes<T>(at), n) : w_row);
        const Vec<X> g_d = g * (load_last<X>(p_x + bytes<X>(at), n) - hi);
        sum[K - 1] += keep_last<T>(g, n);
        sum_d[K - 1] += keep_last<T>(g_d, n);
    }
    NK_INLINE void flush() {
        total += sum_by_halves<Compute<X>, K>(sum);
        total_d += sum_by_halves<Compute<X>, K>(sum_d);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) sum[i] = sum_d[i] = Vec<X>{};
    }
};

// From sums of g and g * (x - hi) to the sum of g * xhat.
template <class V>
NK_INLINE V xhat_sum(V g, V g_d, V lo, V rstd) {
    return (kLoose ? g_d : g_d - lo * g) * rstd;
}

template <class X, bool WLane, class Beside, class Asks = NoAsker>
NK_INLINE Sums sums_of_leaf(In dy, In x, In w, const Statistics<Compute<X>>& s, index_t k, index_t rows, index_t lanes,
                            Beside& beside, Asks* asker = nullptr) {
    SumsBlock<X, WLane, Asks> block{dy, x, w, splat<X>(s.hi[k]), {}, {}, {}, {}, {}, {}, 0, 0, {}, asker};
    for_leaf<X>(x, rows, lanes, block, beside);
    return {block.total, xhat_sum<double>(block.total, block.total_d, s.lo[k], s.rstd[k])};
}

// A function for each way to ask, and `asker` not of this one: GCC 12 then keeps sums in registers.
template <class X, bool WLane, class Asks>
__attribute__((noinline)) void sums_along_as(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s,
                                             Sums* out, Asks* asker) {
    Nothing nothing;
    nothing.asking = !std::is_same_v<Asks, NoAsker>;
    for (; n > 0; --n, ++series) {
        const SumSeries all = *series;
        In dy = all.dy, x = all.x;
        for (index_t i = 0; i < all.leaves; ++i, dy.p += all.leaf_dy, x.p += all.leaf_x) {
            const index_t k = all.set + i * all.next_set;
            *out++ = sums_of_leaf<X, WLane>(dy, x, all.w, s, k, all.rows, all.lanes, nothing, asker);
        }
    }
}

// Sums of leaves of one run of up to kStep elements, eight at a time: folding the lanes of a sum to a number is as much
// as the arithmetic of 64. The same sums as those of SumsBlock. V: vectors of a run.
template <class X, int V>
NK_INLINE void sums_of_eight(const SumSeries& of, index_t first, const Statistics<Compute<X>>& s, Sums* out) {
    using T = Compute<X>;
    const index_t k = of.set + first * of.next_set;
    const Vec<X> w = splat<X>(value_at<T>(of.w.p));
    Vec<X> g[kEight], g_d[kEight];
#pragma GCC unroll 8
    for (int j = 0; j < kEight; ++j) {
        const char *const dy = of.dy.p + (first + j) * of.leaf_dy, *const x = of.x.p + (first + j) * of.leaf_x;
        const Vec<X> hi = splat<X>(s.hi[k + j * of.next_set]);
        Vec<X> sum[V] = {}, sum_d[V] = {};
        int n = static_cast<int>(of.lanes);
#pragma GCC unroll 16
        for (int i = 0; i < V; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const Vec<X> gv = load_rest<X>(dy + i * kMemoryBytes<X>, n) * w;
            sum[i] = keep_first<T>(gv, n);
            sum_d[i] = keep_first<T>(gv * (load_rest<X>(x + i * kMemoryBytes<X>, n) - hi), n);
        }
        g[j] = vectors_by_halves(sum);
        g_d[j] = vectors_by_halves(sum_d);
    }
    const auto of_sets = [&](const T* p) { return of.next_set == 0 ? Eight<T>{} + p[k] : load_eight(p + k); };
    const Eight<double> sum_g = 0.0 + widened(lanes_by_halves<T>(g)), sum_d = 0.0 + widened(lanes_by_halves<T>(g_d));
    const Eight<double> xhat = xhat_sum<Eight<double>>(sum_g, sum_d, widened(of_sets(s.lo)), widened(of_sets(s.rstd)));
    static_assert(sizeof(Sums) == 2 * sizeof(double));
    store_eight(&out[0].g, __builtin_shufflevector(sum_g, xhat, 0, 8, 1, 9, 2, 10, 3, 11));
    store_eight(&out[4].g, __builtin_shufflevector(sum_g, xhat, 4, 12, 5, 13, 6, 14, 7, 15));
}

template <class X, int V>
__attribute__((noinline)) void sums_of_short_leaves(const SumSeries& of, const Statistics<Compute<X>>& s, Sums* out) {
    const SumSeries all = of;  // which no store can change
    index_t i = 0;
    for (; all.leaves - i >= kEight; i += kEight) sums_of_eight<X, V>(all, i, s, out + i);
    Nothing nothing;
    for (; i < all.leaves; ++i) {
        const In dy{all.dy.p + i * all.leaf_dy, 0}, x{all.x.p + i * all.leaf_x, 0};
        out[i] = sums_of_leaf<X, false>(dy, x, all.w, s, all.set + i * all.next_set, 1, all.lanes, nothing);
    }
}

NK_INLINE bool are_short_leaves(const SumSeries& of) {
    return of.rows == 1 && of.lanes <= kStep && of.leaves >= kEight && of.next_set <= 1;
}

// Sums of leaves whose runs lie side by side, row by row of all of them: memory is read in its order, and the sums of a
// leaf wait in L1 for its next run. The same sums as those of SumsBlock: they go over to double every kDepth steps,
// also in the midst of a run. docs/decisions/0002-schedule.md, "Small images".
template <class X>
class SideBySide {
  public:
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep * kDepth;  // of a run at most, so that it goes over once at most

    NK_INLINE SideBySide(const SumSeries& all, const Statistics<T>& s) : all_(all), s_(s) {}

    template <class Asks>
    NK_INLINE void sum(Sums* out, [[maybe_unused]] Asks* asker) {
        const index_t steps = (all_.lanes + kStep - 1) / kStep;
        const Vec<X> w = splat<X>(value_at<T>(all_.w.p));
        for (index_t i = 0; i < all_.leaves; ++i) {
            chains_[i] = {};
            out[i] = {};
        }
        index_t done = 0;  // steps since the last time that sums went over
        for (index_t r = 0; r < all_.rows; ++r) {
            const char *dy = all_.dy.at(r), *x = all_.x.at(r);
            const index_t left = kLoose ? steps + 1 : kDepth - done;
            [[maybe_unused]] index_t asked = 0;
            for (index_t i = 0; i < all_.leaves; ++i, dy += all_.leaf_dy, x += all_.leaf_x) {
                if constexpr (!std::is_same_v<Asks, NoAsker>) {
                    for (; asked < (i + 1) * all_.lanes; asked += kTurn) asker->turn();
                }
                const Run run{dy, x, w, splat<X>(s_.hi[number(i)])};
                Chains chains = chains_[i];
                index_t step = 0;
                if (left <= steps) {
                    for (; step < left; ++step) add(chains, run, step);
                    go_over(chains, out[i]);
                }
                for (; (step + 1) * kStep <= all_.lanes; ++step) add_full(chains, run, step);
                if (step < steps) add(chains, run, step);
                chains_[i] = chains;
            }
            done += left <= steps ? steps - kDepth : steps;
        }
        for (index_t i = 0; i < all_.leaves; ++i) {
            if (done > 0) go_over(chains_[i], out[i]);
            out[i].g_xhat = xhat_sum<double>(out[i].g, out[i].g_xhat, s_.lo[number(i)], s_.rstd[number(i)]);
        }
    }

  private:
    static constexpr int K = kStep / kWidth<X>;
    struct Chains {
        Vec<X> g[K], g_d[K];
    };
    struct Run {
        const char *dy, *x;
        Vec<X> w, hi;
    };
    NK_INLINE index_t number(index_t i) const { return all_.set + i * all_.next_set; }
    NK_INLINE void add_full(Chains& c, const Run& run, index_t step) const {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) {
            const index_t o = bytes<X>(step * kStep + i * kWidth<X>);
            const Vec<X> g = load<X>(run.dy + o) * run.w;
            c.g[i] = plus_.by_turns(i, c.g[i], g);
            c.g_d[i] += g * (load<X>(run.x + o) - run.hi);
        }
    }
    NK_INLINE void add(Chains& c, const Run& run, index_t step) const {
        int n = static_cast<int>(all_.lanes - step * kStep);
        if (n >= kStep) return add_full(c, run, step);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n <= 0) continue;
            const index_t o = bytes<X>(step * kStep + i * kWidth<X>);
            const Vec<X> g = load_rest<X>(run.dy + o, n) * run.w, g_d = g * (load_rest<X>(run.x + o, n) - run.hi);
            c.g[i] += n >= kWidth<X> ? g : keep_first<T>(g, n);
            c.g_d[i] += n >= kWidth<X> ? g_d : keep_first<T>(g_d, n);
        }
    }
    NK_INLINE static void go_over(Chains& c, Sums& to) {
        to.g += sum_by_halves<T, K>(c.g);
        to.g_xhat += sum_by_halves<T, K>(c.g_d);
        c = {};
    }

    const SumSeries all_;  // which no store can change
    const Statistics<T> s_;
    const Adder<T> plus_;
    Chains chains_[kSideBySide];
};

template <class X, class Asks>
__attribute__((noinline)) void sums_side_by_side_as(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s,
                                                    Sums* out, Asks* asker) {
    for (; n > 0; --n, out += series++->leaves) SideBySide<X>(*series, s).sum(out, asker);
}

// False: they do not all lie so.
template <class X>
NK_INLINE bool sums_side_by_side(const SumSeries* series, index_t n, const Statistics<Compute<X>>& s, bool far,
                                 Sums* out) {
    using Sides = SideBySide<X>;
    if (series->rows == 1) return false;  // of a last leaf it may be one
    for (index_t i = 0; i < n; ++i) {
        const SumSeries& all = series[i];
        if (all.leaves == 1 || all.leaves > kSideBySide || all.lanes > Sides::kLanes || all.w.row != 0) return false;
        if (all.leaf_dy != bytes<X>(all.lanes) || all.leaf_x != all.leaf_dy) return false;
    }
    NoAsker* const none = nullptr;
    if (!far) {
        sums_side_by_side_as<X>(series, n, s, out, none);
        return true;
    }
    constexpr index_t kAtOnce = 16;  // series of rows for one asker
    for (index_t first = 0; first < n; first += kAtOnce) {
        const index_t some = n - first < kAtOnce ? n - first : kAtOnce;
        SumSeries rows[kAtOnce];
        for (index_t i = 0; i < some; ++i) {
            rows[i] = series[first + i];
            rows[i].lanes *= rows[i].leaves;
            rows[i].leaves = 1;
        }
        with_asker<X, Start::by_and_by>(
            rows, some, [&](auto* asker) { sums_side_by_side_as<X>(series + first, some, s, out, asker); });
        for (index_t i = 0; i < some; ++i) out += series[first + i].leaves;
    }
    return true;
}

// Runs of up to so many bytes, whose turns are few and half empty, ask for what follows in memory. In order over that:
// 32 x 2048 x 7^2 1.25; float64 32 x 600 x 8^2, of 512 bytes, 1.15; float32 runs of 544 to 576 bytes 0.75 to 0.87.
constexpr index_t kShortRunBytes = 512;

template <class X, bool WLane>
void sums_along(const SumSeries* series, index_t n, Statistics<Compute<X>> s, bool far, Sums* out) {
    if constexpr (!WLane) {
        if (sums_side_by_side<X>(series, n, s, far, out)) return;
        if constexpr (!kAboutOrigin<X>) {
            for (; n > 0 && are_short_leaves(*series); --n, out += series++->leaves) {
                const auto kernel = series->lanes <= kWidth<X> ? sums_of_short_leaves<X, 1>
                                                               : sums_of_short_leaves<X, kStep / kWidth<X>>;
                kernel(*series, s, out);
            }
            if (n == 0) return;
        }
    }
    NoAsker* const none = nullptr;
    AsksInMemory* const in_memory = nullptr;
    if (!far || !far_apart(series->x)) {
        sums_along_as<X, WLane>(series, n, s, out, none);
    } else if (WLane || bytes<X>(series->lanes) <= kShortRunBytes) {
        sums_along_as<X, WLane>(series, n, s, out, in_memory);
    } else if constexpr (!WLane) {
        with_asker<X, Start::at_once>(series, n,
                                      [&](auto* asker) { sums_along_as<X, WLane>(series, n, s, out, asker); });
    }
}

// Sums of dy and dy * xhat of a row whose lanes are different sets.
template <class X>
struct AcrossBlock {
    using T = Compute<X>;
    static constexpr index_t kLanes = kStep;
    static constexpr index_t kSteps = kLoose ? 1 << 20 : kDepth;
    static constexpr int kShare = 1;
    static constexpr int K = kLanes / kWidth<X>;
    const char *dy, *x;
    Statistics<T> s;
    Vec<X> sum[K] = {}, sum_xhat[K] = {};
    double total = 0, total_xhat = 0;

    NK_INLINE void row(index_t) {}
    NK_INLINE void ask_ahead(index_t) {}
    NK_INLINE void full(index_t at) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) add(i, at + i * kWidth<X>, kWidth<X>);
    }
    NK_INLINE void tail(index_t at, int n) {
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i, n -= kWidth<X>) {
            if (n > 0) add(i, at + i * kWidth<X>, n);
        }
    }
    NK_INLINE void flush() {
        total += sum_by_halves<T, K>(sum);
        total_xhat += sum_by_halves<T, K>(sum_xhat);
#pragma GCC unroll 16
        for (int i = 0; i < K; ++i) sum[i] = sum_xhat[i] = Vec<X>{};
    }

  private:
    NK_INLINE void add(int i, index_t lane, int n) {
        const auto of_set = [=](const T* p)
                                NK_INLINE_LAMBDA { return load_rest<T>(reinterpret_cast<const char*>(p + lane), n); };
        // Where there is nothing, all of them are 0, and so is what is added.
        const Vec<X> v = load_rest<X>(dy + bytes<X>(lane), n), d = load_rest<X>(x + bytes<X>(lane), n) - of_set(s.hi);
        sum[i] += v;
        sum_xhat[i] += v * ((d - of_set(s.lo)) * of_set(s.rstd));
    }
};

template <class X>
void sums_across(In dy, In x, Statistics<Compute<X>> s, index_t rows, index_t lanes, Sums* out) {
    for (index_t r = 0; r < rows; ++r) {
        AcrossBlock<X> block{dy.at(r), x.at(r), s};
        for_steps(1, lanes, block);
        out[r] += {block.total, block.total_xhat};
    }
}

// Whether it pays to ask for lines of y: with w and b one a lane 1.0 to 1.1, else 0.9 to 1.05 (an Emerald Rapids).
template <class X, Stores How, bool WLane>
NK_INLINE void put_along(EndsOf<X, How, WLane>& ends, char* y, Vec<X> v, int n) {
    if constexpr (WLane) {
        put_asking<X, How, WLane>(ends, y, v, n);
    } else {
        put<X, How, WLane>(ends, y, v, n);
    }
}

// A row to be written, a few vectors at a time; half as many as its moments, which are two readings, take.
template <class X, bool WLane, Stores How>
struct Applying {
    using T = Compute<X>;
    using Ends = EndsOf<X, How, WLane>;
    static constexpr bool kBehindHead = WLane && How == Stores::joined, kHasOthers = false;
    NK_INLINE static index_t head_of_leaf(const char* x) { return head_of<X>(x); }
    static constexpr index_t kElements = kTurn / 2;
    index_t lanes, lane;
    const char *x, *w, *b;
    char* y;
    index_t w_lanes = 0, b_lanes = 0;  // masks: 0 for a constant
    bool centred;                      // as in apply_along_rows: where not, b is added as it is
    bool far;
    EndsOf<X, How, WLane>* ends;
    Vec<X> hi, lo, rstd, a = {}, c = {};

    NK_INLINE Applying(const Unwritten<X>& of, EndsOf<X, How, WLane>& of_rows)
        : lanes(of.lanes),
          lane(of.lane),
          x(of.x.at(of.row)),
          w(of.w.at(of.row)),
          b(of.b.at(of.row)),
          y(of.y.at(of.row)),
          far(of.far),
          ends(&of_rows) {
        const index_t k = of.row * of.s.row;
        const T hi_row = of.s.hi[k], lo_row = of.s.lo[k], rstd_row = of.s.rstd[k];
        centred = hi_row != 0 || lo_row != 0;
        hi = splat<X>(hi_row);
        lo = splat<X>(lo_row);
        rstd = splat<X>(rstd_row);
        if constexpr (WLane) {
            w_lanes = of.w_constant ? 0 : ~index_t{0};
            b_lanes = of.b_constant ? 0 : ~index_t{0};
        } else {
            const YTerms<T> terms = y_terms<T>(hi_row, lo_row, rstd_row, value_at<T>(w), value_at<T>(b));
            a = splat<X>(terms.a);
            c = splat<X>(terms.c);
        }
        if constexpr (How == Stores::joined) {
            ends->begin(y + bytes<X>(lane));
            const index_t head = lane == 0 ? head_of_joined<X, WLane>(of.x, of.y, of.row, of.lanes) : 0;
            if (head > 0) vector(static_cast<int>(head));
        } else if constexpr (How == Stores::cached && !WLane) {
            const index_t head = lane == 0 ? head_in_cache<X>(of.y, of.row, of.lanes) : 0;
            if (head > 0) vector(static_cast<int>(head));
        }
    }
    NK_INLINE void vector(int n) {
        const Vec<X> av = WLane ? rstd * load_rest<T>(w + bytes<T>(lane & w_lanes), n) : a;
        Vec<X> d = load_rest<X>(x + bytes<X>(lane), n), cv = c;
        if constexpr (WLane) cv = load_rest<T>(b + bytes<T>(lane & b_lanes), n);
        if (centred) {
            d -= hi;
            if constexpr (WLane) cv = bias_term<Vec<X>>(av, lo, cv);
        }
        put_along<X, How, WLane>(*ends, y + bytes<X>(lane), d * av + cv, n);
        lane += n;
    }
    NK_INLINE bool asks() const { return How != Stores::cached || far; }
    NK_INLINE index_t turns() const { return (lanes - lane) / kElements; }
    NK_INLINE void turn() {
#pragma GCC unroll 8
        for (int i = 0; i < kElements / kWidth<X>; ++i) vector(kWidth<X>);
    }
    NK_INLINE void rest() {
        while (lanes - lane >= kWidth<X>) vector(kWidth<X>);
        if (lane < lanes) vector(static_cast<int>(lanes - lane));
    }
};

// R rows at once: with w and b one a lane they share the loads of those, which else are half of all.
template <class X, bool WLane, Stores How, bool Centred, int R>
NK_INLINE void apply_rows(const Unwritten<X>& tile, EndsOf<X, How, WLane>& ends) {
    static_assert(R == 1 || How == Stores::cached, "past the caches, rows are joined");
    using T = Compute<X>;
    const In x = tile.x, w = tile.w, b = tile.b;
    const Out y = tile.y;
    const Statistics<T>& s = tile.s;
    const index_t r = tile.row, lanes = tile.lanes;
    index_t lane = 0;
    Vec<X> hi[R], lo[R], rstd[R], a[R], c[R];
#pragma GCC unroll 4
    for (int j = 0; j < R; ++j) {
        const index_t k = (r + j) * s.row;
        hi[j] = splat<X>(s.hi[k]);
        lo[j] = splat<X>(s.lo[k]);
        rstd[j] = splat<X>(s.rstd[k]);
        if constexpr (!WLane) {
            const YTerms<T> terms =
                y_terms<T>(s.hi[k], s.lo[k], s.rstd[k], value_at<T>(w.at(r + j)), value_at<T>(b.at(r + j)));
            a[j] = splat<X>(terms.a);
            c[j] = splat<X>(terms.c);
        }
    }
    const char *px = x.at(r), *pw = w.at(r), *pb = b.at(r);
    char* py = y.at(r);
    const auto write = [&](int n) NK_INLINE_LAMBDA {
        const index_t o = bytes<X>(lane);
        Vec<X> wv = {}, bv = {};
        if constexpr (WLane) {
            wv = load_rest<T>(pw + bytes<T>(lane), n);
            bv = load_rest<T>(pb + bytes<T>(lane), n);
        }
#pragma GCC unroll 4
        for (int j = 0; j < R; ++j) {
            const Vec<X> xv = load_rest<X>(px + j * x.row + o, n);
            const Vec<X> d = Centred ? xv - hi[j] : xv;
            const Vec<X> av = WLane ? rstd[j] * wv : a[j];
            const Vec<X> cv = !WLane ? c[j] : Centred ? bias_term<Vec<X>>(av, lo[j], bv) : bv;
            put_along<X, How, WLane>(ends, py + j * y.row + o, d * av + cv, n);
        }
        lane += n;
    };
    index_t head = 0;
    if constexpr (How == Stores::joined) {
        ends.begin(py);
        head = head_of_joined<X, WLane>(x, y, r, lanes);
    } else if constexpr (How == Stores::cached &&
                         (!WLane || R > 1)) {  // of one row, loads of w and b would cross lines
        head = head_in_cache<X>(y, r, lanes);
    }
    if (head > 0) write(static_cast<int>(head));
    while (lanes - lane >= kWidth<X>) write(kWidth<X>);
    if (lane < lanes) write(static_cast<int>(lanes - lane));
}

// Whether rows follow each other in memory without a gap, and are neither whole vectors nor so long that their ends do
// not count: they are then written as one run, and no vector is part-filled but the last.
template <class X>
NK_INLINE bool joins(In x, Out y, index_t rows, index_t lanes) {
    constexpr index_t kLong = 256;
    return rows > 1 && x.row == bytes<X>(lanes) && y.row == x.row && lanes >= kWidth<X> && lanes < kLong &&
           lanes % kWidth<X> != 0;
}

// Writes such rows. terms_of(r): an array of the N vectors that the formula has for all lanes of row r. write(terms,
// element, n): n elements from that one on, counted through all rows. A vector meets two rows at most.
template <class X, int N, class TermsOf, class Write>
NK_INLINE void for_joined(index_t rows, index_t lanes, index_t head, TermsOf terms_of, Write write) {
    Vec<X> row[N], next[N], both[N];
    terms_of(0, row);
    index_t at = 0, end = lanes;
    if (head > 0) {
        write(row, at, static_cast<int>(head));
        at += head;
    }
    for (index_t r = 1; r < rows; ++r, end += lanes) {
        for (; end - at >= kWidth<X>; at += kWidth<X>) write(row, at, kWidth<X>);
        terms_of(r, next);
        if (at < end) {
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) both[i] = join_at<Compute<X>>(row[i], next[i], static_cast<int>(end - at));
            write(both, at, kWidth<X>);
            at += kWidth<X>;
        }
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) row[i] = next[i];
    }
    for (; end - at >= kWidth<X>; at += kWidth<X>) write(row, at, kWidth<X>);
    if (at < end) write(row, at, static_cast<int>(end - at));
}

template <class X, bool Stream>
void apply_joined(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    for_joined<X, 3>(
        rows, lanes, Stream || kCanJoin ? head_of<X>(y.p) : 0,
        [&](index_t r, Vec<X>(&terms)[3]) NK_INLINE_LAMBDA {
            const index_t k = r * s.row;
            const YTerms<T> y = y_terms<T>(s.hi[k], s.lo[k], s.rstd[k], value_at<T>(w.at(r)), value_at<T>(b.at(r)));
            terms[0] = splat<X>(s.hi[k]);
            terms[1] = splat<X>(y.a);
            terms[2] = splat<X>(y.c);
        },
        [&](const Vec<X>(&terms)[3], index_t at, int n) NK_INLINE_LAMBDA {
            const Vec<X> d = load_rest<X>(x.p + bytes<X>(at), n) - terms[0];
            put_asking<X, Stream>(y.p + bytes<X>(at), d * terms[1] + terms[2], n);
        });
}

#if defined(__AVX512F__)
constexpr int kRowsTogether = 4;
#else
constexpr int kRowsTogether = 2;
#endif

template <class X, bool WLane, Stores How>
void apply_along_rows(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    // Rms: without a mean there are two subtractions less.
    const auto centred = [&](index_t r) { return s.hi[r * s.row] != 0 || s.lo[r * s.row] != 0; };
    // Not past the caches: those stores want one stream.
    const bool together = WLane && How == Stores::cached && w.row == 0 && b.row == 0;
    constexpr int kTogether = How == Stores::cached ? kRowsTogether : 1;
    EndsOf<X, How, WLane> ends;
    Unwritten<X> tile{x, y, w, b, s, rows, lanes};
    for (index_t& r = tile.row; r < rows;) {
        bool all_centred = together && rows - r >= kTogether, none_centred = all_centred;
        for (int j = 0; j < kTogether && (all_centred || none_centred); ++j) {
            (centred(r + j) ? none_centred : all_centred) = false;
        }
        if (all_centred) {
            apply_rows<X, WLane, How, true, kTogether>(tile, ends);
            r += kTogether;
        } else if (none_centred) {
            apply_rows<X, WLane, How, false, kTogether>(tile, ends);
            r += kTogether;
        } else {
            if (centred(r)) {
                apply_rows<X, WLane, How, true, 1>(tile, ends);
            } else {
                apply_rows<X, WLane, How, false, 1>(tile, ends);
            }
            ++r;
        }
    }
    ends.finish();
}

template <class X, bool WLane>
void apply_along(In x, Out y, In w, In b, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if constexpr (!WLane) {
        if (joins<X>(x, y, rows, lanes)) {
            const bool streamed = stream && can_stream<X>(y, rows * lanes);
            return (streamed ? apply_joined<X, true> : apply_joined<X, false>)(x, y, w, b, s, rows, lanes);
        }
    }
    with_row_stores<X, WLane>(stream, x, y, lanes, on_lines(y), [&](auto how) NK_INLINE_LAMBDA {
        apply_along_rows<X, WLane, how>(x, y, w, b, s, rows, lanes);
    });
}

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

// A loop of its own: row after row of WritingDx took 1.06 times as long for runs of 64 in a cache, 1.03 of 256.
template <class X, bool WLane, Stores How>
void dx_along_rows(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    EndsOf<X, How, WLane> ends;
    for (index_t r = 0; r < rows; ++r) {
        const char *pdy = dy.at(r), *px = x.at(r), *pw = w.at(r);
        char* pdx = dx.at(r);
        const index_t i = r * s.row;
        const DxTerms<T> terms = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
        const Vec<X> hi = splat<X>(s.hi[i]), rstd = splat<X>(s.rstd[i]), e = splat<X>(terms.e), c = splat<X>(terms.c);
        Vec<X> a = {};
        if constexpr (!WLane) a = splat<X>(s.rstd[i] * value_at<T>(pw));
        index_t head = 0;
        if constexpr (How == Stores::joined) {
            ends.begin(pdx);
            head = head_of_joined<X, WLane>(x, dx, r, lanes);
        } else if constexpr (How == Stores::cached && !WLane) {
            head = head_in_cache<X>(dx, r, lanes);
        }
        for_vectors<X>(lanes, head, [&](index_t lane, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            const Vec<X> d = load_rest<X>(px + o, n) - hi;
            const Vec<X> av = WLane ? rstd * load_rest<T>(pw + bytes<T>(lane), n) : a;
            put<X, How, WLane>(ends, pdx + o, dx_of<Vec<X>>(load_rest<X>(pdy + o, n), d, rstd, av, e, c), n);
        });
    }
    ends.finish();
}

template <class X, bool Stream>
void dx_joined(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes) {
    using T = Compute<X>;
    for_joined<X, 5>(
        rows, lanes, Stream || kCanJoin ? head_of<X>(dx.p) : 0,
        [&](index_t r, Vec<X>(&terms)[5]) NK_INLINE_LAMBDA {
            const index_t i = r * s.row;
            const DxTerms<T> more = dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]);
            terms[0] = splat<X>(s.hi[i]);
            terms[1] = splat<X>(s.rstd[i]);
            terms[2] = splat<X>(s.rstd[i] * value_at<T>(w.at(r)));
            terms[3] = splat<X>(more.e);
            terms[4] = splat<X>(more.c);
        },
        [&](const Vec<X>(&terms)[5], index_t at, int n) NK_INLINE_LAMBDA {
            const Vec<X> d = load_rest<X>(x.p + bytes<X>(at), n) - terms[0];
            const Vec<X> dyv = load_rest<X>(dy.p + bytes<X>(at), n);
            put_asking<X, Stream>(dx.p + bytes<X>(at), dx_of<Vec<X>>(dyv, d, terms[1], terms[2], terms[3], terms[4]),
                                  n);
        });
}

template <class X, bool WLane>
void dx_along(In dy, In x, In w, Out dx, Statistics<Compute<X>> s, index_t rows, index_t lanes, bool stream) {
    if constexpr (!WLane) {
        if (dy.row == x.row && joins<X>(x, dx, rows, lanes)) {
            const bool streamed = stream && can_stream<X>(dx, rows * lanes);
            return (streamed ? dx_joined<X, true> : dx_joined<X, false>)(dy, x, w, dx, s, rows, lanes);
        }
    }
    with_row_stores<X, WLane>(stream, x, dx, lanes, on_lines(dx), [&](auto how) NK_INLINE_LAMBDA {
        dx_along_rows<X, WLane, how>(dy, x, w, dx, s, rows, lanes);
    });
}

// What the sums of the first row are added to: to clear sums instead would be stores that wait behind results which go
// past the caches. Not const, or it would lie in the file.
template <class T>
alignas(64) T no_sums[kMostSums / static_cast<index_t>(sizeof(T)) + 2 * kVectorBytes / static_cast<int>(sizeof(T))];

// Sums down rows of at most `most` lanes, one a lane, for rows whose vectors begin behind `head` lanes: none crosses a
// line.
template <class X, index_t most>
class ShortDownSums {
  public:
    using T = Compute<X>;
    static_assert(most * static_cast<index_t>(sizeof(T)) <= kMostSums);

    NK_INLINE explicit ShortDownSums(index_t head = 0) : first_(first_lane<X>(head)) {}
    NK_INLINE T* g() { return room_[0] + first_; }
    NK_INLINE T* g_xhat() { return room_[1] + first_; }
    NK_INLINE const T* none() const { return no_sums<T> + first_; }
    // Instead, for short rows: two arrays more take registers and instructions that those notice (8192 x 64
    // float16 1.19).
    NK_INLINE void clear(index_t lanes) {
        for (index_t l = 0; l < lanes + kWidth<X>; ++l) g()[l] = g_xhat()[l] = 0;
    }
    NK_INLINE void add_to(DownSums all, index_t lanes) {
        add(g(), lanes, all.g, all.fresh);
        add(g_xhat(), lanes, all.g_xhat, all.fresh);
    }

  private:
    NK_INLINE static void add(const T* sums, index_t lanes, double* to, bool fresh) {
        if (fresh) {
            for (index_t l = 0; l < lanes; ++l) to[l] = 0 + static_cast<double>(sums[l]);
        } else {
            for (index_t l = 0; l < lanes; ++l) to[l] += static_cast<double>(sums[l]);
        }
    }

    index_t first_;
    alignas(64) T room_[2][most + 2 * kWidth<X>];
};

// What becomes of the sums down the lanes: they are not wanted, kept for the rows that follow, or, at the last row of
// all, given as they are to the gradients of w and b (each: if it is wanted).
enum class Down { none, kept, given };
struct NotGiven {};

// dx of a row, a few vectors at a time, and dy and dy * xhat added to what earlier rows have left; `first`: there are
// none. Sums that are kept are whole vectors: lanes beside those of a part have 0 added, and what comes beyond the
// row's last is never looked at.
template <class X, Down Add, Stores How, bool WLane = true>
struct WritingDx : std::conditional_t<Add == Down::given, Gradients, NotGiven> {
    static_assert(Add != Down::given || How != Stores::joined);
    static_assert(Add == Down::none || WLane);
    using Ends = EndsOf<X, How, WLane>;
    static constexpr bool kBehindHead = WLane && How == Stores::joined, kHasOthers = false;
    index_t head = 0;
    NK_INLINE index_t head_of_leaf(const char*) const { return head; }
    using T = Compute<X>;
    static constexpr index_t kElements = kTurn;
    index_t lanes = 0, lane = 0;
    const char *dy = nullptr, *x = nullptr, *w = nullptr;
    char* dx = nullptr;
    T *sum = nullptr, *sum_xhat = nullptr;
    const T *before = nullptr, *before_xhat = nullptr;
    bool far;
    Ends* ends;
    Vec<X> hi, lo, rstd, e, c, a_row = {};  // a_row: rstd * w, where that is one a row

    template <class Sums>
    NK_INLINE WritingDx(const BackwardRows<T>& all, index_t r, bool first, Sums& down, Ends& of_rows)
        : WritingDx(all, r, all.s, r * all.s.row, first, down, of_rows) {}
    template <class Sums>
    NK_INLINE WritingDx(const BackwardRows<T>& all, index_t r, const Statistics<T>& s, index_t i, bool first,
                        Sums& down, Ends& of_rows)
        : WritingDx(all, r, {s.hi[i], s.lo[i], s.rstd[i], 1},
                    dx_terms<T>(s.lo[i], s.rstd[i], s.mean_g[i], s.mean_g_xhat[i]), first, down, of_rows) {}
    // all: BackwardRows or BackwardEights.
    template <class All, class Sums>
    NK_INLINE WritingDx(const All& all, index_t r, Split<T> s, DxTerms<T> terms, bool first, Sums& down, Ends& of_rows)
        : lanes(all.lanes),
          dy(all.dy.at(r)),
          x(all.x.at(r)),
          w(all.w.at(r)),
          dx(all.dx.at(r)),
          sum(down.g()),
          sum_xhat(down.g_xhat()),
          before(first ? down.none() : sum),
          before_xhat(first ? down.none() : sum_xhat),
          far(all.far),
          ends(&of_rows),
          hi(splat<X>(s.hi)),
          lo(splat<X>(s.lo)),
          rstd(splat<X>(s.rstd)),
          e(splat<X>(terms.e)),
          c(splat<X>(terms.c)) {
        ends->begin(dx);
        if constexpr (How == Stores::joined && std::is_same_v<All, BackwardRows<T>>) {
            head = head_of_joined<X, true>(all.x, all.dx, r, all.lanes);
            if (head > 0) vector(static_cast<int>(head));
        }
    }
    // A row of a tile, from where that has come to.
    NK_INLINE WritingDx(const Unwritten<X>& of, Ends& of_rows)
        : lanes(of.lanes),
          lane(of.lane),
          dy(of.dy.at(of.row)),
          x(of.x.at(of.row)),
          w(of.w.at(of.row)),
          dx(of.y.at(of.row)),
          far(of.far),
          ends(&of_rows) {
        static_assert(!WLane && Add == Down::none);
        const index_t k = of.row * of.s.row;
        const DxTerms<T> terms = dx_terms<T>(of.s.lo[k], of.s.rstd[k], of.s.mean_g[k], of.s.mean_g_xhat[k]);
        hi = splat<X>(of.s.hi[k]);
        rstd = splat<X>(of.s.rstd[k]);
        e = splat<X>(terms.e);
        c = splat<X>(terms.c);
        a_row = splat<X>(of.s.rstd[k] * value_at<T>(w));
        index_t to_boundary = 0;
        if constexpr (How == Stores::joined) {
            ends->begin(dx + bytes<X>(lane));
            if (lane == 0) to_boundary = head_of_joined<X, WLane>(of.x, of.y, of.row, of.lanes);
        } else if constexpr (How == Stores::cached) {
            if (lane == 0) to_boundary = head_in_cache<X>(of.y, of.row, of.lanes);
        }
        if (to_boundary > 0) vector(static_cast<int>(to_boundary));
    }
    NK_INLINE void add(const T* from, T* to, Vec<X> v) {
        store<T>(reinterpret_cast<char*>(to + lane), load<T>(reinterpret_cast<const char*>(from + lane)) + v);
    }
    NK_INLINE void give(const T* from, char* to, Vec<X> v, int n) {
        if (!to) return;
        put<T, How == Stores::lines>(to + bytes<T>(lane), load<T>(reinterpret_cast<const char*>(from + lane)) + v, n);
    }
    NK_INLINE void vector(int n) {
        const Vec<X> dyv = load_rest<X>(dy + bytes<X>(lane), n);
        const Vec<X> d = load_rest<X>(x + bytes<X>(lane), n) - hi;
        Vec<X> a = a_row;
        if constexpr (WLane) a = rstd * load_rest<T>(w + bytes<T>(lane), n);
        const Vec<X> result = dx_of<Vec<X>>(dyv, d, rstd, a, e, c);
        if constexpr (Add == Down::kept) {
            put_asking<X, How, WLane>(*ends, dx + bytes<X>(lane), result, n);
        } else {
            put<X, How, WLane>(*ends, dx + bytes<X>(lane), result, n);
        }
        if constexpr (Add != Down::none) {
            const Vec<X> xhat = (kLoose ? d : d - lo) * rstd;
            if constexpr (Add == Down::given) {
                give(before, this->dbias, dyv, n);
                give(before_xhat, this->dweight, dyv * xhat, n);
            } else {
                add(before, sum, n < kWidth<X> ? keep_first<T>(dyv, n) : dyv);
                add(before_xhat, sum_xhat, n < kWidth<X> ? keep_first<T>(dyv * xhat, n) : dyv * xhat);
            }
        }
        lane += n;
    }
    NK_INLINE bool asks() const { return How != Stores::cached || far; }
    NK_INLINE index_t turns() const { return (lanes - lane) / kElements; }
    NK_INLINE void turn() {
#pragma GCC unroll 16
        for (int i = 0; i < kElements / kWidth<X>; ++i) vector(kWidth<X>);
    }
    NK_INLINE void rest() {
        while (lanes - lane >= kWidth<X>) vector(kWidth<X>);
        if (lane < lanes) vector(static_cast<int>(lanes - lane));
    }
};

// Row r is written beside the sums of row r + 1; or before them, where two rows, the sums down the lanes and w together
// are more than L1 holds. Time beside / in turn, rms norm of 2^24 elements (one thread of a Zen 5): rows of 1024 0.8,
// 1536 1.0, 2048 1.35, 4096 1.45. Rows of 16 bits are half as long, and their conversions are worth doing meanwhile:
// 4096 0.65. On an Emerald Rapids (dx_beside) 3072 to 8192 0.8 to 0.86 from memory, but 4096 in L2 1.12.
constexpr index_t kLongestBeside = 6 * 1024;  // bytes of a row
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
        const bool is_beside = sizeof(X) == 2 || bytes<X>(all.lanes) <= kLongestBeside || (all.far && dx_beside);
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

template <class X>
void widen(const char* from, index_t n, Compute<X>* to) {
    for_vectors<X>(n, 0, [=](index_t i, int count) NK_INLINE_LAMBDA {
        put<Compute<X>, false>(reinterpret_cast<char*>(to + i), load_rest<X>(from + bytes<X>(i), count), count);
    });
}

template <class T, bool Stream>
NK_INLINE void narrow_all(const double* from, index_t n, char* to) {
    constexpr int W = kWidth<double>;
    for_vectors<T>(n, Stream ? head_of_row<T>(to, n) : 0, [=](index_t i, int count) NK_INLINE_LAMBDA {
        Widened<T> wide;
#pragma GCC unroll 2
        for (int j = 0; j < Widened<T>::kVectors; ++j) {
            const int left = count - j * W;
            const char* const p = reinterpret_cast<const char*>(from + i + j * W);
            wide.v[j] = left > 0 ? load_rest<double>(p, left) : Vec<double>{};
        }
        put<T, Stream>(to + bytes<T>(i), narrowed<T>(wide), count);
    });
}

template <class X>
NK_INLINE void narrow_to_16_bits(const double* from, index_t n, char* to) {
    for_vectors<double>(n, 0, [=](index_t i, int count) NK_INLINE_LAMBDA {
        const char* const p = reinterpret_cast<const char*>(from + i);
        const Narrow v = rounded_to_16_bits<X>(load_rest<double>(p, count));
        if (count == kWidth<double>) {
            __builtin_memcpy(to + bytes<X>(i), &v, sizeof v);
        } else {
            for (int lane = 0; lane < count; ++lane) {
                const std::uint16_t one = v[lane];
                __builtin_memcpy(to + bytes<X>(i + lane), &one, sizeof one);
            }
        }
    });
}

template <class X>
void narrow(const double* from, index_t n, char* to, bool stream) {
    if constexpr (sizeof(X) == sizeof(Narrow{}[0])) {
        narrow_to_16_bits<X>(from, n, to);  // too few bytes for stores past the caches to matter
    } else if (stream && reinterpret_cast<std::uintptr_t>(to) % sizeof(X) == 0) {
        narrow_all<X, true>(from, n, to);
    } else {
        narrow_all<X, false>(from, n, to);
    }
}

template <class X, bool Stream>
NK_INLINE void copy_rows(In x, Out y, index_t rows, index_t lanes) {
    for (index_t r = 0; r < rows; ++r) {
        const char* px = x.at(r);
        char* py = y.at(r);
        for_vectors<X>(lanes, Stream ? head_of_row<X>(py, lanes) : 0, [=](index_t lane, int n) NK_INLINE_LAMBDA {
            const index_t o = bytes<X>(lane);
            put<X, Stream>(py + o, load_rest<X>(px + o, n), n);
        });
    }
}

template <class X>
void copy(In x, Out y, index_t rows, index_t lanes, bool stream) {
    if (stream && can_stream<X>(y, lanes)) {
        copy_rows<X, true>(x, y, rows, lanes);
    } else {
        copy_rows<X, false>(x, y, rows, lanes);
    }
}

}  // namespace
