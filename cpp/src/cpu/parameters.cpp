#include "walks.h"

namespace normkit::cpu {

template <class X>
void sum_parameters(const Plan& plan, const BackwardCall& call, int threads) {
    // Every axis either tells parameters apart or is summed.
    Nest index, summed;
    Nest own;
    if (plan.walk == Walk::columns) {
        own.push(plan.lane);
        own.push(plan.merge);
    }
    for (const Nest* nest : {&plan.kept, &plan.runs, plan.walk == Walk::rows ? &plan.run : &own}) {
        for (int i = 0; i < nest->n; ++i) {
            (nest->axis[i].stride[kGradient] != 0 ? index : summed).push(nest->axis[i]);
        }
    }
    summed = collapse(summed, bit(kX) | bit(kDy) | bit(kStatistic));
    const Tiles tiles(summed, kLongestPiece);
    parallel_for(index.size(), threads, [&](index_t i) {
        const Offsets parameter = index.offsets(i);
        Sums sums;
        for (index_t t = 0; t < tiles.count() && !gives_up(); ++t) {
            const Tiles::Tile tile = tiles[t];
            const Offsets at = parameter + tile.at;
            for (index_t r = 0; r < tile.rows; ++r) {
                const char* x = call.x + at[kX] + r * tiles.rows.stride[kX];
                const char* dy = call.dy + at[kDy] + r * tiles.rows.stride[kDy];
                index_t statistic = at[kStatistic] + r * tiles.rows.stride[kStatistic];
                for (index_t l = 0; l < tile.lanes; ++l) {
                    const double xv = to_double(read<X>(x)), dyv = to_double(read<X>(dy));
                    const Split<double> s =
                        split<double>({call.mean ? call.mean[statistic] : 0, 0, call.rstd[statistic]});
                    sums.g += dyv;
                    sums.g_xhat += dyv * ((xv * s.scale - s.hi) * s.rstd);
                    x += tiles.lanes.stride[kX];
                    dy += tiles.lanes.stride[kDy];
                    statistic += tiles.lanes.stride[kStatistic];
                }
            }
        }
        write_parameters(call, parameter[kGradient], 1, &sums);
    });
}

#define NORMKIT_INSTANTIATE(name, X, T) template void sum_parameters<X>(const Plan&, const BackwardCall&, int);
NORMKIT_FOR_DTYPES(NORMKIT_INSTANTIATE)

}  // namespace normkit::cpu
