// The per-element maths of the EMA op, written once for the CPU, CUDA and emulator builds.
//
// Every backend must give the same bits, because stochastic rounding turns a last-bit difference
// into a whole step of a half type. So each operation is rounded by itself: no fused multiply-add.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/inline.h"

// GCC would contract a product and a sum into one operation. Not popped at the end: a function that
// is compiled with other options than its caller is not inlined.
#if defined(__GNUC__) && !defined(__clang__) && !defined(__CUDACC__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace ema {

KERNELS_INLINE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

KERNELS_INLINE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// new target = (near ? target : online) + factor * (online - target): a linear interpolation from
// the nearer end, exact at momentum 1 (factor 0, near the target) and 0 (factor 0, at the online).
struct Blend {
  float factor;
  bool near;
};

KERNELS_INLINE Blend blend(double momentum) {
  const double weight = 1.0 - momentum;
  if (weight < 0.5) return {static_cast<float>(weight), true};
  return {static_cast<float>(-momentum), false};
}

KERNELS_INLINE float interpolate(float target, float online, const Blend& blend) {
  const float base = blend.near ? target : online;
#ifdef __CUDA_ARCH__
  return __fadd_rn(base, __fmul_rn(blend.factor, __fsub_rn(online, target)));
#else
  return base + blend.factor * (online - target);
#endif
}

// Philox4x32-10 (Salmon et al., 2011): 128 random bits from a 128-bit counter and a 64-bit key.
struct Words {
  uint32_t x, y, z, w;
};

KERNELS_INLINE Words philox(Words counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * counter.x;
    const uint64_t second = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {static_cast<uint32_t>(second >> 32) ^ counter.y ^ key0,
               static_cast<uint32_t>(second),
               static_cast<uint32_t>(first >> 32) ^ counter.w ^ key1,
               static_cast<uint32_t>(first)};
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Elements that share one draw: 16 bits each, the low half of a word first.
constexpr int kGroup = 8;

// The draw of elements 8 group to 8 group + 7 of a tensor.
KERNELS_INLINE Words draw(uint64_t seed, uint64_t step, uint32_t tensor, uint64_t group) {
  const uint32_t high = static_cast<uint32_t>(group >> 32 & 0xffffu) |
                        static_cast<uint32_t>(step >> 32 & 0xffffu) << 16;
  return philox({static_cast<uint32_t>(group), high, tensor, static_cast<uint32_t>(step)},
                static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// bfloat16 bits of value, up with the probability of what truncation would drop. random: 16 bits.
KERNELS_INLINE uint16_t stochastic_bfloat16(float value, uint32_t random) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : bits + random;
  return static_cast<uint16_t>(rounded >> 16);
}

// The same to float16. Below 2^-14 its step is 2^-24 whatever the exponent.
KERNELS_INLINE uint16_t stochastic_float16(float value, uint32_t random) {
  const uint32_t bits = bits_of(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
  // Normal: 13 bits of the mantissa go, and the exponent is rebased from 127 to 15.
  const uint32_t rounded = size + (random >> 3);
  const uint32_t normal = rounded >= 0x47800000u ? 0x7c00u : (rounded - 0x38000000u) >> 13;
  // Subnormal: whole steps, and what is left against 16 bits. The clamp keeps the conversion defined.
  const float steps = (size < 0x38800000u ? float_of(size) : 0.f) * 16777216.f;
  const int32_t whole = static_cast<int32_t>(steps);
  const int32_t rest = static_cast<int32_t>((steps - static_cast<float>(whole)) * 65536.f);
  const uint32_t subnormal =
      static_cast<uint32_t>(whole) + (static_cast<int32_t>(random) < rest ? 1u : 0u);
  const uint32_t finite = size < 0x38800000u ? subnormal : normal;
  return static_cast<uint16_t>(size > 0x7f800000u ? 0x7e00u : sign | finite);
}

// To nearest, ties to even.
KERNELS_INLINE uint16_t nearest_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  const uint32_t rounded = (bits & 0x7fffffffu) > 0x7f800000u
                               ? 0x7fc00000u
                               : bits + 0x7fffu + (bits >> 16 & 1u);
  return static_cast<uint16_t>(rounded >> 16);
}

}  // namespace ema
