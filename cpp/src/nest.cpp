#include "nest.h"

namespace normkit {

Nest collapse(const Nest& nest, unsigned operands) {
    Nest out;
    for (int i = 0; i < nest.n; ++i) {
        const Axis& a = nest.axis[i];
        if (a.extent == 1) continue;
        bool one = out.n > 0;
        for (int o = 0; one && o < kOperands; ++o) {
            if (operands >> o & 1) one = out.inner().stride[o] == a.stride[o] * a.extent;
        }
        if (one) {
            Axis merged = a;
            merged.extent *= out.inner().extent;
            out.axis[out.n - 1] = merged;
        } else {
            out.push(a);
        }
    }
    if (out.n == 0) {
        out.push(Axis{});
    }
    return out;
}

Tiles::Tiles(const Nest& nest, index_t elements, index_t max_rows) {
    lanes = nest.inner();
    outer = nest.without_inner();
    if (outer.n > 0) {
        rows = outer.inner();
        outer = outer.without_inner();
    }
    lanes_per = lanes.extent;
    rows_per = rows.extent;
    if (elements > 0 && lanes_per > elements) {
        lanes_per = (elements + 63) / 64 * 64;  // whole cache lines, whatever the element
        rows_per = 1;
    } else if (elements > 0 && lanes_per > 0 && rows_per > elements / lanes_per) {
        rows_per = elements / lanes_per;
    }
    if (max_rows > 0 && rows_per > max_rows) rows_per = max_rows;
    row_tiles = rows_per > 0 ? (rows.extent + rows_per - 1) / rows_per : 0;
    lane_tiles = lanes_per > 0 ? (lanes.extent + lanes_per - 1) / lanes_per : 0;
}

Tiles::Tile Tiles::operator[](index_t i) const {
    const index_t lane = i % lane_tiles * lanes_per;
    i /= lane_tiles;
    const index_t row = i % row_tiles * rows_per;
    Tile tile;
    tile.at = outer.offsets(i / row_tiles);
    for (int o = 0; o < kOperands; ++o) tile.at.at[o] += row * rows.stride[o] + lane * lanes.stride[o];
    tile.rows = rows.extent - row < rows_per ? rows.extent - row : rows_per;
    tile.lanes = lanes.extent - lane < lanes_per ? lanes.extent - lane : lanes_per;
    return tile;
}

}  // namespace normkit
