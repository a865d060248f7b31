// The rows walk, backward: sums cell by cell (batch, instance, group) or down the rows (layer, rms), and dx.

#include "beside.h"

namespace normkit::cpu {
namespace {

constexpr unsigned kBackwardOperands = bit(kX) | bit(kY) | bit(kDy) | bit(kWeight) | bit(kGradient);

Nest rows_and_lanes(const Axis& rows, const Axis& lanes) {
    Nest two;
    two.push(rows);
    two.push(lanes);
    return two;
}

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

// Elements of a run, at most, that is taken beside those of the neighbouring sets. Longer ones, time side by side over
// time set by set: batch norm 32 x 600 x 17^2 1.15, 32 x 400 x 20^2 1.15, 32 x 300 x 22^2 1.22 (one thread of a Zen 5).
constexpr index_t kLongestSideBySide = 256;

template <class X>
class RowsBackward {
    using T = Compute<X>;
    struct Neighbours {
        index_t first, n;  // sets
    };
    friend WritingSets<X, RowsBackward, Neighbours>;  // tile_of

  public:
    RowsBackward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule)
        : plan_(plan),
          weight_(plan, schedule, call.x, call.dx, call.weight, call.weight_dtype, kWeight),
          call_(with_weight(call, weight_.get())),
          k_(kernels),
          schedule_(schedule),
          cells_(plan),
          index_(cells_.by_element ? Nest{} : cells_.index),
          runs_(cells_.by_element ? plan.runs : cells_.runs),
          run_(cells_.by_element ? plan.run : cells_.run),
          leaves_(runs_.size(), run_.size()),
          read_dy_(k_.isa, runs_, run_, kDy, call.dtype),
          read_x_(k_.isa, runs_, run_, kX, call.dtype),
          read_w_(k_.isa, runs_, run_, kWeight, call.weight_dtype),
          weights_repeat_(read_w_.repeats()),
          set_is_row_(read_dy_.one_row() && read_x_.one_row() && read_w_.one_row()),
          leaf_is_set_(leaves_.count() == 1 && set_is_row_),
          elements_(collapse(joined(plan.runs, plan.run), kBackwardOperands)),
          in_series_(read_dy_.contiguous(leaves_.rows) && read_x_.contiguous(leaves_.rows)),
          tiles_(plan, elements_, 2 * sizeof(X), together()),
          side_by_side_(index_.size() == 1 && tiles_.interleaved() && leaves_.rows > 1 &&
                        run_.size() <= kLongestSideBySide),
          in_rows_(elements_.inner().stride[kWeight] == 0 && tiles_.template go_in_rows<T>({kX, kDy, kY}, {kWeight})),
          stacked_(tiles_.stack({kX, kDy, kY, kWeight})),
          dx_on_lines_(schedule.stream && rows_on_lines(plan, elements_, call.dx)),
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
    static BackwardCall with_weight(BackwardCall call, const char* weight) {
        call.weight = weight;
        return call;
    }
    bool wants_set_sums() const { return call_.dx && !call_.constant_statistics; }

    // Beside, fewer sets come together, if their rows are whole lines or long: each goes past the caches by itself
    // then. Batch norm, speed over in turn, with fewer and with as many as in turn, two threads of an Emerald Rapids:
    // 32 x 400 x 24^2 1.15, 1.02, 32 x 512 x 28^2 1.18, 1.05; others 32 x 400 x 23^2 0.82, 1.04 (one thread
    // 0.66, 1.16), also where they go past the caches by themselves (least_ragged_row): fewer over as many, 32 x 256 x
    // 17^2 0.87, 21^2 and 23^2 1.0, 64 x 256 x 27^2 1.15.
    Together together() const {
        const index_t row = run_.size() * index_t{sizeof(X)};
        return schedule_.by_row && (row >= kLongRow || row % kLine == 0) ? Together::beside : Together::sums;
    }

    // Of sets number first, first + every, ... (for_statistics).
    void load_statistics(index_t first, index_t sets, index_t every = 1) {
        for_statistics(plan_.kept, first, every, sets, [&](index_t i, index_t n, index_t at, index_t step) {
            const double *const mean = call_.mean ? call_.mean + at : nullptr, *const rstd = call_.rstd + at;
            if (every == 1) return statistics_.put(first + i, n, mean, rstd, step);
            for (index_t k = 0; k < n; ++k) {
                statistics_.put(first + (i + k) * every, 1, mean ? mean + k * step : nullptr, rstd + k * step, 1);
            }
        });
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
                          s, piece.rows, piece.lanes, schedule_.far);
    }

    // From the sums of the cells of n neighbouring sets (of all leaves of them, where by element: then they need not be
    // neighbours, but each the `every`-th) to what dx needs.
    void finish(index_t first, index_t n, const Sums* cells, index_t every = 1) {
        if (!wants_set_sums()) return;
        if (cells_.by_element) return finish_with(first, n, cells, every, [](index_t) { return 1.0; });
        const char* weight = call_.weight ? call_.weight + plan_.kept.offset(kWeight, first) : nullptr;
        with_weights<T>(weight, call_.weight_dtype,
                        [&](auto weight_at) { finish_with(first, n, cells, every, weight_at); });
    }

    template <class WeightAt>
    void finish_with(index_t first, index_t n, const Sums* cells, index_t every, WeightAt weight_at) {
        const double count = static_cast<double>(plan_.set_size);
        for (index_t i = 0; i < n; ++i) {
            Sums sums;
            for (index_t c = 0, all = index_.size(); c < all; ++c, ++cells) {
                const double w = weight_at(i * tiles_.next.stride[kWeight] + cell_offset(kWeight, c));
                sums.g += w * cells->g;
                sums.g_xhat += w * cells->g_xhat;
            }
            statistics_.put_sums(first + i * every, plan_.center ? sums.g / count : 0, sums.g_xhat / count);
        }
    }

    // Of cell c from the first of its set.
    index_t cell_offset(Operand operand, index_t c) const {
        return index_.n == 1 ? c * index_.inner().stride[operand] : index_.offset(operand, c);
    }

    static Unwritten<X>* nothing() { return nullptr; }

    // The sums of all cells of n neighbouring sets. beside(): what is to be written meanwhile, or null.
    template <class Beside>
    void cells_of(index_t set, index_t n, Sums* sums, Beside beside) const {
        const index_t per_set = index_.size();
        const TileStatistics<T> s = statistics_.tile(set, 1, 0, n);
        if (!in_series_ || s.scale) {
            for (index_t c = 0; c < n * per_set; ++c) sums[c] = cell(set + c / per_set, c % per_set);
        } else if (side_by_side_) {
            cells_side_by_side(plan_.kept.offsets(set), n, s, sums);
        } else if (stacked_ && leaves_.count() == 1 && index_.n == 1 && per_set > 1) {
            cells_stacked(set, n, sums, beside());
        } else if (leaves_.count() == 1 && index_.n <= 1) {
            cells_at_one_distance(plan_.kept.offsets(set), n, s, sums, beside());
        } else {
            cells_by_leaf(plan_.kept.offsets(set), n, s, sums, beside);
        }
    }

    // Each cell is one leaf: the cells of each set, or sets of one cell.
    void cells_at_one_distance(const Offsets& at, index_t n, const TileStatistics<T>& s, Sums* sums,
                               Unwritten<X>* beside) const {
        const index_t per_set = index_.size();
        const bool one_each = per_set == 1;
        const Axis& next = one_each ? tiles_.next : index_.inner();
        Room<SumSeries, kSetsAtOnce> series;
        const index_t all = one_each ? 1 : n;
        for (index_t i = 0; i < all; ++i) {
            series[i] = leaves_along(next, one_each ? n : per_set, one_each, leaf_as_series(at, i, 0, leaves_[0]));
        }
        sums_along(k_, series.get(), all, s, schedule_.far, sums, beside);
    }

    // Each cell is one leaf, and those of neighbouring sets follow each other: one series of all.
    void cells_stacked(index_t set, index_t n, Sums* sums, Unwritten<X>* beside) const {
        const index_t per_set = index_.size();
        const Offsets from = plan_.kept.offsets(set);
        tiles_.template for_stacks<T>(n, from, [&](const Tiles&, const Offsets& at, index_t first, index_t sets) {
            const SumSeries all = leaves_along(index_.inner(), sets * per_set, 1, leaf_as_series(at, 0, 0, leaves_[0]));
            Repeated<T, 3> of_cells(sets, per_set);
            const TileStatistics<T> s = of_cells(statistics_.tile(set + first, 1, 0, sets), false, 0);
            sums_along(k_, &all, 1, s, schedule_.far, sums + first * per_set, beside);
        });
    }

    // Sets of one cell whose runs are short and lie side by side: leaf by leaf of all of them, so that kernels can read
    // them in the order of memory.
    void cells_side_by_side(const Offsets& at, index_t n, const TileStatistics<T>& s, Sums* sums) const {
        constexpr index_t kAtOnce = 16;  // leaves of each
        Room<SumSeries, kAtOnce> series;
        Room<Sums, kAtOnce * kSetsAtOnce> of_leaves;
        std::fill(sums, sums + n, Sums{});
        for (index_t first = 0, m; first < leaves_.count(); first += m) {
            m = std::min(kAtOnce, leaves_.count() - first);
            for (index_t j = 0; j < m; ++j) {
                series[j] = leaves_along(tiles_.next, n, 1, leaf_as_series(at, 0, 0, leaves_[first + j]));
            }
            sums_along(k_, series.get(), m, s, schedule_.far, of_leaves.get());
            for (index_t j = 0; j < m * n; ++j) sums[j % n] += of_leaves[j];
        }
    }

    template <class Beside>
    void cells_by_leaf(const Offsets& at, index_t n, const TileStatistics<T>& s, Sums* sums, Beside beside) const {
        const index_t leaves = leaves_.count();
        index_t leaf = 0;
        in_series(at, 0, n * index_.size() * leaves, s, beside, [&](const Sums* some, index_t m) {
            for (index_t j = 0; j < m; ++j) {
                if (leaf == 0) *sums = {};
                *sums += some[j];
                if (++leaf == leaves) leaf = 0, ++sums;
            }
        });
    }

    // f(sums, m) for the sums of n leaves, some after another, from number `from` on through the cells of the sets that
    // begin at `at`.
    template <class Beside, class F>
    void in_series(const Offsets& at, index_t from, index_t n, const TileStatistics<T>& s, Beside beside, F f) const {
        const index_t per_set = index_.size();
        LeafWalk walk(leaves_, from, true, read_dy_.evenly() && read_x_.evenly());  // to which cells are sets
        for (index_t left = n; left > 0;) {
            Room<SumSeries, kLeavesAtOnce> series;
            Room<Sums, kLeavesAtOnce> of_leaves;
            const index_t room = std::min(kLeavesAtOnce, left);
            index_t m = 0, taken = 0;
            for (; taken < room; ++m) {
                const LeafWalk::Some some = walk.take(room - taken);
                const index_t i = some.set / per_set;
                series[m] = leaf_as_series(at, i, some.set - i * per_set, some.leaf);
                series[m].leaves = some.n;
                taken += some.n;
            }
            sums_along(k_, series.get(), m, s, schedule_.far, of_leaves.get(), beside());
            f(of_leaves.get(), taken);
            left -= taken;
        }
    }

    // A leaf of cell c of the set that is i sets further than `at`; those behind it are at the distance of leaves.
    SumSeries leaf_as_series(const Offsets& at, index_t i, index_t c, const Leaves::Leaf& leaf) const {
        const auto place = [&](const char* base, Operand o) {
            return base + at[o] + i * tiles_.next.stride[o] + cell_offset(o, c);
        };
        const Strided dy = read_dy_(place(call_.dy, kDy), leaf, nullptr);
        const Strided x = read_x_(place(call_.x, kX), leaf, nullptr);
        return {{dy.p, dy.row},
                {x.p, x.row},
                {one<T>().p, 0},
                leaf.rows,
                leaf.lanes,
                leaves_.step(dy.row, dy.lane),
                leaves_.step(x.row, x.lane),
                1,
                i};
    }

    // `leaf` and those that lie along an axis from it, which are of the set that is next_set further each.
    static SumSeries leaves_along(const Axis& axis, index_t leaves, index_t next_set, SumSeries leaf) {
        leaf.leaf_dy = axis.stride[kDy];
        leaf.leaf_x = axis.stride[kX];
        leaf.leaves = leaves;
        leaf.next_set = next_set;
        return leaf;
    }

    Sums cell(index_t set, index_t c) const {
        const TileStatistics<T> s = statistics_.tile(set, 0, 0, 1);
        const Offsets at = plan_.kept.offsets(set) + index_.offsets(c);
        LeafWeights weights;
        Sums sums;
        for (index_t l = 0; l < leaves_.count(); ++l) {
            const Sums more = leaf(at, l, s, &weights);  // in one place: its buffers are a third of the stack
            if (l == 0) {
                sums = more;
            } else {
                sums += more;
            }
        }
        return sums;
    }

    // Batch, instance, group: the sums of the cells serve both the sets and the parameters.
    void by_cell() {
        const index_t per_set = index_.size();
        const Buffer<Sums> sums(plan_.sets * per_set);
        const Buffer<Sums> parameters = zeroed_sums(call_);
        const bool wants_sums = wants_set_sums() || call_.parameters;
        if (schedule_.resident && !schedule_.split) {
            const SetPieces pieces(plan_, 2 * sizeof(X), schedule_, tiles_.at_once());
            parallel_for(pieces.count(), schedule_.threads, [&](index_t i) {
                if (schedule_.by_row && wants_set_sums()) {
                    return sets_beside(pieces.first(i), pieces.last(i), sums);
                }
                for (index_t set = pieces.first(i), n; set < pieces.last(i) && !gives_up(); set += n) {
                    n = tiles_.take(set, pieces.last(i));
                    load_statistics(set, n);
                    if (wants_sums) {
                        cells_of(set, n, &sums[set * per_set], nothing);
                        finish(set, n, &sums[set * per_set]);
                    }
                    if (call_.dx) dx_of_sets(set, n);
                }
            });
        } else {
            two_sweeps(sums, wants_sums);
        }
        if (!call_.parameters) return;
        const Axis& next = plan_.kept.inner();
        for (index_t set = 0; set < plan_.sets; set += next.extent) {
            const index_t at = plan_.kept.offset(kGradient, set);
            for (index_t i = 0; i < next.extent; ++i) {
                Sums* const of_set = &parameters[at + i * next.stride[kGradient]];
                const Sums* const cells = &sums[(set + i) * per_set];
                for (index_t c = 0; c < per_set; ++c) of_set[cell_offset(kGradient, c)] += cells[c];
            }
        }
        write_parameters(call_, 0, 1, call_.parameters, parameters.get());
    }

    // The sums of some sets beside dx of those before.
    void sets_beside(index_t first, index_t last, const Buffer<Sums>& sums) {
        const index_t per_set = index_.size();
        WritingSets<X, RowsBackward, Neighbours> writing(k_, tiles_, *this);
        Neighbours of[2];
        for (index_t set = first, i = 0; set < last && !gives_up(); i ^= 1) {
            Neighbours& some = of[i];
            some = {set, tiles_.take(set, last)};
            load_statistics(set, some.n);
            cells_of(set, some.n, &sums[set * per_set], [&] { return writing.tile(); });
            writing.rest();
            finish(set, some.n, &sums[set * per_set]);
            if (!dx_at_once(set, some.n)) writing.begin(&some, some.n);
            set += some.n;
        }
        writing.rest();
    }

    // All leaves of all cells, then the sets' means; then dx, tile by tile.
    void two_sweeps(const Buffer<Sums>& sums, bool wants_sums) {
        load_statistics(0, plan_.sets);
        if (wants_sums) sweep_sums(sums);
        if (!call_.dx) return;
        const Tiles tiles(elements_, elements_per_piece(plan_, schedule_));
        const index_t n = plan_.sets * tiles.count();
        parallel_for(n, schedule_.threads, Order::backwards, [&](index_t i) {  // as in the forward pass
            const index_t set = i / tiles.count();
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
            const index_t first = all * piece / pieces, last = all * (piece + 1) / pieces;
            Sums* part = &parts[set * all + first];
            if (in_series_ && !s.scale && !cells_.by_element) {
                in_series(at, first, last - first, s, nothing,
                          [&](const Sums* some, index_t m) { part = std::copy(some, some + m, part); });
                return;
            }
            LeafWeights weights;
            for (index_t l = first; l < last; ++l) {
                *part++ = leaf(at + index_.offsets(l / leaves), l % leaves, s, &weights);
            }
        });
        for (index_t set = 0; set < plan_.sets; ++set) {
            for (index_t c = 0; c < per_set; ++c) {
                const Sums* part = &parts[set * all + c * leaves];
                Sums total = part[0];
                for (index_t l = 1; l < leaves; ++l) total += part[l];
                sums[set * per_set + c] = total;
            }
            finish(set, 1, &sums[set * per_set]);
        }
    }

    // As in the forward pass: sets of short runs as rows.
    bool dx_in_rows(index_t first, index_t n) const {
        if (!in_rows_ || statistics_.tile(first, 1, 0, n).scale) return false;
        tiles_.template for_rows<T>(
            n, plan_.kept.offsets(first), [&](const Tiles& rows, const Offsets& at, index_t set, index_t sets) {
                const index_t extent = rows.lanes.extent;
                Repeated<T, 6> lanes(sets, extent);
                const TileStatistics<T> s = lanes(statistics_.tile(first + set, 1, 0, sets), wants_set_sums(), 1);
                const Strided w = call_.weight ? lanes(k_.isa, call_.weight + at[kWeight], tiles_.next.stride[kWeight],
                                                       call_.weight_dtype)
                                               : one<T>();
                write_dx(k_, call_, at, rows, rows.rows.extent, sets * extent, w, s, {}, schedule_.stream);
            });
        return true;
    }

    bool dx_stacked(index_t first, index_t n) const {
        if (!stacked_ || statistics_.tile(first, 1, 0, n).scale) return false;
        tiles_.template for_stacks<T>(
            n, plan_.kept.offsets(first), [&](const Tiles& rows, const Offsets& at, index_t set, index_t sets) {
                Repeated<T, 5> of_rows(sets, rows.rows.extent / sets);
                write_dx(k_, call_, at, rows, rows.rows.extent, rows.lanes.extent,
                         of_rows(statistics_.tile(first + set, 1, 0, sets), wants_set_sums(), 0), {}, schedule_.stream);
            });
        return true;
    }

    bool dx_at_once(index_t first, index_t n) const { return n > 1 && (dx_in_rows(first, n) || dx_stacked(first, n)); }

    ApplyTo<X> tile_of(const Neighbours& sets, const SetTiles::Of& all, index_t i) const {
        const SetTiles::Of::Tile t = all[i];
        const Offsets at = plan_.kept.offsets(sets.first) + t.at + t.tile.at;
        ApplyTo<X> tile;
        tile.dy = operand(call_.dy, call_.dtype, at, all.tiles(), kDy);
        tile.x = operand(call_.x, call_.dtype, at, all.tiles(), kX);
        tile.y = operand(call_.dx, call_.dtype, at, all.tiles(), kY);
        tile.w = parameter(call_.weight, call_.weight_dtype, at, all.tiles(), kWeight, one<T>());
        tile.s = statistics_.tile(sets.first + t.set, t.step, 0, t.sets());
        tile.rows = t.tile.rows;
        tile.lanes = t.tile.lanes;
        tile.stream = schedule_.stream;
        tile.far = schedule_.far;
        tile.lines = dx_on_lines_;
        return tile;
    }

    void dx_of_sets(index_t first, index_t n) const {
        if (dx_at_once(first, n)) return;
        const Offsets from = plan_.kept.offsets(first);
        const SetTiles::Of all(tiles_, n);
        for (index_t i = 0; i < all.count(); ++i) {
            const SetTiles::Of::Tile t = all[i];
            dx_tile(from + t.at, all.tiles(), t.tile, statistics_.tile(first + t.set, t.step, 0, t.sets()));
        }
    }

    void dx_tile(const Offsets& set, const Tiles& tiles, const Tiles::Tile& tile, const TileStatistics<T>& s) const {
        write_dx(k_, call_, set + tile.at, tiles, tile.rows, tile.lanes, s, {}, schedule_.stream);
    }

    // Layer, rms: dx and the gradients of the parameters in one reading, down kSumRows rows at a time. The rows that
    // share a parameter are summed in blocks that depend on their number only; a block's sums are in double.
    void by_element() {
        const Grid grid(plan_);
        const RowBlocks blocks(grid.rows.size(), kSumRows, kSumRows);
        const bool one_reading = grid.rows_are_sets && blocks.count() >= schedule_.threads && !schedule_.split &&
                                 schedule_.resident && (blocks.count() > 1 || grid.lanes.extent <= kLeafLanes);
        if (!one_reading) all_set_sums(grid);
        // The sums of a single block are the gradients, piece by piece of the lanes.
        const bool single = call_.parameters && blocks.count() == 1 && grid.others.size() == 1;
        const Buffer<double> sums(call_.parameters && !single ? 2 * blocks.count() * grid.width() : 0);
        // Few blocks: their lanes are shared too.
        const index_t extent = grid.lanes.extent;
        index_t pieces = one_reading ? 1 : lane_pieces_for(blocks.count() * grid.others.size(), extent);
        const index_t least = (extent + kLeafLanes - 1) / kLeafLanes;
        if (single && pieces < least) pieces = least;
        const bool given = single && !one_reading;
        const index_t lanes_per = ((extent + pieces - 1) / pieces + 63) / 64 * 64;

        parallel_for(blocks.count() * pieces, schedule_.threads, [&](index_t i) {
            const index_t block = i / pieces, lane = i % pieces * lanes_per;
            const index_t lanes = extent - lane < lanes_per ? extent - lane : lanes_per;
            if (lanes <= 0) return;
            if (given && gradients_of(grid, lane, lanes)) return;
            double own[2 * kLeafLanes];
            DownSums of_block;
            if (single) {
                of_block = {own, own + kLeafLanes};
            } else if (call_.parameters) {
                double* const first = &sums[2 * block * grid.width() + lane];
                of_block = {first, first + grid.width()};
            }
            block_of_rows(grid, blocks.first(block), blocks.size(block), lane, lanes, one_reading, of_block);
            if (single) write_lanes(grid, 0, lane, lanes, of_block, schedule_.stream);
        });
        if (call_.parameters && !single) fold_blocks(grid, blocks.count(), sums.get());
    }

    // The axes by what they are to the parameters: rows, and what lies inside them, add up to one parameter, lanes and
    // `others` don't.
    struct Grid {
        Nest rows, inside, others;
        Axis lanes;
        bool rows_are_sets = true;  // of all others together, or, `apart`, of each
        bool apart = true;

        explicit Grid(const Plan& plan) {
            const Nest run = collapse(plan.run, kBackwardOperands);
            for (const Nest& nest : {plan.kept, plan.runs, run.without_inner()}) {
                for (int i = 0; i < nest.n; ++i) {
                    const Axis& a = nest.axis[i];
                    const bool shares = a.stride[kGradient] == 0;
                    (shares ? rows : others).push(a);
                    rows_are_sets = rows_are_sets && !(shares && a.reduced);
                    apart = apart && !a.reduced;
                }
            }
            for (int i = 0; !apart && i < others.n; ++i) rows_are_sets = rows_are_sets && others.axis[i].reduced;
            lanes = run.inner();
            const SetRows parts(rows);
            rows = parts.rows;
            inside = parts.inside;
        }
        index_t width() const { return others.size() * lanes.extent; }
    };

    // dx of `lanes` lanes of all rows, and the gradients of their parameters without sums in double in between. False,
    // and nothing done, where the kernels can't.
    bool gradients_of(const Grid& grid, index_t lane, index_t lanes) const {
        const Axis& rows = grid.rows.inner();
        if (!call_.dx || call_.constant_statistics || grid.rows.n > 1 || grid.inside.n > 0) return false;
        if (grid.lanes.stride[kGradient] != 1) return false;
        for (const Dtype dtype :
             {call_.dweight ? call_.dweight_dtype : kDtype<T>, call_.dbias ? call_.dbias_dtype : kDtype<T>}) {
            if (dtype != kDtype<T>) return false;
        }
        const Tiles tile(rows_and_lanes(rows, grid.lanes), 0);
        const Offsets at = grid.rows.offsets(0) + grid.others.offsets(0) + offsets(grid.lanes, lane);
        return backward_of_block(
            k_, operand(call_.dy, call_.dtype, at, tile, kDy), operand(call_.x, call_.dtype, at, tile, kX),
            parameter(call_.weight, call_.weight_dtype, at, tile, kWeight, one<T>()),
            operand(call_.dx, call_.dtype, at, tile, kY), statistics_.tile(at[kSet], rows.stride[kSet], 0, rows.extent),
            rows.extent, lanes, Gradients{call_.dweight, call_.dbias}.at(at[kGradient] * index_t{sizeof(T)}),
            schedule_.stream);
    }

    // dx of `lanes` lanes of some rows, and their sums down the rows.
    // own_sets: the rows are sets, whose sums have not been taken yet.
    void block_of_rows(const Grid& grid, index_t first, index_t rows, index_t lane, index_t lanes, bool own_sets,
                       DownSums sums) {
        const index_t inside = grid.inside.size(), others = grid.others.size(), extent = grid.lanes.extent;
        const Axis& along = grid.rows.inner();
        const Tiles tile(rows_and_lanes(along, grid.lanes), 0);
        // Rows before the next of what lies inside. Where there is such, this is an order of additions, and follows
        // from the plan.
        index_t most = rows_at_once(inside * others * extent * index_t{2 * sizeof(X)});
        if (inside == 1) {
            const bool eights = own_sets && schedule_.in_eights;
            if (!eights) most = kSumRows;
            if (eights && others == 1 && statistics_follow(plan_.kept, along)) most = kLongestPiece / lanes;
        }
        for (index_t r = first, n; r < first + rows && !gives_up(); r += n) {
            n = std::min({along.extent - r % along.extent, first + rows - r, most});
            const Offsets row = grid.rows.offsets(r);
            for (index_t i = 0; i < inside && !(i > 0 && gives_up()); ++i) {
                const Offsets of_others = inside == 1 ? row : row + grid.inside.offsets(i);
                sums.fresh = r == first && i == 0;
                for (index_t k = 0; own_sets && !grid.apart && k < n; k += kSumRows) {
                    sums_of_sets(of_others + offsets(along, k), along, std::min(n - k, index_t{kSumRows}));
                }
                for (index_t o = 0; o < others && !(o > 0 && gives_up()); ++o) {
                    const Offsets at = others == 1 ? of_others : of_others + grid.others.offsets(o);
                    rows_of(lane == 0 ? at : at + offsets(grid.lanes, lane), tile, n, lanes, own_sets && grid.apart,
                            sums.at(o * extent));
                }
            }
        }
    }

    // Rows that lie along one axis.
    void rows_of(const Offsets& first, const Tiles& tile, index_t rows, index_t lanes, bool own_sets, DownSums sums) {
        const index_t every = tile.rows.stride[kSet];
        for (index_t r = 0, n; r < rows; r += n, sums.fresh = false) {
            const Offsets at = r == 0 ? first : first + offsets(tile.rows, r);
            n = own_sets && schedule_.in_eights ? in_eights(at, tile, rows - r, lanes, sums) : 0;
            if (n > 0) continue;
            n = std::min(rows - r, index_t{kSumRows});
            if (own_sets && row_by_row(at, tile, n, lanes, sums)) continue;
            if (own_sets) sums_of_sets(at, tile.rows, n);
            write_dx(k_, call_, at, tile, n, lanes, statistics_.tile(at[kSet], every, 0, n), sums, schedule_.stream);
        }
    }

    // The same for sets that are short rows, by a kernel that takes them eight at a time. Returns how many it has done.
    // Precondition: rows <= kManyRows unless their statistics follow each other.
    index_t in_eights(const Offsets& at, const Tiles& tile, index_t rows, index_t lanes, DownSums sums) const {
        double room[2][kManyRows];
        const double *mean = plan_.center ? room[0] : nullptr, *rstd = room[1];
        if (statistics_follow(plan_.kept, tile.rows)) {
            const index_t first = plan_.kept.offset(kStatistic, at[kSet]);  // rows may be one axis where these are not
            if (mean) mean = call_.mean + first;
            rstd = call_.rstd + first;
        } else {
            const auto copy = [&](index_t i, index_t n, index_t from, index_t step) {
                for (index_t k = 0; mean && k < n; ++k) room[0][i + k] = call_.mean[from + k * step];
                for (index_t k = 0; k < n; ++k) room[1][i + k] = call_.rstd[from + k * step];
            };
            for_statistics(plan_.kept, at[kSet], tile.rows.stride[kSet], rows, copy);
        }
        return backward_in_eights(k_, operand(call_.dy, call_.dtype, at, tile, kDy),
                                  operand(call_.x, call_.dtype, at, tile, kX),
                                  parameter(call_.weight, call_.weight_dtype, at, tile, kWeight, one<T>()),
                                  operand(call_.dx, call_.dtype, at, tile, kY), rows, lanes, mean, rstd, sums,
                                  schedule_.stream, schedule_.far);
    }

    // The same for sets that are one row each, by a kernel that does the sums of one beside dx of another.
    // False where the kernels can't.
    bool row_by_row(const Offsets& at, const Tiles& tile, index_t rows, index_t lanes, DownSums sums) {
        if (!schedule_.by_row || !set_is_row_ || elements_.n > 1) return false;
        const index_t first = at[kSet], every = tile.rows.stride[kSet];
        load_statistics(first, rows, every);
        return backward_rows(k_, operand(call_.dy, call_.dtype, at, tile, kDy),
                             operand(call_.x, call_.dtype, at, tile, kX),
                             parameter(call_.weight, call_.weight_dtype, at, tile, kWeight, one<T>()),
                             operand(call_.dx, call_.dtype, at, tile, kY), statistics_.tile(first, every, 0, rows),
                             rows, lanes, sums, schedule_.stream, schedule_.far, plan_.center,
                             statistics_.mean_g() + first, statistics_.mean_g_xhat() + first);
    }

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
                         write_lanes(grid, other, lane, n, {total, total_xhat}, false);
                     });
    }

    void write_lanes(const Grid& grid, index_t other, index_t lane, index_t n, DownSums sums, bool stream) const {
        const index_t stride = grid.lanes.stride[kGradient];
        const index_t first = grid.others.offset(kGradient, other) + lane * stride;
        write_doubles(k_.isa, call_.dweight, call_.dweight_dtype, first, stride, n, sums.g_xhat, stream);
        write_doubles(k_.isa, call_.dbias, call_.dbias_dtype, first, stride, n, sums.g, stream);
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
        load_statistics(set, 1);
        if (!wants_set_sums()) return;
        const Sums sums = cell(set, 0);
        finish(set, 1, &sums);
    }

    // The same for n <= kSumRows sets along `next`, which have their parameters in common.
    void sums_of_sets(const Offsets& at, const Axis& next, index_t n) {
        const index_t set = at[kSet], every = next.stride[kSet];
        if (!wants_set_sums() || !leaf_is_set_) {
            for (index_t i = 0; i < n && !gives_up(); ++i) set_sums(set + i * every);
            return;
        }
        load_statistics(set, n, every);
        const Leaves::Leaf row = leaves_[0];
        Strided dy = read_dy_(call_.dy + at[kDy], row, nullptr), x = read_x_(call_.x + at[kX], row, nullptr);
        dy.row = next.stride[kDy];
        x.row = next.stride[kX];
        const Strided w = call_.weight ? read_w_(call_.weight + at[kWeight], row, nullptr) : one<T>();
        Sums sums[kSumRows];
        sums_of_rows(k_, dy, x, w, statistics_.tile(set, every, 0, n), n, row.lanes, schedule_.far, sums);
        finish(set, n, sums, every);
    }

    void all_set_sums(const Grid& grid) {
        if (schedule_.split && wants_set_sums()) {
            load_statistics(0, plan_.sets);
            const Buffer<Sums> sums(plan_.sets);
            sweep_sums(sums);
            return;
        }
        if (!grid.rows_are_sets || !grid.apart) {
            const SetPieces pieces(plan_, 2 * sizeof(X), schedule_, tiles_.at_once());
            parallel_for(pieces.count(), schedule_.threads, [&](index_t i) {
                for (index_t set = pieces.first(i); set < pieces.last(i); ++set) set_sums(set);
            });
            return;
        }
        // Some rows, and then as many of each that lies inside or beside them.
        const Axis& along = grid.rows.inner();
        const index_t others = grid.others.size(), beside = grid.inside.size() * others;
        const index_t fair = schedule_.threads > 1 ? plan_.sets / (4 * schedule_.threads) : plan_.sets;
        const index_t few = std::clamp(fair, index_t{1}, index_t{kSumRows});
        const index_t near = kPieceBytes / (few * plan_.set_size * index_t{2 * sizeof(X)});
        const index_t per = std::clamp(std::min(near, fair / few), index_t{1}, beside);
        const index_t pieces_along = (along.extent + few - 1) / few, pieces = (beside + per - 1) / per;
        parallel_for(grid.rows.size() / along.extent * pieces_along * pieces, schedule_.threads, [&](index_t i) {
            const index_t outer = i / pieces / pieces_along, r = i / pieces % pieces_along * few;
            const index_t n = std::min(few, along.extent - r), first = i % pieces * per;
            const Offsets row = grid.rows.offsets(outer * along.extent + r);
            for (index_t k = first; k < std::min(first + per, beside) && !gives_up(); ++k) {
                sums_of_sets(row + grid.inside.offsets(k / others) + grid.others.offsets(k % others), along, n);
            }
        });
    }

    const Plan& plan_;
    const LinedUp<X> weight_;
    const BackwardCall call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Cells cells_;
    const Nest index_, runs_, run_;
    const Leaves leaves_;
    const LeafReader<X> read_dy_, read_x_;
    const LeafReader<T> read_w_;
    const bool weights_repeat_, set_is_row_, leaf_is_set_;
    const Nest elements_;
    const bool in_series_;  // kernels read dy and x as they lie, leaf by leaf
    const SetTiles tiles_;
    const bool side_by_side_;
    const bool in_rows_, stacked_;  // how dx of neighbouring sets is written
    const bool dx_on_lines_;
    const Buffer<T> storage_;
    SetStatistics<T> statistics_;
};

}  // namespace

template <class X>
void rows_backward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule) {
    RowsBackward<X>(plan, call, kernels, schedule).run();
}

#define NORMKIT_INSTANTIATE(name, X, T) \
    template void rows_backward<X>(const Plan&, const BackwardCall&, const KernelPair<X>&, const Schedule&);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
