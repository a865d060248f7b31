// Where a planned launch meets its kernel. Each of the .cu files starts some of them.
#pragma once

#include "launch.h"
#include "normkit/cuda.h"

namespace normkit::cuda {

void start_rows_forward(const Launch& launch, const Launches& all, Stream stream);
void start_rows_backward(const Launch& launch, const Launches& all, Stream stream);
void start_columns(const Launch& launch, const Launches& all, Stream stream);
void start_sets(const Launch& launch, const Launches& all, Stream stream);

inline void start(const Launch& launch, const Launches& all, Stream stream) {
    switch (launch.kernel) {
        case Kernel::rows_forward:
        case Kernel::rows_forward_shared:
        case Kernel::rows_moments:
        case Kernel::rows_apply: return start_rows_forward(launch, all, stream);
        case Kernel::rows_backward:
        case Kernel::rows_backward_shared:
        case Kernel::rows_sums:
        case Kernel::rows_dx: return start_rows_backward(launch, all, stream);
        case Kernel::columns_moments:
        case Kernel::columns_apply:
        case Kernel::columns_sums:
        case Kernel::columns_dx: return start_columns(launch, all, stream);
        default: return start_sets(launch, all, stream);
    }
}

#if defined(__CUDACC__) || defined(CUDART_VERSION)

// Throws where the driver does not take a call.
void check(cudaError_t error, const char* what);

template <class... Arguments>
void run(void (*kernel)(Arguments...), const Launch& launch, const Launches& all, Stream stream,
         Arguments... arguments) {
    static_assert((sizeof(Arguments) + ...) <= 4096, "more than every driver passes to a kernel");
    const void* const entry = reinterpret_cast<const void*>(kernel);
    constexpr int kAlwaysThere = 48 * 1024;
    if (launch.shared > kAlwaysThere) {
        // The limit of the kernel, not of this launch: another thread may be about to launch it with more.
        check(cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(all.shared_bytes)),
              name_of(launch.kernel));
    }
    void* pointers[] = {&arguments...};
    check(cudaLaunchKernel(entry, dim3(static_cast<unsigned>(launch.grid)), dim3(static_cast<unsigned>(launch.threads)),
                           pointers, static_cast<std::size_t>(launch.shared), static_cast<cudaStream_t>(stream)),
          name_of(launch.kernel));
}

#endif

}  // namespace normkit::cuda
