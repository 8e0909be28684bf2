// How the CUDA kernels of adaptive layer norm reach their elements, W adjacent ones at a time.
#pragma once

#include "common/cuda/columns.cuh"
#include "common/divider.h"

namespace adaln {
namespace kernels {

using common::Divider;
using common::kLanes;
using common::kThreads;
using common::kWarps;
using common::narrow;
using common::warp_sum;
using common::widen;

struct Place {
  int64_t frame, token, column;  // strides, in elements
};

// [G, T, D] of dtype T: rows that allow accesses of 16 bytes or, W = 1, of any strides.
template <int Width, typename T>
struct Typed {
  static constexpr int W = Width;
  T* data;
  Place place;

  __device__ __forceinline__ T* at(int64_t frame, int64_t token, int64_t column) const {
    if constexpr (W == 1) column *= place.column;
    return data + frame * place.frame + token * place.token + column;
  }
  __device__ __forceinline__ void read(int64_t frame, int64_t token, int64_t column,
                                       float (&out)[W]) const {
    common::pieces::load<W>(at(frame, token, column), out);
  }
  __device__ __forceinline__ void write(int64_t frame, int64_t token, int64_t column,
                                        const float (&in)[W]) const {
    common::pieces::store<W>(at(frame, token, column), in);
  }
};

// [G, D] of dtype T or float32 (`wide`), likewise.
template <int Width, typename T>
struct Vector {
  static constexpr int W = Width;
  void* data;
  Place place;
  bool wide;

  __device__ __forceinline__ int64_t at(int64_t frame, int64_t column) const {
    if constexpr (W == 1) column *= place.column;
    return frame * place.frame + column;
  }
  __device__ __forceinline__ void read(int64_t frame, int64_t column, float (&out)[W]) const {
    const int64_t at = this->at(frame, column);
    if (wide) {
      common::pieces::load<W>(static_cast<const float*>(data) + at, out);
    } else {
      common::pieces::load<W>(static_cast<const T*>(data) + at, out);
    }
  }
  __device__ __forceinline__ void write(int64_t frame, int64_t column, const float (&in)[W]) const {
    const int64_t at = this->at(frame, column);
    if (wide) {
      common::pieces::store<W>(static_cast<float*>(data) + at, in);
    } else {
      common::pieces::store<W>(static_cast<T*>(data) + at, in);
    }
  }
};

// Either, of any dtype and strides: for kernels that keep one element a lane.
struct Strided {
  static constexpr int W = 1;
  void* data;
  Place place;
  int dtype;  // as common::dtype_code

  __device__ __forceinline__ int64_t at(int64_t frame, int64_t token, int64_t column) const {
    return frame * place.frame + token * place.token + column * place.column;
  }
  __device__ __forceinline__ void read(int64_t frame, int64_t token, int64_t column,
                                       float (&out)[W]) const {
    common::pieces::load(data, dtype, at(frame, token, column), out);
  }
  __device__ __forceinline__ void write(int64_t frame, int64_t token, int64_t column,
                                        const float (&in)[W]) const {
    common::pieces::store(data, dtype, at(frame, token, column), in);
  }
  __device__ __forceinline__ void read(int64_t frame, int64_t column, float (&out)[W]) const {
    read(frame, 0, column, out);
  }
  __device__ __forceinline__ void write(int64_t frame, int64_t column, const float (&in)[W]) const {
    write(frame, 0, column, in);
  }
};

// What a block works on: tokens [begin, end) of a frame, or, where a frame has one token, of all.
struct Cut {
  int64_t frames, tokens, dim;
  Divider parts;  // blocks a frame
  int64_t part_tokens;

  template <bool Frames>
  __device__ __forceinline__ void range(int64_t block, int64_t& frame, int64_t& begin,
                                        int64_t& end) const {
    int64_t part = block;
    frame = Frames ? parts.divide(block, part) : 0;
    const int64_t all = Frames ? tokens : frames;
    begin = part * part_tokens;
    end = min(all, begin + part_tokens);
  }
};

// One thread a column: the sums of a frame's blocks in their order. sums: [frames * parts, dim].
template <typename T>
__global__ void __launch_bounds__(kThreads)
    finish_vectors(const float* sums, int64_t frames, Divider columns, int64_t parts, T* out) {
  const int64_t count = frames * columns.by;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < count;
       i += int64_t{gridDim.x} * kThreads) {
    int64_t column;
    const int64_t frame = columns.divide(i, column);
    const float* own = sums + frame * parts * columns.by + column;
    float total = 0.f;
    for (int64_t part = 0; part < parts; ++part) total += own[part * columns.by];
    out[i] = narrow<T>(total);
  }
}

}  // namespace kernels
}  // namespace adaln
