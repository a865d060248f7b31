// The rows walk: a set is made of contiguous runs (layer, rms; batch, instance, group in NCHW).
//
// A set is a row of leaves: pieces of a run, or several short runs. Moments and backward sums are taken leaf by leaf
// and merged in the order of the leaves, whoever computed them. Then y (or dx) is written, element by element.
//
// Here is what rows_forward.cpp and rows_backward.cpp have in common: how leaves are read, how sets are handed out, and
// how neighbouring ones are written together.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <optional>

#include "walks.h"

namespace normkit::cpu {

inline Nest joined(const Nest& outer, const Nest& inner) {
    Nest all = outer;
    for (int i = 0; i < inner.n; ++i) all.push(inner.axis[i]);
    return all;
}

// One operand as the leaves of a set see it: rows of contiguous (or strided) elements where that is what memory holds,
// else gathered as elements E: those of the operand, or converted.
template <class E>
class LeafReader {
  public:
    LeafReader(const Isa& isa, const Nest& runs, const Nest& run, Operand operand, Dtype dtype)
        : isa_(isa),
          operand_(operand),
          dtype_(dtype),
          runs_(collapse(runs, bit(operand))),
          run_(collapse(run, bit(operand))) {}

    Strided operator()(const char* set, const Leaves::Leaf& leaf, E* buffer) const {
        if (in_place(leaf.rows)) {
            return {run(set, leaf.first_run) + leaf.lane * lane(), row(), lane(), dtype_};
        }
        const index_t first = leaf.first_run * run_.size() + leaf.lane;
        gather(isa_, joined(runs_, run_), operand_, set, dtype_, first, leaf.rows * leaf.lanes, buffer);
        return packed_tile(buffer, leaf.lanes);
    }

    // Whether the elements of a whole leaf are the same wherever it begins in a run.
    bool repeats() const {
        if (runs_.size() != 1 || run_.n < 2 || kLeafLanes % run_.inner().extent != 0) return false;
        for (int i = 0; i + 1 < run_.n; ++i) {
            if (run_.axis[i].stride[operand_] != 0) return false;
        }
        return true;
    }

    // Whether leaves of so many rows need no gathering.
    bool in_place(index_t rows) const { return run_.n == 1 && (rows == 1 || runs_.n == 1); }
    // Of a run of one element it does not matter, and kernels like those that are contiguous.
    index_t lane() const { return run_.inner().extent > 1 ? run_.inner().stride[operand_] : sizeof(E); }
    index_t row() const { return runs_.inner().stride[operand_]; }
    bool contiguous(index_t rows) const { return in_place(rows) && lane() == index_t{sizeof(E)}; }
    bool evenly() const { return runs_.n == 1; }  // whether runs lie one row() apart
    const char* run(const char* set, index_t r) const {
        return set + (evenly() ? r * row() : runs_.offset(operand_, r));
    }
    bool one_row() const { return run_.n == 1 && runs_.size() == 1; }

  private:
    const Isa& isa_;
    Operand operand_;
    Dtype dtype_;
    Nest runs_, run_;
};

// Rows that go in parts (Schedule::in_parts) are written in even ones, of so many lanes at most but for the first,
// which goes on to where a line of y ends.
constexpr index_t kPartLanes = 2048;

// Weight or bias that is one a lane, for kernels that take row after row: the caller's, or, if vectors of that would
// cross lines, a copy that lies so that none does. Rms norm 4096 x 768 with the copy over without: 0.85 (one thread of
// a Zen 5).
template <class X>
class LinedUp {
    using T = Compute<X>;

  public:
    LinedUp(const Plan& plan, const Schedule& schedule, const char* x, const char* y, const char* parameter,
            Dtype dtype, Operand o)
        : at_(parameter) {
        constexpr index_t kLanes = kLine / index_t{sizeof(T)}, kWorth = 32;
        if (!parameter || dtype != kDtype<T> || !schedule.by_row || plan.sets < kWorth) return;
        const Nest run = collapse(plan.run, bit(kX) | bit(o));
        if (plan.runs.size() != 1 || run.n != 1 || run.inner().stride[o] != index_t{sizeof(T)}) return;
        bool alike = true;  // rows of x, by where their lines begin
        for (int i = 0; i < plan.kept.n; ++i) {
            if (plan.kept.axis[i].stride[o] != 0) return;
            alike = alike && plan.kept.axis[i].stride[kX] % kLine == 0;
        }
        const Axis& next = plan.kept.inner();
        const In rows{x, next.stride[kX]};
        const Out written{const_cast<char*>(y), next.stride[kY]};
        const index_t lanes = schedule.in_parts ? lanes_of_part(run.inner().extent, kPartLanes) : run.inner().extent;
        const bool behind = schedule.stream && !schedule.in_eights && alike &&
                            begins_on_lines(rows, written, lanes * index_t{sizeof(X)}, sizeof(X));
        const index_t first =
            behind ? static_cast<index_t>(reinterpret_cast<std::uintptr_t>(x) / sizeof(X)) % kLanes : 0;
        if (reinterpret_cast<std::uintptr_t>(parameter) % kLine == first * sizeof(T)) return;
        copy_ = Buffer<T>(first + run.inner().extent);
        std::memcpy(&copy_[first], parameter, static_cast<std::size_t>(run.inner().extent) * sizeof(T));
        at_ = reinterpret_cast<const char*>(&copy_[first]);
    }
    const char* get() const { return at_; }

  private:
    Buffer<T> copy_;
    const char* at_;
};

// Short rows that are taken before the next of those that lie inside them: so many that a kernel, which begins anew
// with each call, gets far, and, if they are not fewer, so few that what lies inside is in L2 when its turn comes.
constexpr index_t kFewRows = 64, kManyRows = 256;
inline index_t rows_at_once(index_t bytes_inside) {
    return std::clamp(kPieceBytes / bytes_inside / kSumRows * kSumRows, kFewRows, kManyRows);
}

// f(i, n, at, step) for the statistics of sets number first, first + every, ..., n_sets of them in all: those of n,
// from the i-th on, lie `step` apart from `at` on. every: the distance of neighbours along an axis of `kept`; 0: of one
// set.
template <class F>
void for_statistics(const Nest& kept, index_t first, index_t every, index_t n_sets, F f) {
    const Axis* axis = &kept.inner();
    while (axis != kept.axis && axis->stride[kSet] != every) --axis;
    for (index_t i = 0, n; i < n_sets; i += n) {
        const index_t set = first + i * every;
        n = std::min(n_sets - i, axis->extent - set / std::max(every, index_t{1}) % axis->extent);
        f(i, n, kept.offset(kStatistic, set), axis->stride[kStatistic]);
    }
}

// Whether the statistics of sets along an axis follow each other in the caller's arrays.
inline bool statistics_follow(const Nest& kept, const Axis& along) {
    return std::any_of(kept.axis, kept.axis + kept.n, [&](const Axis& a) {
        return a.stride[kSet] == along.stride[kSet] && a.extent == along.extent && a.stride[kStatistic] == 1;
    });
}

constexpr index_t kLeavesAtOnce = 64;  // in one call of a kernel

// Goes through the leaves of neighbouring sets. Step by step: to find each leaf by its number took a fifth as long as
// its sums.
class LeafWalk {
  public:
    // from: the first leaf, counted through all sets. in_place: whether kernels read the leaves as they lie; others
    // come one at a time. evenly: whether runs lie at one distance.
    LeafWalk(const Leaves& leaves, index_t from, bool in_place, bool evenly)
        : leaves_(leaves),
          in_place_(in_place),
          evenly_(evenly),
          in_set_(leaves.count()),
          whole_(leaves.per_run > 1 ? leaves.run / kLeafLanes : leaves.runs / leaves.rows),
          set_(from / in_set_),
          leaf_(from % in_set_),
          run_(leaf_ / leaves.per_run * leaves.rows),
          piece_(leaf_ % leaves.per_run) {}

    // n leaves of set number `set`, of one shape and at one distance (Leaves::step), from `leaf` on.
    struct Some {
        index_t set;
        Leaves::Leaf leaf;
        index_t n;
    };
    // At most `room`.
    Some take(index_t room) {
        if (leaf_ == in_set_) {
            ++set_;
            leaf_ = run_ = 0;
        }
        const Some some =
            leaves_.per_run > 1 ? pieces_of_run(in_place_ ? room : 1) : whole_runs(evenly_ && in_place_ ? room : 1);
        leaf_ += some.n;
        return some;
    }

  private:
    Some pieces_of_run(index_t room) {
        const index_t lane = piece_ * kLeafLanes;
        Some some{set_, {run_, 1, lane, kLeafLanes}, 1};
        if (piece_ < whole_) {
            some.n = std::min(whole_ - piece_, room);
        } else {
            some.leaf.lanes = leaves_.run - lane;
        }
        piece_ += some.n;
        if (piece_ == leaves_.per_run) {
            piece_ = 0;
            ++run_;
        }
        return some;
    }
    Some whole_runs(index_t room) {
        Some some{set_, {run_, leaves_.rows, 0, leaves_.run}, 1};
        if (leaf_ < whole_) {
            some.n = std::min(whole_ - leaf_, room);
        } else {
            some.leaf.rows = leaves_.runs - run_;
        }
        run_ += some.n * leaves_.rows;
        return some;
    }

    const Leaves& leaves_;
    const bool in_place_, evenly_;
    const index_t in_set_;              // leaves in a set
    const index_t whole_;               // full ones in a run, or, where runs are short, in a set
    index_t set_, leaf_, run_, piece_;  // the next leaf: in which set, in the set, and where it begins
};

// Cuts the sets into pieces of work of about kPieceBytes each. Where one set is written while another is read, the
// first sets of a piece are read, and its last ones written, with nothing beside: then into as few as keep the threads
// evenly busy.
struct SetPieces {
    index_t sets, per;
    // at_once: sets that are written together; of short rows, those that lie inside a row and the next.
    SetPieces(const Plan& plan, index_t element, const Schedule& schedule, index_t at_once) : sets(plan.sets) {
        const index_t bytes = plan.set_size * element;
        const index_t fair = schedule.threads > 1 ? sets / (4 * schedule.threads) : sets;
        per = schedule.by_row ? fair : kPieceBytes / bytes;
        if (schedule.in_eights) {
            const index_t least = kEight * at_once;
            per = std::max(fair - fair % least, least);
            return;
        }
        if (per < at_once) per = at_once;
        if (per > fair) per = fair;
        if (per > at_once) per -= per % at_once;
        if (per < 1) per = 1;
    }
    index_t count() const { return (sets + per - 1) / per; }
    index_t first(index_t i) const { return i * per; }
    index_t last(index_t i) const { return first(i) + per < sets ? first(i) + per : sets; }
};

// How many pieces a set is cut into when it is split: enough for the threads, and none so long that it could not be
// interrupted.
inline index_t pieces_per_set(const Plan& plan, index_t most, const Schedule& schedule) {
    if (!schedule.split) return 1;
    index_t wanted = (8 * schedule.threads + plan.sets - 1) / plan.sets;
    const index_t least = plan.set_size / kLongestPiece;
    if (wanted < least) wanted = least;
    return wanted < most ? wanted : most;
}

inline index_t elements_per_piece(const Plan& plan, const Schedule& schedule) {
    return plan.set_size / pieces_per_set(plan, plan.set_size / kStep + 1, schedule) + 1;
}

// How neighbouring sets that lie interleaved come together: with statistics that are given, in the order of memory; or
// moments (backward: sums) are taken of all before they are written, which should find them in L2; or they are written
// beside the moments, or sums, of the next.
enum class Together { given, moments, sums, beside };

// Bytes of neighbouring runs that make a row long enough, and of sets that a second reading finds in L2; run: of one.
// Measured on batch norm (one thread of a Zen 5). Beside, speed with rows of 12 KiB and sets of 512 over speed with 6
// and 256: 32 x 700 x 16^2 1.16, 32 x 600 x 17^2 1.11, 32 x 400 x 20^2 1.2, 32 x 600 x 22^2 1.23, 24^2 0.97, 26^2 0.92,
// 32 x 512 x 28^2 0.8, 32^2 0.87. Backward, with 24 and 768 over 16 and 256: 32 x 600 x 17^2 1.4, 32 x 400 x 20^2 1.15,
// 32 x 1024 x 14^2 1.08. Forward, in turn, with 16 and 512 over 16 and 256: 14^2 0.97, 10^2 0.97, 7^2 1.09.
struct Enough {
    index_t row, sets;
};
inline Enough enough(Together how, index_t run) {
    constexpr index_t kKiB = 1024, kShort = 2 * kKiB;
    switch (how) {
        case Together::given: return {kPieceBytes, kPieceBytes};
        case Together::moments: return {16 * kKiB, kPieceBytes};
        case Together::sums: return {24 * kKiB, 3 * kPieceBytes};
        default: return run <= kShort ? Enough{12 * kKiB, 2 * kPieceBytes} : Enough{6 * kKiB, kPieceBytes};
    }
}

// Neighbouring sets as they are written together: the innermost kept axis, so many at a time, and their elements as
// tiles.
class SetTiles {
  public:
    // bytes: of all arrays that are read, for one element of a set.
    SetTiles(const Plan& plan, const Nest& elements, index_t bytes, Together how, index_t most = kSetsAtOnce)
        : next(plan.kept.inner()),
          elements_(elements),
          // A set without neighbours has none in between: group norm 1 x 64^2 x 4, float16 in one group, went pixel by
          // pixel, 490 in place of 22 us.
          at_once_(std::min({most, number(plan, bytes, how), next.extent})),
          interleaved_(at_once_ > 1 && lies_interleaved()),
          tiles_(tiles_of(at_once_)) {}

    const Axis next;  // from a set to its neighbour

    index_t at_once() const { return at_once_; }
    // Whether rows of neighbouring sets lie between those of a set.
    bool interleaved() const { return interleaved_ && elements_.n > 1; }

    // How many sets from `first` on, and before `last`.
    index_t take(index_t first, index_t last) const {
        return std::min({at_once_, last - first, next.extent - first % next.extent});
    }

    Offsets neighbour(index_t i) const { return offsets(next, i); }

    // Whether the sets' runs can be taken for one row of lanes: they lie side by side, several times one behind the
    // other. What is the same for a lane of all rows is then worked out once. It pays where `parameters` are one an
    // element, side by side and once (group norm in NHWC), and where runs are short (batch norm of tiny images).
    template <class T>
    bool go_in_rows(std::initializer_list<Operand> data, std::initializer_list<Operand> parameters) const {
        if (!interleaved_ || elements_.n != 2) return false;
        const Axis &rows = elements_.axis[0], &run = elements_.inner();
        if (run.extent > kRowLanes<T> / 2) return false;
        const bool repeats = run.extent <= kLongestRepeated && rows.extent > run.extent;
        const auto side_by_side = [&](Operand o) { return next.stride[o] == run.stride[o] * run.extent; };
        return (repeats || rows.extent >= kLeastRows) && std::all_of(data.begin(), data.end(), side_by_side) &&
               std::all_of(parameters.begin(), parameters.end(), [&](Operand o) {
                   return rows.stride[o] == 0 && (run.stride[o] == 0 ? repeats : side_by_side(o));
               });
    }
    // A run's elements, at most, for which what is one a set is written down for each lane, if there are more rows than
    // that. Time so over time run by run, batch norm with 256 channels, one thread of an Emerald Rapids, 2, 8, 32, 128
    // images: forward 2^2 1.1, 0.75, 0.54, 0.44; 4^2 1.6, 1.1, 0.73, 0.8; 6^2 2.2, 1.4, 0.93, 0.98; backward 6^2 2.1,
    // 1.4, 0.92, 0.97; evaluation 2^2 1.2, 0.68, 0.33, 0.22; 4^2 2.2, 1.35, 0.67, 0.97. Of 7^2, 256 images: forward
    // 1.0, backward 1.35.
    static constexpr index_t kLongestRepeated = 48;
    template <class T>
    static constexpr index_t kRowLanes = 8192 / sizeof(T);

    // f(rows, at, first, n) for the rows of n_sets sets that begin at `from`: tiles whose lanes are those of n sets,
    // from number `first` on. Where not all sets fit in one row, the rows go a few at a time, so that memory is written
    // in order.
    template <class T, class F>
    void for_rows(index_t n_sets, const Offsets& from, F f) const {
        const index_t most = std::min(kSetsAtOnce, kRowLanes<T> / elements_.inner().extent);
        const index_t pieces = (n_sets + most - 1) / most, per = (n_sets + pieces - 1) / pieces;
        Tiles rows(elements_, 0);
        const index_t extent = rows.rows.extent;
        const index_t at_once = pieces > 1 ? kRowsOfPieces : std::max(kRowsOfPieces, kLongestPiece / kRowLanes<T>);
        for (index_t r = 0; r < extent && !gives_up(); r += at_once) {
            rows.rows.extent = std::min(at_once, extent - r);
            for (index_t first = 0; first < n_sets; first += per) {
                Offsets at = from + neighbour(first);
                for (int o = 0; o < kOperands; ++o) at.at[o] += r * rows.rows.stride[o];
                f(rows, at, first, std::min(per, n_sets - first));
            }
        }
    }

    // Whether the rows of neighbouring sets follow each other as those of a set do, and so do the parameters, one a row
    // (group norm in NCHW). Those of small sets can then be taken for the rows of one.
    bool stack(std::initializer_list<Operand> operands) const {
        if (interleaved_ || at_once_ == 1 || elements_.n != 2 || elements_.size() > kLargestStacked) return false;
        const Axis& rows = elements_.axis[0];
        return std::all_of(operands.begin(), operands.end(),
                           [&](Operand o) { return next.stride[o] == rows.stride[o] * rows.extent; });
    }

    // f(rows, at, first, n) for the rows of n_sets sets that begin at `from`: tiles whose rows are those of n sets.
    template <class T, class F>
    void for_stacks(index_t n_sets, const Offsets& from, F f) const {
        Tiles rows(elements_, 0);
        const index_t of_set = rows.rows.extent, most = kRowLanes<T> / of_set;
        for (index_t first = 0, n; first < n_sets && !gives_up(); first += n) {
            n = std::min(most, n_sets - first);
            rows.rows.extent = n * of_set;
            f(rows, from + neighbour(first), first, n);
        }
    }

    // The tiles of n sets.
    class Of {
      public:
        Of(const SetTiles& all, index_t n) : all_(all) {
            if (all.interleaved_ && n < all.at_once_) fewer_.emplace(all.tiles_of(n));
            per_ = tiles().count();
            count_ = all.interleaved_ ? per_ : n * per_;
        }

        struct Tile {
            Offsets at;  // from the first set; those of `tile` come on top
            Tiles::Tile tile;
            index_t set, step;  // number of the set of its first row, from row to row of sets
            index_t sets() const { return step ? tile.rows : 1; }
        };
        const Tiles& tiles() const { return fewer_ ? *fewer_ : all_.tiles_; }
        index_t count() const { return count_; }
        Tile operator[](index_t i) const {
            const index_t set = all_.interleaved_ ? 0 : i / per_;
            // Made in place: a copy would wait for the stores of its parts.
            Tile t{all_.neighbour(set), tiles()[i - set * per_], set, index_t{all_.interleaved_}};
            t.set += t.tile.at[kSet];
            return t;
        }

      private:
        const SetTiles& all_;
        std::optional<Tiles> fewer_;
        index_t per_, count_;
    };

  private:
    // Whether rows of neighbouring sets lie between those of a set, or a set is one row.
    bool lies_interleaved() const {
        if (elements_.n == 1) return true;
        const Axis& rows = elements_.axis[elements_.n - 2];
        return std::abs(next.stride[kX]) < std::abs(rows.stride[kX]) &&
               std::abs(next.stride[kY]) < std::abs(rows.stride[kY]);
    }

    // Enough for rows of some length where sets are short, or where their runs lie interleaved in memory (batch norm of
    // small images, group norm in NHWC), so that memory is read and written in order.
    index_t number(const Plan& plan, index_t bytes, Together how) const {
        const index_t set = plan.set_size * bytes, run = plan.run.size() * bytes;
        index_t n = kNearBytes / set;
        if (elements_.n > 1 && lies_interleaved()) {
            const Enough bytes_of = enough(how, run);
            const index_t rows = bytes_of.row / run, most = bytes_of.sets / set;
            const bool narrow = most * run < kLeastWidth;
            const index_t wanted = how == Together::given || narrow || rows < most ? rows : most;
            if (wanted > n) n = wanted;
            while (n & (n - 1)) n &= n - 1;  // whole cache lines, whatever the run
        }
        return n < 1 ? 1 : n;
    }

    // The elements of n sets, if they are interleaved, or else of one, in the order of memory.
    Tiles tiles_of(index_t n) const {
        if (!interleaved_) return Tiles(elements_, 0);
        Nest all = elements_.without_inner();
        Axis sets = next;
        sets.extent = n;
        all.push(sets);
        all.push(elements_.inner());
        return Tiles(all, 0);
    }

    static constexpr index_t kLeastRows = 8, kRowsOfPieces = 64;
    // Elements of a set beyond which nothing is gained. Time stacked over time set by set, group norm in 32 groups, one
    // thread of an Emerald Rapids: 128 x 64 x 8^2 forward 0.51, backward 0.77, 32 x 256 x 8^2 0.8, 0.89, 32 x 512 x 8^2
    // 0.78, 1.0; 16 x 256 x 16^2 (2,048) 1.06, 0.98, 16 x 512 x 16^2 1.0, 0.97.
    static constexpr index_t kLargestStacked = 1024;
    // Bytes of neighbouring runs that sets are worth which their second reading then finds in L2: with fewer, all the
    // neighbours go together, so that memory is read in order (docs/decisions/0002).
    static constexpr index_t kLeastWidth = 4096;

    const Nest elements_;
    const index_t at_once_;
    const bool interleaved_;  // and more than one at once
    const Tiles tiles_;       // of as many sets
};

// What is one a set as one a lane, or one a row, of which n sets have `extent` each: `most` arrays of it.
template <class T, int most>
class Repeated {
  public:
    Repeated(index_t n, index_t extent) : n_(n), extent_(extent) {}

    const T* operator()(const T* sets) {
        T* const all = of_[used_++];
        for (index_t i = 0; i < n_; ++i) std::fill_n(all + i * extent_, extent_, sets[i]);
        return all;
    }
    // lane: as in TileStatistics.
    TileStatistics<T> operator()(TileStatistics<T> sets, bool of_sums, index_t lane) {
        for (const T** p : {&sets.hi, &sets.lo, &sets.rstd}) *p = (*this)(*p);
        for (const T** p : {&sets.mean_g, &sets.mean_g_xhat}) *p = of_sums ? (*this)(*p) : nullptr;
        sets.row = 1 - lane;
        sets.lane = lane;
        return sets;
    }
    // A parameter; `next`: bytes from set to set.
    Strided operator()(const Isa& isa, const char* p, index_t next, Dtype dtype) {
        T sets[kSetsAtOnce];
        gather(isa, {p, 0, next, dtype}, 1, n_, sets);
        return {reinterpret_cast<const char*>((*this)(sets)), 0, sizeof(T), kDtype<T>};
    }

  private:
    const index_t n_, extent_;
    int used_ = 0;
    T of_[most][SetTiles::kRowLanes<T>];
};

}  // namespace normkit::cpu
