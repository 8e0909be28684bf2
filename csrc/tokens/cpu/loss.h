// One row of the prediction loss on the CPU: moments, sums and gradients over D float32 elements.
//
// A row is 4 to 6 KB and stays in the L1 cache while it is read two or three times.
#pragma once

#include <cstring>

#include "common/cpu/lanes.h"
#include "tokens/formula.h"

namespace tokens {
namespace cpu {

using namespace common::lanes;

struct Row {
  const float *p, *t;
  int64_t count;
  float mean, rstd;
  float beta, inverse_beta;
};

KERNELS_ALWAYS_INLINE Vector difference(const Row& row, int64_t j) {
  return load(row.p + j) - (load(row.t + j) - row.mean) * row.rstd;
}

// 0 in the missing lanes.
KERNELS_ALWAYS_INLINE Vector difference_rest(const Row& row, int64_t j) {
  const int64_t rest = row.count - j;
  return load_rest(row.p + j, rest, 0.f) -
         (load_rest(row.t + j, rest, row.mean) - row.mean) * row.rstd;
}

template <int kind>
KERNELS_ALWAYS_INLINE double loss_body(const Row& row) {
  double sum;
#define WHOLE(j) element_loss<kind>(difference(row, j), row.beta, row.inverse_beta)
#define LAST(j) element_loss<kind>(difference_rest(row, j), row.beta, row.inverse_beta)
  LANES_SUM(row.count, WHOLE, LAST, sum);
#undef WHOLE
#undef LAST
  return sum;
}

KERNELS_VECTOR inline double row_loss(int64_t kind, const Row& row) {
  if (kind == kSmoothL1) return loss_body<kSmoothL1>(row);
  if (kind == kL1) return loss_body<kL1>(row);
  return loss_body<kMse>(row);
}

template <int kind>
KERNELS_ALWAYS_INLINE void slope_body(const Row& row, float scale, float* out) {
  int64_t j = 0;
  for (; j + kLanes <= row.count; j += kLanes) {
    const Vector slope =
        element_slope<kind>(difference(row, j), row.beta, row.inverse_beta) * scale;
    std::memcpy(out + j, &slope, sizeof slope);
  }
  for (; j < row.count; ++j) {
    const float d = row.p[j] - (row.t[j] - row.mean) * row.rstd;
    out[j] = element_slope<kind>(d, row.beta, row.inverse_beta) * scale;
  }
}

KERNELS_VECTOR inline void row_slope(int64_t kind, const Row& row, float scale, float* out) {
  if (kind == kSmoothL1) return slope_body<kSmoothL1>(row, scale, out);
  if (kind == kL1) return slope_body<kL1>(row, scale, out);
  return slope_body<kMse>(row, scale, out);
}

// Sums of p p, z z and p z.
KERNELS_VECTOR inline void row_products(const Row& row, double (&out)[3]) {
#define Z(j) ((load(row.t + (j)) - row.mean) * row.rstd)
#define Z_REST(j) ((load_rest(row.t + (j), row.count - (j), row.mean) - row.mean) * row.rstd)
#define P(j) load(row.p + (j))
#define P_REST(j) load_rest(row.p + (j), row.count - (j), 0.f)
#define PP(j) (P(j) * P(j))
#define PP_REST(j) (P_REST(j) * P_REST(j))
#define ZZ(j) (Z(j) * Z(j))
#define ZZ_REST(j) (Z_REST(j) * Z_REST(j))
#define PZ(j) (P(j) * Z(j))
#define PZ_REST(j) (P_REST(j) * Z_REST(j))
  LANES_SUM(row.count, PP, PP_REST, out[0]);
  LANES_SUM(row.count, ZZ, ZZ_REST, out[1]);
  LANES_SUM(row.count, PZ, PZ_REST, out[2]);
#undef Z
#undef Z_REST
#undef P
#undef P_REST
#undef PP
#undef PP_REST
#undef ZZ
#undef ZZ_REST
#undef PZ
#undef PZ_REST
}

// out = toward z + along p.
KERNELS_VECTOR inline void row_combine(const Row& row, float toward, float along, float* out) {
  for (int64_t j = 0; j < row.count; ++j) {
    out[j] = toward * ((row.t[j] - row.mean) * row.rstd) + along * row.p[j];
  }
}

KERNELS_VECTOR inline void add_row(const float* row, int64_t count, float* sum) {
  for (int64_t j = 0; j < count; ++j) sum[j] += row[j];
}

KERNELS_VECTOR inline void add_rows(const float* a, const float* b, int64_t count, float* sum) {
  for (int64_t j = 0; j < count; ++j) sum[j] = a[j] + b[j];
}

}  // namespace cpu
}  // namespace tokens
