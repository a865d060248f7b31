#include "sets.h"

#include "start.h"

namespace normkit::cuda {

void start_sets(const Launch& launch, const Launches& all, Stream stream) {
    switch (launch.kernel) {
        case Kernel::pack_weight: return run(pack_parameter, launch, all, stream, all.pack[0]);
        case Kernel::pack_bias: return run(pack_parameter, launch, all, stream, all.pack[1]);
        case Kernel::update_running: return run(update_running, launch, all, stream, all.running);
        case Kernel::use_running: return run(use_running, launch, all, stream, all.running);
        case Kernel::fill_with_nan: return run(fill_with_nan, launch, all, stream, all.fill);
        case Kernel::fold_parameters:
            if (all.fold.in_double) return run(fold_parameters<double>, launch, all, stream, all.fold);
            return run(fold_parameters<float>, launch, all, stream, all.fold);
        default: break;
    }
    with_dtype(all.dtype, [&](auto x) {
        using X = decltype(x);
        switch (launch.kernel) {
            case Kernel::finish_sets: return run(finish_sets<X>, launch, all, stream, all.work);
            case Kernel::finish_sums: return run(finish_sums<X>, launch, all, stream, all.work);
            case Kernel::given_statistics: return run(given_statistics<X>, launch, all, stream, all.work);
            default: return run(sum_parameters<X>, launch, all, stream, all.parameters_work, all.fold);
        }
    });
}

}  // namespace normkit::cuda
