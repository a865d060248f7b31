// Axes, and loop nests over them: the one description of memory that norms, plan and walks share.
#pragma once

#include <type_traits>

#include "normkit/normkit.h"

namespace normkit {

// The arrays of an operation, as strides over the same axes. A broadcast axis has stride 0. In a backward pass `y` is
// dx. The last three count elements, the others bytes: the statistics given to the caller and the gradient of the
// parameters are C-contiguous, and a set number counts the sets in the order in which the plan visits them.
enum Operand { kX, kY, kDy, kWeight, kBias, kStatistic, kGradient, kSet, kOperands };

constexpr unsigned bit(Operand o) { return 1u << o; }
// Those that have, or share, something for each element.
constexpr unsigned kElementOperands = bit(kX) | bit(kY) | bit(kDy) | bit(kWeight) | bit(kBias) | bit(kGradient);

struct Axis {
    index_t extent = 1;
    bool reduced = false;  // belongs to S: its elements share one mean and variance
    bool grouped = false;  // the channels of a group: of S, and each with a weight and bias of its own
    index_t stride[kOperands] = {};
};
static_assert(std::is_trivially_copyable<Axis>::value, "Nest copies only the axes that it has");

constexpr int kMaxAxes = kMaxDims + 1;  // the channel axis of group norm counts twice

struct Offsets {
    index_t at[kOperands] = {};
    index_t operator[](Operand o) const { return at[o]; }
    Offsets operator+(const Offsets& other) const {
        Offsets sum;
        for (int o = 0; o < kOperands; ++o) sum.at[o] = at[o] + other.at[o];
        return sum;
    }
};

inline Offsets offsets(const Axis& axis, index_t index) {
    Offsets o;
    for (int i = 0; i < kOperands; ++i) o.at[i] = index * axis.stride[i];
    return o;
}

// Axes from the outermost to the innermost. What lies beyond the n-th is not initialized, nor copied: nests are made
// and passed around in every call, and all kMaxAxes axes are a kilobyte and a half.
struct Nest {
    int n = 0;
    union {
        Axis axis[kMaxAxes];
    };

    Nest() {}
    Nest(const Nest& other) : n(other.n) {
        for (int i = 0; i < n; ++i) axis[i] = other.axis[i];
    }
    Nest& operator=(const Nest& other) {
        n = other.n;
        for (int i = 0; i < n; ++i) axis[i] = other.axis[i];
        return *this;
    }

    void push(const Axis& a) { axis[n++] = a; }
    const Axis& inner() const { return axis[n - 1]; }
    index_t size() const {
        index_t product = 1;
        for (int i = 0; i < n; ++i) product *= axis[i].extent;
        return product;
    }
    Nest without_inner() const {
        Nest rest = *this;
        if (rest.n > 0) --rest.n;
        return rest;
    }

    // Where element `index` (row-major) of each operand lies.
    Offsets offsets(index_t index) const {
        Offsets o;
        for (int i = n - 1; i >= 0; --i) {
            const index_t k = index % axis[i].extent;
            index /= axis[i].extent;
            for (int j = 0; j < kOperands; ++j) o.at[j] += k * axis[i].stride[j];
        }
        return o;
    }
    index_t offset(Operand operand, index_t index) const {
        index_t at = 0;
        for (int i = n - 1; i >= 0; --i) {
            at += index % axis[i].extent * axis[i].stride[operand];
            index /= axis[i].extent;
        }
        return at;
    }
};

// Cuts a nest into tiles of rows x lanes, row-major: lanes are the innermost axis, rows the one outside it.
struct Tiles {
    Nest outer;
    Axis rows, lanes;
    index_t rows_per, lanes_per;  // of a tile, but for the last ones
    index_t row_tiles, lane_tiles;

    Tiles() = default;

    // Tiles of about `elements` elements, or as large as they come (0). A tile has at most max_rows rows (0: any).
    Tiles(const Nest& nest, index_t elements, index_t max_rows = 0);

    index_t count() const { return outer.size() * row_tiles * lane_tiles; }
    struct Tile {
        Offsets at;
        index_t rows, lanes;
    };
    Tile operator[](index_t i) const;
};

// The same elements in the same order with as few axes as possible: an axis is absorbed by its outer neighbour wherever
// the two are one in every operand of the mask. A nest without axes becomes one axis of extent 1.
Nest collapse(const Nest& nest, unsigned operands);

}  // namespace normkit
