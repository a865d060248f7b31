// Tiles of the rows walk that are written beside the sums of what comes next (Schedule::by_row).
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>

#include "rows.h"

namespace normkit::cpu {

// Whether all rows of y (or dx) begin on lines.
inline bool rows_on_lines(const Plan& plan, const Nest& elements, const char* y) {
    const auto on_lines = [](const Axis& a) { return a.stride[kY] % kLine == 0; };
    return on_line(y) && std::all_of(plan.kept.axis, plan.kept.axis + plan.kept.n, on_lines) &&
           std::all_of(elements.axis, elements.axis + elements.n - 1, on_lines);
}

// A tile that is written beside other work, as far as kernels can do that, and then the rest. What its statistics
// point to must stay where it is.
template <class X>
class WritingTile {
    using T = Compute<X>;

  public:
    // next, writer, in_step: as in Unwritten.
    explicit WritingTile(const KernelPair<X>& kernels, bool (*next)(void*) = nullptr, void* writer = nullptr,
                         bool in_step = true)
        : k_(kernels), next_(next), writer_(writer), in_step_(in_step) {}
    WritingTile(const WritingTile&) = delete;
    ~WritingTile() {
        if (seam_.bytes > 0) std::memcpy(seam_.at, seam_.vector, seam_.bytes);
    }

    void begin(const ApplyTo<X>& tile) {
        tile_ = tile;
        kernels_can_ = to_write_beside(tile_, &left_);
        left_.seam = &seam_;
        left_.next = next_;
        left_.writer = writer_;
        left_.in_step = in_step_;
        left_.row = left_.rows = 0;
    }
    // n of its rows, from `first` on, whose statistics have come, and `scale` with them (null: none).
    void add(index_t first, index_t n, const T* scale) {
        left_.row = first;
        left_.rows = first + n;
        left_.lane = 0;
        if (kernels_can_ && !scale) return;
        tile_.s.scale = scale ? scale - first * tile_.s.row : nullptr;
        write_rest(k_, tile_, &left_);
        tile_.s.scale = nullptr;
    }
    // What is to be written now; null: nothing.
    Unwritten<X>* tile() { return left_.done() ? nullptr : &left_; }
    void rest() { write_rest(k_, tile_, &left_); }

  private:
    const KernelPair<X>& k_;
    bool (*const next_)(void*);
    void* const writer_;
    const bool in_step_;
    ApplyTo<X> tile_;
    bool kernels_can_ = false;
    Unwritten<X> left_;  // of what has been added
    Seam seam_;
};

// Tile after tile. Which::begin_next() puts the next one in the place of now_; false: there is none.
template <class X, class Which>
class WritingTiles {
  public:
    WritingTiles(const KernelPair<X>& kernels, bool in_step)
        : now_(
              kernels, [](void* self) { return static_cast<WritingTiles*>(self)->tile() != nullptr; }, this, in_step) {}
    WritingTiles(const WritingTiles&) = delete;

    // As WritingTile.
    Unwritten<X>* tile() {
        while (!now_.tile() && begin_next()) {
        }
        return now_.tile();
    }
    void rest() {
        do {
            now_.rest();
        } while (begin_next());
    }

  protected:
    WritingTile<X> now_;

  private:
    bool begin_next() { return static_cast<Which*>(this)->begin_next(); }
};

// The tiles of neighbouring sets: walk.tile_of(sets, all of them, number of the tile).
template <class X, class Walk, class Sets>
class WritingSets : public WritingTiles<X, WritingSets<X, Walk, Sets>> {
  public:
    WritingSets(const KernelPair<X>& kernels, const SetTiles& tiles, const Walk& walk)
        : WritingTiles<X, WritingSets>(kernels, /*in_step=*/true), tiles_(tiles), walk_(walk) {}

    // n sets, which must stay where they are.
    void begin(const Sets* sets, index_t n) {
        sets_ = sets;
        all_.emplace(tiles_, n);
        next_ = 0;
    }
    bool begin_next() {
        if (!sets_ || next_ == all_->count()) return false;
        const ApplyTo<X> tile = walk_.tile_of(*sets_, *all_, next_++);
        this->now_.begin(tile);
        this->now_.add(0, tile.rows, tile.s.scale);
        return true;
    }

  private:
    const SetTiles& tiles_;
    const Walk& walk_;
    const Sets* sets_ = nullptr;
    std::optional<SetTiles::Of> all_;
    index_t next_ = 0;
};

}  // namespace normkit::cpu
