// Rotary position alone, for every dtype and length: one pass, a warp a token and all its heads, so
// that the token's place is worked out once. Bytes: the input once, the output once.
#pragma once

#include "attention/cuda/problem.cuh"

namespace attention::kernels {

template <typename T>
struct RotateArguments {
  Heads<T> x;
  T* out;  // [B, T, H, d]
  Rope rope;
  const int* offsets;  // of packed samples, null where there are none or the rope has an index
  int64_t batches, heads, tokens;
  int samples, dim;
  bool adjoint;
};

// The place of a packed token in its sample, the last one that begins at or before it. Of empty
// samples that begin there too the last is taken, which holds it.
__device__ __forceinline__ int place_in_sample(const int* offsets, int samples, int64_t token) {
  int low = 0, high = samples;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (offsets[middle] <= token ? low : high) = middle;
  }
  return static_cast<int>(token - offsets[low]);
}

// Elements that a lane turns at once: 16 bytes.
template <typename T>
constexpr int kTurned = 16 / static_cast<int>(sizeof(T));

template <typename T, bool Vectors>
__global__ void __launch_bounds__(common::kThreads)
    attention_rotate(const RotateArguments<T> a) {
  using Values = common::Pack<T, kTurned<T>>;
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t warps = int64_t{gridDim.x} * common::kWarps;
  const int vectors = a.dim / kTurned<T>;
  const int64_t count = a.heads * vectors;
  int64_t row = int64_t{blockIdx.x} * common::kWarps + threadIdx.x / kLanes;
  for (; row < a.batches * a.tokens; row += warps) {
    const int64_t batch = row / a.tokens, token = row - batch * a.tokens;
    int64_t place = token;
    if (a.rope.q_index != nullptr) {
      place = a.rope.q_index[batch * a.rope.q_index_stride + token];
    } else if (a.offsets != nullptr) {
      place = place_in_sample(a.offsets, a.samples, token);
    }
    const Rows rows = table_rows(a.rope.grid, a.rope.axes, place);
    for (int64_t i = lane; i < count; i += kLanes) {
      const int64_t head = i / vectors;
      const int column = static_cast<int>(i - head * vectors) * kTurned<T>;
      const T* from = a.x.at(batch, head, token) + column * a.x.column;
      Values values;
      if constexpr (Vectors) {
        values = Values::read(from);
      } else {
#pragma unroll
        for (int n = 0; n < kTurned<T>; ++n) values.values[n] = from[n * a.x.column];
      }
#pragma unroll
      for (int n = 0; n < kTurned<T>; n += 2) {
        float even = common::widen(values.values[n]), odd = common::widen(values.values[n + 1]);
        a.rope.turn_pair(even, odd, rows, column + n, a.adjoint);
        values.values[n] = common::narrow<T>(even);
        values.values[n + 1] = common::narrow<T>(odd);
      }
      values.write(a.out + (row * a.heads + head) * a.dim + column);
    }
  }
}

}  // namespace attention::kernels
