#include "scratch.h"

#include "parallel.h"

namespace normkit::cpu {
namespace {

constexpr index_t kElementsAtOnce = index_t{1} << 20;  // between two looks at whether to give up

template <class X, class F>
void for_elements(const Nest& set, const char* x, F f) {
    const Tiles tiles(set, kElementsAtOnce);
    for (index_t i = 0; i < tiles.count() && !gives_up(); ++i) {
        const Tiles::Tile tile = tiles[i];
        for (index_t r = 0; r < tile.rows; ++r) {
            const char* p = x + tile.at[kX] + r * tiles.rows.stride[kX];
            for (index_t l = 0; l < tile.lanes; ++l, p += tiles.lanes.stride[kX]) {
                f(to_double(read<X>(p)));
            }
        }
    }
}

}  // namespace

template <class X>
ScaledMoments moments_in_double(const Nest& set, const char* x, bool center) {
    const Nest axes = collapse(set, bit(kX));
    ScaledMoments scaled;
    const double& scale = scaled.scale;
    if constexpr (kDtype<X> == Dtype::float64) {
        double largest = 0, not_finite = 0;
        for_elements<X>(axes, x, [&](double v) {
            largest = std::fabs(v) > largest ? std::fabs(v) : largest;
            if (!std::isfinite(v)) not_finite += center ? v : std::fabs(v);
        });
        if (!std::isfinite(not_finite)) {
            const double count = static_cast<double>(axes.size());
            scaled.moments = center ? Moments{count, not_finite, std::nan("")} : Moments{count, 0, not_finite};
            return scaled;
        }
        if (largest > 0) {
            const int exponent = std::ilogb(largest);
            scaled.scale = std::ldexp(1.0, exponent < -1022 ? 1022 : -exponent);
        }
    }
    Moments& m = scaled.moments;
    m.count = static_cast<double>(axes.size());
    const double& origin = scaled.origin;
    if (center) {
        scaled.origin = to_double(read<X>(x)) * scale;
        double sum = 0;
        for_elements<X>(axes, x, [&](double v) { sum += v * scale - origin; });
        m.mean = sum / m.count;
    }
    double residual = 0;
    for_elements<X>(axes, x, [&](double v) {
        const double d = (v * scale - origin) - m.mean;
        residual += d;
        m.M2 += d * d;
    });
    if (center && std::isfinite(residual)) {
        m.M2 -= residual * residual / m.count;
        if (m.M2 < 0) m.M2 = 0;
    }
    return scaled;
}

#define NORMKIT_INSTANTIATE(name, element, arithmetic) \
    template ScaledMoments moments_in_double<element>(const Nest&, const char*, bool);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
