// The columns walk: neighbouring lanes belong to different sets (batch, instance, group in NHWC; layer over C in NCHW).
//
// Sums run down the rows, each lane on its own: in leaves of kLeafRows (moments) or kSumRows (backward), the leaves in
// blocks of rows, the blocks merged in order. Then the lanes of a set are merged (group norm: C/G neighbours).
// A unit of work is a block of neighbouring lanes, all of its rows (resident) or one block of them.

#include <algorithm>

#include "walks.h"

namespace normkit::cpu {
namespace {

constexpr index_t kLeastBlock = 256;  // rows; a block's partial sums then cost little beside its elements
constexpr index_t kGatherLanes = 64;

// Rows of a unit between two looks at whether to give up; a multiple of kLeafRows.
constexpr index_t kRowsBetweenQuestions = 1024;

// Rows of a piece of the second sweep; element: bytes of one, in all arrays that are read. Where arrays come from
// memory pieces are 1 MiB, if there are eight for each thread: the sweep goes backwards from piece to piece, and what a
// piece asks for behind its end has been done. Time with 256 KiB over time so, mean of 18 cases in NHWC 1.025; on two
// threads, of 26, 1.025 (a Zen 5); with 64 KiB over 256 1.08.
index_t rows_of_piece(const Plan& plan, const Schedule& schedule, index_t most_lanes, index_t element) {
    constexpr index_t kMost = 4 * kPieceBytes;
    const index_t share = schedule.far ? plan.total * element / (8 * schedule.threads) : 0;
    const index_t bytes = share < kPieceBytes ? kPieceBytes : share < kMost ? share : kMost;
    const index_t rows = bytes / (most_lanes * element);
    return rows < 1 ? 1 : rows;
}

constexpr unsigned kOperandsForward = bit(kX) | bit(kY) | bit(kWeight) | bit(kBias);
constexpr unsigned kOperandsBackward = bit(kX) | bit(kY) | bit(kDy) | bit(kWeight) | bit(kGradient);

// Lanes [first, first + lanes) of block `outer` of the plan; they are whole sets.
struct Unit {
    index_t outer, first_set, sets, lanes;
};

// How the lanes of a plan are cut into units.
class Units {
  public:
    Units(const Plan& plan, const Schedule& schedule, unsigned operands) : plan_(plan) {
        // Neighbouring sets make one unit only where their lanes are evenly spaced in every operand.
        bool even = true;
        for (int o = 0; o < kOperands; ++o) {
            if (operands >> o & 1) even = even && plan.lane.stride[o] == plan.merge.stride[o] * plan.merge.extent;
        }
        per_ = even || plan.merge.extent == 1 ? schedule.lanes / plan.merge.extent : 1;
        if (per_ < 1) per_ = 1;
        pieces_ = (plan.lane.extent + per_ - 1) / per_;
    }
    index_t count() const { return plan_.kept.size() * pieces_; }
    Unit operator[](index_t i) const {
        const index_t first = i % pieces_ * per_;
        const index_t sets = plan_.lane.extent - first < per_ ? plan_.lane.extent - first : per_;
        return {i / pieces_, first, sets, sets * plan_.merge.extent};
    }
    index_t most_lanes() const { return per_ * plan_.merge.extent; }
    index_t per_outer() const { return pieces_; }
    // Of a row.
    index_t lanes() const { return plan_.lane.extent * plan_.merge.extent; }

    Offsets at(const Unit& u) const { return plan_.kept.offsets(u.outer) + offsets(plan_.lane, u.first_set); }
    index_t set(const Unit& u) const { return u.outer * plan_.lane.extent + u.first_set; }

    // From lane to lane of a unit.
    index_t lane_stride(Operand o) const {
        return plan_.merge.extent > 1 ? plan_.merge.stride[o] : plan_.lane.stride[o];
    }

    // The rows of a unit as tiles, for any number of lanes.
    Tiles rows(unsigned operands, index_t rows_per) const {
        Nest nest = collapse(plan_.runs, operands);
        Axis lanes;
        for (int o = 0; o < kOperands; ++o) lanes.stride[o] = lane_stride(static_cast<Operand>(o));
        nest.push(lanes);
        return Tiles(nest, 0, rows_per);
    }

  private:
    const Plan& plan_;
    index_t per_, pieces_;
};

// Work in the order of memory: sample by sample, parts of its rows, and the units that lie side by side in them.
struct Part {
    index_t unit, rows;  // rows: which tile or block of them
};
Part part_of(const Units& units, index_t parts, index_t i) {
    const index_t side = units.per_outer();
    return {i / (side * parts) * side + i % side, i / side % parts};
}

// f(first, n): n units from `first` on, those of the samples that are swept together.
template <class F>
void for_samples(const Plan& plan, const Units& units, const Schedule& schedule, F f) {
    const index_t samples = plan.kept.size();
    if (schedule.samples >= samples) return f(0, units.count());
    const OneCall all;
    for (index_t sample = 0, n; sample < samples; sample += n) {
        n = std::min(samples - sample, schedule.samples);
        f(sample * units.per_outer(), n * units.per_outer());
    }
}

// The statistics of the sets, one a lane of each: repeated once, and not for every tile.
template <class T>
class LaneStatistics {
  public:
    explicit LaneStatistics(const Plan& plan)
        : merge_(plan.merge.extent),
          storage_(plan.sets * merge_ * SetStatistics<T>::kArrays),
          lanes_(storage_.get(), plan.sets * merge_) {}
    void put(index_t set, const Statistic& statistic) { lanes_.put(set * merge_, statistic, merge_); }
    // As SetStatistics.
    void put(index_t first, index_t n, const double* mean, const double* rstd, index_t step) {
        if (merge_ == 1) return lanes_.put(first, n, mean, rstd, step);
        for (index_t i = 0; i < n; ++i) put(first + i, Statistic{mean ? mean[i * step] : 0, 0, rstd[i * step]});
    }
    void put_given(const Plan& plan, const double* mean, const double* rstd) {
        for (index_t outer = 0; outer < plan.kept.size(); ++outer) {
            put_given(plan, mean, rstd, {outer, 0, plan.lane.extent, plan.lane.extent * merge_});
        }
    }
    void put_given(const Plan& plan, const double* mean, const double* rstd, const Unit& u) {
        const index_t step = plan.lane.stride[kStatistic];
        const index_t at = plan.kept.offset(kStatistic, u.outer) + u.first_set * step;
        put(u.outer * plan.lane.extent + u.first_set, u.sets, mean ? mean + at : nullptr, rstd + at, step);
    }
    void put_sums(index_t set, double mean_g, double mean_g_xhat) {
        lanes_.put_sums(set * merge_, mean_g, mean_g_xhat, merge_);
    }
    TileStatistics<T> of(index_t first_set, index_t lanes) const { return from(first_set * merge_, lanes); }
    TileStatistics<T> from(index_t lane, index_t lanes) const { return lanes_.tile(lane, 0, 1, lanes); }

  private:
    const index_t merge_;
    const Buffer<T> storage_;
    SetStatistics<T> lanes_;
};

// Rows [first, first + n) of one operand of a unit as one strided tile, if memory holds them so.
bool uniform(const Nest& runs, index_t first, index_t n) {
    return runs.n == 1 || first % runs.inner().extent + n <= runs.inner().extent;
}

// The same where it does not, packed: as elements E, those of the operand, or converted.
template <class E>
Strided gather_rows(const Isa& isa, const char* p, Dtype dtype, Nest runs, Operand o, index_t lane_stride,
                    index_t first, index_t rows, index_t lanes, E* out) {
    Axis lane;
    lane.extent = lanes;
    lane.stride[o] = lane_stride;
    runs.push(lane);
    gather(isa, runs, o, p, dtype, first * lanes, rows * lanes, out);
    return packed_tile(out, lanes);
}

// ------------------------------------------------------------------------------------------------------------ forward

template <class X>
class ColumnsForward {
    using T = Compute<X>;

  public:
    ColumnsForward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule)
        : plan_(plan),
          call_(call),
          k_(kernels),
          schedule_(schedule),
          units_(plan, schedule, kOperandsForward),
          blocks_(plan.runs.size(), kLeastBlock, kLeafRows),
          runs_x_(collapse(plan.runs, bit(kX))),
          set_(plan.runs),
          statistics_(plan) {
        set_.push(plan.merge);
    }

    void run() {
        const Tiles all_rows = units_.rows(kOperandsForward, 0);
        if (call_.given) {
            statistics_.put_given(plan_, call_.mean, call_.rstd);
        } else if (schedule_.resident) {
            parallel_for(units_.count(), schedule_.threads, [&](index_t i) {
                const Unit u = units_[i];
                double mean[kMostLanes], M2[kMostLanes], block_mean[kMostLanes], block_M2[kMostLanes];
                moments(u, 0, mean, M2);
                for (index_t b = 1; b < blocks_.count(); ++b) {
                    moments(u, b, block_mean, block_M2);
                    merge(u, b, mean, M2, block_mean, block_M2);
                }
                finish(u, mean, M2);
                if (!call_.y) return;
                for (index_t t = 0; t < all_rows.count(); ++t) apply_tile(u, all_rows, t);
            });
            return;
        }
        const index_t rows = rows_of_piece(plan_, schedule_, units_.most_lanes(), sizeof(X));
        const Tiles tiles = units_.rows(kOperandsForward, rows);
        for_samples(plan_, units_, schedule_, [&](index_t first, index_t n) {
            if (!call_.given) sweep_moments(first, n);
            if (!call_.y) return;
            // Row by row of tiles, so that whole rows are written; backwards, because what was read last is still in
            // the last-level cache.
            parallel_for(n * tiles.count(), schedule_.threads, Order::backwards, [&](index_t i) {
                const Part here = part_of(units_, tiles.count(), i);
                apply_tile(units_[first + here.unit], tiles, here.rows);
            });
        });
    }

  private:
    // Of n units from `first` on.
    void sweep_moments(index_t first, index_t n) {
        const index_t most = units_.most_lanes(), blocks = blocks_.count();
        const Buffer<double> parts(2 * n * blocks * most);
        const auto part = [&](index_t unit, index_t block) { return &parts[2 * (unit * blocks + block) * most]; };
        parallel_for(n * blocks, schedule_.threads, [&](index_t i) {
            const Part here = part_of(units_, blocks, i);
            double* mean = part(here.unit, here.rows);
            moments(units_[first + here.unit], here.rows, mean, mean + most);
        });
        parallel_for(n, schedule_.threads, [&](index_t i) {
            const Unit u = units_[first + i];
            double* mean = part(i, 0);
            for (index_t b = 1; b < blocks; ++b) merge(u, b, mean, mean + most, part(i, b), part(i, b) + most);
            finish(u, mean, mean + most);
        });
    }

    // Moments of each lane over one block of rows.
    void moments(const Unit& u, index_t block, double* mean, double* M2) const {
        for (index_t l = 0; l < u.lanes; ++l) mean[l] = M2[l] = 0;
        const char* p = call_.x + units_.at(u)[kX];
        T origin[kMostLanes];
        if (kDtype<X> == Dtype::float64) {
            for (index_t l = 0; l < u.lanes; ++l) {
                origin[l] = origin_of<X>(p + l / plan_.merge.extent * plan_.lane.stride[kX], plan_.center);
            }
        }
        const index_t lane = units_.lane_stride(kX), first = blocks_.first(block), rows = blocks_.size(block);
        if (uniform(runs_x_, first, rows)) {
            Strided x{p + runs_x_.offset(kX, first), runs_x_.inner().stride[kX], lane, call_.dtype};
            for (index_t r = 0; r < rows && !gives_up(); r += kRowsBetweenQuestions) {
                const index_t n = rows - r < kRowsBetweenQuestions ? rows - r : kRowsBetweenQuestions;
                moments_down(k_, x, origin, n, u.lanes, r, plan_.center, schedule_.far, mean, M2);
                x.p += n * x.row;
            }
            return;
        }
        X buffer[kLeafRows * kGatherLanes];
        for (index_t r = 0; r < rows && !gives_up(); r += kLeafRows) {
            const index_t n = rows - r < kLeafRows ? rows - r : kLeafRows;
            for (index_t l = 0; l < u.lanes; l += kGatherLanes) {
                const index_t lanes = u.lanes - l < kGatherLanes ? u.lanes - l : kGatherLanes;
                const Strided x =
                    gather_rows(k_.isa, p + l * lane, call_.dtype, runs_x_, kX, lane, first + r, n, lanes, buffer);
                moments_down(k_, x, origin + l, n, lanes, r, plan_.center, false, mean + l, M2 + l);
            }
        }
    }

    // Moments::merge of block b into all before it, lane by lane.
    void merge(const Unit& u, index_t b, double* mean, double* M2, const double* block_mean,
               const double* block_M2) const {
        const double seen = static_cast<double>(blocks_.first(b)), count = static_cast<double>(blocks_.size(b));
        for (index_t l = 0; l < u.lanes; ++l) {
            Moments m{seen, mean[l], M2[l]};
            m.merge({count, block_mean[l], block_M2[l]});
            mean[l] = m.mean;
            M2[l] = m.M2;
        }
    }

    // Merges the lanes of each set, in place, and turns its moments into statistics.
    void finish(const Unit& u, double* mean, double* M2) {
        const Offsets at = units_.at(u);
        const index_t lanes = plan_.merge.extent;
        const double rows = static_cast<double>(blocks_.rows);
        if (lanes > 1) {
            index_t i = 0;
            for (; u.sets - i >= kMergedAtOnce; i += kMergedAtOnce) merge_lanes<kMergedAtOnce>(rows, i, mean, M2);
            for (; i < u.sets; ++i) merge_lanes<1>(rows, i, mean, M2);
        }
        finish_sets<X>(call_, set_, call_.x + at[kX], plan_.lane.stride[kX], plan_.center,
                       rows * static_cast<double>(lanes), mean, M2, u.sets, at[kStatistic],
                       plan_.lane.stride[kStatistic], statistics_, units_.set(u));
    }

    // Moments::merge of the lanes of N sets from `first` on, each of `count` elements, all at once: the divisions of
    // one after the other cost more than the rows. Several sets, because an addition waits for the one before. To entry
    // i of set i: there, all have been read.
    static constexpr int kMergedAtOnce = 4;
    template <int N>
    void merge_lanes(double count, index_t first, double* mean, double* M2) const {
        const index_t lanes = plan_.merge.extent;
        const double *const means = mean + first * lanes, *const M2s = M2 + first * lanes;
        double all_mean[N], all_M2[N], between[N] = {};
        for (int k = 0; k < N; ++k) {
            all_mean[k] = means[k * lanes];
            all_M2[k] = M2s[k * lanes];
        }
        for (index_t j = 1; j < lanes; ++j) {
            for (int k = 0; k < N; ++k) all_mean[k] += means[k * lanes + j];
            for (int k = 0; k < N; ++k) all_M2[k] += M2s[k * lanes + j];
        }
        for (int k = 0; k < N; ++k) all_mean[k] /= static_cast<double>(lanes);
        for (index_t j = 0; j < lanes; ++j) {
            for (int k = 0; k < N; ++k) {
                const double delta = means[k * lanes + j] - all_mean[k];
                between[k] += delta * delta;
            }
        }
        for (int k = 0; k < N; ++k) {
            mean[first + k] = all_mean[k];
            M2[first + k] = all_M2[k] + count * between[k];
        }
    }

    void apply_tile(const Unit& u, const Tiles& tiles, index_t t) const {
        const TileStatistics<T> s = statistics_.of(units_.set(u), u.lanes);
        const Tiles::Tile tile = tiles[t];
        const Offsets at = units_.at(u) + tile.at;
        apply(k_, operand(call_.x, call_.dtype, at, tiles, kX), operand(call_.y, call_.dtype, at, tiles, kY),
              parameter(call_.weight, call_.weight_dtype, at, tiles, kWeight, one<T>()),
              parameter(call_.bias, call_.bias_dtype, at, tiles, kBias, zero<T>()), s, tile.rows, u.lanes,
              schedule_.stream);
    }

    const Plan& plan_;
    const ForwardCall& call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Units units_;
    const RowBlocks blocks_;
    const Nest runs_x_;
    Nest set_;
    LaneStatistics<T> statistics_;
};

// ----------------------------------------------------------------------------------------------------------- backward

template <class X>
class ColumnsBackward {
    using T = Compute<X>;

  public:
    ColumnsBackward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule)
        : plan_(plan),
          call_(call),
          k_(kernels),
          schedule_(schedule),
          units_(plan, schedule, kOperandsBackward),
          blocks_(plan.runs.size(), kLeastBlock, kSumRows),
          runs_(collapse(plan.runs, bit(kX) | bit(kDy) | bit(kWeight))),
          statistics_(plan),
          parameters_(zeroed_sums(call)) {
        for (int i = 0; i < plan.runs.n; ++i) {
            rows_share_parameters_ = rows_share_parameters_ && plan.runs.axis[i].stride[kGradient] == 0;
        }
    }

    void run() {
        const bool wants_set_sums = call_.dx && !call_.constant_statistics;
        const bool wants_cells = call_.parameters && rows_share_parameters_;
        const index_t n = units_.count(), most = units_.most_lanes(), blocks = blocks_.count();
        const Tiles all_rows = units_.rows(kOperandsBackward, 0);
        const bool sums = wants_set_sums || wants_cells;
        const bool resident = schedule_.resident;
        const Buffer<double> parts(sums ? 2 * n * (resident ? 1 : blocks) * most : 0);
        const auto part = [&](index_t unit, index_t block) {
            return &parts[2 * (unit * (resident ? 1 : blocks) + block) * most];
        };
        const bool across = call_.parameters && !rows_share_parameters_;
        if (across || !resident) statistics_.put_given(plan_, call_.mean, call_.rstd);
        // Before dx, which may take the place of x or dy.
        if (across) sum_across();

        if (resident) {
            parallel_for(n, schedule_.threads, [&](index_t i) {
                const Unit u = units_[i];
                // By the thread that reads them: group norm 2 x 2560 x 8^2 on two threads 1.05 times as fast.
                if (!across) statistics_.put_given(plan_, call_.mean, call_.rstd, u);
                if (sums) {
                    double* total = part(i, 0);
                    double block_sums[2 * kMostLanes];
                    sum_block(u, 0, total, total + most);
                    for (index_t b = 1; b < blocks; ++b) {
                        sum_block(u, b, block_sums, block_sums + most);
                        add(u, total, block_sums, most);
                    }
                    if (wants_set_sums) finish(u, total, total + most);
                }
                if (!call_.dx) return;
                for (index_t t = 0; t < all_rows.count(); ++t) dx_tile(u, all_rows, t);
            });
        } else {
            const index_t rows = rows_of_piece(plan_, schedule_, most, 2 * sizeof(X));
            const Tiles tiles = units_.rows(kOperandsBackward, rows);
            for_samples(plan_, units_, schedule_, [&](index_t first, index_t some) {
                if (sums) {
                    parallel_for(some * blocks, schedule_.threads, [&](index_t i) {
                        const Part here = part_of(units_, blocks, i);
                        double* to = part(first + here.unit, here.rows);
                        sum_block(units_[first + here.unit], here.rows, to, to + most);
                    });
                    for (index_t i = first; i < first + some; ++i) {
                        for (index_t b = 1; b < blocks; ++b) add(units_[i], part(i, 0), part(i, b), most);
                        if (wants_set_sums) finish(units_[i], part(i, 0), part(i, 0) + most);
                    }
                }
                if (!call_.dx) return;
                parallel_for(some * tiles.count(), schedule_.threads, Order::backwards, [&](index_t i) {
                    const Part here = part_of(units_, tiles.count(), i);  // as in the forward pass
                    dx_tile(units_[first + here.unit], tiles, here.rows);
                });
            });
        }
        if (!wants_cells) return;
        for (index_t i = 0; i < n; ++i) {
            const Unit u = units_[i];
            const double *g = part(i, 0), *g_xhat = g + most;
            for (index_t set = 0, first = units_.at(u)[kGradient]; set < u.sets; ++set) {
                index_t at = first + set * plan_.lane.stride[kGradient];
                for (index_t j = 0; j < plan_.merge.extent; ++j, at += plan_.merge.stride[kGradient]) {
                    parameters_[at] += {*g++, *g_xhat++};
                }
            }
        }
        write_parameters(call_, 0, 1, call_.parameters, parameters_.get());
    }

  private:
    static void add(const Unit& u, double* total, const double* more, index_t most) {
        for (index_t l = 0; l < u.lanes; ++l) {
            total[l] += more[l];
            total[most + l] += more[most + l];
        }
    }

    // Each lane's sums over one block of rows: of dy where the rows share their parameters (their weight comes later),
    // else of g = w * dy.
    void sum_block(const Unit& u, index_t block, double* sum_g, double* sum_g_xhat) const {
        for (index_t l = 0; l < u.lanes; ++l) sum_g[l] = sum_g_xhat[l] = 0;
        const TileStatistics<T> s = statistics_.of(units_.set(u), u.lanes);
        const Offsets at = units_.at(u);
        const index_t first = blocks_.first(block), last = first + blocks_.size(block);
        if (uniform(runs_, first, last - first)) {
            sum_rows(at, first, last - first, u.lanes, s, sum_g, sum_g_xhat);
            return;
        }
        index_t until_question = 0;
        for (index_t r = first; r < last; r += kSumRows) {
            if (--until_question < 0) {
                if (gives_up()) return;
                until_question = kRowsBetweenQuestions / kSumRows;
            }
            const index_t n = last - r < kSumRows ? last - r : kSumRows;
            if (uniform(runs_, r, n)) {
                sum_rows(at, r, n, u.lanes, s, sum_g, sum_g_xhat);
                continue;
            }
            X dy[kSumRows * kGatherLanes], x[kSumRows * kGatherLanes];
            T w[kSumRows * kGatherLanes];
            for (index_t l = 0; l < u.lanes; l += kGatherLanes) {
                const index_t lanes = u.lanes - l < kGatherLanes ? u.lanes - l : kGatherLanes;
                const auto tile = [&](const char* base, Dtype dtype, Operand k, auto* buffer) {
                    const index_t lane = units_.lane_stride(k);
                    return gather_rows(k_.isa, base + at[k] + l * lane, dtype, runs_, k, lane, r, n, lanes, buffer);
                };
                TileStatistics<T> shifted = s;
                for (const T** p : {&shifted.hi, &shifted.lo, &shifted.rstd, &shifted.scale}) {
                    if (*p) *p += l;
                }
                backward(k_, tile(call_.dy, call_.dtype, kDy, dy), tile(call_.x, call_.dtype, kX, x),
                         weighted() ? tile(call_.weight, call_.weight_dtype, kWeight, w) : one<T>(), Strided{}, shifted,
                         n, lanes, {sum_g + l, sum_g_xhat + l}, false);
            }
        }
    }

    bool weighted() const { return call_.weight && !rows_share_parameters_; }

    // The gradients where each row has parameters of its own: each over all lanes that share it, in the order of the
    // plan.
    void sum_across() {
        Nest index, summed;  // axes that tell parameters apart, and the others; kSet counts the lanes of statistics
        const auto add = [&](Axis a, index_t lanes) {
            a.stride[kSet] = lanes;
            (a.stride[kGradient] != 0 ? index : summed).push(a);
        };
        for (const Axis* a = plan_.kept.axis; a < plan_.kept.axis + plan_.kept.n; ++a) {
            add(*a, a->stride[kSet] * plan_.merge.extent);
        }
        for (const Axis* a = plan_.runs.axis; a < plan_.runs.axis + plan_.runs.n; ++a) add(*a, 0);
        add(plan_.lane, plan_.merge.extent);
        add(plan_.merge, 1);
        constexpr unsigned kVisited = bit(kX) | bit(kDy) | bit(kSet);
        index = collapse(index, kVisited | bit(kGradient));
        summed = collapse(summed, kVisited);
        const Axis &rows = index.inner(), &lanes = summed.inner();
        const Nest others = index.without_inner(), outer = summed.without_inner();

        // Kernels want the statistics of all rows alike, and those of lanes side by side.
        const index_t share = std::max(index_t{1}, index.size() / (8 * schedule_.threads));
        const index_t lanes_per = lanes.stride[kSet] == 1 ? std::min(kLeafLanes, lanes.extent) : 1;
        const index_t rows_per = rows.stride[kSet] == 0 ? std::min({share, rows.extent, kLongestPiece / lanes_per}) : 1;
        const index_t pieces = (rows.extent + rows_per - 1) / rows_per;
        const index_t leaves = (lanes.extent + lanes_per - 1) / lanes_per;
        const Buffer<Sums> sums(index.size());
        parallel_for(others.size() * pieces, schedule_.threads, [&](index_t i) {
            const index_t row = i % pieces * rows_per, n = std::min(rows_per, rows.extent - row);
            const Offsets first = others.offsets(i / pieces) + offsets(rows, row);
            Sums* const to = &sums[i / pieces * rows.extent + row];
            std::fill(to, to + n, Sums{});
            for (index_t j = 0; j < outer.size() * leaves && !gives_up(); ++j) {
                const index_t lane = j % leaves * lanes_per, some = std::min(lanes_per, lanes.extent - lane);
                const Offsets at = first + outer.offsets(j / leaves) + offsets(lanes, lane);
                sums_across(k_, {call_.dy + at[kDy], rows.stride[kDy], lanes.stride[kDy], call_.dtype},
                            {call_.x + at[kX], rows.stride[kX], lanes.stride[kX], call_.dtype},
                            statistics_.from(at[kSet], some), n, some, to);
            }
            write_parameters(call_, first[kGradient], rows.stride[kGradient], n, to);
        });
    }

    // `rows` rows that are evenly spaced.
    void sum_rows(const Offsets& at, index_t first, index_t rows, index_t lanes, const TileStatistics<T>& s,
                  double* sum_g, double* sum_g_xhat) const {
        const Offsets o = at + runs_.offsets(first);
        const auto tile = [&](const char* base, Dtype dtype, Operand k) {
            return Strided{base + o[k], runs_.inner().stride[k], units_.lane_stride(k), dtype};
        };
        Strided dy = tile(call_.dy, call_.dtype, kDy), x = tile(call_.x, call_.dtype, kX);
        Strided w = weighted() ? tile(call_.weight, call_.weight_dtype, kWeight) : one<T>();
        for (index_t r = 0; r < rows && !gives_up(); r += kRowsBetweenQuestions) {
            const index_t n = rows - r < kRowsBetweenQuestions ? rows - r : kRowsBetweenQuestions;
            backward(k_, dy, x, w, Strided{}, s, n, lanes, {sum_g, sum_g_xhat}, schedule_.far);
            for (Strided* operand : {&dy, &x, &w}) operand->p += n * operand->row;
        }
    }

    void finish(const Unit& u, const double* sum_g, const double* sum_g_xhat) {
        const char* const weight =
            call_.weight && rows_share_parameters_ ? call_.weight + units_.at(u)[kWeight] : nullptr;
        with_weights<T>(weight, call_.weight_dtype,
                        [&](auto weight_at) { finish_with(u, sum_g, sum_g_xhat, weight_at); });
    }

    template <class WeightAt>
    void finish_with(const Unit& u, const double* sum_g, const double* sum_g_xhat, WeightAt weight_at) {
        const double count = static_cast<double>(plan_.set_size);
        for (index_t i = 0; i < u.sets; ++i) {
            Sums sums;
            index_t at = i * plan_.lane.stride[kWeight];
            for (index_t j = 0; j < plan_.merge.extent; ++j, at += plan_.merge.stride[kWeight]) {
                const double w = weight_at(at);
                sums.g += w * *sum_g++;
                sums.g_xhat += w * *sum_g_xhat++;
            }
            statistics_.put_sums(units_.set(u) + i, plan_.center ? sums.g / count : 0, sums.g_xhat / count);
        }
    }

    void dx_tile(const Unit& u, const Tiles& tiles, index_t t) const {
        const TileStatistics<T> s = statistics_.of(units_.set(u), u.lanes);
        const Tiles::Tile tile = tiles[t];
        write_dx(k_, call_, units_.at(u) + tile.at, tiles, tile.rows, u.lanes, s, {}, schedule_.stream);
    }

    const Plan& plan_;
    const BackwardCall& call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Units units_;
    const RowBlocks blocks_;
    const Nest runs_;
    LaneStatistics<T> statistics_;
    const Buffer<Sums> parameters_;
    bool rows_share_parameters_ = true;
};

}  // namespace

template <class X>
void columns_forward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels,
                     const Schedule& schedule) {
    ColumnsForward<X>(plan, call, kernels, schedule).run();
}

template <class X>
void columns_backward(const Plan& plan, const BackwardCall& call, const KernelPair<X>& kernels,
                      const Schedule& schedule) {
    ColumnsBackward<X>(plan, call, kernels, schedule).run();
}

#define NORMKIT_INSTANTIATE(name, X, T)                                                                       \
    template void columns_forward<X>(const Plan&, const ForwardCall&, const KernelPair<X>&, const Schedule&); \
    template void columns_backward<X>(const Plan&, const BackwardCall&, const KernelPair<X>&, const Schedule&);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
