// Elements as float32, one or several adjacent ones at a time, by accesses of 16 or 8 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "common/cuda/launch.h"

namespace common {

__device__ __forceinline__ float widen(float value) { return value; }
__device__ __forceinline__ float widen(__half value) { return __half2float(value); }
__device__ __forceinline__ float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T narrow(float value);
template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// N adjacent elements, moved by one access of 16 or 8 bytes.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
  T values[N];

  using Bits = std::conditional_t<N * sizeof(T) == 16, uint4, uint2>;
  __device__ __forceinline__ static Pack read(const T* from) {
    static_assert(sizeof(Bits) == sizeof(Pack));
    const Bits bits = *reinterpret_cast<const Bits*>(from);
    Pack result;
    memcpy(&result, &bits, sizeof bits);
    return result;
  }
  __device__ __forceinline__ void write(T* to) const {
    Bits bits;
    memcpy(&bits, this, sizeof bits);
    __stwb(reinterpret_cast<Bits*>(to), bits);  // an assignment is split into scalar stores
  }
};

namespace pieces {

// Elements of an access: 16 bytes' worth where every row is aligned for it, else one.
template <typename T, bool Vectors>
constexpr int kWidth = Vectors ? 16 / static_cast<int>(sizeof(T)) : 1;

// Elements of an access that moves W of them, or a part of them.
template <int W, typename T>
constexpr int kPart = W * sizeof(T) < 16 ? W : 16 / static_cast<int>(sizeof(T));

// W elements from or to an address: one, or 8 bytes' worth, or some times 16.
template <int W, typename T>
__device__ __forceinline__ void load(const T* from, float (&out)[W]) {
  if constexpr (W == 1) {
    out[0] = widen(*from);
  } else {
    constexpr int N = kPart<W, T>;
#pragma unroll
    for (int part = 0; part < W; part += N) {
      const auto pack = Pack<T, N>::read(from + part);
#pragma unroll
      for (int w = 0; w < N; ++w) out[part + w] = widen(pack.values[w]);
    }
  }
}

template <int W, typename T>
__device__ __forceinline__ void store(T* to, const float (&in)[W]) {
  if constexpr (W == 1) {
    *to = narrow<T>(in[0]);
  } else {
    constexpr int N = kPart<W, T>;
#pragma unroll
    for (int part = 0; part < W; part += N) {
      Pack<T, N> pack;
#pragma unroll
      for (int w = 0; w < N; ++w) pack.values[w] = narrow<T>(in[part + w]);
      pack.write(to + part);
    }
  }
}

// The same from element `at` of a tensor on, whose dtype only the launch knows, as dtype_code.
template <int W>
__device__ __forceinline__ void load(const void* data, int dtype, int64_t at, float (&out)[W]) {
  if (dtype == 0) {
    load(static_cast<const float*>(data) + at, out);
  } else if (dtype == 1) {
    load(static_cast<const __half*>(data) + at, out);
  } else {
    load(static_cast<const __nv_bfloat16*>(data) + at, out);
  }
}

template <int W>
__device__ __forceinline__ void store(void* data, int dtype, int64_t at, const float (&in)[W]) {
  if (dtype == 0) {
    store(static_cast<float*>(data) + at, in);
  } else if (dtype == 1) {
    store(static_cast<__half*>(data) + at, in);
  } else {
    store(static_cast<__nv_bfloat16*>(data) + at, in);
  }
}

}  // namespace pieces
}  // namespace common
