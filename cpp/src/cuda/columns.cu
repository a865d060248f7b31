#include "columns.h"

#include "start.h"

namespace normkit::cuda {

void start_columns(const Launch& launch, const Launches& all, Stream stream) {
    with_dtype(all.dtype, [&](auto x) {
        using X = decltype(x);
        switch (launch.kernel) {
            case Kernel::columns_moments: return run(columns_moments<X>, launch, all, stream, all.work);
            case Kernel::columns_apply: return run(columns_apply<X>, launch, all, stream, all.work);
            case Kernel::columns_sums: return run(columns_sums<X>, launch, all, stream, all.work);
            default: return run(columns_dx<X>, launch, all, stream, all.work);
        }
    });
}

}  // namespace normkit::cuda
