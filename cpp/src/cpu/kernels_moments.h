// Moments along the lanes: everything is contiguous, so a leaf is read front to back. Part of kernels.cpp.
#pragma once

#include <type_traits>

#include "kernels_steps.h"

namespace {

// Whether means are taken about an element of the set, the origin. Other data has a mean in double with digits to
// spare; float64 data gets them here, because no element is further from the mean than sqrt(n) standard deviations.
template <class X>
constexpr bool kAboutOrigin = std::is_same_v<X, double>;

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

}  // namespace
