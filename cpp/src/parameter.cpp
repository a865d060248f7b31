#include "parameter.h"

#include "cpu/tiles.h"
#include "dtype.h"

namespace normkit {
namespace {

// So many are converted whatever the size of x.
constexpr index_t kFew = 64 * 1024;

bool varies(const Axis& a, Operand operand) { return a.extent > 1 && a.stride[operand] != 0; }

template <class T>
void convert(const char* from, Dtype dtype, const Tiles& tiles, Operand operand, T* to) {
    for (index_t i = 0; i < tiles.count(); ++i) {
        const Tiles::Tile tile = tiles[i];
        cpu::gather(cpu::isa_in_force(),
                    {from + tile.at[operand], tiles.rows.stride[operand], tiles.lanes.stride[operand], dtype},
                    tile.rows, tile.lanes, to);
        to += tile.rows * tile.lanes;
    }
}

}  // namespace

Parameter::Parameter(const View& v, const View& x, Operand operand, Problem* problem)
    : data(static_cast<const char*>(v.data)), dtype(v.dtype) {
    if (!v.given() || x.size() == 0 || dtype == arithmetic_of(x.dtype)) return;
    Nest varying;
    for (int i = 0; i < problem->axes.n; ++i) {
        if (varies(problem->axes.axis[i], operand)) varying.push(problem->axes.axis[i]);
    }
    const index_t count = varying.size();
    if (count > kFew && count > x.size() / 4) return;
    const Tiles tiles(collapse(varying, bit(operand)), 0);
    const Dtype own = dtype;
    dtype = arithmetic_of(x.dtype);
    converted_.reset(new char[count * size_of(dtype)]);
    with_dtype(x.dtype, [&](auto of_x) {
        convert(data, own, tiles, operand, reinterpret_cast<Compute<decltype(of_x)>*>(converted_.get()));
    });
    data = converted_.get();
    index_t next = size_of(dtype);
    for (int i = problem->axes.n - 1; i >= 0; --i) {
        Axis& a = problem->axes.axis[i];
        if (!varies(a, operand)) continue;
        a.stride[operand] = next;
        next *= a.extent;
    }
}

}  // namespace normkit
