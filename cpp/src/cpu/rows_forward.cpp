// The rows walk, forward: moments set by set, then y; or those of one set beside the writing of another.

#include "beside.h"

namespace normkit::cpu {
namespace {

static_assert(kLeavesAtOnce >= kSetsAtOnce, "leaves of all sets at once");
// Given statistics: sets whose elements are written in the order of memory, however many times apart. Time with 64 over
// time with 512, batch norm 32 x 2048 x 7^2: 2.2, 32 x 1024 x 14^2: 1.2 (one thread of a Zen 4).
template <class T>
constexpr index_t kGivenAtOnce = 2048 / static_cast<index_t>(sizeof(T));
constexpr unsigned kForwardOperands = bit(kX) | bit(kY) | bit(kWeight) | bit(kBias);

template <class X>
class RowsForward {
    using T = Compute<X>;
    struct Batch;
    friend WritingSets<X, RowsForward, Batch>;  // tile_of

  public:
    RowsForward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule)
        : plan_(plan),
          weight_(plan, schedule, call.x, call.y, call.weight, call.weight_dtype, kWeight),
          bias_(plan, schedule, call.x, call.y, call.bias, call.bias_dtype, kBias),
          call_(with_parameters(call, weight_.get(), bias_.get())),
          k_(kernels),
          schedule_(schedule),
          leaves_(plan.runs.size(), plan.run.size()),
          read_x_(k_.isa, plan.runs, plan.run, kX, call.dtype),
          set_(joined(plan.runs, plan.run)),
          elements_(collapse(set_, kForwardOperands)),
          in_place_(read_x_.in_place(leaves_.rows)),
          tiles_(plan, elements_, sizeof(X), together(call, schedule), call.given ? kGivenAtOnce<T> : kSetsAtOnce),
          in_rows_(goes_in_rows()),
          stacked_(tiles_.stack({kX, kY, kWeight, kBias})),
          y_on_lines_(schedule.stream && rows_on_lines(plan, elements_, call.y)) {}

    void run() {
        if (schedule_.split || !schedule_.resident) return two_sweeps();
        if (schedule_.in_eights) return sets_in_eights();
        const SetPieces pieces(plan_, sizeof(X), schedule_, tiles_.at_once());
        parallel_for(pieces.count(), schedule_.threads,
                     [&](index_t i) { whole_sets(pieces.first(i), pieces.last(i)); });
    }

  private:
    static Together together(const ForwardCall& call, const Schedule& schedule) {
        return call.given ? Together::given : schedule.by_row ? Together::beside : Together::moments;
    }
    static ForwardCall with_parameters(ForwardCall call, const char* weight, const char* bias) {
        call.weight = weight;
        call.bias = bias;
        return call;
    }
    static Unwritten<X>* nothing() { return nullptr; }

    // Neighbouring sets whose moments are taken before they are written.
    struct Batch {
        Batch() {}  // leaves what it can uninitialized: small calls would notice

        index_t n = 0;
        Offsets at;  // of the first
        Room<Moments, kSetsAtOnce> moments;
        T storage[SetStatistics<T>::kArrays * kGivenAtOnce<T>];
        SetStatistics<T> statistics{storage, kGivenAtOnce<T>};
    };

    void whole_sets(index_t first, index_t last) const {
        if (!schedule_.by_row) return in_turn(first, last);
        return elements_.n == 1 ? rows_beside(first, last) : whole_sets_beside(first, last);
    }

    void in_turn(index_t first, index_t last) const {
        Batch batch;
        for (index_t set = first; set < last && !gives_up(); set += batch.n) {
            take(set, last, &batch);
            moments_of(&batch, 0, batch.n, nothing);
            finish(&batch, 0, batch.n);
            if (call_.y) write(batch);
        }
    }

    // Sets that are short rows: some of them, and then as many of each that lies inside.
    void sets_in_eights() const {
        const SetRows sets(plan_.kept);
        const bool follow = statistics_follow(plan_.kept, sets.along());
        const index_t inside = sets.inside.size(), extent = sets.along().extent;
        const index_t most = inside == 1 && follow ? kLongestPiece / plan_.set_size
                                                   : rows_at_once(inside * plan_.set_size * index_t{sizeof(X)});
        const SetPieces pieces(plan_, sizeof(X), schedule_, inside);
        parallel_for(pieces.count(), schedule_.threads, [&](index_t i) {
            index_t row = pieces.first(i) / inside;
            for (index_t end = pieces.last(i) / inside, n; row < end && !gives_up(); row += n) {
                n = std::min({end - row, extent - row % extent, most});
                const index_t whole = inside > 1 ? n - n % kEight : n;
                for (index_t k = 0; k < inside && !gives_up(); ++k) {
                    in_eights(sets.along(), follow, row * inside + k, whole);
                }
                if (whole < n) in_turn((row + whole) * inside, (row + n) * inside);
            }
        });
    }

    // n sets from `first` on along an axis, by a kernel that takes eight at a time. follow: their statistics follow
    // each other (else n <= kManyRows).
    void in_eights(const Axis& along, bool follow, index_t first, index_t n) const {
        const index_t every = along.stride[kSet];
        Tiles rows(elements_, 0);
        rows.rows = along;
        constexpr index_t kFarEnough = 8 * kEight;
        index_t in_turn_then = kEight / 2;
        double room[3][kManyRows];
        double* const all[3] = {call_.mean, call_.rstd, call_.M2};
        for (index_t done = 0; done < n;) {
            const index_t set = first + done * every;
            const Offsets at = plan_.kept.offsets(set);
            double* to[3];
            for (int a = 0; a < 3; ++a) {
                to[a] = !all[a] ? nullptr : follow ? all[a] + at[kStatistic] : room[a];
            }
            const index_t eights =
                forward_in_eights(k_, tile_at(at, rows, {Offsets{}, n - done, rows.lanes.extent}, {}), plan_.center,
                                  call_.eps, to[0], to[1], to[2]);
            if (!follow) {
                for_statistics(plan_.kept, set, every, eights, [&](index_t i, index_t some, index_t to, index_t step) {
                    for (int a = 0; a < 3; ++a) {
                        for (index_t k = 0; all[a] && k < some; ++k) all[a][to + k * step] = room[a][i + k];
                    }
                });
            }
            done += eights;
            // What the kernel leaves: less than eight, or eight of which some are not plain; where it does not get far,
            // since it begins anew each time, more and more.
            in_turn_then = eights >= kFarEnough ? index_t{kEight} : std::min(2 * in_turn_then, kSetsAtOnce);
            const index_t others = std::min(n - done, in_turn_then), next = first + done * every;
            if (every == 1 && others > 0) in_turn(next, next + others);
            for (index_t i = 0; every > 1 && i < others; ++i) in_turn(next + i * every, next + i * every + 1);
            done += others;
        }
    }

    // Sets that are one row each: the moments of a few beside the writing of the few before.
    void rows_beside(index_t first, index_t last) const {
        Tiles rows(elements_, 0);
        rows.rows = tiles_.next;
        const auto tile_of_batch = [&](const Batch& batch) {
            return tile_at(batch.at, rows, {Offsets{}, batch.n, rows.lanes.extent}, batch.statistics.tile(0, 1, 0, 0));
        };
        if (schedule_.in_parts) {
            WritingParts writing(k_);
            few_rows_beside(first, last, kWholeLeavesBeside, writing, [&](const Batch& batch, index_t r, index_t n) {
                writing.begin(tile_of_batch(batch), r, n, batch.statistics.tile(r, 1, 0, n).scale);
            });
        } else {
            WritingTile<X> writing(k_);
            const bool one_leaf = plan_.center && plan_.set_size == kLeafLanes;
            few_rows_beside(first, last, one_leaf ? kWholeLeavesBeside : kBesideBytes, writing,
                            [&](const Batch& batch, index_t r, index_t n) {
                                if (r == 0) writing.begin(tile_of_batch(batch));
                                writing.add(r, n, batch.statistics.tile(r, 1, 0, n).scale);
                            });
        }
    }

    // As many at a time as have so many bytes. begin(batch, r, n): n rows from r on are to be written.
    template <class W, class F>
    void few_rows_beside(index_t first, index_t last, index_t bytes, W& writing, F begin) const {
        const index_t row = plan_.set_size * index_t{sizeof(X)}, few = std::max(bytes / row, index_t{1});
        Batch batches[2];
        for (index_t set = first, i = 0; set < last && !gives_up(); i ^= 1) {
            Batch& batch = batches[i];
            take(set, last, &batch);
            for (index_t r = 0, n; r < batch.n; r += n) {
                n = std::min(few, batch.n - r);
                moments_of(&batch, r, n, [&] { return writing.tile(); });
                writing.rest();
                finish(&batch, r, n);
                begin(batch, r, n);
            }
            set += batch.n;
        }
        writing.rest();
    }

    // The moments of one batch beside the writing of the one before.
    void whole_sets_beside(index_t first, index_t last) const {
        Batch batches[2];
        WritingSets<X, RowsForward, Batch> writing(k_, tiles_, *this);
        for (index_t set = first, i = 0; set < last && !gives_up(); i ^= 1) {
            Batch& batch = batches[i];
            take(set, last, &batch);
            moments_of(&batch, 0, batch.n, [&] { return writing.tile(); });
            writing.rest();
            finish(&batch, 0, batch.n);
            if (batch.n > 1 && in_rows_) {
                write(batch);
            } else {
                writing.begin(&batch, batch.n);
            }
            set += batch.n;
        }
        writing.rest();
    }

    // Some rows of a tile, part by part of their lanes. Not in step: rms norm with rows of 4096 took 1.24 times as long
    // so.
    class WritingParts : public WritingTiles<X, WritingParts> {
      public:
        explicit WritingParts(const KernelPair<X>& kernels)
            : WritingTiles<X, WritingParts>(kernels, /*in_step=*/false) {}

        // Rows [first, first + n) of the tile; scale: as in WritingTile::add.
        void begin(const ApplyTo<X>& tile, index_t first, index_t n, const T* scale) {
            tile_ = tile;
            first_ = first;
            n_ = n;
            scale_ = scale;
            lane_ = 0;
            lanes_ = lanes_of_part(tile.lanes, kPartLanes);
            first_lanes_ = lanes_ + lanes_to_line(tile.y);
        }
        bool begin_next() {
            if (lane_ == tile_.lanes) return false;
            ApplyTo<X> part = tile_;
            for (Strided* o : {&part.x, &part.y, &part.w, &part.b}) {
                if (o->p) o->p += lane_ * o->lane;
            }
            part.lanes = std::min(lane_ == 0 ? first_lanes_ : lanes_, tile_.lanes - lane_);
            lane_ += part.lanes;
            this->now_.begin(part);
            this->now_.add(first_, n_, scale_);
            return true;
        }

      private:
        // So that parts end where lines do.
        static index_t lanes_to_line(const Strided& y) {
            const index_t past = static_cast<index_t>(reinterpret_cast<std::uintptr_t>(y.p) % kLine);
            if (past == 0 || y.row % kLine != 0 || y.lane != index_t{sizeof(X)} || past % y.lane != 0) return 0;
            return (kLine - past) / y.lane;
        }

        ApplyTo<X> tile_;
        index_t first_ = 0, n_ = 0, lane_ = 0, lanes_ = 0, first_lanes_ = 0;
        const T* scale_ = nullptr;
    };

    void take(index_t first, index_t last, Batch* batch) const {
        batch->n = tiles_.take(first, last);
        batch->at = plan_.kept.offsets(first);
    }

    // Of n sets of a batch, from number `first` on. beside(): what is to be written meanwhile, or null.
    template <class F>
    void moments_of(Batch* batch, index_t first, index_t n, F beside) const {
        if (call_.given) return;
        const index_t next = tiles_.next.stride[kX], leaves = leaves_.count();
        const char* const x = call_.x + batch->at[kX] + first * next;
        if (in_place_ && (leaves == 1 || (leaves_.rows > 1 && tiles_.interleaved()))) {
            // In the order of memory: leaf by leaf of all sets.
            const index_t at_once = std::max(kLeavesAtOnce / n, index_t{1}), row = read_x_.row();
            for (index_t l = 0; l < leaves; l += at_once) {
                Room<LeafSeries, kLeavesAtOnce> series;
                Room<Moments, kLeavesAtOnce> moments;
                const index_t taken = std::min(at_once, leaves - l);
                for (index_t k = 0; k < taken; ++k) {
                    const index_t run = (l + k) * leaves_.rows, rows = std::min(leaves_.rows, leaves_.runs - run);
                    series[k] = {{x + run * row, row}, {x, next}, rows, leaves_.run, next, n};
                }
                // What there is of a set that is one leaf goes where it belongs.
                Moments* const to = leaves == 1 ? &batch->moments[first] : moments.get();
                moments_along(k_, series.get(), taken, read_x_.lane(), plan_.center, schedule_.far, to, beside());
                for (index_t k = 0; leaves > 1 && k < taken * n; ++k) {
                    put(moments[k], l == 0 && k < n, &batch->moments[first + k % n]);
                }
            }
            return;
        }
        index_t leaf = 0, set = first;
        for_leaves(x, next, 0, n * leaves, beside, [&](const Moments& m) {
            put(m, leaf == 0, &batch->moments[set]);
            if (++leaf == leaves) leaf = 0, ++set;
        });
    }

    static void put(const Moments& leaf, bool is_first, Moments* set) {
        if (is_first) {
            *set = leaf;
        } else {
            set->merge(leaf);
        }
    }

    // f(moments) for leaves `from` to `to` of the sets that begin at x, `next` bytes apart, counted through all of
    // them. Many to a call of the kernel, which begins one before it ends another.
    template <class Beside, class F>
    void for_leaves(const char* x, index_t next, index_t from, index_t to, Beside beside, F f) const {
        X buffer[kLeafLanes];
        LeafWalk walk(leaves_, from, in_place_, read_x_.evenly());
        for (index_t left = to - from; left > 0;) {
            Room<LeafSeries, kLeavesAtOnce> series;
            Room<Moments, kLeavesAtOnce> moments;
            const index_t room = std::min(in_place_ ? kLeavesAtOnce : 1, left);
            index_t n = 0, taken = 0, lane = 0;
            for (; taken < room; ++n) {
                const LeafWalk::Some some = walk.take(room - taken);
                const char* const set = x + some.set * next;
                const Strided at = read_x_(set, some.leaf, buffer);
                series[n] = {{at.p, at.row}, {set, 0}, some.leaf.rows, some.leaf.lanes, leaves_.step(at.row, at.lane),
                             some.n};
                taken += some.n;
                lane = at.lane;
            }
            moments_along(k_, series.get(), n, lane, plan_.center, schedule_.far, moments.get(), beside());
            for (index_t i = 0; i < taken; ++i) f(moments[i]);
            left -= taken;
        }
    }

    void write(const Batch& batch) const {
        if (batch.n > 1 && (write_in_rows(batch) || write_stacked(batch))) return;
        const SetTiles::Of all(tiles_, batch.n);
        for (index_t i = 0; i < all.count() && !gives_up(); ++i) apply(k_, tile_of(batch, all, i));
    }

    bool goes_in_rows() const {
        const auto as_it_lies = [&](const char* base, Dtype dtype, Operand o) {
            const index_t lane = elements_.inner().stride[o];
            return !base || lane == 0 || (dtype == kDtype<T> && lane == index_t{sizeof(T)});
        };
        return as_it_lies(call_.weight, call_.weight_dtype, kWeight) &&
               as_it_lies(call_.bias, call_.bias_dtype, kBias) &&
               tiles_.template go_in_rows<T>({kX, kY}, {kWeight, kBias});
    }

    bool write_in_rows(const Batch& batch) const {
        if (!in_rows_ || batch.statistics.tile(0, 1, 0, batch.n).scale) return false;
        tiles_.template for_rows<T>(
            batch.n, batch.at, [&](const Tiles& rows, const Offsets& at, index_t first, index_t n) {
                const index_t extent = rows.lanes.extent;
                Repeated<T, 5> lanes(n, extent);
                ApplyTo<X> tile = tile_at(at, rows, {Offsets{}, rows.rows.extent, n * extent},
                                          lanes(batch.statistics.tile(first, 1, 0, n), false, 1));
                const auto repeat = [&](const char* base, Dtype dtype, Operand o, Strided* parameter) {
                    if (!base || parameter->lane != 0) return;
                    *parameter = lanes(k_.isa, base + at[o], tiles_.next.stride[o], dtype);
                };
                repeat(call_.weight, call_.weight_dtype, kWeight, &tile.w);
                repeat(call_.bias, call_.bias_dtype, kBias, &tile.b);
                apply(k_, tile);
            });
        return true;
    }

    bool write_stacked(const Batch& batch) const {
        if (!stacked_ || batch.statistics.tile(0, 1, 0, batch.n).scale) return false;
        tiles_.template for_stacks<T>(batch.n, batch.at,
                                      [&](const Tiles& rows, const Offsets& at, index_t first, index_t n) {
                                          Repeated<T, 3> of_rows(n, rows.rows.extent / n);
                                          apply(k_, tile_at(at, rows, {Offsets{}, rows.rows.extent, rows.lanes.extent},
                                                            of_rows(batch.statistics.tile(first, 1, 0, n), false, 0)));
                                      });
        return true;
    }

    // The statistics of n sets of a batch, from number `first` on.
    void finish(Batch* batch, index_t first, index_t n) const {
        const index_t step = tiles_.next.stride[kStatistic], statistic = batch->at[kStatistic] + first * step;
        if (call_.given) {
            batch->statistics.put(first, n, call_.mean + statistic, call_.rstd + statistic, step);
            return;
        }
        double mean[kSetsAtOnce], M2[kSetsAtOnce];
        for (index_t i = 0; i < n; ++i) {
            mean[i] = batch->moments[first + i].mean;
            M2[i] = batch->moments[first + i].M2;
        }
        const index_t next = tiles_.next.stride[kX];
        finish_sets<X>(call_, set_, call_.x + batch->at[kX] + first * next, next, plan_.center,
                       static_cast<double>(plan_.set_size), mean, M2, n, statistic, step, batch->statistics, first);
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
                Moments* out = &moments[set * leaves + first];
                for_leaves(x, 0, first, last, nothing, [&out](const Moments& m) { *out++ = m; });
            });
        }
        parallel_for(plan_.sets, schedule_.threads, [&](index_t set) {
            if (call_.given) {
                statistics.put(set, 1, call_.mean + statistic(set), call_.rstd + statistic(set), 1);
                return;
            }
            Moments m = moments[set * leaves];
            for (index_t l = 1; l < leaves; ++l) m.merge(moments[set * leaves + l]);
            const char* x = call_.x + plan_.kept.offset(kX, set);
            statistics.put(set, finish_set<X>(call_, set_, x, plan_.center, m, statistic(set)));
        });
        if (!call_.y) return;
        const Tiles tiles(elements_, elements_per_piece(plan_, schedule_));
        // Backwards: what was read last is still in the last-level cache.
        const index_t n = plan_.sets * tiles.count();
        parallel_for(n, schedule_.threads, Order::backwards, [&](index_t i) {
            const index_t set = i / tiles.count();
            apply(k_, tile_at(plan_.kept.offsets(set), tiles, tiles[i % tiles.count()], statistics.tile(set, 0, 0, 1)));
        });
    }

    index_t statistic(index_t set) const { return plan_.kept.offset(kStatistic, set); }

    ApplyTo<X> tile_of(const Batch& batch, const SetTiles::Of& all, index_t i) const {
        const SetTiles::Of::Tile t = all[i];
        return tile_at(batch.at + t.at, all.tiles(), t.tile, batch.statistics.tile(t.set, t.step, 0, t.sets()));
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
                schedule_.stream,
                schedule_.far,
                schedule_.beyond_l3,
                y_on_lines_};
    }

    const Plan& plan_;
    const LinedUp<X> weight_, bias_;
    const ForwardCall call_;
    const KernelPair<X>& k_;
    const Schedule schedule_;
    const Leaves leaves_;
    const LeafReader<X> read_x_;
    const Nest set_, elements_;
    const bool in_place_;  // kernels read x as it lies, leaf by leaf
    const SetTiles tiles_;
    const bool in_rows_, stacked_;  // how neighbouring sets are written
    const bool y_on_lines_;
};

}  // namespace

template <class X>
void rows_forward(const Plan& plan, const ForwardCall& call, const KernelPair<X>& kernels, const Schedule& schedule) {
    RowsForward<X>(plan, call, kernels, schedule).run();
}

#define NORMKIT_INSTANTIATE(name, X, T) \
    template void rows_forward<X>(const Plan&, const ForwardCall&, const KernelPair<X>&, const Schedule&);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
