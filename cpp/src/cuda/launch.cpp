#include "launch.h"

#include <algorithm>
#include <cstdint>

namespace normkit::cuda {
namespace {

constexpr index_t kMostGrid = INT32_MAX;
constexpr int kAloneWarps = 4;         // of a block in which every warp has sets of its own
constexpr index_t kLeastCell = 16;     // elements; with fewer to a warp the weights go into the sums
constexpr index_t kMostTeamSets = 64;  // a gradient by element adds so many numbers in the type of arithmetic

index_t up(index_t n, index_t by) { return (n + by - 1) / by; }
index_t limited(index_t grid) { return std::min(std::max<index_t>(grid, 1), kMostGrid); }

void push(const Axis& a, int* n, Line* lines) {
    lines[*n].extent = Division(a.extent);
    for (int o = 0; o < kOperands; ++o) lines[*n].stride[o] = a.stride[o];
    ++*n;
}

Nest joined(const Nest& outer, const Nest& inner) {
    Nest all = outer;
    for (int i = 0; i < inner.n; ++i) all.push(inner.axis[i]);
    return all;
}

// What forward and backward have in common.
class Planner {
  public:
    Planner(const Plan& plan, Dtype dtype, const Device& device, Launches* out)
        : plan_(plan), device_(device), out_(*out), w_(out->work), dtype_(dtype) {
        out_.count = 0;
        out_.workspace = 0;
        out_.dtype = dtype;
        out_.shared_bytes = device.shared_bytes;
        w_ = Work{};
        w_.center = plan.center;
        w_.sets = plan.sets;
        w_.set_size = plan.set_size;
        w_.sets_per_team = 1;
        size_ = size_of(dtype);
        arithmetic_size_ = size_of(arithmetic_of(dtype));
        vector_ = 16 / size_;
        kept_ = plan.kept;
        inner_ = joined(plan.runs, plan.run);
        if (plan.walk == Walk::columns) {
            kept_.push(plan.lane);
            inner_ = plan.runs;
            inner_.push(plan.merge);
        }
    }

  protected:
    // Bytes of the workspace, as an offset; 0 is none, since the first is kept free.
    template <class E>
    E* take(index_t bytes) {
        if (out_.workspace == 0) out_.workspace = 256;
        const index_t at = out_.workspace;
        out_.workspace += up(bytes, 256) * 256;
        return reinterpret_cast<E*>(at);
    }
    index_t split_bytes() const { return 4 * arithmetic_size_; }

    // Kernels read parameters of x's dtype or of the type of arithmetic. Others are converted first, to numbers that
    // lie in the order of the plan.
    void take_parameter(const char* data, Dtype dtype, Operand o, Parameter* p) {
        p->data = data;
        p->reading = Reading::absent;
        if (!data) return;
        p->arithmetic = dtype == arithmetic_of(dtype_);
        if (p->arithmetic || dtype == dtype_) return;
        Pack& pack = out_.pack[o == kBias];
        pack = Pack{};
        pack.count = 1;
        index_t next = arithmetic_size_;
        for (Nest* nest : {&inner_, &kept_}) {
            for (int i = nest->n - 1; i >= 0; --i) {
                Axis& a = nest->axis[i];
                if (a.extent == 1 || a.stride[o] == 0) continue;
                for (int k = pack.axes; k > 0; --k) pack.axis[k] = pack.axis[k - 1];
                pack.axis[0] = {Division(a.extent), a.stride[o]};
                ++pack.axes;
                pack.count *= a.extent;
                a.stride[o] = next;
                next *= a.extent;
            }
        }
        pack.from = data;
        pack.dtype = dtype;
        pack.to_double = arithmetic_size_ == 8;
        pack.to = take<char>(pack.count * arithmetic_size_);
        p->data = static_cast<const char*>(pack.to);
        p->arithmetic = true;
        out_.add(o == kBias ? Kernel::pack_bias : Kernel::pack_weight, limited(up(pack.count, kBlock)), kBlock);
    }

    // The axes, and which family of kernels is to walk them. `arrays`: operands of x's shape that are there.
    void choose_walk(std::initializer_list<Operand> arrays, std::initializer_list<const char*> data) {
        columns_ = plan_.walk == Walk::columns && kept_.inner().extent * inner_.inner().extent > 1;
        if (columns_) {
            const Axis &lane = kept_.inner(), &merge = inner_.inner();
            for (const Operand o : arrays) {
                const index_t unit = merge.extent > 1 ? merge.stride[o] : lane.stride[o];
                if (unit != size_) columns_ = false;
                if (merge.extent > 1 && lane.extent > 1 && lane.stride[o] != unit * merge.extent) columns_ = false;
            }
            // A parameter that varies down the rows and along the lanes too: element by element.
            for (const Operand o : {kWeight, kBias}) {
                bool by_row = false;
                for (int i = 0; i < inner_.n - 1; ++i) by_row = by_row || varies(inner_.axis[i], o);
                if (by_row && (varies(lane, o) || varies(merge, o))) columns_ = false;
            }
        }
        constexpr unsigned kOfSets = kElementOperands | bit(kStatistic) | bit(kSet);
        int n = 0;
        if (columns_) {
            const Axis lane = kept_.inner(), merge = inner_.inner();
            const Nest outer = collapse(kept_.without_inner(), kOfSets),
                       rows = collapse(inner_.without_inner(), kElementOperands);
            for (int i = 0; i < outer.n; ++i) push(outer.axis[i], &n, w_.axis);
            push(lane, &n, w_.axis);
            w_.kept = n;
            for (int i = 0; i < rows.n; ++i) push(rows.axis[i], &n, w_.axis);
            push(merge, &n, w_.axis);
            w_.axes = n;
            w_.cells = Division(merge.extent);
            w_.cell_step = 1;
            w_.lanes = Division(lane.extent * merge.extent);
            w_.lanes_packed = w_.lanes.divisor % vector_ == 0;
            w_.lanes_vector = w_.lanes_packed;
            for (int i = 0; i < w_.axes - 1; ++i) {
                if (i != w_.kept - 1 && !aligned(w_.axis[i], arrays)) w_.lanes_vector = false;
            }
            for (const char* p : data)
                w_.lanes_vector = w_.lanes_vector && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
            const auto by_row = [&](Operand o) {
                for (int i = 0; i < rows.n; ++i) {
                    if (varies(rows.axis[i], o)) return true;
                }
                return false;
            };
            w_.weight_by_row = by_row(kWeight);
            w_.bias_by_row = by_row(kBias);
            tile_columns(rows.size());
            return;
        }
        const Nest kept = collapse(kept_, kOfSets), inner = collapse(inner_, kElementOperands);
        for (int i = 0; i < kept.n; ++i) push(kept.axis[i], &n, w_.axis);
        w_.kept = n;
        for (int i = 0; i < inner.n; ++i) push(inner.axis[i], &n, w_.axis);
        w_.axes = n;
        w_.packed = inner.inner().extent % vector_ == 0;
        for (const Operand o : arrays) w_.packed = w_.packed && inner.inner().stride[o] == size_;
        w_.vector = w_.packed;
        for (int i = 0; i < w_.axes - 1; ++i) w_.vector = w_.vector && aligned(w_.axis[i], arrays);
        for (const char* p : data) w_.vector = w_.vector && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
        w_.weight.reading = reading(w_.weight, kWeight);
        w_.bias.reading = reading(w_.bias, kBias);
        w_.lanes = Division(1);
    }

    // Cells of a set (1 in a forward pass) and the leaves of each.
    void cut_rows(index_t cells, int items) {
        w_.cells = Division(cells);
        w_.cell_size = w_.cell_step = w_.set_size / cells;
        cut_leaves(w_.cell_size, items);
        w_.entries = Division(up(w_.leaves.divisor, w_.chunk));
        w_.entry_size = w_.chunk * w_.leaf;
    }
    void cut_leaves(index_t size, int items) {
        w_.leaf = static_cast<int>(items * vector_ * kWarp);
        w_.leaves = Division(up(size, w_.leaf));
        w_.chunk = up(w_.leaves.divisor, kMostEntries);
    }

    // Launches whose units are warps, threads, or tiles of columns.
    void add_warps(Kernel kernel, index_t warps, int threads = kBlock, index_t shared = 0) {
        out_.add(kernel, limited(up(warps, threads / kWarp)), threads, shared);
    }
    void add_threads(Kernel kernel, index_t n) { out_.add(kernel, limited(up(n, kBlock)), kBlock); }
    void add_columns(Kernel kernel, index_t shared = 0) {
        const index_t outer = w_.sets / w_.axis[w_.kept - 1].extent.divisor;
        out_.add(kernel, limited(outer * w_.entries.divisor * w_.tiles.divisor), kBlock, shared);
    }

    // Whether the sets that are worked on at a time are still in the L2 cache when they are read again.
    bool stays_in_l2(index_t bytes) const {
        return std::min<index_t>(w_.sets, device_.multiprocessors) * bytes <= device_.l2_bytes / 5 * 3;
    }

    // Whether so few blocks, each for a set of many leaves, leave most of the machine idle.
    bool too_few(index_t blocks, index_t leaves) const { return leaves > 8 && blocks * 4 < device_.multiprocessors; }

    const Plan& plan_;
    const Device& device_;
    Launches& out_;
    Work& w_;
    const Dtype dtype_;
    index_t size_, arithmetic_size_, vector_;
    Nest kept_, inner_;
    bool columns_ = false;

  private:
    static bool varies(const Axis& a, Operand o) { return a.extent > 1 && a.stride[o] != 0; }

    static bool aligned(const Line& line, std::initializer_list<Operand> arrays) {
        for (const Operand o : arrays) {
            if (line.extent.divisor > 1 && line.stride[o] % 16 != 0) return false;
        }
        return true;
    }

    Reading reading(const Parameter& p, Operand o) const {
        if (!p.data) return Reading::absent;
        const index_t size = p.arithmetic ? arithmetic_size_ : size_;
        bool constant = true, even = true;
        for (int i = 0; i < w_.axes; ++i) {
            const bool innermost = i == w_.axes - 1;
            const index_t stride = w_.axis[i].extent.divisor > 1 ? w_.axis[i].stride[o] : 0;
            if (i >= w_.kept && stride != 0) constant = false;
            if (!innermost && stride % 16 != 0) even = false;
        }
        const index_t stride = w_.axis[w_.axes - 1].stride[o];
        if (constant || (w_.packed && stride == 0)) return Reading::uniform;
        if (w_.packed && stride == size && even && reinterpret_cast<std::uintptr_t>(p.data) % 16 == 0) {
            return Reading::vector;
        }
        return Reading::element;
    }

    void tile_columns(index_t rows) {
        const index_t vectors = up(w_.lanes.divisor, vector_);
        w_.width = 1;
        while (w_.width < kWarp && w_.width < vectors) w_.width *= 2;
        w_.height = kBlock / w_.width;
        w_.tiles = Division(up(vectors, w_.width));
        // Entries of whole sweeps: few enough that a warp can merge them, and where rows are many no shorter than two
        // sweeps, so that the workspace is small beside x.
        const index_t sweep = w_.height * kColumnRows;
        const index_t sweeps = std::max<index_t>(up(rows, sweep * kMostEntries), rows >= 128 * sweep ? 2 : 1);
        w_.cell_size = rows;
        w_.entry_size = sweeps * sweep;
        w_.entries = Division(up(rows, w_.entry_size));
    }
};

int leaf_items(Dtype dtype) {
    return with_dtype(dtype, [](auto x) { return kLeafItems<decltype(x)>; });
}
int most_warps(Dtype dtype) {
    return with_dtype(dtype, [](auto x) { return kMostWarps<decltype(x)>; });
}
int sum_items(Dtype dtype) {
    return with_dtype(dtype, [](auto x) { return kSumItems<decltype(x)>; });
}

class ForwardPlanner : Planner {
  public:
    ForwardPlanner(const Plan& plan, const ForwardCall& call, const Device& device, Launches* out)
        : Planner(plan, call.dtype, device, out), call_(call) {}

    void run() {
        w_.x = call_.x;
        w_.y = call_.y;
        w_.eps = call_.eps;
        w_.mean = call_.mean;
        w_.rstd = call_.rstd;
        w_.M2 = call_.M2;
        take_parameter(call_.weight, call_.weight_dtype, kWeight, &w_.weight);
        take_parameter(call_.bias, call_.bias_dtype, kBias, &w_.bias);
        if (call_.y) {
            choose_walk({kX, kY}, {call_.x, call_.y});
        } else {
            choose_walk({kX}, {call_.x});
        }
        if (columns_) {
            cut_leaves(w_.set_size, leaf_items(dtype_));  // for sets that are done again
        } else {
            cut_rows(1, leaf_items(dtype_));
        }
        if (!columns_ && !call_.given && resident()) return;
        if (call_.y || call_.given) w_.statistics = take<void>(w_.sets * split_bytes());
        if (call_.given) {
            add_threads(Kernel::given_statistics, w_.sets);
        } else {
            const index_t cells = w_.sets * w_.cells.divisor;
            w_.moments = take<Partial>(cells * w_.entries.divisor * sizeof(Partial));
            if (columns_) {
                add_columns(Kernel::columns_moments, kBlock * (vector_ * sizeof(Partial) + sizeof(double)));
            } else {
                add_warps(Kernel::rows_moments, w_.sets * w_.entries.divisor);
            }
            add_warps(Kernel::finish_sets, w_.sets, 128);
        }
        if (!call_.y) return;
        if (columns_) {
            add_columns(Kernel::columns_apply);
        } else {
            add_warps(Kernel::rows_apply, w_.sets * w_.leaves.divisor);
        }
    }

  private:
    // One kernel that keeps a set on the chip, where that can be.
    bool resident() {
        const index_t leaves = w_.leaves.divisor, parts = leaves * index_t{sizeof(Partial)};
        if (leaves == 1) {
            w_.warps = 1;
            add_warps(Kernel::rows_forward, w_.sets, kAloneWarps * kWarp, parts);
            return true;
        }
        if (too_few(w_.sets, leaves)) return false;
        // Sixteen warps that hold their leaves in registers would leave a multiprocessor with one block; in shared
        // memory it has room for two or three, and one loads while another computes.
        if (leaves <= kHeldWarps) {
            w_.warps = static_cast<int>(leaves);
            out_.add(Kernel::rows_forward, limited(w_.sets), w_.warps * kWarp, parts);
            return true;
        }
        if (!call_.y || parts > device_.shared_bytes) return false;
        const index_t held = leaves * (w_.leaf * size_);
        w_.reload = parts + held > device_.shared_bytes;
        if (w_.reload && !stays_in_l2(w_.set_size * size_)) return false;
        w_.warps = w_.reload || parts + held > device_.shared_bytes / 2 ? most_warps(dtype_) : kHeldWarps;
        out_.add(Kernel::rows_forward_shared, limited(w_.sets), w_.warps * kWarp, parts + (w_.reload ? 0 : held));
        return true;
    }

    const ForwardCall& call_;
};

class BackwardPlanner : Planner {
  public:
    BackwardPlanner(const Plan& plan, const BackwardCall& call, const Device& device, Launches* out)
        : Planner(plan, call.dtype, device, out), call_(call) {}

    void run() {
        wants_gradients_ = call_.parameters > 0 && (call_.dweight || call_.dbias);
        w_.x = call_.x;
        w_.dy = call_.dy;
        w_.y = call_.dx;
        w_.mean = const_cast<double*>(call_.mean);
        w_.rstd = const_cast<double*>(call_.rstd);
        w_.constant_statistics = call_.constant_statistics;
        if (!call_.dx && !wants_gradients_) return;
        take_parameter(call_.weight, call_.weight_dtype, kWeight, &w_.weight);
        if (call_.dx) {
            choose_walk({kX, kDy, kY}, {call_.x, call_.dy, call_.dx});
        } else {
            choose_walk({kX, kDy}, {call_.x, call_.dy});
        }
        choose_gradients();
        // dx may take the place of x or dy, so what else reads them comes first.
        if (wants_gradients_ && gradients_ == Gradients::others) sum_parameters();
        if (columns_ || !resident()) split();
        if (wants_gradients_ && gradients_ != Gradients::others) fold();
    }

  private:
    enum class Gradients { by_cell, by_element, others };

    // Cells are the innermost axes along which neither weight nor gradient varies; the axes outside them number the
    // cells of a set. This does not ask what is wanted, so that dx has the same bits with and without gradients.
    void choose_gradients() {
        const auto varies = [&](int i) {
            const Line& line = w_.axis[i];
            return line.extent.divisor > 1 && (line.stride[kWeight] != 0 || line.stride[kGradient] != 0);
        };
        if (columns_) {
            bool by_row = false;
            for (int i = w_.kept; i < w_.axes - 1; ++i) by_row = by_row || varies(i);
            gradients_ = by_row ? Gradients::others : Gradients::by_cell;
            // A weight that is only repeated down the rows is a cell's own.
            w_.weight_in_sums = w_.weight_by_row;
            cell_axes_ = w_.axes - 1;  // the lanes of a group
            return;
        }
        cell_axes_ = w_.kept;
        index_t cells = 1, size = w_.set_size;
        for (int i = w_.kept; i < w_.axes; ++i) {
            if (!varies(i)) continue;
            for (; cell_axes_ <= i; ++cell_axes_) {
                cells *= w_.axis[cell_axes_].extent.divisor;
                size /= w_.axis[cell_axes_].extent.divisor;
            }
        }
        if (cells == 1 || size >= kLeastCell) {
            gradients_ = Gradients::by_cell;
            cut_rows(cells, sum_items(dtype_));
        } else {
            gradients_ = Gradients::by_element;
            for (int i = 0; i < w_.axes; ++i) {
                const bool own = w_.axis[i].stride[kGradient] != 0;
                if (w_.axis[i].extent.divisor > 1 && own != (i >= w_.kept)) gradients_ = Gradients::others;
            }
            w_.weight_in_sums = w_.weight.data != nullptr;
            cut_rows(1, sum_items(dtype_));
        }
        if (gradients_ == Gradients::by_element && wants_gradients_) {
            w_.by_element = true;
            // Teams enough to keep some megabytes of loads in flight on any machine, and few enough that their partial
            // sums are small beside x.
            const index_t teams = std::max<index_t>(512, 524288 / w_.set_size);
            w_.sets_per_team = std::min(std::max<index_t>(up(w_.sets, teams), 4), kMostTeamSets);
            const index_t rows = up(w_.sets, w_.sets_per_team);
            w_.element_sums = take<void>(rows * w_.set_size * 2 * arithmetic_size_);
        }
    }

    bool resident() {
        const index_t total = w_.cells.divisor * w_.leaves.divisor;
        const index_t teams = up(w_.sets, w_.sets_per_team);
        const index_t parts = (2 * total + w_.cells.divisor) * index_t{sizeof(Pair<double>)};
        const int items = sum_items(dtype_);
        const index_t by_element = w_.by_element ? 2 * items * vector_ * kWarp * arithmetic_size_ : 0;  // of a warp
        w_.slots = static_cast<int>(std::min<index_t>(up(w_.cell_size, vector_ * kWarp), items));
        if (total == 1) {
            w_.warps = 1;
            add_resident(Kernel::rows_backward, up(teams, kAloneWarps), kAloneWarps, kAloneWarps * by_element);
            return true;
        }
        if (too_few(teams, total) || (!call_.dx && !w_.by_element)) return false;
        if (total <= most_warps(dtype_)) {
            const index_t shared = parts + total * by_element;
            if (shared > device_.shared_bytes) return false;
            w_.warps = static_cast<int>(total);
            add_resident(Kernel::rows_backward, teams, w_.warps, shared);
            return true;
        }
        // Sums by element and what is held do not fit together.
        const index_t held = total * 2 * w_.slots * 16 * kWarp;
        w_.reload = w_.by_element || parts + held > device_.shared_bytes;
        if (w_.reload && !stays_in_l2(2 * w_.set_size * size_)) return false;
        const index_t shared = parts + (w_.by_element ? total * by_element : w_.reload ? 0 : held);
        if (shared > device_.shared_bytes) return false;
        w_.warps = most_warps(dtype_);
        add_resident(Kernel::rows_backward_shared, teams, w_.warps, shared);
        return true;
    }
    void add_resident(Kernel kernel, index_t blocks, int warps, index_t shared) {
        if (gradients_ == Gradients::by_cell && wants_gradients_) {
            w_.cell_sums = take<Pair<double>>(w_.sets * w_.cells.divisor * sizeof(Pair<double>));
        }
        out_.add(kernel, limited(blocks), warps * kWarp, shared);
    }

    void add_statistics() {
        if (w_.statistics) return;
        w_.statistics = take<void>(w_.sets * split_bytes());
        add_threads(Kernel::given_statistics, w_.sets);
    }

    void split() {
        add_statistics();
        const bool cell_gradients = wants_gradients_ && gradients_ == Gradients::by_cell;
        if (cell_gradients || (call_.dx && !w_.constant_statistics)) {
            const index_t cells = w_.sets * w_.cells.divisor;
            w_.sums = take<Pair<double>>(cells * w_.entries.divisor * sizeof(Pair<double>));
            w_.cell_sums = take<Pair<double>>(cells * sizeof(Pair<double>));
            w_.set_sums = take<void>(w_.sets * 2 * arithmetic_size_);
            if (columns_) {
                add_columns(Kernel::columns_sums, kBlock * vector_ * sizeof(Pair<double>));
            } else {
                add_warps(Kernel::rows_sums, cells * w_.entries.divisor);
            }
            add_warps(Kernel::finish_sums, w_.sets, 128);
        }
        if (columns_ && call_.dx) add_columns(Kernel::columns_dx);
        if (!columns_ && (call_.dx || w_.by_element)) {
            add_warps(Kernel::rows_dx, up(w_.sets, w_.sets_per_team) * w_.cells.divisor * w_.leaves.divisor);
        }
    }

    void start_fold() {
        Fold& f = out_.fold;
        f = Fold{};
        f.dweight = call_.dweight;
        f.dbias = call_.dbias;
        f.dweight_dtype = call_.dweight_dtype;
        f.dbias_dtype = call_.dbias_dtype;
        f.parameters = f.summands = 1;
    }

    // Calls f(axis) for the axes that tell parameters apart, then for those that are summed; `skip` some. Returns how
    // many the first are.
    template <class Skip, class F>
    int for_parameters(Skip skip, F f) {
        int index = 0;
        for (const bool telling : {true, false}) {
            for (int i = 0; i < w_.axes; ++i) {
                const Line& line = w_.axis[i];
                if (line.extent.divisor == 1 || (line.stride[kGradient] != 0) != telling || skip(i)) continue;
                f(i);
                (telling ? out_.fold.parameters : out_.fold.summands) *= line.extent.divisor;
                index += telling;
            }
        }
        return index;
    }

    void fold() {
        start_fold();
        Fold& f = out_.fold;
        f.in_double = gradients_ == Gradients::by_cell || arithmetic_size_ == 8;
        if (gradients_ == Gradients::by_cell) {
            f.from = w_.cell_sums;
            // Cell c of set s is number s * cells + c; c counts the axes that number cells, in their order.
            index_t entry[kMaxAxes + 2] = {}, next = 1;
            const auto of_cells = [&](int i) { return columns_ ? i == w_.axes - 1 : i >= w_.kept && i < cell_axes_; };
            for (int i = w_.axes - 1; i >= w_.kept; --i) {
                if (!of_cells(i)) continue;
                entry[i] = next;
                next *= w_.axis[i].extent.divisor;
            }
            for (int i = w_.kept - 1; i >= 0; --i) {
                entry[i] = next;
                next *= w_.axis[i].extent.divisor;
            }
            const auto within = [&](int i) { return i >= w_.kept && !of_cells(i); };
            f.index = for_parameters(
                within, [&](int i) { f.axis[f.axes++] = {w_.axis[i].extent, w_.axis[i].stride[kGradient], entry[i]}; });
        } else {
            f.from = w_.element_sums;
            index_t entry = w_.set_size;
            for (int i = w_.kept; i < w_.axes; ++i) {
                entry /= w_.axis[i].extent.divisor;
                if (w_.axis[i].extent.divisor == 1) continue;
                f.axis[f.axes++] = {w_.axis[i].extent, w_.axis[i].stride[kGradient], entry};
                f.parameters *= w_.axis[i].extent.divisor;
            }
            f.index = f.axes;
            f.summands = up(w_.sets, w_.sets_per_team);
            f.axis[f.axes++] = {Division(f.summands), 0, w_.set_size};
        }
        out_.add(Kernel::fold_parameters, limited(up(f.parameters, kWarp)), kWarp * kWarp,
                 kWarp * (kWarp + 1) * sizeof(Pair<double>));
    }

    void sum_parameters() {
        add_statistics();
        start_fold();
        Work& p = out_.parameters_work;
        p = w_;
        p.axes = 0;
        p.kept = for_parameters([](int) { return false; }, [&](int i) { p.axis[p.axes++] = w_.axis[i]; });
        const index_t summands = out_.fold.summands;
        p.height = summands >= 2048 ? kBlock : summands >= kWarp ? kWarp : 1;
        out_.add(Kernel::sum_parameters, limited(up(out_.fold.parameters, kBlock / p.height)), kBlock,
                 kBlock / kWarp * sizeof(Pair<double>));
    }

    const BackwardCall& call_;
    bool wants_gradients_ = false;
    Gradients gradients_ = Gradients::others;
    int cell_axes_ = 0;
};

template <class P>
void rebase(P** p, char* workspace) {
    if (*p) *p = reinterpret_cast<P*>(workspace + reinterpret_cast<std::uintptr_t>(*p));
}

}  // namespace

const char* name_of(Kernel kernel) {
    static const char* const kNames[] = {
#define NORMKIT_ROW(name) #name,
        NORMKIT_FOR_CUDA_KERNELS(NORMKIT_ROW)
#undef NORMKIT_ROW
    };
    return kNames[static_cast<int>(kernel)];
}

void Launches::place(char* base) {
    for (int i = 0; i < count; ++i) {
        const Kernel k = list[i].kernel;
        if (k == Kernel::pack_weight || k == Kernel::pack_bias) {
            Parameter& p = k == Kernel::pack_weight ? work.weight : work.bias;
            rebase(&p.data, base);
            rebase(&pack[k == Kernel::pack_bias].to, base);
        }
        if (k == Kernel::fold_parameters) rebase(&fold.from, base);
    }
    rebase(&work.statistics, base);
    rebase(&work.moments, base);
    rebase(&work.sums, base);
    rebase(&work.cell_sums, base);
    rebase(&work.set_sums, base);
    rebase(&work.element_sums, base);
    parameters_work.statistics = work.statistics;
}

void plan_forward(const Plan& plan, const ForwardCall& call, const Device& device, Launches* out) {
    ForwardPlanner(plan, call, device, out).run();
}
void plan_backward(const Plan& plan, const BackwardCall& call, const Device& device, Launches* out) {
    BackwardPlanner(plan, call, device, out).run();
}

}  // namespace normkit::cuda
