// The Barlow Twins op on the CPU.
//
// Memory: x and y are read twice forward (statistics; standardising) and once backward, in cache-
// sized chunks of columns (N < D) or rows (N >= D), so that no standardised N x D copy is ever
// stored. Operations, multiply and add being two: N < D, two symmetric products forward, N (N + 1) D
// each, and two products backward, 2 N^2 D each; else one and two of 2 N D^2. They go to torch's own
// matmul chunk by chunk; everything elementwise runs on a chunk that is still in cache: on the Gram
// side also the column sums that the gradient of the standardisation takes of a finished product.
//
// Threads take whole ranges of the long side, as in vicreg/cpu.cpp; forward, each range but the
// first sums into matrices of its own.
#include <algorithm>
#include <array>
#include <vector>

#include "barlow/barlow.h"
#include "barlow/formula.h"
#include "common/cpu/products.h"
#include "common/cpu/rows.h"
#include "common/cpu/statistics.h"
#include "common/cpu/tasks.h"
#include "common/tensors.h"
#include "common/cpu/vector.h"

namespace barlow {
namespace {

using common::Chunk;
using common::Matrix;
using common::Range;
using common::Rows;
using common::ScalarType;
using common::Split;

struct Problem {
  Problem(const Tensor& x, double eps, double std_eps, bool unbiased, double lambd)
      : rows(x.size(0)),
        dim(x.size(1)),
        gram(rows < dim),
        side(std::min(rows, dim)),
        length(std::max(rows, dim)),
        standard{static_cast<float>(rows - (unbiased ? 1 : 0)), static_cast<float>(eps),
                 static_cast<float>(std_eps)},
        lambd(static_cast<float>(lambd)) {}

  int64_t area(const Range& range) const { return range.chunk * side; }
  Chunk chunk(const Range& range, int64_t begin) const {
    return Chunk(rows, dim, begin, range.chunk, range.end);
  }

  int64_t rows, dim;
  bool gram;
  int64_t side, length;
  Standard standard;
  float lambd;
};

KERNELS_VECTOR void inverse_stds(const float* scatter, int64_t count, const Standard& s,
                                float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = inverse_std(scatter[j], s);
}

KERNELS_VECTOR void standardise_row(const float* row, const float* origin, const float* offset,
                                   const float* inverse, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = ((row[j] - origin[j]) - offset[j]) * inverse[j];
}

// Both views as they are read: chunk by chunk, standardised.
class Views {
 public:
  // moments: float32 [2, 3, D]
  Views(const Problem& p, const Tensor& x, const Tensor& y, const float* moments)
      : rows_{Rows(x), Rows(y)}, moments_(moments), dim_(p.dim), inverse_(2 * p.dim) {
    for (int64_t v = 0; v < 2; ++v) {
      inverse_stds(scatter(v), dim_, p.standard, inverse_.data() + v * dim_);
    }
  }

  const float* scatter(int64_t v) const { return moments_ + (3 * v + 2) * dim_; }

  // out: [rows, columns] of the chunk.
  void read(int64_t v, const Chunk& c, float* out) const {
    const float* origin = moments_ + 3 * v * dim_ + c.column;
    const float* inverse = inverse_.data() + v * dim_ + c.column;
    const int64_t grain = std::max<int64_t>(1, 32768 / c.columns);
    torch::stable::parallel_for(0, c.rows, grain, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        float* target = out + n * c.columns;  // also the scratch: it is read before it is written
        standardise_row(rows_[v].read(0, c.row + n, c.column, c.columns, target), origin,
                        origin + dim_, inverse, c.columns, target);
      }
    });
  }

 private:
  std::array<Rows, 2> rows_;
  const float* moments_;
  int64_t dim_;
  std::vector<float> inverse_;
};

KERNELS_VECTOR void add_products(const float* a, const float* b, int64_t stride, int64_t count,
                                int64_t width, float* sum) {
  int64_t n = 0;
  for (; n + 4 <= count; n += 4) {
    const float *a0 = a + n * stride, *b0 = b + n * stride;
    const float *a1 = a0 + stride, *b1 = b0 + stride, *a2 = a1 + stride, *b2 = b1 + stride;
    const float *a3 = a2 + stride, *b3 = b2 + stride;
    for (int64_t j = 0; j < width; ++j) {
      sum[j] += (a0[j] * b0[j] + a1[j] * b1[j]) + (a2[j] * b2[j] + a3[j] * b3[j]);
    }
  }
  for (; n < count; ++n) {
    for (int64_t j = 0; j < width; ++j) sum[j] += a[n * stride + j] * b[n * stride + j];
  }
}

// out[j] = sum_n a[n, j] b[n, j], a and b [rows, columns]: float32 over 32 rows, float64 over blocks.
void column_dots(const float* a, const float* b, int64_t rows, int64_t columns, double* out) {
  constexpr int64_t kBlockRows = 32, kWidth = 128;
  const int64_t pieces = (columns + kWidth - 1) / kWidth;
  const int64_t grain = std::max<int64_t>(1, 32768 / (rows * kWidth));
  torch::stable::parallel_for(0, pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t piece = first; piece < last; ++piece) {
      const int64_t begin = piece * kWidth, width = std::min(kWidth, columns - begin);
      std::fill_n(out + begin, width, 0.0);
      for (int64_t n = 0; n < rows; n += kBlockRows) {
        float sum[kWidth] = {};
        add_products(a + n * columns + begin, b + n * columns + begin, columns,
                     std::min(kBlockRows, rows - n), width, sum);
        for (int64_t j = 0; j < width; ++j) out[begin + j] += sum[j];
      }
    }
  });
}

KERNELS_VECTOR double row_dot(const float* a, const float* b, int64_t count) {
  double lanes[8] = {};
  int64_t j = 0;
  for (; j + 8 <= count; j += 8) {
    for (int64_t i = 0; i < 8; ++i) lanes[i] += static_cast<double>(a[j + i]) * b[j + i];
  }
  for (; j < count; ++j) lanes[0] += static_cast<double>(a[j]) * b[j];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) +
         ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

// <a, b> of two m x m matrices in float64, the same whatever the number of threads.
double inner_product(const float* a, const float* b, int64_t m) {
  std::vector<double> partial(m);
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, 32768 / m),
                              [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) partial[n] = row_dot(a + n * m, b + n * m, m);
  });
  double total = 0.0;
  for (const double value : partial) total += value;
  return total;
}

// What the columns of `range` add to Z1 Z1^T and Z2 Z2^T, lower triangles, at `offset` in `matrices`;
// and their N C_jj.
void add_grams(const Problem& p, const Views& views, const Range& range, const Tensor& matrices,
               int64_t offset, double* diagonal) {
  const Tensor scratch = common::empty(matrices, {2 * p.area(range)}, ScalarType::Float);
  float* z = static_cast<float*>(scratch.data_ptr());
  for (int64_t begin = range.begin; begin < range.end; begin += range.chunk) {
    const Chunk c = p.chunk(range, begin);
    for (int64_t v = 0; v < 2; ++v) {
      views.read(v, c, z + v * p.area(range));
      common::add_symmetric(
          common::contiguous(matrices, p.rows, p.rows, offset + v * p.rows * p.rows),
          common::contiguous(scratch, c, v * p.area(range)), begin > range.begin);
    }
    column_dots(z, z + p.area(range), p.rows, c.columns, diagonal + begin);
  }
}

// What the rows of `range` add to Z1^T Z2, at `offset` in `matrices`.
void add_correlation(const Problem& p, const Views& views, const Range& range,
                     const Tensor& matrices, int64_t offset) {
  const Tensor scratch = common::empty(matrices, {2 * p.area(range)}, ScalarType::Float);
  float* z = static_cast<float*>(scratch.data_ptr());
  for (int64_t begin = range.begin; begin < range.end; begin += range.chunk) {
    const Chunk c = p.chunk(range, begin);
    for (int64_t v = 0; v < 2; ++v) views.read(v, c, z + v * p.area(range));
    common::multiply(common::contiguous(matrices, p.dim, p.dim, offset),
                     common::contiguous(scratch, c, 0).transposed(),
                     common::contiguous(scratch, c, p.area(range)),
                     begin > range.begin);
  }
}

KERNELS_VECTOR void scale_row(float factor, int64_t count, float* row) {
  for (int64_t j = 0; j < count; ++j) row[j] *= factor;
}

// N C on the way in, C with its diagonal taken out on the way out; diagonal: N C_jj.
void take_diagonal(float* correlation, int64_t dim, int64_t rows, double* diagonal) {
  const float factor = 1.f / static_cast<float>(rows);
  torch::stable::parallel_for(0, dim, std::max<int64_t>(1, 32768 / dim),
                              [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      float* row = correlation + j * dim;
      diagonal[j] = row[j];
      row[j] = 0.f;
      scale_row(factor, dim, row);
    }
  });
}

KERNELS_VECTOR void add_squares(const float* row, int64_t count, double* sum) {
  for (int64_t j = 0; j < count; ++j) sum[j] += static_cast<double>(row[j]) * row[j];
}

// sum_n P z of every column of both views, [2, D], from C without its diagonal: N times the sums of
// squares of its rows and of its columns.
std::vector<double> correlation_dots(const Problem& p, const float* correlation) {
  std::vector<double> dots(2 * p.dim);
  for (int64_t j = 0; j < p.dim; ++j) {
    const float* row = correlation + j * p.dim;
    dots[j] = row_dot(row, row, p.dim) * static_cast<double>(p.rows);
    add_squares(row, p.dim, dots.data() + p.dim);
  }
  for (int64_t j = p.dim; j < 2 * p.dim; ++j) dots[j] *= static_cast<double>(p.rows);
  return dots;
}

// The coefficients of a view's columns [begin, begin + count), [3, count]; dots: their sum_n P z.
void column_coefficients(const Problem& p, float grad, const float* scatter, const float* diagonal,
                         const double* dots, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    const Coefficients a =
        coefficients(grad, scatter[j], p.standard, static_cast<float>(dots[j]), diagonal[j],
                     p.lambd, static_cast<float>(p.rows), p.gram);
    out[j] = a.product;
    out[count + j] = a.other;
    out[2 * count + j] = a.own;
  }
}

KERNELS_VECTOR void gradient_row(const float* product, const float* other, const float* own,
                                const float* a, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) {
    out[j] = gradient({a[j], a[count + j], a[2 * count + j]}, product[j], other[j], own[j]);
  }
}

// The gradients of the columns or rows of `range`. grads: of x and y, empty where not needed; dots:
// correlation_dots, or nothing on the Gram side, where they are taken of each chunk's product.
void add_gradients(const Problem& p, const Views& views, float grad, const float* diagonal,
                   const Tensor& products, const std::vector<double>& dots, const Range& range,
                   const std::array<Tensor, 2>& grads) {
  const int64_t area = p.area(range);
  const Tensor scratch = common::empty(products, {3 * area}, ScalarType::Float);
  float* z = static_cast<float*>(scratch.data_ptr());
  float* const product = z + 2 * area;
  std::vector<double> chunk_dots(p.gram ? range.chunk : 0);
  std::vector<float> a(3 * (p.gram ? range.chunk : p.dim));
  for (int64_t begin = range.begin; begin < range.end; begin += range.chunk) {
    const Chunk c = p.chunk(range, begin);
    for (int64_t v = 0; v < 2; ++v) views.read(v, c, z + v * area);
    for (int64_t v = 0; v < 2; ++v) {
      if (grads[v].numel() == 0) continue;
      const float *own = z + v * area, *other = z + (1 - v) * area;
      // Not into the gradient itself: its rows lie D apart, and D is a power of two more often than
      // not, which puts a tile of the product's result into one cache set.
      const Matrix out = common::contiguous(scratch, c, 2 * area);
      if (p.gram) {
        const int64_t offset = (1 - v) * p.rows * p.rows;
        common::multiply(out, common::contiguous(products, p.rows, p.rows, offset),
                         common::contiguous(scratch, c, v * area), false);
        column_dots(product, own, c.rows, c.columns, chunk_dots.data());
      } else {
        const Matrix correlation = common::contiguous(products, p.dim, p.dim, 0);
        common::multiply(out, common::contiguous(scratch, c, (1 - v) * area),
                         v == 0 ? correlation.transposed() : correlation, false);
      }
      column_coefficients(p, grad, views.scatter(v) + c.column, diagonal + c.column,
                          p.gram ? chunk_dots.data() : dots.data() + v * p.dim, c.columns,
                          a.data());
      const ScalarType dtype = grads[v].scalar_type();
      torch::stable::parallel_for(0, c.rows, std::max<int64_t>(1, 16384 / c.columns),
                                  [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; ++n) {
          const int64_t at = (c.row + n) * p.dim + c.column, row = n * c.columns;
          const bool in_place = dtype == ScalarType::Float;
          float* target =
              in_place ? static_cast<float*>(grads[v].data_ptr()) + at : product + row;
          gradient_row(product + row, other + row, own + row, a.data(), c.columns, target);
          if (!in_place) common::write_row(target, c.columns, dtype, grads[v].data_ptr(), at);
        }
      });
    }
  }
}

}  // namespace

const bool kSavesStandardised = false;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor y, double eps,
                                                           double std_eps, bool unbiased,
                                                           double lambd, bool) {
  const Problem p(x, eps, std_eps, unbiased, lambd);
  const auto make = [&](std::initializer_list<int64_t> sizes) {
    return common::empty(x, sizes, ScalarType::Float);
  };
  const int64_t planes = p.gram ? 2 : 1, area = p.side * p.side;
  const Tensor loss = make({1}), moments = make({2, 3, p.dim}), diagonal = make({p.dim});
  const Tensor products = make({planes, p.side, p.side});

  float* moment = static_cast<float*>(moments.data_ptr());
  common::column_statistics(Rows(x), nullptr, 1, p.rows, p.dim, moment);
  common::column_statistics(Rows(y), nullptr, 1, p.rows, p.dim, moment + 3 * p.dim);
  const Views views(p, x, y, moment);

  const Split split(p.side, p.length, 1, 1 + p.length / p.side);
  const Tensor partial = split.parts == 1 ? products : make({(split.parts - 1) * planes * area});
  std::vector<double> dots(p.dim);  // N C_jj
  common::run_tasks(split.parts, [&](int64_t part) {
    const Tensor& matrices = part == 0 ? products : partial;
    const int64_t offset = part == 0 ? 0 : (part - 1) * planes * area;
    if (p.gram) {
      add_grams(p, views, split.range(part), matrices, offset, dots.data());
    } else {
      add_correlation(p, views, split.range(part), matrices, offset);
    }
  });
  float* matrix = static_cast<float*>(products.data_ptr());
  const float* others = static_cast<const float*>(partial.data_ptr());
  torch::stable::parallel_for(0, planes * area, 65536, [&](int64_t first, int64_t last) {
    for (int64_t part = 1; part < split.parts; ++part) {
      common::add_scaled(others + (part - 1) * planes * area + first, 1.f, last - first,
                         matrix + first);
    }
  });
  const double rows = static_cast<double>(p.rows);
  double off_diagonal;
  if (p.gram) {
    for (int64_t v = 0; v < 2; ++v) common::mirror(matrix + v * area, p.side);
    off_diagonal = inner_product(matrix, matrix + area, p.side);
    for (const double dot : dots) off_diagonal -= dot * dot;
    off_diagonal /= rows * rows;
  } else {
    take_diagonal(matrix, p.dim, p.rows, dots.data());
    off_diagonal = common::square_sum(matrix, area);
  }
  double on_diagonal = 0.0;
  for (int64_t j = 0; j < p.dim; ++j) {
    const double correlation = dots[j] / rows;
    on_diagonal += (correlation - 1.0) * (correlation - 1.0);
    static_cast<float*>(diagonal.data_ptr())[j] = static_cast<float>(correlation);
  }
  static_cast<float*>(loss.data_ptr())[0] = static_cast<float>(on_diagonal + lambd * off_diagonal);
  return {loss, moments, diagonal, products, make({0})};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor y, Tensor moments,
                                    Tensor diagonal, Tensor products, Tensor, bool need_x,
                                    bool need_y, double eps, double std_eps, bool unbiased,
                                    double lambd, bool) {
  const Problem p(x, eps, std_eps, unbiased, lambd);
  const Views views(p, x, y, static_cast<const float*>(moments.data_ptr()));
  std::array<Tensor, 2> grads;
  for (int64_t v = 0; v < 2; ++v) {
    grads[v] = (v == 0 ? need_x : need_y) ? common::empty(x, {p.rows, p.dim}, x.scalar_type())
                                          : common::empty(x, {0}, x.scalar_type());
  }
  std::vector<double> dots;
  if (!p.gram) dots = correlation_dots(p, static_cast<const float*>(products.data_ptr()));
  const Split split(p.side, p.length, 1, p.length);
  common::run_tasks(split.parts, [&](int64_t part) {
    add_gradients(p, views, *static_cast<const float*>(grad.data_ptr()),
                  static_cast<const float*>(diagonal.data_ptr()), products, dots,
                  split.range(part), grads);
  });
  return {grads[0], grads[1]};
}

}  // namespace barlow
