// Points of the unit circle for the SIGReg op's CUDA kernels: cos and sin of t p.
//
// sincosf has a slow path for huge angles that takes local memory, and here t is known beforehand:
// in quarter turns, as the sum of two floats, the angle is reduced exactly by fused multiply-adds,
// so that what is left of it is as good as p itself. About 25 operations, none of them a
// conversion.
#pragma once

#include "common/cuda/columns.cuh"
#include "sigreg/formula.h"

namespace sigreg {
namespace kernels {

using namespace common;

// t as what multiplies p to give quarter turns: high + low = t 2 / pi.
struct Turns {
  float high, low;
};

inline Turns turns_of(double t) {
  const double quarters = t * 0.63661977236758134308;
  const float high = static_cast<float>(quarters);
  return {high, static_cast<float>(quarters - high)};
}

__device__ __forceinline__ uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Right to about one unit in the last place up to 2^22 quarter turns. Beyond, an angle in float32
// says nothing, and the answer is some point of about the circle; NaN and infinity give NaN.
__device__ __forceinline__ Unit<float> circle(float p, Turns t) {
  constexpr float kShift = 0x1.8p23f;  // leaves the nearest integer in the low bits
  const float shifted = fmaf(p, t.high, kShift);
  float rest = fmaf(p, t.low, fmaf(p, t.high, kShift - shifted));
  rest = rest > 1.f ? 1.f : rest < -1.f ? -1.f : rest;
  const float x = rest * 1.5707963267948966f, y = x * x;
  float sine = fmaf(y, -1.9515295891e-4f, 8.3321608736e-3f);
  sine = fmaf(y, sine, -1.6666654611e-1f);
  sine = fmaf(x * y, sine, x);
  float cosine = fmaf(y, 2.443315711809948e-5f, -1.388731625493765e-3f);
  cosine = fmaf(y, cosine, 4.166664568298827e-2f);
  cosine = fmaf(y * y, cosine, fmaf(y, -0.5f, 1.f));
  const uint32_t quarter = bits_of(shifted);
  const float c = quarter & 1u ? sine : cosine, s = quarter & 1u ? cosine : sine;
  return {(quarter + 1u) & 2u ? -c : c, quarter & 2u ? -s : s};
}

}  // namespace kernels
}  // namespace sigreg
