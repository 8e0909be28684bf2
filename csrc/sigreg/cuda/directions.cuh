// Random unit directions: Philox, Box-Muller, and each column divided by its length.
#pragma once

#include "sigreg/cuda/circle.cuh"

namespace sigreg {
namespace kernels {

// Columns of a block: 32 bytes of a row, the least that memory writes.
constexpr int kDrawn = 8;
constexpr int kDrawers = kThreads / kDrawn;

// Four normals; group over [slices, ceil(dim / 4)].
__device__ __forceinline__ void normals(uint64_t seed, uint64_t step, uint64_t group,
                                        float (&out)[4]) {
  uint32_t words[4] = {static_cast<uint32_t>(group), static_cast<uint32_t>(group >> 32),
                       static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)};
  philox(words, static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const float length = radius(uniform(words[i]));
    const Unit<float> angle = circle(uniform(words[i + 1]), {4.f, 0.f});  // 2 pi u
    out[i] = length * angle.c;
    out[i + 1] = length * angle.s;
  }
}

// out [dim, slices]; step: 0-d, or null and `number` is the step. Lanes lie along M, 8 columns to a block, so that whole sectors are written.
// The normals are drawn twice, once for the lengths: about 2 us of arithmetic at 512 x 1024, where
// they would take as long to memory and back.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    draw_directions(const int64_t* step, int64_t number, uint64_t seed, int64_t dim,
                    int64_t slices, T* out) {
  SHARED_ARRAY(float, squares, kThreads);
  const int column = threadIdx.x % kDrawn, drawer = threadIdx.x / kDrawn;
  const int64_t m = int64_t{blockIdx.x} * kDrawn + column, groups = groups_of(dim);
  const uint64_t now = static_cast<uint64_t>(step == nullptr ? number : *step);
  float square = 0.f;
  if (m < slices) {
    for (int64_t group = drawer; group < groups; group += kDrawers) {
      float drawn[4];
      normals(seed, now, static_cast<uint64_t>(m * groups + group), drawn);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * group + i < dim) square += drawn[i] * drawn[i];
      }
    }
  }
  squares[threadIdx.x] = square;
  __syncthreads();
  if (m >= slices) return;
  float total = 0.f;
  for (int i = 0; i < kDrawers; ++i) total += squares[i * kDrawn + column];
  const float length = std::sqrt(total);
  for (int64_t group = drawer; group < groups; group += kDrawers) {
    float drawn[4];
    normals(seed, now, static_cast<uint64_t>(m * groups + group), drawn);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t d = 4 * group + i;
      if (d < dim) out[d * slices + m] = narrow<T>(drawn[i] / length);
    }
  }
}

}  // namespace kernels
}  // namespace sigreg
