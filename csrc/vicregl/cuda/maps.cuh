// How the CUDA kernels reach feature maps [V, B, L, C] of any strides.
#pragma once

#include "common/cuda/columns.cuh"
#include "vicregl/formula.h"

namespace vicregl {
namespace kernels {

using common::kAllLanes;
using common::kLanes;
using common::kThreads;
using common::kWarps;
using common::narrow;
using common::Pack;
using common::warp_sum;
using common::widen;

template <typename T>
struct Maps {
  const T* data;
  int64_t view, sample, row, column;

  __device__ __forceinline__ const T* at(int64_t v, int64_t n, int64_t position) const {
    return data + v * view + n * sample + position * row;
  }
};

// The same, of a dtype that only the launch knows: 0 float32, 1 float16, 2 bfloat16.
struct AnyMaps {
  const void* data;
  int64_t view, sample, row, column;
  int dtype;

  __device__ __forceinline__ int64_t at(int64_t v, int64_t n, int64_t position) const {
    return v * view + n * sample + position * row;
  }
};

// Every view of a with every view of b; s = (u V + v) B + n numbers pairs of views and samples.
struct Shape {
  int64_t views_a, views_b, batch, rows_a, rows_b, channels;

  __host__ __device__ int64_t samples() const { return views_a * views_b * batch; }
};

// Elements an access moves: 16 bytes' worth where every row is aligned for them, else one.
template <typename T, bool Vectors>
constexpr int kWidth = Vectors ? 16 / static_cast<int>(sizeof(T)) : 1;

// out = W adjacent elements.
template <int W, typename T>
__device__ __forceinline__ void load(const T* from, float (&out)[W]) {
  if constexpr (W == 1) {
    out[0] = widen(*from);
  } else {
    const auto pack = Pack<T, W>::read(from);
#pragma unroll
    for (int w = 0; w < W; ++w) out[w] = widen(pack.values[w]);
  }
}

template <int W>
__device__ __forceinline__ void load(const AnyMaps& z, int64_t at, float (&out)[W]) {
  if (z.dtype == 0) {
    load(static_cast<const float*>(z.data) + at, out);
  } else if (z.dtype == 1) {
    load(static_cast<const __half*>(z.data) + at, out);
  } else {
    load(static_cast<const __nv_bfloat16*>(z.data) + at, out);
  }
}

template <int W, typename T>
__device__ __forceinline__ void store(T* to, const float (&in)[W]) {
  if constexpr (W == 1) {
    *to = narrow<T>(in[0]);
  } else {
    Pack<T, W> pack;
#pragma unroll
    for (int w = 0; w < W; ++w) pack.values[w] = narrow<T>(in[w]);
    pack.write(to);
  }
}

}  // namespace kernels
}  // namespace vicregl
