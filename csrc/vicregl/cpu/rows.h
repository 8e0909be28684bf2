// Inner loops of the VICRegL ops on the CPU: distances of rows, minima over them, steps along them.
//
// Sums have a fixed number of lanes, so the order of additions does not depend on the machine's
// width, but for what it contracts to fused multiply-adds.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/rows.h"
#include "common/cpu/vector.h"
#include "vicregl/formula.h"

namespace vicregl {
namespace {  // included by cpu.cpp alone
namespace cpu {

using common::Tensor;

constexpr int64_t kLanes = 8;
using Vector = float __attribute__((vector_size(32)));

KERNELS_ALWAYS_INLINE Vector load(const float* from) { return common::load<Vector>(from); }

KERNELS_ALWAYS_INLINE float lane_sum(const Vector& a) {
  return ((a[0] + a[4]) + (a[1] + a[5])) + ((a[2] + a[6]) + (a[3] + a[7]));
}

// Squared distances of kTileA rows of a to all rows of b, d[i * count + j]. A register holds a lane
// of one distance: kTileA + kTileB loads for kTileA kTileB subtractions and multiply-adds, inside
// the 16 registers of AVX2.
constexpr int64_t kTileA = 4, kTileB = 2;

KERNELS_VECTOR inline void distances(const float* const* a, const float* const* b, int64_t count,
                                    int64_t dim, float* d) {
  const float *a0 = a[0], *a1 = a[1], *a2 = a[2], *a3 = a[3];
  for (int64_t j = 0; j < count; j += kTileB) {
    const int64_t last = j + 1 < count ? j + 1 : j;
    const float *b0 = b[j], *b1 = b[last];
    Vector s[kTileA][kTileB] = {};
    int64_t c = 0;
    for (; c + kLanes <= dim; c += kLanes) {
      const Vector y0 = load(b0 + c), y1 = load(b1 + c);
      const Vector x[kTileA] = {load(a0 + c), load(a1 + c), load(a2 + c), load(a3 + c)};
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTileA; ++i) {
        const Vector e0 = x[i] - y0, e1 = x[i] - y1;
        s[i][0] += e0 * e0;
        s[i][1] += e1 * e1;
      }
    }
    for (int64_t i = 0; i < kTileA; ++i) {
      float first = lane_sum(s[i][0]), second = lane_sum(s[i][1]);
      for (int64_t rest = c; rest < dim; ++rest) {
        const float e0 = a[i][rest] - b0[rest], e1 = a[i][rest] - b1[rest];
        first += e0 * e0;
        second += e1 * e1;
      }
      d[i * count + j] = first;
      d[i * count + last] = second;  // where last = j both are the same
    }
  }
}

// The same of one row where rows are shorter than a vector: b transposed, [dim, count].
KERNELS_VECTOR inline void short_distances(const float* a, const float* b, int64_t count,
                                          int64_t dim, float* d) {
  for (int64_t j = 0; j < count; ++j) d[j] = 0.f;
  for (int64_t c = 0; c < dim; ++c) {
    const float x = a[c];
    const float* row = b + c * count;
    for (int64_t j = 0; j < count; ++j) {
      const float e = x - row[j];
      d[j] += e * e;
    }
  }
}

// NaN to +inf, and row `i` taken into the running minima of the columns.
KERNELS_VECTOR inline void take_columns(float* d, int64_t count, int32_t i, float* least,
                                       int32_t* nearest) {
  for (int64_t j = 0; j < count; ++j) {
    const float e = ordered(d[j]);
    d[j] = e;
    const bool closer = i == 0 || e < least[j];
    least[j] = closer ? e : least[j];
    nearest[j] = closer ? i : nearest[j];
  }
}

// The first of the least of d.
KERNELS_VECTOR inline int32_t first_least(const float* d, int64_t count) {
  float best[kLanes];
  int32_t at[kLanes];
  const int64_t whole = count / kLanes * kLanes;
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    best[lane] = std::numeric_limits<float>::infinity();
    at[lane] = static_cast<int32_t>(lane);
  }
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const bool closer = d[j + lane] < best[lane];
      best[lane] = closer ? d[j + lane] : best[lane];
      at[lane] = closer ? static_cast<int32_t>(j + lane) : at[lane];
    }
  }
  int32_t nearest = 0;
  float least = d[0];
  if (whole > 0) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (before(best[lane], at[lane], least, nearest)) {
        least = best[lane];
        nearest = at[lane];
      }
    }
  }
  for (int64_t j = whole; j < count; ++j) {
    if (d[j] < least) {
      least = d[j];
      nearest = static_cast<int32_t>(j);
    }
  }
  return nearest;
}

// order: scratch, [count].
inline void ranks(const float* least, int64_t count, int32_t* order, int32_t* rank) {
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  std::sort(order, order + count,
            [&](int32_t i, int32_t j) { return before(least[i], i, least[j], j); });
  for (int64_t i = 0; i < count; ++i) rank[order[i]] = static_cast<int32_t>(i);
}

KERNELS_VECTOR inline float squared_distance(const float* a, const float* b, int64_t count) {
  Vector s = {}, t = {};
  int64_t c = 0;
  for (; c + 2 * kLanes <= count; c += 2 * kLanes) {
    const Vector e = load(a + c) - load(b + c);
    const Vector f = load(a + c + kLanes) - load(b + c + kLanes);
    s += e * e;
    t += f * f;
  }
  float total = lane_sum(s + t);
  for (; c < count; ++c) {
    const float e = a[c] - b[c];
    total += e * e;
  }
  return total;
}

// to_a += slope (a - b), to_b -= the same; either may be null.
KERNELS_VECTOR inline void step(const float* a, const float* b, float slope, int64_t count,
                               float* to_a, float* to_b) {
  if (to_a != nullptr && to_b != nullptr) {
    for (int64_t c = 0; c < count; ++c) {
      const float e = slope * (a[c] - b[c]);
      to_a[c] += e;
      to_b[c] -= e;
    }
  } else if (to_a != nullptr) {
    for (int64_t c = 0; c < count; ++c) to_a[c] += slope * (a[c] - b[c]);
  } else if (to_b != nullptr) {
    for (int64_t c = 0; c < count; ++c) to_b[c] -= slope * (a[c] - b[c]);
  }
}

// The views of [views, B, L, C], of any strides and of float32, bfloat16 or float16.
class Views {
 public:
  explicit Views(const Tensor& z)
      : views(z.size(0)), batch(z.size(1)), length(z.size(2)), dim(z.size(3)) {
    in_place_ = z.scalar_type() == common::ScalarType::Float && (z.stride(3) == 1 || dim == 1);
    for (int64_t v = 0; v < views; ++v) {
      tensors_.push_back(common::strided(z, {batch, length, dim},
                                         {z.stride(1), z.stride(2), z.stride(3)}, v * z.stride(0)));
      rows_.emplace_back(tensors_.back());
    }
  }

  int64_t views, batch, length, dim;

  // One sample's map as float32 rows.
  class Sample {
   public:
    explicit Sample(const Views& of)
        : of_(of), scratch_(of.in_place_ ? 0 : of.length * of.dim), rows_(of.length) {}

    void read(int64_t view, int64_t sample) {
      for (int64_t i = 0; i < of_.length; ++i) {
        float* scratch = of_.in_place_ ? nullptr : scratch_.data() + i * of_.dim;
        rows_[i] = of_.rows_[view].read(sample, i, 0, of_.dim, scratch);
      }
    }

    const float* operator[](int64_t i) const { return rows_[i]; }
    const float* const* rows() const { return rows_.data(); }

   private:
    const Views& of_;
    std::vector<float> scratch_;
    std::vector<const float*> rows_;
  };

 private:
  bool in_place_;
  std::vector<Tensor> tensors_;
  std::vector<common::Rows> rows_;
};

}  // namespace cpu
}  // namespace
}  // namespace vicregl
