#include "rows.h"
#include "start.h"

namespace normkit::cuda {

void start_rows_forward(const Launch& launch, const Launches& all, Stream stream) {
    with_dtype(all.dtype, [&](auto x) {
        using X = decltype(x);
        switch (launch.kernel) {
            case Kernel::rows_forward: return run(rows_forward<X, false>, launch, all, stream, all.work);
            case Kernel::rows_forward_shared: return run(rows_forward<X, true>, launch, all, stream, all.work);
            case Kernel::rows_moments: return run(rows_moments<X>, launch, all, stream, all.work);
            default: return run(rows_apply<X>, launch, all, stream, all.work);
        }
    });
}

}  // namespace normkit::cuda
