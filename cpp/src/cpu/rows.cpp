// The rows walk: a set is made of contiguous runs (layer, rms; batch, instance, group in NCHW).
//
// A set is a row of leaves: pieces of a run, or several short runs. Moments and backward sums are taken leaf by leaf
// and merged in the order of the leaves, whoever computed them. Then y (or dx) is written, element by element.

#include <algorithm>
#include <cstdlib>
#include <optional>

#include "walks.h"

namespace normkit::cpu {
namespace {

constexpr index_t kLeavesAtOnce = 8;

constexpr unsigned kForwardOperands = bit(kX) | bit(kY) | bit(kWeight) | bit(kBias);
constexpr unsigned kBackwardOperands = bit(kX) | bit(kY) | bit(kDy) | bit(kWeight) | bit(kGradient);

Nest joined(const Nest& outer, const Nest& inner) {
    Nest all = outer;
    for (int i = 0; i < inner.n; ++i) all.push(inner.axis[i]);
    return all;
}

Nest rows_and_lanes(const Axis& rows, const Axis& lanes) {
    Nest two;
    two.push(rows);
    two.push(lanes);
    return two;
}

// One operand as the leaves of a set see it: rows of contiguous (or strided) elements where that is what memory holds,
// else gathered as elements E: those of the operand, or converted.
template <class E>
class LeafReader {
  public:
    LeafReader(const Nest& runs, const Nest& run, Operand operand, Dtype dtype)
        : operand_(operand), dtype_(dtype), runs_(collapse(runs, bit(operand))), run_(collapse(run, bit(operand))) {}

    Strided operator()(const char* set, const Leaves::Leaf& leaf, E* buffer) const {
        if (run_.n == 1 && (leaf.rows == 1 || runs_.n == 1)) {
            const index_t lane = run_.inner().stride[operand_];
            return {set + runs_.offset(operand_, leaf.first_run) + leaf.lane * lane, runs_.inner().stride[operand_],
                    lane, dtype_};
        }
        E* to = buffer;
        for (index_t r = 0; r < leaf.rows; ++r) {
            const char* p = set + runs_.offset(operand_, leaf.first_run + r);
            for (index_t at = leaf.lane, left = leaf.lanes; left > 0;) {
                const Axis& inner = run_.inner();
                index_t n = inner.extent - at % inner.extent;
                if (n > left) n = left;
                gather<E>({p + run_.offset(operand_, at), 0, inner.stride[operand_], dtype_}, 1, n, to);
                to += n;
                at += n;
                left -= n;
            }
        }
        return {reinterpret_cast<const char*>(buffer), leaf.lanes * index_t{sizeof(E)}, sizeof(E), kDtype<E>};
    }

    // Whether the elements of a whole leaf are the same wherever it begins in a run.
    bool repeats() const {
        if (runs_.size() != 1 || run_.n < 2 || kLeafLanes % run_.inner().extent != 0) return false;
        for (int i = 0; i + 1 < run_.n; ++i) {
            if (run_.axis[i].stride[operand_] != 0) return false;
        }
        return true;
    }

    // Whether every run is evenly spaced in memory.
    bool direct() const { return run_.n == 1; }
    bool one_row() const { return run_.n == 1 && runs_.size() == 1; }

  private:
    Operand operand_;
    Dtype dtype_;
    Nest runs_, run_;
};

// Cuts the sets into pieces of work of about kPieceBytes each; some sets to a piece, so that one can be read while
// another is written.
constexpr index_t kLeastSets = 8;
struct SetPieces {
    index_t sets, per;
    // at_once: sets that are written together.
    SetPieces(const Plan& plan, index_t element, int threads, index_t at_once) : sets(plan.sets) {
        const index_t bytes = plan.set_size * element;
        per = bytes > 0 ? kPieceBytes / bytes : 1;
        if (per < kLeastSets) per = kLeastSets;
        if (per < at_once) per = at_once;
        const index_t fair = sets / (4 * threads);
        if (threads > 1 && per > fair) per = fair;
        if (per > at_once) per -= per % at_once;
        if (per < 1) per = 1;
    }
    index_t count() const { return (sets + per - 1) / per; }
    index_t first(index_t i) const { return i * per; }
    index_t last(index_t i) const { return first(i) + per < sets ? first(i) + per : sets; }
};

// How many pieces a set is cut into when it is split: enough for the threads, and none so long that it could not be
// interrupted.
index_t pieces_per_set(const Plan& plan, index_t most, const Schedule& schedule) {
    if (!schedule.split) return 1;
    index_t wanted = (8 * schedule.threads + plan.sets - 1) / plan.sets;
    const index_t least = plan.set_size / kLongestPiece;
    if (wanted < least) wanted = least;
    return wanted < most ? wanted : most;
}

index_t elements_per_piece(const Plan& plan, const Schedule& schedule) {
    return plan.set_size / pieces_per_set(plan, plan.set_size / kStep + 1, schedule) + 1;
}

// Neighbouring sets as they are written together: the innermost kept axis, so many at a time, and their elements as
// tiles.
class SetTiles {
  public:
    // bytes: of all arrays that are read, for one element of a set. near: sums are taken of all sets before they are
    // written, which should find them in L2.
    SetTiles(const Plan& plan, const Nest& elements, index_t bytes, bool near)
        : next(plan.kept.n > 0 ? plan.kept.inner() : Axis{}),
          elements_(elements),
          interleaved_(elements.n == 1 || is_inside(next, elements.axis[elements.n - 2])),
          at_once_(number(plan, bytes, near)),
          tiles_(tiles_of(at_once_)) {}

    const Axis next;  // from a set to its neighbour

    index_t at_once() const { return at_once_; }

    // How many sets from `first` on, and before `last`.
    index_t take(index_t first, index_t last) const {
        return std::min({at_once_, last - first, next.extent - first % next.extent});
    }

    Offsets neighbour(index_t i) const {
        Offsets o;
        for (int k = 0; k < kOperands; ++k) o.at[k] = i * next.stride[k];
        return o;
    }

    // The sets' runs as one row of lanes, if they lie side by side, short, and several times one behind the other
    // (images of 7 x 7): what is the same for a run is then repeated for its lanes, once for all rows. 0: they don't.
    template <class T>
    index_t sets_in_row(unsigned operands) const {
        if (!interleaved_ || elements_.n != 2) return 0;
        const Axis &rows = elements_.axis[0], &run = elements_.inner();
        if (rows.extent < kLeastRows || run.extent > kShortRun) return 0;
        for (int o = 0; o < kOperands; ++o) {
            if (!(operands >> o & 1)) continue;
            const bool data = o == kX || o == kY || o == kDy;
            if (data ? next.stride[o] != run.stride[o] * run.extent : rows.stride[o] != 0 || run.stride[o] != 0)
                return 0;
        }
        const index_t n = kRowLanes<T> / run.extent;
        return n >= 16 ? n / 16 * 16 : n / 4 * 4;  // whole cache lines, whatever the run
    }
    template <class T>
    static constexpr index_t kRowLanes = 8192 / sizeof(T);

    // The rows of those lanes.
    Tiles rows_of_sets() const { return Tiles(elements_, 0); }

    // `v`, one a set, for the lanes of n sets.
    template <class T>
    void repeat(const T* v, index_t n, T* lanes) const {
        const index_t extent = elements_.inner().extent;
        for (index_t i = 0; i < n; ++i) std::fill_n(lanes + i * extent, extent, v[i]);
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
        };
        const Tiles& tiles() const { return fewer_ ? *fewer_ : all_.tiles_; }
        index_t count() const { return count_; }
        Tile operator[](index_t i) const {
            const index_t set = all_.interleaved_ ? 0 : i / per_;
            const Tiles::Tile tile = tiles()[i - set * per_];
            return {all_.neighbour(set), tile, set + tile.at[kSet], index_t{all_.interleaved_}};
        }

      private:
        const SetTiles& all_;
        std::optional<Tiles> fewer_;
        index_t per_, count_;
    };

    // f(offsets from the first of n sets, tiles, tile, number of the set of its first row, from row to row of sets).
    template <class F>
    void for_each(index_t n, F f) const {
        const Of all(*this, n);
        for (index_t i = 0; i < all.count(); ++i) {
            const Of::Tile t = all[i];
            f(t.at, all.tiles(), t.tile, t.set, t.step);
        }
    }

  private:
    static bool is_inside(const Axis& a, const Axis& b) {
        return std::abs(a.stride[kX]) < std::abs(b.stride[kX]) && std::abs(a.stride[kY]) < std::abs(b.stride[kY]);
    }

    // Enough for rows of some length where sets are short, or where their runs lie interleaved in memory (batch norm of
    // small images), so that memory is read and written in order.
    index_t number(const Plan& plan, index_t bytes, bool near) const {
        const index_t set = plan.set_size * bytes, run = plan.run.size() * bytes;
        index_t n = kNearBytes / set;
        if (interleaved_ && elements_.n > 1) {
            const index_t rows = (near ? kShortRows : kPieceBytes) / run, most = kPieceBytes / set;
            const index_t wanted = !near || rows < most ? rows : most;
            if (wanted > n) n = wanted;
            while (n & (n - 1)) n &= n - 1;  // as sets_in_row, for most runs
        }
        return n < 1 ? 1 : n > kSetsAtOnce ? kSetsAtOnce : n;
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

    static constexpr index_t kLeastRows = 8, kShortRun = 256;

    const Nest elements_;
    const bool interleaved_;  // rows of neighbouring sets lie between those of a set, or a set is one row
    const index_t at_once_;
    const Tiles tiles_;  // of as many sets
};

// What is one a set, for the lanes of sets that lie in one row.
template <class T>
class Lanes {
  public:
    Lanes(const SetTiles& tiles, const TileStatistics<T>& sets, index_t n, bool backward) : tiles_(tiles), n_(n) {
        statistics.hi = repeated(sets.hi);
        statistics.lo = repeated(sets.lo);
        statistics.rstd = repeated(sets.rstd);
        if (backward) {
            statistics.mean_g = repeated(sets.mean_g);
            statistics.mean_g_xhat = repeated(sets.mean_g_xhat);
        }
        statistics.lane = 1;
    }

    // Of elements T.
    Strided parameter(const char* base, const Offsets& at, Operand o, Strided absent) {
        if (!base) return absent;
        T of_sets[kSetsAtOnce];
        for (index_t i = 0; i < n_; ++i) of_sets[i] = read<T>(base + at[o] + i * tiles_.next.stride[o]);
        return {reinterpret_cast<const char*>(repeated(of_sets)), 0, sizeof(T), kDtype<T>};
    }

    TileStatistics<T> statistics;

  private:
    const T* repeated(const T* of_sets) {
        T* const lanes = lanes_[used_++];
        tiles_.repeat(of_sets, n_, lanes);
        return lanes;
    }

    const SetTiles& tiles_;
    const index_t n_;
    int used_ = 0;
    T lanes_[7][SetTiles::kRowLanes<T>];
};

// ------------------------------------------------------------------------------------------------------------ forward

template <class X>
class RowsForward {
    using T = Compute<X>;

  public:
    RowsForward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule)
        : plan_(plan),
          call_(call),
          k_(kernels),
          schedule_(schedule),
          leaves_(plan.runs.size(), plan.run.size()),
          read_x_(plan.runs, plan.run, kX, call.dtype),
          set_(joined(plan.runs, plan.run)),
          elements_(collapse(set_, kForwardOperands)),
          leaf_is_set_(leaves_.count() == 1 && read_x_.one_row()),
          tiles_(plan, elements_, sizeof(X), !call.given) {}

    void run() {
        if (schedule_.resident && !schedule_.split) {
            const SetPieces pieces(plan_, sizeof(X), schedule_.threads, tiles_.at_once());
            parallel_for(pieces.count(), schedule_.threads,
                         [&](index_t i) { whole_sets(pieces.first(i), pieces.last(i)); });
        } else {
            two_sweeps();
        }
    }

  private:
    // Neighbouring sets whose moments are taken before they are written.
    struct Batch {
        Batch() {}

        index_t first = 0, n = 0;
        Offsets at;  // of the first
        union {      // not initialized: small calls would notice
            Moments moments[kSetsAtOnce];
        };
        T storage[SetStatistics<T>::kArrays * kSetsAtOnce];
        SetStatistics<T> statistics{storage, kSetsAtOnce};
    };

    void whole_sets(index_t first, index_t last) const {
        if (row_by_row(first, last)) return;
        if (schedule_.by_row) return whole_sets_beside(first, last);
        Batch batch;
        for (index_t set = first; set < last && !gives_up(); set += batch.n) {
            take(set, last, &batch);
            moments_of(&batch, nullptr);
            finish(&batch);
            if (call_.y) write(batch);
        }
    }

    // The moments of one batch beside the writing of the one before.
    void whole_sets_beside(index_t first, index_t last) const {
        Batch batches[2];
        Writing writing(*this);
        for (index_t set = first, i = 0; set < last && !gives_up(); i ^= 1) {
            Batch& batch = batches[i];
            take(set, last, &batch);
            moments_of(&batch, &writing);
            writing.rest();
            finish(&batch);
            if (call_.y) writing.begin(batch);
            set += batch.n;
        }
        writing.rest();
    }

    // A batch that is written beside other work: tile by tile, as far as kernels can do that, and then the rest.
    class Writing {
      public:
        explicit Writing(const RowsForward& walk) : walk_(walk) {}

        // The batch must stay where it is.
        void begin(const Batch& batch) {
            if (batch.n > 1 && walk_.goes_in_rows()) {
                walk_.write(batch);
                return;
            }
            batch_ = &batch;
            all_.emplace(walk_.tiles_, batch.n);
            i_ = 0;
            take();
        }
        // What is to be written now; null: nothing.
        Unwritten<X>* tile() {
            while (batch_ && tile_.done()) next();
            return batch_ ? &tile_ : nullptr;
        }
        void rest() {
            while (batch_) {
                write_rest(walk_.k_, &tile_);
                next();
            }
        }

      private:
        // Written at once where it can't be done beside anything.
        void take() {
            const SetTiles::Of::Tile t = (*all_)[i_];
            const ApplyTo<X> tile = walk_.tile_at(batch_->at + t.at, all_->tiles(), t.tile,
                                                  batch_->statistics.tile(t.set, t.step, 0, t.step ? t.tile.rows : 1));
            tile_ = {};
            if (!to_write_beside(tile, &tile_)) apply(walk_.k_, tile);
        }
        void next() {
            if (++i_ < all_->count()) {
                take();
            } else {
                batch_ = nullptr;
            }
        }

        const RowsForward& walk_;
        const Batch* batch_ = nullptr;
        std::optional<SetTiles::Of> all_;
        index_t i_ = 0;
        Unwritten<X> tile_;
    };

    // Sets that are one row each: a kernel does the moments of one beside the writing of another. False where the
    // kernels can't take the rows as they lie.
    bool row_by_row(index_t first, index_t last) const {
        if (!schedule_.by_row || leaves_.count() > kLeavesOfRow || !read_x_.one_row() || elements_.n > 1 ||
            call_.given || !call_.y)
            return false;
        const Tiles row(elements_, 0);
        for (index_t set = first, n; set < last; set += n) {
            n = std::min(last - set, tiles_.next.extent - set % tiles_.next.extent);
            const RowsFrom context{*this, plan_.kept.offsets(set)};
            Tiles tiles = row;
            tiles.rows = tiles_.next;
            if (!forward_rows(k_, tile_at(context.at, tiles, {Offsets{}, n, row.lanes.extent}, {}),
                              In{call_.x + context.at[kX], tiles_.next.stride[kX]}, plan_.center,
                              {finish_row, &context})) {
                return false;
            }
        }
        return true;
    }

    struct RowsFrom {
        const RowsForward& walk;
        const Offsets at;
    };

    // FinishRow. A set that has to be scaled is written here.
    static bool finish_row(const void* context, index_t row, const Moments* leaves, index_t count, T (&hi_lo_rstd)[3]) {
        const auto& [walk, first] = *static_cast<const RowsFrom*>(context);
        Moments m = leaves[0];
        for (index_t l = 1; l < count; ++l) m.merge(leaves[l]);
        const index_t x = first[kX] + row * walk.tiles_.next.stride[kX];
        const index_t statistic = first[kStatistic] + row * walk.tiles_.next.stride[kStatistic];
        const Split<T> s =
            split<T>(finish_set<X>(walk.call_, walk.set_, walk.call_.x + x, walk.plan_.center, m, statistic));
        hi_lo_rstd[0] = s.hi;
        hi_lo_rstd[1] = s.lo;
        hi_lo_rstd[2] = s.rstd;
        if (s.scale == 1) return true;
        Batch alone;
        alone.n = 1;
        alone.at = first + walk.tiles_.neighbour(row);
        alone.statistics.put(0, s);
        walk.write(alone);
        return false;
    }

    void take(index_t first, index_t last, Batch* batch) const {
        batch->first = first;
        batch->n = tiles_.take(first, last);
        batch->at = plan_.kept.offsets(first);
    }

    void moments_of(Batch* batch, Writing* writing) const {
        if (call_.given) return;
        const index_t next = tiles_.next.stride[kX], leaves = leaves_.count();
        const char* x = call_.x + batch->at[kX];
        if (leaf_is_set_) {
            const Leaves::Leaf row = leaves_[0];
            moments_along(k_, read_x_(x, row, nullptr), In{x, next}, 1, row.lanes, next, batch->n, plan_.center,
                          batch->moments, writing ? writing->tile() : nullptr);
            return;
        }
        for (index_t i = 0; i < batch->n; ++i, x += next) {
            Moments all;
            for (index_t l = 0; l < leaves;) {
                Moments some[kLeavesAtOnce];
                const index_t n = some_leaves(x, l, leaves, some, writing ? writing->tile() : nullptr);
                for (index_t j = 0; j < n; ++j) all.merge(some[j]);
                l += n;
            }
            batch->moments[i] = all;
        }
    }

    void write(const Batch& batch) const {
        if (batch.n > 1 && write_in_rows(batch)) return;
        tiles_.for_each(batch.n, [&](const Offsets& at, const Tiles& tiles, const Tiles::Tile& tile, index_t set,
                                     index_t step) {
            apply(k_, tile_at(batch.at + at, tiles, tile, batch.statistics.tile(set, step, 0, step ? tile.rows : 1)));
        });
    }

    bool goes_in_rows() const { return tiles_.template sets_in_row<T>(kForwardOperands) > 0; }

    bool write_in_rows(const Batch& batch) const {
        const index_t most = tiles_.template sets_in_row<T>(kForwardOperands);
        if (most == 0 || batch.statistics.tile(0, 1, 0, batch.n).scale) return false;
        if ((call_.weight && call_.weight_dtype != kDtype<T>) || (call_.bias && call_.bias_dtype != kDtype<T>))
            return false;
        const Tiles rows = tiles_.rows_of_sets();
        for (index_t i = 0; i < batch.n; i += most) {
            const index_t n = std::min(most, batch.n - i), lanes = n * rows.lanes.extent;
            const Offsets at = batch.at + tiles_.neighbour(i);
            Lanes<T> l(tiles_, batch.statistics.tile(i, 1, 0, n), n, false);
            apply(k_, {operand(call_.x, call_.dtype, at, rows, kX), operand(call_.y, call_.dtype, at, rows, kY),
                       l.parameter(call_.weight, at, kWeight, one<T>()), l.parameter(call_.bias, at, kBias, zero<T>()),
                       l.statistics, rows.rows.extent, lanes, schedule_.stream});
        }
        return true;
    }

    void finish(Batch* batch) const {
        for (index_t i = 0; i < batch->n; ++i) {
            const index_t statistic = batch->at[kStatistic] + i * tiles_.next.stride[kStatistic];
            if (call_.given) {
                batch->statistics.put(i, given_statistic(call_, statistic));
                continue;
            }
            const char* x = call_.x + batch->at[kX] + i * tiles_.next.stride[kX];
            batch->statistics.put(i, finish_set<X>(call_, set_, x, plan_.center, batch->moments[i], statistic));
        }
    }

    // For sets that are shared: all leaves, then each set's merge, then all elements.
    void two_sweeps() const {
        const index_t leaves = leaves_.count();
        const index_t leaf_pieces = pieces_per_set(plan_, leaves, schedule_);
        const Buffer<Moments> moments(call_.given ? 0 : plan_.sets * leaves);
        const Buffer<T> storage(plan_.sets * SetStatistics<T>::kArrays);
        SetStatistics<T> statistics(storage.get(), plan_.sets);
        if (!call_.given) {
            parallel_for(plan_.sets * leaf_pieces, schedule_.threads, [&](index_t i) {
                const index_t set = i / leaf_pieces, piece = i % leaf_pieces;
                const char* x = call_.x + plan_.kept.offset(kX, set);
                const index_t first = leaves * piece / leaf_pieces, last = leaves * (piece + 1) / leaf_pieces;
                for (index_t l = first; l < last;) l += some_leaves(x, l, last, &moments[set * leaves + l]);
            });
        }
        parallel_for(plan_.sets, schedule_.threads, [&](index_t set) {
            if (call_.given) {
                statistics.put(set, given_statistic(call_, statistic(set)));
                return;
            }
            Moments m = moments[set * leaves];
            for (index_t l = 1; l < leaves; ++l) m.merge(moments[set * leaves + l]);
            finish(set, m, set, statistics);
        });
        if (!call_.y) return;
        const Tiles tiles(elements_, elements_per_piece(plan_, schedule_));
        // Backwards: what was read last is still in the last-level cache.
        const index_t n = plan_.sets * tiles.count();
        parallel_for(n, schedule_.threads, [&](index_t back) {
            const index_t i = n - 1 - back, set = i / tiles.count();
            apply(k_, tile_at(plan_.kept.offsets(set), tiles, tiles[i % tiles.count()], statistics.tile(set, 0, 0, 1)));
        });
    }

    // Moments of leaves l, l + 1, ... of the set at x: as many, before `last`, as are alike and lie in one run, so that
    // one call of the kernel does them. Returns how many.
    index_t some_leaves(const char* x, index_t l, index_t last, Moments* out, Unwritten<X>* beside = nullptr) const {
        X buffer[kLeafLanes];
        const Leaves::Leaf piece = leaves_[l];
        const Strided at = read_x_(x, piece, buffer);
        index_t n = 1;
        if (leaves_.per_run > 1 && read_x_.direct()) {
            const index_t full = leaves_.run / kLeafLanes - l % leaves_.per_run;
            n = full < 1 ? 1 : full;
            if (n > last - l) n = last - l;
            if (n > kLeavesAtOnce) n = kLeavesAtOnce;
        }
        moments_along(k_, at, In{x, 0}, piece.rows, piece.lanes, kLeafLanes * at.lane, n, plan_.center, out, beside);
        return n;
    }

    index_t statistic(index_t set) const { return plan_.kept.offset(kStatistic, set); }

    // Statistics of a set from its moments: to the caller's arrays and, as number `slot`, to the kernels'.
    void finish(index_t set, const Moments& m, index_t slot, SetStatistics<T>& statistics) const {
        const char* x = call_.x + plan_.kept.offset(kX, set);
        statistics.put(slot, finish_set<X>(call_, set_, x, plan_.center, m, statistic(set)));
    }

    ApplyTo<X> tile_at(const Offsets& set, const Tiles& tiles, const Tiles::Tile& tile,
                       const TileStatistics<T>& s) const {
        const Offsets at = set + tile.at;
        return {operand(call_.x, call_.dtype, at, tiles, kX),
                operand(call_.y, call_.dtype, at, tiles, kY),
                parameter(call_.weight, call_.weight_dtype, at, tiles, kWeight, one<T>()),
                parameter(call_.bias, call_.bias_dtype, at, tiles, kBias, zero<T>()),
                s,
                tile.rows,
                tile.lanes,
                schedule_.stream};
    }

    const Plan& plan_;
    const ForwardCall& call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Leaves leaves_;
    const LeafReader<X> read_x_;
    const Nest set_, elements_;
    const bool leaf_is_set_;  // every set is one row and one leaf
    const SetTiles tiles_;
};

// ----------------------------------------------------------------------------------------------------------- backward

// The axes of a set by what they are to the parameters. A cell is where a set and the elements that share one parameter
// meet. Where the innermost axis carries parameters (layer, rms) a cell is a single element: `by_element`.
struct Cells {
    Nest index;      // from cell to cell of a set
    Nest runs, run;  // within a cell
    bool by_element;

    explicit Cells(const Plan& plan) {
        by_element = plan.run.n > 0 && plan.run.inner().stride[kGradient] != 0;
        int run_begin = plan.run.n;
        while (run_begin > 0 && plan.run.axis[run_begin - 1].stride[kGradient] == 0) --run_begin;
        for (const Nest* nest : {&plan.runs, &plan.run}) {
            for (int i = 0; i < nest->n; ++i) {
                const Axis& a = nest->axis[i];
                if (a.stride[kGradient] != 0) {
                    index.push(a);
                } else if (nest == &plan.run && i >= run_begin) {
                    run.push(a);
                } else {
                    runs.push(a);
                }
            }
        }
    }
};

template <class X>
class RowsBackward {
    using T = Compute<X>;

  public:
    RowsBackward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule)
        : plan_(plan),
          call_(call),
          k_(kernels),
          schedule_(schedule),
          cells_(plan),
          index_(cells_.by_element ? Nest{} : cells_.index),
          runs_(cells_.by_element ? plan.runs : cells_.runs),
          run_(cells_.by_element ? plan.run : cells_.run),
          leaves_(runs_.size(), run_.size()),
          read_dy_(runs_, run_, kDy, call.dtype),
          read_x_(runs_, run_, kX, call.dtype),
          read_w_(runs_, run_, kWeight, call.weight_dtype),
          weights_repeat_(read_w_.repeats()),
          set_is_row_(read_dy_.one_row() && read_x_.one_row() && read_w_.one_row()),
          leaf_is_set_(leaves_.count() == 1 && set_is_row_),
          elements_(collapse(joined(plan.runs, plan.run), kBackwardOperands)),
          leaf_is_cell_(leaves_.count() == 1 && read_dy_.one_row() && read_x_.one_row()),
          tiles_(plan, elements_, 2 * sizeof(X), true),
          storage_(plan.sets * SetStatistics<T>::kArrays),
          statistics_(storage_.get(), plan.sets) {}

    void run() {
        if (cells_.by_element) {
            by_element();
        } else {
            by_cell();
        }
    }

  private:
    bool wants_set_sums() const { return call_.dx && !call_.constant_statistics; }

    void load_statistics(index_t set) {
        statistics_.put(set, given_statistic(call_, plan_.kept.offset(kStatistic, set)));
    }

    // Sums over leaf l of cell `at`, of dy in cells (their weight comes later), of g = w * dy elsewhere.
    // `weights`: those of the leaf before.
    struct LeafWeights {
        T buffer[kLeafLanes];
        Strided w = one<T>();
        index_t lanes = 0;
    };
    Sums leaf(const Offsets& at, index_t l, const TileStatistics<T>& s, LeafWeights* weights) const {
        X dy[kLeafLanes], x[kLeafLanes];
        const Leaves::Leaf piece = leaves_[l];
        if (cells_.by_element && call_.weight && !(weights_repeat_ && piece.lanes <= weights->lanes)) {
            weights->w = read_w_(call_.weight + at[kWeight], piece, weights->buffer);
            weights->lanes = piece.lanes;
        }
        return sums_along(k_, read_dy_(call_.dy + at[kDy], piece, dy), read_x_(call_.x + at[kX], piece, x), weights->w,
                          s, piece.rows, piece.lanes);
    }

    // From the sums of a set's cells (of all leaves of it, where by element) to what dx needs.
    void finish(index_t set, const Sums* cells) {
        if (!wants_set_sums()) return;
        const Offsets at = plan_.kept.offsets(set);
        Sums sums;
        for (index_t c = 0, n = index_.size(); c < n; ++c) {
            double w = 1;
            if (!cells_.by_element && call_.weight) {
                w = static_cast<T>(
                    read_double(call_.weight + at[kWeight] + cell_offset(kWeight, c), call_.weight_dtype));
            }
            sums.g += w * cells[c].g;
            sums.g_xhat += w * cells[c].g_xhat;
        }
        const double count = static_cast<double>(plan_.set_size);
        statistics_.put_sums(set, plan_.center ? sums.g / count : 0, sums.g_xhat / count);
    }

    // Of cell c from the first of its set.
    index_t cell_offset(Operand operand, index_t c) const {
        return index_.n == 1 ? c * index_.inner().stride[operand] : index_.offset(operand, c);
    }

    // The sums of all cells of n neighbouring sets.
    void cells_of(index_t set, index_t n, Sums* sums) const {
        const index_t per_set = index_.size();
        if (!leaf_is_cell_ || index_.n > 1) {
            for (index_t c = 0; c < n * per_set; ++c) sums[c] = cell(set + c / per_set, c % per_set);
            return;
        }
        // Rows that follow each other at one distance: the cells of a set, or sets of one cell.
        const Offsets at = plan_.kept.offsets(set);
        const Axis& next = per_set > 1 ? index_.inner() : tiles_.next;
        const Leaves::Leaf row = leaves_[0];
        for (index_t i = 0; i < (per_set > 1 ? n : 1); ++i) {
            const Offsets here = at + tiles_.neighbour(i);
            Strided dy = read_dy_(call_.dy + here[kDy], row, nullptr), x = read_x_(call_.x + here[kX], row, nullptr);
            dy.row = next.stride[kDy];
            x.row = next.stride[kX];
            const index_t rows = per_set > 1 ? per_set : n;
            const TileStatistics<T> s =
                per_set > 1 ? statistics_.tile(set + i, 0, 0, 1) : statistics_.tile(set, 1, 0, n);
            sums_of_rows(k_, dy, x, one<T>(), s, rows, row.lanes, sums + i * per_set);
        }
    }

    Sums cell(index_t set, index_t c) const {
        const TileStatistics<T> s = statistics_.tile(set, 0, 0, 1);
        const Offsets at = plan_.kept.offsets(set) + index_.offsets(c);
        LeafWeights weights;
        Sums sums = leaf(at, 0, s, &weights);
        for (index_t l = 1; l < leaves_.count(); ++l) sums += leaf(at, l, s, &weights);
        return sums;
    }

    // Batch, instance, group: the sums of the cells serve both the sets and the parameters.
    void by_cell() {
        const index_t per_set = index_.size();
        const Buffer<Sums> sums(plan_.sets * per_set);
        const Buffer<Sums> parameters = zeroed_sums(call_);
        const bool wants_sums = wants_set_sums() || call_.parameters;
        if (schedule_.resident && !schedule_.split) {
            const SetPieces pieces(plan_, 2 * sizeof(X), schedule_.threads, tiles_.at_once());
            parallel_for(pieces.count(), schedule_.threads, [&](index_t i) {
                for (index_t set = pieces.first(i), n; set < pieces.last(i) && !gives_up(); set += n) {
                    n = tiles_.take(set, pieces.last(i));
                    for (index_t j = set; j < set + n; ++j) load_statistics(j);
                    if (wants_sums) {
                        cells_of(set, n, &sums[set * per_set]);
                        for (index_t j = set; j < set + n; ++j) finish(j, &sums[j * per_set]);
                    }
                    if (call_.dx) dx_of_sets(set, n);
                }
            });
        } else {
            two_sweeps(sums, wants_sums);
        }
        if (!call_.parameters) return;
        for (index_t set = 0; set < plan_.sets; ++set) {
            const index_t at = plan_.kept.offset(kGradient, set);
            for (index_t c = 0; c < per_set; ++c) {
                parameters[at + cell_offset(kGradient, c)] += sums[set * per_set + c];
            }
        }
        write_parameters(call_, 0, call_.parameters, parameters.get());
    }

    // All leaves of all cells, then the sets' means; then dx, tile by tile.
    void two_sweeps(const Buffer<Sums>& sums, bool wants_sums) {
        for (index_t set = 0; set < plan_.sets; ++set) load_statistics(set);
        if (wants_sums) sweep_sums(sums);
        if (!call_.dx) return;
        const Tiles tiles(elements_, elements_per_piece(plan_, schedule_));
        const index_t n = plan_.sets * tiles.count();
        parallel_for(n, schedule_.threads, [&](index_t back) {  // backwards, as in the forward pass
            const index_t i = n - 1 - back, set = i / tiles.count();
            dx_tile(plan_.kept.offsets(set), tiles, tiles[i % tiles.count()], statistics_.tile(set, 0, 0, 1));
        });
    }

    void sweep_sums(const Buffer<Sums>& sums) {
        const index_t per_set = index_.size(), leaves = leaves_.count(), all = per_set * leaves;
        const Buffer<Sums> parts(plan_.sets * all);
        const index_t pieces = pieces_per_set(plan_, all, schedule_);
        parallel_for(plan_.sets * pieces, schedule_.threads, [&](index_t i) {
            const index_t set = i / pieces, piece = i % pieces;
            const TileStatistics<T> s = statistics_.tile(set, 0, 0, 1);
            const Offsets at = plan_.kept.offsets(set);
            LeafWeights weights;
            for (index_t l = all * piece / pieces; l < all * (piece + 1) / pieces; ++l) {
                parts[set * all + l] = leaf(at + index_.offsets(l / leaves), l % leaves, s, &weights);
            }
        });
        for (index_t set = 0; set < plan_.sets; ++set) {
            for (index_t c = 0; c < per_set; ++c) {
                const Sums* part = &parts[set * all + c * leaves];
                Sums total = part[0];
                for (index_t l = 1; l < leaves; ++l) total += part[l];
                sums[set * per_set + c] = total;
            }
            finish(set, &sums[set * per_set]);
        }
    }

    void dx_of_sets(index_t first, index_t n) const {
        const Offsets all = plan_.kept.offsets(first);
        if (n > 1 && dx_in_rows(all, first, n)) return;
        tiles_.for_each(
            n, [&](const Offsets& at, const Tiles& tiles, const Tiles::Tile& tile, index_t set, index_t step) {
                dx_tile(all + at, tiles, tile, statistics_.tile(first + set, step, 0, step ? tile.rows : 1));
            });
    }

    bool dx_in_rows(const Offsets& all, index_t first, index_t n_sets) const {
        const index_t most = tiles_.template sets_in_row<T>(kBackwardOperands & ~bit(kGradient));
        if (most == 0 || call_.constant_statistics || statistics_.tile(first, 1, 0, n_sets).scale) return false;
        if (call_.weight && call_.weight_dtype != kDtype<T>) return false;
        const Tiles rows = tiles_.rows_of_sets();
        for (index_t i = 0; i < n_sets; i += most) {
            const index_t n = std::min(most, n_sets - i), lanes = n * rows.lanes.extent;
            const Offsets at = all + tiles_.neighbour(i);
            Lanes<T> l(tiles_, statistics_.tile(first + i, 1, 0, n), n, true);
            backward(k_, operand(call_.dy, call_.dtype, at, rows, kDy), operand(call_.x, call_.dtype, at, rows, kX),
                     l.parameter(call_.weight, at, kWeight, one<T>()), operand(call_.dx, call_.dtype, at, rows, kY),
                     l.statistics, rows.rows.extent, lanes, nullptr, nullptr, schedule_.stream);
        }
        return true;
    }

    void dx_tile(const Offsets& set, const Tiles& tiles, const Tiles::Tile& tile, const TileStatistics<T>& s) const {
        write_dx(k_, call_, set + tile.at, tiles, tile.rows, tile.lanes, s, nullptr, nullptr, schedule_.stream);
    }

    // Layer, rms: dx and the gradients of the parameters in one reading, down kSumRows rows at a time. The rows that
    // share a parameter are summed in blocks that depend on their number only; a block's sums are in double.
    void by_element() {
        const Grid grid(plan_);
        const RowBlocks blocks(grid.rows.size(), kSumRows, kSumRows);
        const bool one_reading = grid.rows_are_sets && blocks.count() >= schedule_.threads && !schedule_.split &&
                                 schedule_.resident && (blocks.count() > 1 || grid.lanes.extent <= kLeafLanes);
        if (!one_reading) all_set_sums();
        // The sums of a single block are the gradients, piece by piece of the lanes.
        const bool single = call_.parameters && blocks.count() == 1 && grid.others.size() == 1;
        const Buffer<double> sums(call_.parameters && !single ? 2 * blocks.count() * grid.width() : 0);
        // Few blocks: their lanes are shared too.
        const index_t extent = grid.lanes.extent;
        index_t pieces = one_reading ? 1 : lane_pieces_for(blocks.count() * grid.others.size(), extent);
        const index_t least = (extent + kLeafLanes - 1) / kLeafLanes;
        if (single && pieces < least) pieces = least;
        const index_t lanes_per = ((extent + pieces - 1) / pieces + 63) / 64 * 64;

        parallel_for(blocks.count() * pieces, schedule_.threads, [&](index_t i) {
            const index_t block = i / pieces, lane = i % pieces * lanes_per;
            const index_t lanes = extent - lane < lanes_per ? extent - lane : lanes_per;
            if (lanes <= 0) return;
            double own[2 * kLeafLanes];
            double* sum_g = call_.parameters ? &sums[2 * block * grid.width() + lane] : nullptr;
            if (single) sum_g = own;
            double* const sum_g_xhat = sum_g + (single ? kLeafLanes : grid.width());
            block_of_rows(grid, blocks.first(block), blocks.size(block), lane, lanes, one_reading, sum_g, sum_g_xhat);
            if (single) write_lanes(grid, 0, lane, lanes, sum_g, sum_g_xhat);
        });
        if (call_.parameters && !single) fold_blocks(grid, blocks.count(), sums.get());
    }

    // The axes by what they are to the parameters: rows add up to one parameter, lanes and `others` don't.
    struct Grid {
        Nest rows, others;
        Axis lanes;
        bool rows_are_sets = true;

        explicit Grid(const Plan& plan) {
            const Nest run = collapse(plan.run, kBackwardOperands);
            for (const Nest& nest : {plan.kept, plan.runs, run.without_inner()}) {
                for (int i = 0; i < nest.n; ++i) {
                    const Axis& a = nest.axis[i];
                    const bool apart = a.stride[kGradient] != 0;
                    (apart ? others : rows).push(a);
                    rows_are_sets = rows_are_sets && apart == a.reduced;
                }
            }
            lanes = run.inner();
            rows = collapse(rows, kBackwardOperands | bit(kSet) | bit(kStatistic));
        }
        index_t width() const { return others.size() * lanes.extent; }
    };

    // dx of `lanes` lanes of some rows, and their sums down the rows to sum_g and sum_g_xhat (null: none).
    // own_sets: the rows are sets, whose sums have not been taken yet.
    void block_of_rows(const Grid& grid, index_t first, index_t rows, index_t lane, index_t lanes, bool own_sets,
                       double* sum_g, double* sum_g_xhat) {
        const index_t others = grid.others.size(), extent = grid.lanes.extent;
        for (index_t o = 0; sum_g && o < others; ++o) {
            for (index_t l = 0; l < lanes; ++l) sum_g[o * extent + l] = sum_g_xhat[o * extent + l] = 0;
        }
        const Tiles tile(rows_and_lanes(grid.rows.inner(), grid.lanes), 0);
        for (index_t r = first; r < first + rows && !gives_up();) {
            const Axis& inner = grid.rows.inner();
            index_t n = inner.extent - r % inner.extent;
            if (n > kSumRows) n = kSumRows;
            if (n > first + rows - r) n = first + rows - r;
            const Offsets row = grid.rows.offsets(r);
            r += n;
            if (own_sets && row_by_row(row, tile, n, lanes, sum_g, sum_g_xhat)) continue;
            if (own_sets) sums_of_sets(row[kSet], inner.stride[kSet], n);
            for (index_t o = 0; o < others; ++o) {
                Offsets at = row + grid.others.offsets(o);
                for (int k = 0; k < kOperands; ++k) at.at[k] += lane * grid.lanes.stride[k];
                const TileStatistics<T> s = statistics_.tile(at[kSet], inner.stride[kSet], 0, n);
                const index_t to = o * extent;
                write_dx(k_, call_, at, tile, n, lanes, s, sum_g ? sum_g + to : nullptr,
                         sum_g ? sum_g_xhat + to : nullptr, schedule_.stream);
            }
        }
    }

    // The same for sets that are one row each, by a kernel that does the sums of one beside dx of another.
    // False where the kernels can't.
    bool row_by_row(const Offsets& at, const Tiles& tile, index_t rows, index_t lanes, double* sum_g,
                    double* sum_g_xhat) {
        if (!schedule_.by_row || !set_is_row_ || !wants_set_sums() || elements_.n > 1) return false;
        if (tile.rows.stride[kSet] != 1) return false;
        for (index_t i = 0; i < rows; ++i) load_statistics(at[kSet] + i);
        const RowsFrom context{this, at[kSet]};
        const auto finish_row = [](const void* c, index_t row, const Sums& sums) {
            const auto* from = static_cast<const RowsFrom*>(c);
            from->walk->finish(from->first + row, &sums);
        };
        return backward_rows(k_, operand(call_.dy, call_.dtype, at, tile, kDy),
                             operand(call_.x, call_.dtype, at, tile, kX),
                             parameter(call_.weight, call_.weight_dtype, at, tile, kWeight, one<T>()),
                             operand(call_.dx, call_.dtype, at, tile, kY), statistics_.tile(at[kSet], 1, 0, rows), rows,
                             lanes, sum_g, sum_g_xhat, schedule_.stream, finish_row, &context);
    }

    struct RowsFrom {
        RowsBackward* walk;
        index_t first;  // set
    };

    // The sums of all blocks, in order, to the gradients.
    void fold_blocks(const Grid& grid, index_t blocks, const double* sums) const {
        const index_t width = grid.width(), extent = grid.lanes.extent, per = kLeafLanes / 4;
        const index_t pieces = (extent + per - 1) / per;
        parallel_for(grid.others.size() * pieces, blocks * width < kPieceBytes / 16 ? 1 : schedule_.threads,
                     [&](index_t i) {
                         const index_t other = i / pieces, lane = i % pieces * per;
                         const index_t n = extent - lane < per ? extent - lane : per;
                         double total[per] = {}, total_xhat[per] = {};
                         for (index_t block = 0; block < blocks; ++block) {
                             const double *g = sums + 2 * block * width + other * extent + lane, *g_xhat = g + width;
                             for (index_t l = 0; l < n; ++l) total[l] += g[l];
                             for (index_t l = 0; l < n; ++l) total_xhat[l] += g_xhat[l];
                         }
                         write_lanes(grid, other, lane, n, total, total_xhat);
                     });
    }

    void write_lanes(const Grid& grid, index_t other, index_t lane, index_t n, const double* g,
                     const double* g_xhat) const {
        const index_t stride = grid.lanes.stride[kGradient];
        const index_t first = grid.others.offset(kGradient, other) + lane * stride;
        write_doubles(call_.dweight, call_.dweight_dtype, first, stride, n, g_xhat);
        write_doubles(call_.dbias, call_.dbias_dtype, first, stride, n, g);
    }

    index_t lane_pieces_for(index_t pieces, index_t lanes) const {
        const bool few = schedule_.threads > 1 && pieces < 4 * schedule_.threads;
        index_t wanted = few ? (4 * schedule_.threads + pieces - 1) / pieces : 1;
        const index_t least = lanes * kSumRows / kLongestPiece;  // none so long that it could not be interrupted
        if (wanted < least) wanted = least;
        const index_t most = (lanes + 255) / 256;
        return wanted < most ? wanted : most;
    }

    void set_sums(index_t set) {
        load_statistics(set);
        if (!wants_set_sums()) return;
        const Sums sums = cell(set, 0);
        finish(set, &sums);
    }

    // The same for `n` <= kSumRows sets, `step` apart.
    void sums_of_sets(index_t set, index_t step, index_t n) {
        const Axis& next = plan_.kept.n > 0 ? plan_.kept.inner() : Axis{};
        if (!wants_set_sums() || step != 1 || !leaf_is_set_ || set % next.extent + n > next.extent) {
            for (index_t i = 0; i < n; ++i) set_sums(set + i * step);
            return;
        }
        for (index_t i = 0; i < n; ++i) load_statistics(set + i);
        const Offsets at = plan_.kept.offsets(set);
        const Leaves::Leaf row = leaves_[0];
        Strided dy = read_dy_(call_.dy + at[kDy], row, nullptr), x = read_x_(call_.x + at[kX], row, nullptr);
        dy.row = next.stride[kDy];
        x.row = next.stride[kX];
        const Strided w = call_.weight ? read_w_(call_.weight, row, nullptr) : one<T>();
        Sums sums[kSumRows];
        sums_of_rows(k_, dy, x, w, statistics_.tile(set, 1, 0, n), n, row.lanes, sums);
        for (index_t i = 0; i < n; ++i) finish(set + i, &sums[i]);
    }

    void all_set_sums() {
        if (schedule_.split && wants_set_sums()) {
            for (index_t set = 0; set < plan_.sets; ++set) load_statistics(set);
            const Buffer<Sums> sums(plan_.sets);
            sweep_sums(sums);
            return;
        }
        const SetPieces pieces(plan_, 2 * sizeof(X), schedule_.threads, tiles_.at_once());
        parallel_for(pieces.count(), schedule_.threads, [&](index_t i) {
            for (index_t set = pieces.first(i); set < pieces.last(i); ++set) set_sums(set);
        });
    }

    const Plan& plan_;
    const BackwardCall& call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Cells cells_;
    const Nest index_, runs_, run_;
    const Leaves leaves_;
    const LeafReader<X> read_dy_, read_x_;
    const LeafReader<T> read_w_;
    const bool weights_repeat_, set_is_row_, leaf_is_set_;
    const Nest elements_;
    const bool leaf_is_cell_;
    const SetTiles tiles_;
    const Buffer<T> storage_;
    SetStatistics<T> statistics_;
};

}  // namespace

template <class X>
void rows_forward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule) {
    RowsForward<X>(plan, call, kernels, schedule).run();
}

template <class X>
void rows_backward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule) {
    RowsBackward<X>(plan, call, kernels, schedule).run();
}

#define NORMKIT_INSTANTIATE(name, X, T)                                                                    \
    template void rows_forward<X>(const Plan&, const ForwardCall&, const KernelPair<X>&, const Schedule&); \
    template void rows_backward<X>(const Plan&, const BackwardCall&, const KernelPair<X>&, const Schedule&);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
