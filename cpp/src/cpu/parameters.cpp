#include <cstring>

#include "walks.h"

namespace normkit::cpu {

template <class T>
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
    const Tiles tiles(summed, 0);
    parallel_for(index.size(), threads, [&](index_t i) {
        const Offsets parameter = index.offsets(i);
        Sums sums;
        for (index_t t = 0; t < tiles.count(); ++t) {
            const Tiles::Tile tile = tiles[t];
            const Offsets at = parameter + tile.at;
            for (index_t r = 0; r < tile.rows; ++r) {
                const char* x = call.x + at[kX] + r * tiles.rows.stride[kX];
                const char* dy = call.dy + at[kDy] + r * tiles.rows.stride[kDy];
                index_t statistic = at[kStatistic] + r * tiles.rows.stride[kStatistic];
                for (index_t l = 0; l < tile.lanes; ++l) {
                    T xv, dyv;
                    std::memcpy(&xv, x, sizeof xv);
                    std::memcpy(&dyv, dy, sizeof dyv);
                    const double mean = call.mean ? call.mean[statistic] : 0;
                    sums.g += dyv;
                    sums.g_xhat += dyv * ((xv - mean) * call.rstd[statistic]);
                    x += tiles.lanes.stride[kX];
                    dy += tiles.lanes.stride[kDy];
                    statistic += tiles.lanes.stride[kStatistic];
                }
            }
        }
        write_parameter(call, parameter[kGradient], sums);
    });
}

template void sum_parameters<float>(const Plan&, const BackwardCall&, int);

}  // namespace normkit::cpu
