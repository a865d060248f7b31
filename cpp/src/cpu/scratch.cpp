#include "scratch.h"

#include <cstring>

namespace normkit::cpu {
namespace {

template <class T, class F>
void for_elements(const Nest& set, const char* x, F f) {
    const Tiles tiles(set, 0);
    for (index_t i = 0; i < tiles.count(); ++i) {
        const Tiles::Tile tile = tiles[i];
        for (index_t r = 0; r < tile.rows; ++r) {
            const char* p = x + tile.at[kX] + r * tiles.rows.stride[kX];
            for (index_t l = 0; l < tile.lanes; ++l, p += tiles.lanes.stride[kX]) {
                T v;
                std::memcpy(&v, p, sizeof v);
                f(static_cast<double>(v));
            }
        }
    }
}

}  // namespace

template <class T>
Moments moments_in_double(const Nest& set, const char* x, bool center) {
    const Nest axes = collapse(set, bit(kX));
    Moments m;
    m.count = static_cast<double>(axes.size());
    if (center) {
        double first = 0;
        bool any = false;
        double sum = 0;
        // About the first element: a constant set has a mean of exactly its value.
        for_elements<T>(axes, x, [&](double v) {
            if (!any) first = v, any = true;
            sum += v - first;
        });
        m.mean = first + sum / m.count;
    }
    double residual = 0;
    for_elements<T>(axes, x, [&](double v) {
        const double d = v - m.mean;
        residual += d;
        m.m2 += d * d;
    });
    if (center && std::isfinite(residual)) {
        m.m2 -= residual * residual / m.count;
        if (m.m2 < 0) m.m2 = 0;
    }
    return m;
}

template Moments moments_in_double<float>(const Nest&, const char*, bool);

}  // namespace normkit::cpu
