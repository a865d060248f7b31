#include "rows.h"
#include "start.h"

namespace normkit::cuda {

void start_rows_backward(const Launch& launch, const Launches& all, Stream stream) {
    with_dtype(all.dtype, [&](auto x) {
        using X = decltype(x);
        switch (launch.kernel) {
            case Kernel::rows_backward: return run(rows_backward<X, false>, launch, all, stream, all.work);
            case Kernel::rows_backward_shared: return run(rows_backward<X, true>, launch, all, stream, all.work);
            case Kernel::rows_sums: return run(rows_sums<X>, launch, all, stream, all.work);
            default: return run(rows_dx<X>, launch, all, stream, all.work);
        }
    });
}

}  // namespace normkit::cuda
