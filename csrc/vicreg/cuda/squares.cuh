// The square matrix of the products: what the forward reads off it, and its rounding to half for
// the backward. A warp takes a row.
#pragma once

#include "vicreg/cuda/statistics.cuh"

namespace vicreg {
namespace kernels {

struct Finish {
  const double* partials[3];  // of the invariance, the hinge, the squares
  int64_t counts[3];
  double factors[3];  // from the sums to the terms
  double weights[3];
  unsigned* done;  // blocks that are through, 0 at the launch
  float* terms;
};

// The last block to come here adds the partial sums of all blocks up to the four terms, in an order
// that does not depend on which block that is. Returns after a barrier of the whole block.
__device__ __forceinline__ void finish_terms(double sum, double* sums, const Finish& finish) {
  if (!last_block(sum, sums, finish.done)) return;
  double totals[3];
  for (int i = 0; i < 3; ++i) totals[i] = sum_of(finish.partials[i], finish.counts[i]);
  if (threadIdx.x != 0) return;
  double loss = 0.0;
  for (int i = 0; i < 3; ++i) {
    const double term = finish.factors[i] * totals[i];
    finish.terms[i + 1] = static_cast<float>(term);
    loss += finish.weights[i] * term;
  }
  finish.terms[0] = static_cast<float>(loss);
}

// N < D. squares [V, G, N, N] holds Kr and becomes the whole Gram matrix; deflated [V, G, K, N] is
// filled; a warp takes a row of Kr, and its share of the columns whose squared scatters come off.
__global__ void __launch_bounds__(kThreads)
    gram_rows(int64_t batches, int64_t rows, int64_t dim, int64_t row_blocks, Deflation deflation,
              float* squares, float* deflated, double* sums, Finish finish) {
  const int count = deflation.count;
  double sum = 0.0;
  for (int64_t at = first_row(); at < batches * rows; at += row_step()) {
    const int64_t batch = at / rows, n = at % rows;
    const float* z = deflation.deflated_columns + batch * count * rows;
    float* row = squares + at * rows;
    float own[kMostDeflated] = {}, product[kMostDeflated] = {};
    float pair[kMostDeflated][kMostDeflated] = {}, square = 0.f;
#pragma unroll
    for (int k = 0; k < kMostDeflated; ++k) {
      if (k < count) own[k] = z[k * rows + n];
    }
    for (int64_t m = lane(); m < rows; m += kLanes) {
      const float value = row[m];
      float whole = value, other[kMostDeflated] = {};
#pragma unroll
      for (int k = 0; k < kMostDeflated; ++k) {
        if (k >= count) break;
        other[k] = z[k * rows + m];
        product[k] += value * other[k];
        whole += own[k] * other[k];
#pragma unroll
        for (int i = 0; i < k; ++i) pair[i][k] += other[i] * other[k];
      }
      square += value * value;
      row[m] = whole;
    }
    sum += square;

    double products[kMostDeflated], pairs[kMostDeflated][kMostDeflated];
#pragma unroll
    for (int k = 0; k < kMostDeflated; ++k) {
      products[k] = warp_sum(product[k]);
#pragma unroll
      for (int i = 0; i < k; ++i) pairs[i][k] = pairs[k][i] = warp_sum(pair[i][k]);
    }
    if (lane() == 0) {
#pragma unroll
      for (int k = 0; k < kMostDeflated; ++k) {
        if (k >= count) break;
        double gradient = products[k];
#pragma unroll
        for (int i = 0; i < kMostDeflated; ++i) {
          if (i == k) continue;
          gradient += pairs[i][k] * own[i];
          if (n == 0) sum += pairs[i][k] * pairs[i][k];
        }
        sum += 2.0 * own[k] * products[k];
        deflated[(batch * count + k) * rows + n] = static_cast<float>(gradient);
      }
    }

    const int64_t end = (n + 1) * dim / rows;
    for (int64_t j = n * dim / rows + lane(); j < end; j += kLanes) {
      float scatter = 0.f;  // of a deflated column too: nothing of it was stored
      for (int64_t r = 0; r < row_blocks; ++r) {
        scatter += deflation.scatters[(r * batches + batch) * dim + j];
      }
      sum -= static_cast<double>(scatter) * scatter;
    }
  }
  finish_terms(sum, sums, finish);
}

// N >= D. Zeroes the diagonal of squares [V, G, D, D] and sums the rest; a warp takes a row.
__global__ void __launch_bounds__(kThreads)
    covariance_rows(int64_t batches, int64_t dim, float* squares, double* sums, Finish finish) {
  double sum = 0.0;
  for (int64_t at = first_row(); at < batches * dim; at += row_step()) {
    const int64_t i = at % dim;
    float* row = squares + at * dim;
    float square = 0.f;
#pragma unroll 4
    for (int64_t j = lane(); j < dim; j += kLanes) {
      const float value = j == i ? 0.f : row[j];
      square += value * value;
    }
    if (i % kLanes == lane()) row[i] = 0.f;
    sum += square;
  }
  finish_terms(sum, sums, finish);
}

// rounded [rows, length] = squares in a half dtype, each row divided by the power of two that
// brings its largest element to [1/2, 1], which goes to powers [rows]: float16 neither over- nor
// underflows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    round_rows(int64_t rows, int64_t length, const float* squares, T* rounded, float* powers) {
  for (int64_t at = first_row(); at < rows; at += row_step()) {
    const float* row = squares + at * length;
    float largest = 0.f;
    for (int64_t j = lane(); j < length; j += kLanes) largest = fmaxf(largest, fabsf(row[j]));
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    int exponent = 0;
    if (largest > 0.f && largest <= 3.4e38f) frexpf(largest, &exponent);
    exponent = max(-126, min(126, exponent));
    const float down = ldexpf(1.f, -exponent);
    for (int64_t j = lane(); j < length; j += kLanes) {
      rounded[at * length + j] = narrow<T>(row[j] * down);
    }
    if (lane() == 0) powers[at] = ldexpf(1.f, exponent);
  }
}

}  // namespace kernels
}  // namespace vicreg
