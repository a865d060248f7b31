// The columns walk: neighbouring lanes belong to different sets (batch, instance, group in NHWC; layer over C in NCHW).
//
// Sums run down the rows, each lane on its own: in leaves of kLeafRows (moments) or kSumRows (backward), the leaves in
// blocks of rows, the blocks merged in order. Then the lanes of a set are merged (group norm: C/G neighbours).
// A unit of work is a block of neighbouring lanes, all of its rows (resident) or one block of them.

#include <cstring>

#include "walks.h"

namespace normkit::cpu {
namespace {

constexpr index_t kLeastBlock = 256;  // rows; a block's partial sums then cost little beside its elements
constexpr index_t kGatherLanes = 64;

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

    Offsets at(const Unit& u) const {
        Offsets o = plan_.kept.offsets(u.outer);
        for (int k = 0; k < kOperands; ++k) o.at[k] += u.first_set * plan_.lane.stride[k];
        return o;
    }
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

// Where the statistics of a set stand in the caller's arrays.
index_t statistic_of(const Plan& plan, index_t set) {
    return plan.kept.offset(kStatistic, set / plan.lane.extent) + set % plan.lane.extent * plan.lane.stride[kStatistic];
}

// The statistics of a unit's sets, repeated for the lanes of each.
template <class T>
TileStatistics<T> lane_statistics(const Plan& plan, const SetStatistics<T>& sets, index_t set, const Unit& u,
                                  T* storage) {
    if (plan.merge.extent == 1) return sets.tile(set, 0, 1, u.lanes);
    SetStatistics<T> lanes(storage, u.lanes);
    for (index_t l = 0; l < u.lanes; ++l) lanes.copy(l, sets, set + l / plan.merge.extent);
    return lanes.tile(0, 0, 1, u.lanes);
}

// Rows [first, first + n) of one operand of a unit as one strided tile, if memory holds them so.
bool uniform(const Nest& runs, index_t first, index_t n) {
    return runs.n == 1 || first % runs.inner().extent + n <= runs.inner().extent;
}

template <class T>
void gather_rows(const char* p, const Nest& runs, Operand o, index_t lane_stride, index_t first, index_t rows,
                 index_t lanes, T* out) {
    for (index_t r = 0; r < rows; ++r) {
        gather<T>({p + runs.offset(o, first + r), 0, lane_stride}, 1, lanes, out + r * lanes);
    }
}

template <class T>
using LaneStorage = T[SetStatistics<T>::kArrays * kMostLanes];

// ------------------------------------------------------------------------------------------------------------ forward

template <class T>
class ColumnsForward {
  public:
    ColumnsForward(const Plan& plan, const ForwardCall& call, const Kernels<T>& kernels, const Schedule& schedule)
        : plan_(plan),
          call_(call),
          k_(kernels),
          schedule_(schedule),
          units_(plan, schedule, kOperandsForward),
          blocks_(plan.runs.size(), kLeastBlock, kLeafRows),
          runs_x_(collapse(plan.runs, bit(kX))),
          set_(plan.runs),
          storage_(plan.sets * SetStatistics<T>::kArrays),
          statistics_(storage_.get(), plan.sets) {
        set_.push(plan.merge);
    }

    void run() {
        const Tiles all_rows = units_.rows(kOperandsForward, 0);
        if (call_.given) {
            for (index_t i = 0; i < plan_.sets; ++i) put_given(i);
        } else if (schedule_.resident) {
            parallel_for(units_.count(), schedule_.threads, [&](index_t i) {
                const Unit u = units_[i];
                double mean[kMostLanes], m2[kMostLanes], block_mean[kMostLanes], block_m2[kMostLanes];
                moments(u, 0, mean, m2);
                for (index_t b = 1; b < blocks_.count(); ++b) {
                    moments(u, b, block_mean, block_m2);
                    merge(u, b, mean, m2, block_mean, block_m2);
                }
                finish(u, mean, m2);
                if (!call_.y) return;
                for (index_t t = 0; t < all_rows.count(); ++t) apply_tile(u, all_rows, t);
            });
            return;
        } else {
            sweep_moments();
        }
        if (!call_.y) return;
        const index_t rows_per = kPieceBytes / (units_.most_lanes() * static_cast<index_t>(sizeof(T)));
        const Tiles tiles = units_.rows(kOperandsForward, rows_per < 1 ? 1 : rows_per);
        // Row by row of tiles, so that whole rows are written; backwards, because what was read last is still in the
        // last-level cache.
        const index_t n = units_.count() * tiles.count();
        parallel_for(n, schedule_.threads, [&](index_t back) {
            const Part here = part_of(units_, tiles.count(), n - 1 - back);
            apply_tile(units_[here.unit], tiles, here.rows);
        });
    }

  private:
    void sweep_moments() {
        const index_t n = units_.count(), most = units_.most_lanes(), blocks = blocks_.count();
        const Buffer<double> parts(2 * n * blocks * most);
        const auto part = [&](index_t unit, index_t block) { return &parts[2 * (unit * blocks + block) * most]; };
        parallel_for(n * blocks, schedule_.threads, [&](index_t i) {
            const Part here = part_of(units_, blocks, i);
            double* mean = part(here.unit, here.rows);
            moments(units_[here.unit], here.rows, mean, mean + most);
        });
        parallel_for(n, schedule_.threads, [&](index_t i) {
            const Unit u = units_[i];
            double* mean = part(i, 0);
            for (index_t b = 1; b < blocks; ++b) merge(u, b, mean, mean + most, part(i, b), part(i, b) + most);
            finish(u, mean, mean + most);
        });
    }

    // Moments of each lane over one block of rows.
    void moments(const Unit& u, index_t block, double* mean, double* m2) const {
        for (index_t l = 0; l < u.lanes; ++l) mean[l] = m2[l] = 0;
        const char* p = call_.x + units_.at(u)[kX];
        const index_t lane = units_.lane_stride(kX), first = blocks_.first(block), rows = blocks_.size(block);
        if (uniform(runs_x_, first, rows)) {
            moments_down(k_, {p + runs_x_.offset(kX, first), runs_x_.inner().stride[kX], lane}, rows, u.lanes, 0,
                         plan_.center, mean, m2);
            return;
        }
        T buffer[kLeafRows * kGatherLanes];
        for (index_t r = 0; r < rows; r += kLeafRows) {
            const index_t n = rows - r < kLeafRows ? rows - r : kLeafRows;
            for (index_t l = 0; l < u.lanes; l += kGatherLanes) {
                const index_t lanes = u.lanes - l < kGatherLanes ? u.lanes - l : kGatherLanes;
                gather_rows(p + l * lane, runs_x_, kX, lane, first + r, n, lanes, buffer);
                moments_down<T>(k_, {reinterpret_cast<const char*>(buffer), lanes * index_t{sizeof(T)}, sizeof(T)}, n,
                                lanes, r, plan_.center, mean + l, m2 + l);
            }
        }
    }

    // Moments::merge of block b into all before it, lane by lane.
    void merge(const Unit& u, index_t b, double* mean, double* m2, const double* block_mean,
               const double* block_m2) const {
        const double seen = static_cast<double>(blocks_.first(b)), count = static_cast<double>(blocks_.size(b));
        for (index_t l = 0; l < u.lanes; ++l) {
            Moments m{seen, mean[l], m2[l]};
            m.merge({count, block_mean[l], block_m2[l]});
            mean[l] = m.mean;
            m2[l] = m.m2;
        }
    }

    // Merges the lanes of each set and turns its moments into statistics.
    void finish(const Unit& u, const double* mean, const double* m2) {
        const Offsets at = units_.at(u);
        const double count = static_cast<double>(blocks_.rows);
        for (index_t i = 0; i < u.sets; ++i) {
            const index_t first = i * plan_.merge.extent;
            Moments m = merged(count, mean + first, m2 + first);
            if (is_doubtful(m, call_.eps)) {
                m = moments_in_double<T>(set_, call_.x + at[kX] + i * plan_.lane.stride[kX], plan_.center);
            }
            const double rstd = rstd_of(m, call_.eps);
            write_statistics(call_, at[kStatistic] + i * plan_.lane.stride[kStatistic], m, rstd);
            statistics_.put(units_.set(u) + i, m.mean, rstd);
        }
    }

    // Moments::merge of lanes of equal counts, all at once: the divisions of one after the other cost more than the
    // rows.
    Moments merged(double count, const double* mean, const double* m2) const {
        const index_t lanes = plan_.merge.extent;
        Moments m{count * static_cast<double>(lanes), mean[0], m2[0]};
        if (lanes == 1) return m;
        for (index_t j = 1; j < lanes; ++j) {
            m.mean += mean[j];
            m.m2 += m2[j];
        }
        m.mean /= static_cast<double>(lanes);
        double between = 0;
        for (index_t j = 0; j < lanes; ++j) between += (mean[j] - m.mean) * (mean[j] - m.mean);
        m.m2 += count * between;
        return m;
    }

    void put_given(index_t set) {
        const index_t i = statistic_of(plan_, set);
        statistics_.put(set, call_.mean[i], call_.rstd[i]);
    }

    void apply_tile(const Unit& u, const Tiles& tiles, index_t t) const {
        LaneStorage<T> storage;
        const TileStatistics<T> s = lane_statistics(plan_, statistics_, units_.set(u), u, storage);
        const Tiles::Tile tile = tiles[t];
        const Offsets at = units_.at(u) + tile.at;
        apply(k_.apply_down, operand(call_.x, at, tiles, kX), operand(call_.y, at, tiles, kY),
              call_.weight ? operand(call_.weight, at, tiles, kWeight) : one<T>(),
              call_.bias ? operand(call_.bias, at, tiles, kBias) : zero<T>(), s, tile.rows, u.lanes, schedule_.stream);
    }

    const Plan& plan_;
    const ForwardCall& call_;
    const Kernels<T>& k_;
    const Schedule schedule_;
    const Units units_;
    const RowBlocks blocks_;
    const Nest runs_x_;
    Nest set_;
    const Buffer<T> storage_;
    SetStatistics<T> statistics_;
};

// ----------------------------------------------------------------------------------------------------------- backward

template <class T>
class ColumnsBackward {
  public:
    ColumnsBackward(const Plan& plan, const BackwardCall& call, const Kernels<T>& kernels, const Schedule& schedule)
        : plan_(plan),
          call_(call),
          k_(kernels),
          schedule_(schedule),
          units_(plan, schedule, kOperandsBackward),
          blocks_(plan.runs.size(), kLeastBlock, kSumRows),
          runs_(collapse(plan.runs, bit(kX) | bit(kDy) | bit(kWeight))),
          storage_(plan.sets * SetStatistics<T>::kArrays),
          statistics_(storage_.get(), plan.sets),
          parameters_(zeroed_sums(call)) {
        for (int i = 0; i < plan.runs.n; ++i) {
            rows_share_parameters_ = rows_share_parameters_ && plan.runs.axis[i].stride[kGradient] == 0;
        }
    }

    void run() {
        for (index_t i = 0; i < plan_.sets; ++i) {
            const index_t from = statistic_of(plan_, i);
            statistics_.put(i, call_.mean ? call_.mean[from] : 0, call_.rstd[from]);
        }
        const bool wants_set_sums = call_.dx && !call_.constant_statistics;
        const bool wants_cells = call_.parameters && rows_share_parameters_;
        const Tiles all_rows = units_.rows(kOperandsBackward, 0);
        const index_t n = units_.count(), most = units_.most_lanes(), blocks = blocks_.count();
        const bool sums = wants_set_sums || wants_cells;
        const bool resident = schedule_.resident;
        const Buffer<double> parts(sums ? 2 * n * (resident ? 1 : blocks) * most : 0);
        const auto part = [&](index_t unit, index_t block) {
            return &parts[2 * (unit * (resident ? 1 : blocks) + block) * most];
        };
        // Before dx, which may take the place of x or dy.
        if (call_.parameters && !rows_share_parameters_) sum_parameters<T>(plan_, call_, schedule_.threads);

        if (resident) {
            parallel_for(n, schedule_.threads, [&](index_t i) {
                const Unit u = units_[i];
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
            if (sums) {
                parallel_for(n * blocks, schedule_.threads, [&](index_t i) {
                    const Part here = part_of(units_, blocks, i);
                    double* to = part(here.unit, here.rows);
                    sum_block(units_[here.unit], here.rows, to, to + most);
                });
                for (index_t i = 0; i < n; ++i) {
                    for (index_t b = 1; b < blocks; ++b) add(units_[i], part(i, 0), part(i, b), most);
                    if (wants_set_sums) finish(units_[i], part(i, 0), part(i, 0) + most);
                }
            }
            if (call_.dx) {
                const index_t rows_per = kPieceBytes / (2 * most * static_cast<index_t>(sizeof(T)));
                const Tiles tiles = units_.rows(kOperandsBackward, rows_per < 1 ? 1 : rows_per);
                const index_t all = n * tiles.count();
                parallel_for(all, schedule_.threads, [&](index_t back) {  // backwards, as in the forward pass
                    const Part here = part_of(units_, tiles.count(), all - 1 - back);
                    dx_tile(units_[here.unit], tiles, here.rows);
                });
            }
        }
        if (!wants_cells) return;
        for (index_t i = 0; i < n; ++i) {
            const Unit u = units_[i];
            const index_t at = units_.at(u)[kGradient];
            for (index_t l = 0; l < u.lanes; ++l) {
                const index_t p = at + l / plan_.merge.extent * plan_.lane.stride[kGradient] +
                                  l % plan_.merge.extent * plan_.merge.stride[kGradient];
                parameters_[p] += {part(i, 0)[l], part(i, 0)[most + l]};
            }
        }
        write_parameters(call_, parameters_.get());
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
        LaneStorage<T> storage;
        const TileStatistics<T> s = lane_statistics(plan_, statistics_, units_.set(u), u, storage);
        const Offsets at = units_.at(u);
        const bool weighted = call_.weight && !rows_share_parameters_;
        const index_t last = blocks_.first(block) + blocks_.size(block);
        for (index_t r = blocks_.first(block); r < last; r += kSumRows) {
            const index_t n = last - r < kSumRows ? last - r : kSumRows;
            if (uniform(runs_, r, n)) {
                const Offsets o = at + runs_.offsets(r);
                const auto tile = [&](const char* base, Operand k) {
                    return Strided{base + o[k], runs_.inner().stride[k], units_.lane_stride(k)};
                };
                backward(k_, tile(call_.dy, kDy), tile(call_.x, kX), weighted ? tile(call_.weight, kWeight) : one<T>(),
                         Strided{}, s, n, u.lanes, sum_g, sum_g_xhat, false);
                continue;
            }
            T dy[kSumRows * kGatherLanes], x[kSumRows * kGatherLanes], w[kSumRows * kGatherLanes];
            for (index_t l = 0; l < u.lanes; l += kGatherLanes) {
                const index_t lanes = u.lanes - l < kGatherLanes ? u.lanes - l : kGatherLanes;
                const auto tile = [&](const char* base, Operand k, T* buffer) {
                    const index_t lane = units_.lane_stride(k);
                    gather_rows(base + at[k] + l * lane, runs_, k, lane, r, n, lanes, buffer);
                    return Strided{reinterpret_cast<const char*>(buffer), lanes * index_t{sizeof(T)}, sizeof(T)};
                };
                TileStatistics<T> shifted = s;
                for (const T** p : {&shifted.hi, &shifted.lo, &shifted.rstd, &shifted.scale}) {
                    if (*p) *p += l;
                }
                backward(k_, tile(call_.dy, kDy, dy), tile(call_.x, kX, x),
                         weighted ? tile(call_.weight, kWeight, w) : one<T>(), Strided{}, shifted, n, lanes, sum_g + l,
                         sum_g_xhat + l, false);
            }
        }
    }

    void finish(const Unit& u, const double* sum_g, const double* sum_g_xhat) {
        const Offsets at = units_.at(u);
        const double count = static_cast<double>(plan_.set_size);
        for (index_t i = 0; i < u.sets; ++i) {
            Sums sums;
            for (index_t j = 0; j < plan_.merge.extent; ++j) {
                const index_t l = i * plan_.merge.extent + j;
                double w = 1;
                if (call_.weight && rows_share_parameters_) {
                    T value;
                    std::memcpy(
                        &value,
                        call_.weight + at[kWeight] + i * plan_.lane.stride[kWeight] + j * plan_.merge.stride[kWeight],
                        sizeof value);
                    w = value;
                }
                sums.g += w * sum_g[l];
                sums.g_xhat += w * sum_g_xhat[l];
            }
            statistics_.put_sums(units_.set(u) + i, plan_.center ? sums.g / count : 0, sums.g_xhat / count);
        }
    }

    void dx_tile(const Unit& u, const Tiles& tiles, index_t t) const {
        LaneStorage<T> storage;
        const TileStatistics<T> s = lane_statistics(plan_, statistics_, units_.set(u), u, storage);
        const Tiles::Tile tile = tiles[t];
        write_dx(k_, call_, units_.at(u) + tile.at, tiles, tile.rows, u.lanes, s, nullptr, nullptr, schedule_.stream);
    }

    const Plan& plan_;
    const BackwardCall& call_;
    const Kernels<T>& k_;
    const Schedule schedule_;
    const Units units_;
    const RowBlocks blocks_;
    const Nest runs_;
    const Buffer<T> storage_;
    SetStatistics<T> statistics_;
    const Buffer<Sums> parameters_;
    bool rows_share_parameters_ = true;
};

}  // namespace

template <class T>
void columns_forward(const Plan& plan, const ForwardCall& call, const Kernels<T>& kernels, const Schedule& schedule) {
    ColumnsForward<T>(plan, call, kernels, schedule).run();
}

template <class T>
void columns_backward(const Plan& plan, const BackwardCall& call, const Kernels<T>& kernels, const Schedule& schedule) {
    ColumnsBackward<T>(plan, call, kernels, schedule).run();
}

template void columns_forward<float>(const Plan&, const ForwardCall&, const Kernels<float>&, const Schedule&);
template void columns_backward<float>(const Plan&, const BackwardCall&, const Kernels<float>&, const Schedule&);

}  // namespace normkit::cpu
