// The tensor cores' 16 x 8 x 16 product of bfloat16 or float16 and the loads that feed it, for one
// warp; all 32 lanes must call together. Instructions of sm_80 that sm_90 and sm_100 run too.
//
// With g = lane / 4 and t = lane % 4, and two adjacent elements in a register, lower one first:
//
//   A [16 x 16]  a0: row g, columns 2t   a1: row g + 8   a2, a3: the same, columns 2t + 8
//   B [16 x 8]   b0: rows 2t, column g   b1: rows 2t + 8
//   C [16 x 8]   c0, c1: row g, columns 2t, 2t + 1       c2, c3: row g + 8
//
// So the results of two neighbouring products, packed, are the A operand of the next one.
// Under the emulator the lanes hand each other these registers and multiply on the host, so that
// code with another layout in mind gets wrong numbers.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace common {

template <typename T>
constexpr bool kIsBfloat = std::is_same_v<T, __nv_bfloat16>;

// Two values rounded into one register, and back.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  uint32_t bits;
#ifdef __CUDACC__
  if constexpr (kIsBfloat<T>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    memcpy(&bits, &both, sizeof bits);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    memcpy(&bits, &both, sizeof bits);
  }
#else
  T both[2];
  if constexpr (kIsBfloat<T>) {
    both[0] = __float2bfloat16_rn(low), both[1] = __float2bfloat16_rn(high);
  } else {
    both[0] = __float2half_rn(low), both[1] = __float2half_rn(high);
  }
  memcpy(&bits, both, sizeof bits);
#endif
  return bits;
}

template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t bits) {
  T both[2];
  memcpy(both, &bits, sizeof bits);
  if constexpr (kIsBfloat<T>) {
    return make_float2(__bfloat162float(both[0]), __bfloat162float(both[1]));
  } else {
    return make_float2(__half2float(both[0]), __half2float(both[1]));
  }
}

#ifdef __CUDACC__

// c += a b.
template <typename T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#define MMA_M16N8K16(type)                                                            \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (kIsBfloat<T>) {
    MMA_M16N8K16("bf16");
  } else {
    MMA_M16N8K16("f16");
  }
#undef MMA_M16N8K16
}

// Four 8 x 8 matrices from shared memory; lane l gives the address of row l % 8 of matrix l / 8, a
// multiple of 16 bytes. Of each, a lane gets row g, columns 2t; Transposed: rows 2t, column g.
template <bool Transposed>
__device__ __forceinline__ void load_matrices(uint32_t (&out)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (Transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

#else

namespace emulated {

// What each lane of the warp gave.
inline const uint64_t* exchange(uint32_t low, uint32_t high, int line) {
  const uint64_t both = uint64_t{high} << 32 | low;
  return emulator::Scheduler::instance().exchange(0xffffffffu, both, __FILE__, line);
}

}  // namespace emulated

template <typename T>
void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const unsigned lane = emulator::Scheduler::instance().lane(), g = lane / 4, t = lane % 4;
  float2 rows[2][8], columns[2][8];  // pairs along the sum, of A's rows and B's columns
  for (int half = 0; half < 2; ++half) {
    const uint64_t* all = emulated::exchange(a[2 * half], a[2 * half + 1], __LINE__);
    for (unsigned pair = 0; pair < 4; ++pair) {
      const uint64_t both = all[4 * g + pair];
      rows[0][4 * half + pair] = unpack<T>(static_cast<uint32_t>(both));
      rows[1][4 * half + pair] = unpack<T>(static_cast<uint32_t>(both >> 32));
    }
  }
  const uint64_t* all = emulated::exchange(b0, b1, __LINE__);
  for (unsigned column = 0; column < 2; ++column) {
    for (unsigned pair = 0; pair < 4; ++pair) {
      const uint64_t both = all[4 * (2 * t + column) + pair];
      columns[column][pair] = unpack<T>(static_cast<uint32_t>(both));
      columns[column][4 + pair] = unpack<T>(static_cast<uint32_t>(both >> 32));
    }
  }
  for (int i = 0; i < 4; ++i) {
    float sum = 0.f;
    for (int pair = 0; pair < 8; ++pair) {
      const float2 x = rows[i / 2][pair], y = columns[i % 2][pair];
      sum += x.x * y.x + x.y * y.y;
    }
    c[i] += sum;
  }
}

// A lane reads its row before any lane goes on, as the instruction does.
template <bool Transposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint4 own = *static_cast<const uint4*>(row);
  const unsigned lane = emulator::Scheduler::instance().lane(), g = lane / 4, t = lane % 4;
  uint32_t rows[32][4];
  for (int half = 0; half < 2; ++half) {
    const uint64_t* all = emulated::exchange(half == 0 ? own.x : own.z, half == 0 ? own.y : own.w,
                                             __LINE__);
    for (int l = 0; l < 32; ++l) memcpy(&rows[l][2 * half], &all[l], sizeof all[l]);
  }
  for (unsigned matrix = 0; matrix < 4; ++matrix) {
    const auto element = [&](unsigned row, unsigned column) {
      return rows[8 * matrix + row][column / 2] >> 16 * (column % 2) & 0xffffu;
    };
    out[matrix] = Transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16
                             : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

#endif

// Operands from row-major tiles in shared memory whose rows lie `stride` elements apart. `tile` is
// their first element; a stride of an odd multiple of 16 bytes has no bank conflicts.

// A: tile[m][k], 16 x 16.
template <typename T>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(a, tile + lane % 16 * stride + lane / 16 * 8);
}

// A: tile[k][m].
template <typename T>
__device__ __forceinline__ void load_a_transposed(uint32_t (&a)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices<true>(a, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
}

// B of two products side by side, (b[0], b[1]) and (b[2], b[3]): tile[n][k], 16 x 16.
template <typename T>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices<false>(b, tile + (lane / 16 * 8 + lane % 8) * stride + lane / 8 % 2 * 8);
}

// B of two products side by side: tile[k][n].
template <typename T>
__device__ __forceinline__ void load_b_transposed(uint32_t (&b)[4], const T* tile, int stride) {
  const int lane = threadIdx.x % 32;
  load_matrices<true>(b, tile + lane % 16 * stride + lane / 16 * 8);
}

// The results of two products side by side as the A operand of the next.
template <typename T>
__device__ __forceinline__ void as_a(uint32_t (&a)[4], const float (&left)[4],
                                     const float (&right)[4]) {
  a[0] = pack<T>(left[0], left[1]);
  a[1] = pack<T>(left[2], left[3]);
  a[2] = pack<T>(right[0], right[1]);
  a[3] = pack<T>(right[2], right[3]);
}

}  // namespace common
