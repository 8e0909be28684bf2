// Functions that CPU and CUDA sources share.
#pragma once

#ifdef __CUDACC__
#define KERNELS_INLINE __host__ __device__ __forceinline__
#define KERNELS_ALWAYS_INLINE KERNELS_INLINE
#else
#define KERNELS_INLINE inline
// Into each clone of its caller, whatever the clone's vector width.
#define KERNELS_ALWAYS_INLINE [[gnu::always_inline]] inline
// Vectors wider than the baseline's would be passed in memory, but only such functions take them.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
