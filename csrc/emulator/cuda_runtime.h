// A drop-in <cuda_runtime.h> that lets g++ compile and run a .cu file's kernels on the CPU.
//
//   g++ -x c++ -I csrc/emulator -I csrc op/cuda.cu
//
// Launches go through common/cuda/launch.h, which is <<<>>> under nvcc and emulator::launch here.
// scheduler.h says how blocks, barriers and shared memory behave. Shared memory is declared with
// SHARED_ARRAY or DYNAMIC_SHARED, which common/cuda/launch.h defines for nvcc: a plain __shared__
// array also works, but is neither refilled with NaN for each block nor counted towards the 48 KiB.
//
// EMULATOR_SEED             order of blocks and threads
// EMULATOR_MULTIPROCESSORS  what the device says it has (4)
// EMULATOR_SHARED           bytes of shared memory that it gives a block (227 KiB)
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "scheduler.h"

#define __global__ [[maybe_unused]] static
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
#define __shared__ static
#define SHARED_ARRAY(type, name, count) \
  static char name##_key;               \
  type* const name = emulator::shared_array<type>(&name##_key, count)
#define DYNAMIC_SHARED(type, name) \
  type* const name = static_cast<type*>(emulator::Scheduler::instance().dynamic_shared())

using std::max;
using std::min;

// Vector types may alias what they are read from, as nvcc allows.
struct __attribute__((may_alias, aligned(8))) float2 {
  float x, y;
};
struct __attribute__((may_alias, aligned(16))) float4 {
  float x, y, z, w;
};
struct __attribute__((may_alias, aligned(8))) uint2 {
  unsigned x, y;
};
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;
};
struct __attribute__((may_alias, aligned(16))) int4 {
  int x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }


#define __syncthreads() \
  static_cast<void>(emulator::Scheduler::instance().wait_block(__FILE__, __LINE__))
#define __syncthreads_and(predicate) \
  static_cast<int>(emulator::Scheduler::instance().wait_block(__FILE__, __LINE__, (predicate) != 0))
#define __syncwarp(...) emulator::warp_barrier(__FILE__, __LINE__ __VA_OPT__(, ) __VA_ARGS__)
#define __shfl_sync(...) emulator::shuffle(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_xor_sync(...) emulator::shuffle_xor(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_down_sync(...) emulator::shuffle_down(__FILE__, __LINE__, __VA_ARGS__)
#define __shfl_up_sync(...) emulator::shuffle_up(__FILE__, __LINE__, __VA_ARGS__)
#define __ballot_sync(mask, predicate) emulator::ballot(__FILE__, __LINE__, mask, predicate)
#define __any_sync(mask, predicate) (emulator::ballot(__FILE__, __LINE__, mask, predicate) != 0u)
#define __all_sync(mask, predicate) (emulator::ballot(__FILE__, __LINE__, mask, !(predicate)) == 0u)
#define __threadfence() static_cast<void>(0)
#define __threadfence_block() static_cast<void>(0)

namespace emulator {

inline void warp_barrier(const char* file, int line, unsigned mask = 0xffffffffu) {
  Scheduler::instance().exchange(mask, 0, file, line);
}

// The value that lane `source` gave, one's own where `source` lies outside the segment, and NaN
// where it lies outside the mask, which CUDA leaves undefined.
template <typename T>
T shuffle_from(const char* file, int line, unsigned mask, T value, int source, bool inside) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = Scheduler::instance().exchange(mask, bits, file, line);
  if (inside) {
    bits = mask >> source & 1u ? all[source] : ~uint64_t{0};
    std::memcpy(&value, &bits, sizeof(T));
  }
  return value;
}

template <typename T>
T shuffle(const char* file, int line, unsigned mask, T value, int source, int width = 32) {
  const int lane = static_cast<int>(Scheduler::instance().lane());
  return shuffle_from(file, line, mask, value, lane / width * width + source % width, true);
}

template <typename T>
T shuffle_xor(const char* file, int line, unsigned mask, T value, int bits, int width = 32) {
  const int lane = static_cast<int>(Scheduler::instance().lane()), source = lane ^ bits;
  return shuffle_from(file, line, mask, value, source, source < lane / width * width + width);
}

template <typename T>
T shuffle_down(const char* file, int line, unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = static_cast<int>(Scheduler::instance().lane());
  const int source = lane + static_cast<int>(by);
  return shuffle_from(file, line, mask, value, source, source < lane / width * width + width);
}

template <typename T>
T shuffle_up(const char* file, int line, unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = static_cast<int>(Scheduler::instance().lane());
  const int source = lane - static_cast<int>(by);
  return shuffle_from(file, line, mask, value, source, source >= lane / width * width);
}

inline unsigned ballot(const char* file, int line, unsigned mask, int predicate) {
  const uint64_t* all = Scheduler::instance().exchange(mask, predicate != 0, file, line);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (mask >> lane & 1u) bits |= static_cast<unsigned>(all[lane] == 1) << lane;
  }
  return bits;
}

inline void launch(dim3 grid, dim3 block, size_t dynamic, const std::function<void()>& body) {
  Scheduler::instance().launch(grid, block, dynamic, body);
}

}  // namespace emulator


template <typename T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <typename T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = std::max(old, value);
  return old;
}
template <typename T>
T atomicMin(T* address, T value) {
  const T old = *address;
  *address = std::min(old, value);
  return old;
}
template <typename T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <typename T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
void __stwb(T* address, T value) {
  *address = value;
}


using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97
};
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };

inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute == cudaDevAttrMultiProcessorCount) {
    *value = static_cast<int>(emulator::setting("EMULATOR_MULTIPROCESSORS", 4));
  } else if (attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin) {
    *value = static_cast<int>(emulator::setting("EMULATOR_SHARED", emulator::kMaximalShared));
  } else {
    return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* target, const void* source, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  std::memcpy(target, source, bytes);
  return cudaSuccess;
}
