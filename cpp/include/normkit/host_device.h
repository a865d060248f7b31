// Functions of host and device alike. A host compiler sees nothing of it.
#pragma once

#if defined(__CUDACC__)
#define NORMKIT_HOST_DEVICE __host__ __device__
#else
#define NORMKIT_HOST_DEVICE
#endif
