// The mark of functions that host and device share. They are inline; on a device always inlined, since an argument by
// reference would else have to lie in memory.
#pragma once

#if defined(__CUDACC__)
#define NORMKIT_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define NORMKIT_HOST_DEVICE inline
#endif
