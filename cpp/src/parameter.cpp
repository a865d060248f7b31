#include "parameter.h"

#include "cpu/kernels.h"
#include "dtype.h"

namespace normkit {
namespace {

// So many are converted whatever the size of x.
constexpr index_t kFew = 64 * 1024;

bool varies(const Axis& a, Operand operand) { return a.extent > 1 && a.stride[operand] != 0; }

template <class X, class T>
void convert(const char* from, const Tiles& tiles, Operand operand, T* to) {
    const index_t row = tiles.rows.stride[operand], lane = tiles.lanes.stride[operand];
    for (index_t i = 0; i < tiles.count(); ++i) {
        const Tiles::Tile tile = tiles[i];
        for (index_t r = 0; r < tile.rows; ++r) {
            const char* p = from + tile.at[operand] + r * row;
            if constexpr (std::is_same_v<T, Compute<X>>) {
                if (lane == index_t{sizeof(X)}) {
                    cpu::kernels_of<X>(cpu::isa_in_force()).widen(p, tile.lanes, to);
                    to += tile.lanes;
                    continue;
                }
            }
            for (index_t l = 0; l < tile.lanes; ++l) *to++ = static_cast<T>(to_double(read<X>(p + l * lane)));
        }
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
        using T = Compute<decltype(of_x)>;
        with_dtype(own, [&](auto element) {
            convert<decltype(element)>(data, tiles, operand, reinterpret_cast<T*>(converted_.get()));
        });
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
