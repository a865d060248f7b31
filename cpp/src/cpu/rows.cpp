// The rows walk: a set is made of contiguous runs (layer, rms; batch, instance, group in NCHW).
//
// A set is a row of leaves: pieces of a run, or several short runs. Moments and backward sums are taken leaf by leaf
// and merged in the order of the leaves, whoever computed them. Then y (or dx) is written, element by element.

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

    // Whether every run is evenly spaced in memory.
    bool direct() const { return run_.n == 1; }
    bool one_row() const { return run_.n == 1 && runs_.size() == 1; }

  private:
    Operand operand_;
    Dtype dtype_;
    Nest runs_, run_;
};

// Cuts the sets into pieces of work of about kPieceBytes each.
struct SetPieces {
    index_t sets, per;
    SetPieces(const Plan& plan, index_t element, int threads) : sets(plan.sets) {
        const index_t bytes = plan.set_size * element;
        per = bytes > 0 ? kPieceBytes / bytes : 1;
        const index_t fair = sets / (4 * threads);
        if (per > fair) per = fair;
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
          tiles_(elements_, 0),
          neighbours_(plan.kept.n > 0 ? plan.kept.inner() : Axis{}),
          sets_are_rows_(elements_.n == 1),
          leaf_is_set_(leaves_.count() == 1 && read_x_.one_row()),
          rows_of_sets_(rows_and_lanes(neighbours_, elements_.inner()), 0) {}

    void run() {
        if (schedule_.resident && !schedule_.split) {
            const SetPieces pieces(plan_, sizeof(X), schedule_.threads);
            parallel_for(pieces.count(), schedule_.threads,
                         [&](index_t i) { whole_sets(pieces.first(i), pieces.last(i)); });
        } else {
            two_sweeps();
        }
    }

  private:
    // Moments, then apply, a few sets at a time where they are small.
    void whole_sets(index_t first, index_t last) const {
        T storage[SetStatistics<T>::kArrays * kSetsAtOnce];
        SetStatistics<T> statistics(storage, kSetsAtOnce);
        Moments moments[kSetsAtOnce];
        index_t at_once = kNearBytes / (plan_.set_size * index_t{sizeof(X)});
        at_once = at_once < 1 ? 1 : at_once > kSetsAtOnce ? kSetsAtOnce : at_once;
        for (index_t set = first; set < last; set += at_once) {
            const index_t n = last - set < at_once ? last - set : at_once;
            if (call_.given) {
                for (index_t i = 0; i < n; ++i) statistics.put(i, given_statistic(call_, statistic(set + i)));
            } else {
                moments_of(set, n, moments);
                for (index_t i = 0; i < n; ++i) finish(set + i, moments[i], i, statistics);
            }
            if (call_.y) apply_sets(set, n, statistics, 0);
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
            apply_tile(plan_.kept.offsets(set), tiles, tiles[i % tiles.count()], statistics.tile(set, 0, 0, 1));
        });
    }

    // Moments of leaves l, l + 1, ... of the set at x: as many, before `last`, as are alike and lie in one run, so that
    // one call of the kernel does them. Returns how many.
    index_t some_leaves(const char* x, index_t l, index_t last, Moments* out) const {
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
        moments_along(k_, at, In{x, 0}, piece.rows, piece.lanes, kLeafLanes * at.lane, n, plan_.center, out);
        return n;
    }

    void moments_of(index_t set, index_t n, Moments* out) const {
        if (leaf_is_set_ && set % neighbours_.extent + n <= neighbours_.extent) {
            // Small rows: one call of the kernel for all of them.
            const Leaves::Leaf row = leaves_[0];
            const Strided x = read_x_(call_.x + plan_.kept.offset(kX, set), row, nullptr);
            const index_t next = neighbours_.stride[kX];
            moments_along(k_, x, In{x.p, next}, 1, row.lanes, next, n, plan_.center, out);
            return;
        }
        for (index_t i = 0; i < n; ++i) {
            const char* x = call_.x + plan_.kept.offset(kX, set + i);
            out[i] = Moments{};
            for (index_t l = 0; l < leaves_.count();) {
                Moments some[kLeavesAtOnce];
                const index_t m = some_leaves(x, l, leaves_.count(), some);
                for (index_t j = 0; j < m; ++j) out[i].merge(some[j]);
                l += m;
            }
        }
    }

    index_t statistic(index_t set) const { return plan_.kept.offset(kStatistic, set); }

    // Statistics of a set from its moments: to the caller's arrays and, as number `slot`, to the kernels'.
    void finish(index_t set, const Moments& m, index_t slot, SetStatistics<T>& statistics) const {
        const char* x = call_.x + plan_.kept.offset(kX, set);
        statistics.put(slot, finish_set<X>(call_, set_, x, plan_.center, m, statistic(set)));
    }

    void apply_sets(index_t set, index_t n, const SetStatistics<T>& statistics, index_t slot) const {
        if (sets_are_rows_) {
            // Rows of neighbouring sets make a tile.
            while (n > 0) {
                index_t rows = neighbours_.extent - set % neighbours_.extent;
                if (rows > n) rows = n;
                apply_tile(plan_.kept.offsets(set), rows_of_sets_, {Offsets{}, rows, rows_of_sets_.lanes.extent},
                           statistics.tile(slot, 1, 0, rows));
                set += rows;
                slot += rows;
                n -= rows;
            }
            return;
        }
        for (index_t i = 0; i < n; ++i) {
            const Offsets at = plan_.kept.offsets(set + i);
            const TileStatistics<T> s = statistics.tile(slot + i, 0, 0, 1);
            for (index_t t = 0; t < tiles_.count(); ++t) apply_tile(at, tiles_, tiles_[t], s);
        }
    }

    void apply_tile(const Offsets& set, const Tiles& tiles, const Tiles::Tile& tile, const TileStatistics<T>& s) const {
        const Offsets at = set + tile.at;
        apply(k_, operand(call_.x, call_.dtype, at, tiles, kX), operand(call_.y, call_.dtype, at, tiles, kY),
              parameter(call_.weight, call_.weight_dtype, at, tiles, kWeight, one<T>()),
              parameter(call_.bias, call_.bias_dtype, at, tiles, kBias, zero<T>()), s, tile.rows, tile.lanes,
              schedule_.stream);
    }

    const Plan& plan_;
    const ForwardCall& call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Leaves leaves_;
    const LeafReader<X> read_x_;
    const Nest set_, elements_;
    const Tiles tiles_;         // of a set
    const Axis neighbours_;     // from a set to the next
    const bool sets_are_rows_;  // every set is one row of elements
    const bool leaf_is_set_;    // and one leaf
    const Tiles rows_of_sets_;
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
          leaf_is_set_(leaves_.count() == 1 && read_dy_.one_row() && read_x_.one_row() && read_w_.one_row()),
          elements_(collapse(joined(plan.runs, plan.run), kBackwardOperands)),
          tiles_(elements_, 0),
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
    Sums leaf(const Offsets& at, index_t l, const TileStatistics<T>& s) const {
        X dy[kLeafLanes], x[kLeafLanes];
        T w[kLeafLanes];
        const Leaves::Leaf piece = leaves_[l];
        const bool weighted = cells_.by_element && call_.weight;
        return sums_along(k_, read_dy_(call_.dy + at[kDy], piece, dy), read_x_(call_.x + at[kX], piece, x),
                          weighted ? read_w_(call_.weight + at[kWeight], piece, w) : one<T>(), s, piece.rows,
                          piece.lanes);
    }

    // From the sums of a set's cells (of all leaves of it, where by element) to what dx needs.
    void finish(index_t set, const Sums* cells) {
        if (!wants_set_sums()) return;
        const Offsets at = plan_.kept.offsets(set);
        Sums sums;
        for (index_t c = 0; c < index_.size(); ++c) {
            double w = 1;
            if (!cells_.by_element && call_.weight) {
                w = read_double(call_.weight + at[kWeight] + index_.offset(kWeight, c), call_.weight_dtype);
            }
            sums.g += w * cells[c].g;
            sums.g_xhat += w * cells[c].g_xhat;
        }
        const double count = static_cast<double>(plan_.set_size);
        statistics_.put_sums(set, plan_.center ? sums.g / count : 0, sums.g_xhat / count);
    }

    Sums cell(index_t set, index_t c) const {
        const TileStatistics<T> s = statistics_.tile(set, 0, 0, 1);
        const Offsets at = plan_.kept.offsets(set) + index_.offsets(c);
        Sums sums = leaf(at, 0, s);
        for (index_t l = 1; l < leaves_.count(); ++l) sums += leaf(at, l, s);
        return sums;
    }

    // Batch, instance, group: the sums of the cells serve both the sets and the parameters.
    void by_cell() {
        const index_t per_set = index_.size();
        const Buffer<Sums> sums(plan_.sets * per_set);
        const Buffer<Sums> parameters = zeroed_sums(call_);
        const bool wants_sums = wants_set_sums() || call_.parameters;
        if (schedule_.resident && !schedule_.split) {
            const SetPieces pieces(plan_, 2 * sizeof(X), schedule_.threads);
            parallel_for(pieces.count(), schedule_.threads, [&](index_t i) {
                for (index_t set = pieces.first(i); set < pieces.last(i); ++set) {
                    load_statistics(set);
                    if (wants_sums) {
                        for (index_t c = 0; c < per_set; ++c) sums[set * per_set + c] = cell(set, c);
                        finish(set, &sums[set * per_set]);
                    }
                    if (call_.dx) dx_set(set);
                }
            });
        } else {
            two_sweeps(sums, wants_sums);
        }
        if (!call_.parameters) return;
        for (index_t set = 0; set < plan_.sets; ++set) {
            const index_t at = plan_.kept.offset(kGradient, set);
            for (index_t c = 0; c < per_set; ++c) {
                parameters[at + index_.offset(kGradient, c)] += sums[set * per_set + c];
            }
        }
        write_parameters(call_, parameters.get());
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
            for (index_t l = all * piece / pieces; l < all * (piece + 1) / pieces; ++l) {
                parts[set * all + l] = leaf(at + index_.offsets(l / leaves), l % leaves, s);
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

    void dx_set(index_t set) const {
        const Offsets at = plan_.kept.offsets(set);
        const TileStatistics<T> s = statistics_.tile(set, 0, 0, 1);
        for (index_t t = 0; t < tiles_.count(); ++t) dx_tile(at, tiles_, tiles_[t], s);
    }

    void dx_tile(const Offsets& set, const Tiles& tiles, const Tiles::Tile& tile, const TileStatistics<T>& s) const {
        write_dx(k_, call_, set + tile.at, tiles, tile.rows, tile.lanes, s, nullptr, nullptr, schedule_.stream);
    }

    // Layer, rms: dx and the gradients of the parameters in one reading, down kSumRows rows at a time. The rows that
    // share a parameter are summed in blocks that depend on their number only; a block's sums are in double.
    void by_element() {
        const Grid grid(plan_);
        const RowBlocks blocks(grid.rows.size(), kSumRows, kSumRows);
        const Buffer<double> sums(call_.parameters ? 2 * blocks.count() * grid.width() : 0);
        const bool one_reading =
            grid.rows_are_sets && blocks.count() >= schedule_.threads && !schedule_.split && schedule_.resident;
        if (!one_reading) all_set_sums();
        // Few blocks: their lanes are shared too.
        const index_t extent = grid.lanes.extent;
        const index_t pieces = one_reading ? 1 : lane_pieces_for(blocks.count() * grid.others.size(), extent);
        const index_t lanes_per = ((extent + pieces - 1) / pieces + 63) / 64 * 64;

        parallel_for(blocks.count() * pieces, schedule_.threads, [&](index_t i) {
            const index_t block = i / pieces, lane = i % pieces * lanes_per;
            const index_t lanes = extent - lane < lanes_per ? extent - lane : lanes_per;
            double* sum_g = call_.parameters ? &sums[2 * block * grid.width() + lane] : nullptr;
            if (lanes > 0)
                block_of_rows(grid, blocks.first(block), blocks.size(block), lane, lanes, one_reading, sum_g);
        });
        if (call_.parameters) fold_blocks(grid, blocks.count(), sums.get());
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

    // dx of `lanes` lanes of some rows, and into sum_g (and, a width further, sum_g_xhat) the sums down the rows.
    // own_sets: the rows are sets, whose sums have not been taken yet.
    void block_of_rows(const Grid& grid, index_t first, index_t rows, index_t lane, index_t lanes, bool own_sets,
                       double* sum_g) {
        const index_t others = grid.others.size(), extent = grid.lanes.extent, width = grid.width();
        for (index_t o = 0; sum_g && o < others; ++o) {
            for (index_t l = 0; l < lanes; ++l) sum_g[o * extent + l] = sum_g[width + o * extent + l] = 0;
        }
        const Tiles tile(rows_and_lanes(grid.rows.inner(), grid.lanes), 0);
        for (index_t r = first; r < first + rows && !gives_up();) {
            const Axis& inner = grid.rows.inner();
            index_t n = inner.extent - r % inner.extent;
            if (n > kSumRows) n = kSumRows;
            if (n > first + rows - r) n = first + rows - r;
            const Offsets row = grid.rows.offsets(r);
            if (own_sets) sums_of_sets(row[kSet], inner.stride[kSet], n);
            for (index_t o = 0; o < others; ++o) {
                Offsets at = row + grid.others.offsets(o);
                for (int k = 0; k < kOperands; ++k) at.at[k] += lane * grid.lanes.stride[k];
                const TileStatistics<T> s = statistics_.tile(at[kSet], inner.stride[kSet], 0, n);
                double* to = sum_g ? sum_g + o * extent : nullptr;
                write_dx(k_, call_, at, tile, n, lanes, s, to, to ? to + width : nullptr, schedule_.stream);
            }
            r += n;
        }
    }

    // The sums of all blocks, in order, to the gradients.
    void fold_blocks(const Grid& grid, index_t blocks, const double* sums) const {
        const index_t width = grid.width(), extent = grid.lanes.extent;
        const index_t pieces = (width + kPieceBytes / 16 - 1) / (kPieceBytes / 16);
        parallel_for(pieces, schedule_.threads, [&](index_t piece) {
            for (index_t i = width * piece / pieces; i < width * (piece + 1) / pieces; ++i) {
                Sums total;
                for (index_t block = 0; block < blocks; ++block) {
                    total.g += sums[2 * block * width + i];
                    total.g_xhat += sums[(2 * block + 1) * width + i];
                }
                const index_t gradient = grid.others.offset(kGradient, i / extent);
                write_parameter(call_, gradient + i % extent * grid.lanes.stride[kGradient], total);
            }
        });
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
        const SetPieces pieces(plan_, 2 * sizeof(X), schedule_.threads);
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
    const bool leaf_is_set_;
    const Nest elements_;
    const Tiles tiles_;  // of a set
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
