// Copies of 16 bytes from global to shared memory that take no registers (sm_80 and later).
//
// Under the emulator the target holds NaN until its thread waits, so that a missing wait shows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#ifndef __CUDACC__
#include <vector>
#endif

namespace common {

#ifdef __CUDACC__

// Both addresses are multiples of 16; not `valid`: zeros, and nothing is read.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

// The calling thread's copies are done, and it sees them; others do after a barrier.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

#else

namespace emulated {

struct Copy {
  void* to;
  uint4 value;
};

// Of the calling thread.
inline std::vector<Copy>& pending() {
  static std::vector<Copy> threads[1024];
  return threads[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
}

}  // namespace emulated

inline void copy_async(void* shared, const void* global, bool valid) {
  const uint4 value = valid ? *static_cast<const uint4*>(global) : uint4{0, 0, 0, 0};
  emulated::pending().push_back({shared, value});
  *static_cast<uint4*>(shared) = {~0u, ~0u, ~0u, ~0u};
}

inline void wait_for_copies() {
  for (const emulated::Copy& copy : emulated::pending()) *static_cast<uint4*>(copy.to) = copy.value;
  emulated::pending().clear();
}

#endif

}  // namespace common
