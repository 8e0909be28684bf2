// The kernels of kernels.h for each vector width, and the choice among them.
#pragma once

#include <cstdlib>
#include <cstring>

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

// A tile: at most kTileRows queries, by at most kChunk keys at a time. Rows of scores and of
// queries lie an odd number of cache lines apart, so that walking down a column meets all sets of
// the cache.
constexpr int kTileRows = 64;
constexpr int kChunk = 480;  // a multiple of every width's panel
constexpr int kScoreRow = kChunk + 16;
constexpr int kTileRow = 128 + 16;

// Products and exponentials of one vector width; kernels.h documents each. panel: keys whose
// transposed rows lie together, [dim, panel].
struct Kernels {
  int lanes, panel;
  void (*scores)(const float* x, int rows, const float* y, int panels, int dim, float* s);
  void (*weigh)(const float* s, int rows, const float* y, long y_row, int keys, int vectors,
                bool add, float* c, long c_row);
  void (*collect)(const float* s, int rows, int keys, const float* x, int vectors, float* c,
                  long c_row);
  float (*largest)(const float* s, int count);
  float (*exponentiate)(float* s, int count, float shift);
  void (*differentiate)(float* s, float* g, int count, float shift, float delta);
};

namespace narrow {
constexpr int kLanes = 4;
#include "attention/cpu/kernels.h"
}  // namespace narrow

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define ATTENTION_WIDTHS 1

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace avx2 {
constexpr int kLanes = 8;
#include "attention/cpu/kernels.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace avx512 {
constexpr int kLanes = 16;
#include "attention/cpu/kernels.h"
}  // namespace avx512
#pragma GCC pop_options
#endif

// The widest that the machine has and ATEN_CPU_CAPACITY, torch's own limit, allows.
inline const Kernels& kernels() {
  static const Kernels& chosen = []() -> const Kernels& {
#ifdef ATTENTION_WIDTHS
    const char* named = std::getenv("ATEN_CPU_CAPACITY");
    const bool none = named != nullptr && std::strcmp(named, "default") == 0;
    const bool half = named != nullptr && std::strcmp(named, "avx2") == 0;
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    if (v4 && !none && !half) return avx512::kKernels;
    if (v3 && !none) return avx2::kKernels;
#endif
    return narrow::kKernels;
  }();
  return chosen;
}

}  // namespace cpu
}  // namespace
}  // namespace attention
