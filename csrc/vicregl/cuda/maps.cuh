// How the CUDA kernels reach feature maps [V, B, L, C] of any strides.
#pragma once

#include "common/cuda/columns.cuh"
#include "vicregl/formula.h"

namespace vicregl {
namespace kernels {

using common::first_row, common::lane, common::row_step, common::warp, common::warp_sum;
using common::kAllLanes, common::kLanes, common::kThreads, common::kWarps;
using common::pieces::kWidth, common::pieces::load, common::pieces::store;

template <typename T>
struct Maps {
  const T* data;
  int64_t view, sample, row, column;

  __device__ __forceinline__ const T* at(int64_t v, int64_t n, int64_t position) const {
    return data + v * view + n * sample + position * row;
  }
};

// The same, of a dtype that only the launch knows.
struct AnyMaps {
  const void* data;
  int64_t view, sample, row, column;
  int dtype;  // as common::dtype_code

  __device__ __forceinline__ int64_t at(int64_t v, int64_t n, int64_t position) const {
    return v * view + n * sample + position * row;
  }
};

// Every view of a with every view of b; s = (u V + v) B + n numbers pairs of views and samples.
struct Shape {
  int64_t views_a, views_b, batch, rows_a, rows_b, channels;

  __host__ __device__ int64_t samples() const { return views_a * views_b * batch; }
};

}  // namespace kernels
}  // namespace vicregl
