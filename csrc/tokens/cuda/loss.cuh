// The prediction loss: one pass over predicted and teacher rows each way.
//
// A warp takes a row. Forward it keeps the teacher's row in registers (what is longer is read again,
// from cache), so that mean, deviations and loss cost one read of memory; 13 operations an element.
// The block's sum goes to partials, which one block adds up in order. Backward reads both rows and
// writes the gradient.
#pragma once

#include "tokens/cuda/access.cuh"

namespace tokens {
namespace kernels {

// Pieces of 32 W elements that a warp keeps: rows up to 1536 elements with vector accesses.
constexpr int kKept = 6;

// Rows of one dtype that allow 16-byte accesses.
template <typename T>
struct Aligned {
  static constexpr int W = 8;
  T* data;
  Place place;

  __device__ __forceinline__ void read(int64_t at, int64_t column, float (&out)[W]) const {
    load<W>(data + at + column, out);
  }
  __device__ __forceinline__ void write(int64_t at, int64_t column, const float (&in)[W]) const {
    store<W>(data + at + column, in);
  }
};

// Rows of any dtype and strides.
struct Strided {
  static constexpr int W = 1;
  void* data;
  Place place;
  int dtype;  // as common::dtype_code

  __device__ __forceinline__ void read(int64_t at, int64_t column, float (&out)[W]) const {
    load(data, dtype, at + column * place.column, out);
  }
  __device__ __forceinline__ void write(int64_t at, int64_t column, const float (&in)[W]) const {
    store(data, dtype, at + column * place.column, in);
  }
};

struct LossSettings {
  Samples rows;
  Indices index;
  int64_t length, dim;
  double inverse_dim;
  int kind;
  bool normalize;
  float beta, inverse_beta, eps;
};

// use(piece, column) for each of the warp's pieces of a row, unrolled where they are kept.
template <int W, typename Use>
__device__ __forceinline__ void over_pieces(int64_t dim, const Use& use) {
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int64_t c = int64_t{lane() + i * kLanes} * W;
    if (c < dim) use(i, c);
  }
}
template <int W, typename Use>
__device__ __forceinline__ void over_rest(int64_t dim, const Use& use) {
  for (int64_t c = int64_t{lane() + kKept * kLanes} * W; c < dim; c += kLanes * W) use(c);
}

// The lanes' sum of term(p, z) over a row; z = (t - mean) rstd.
template <typename Pred, typename Teacher, typename Term>
__device__ __forceinline__ double row_sum(const Pred& pred, int64_t p_at, const Teacher& teacher,
                                          int64_t t_at, const float (&kept)[kKept][Pred::W],
                                          int64_t dim, float mean, float rstd, const Term& term) {
  constexpr int W = Pred::W;
  float sum = 0.f;
  const auto add = [&](const float(&t)[W], int64_t c) {
    float p[W];
    pred.read(p_at, c, p);
#pragma unroll
    for (int w = 0; w < W; ++w) sum += term(p[w], (t[w] - mean) * rstd);
  };
  over_pieces<W>(dim, [&](int i, int64_t c) { add(kept[i], c); });
  over_rest<W>(dim, [&](int64_t c) {
    float t[W];
    teacher.read(t_at, c, t);
    add(t, c);
  });
  return warp_sum(sum);
}

// partials[block] = the block's sum; saved as contract.py says, NaN where the index is out of range.
template <typename Pred, typename Teacher>
__global__ void __launch_bounds__(kThreads, 2)
    loss_rows(LossSettings q, Pred pred, Teacher teacher, float* saved, double* partials) {
  constexpr int W = Pred::W;
  double total = 0.0;
  for (int64_t r = first_row(); r < q.rows.count; r += row_step()) {
    const int64_t token = q.index[r];
    const bool valid = token >= 0 && token < q.length;
    const int64_t p_at = pred.place(r), t_at = teacher.place(q.rows.of(r), valid ? token : 0);
    float kept[kKept][W] = {};
    double sum = 0.0, scatter = 0.0;
    float part = 0.f;
    over_pieces<W>(q.dim, [&](int i, int64_t c) {
      teacher.read(t_at, c, kept[i]);
#pragma unroll
      for (int w = 0; w < W; ++w) part += kept[i][w];
    });
    float mean = 0.f, rstd = 1.f;
    if (q.normalize) {
      const auto deviation = [&](const float(&t)[W]) {
#pragma unroll
        for (int w = 0; w < W; ++w) part += (t[w] - mean) * (t[w] - mean);
      };
      over_rest<W>(q.dim, [&](int64_t c) {
        float t[W];
        teacher.read(t_at, c, t);
#pragma unroll
        for (int w = 0; w < W; ++w) part += t[w];
      });
      sum = warp_sum(part);
      mean = static_cast<float>(sum * q.inverse_dim);
      part = 0.f;
      over_pieces<W>(q.dim, [&](int i, int64_t) { deviation(kept[i]); });
      over_rest<W>(q.dim, [&](int64_t c) {
        float t[W];
        teacher.read(t_at, c, t);
        deviation(t);
      });
      scatter = warp_sum(part);
      rstd = inverse_deviation(static_cast<float>(scatter * q.inverse_dim) + q.eps);
    }
    const auto reduce = [&](const auto& term) {
      return row_sum(pred, p_at, teacher, t_at, kept, q.dim, mean, rstd, term);
    };
    float* own = saved + r * saved_floats(q.kind);
    if (q.kind == kCosine) {
      const double pp = reduce([](float p, float) { return p * p; });
      const double zz = reduce([](float, float z) { return z * z; });
      const double pz = reduce([](float p, float z) { return p * z; });
      const Cosine c =
          cosine(static_cast<float>(pp), static_cast<float>(zz), static_cast<float>(pz));
      sum = c.loss;
      if (lane() == 0) {
        own[2] = c.toward;
        own[3] = c.along;
      }
    } else if (q.kind == kSmoothL1) {
      sum = reduce([&](float p, float z) {
        return element_loss<kSmoothL1>(p - z, q.beta, q.inverse_beta);
      });
    } else if (q.kind == kL1) {
      sum = reduce([&](float p, float z) { return element_loss<kL1>(p - z, 0.f, 0.f); });
    } else {
      sum = reduce([&](float p, float z) { return element_loss<kMse>(p - z, 0.f, 0.f); });
    }
    if (lane() == 0) {
      own[0] = valid ? mean : not_a_number();
      own[1] = valid ? rstd : not_a_number();
    }
    total += valid ? sum : static_cast<double>(not_a_number());
  }
  total = common::block_sum(lane() == 0 ? total : 0.0);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

// One block: the sum of the partials in a fixed order, times scale.
__global__ void __launch_bounds__(kThreads)
    loss_finish(const double* partials, int64_t count, double scale, float* loss) {
  const double total = common::sum_of(partials, count);
  if (threadIdx.x == 0) *loss = static_cast<float>(total * scale);
}

// One row's gradient; two pieces are under way at once, no more: ptxas would spill.
template <typename Pred, typename Teacher, typename Slope>
__device__ __forceinline__ void gradient_row(const Pred& pred, int64_t p_at, const Teacher& teacher,
                                             int64_t t_at, int64_t dim, float mean, float rstd,
                                             const Pred& out, int64_t out_at, const Slope& slope) {
  constexpr int W = Pred::W;
#pragma unroll 1
  for (int64_t c = int64_t{lane()} * W; c < dim; c += 2 * kLanes * W) {
    float p[2][W], t[2][W];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (c + i * kLanes * W < dim) {
        teacher.read(t_at, c + i * kLanes * W, t[i]);
        pred.read(p_at, c + i * kLanes * W, p[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (c + i * kLanes * W < dim) {
#pragma unroll
        for (int w = 0; w < W; ++w) p[i][w] = slope(p[i][w], (t[i][w] - mean) * rstd);
        out.write(out_at, c + i * kLanes * W, p[i]);
      }
    }
  }
}

// grad: the gradient of the loss; scale: 1 over the number of terms. `out` is contiguous. A kernel
// for each kind: with all of them in one, ptxas spills for sm_100.
template <int kind, typename Pred, typename Teacher>
__global__ void __launch_bounds__(kThreads, 2)
    gradient_rows(LossSettings q, Pred pred, Teacher teacher, const float* saved, const float* grad,
                  double scale, Pred out) {
  const float factor = static_cast<float>(static_cast<double>(*grad) * scale);
  for (int64_t r = first_row(); r < q.rows.count; r += row_step()) {
    const int64_t token = q.index[r];
    const bool valid = token >= 0 && token < q.length;
    const int64_t p_at = pred.place(r), t_at = teacher.place(q.rows.of(r), valid ? token : 0);
    const float* own = saved + r * saved_floats(kind);
    const float mean = own[0], rstd = own[1];
    const float weight = (valid ? factor : not_a_number()) + unknown(mean, rstd);
    if constexpr (kind == kCosine) {
      const float toward = own[2] * weight, along = own[3] * weight;
      gradient_row(pred, p_at, teacher, t_at, q.dim, mean, rstd, out, r * q.dim,
                   [=](float p, float z) { return toward * z + along * p; });
    } else {
      const float beta = q.beta, inverse_beta = q.inverse_beta;
      gradient_row(pred, p_at, teacher, t_at, q.dim, mean, rstd, out, r * q.dim,
                   [=](float p, float z) {
                     return element_slope<kind>(p - z, beta, inverse_beta) * weight;
                   });
    }
  }
}

}  // namespace kernels
}  // namespace tokens
