// float32 products on the tensor cores as three products of TF32 parts, for one warp; all 32 lanes
// must call together. Instructions of sm_80 that sm_90 and sm_100 run too.
//
// A value is big + small, big its rounding to TF32's 11 bits, small the rest. Then
// a b = big_a big_b + big_a small_b + small_a big_b but for small_a small_b, 2^-22 of it, and what
// the core cuts off small's own bits past the 11th, 2^-21 with either sign.
//
// With g = lane / 4 and t = lane % 4:
//
//   A [16 x 8]  a0: row g, column t     a1: row g + 8   a2, a3: the same, column t + 4
//   B [8 x 8]   b0: row t, column g     b1: row t + 4
//   C [16 x 8]  c0, c1: row g, columns 2t, 2t + 1       c2, c3: row g + 8
//
// The emulator's core ignores the operands' low 13 bits and cuts its sum off towards zero, which is
// the least that a real one promises.
#pragma once

#include <cmath>

#include "common/cuda/mma.cuh"

namespace common {

// The upper 11 bits of a value, rounded to nearest, ties away from zero, as cvt.rna.tf32.f32 does;
// 2 operations where that is one of a slower unit. A NaN whose bits wrap around here is still one in
// the other part.
__device__ __forceinline__ void split_tf32(uint32_t value, uint32_t& big, uint32_t& small) {
  big = (value + 0x1000u) & 0xffffe000u;
  float whole, upper;
  memcpy(&whole, &value, sizeof whole);
  memcpy(&upper, &big, sizeof upper);
  const float rest = whole - upper;
  memcpy(&small, &rest, sizeof small);
}

#ifdef __CUDACC__

// c += a b, of TF32 values.
__device__ __forceinline__ void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#else

namespace emulated {

inline double tf32(uint32_t bits) {
  bits &= 0xffffe000u;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline float toward_zero(double value) {
  const float nearest = static_cast<float>(value);
  return std::fabs(nearest) > std::fabs(value) ? std::nextafter(nearest, 0.f) : nearest;
}

}  // namespace emulated

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = emulator::Scheduler::instance().lane(), g = lane / 4, t = lane % 4;
  double rows[2][8], columns[2][8];  // along the sum, of A's rows and B's columns
  for (unsigned half = 0; half < 2; ++half) {
    const uint64_t* all = emulated::exchange(a[2 * half], a[2 * half + 1], __LINE__);
    for (unsigned k = 0; k < 4; ++k) {
      rows[0][4 * half + k] = emulated::tf32(static_cast<uint32_t>(all[4 * g + k]));
      rows[1][4 * half + k] = emulated::tf32(static_cast<uint32_t>(all[4 * g + k] >> 32));
    }
  }
  const uint64_t* all = emulated::exchange(b0, b1, __LINE__);
  for (unsigned column = 0; column < 2; ++column) {
    for (unsigned k = 0; k < 4; ++k) {
      const uint64_t both = all[4 * (2 * t + column) + k];
      columns[column][k] = emulated::tf32(static_cast<uint32_t>(both));
      columns[column][4 + k] = emulated::tf32(static_cast<uint32_t>(both >> 32));
    }
  }
  for (int i = 0; i < 4; ++i) {
    double sum = c[i];
    for (int k = 0; k < 8; ++k) sum += rows[i / 2][k] * columns[i % 2][k];
    c[i] = emulated::toward_zero(sum);
  }
}

#endif

}  // namespace common
