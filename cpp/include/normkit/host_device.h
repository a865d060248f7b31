// The mark of functions that host and device share. They are always inlined: on a device since an argument by reference
// would else have to lie in memory, on a host since code that is compiled for an instruction set may not leave a copy
// that the linker takes for everybody.
#pragma once

#if defined(__CUDACC__)
#define NORMKIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NORMKIT_HOST_DEVICE inline __attribute__((always_inline))
#endif
