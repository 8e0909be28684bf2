// Copies of 16 or 4 bytes from global to shared memory that take no registers (sm_80 and later).
//
// Under the emulator the target holds NaN until its thread waits, so that a missing wait shows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#ifndef __CUDACC__
#include <stdexcept>
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

// The same of 4 bytes.
__device__ __forceinline__ void copy_word_async(void* shared, const void* global, bool valid) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address), "l"(global),
               "r"(valid ? 4 : 0)
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
  size_t bytes;
};

// Of the calling thread.
inline std::vector<Copy>& pending() {
  static std::vector<Copy> threads[1024];
  return threads[threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)];
}

template <size_t Bytes>
void copy(void* shared, const void* global, bool valid) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % Bytes != 0) {
    throw std::runtime_error("emulator: an asynchronous copy between unaligned addresses");
  }
  Copy made = {shared, {0, 0, 0, 0}, Bytes};
  if (valid) memcpy(&made.value, global, Bytes);
  pending().push_back(made);
  memset(shared, 0xff, Bytes);
}

}  // namespace emulated

inline void copy_async(void* shared, const void* global, bool valid) {
  emulated::copy<16>(shared, global, valid);
}

inline void copy_word_async(void* shared, const void* global, bool valid) {
  emulated::copy<4>(shared, global, valid);
}

inline void wait_for_copies() {
  for (const emulated::Copy& copy : emulated::pending()) memcpy(copy.to, &copy.value, copy.bytes);
  emulated::pending().clear();
}

#endif

}  // namespace common
