// Pieces of contiguous rows: W adjacent elements as float32, by accesses of 16 bytes.
#pragma once

#include "common/cuda/columns.cuh"

namespace common {
namespace pieces {

template <typename T, bool Vectors>
constexpr int kWidth = Vectors ? 16 / static_cast<int>(sizeof(T)) : 1;

// W elements from or to an address: accesses of 16 bytes where W is 16 bytes' worth or more.
template <int W, typename T>
__device__ __forceinline__ void load(const T* from, float (&out)[W]) {
  constexpr int N = 16 / static_cast<int>(sizeof(T));
  if constexpr (W % N == 0) {
#pragma unroll
    for (int part = 0; part < W; part += N) {
      const auto pack = Pack<T, N>::read(from + part);
#pragma unroll
      for (int w = 0; w < N; ++w) out[part + w] = widen(pack.values[w]);
    }
  } else {
    static_assert(W == 1);
    out[0] = widen(*from);
  }
}

template <int W, typename T>
__device__ __forceinline__ void store(T* to, const float (&in)[W]) {
  constexpr int N = 16 / static_cast<int>(sizeof(T));
  if constexpr (W % N == 0) {
#pragma unroll
    for (int part = 0; part < W; part += N) {
      Pack<T, N> pack;
#pragma unroll
      for (int w = 0; w < N; ++w) pack.values[w] = narrow<T>(in[part + w]);
      pack.write(to + part);
    }
  } else {
    static_assert(W == 1);
    *to = narrow<T>(in[0]);
  }
}

}  // namespace pieces
}  // namespace common
