// The VICReg op on the CPU.
//
// Memory: x and y are read twice forward (statistics; centring) and once backward, in cache-sized
// chunks of columns (N < D) or rows (N >= D), so that no centred N x D copy is ever stored. The
// products, 2 N D min(N, D) operations each, go to torch's own matmul chunk by chunk; of the
// symmetric one only the lower trapezoids of row blocks are computed. Everything elementwise runs
// on a chunk that is still in cache.
#include <algorithm>
#include <array>
#include <numeric>

#include "common/rows.h"
#include "common/tensors.h"
#include "common/vector.h"
#include "vicreg/formula.h"
#include "vicreg/products.h"
#include "vicreg/statistics.h"
#include "vicreg/vicreg.h"

namespace vicreg {
namespace {

using common::Rows;
using common::ScalarType;

struct Problem {
  explicit Problem(const Tensor& x, bool unbiased)
      : groups(x.size(0)),
        rows(x.size(1)),
        dim(x.size(2)),
        gram(rows < dim),
        side(std::min(rows, dim)),
        deflated(gram ? std::min(kDeflatedColumns, dim) : 0),
        degrees(static_cast<float>(rows - (unbiased ? 1 : 0))) {}

  int64_t groups, rows, dim;
  bool gram;
  int64_t side, deflated;
  float degrees;
};

VICREG_VECTOR void centre_row(const float* row, const float* mean, int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = row[j] - mean[j];
}

// zc[n - row_begin, j - begin] = z[n, j] - mean[j].
void centre(const Rows& z, int64_t group, int64_t row_begin, int64_t row_count, int64_t begin,
            int64_t count, const float* mean, float* zc) {
  const int64_t grain = std::max<int64_t>(1, 32768 / count);
  torch::stable::parallel_for(0, row_count, grain, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      float* out = zc + n * count;  // also the scratch: it is read before it is written
      centre_row(z.read(group, row_begin + n, begin, count, out), mean + begin, count, out);
    }
  });
}

// The covariance sum of one Gram matrix, before it is scaled; fills gram with Zc Zc^T and the
// deflated rows (docs/cancellation.md). scratch holds at least chunk * rows floats.
double gram_side(const Problem& p, const Rows& z, int64_t group, const float* moments,
                 const Tensor& gram, const Tensor& scratch, int64_t chunk, int64_t* index,
                 float* deflated) {
  const float* mean = moments;
  const float* scatter = moments + p.dim;
  largest_columns(scatter, p.dim, p.deflated, index);

  float* zc = static_cast<float*>(scratch.data_ptr());
  std::vector<float> taken(kDeflatedColumns * p.rows);  // [K, N], zero where there is none
  for (int64_t begin = 0; begin < p.dim; begin += chunk) {
    const int64_t count = std::min(chunk, p.dim - begin);
    centre(z, group, 0, p.rows, begin, count, mean, zc);
    for (int64_t k = 0; k < p.deflated; ++k) {
      const int64_t j = index[k] - begin;
      if (j < 0 || j >= count) continue;
      for (int64_t n = 0; n < p.rows; ++n) {
        taken[k * p.rows + n] = zc[n * count + j];
        zc[n * count + j] = 0.f;
      }
    }
    add_symmetric(gram, common::strided(scratch, {p.rows, count}, {count, 1}, 0), begin > 0);
  }

  float* matrix = static_cast<float*>(gram.data_ptr());
  mirror(matrix, p.rows);
  double sum = restore_deflated(matrix, p.rows, taken.data(), p.deflated, deflated);
  for (int64_t j = 0; j < p.dim; ++j) {
    if (std::find(index, index + p.deflated, j) == index + p.deflated) {
      sum -= static_cast<double>(scatter[j]) * scatter[j];
    }
  }
  return sum;
}

// The same on the D x D side: fills `matrix` with Zc^T Zc, its diagonal zero.
double covariance_side(const Problem& p, const Rows& z, int64_t group, const float* mean,
                       const Tensor& matrix, const Tensor& scratch, int64_t chunk) {
  float* zc = static_cast<float*>(scratch.data_ptr());
  for (int64_t begin = 0; begin < p.rows; begin += chunk) {
    const int64_t count = std::min(chunk, p.rows - begin);
    centre(z, group, begin, count, 0, p.dim, mean, zc);
    add_symmetric(matrix, common::strided(scratch, {p.dim, count}, {1, p.dim}, 0), begin > 0);
  }
  float* values = static_cast<float*>(matrix.data_ptr());
  mirror(values, p.dim);
  for (int64_t j = 0; j < p.dim; ++j) values[j * (p.dim + 1)] = 0.f;
  return square_sum(values, p.dim * p.dim);
}

VICREG_VECTOR void gradient_row(const float* product, const float* centred, const float* factor,
                                const float* own, const float* other, const Coefficients& a,
                                int64_t count, float* out) {
  if (other == nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = gradient(a, product[j], factor[j], centred[j], 0.f);
    }
  } else {
    for (int64_t j = 0; j < count; ++j) {
      out[j] = gradient(a, product[j], factor[j], centred[j], own[j] - other[j]);
    }
  }
}

// One view's gradient. `other` is the other view, or null.
void view_gradient(const Problem& p, const Rows& z, const Rows* other, const Coefficients& a,
                   const float* moments, const Tensor& squares, const float* deflated,
                   const int64_t* index, float margin, float eps, const Tensor& grad) {
  const ScalarType dtype = grad.scalar_type();
  const int64_t chunk = chunk_length(p.gram ? p.rows : p.dim, p.gram ? p.dim : p.rows);
  const int64_t area = chunk * (p.gram ? p.rows : p.dim);
  const Tensor scratch = common::empty(grad, {2, area}, ScalarType::Float);
  float* zc = static_cast<float*>(scratch.data_ptr());
  std::vector<float> factor(p.dim), slope(p.dim);

  for (int64_t g = 0; g < p.groups; ++g) {
    const float* mean = moments + g * 2 * p.dim;
    const float* scatter = mean + p.dim;
    hinge_slopes(scatter, p.dim, p.degrees, margin, eps, slope.data());
    for (int64_t j = 0; j < p.dim; ++j) {
      factor[j] = column_factor(a, slope[j], p.gram ? scatter[j] : 0.f);
    }
    for (int64_t k = 0; k < p.deflated; ++k) {
      const int64_t j = index[g * p.deflated + k];
      factor[j] = column_factor(a, slope[j], 0.f);
    }
    const Tensor square = common::strided(squares, {p.side, p.side}, {p.side, 1},
                                          g * p.side * p.side);
    const int64_t extent = p.gram ? p.dim : p.rows;
    for (int64_t begin = 0; begin < extent; begin += chunk) {
      // The chunk: rows [row, row + rows), columns [column, column + columns).
      const int64_t length = std::min(chunk, extent - begin);
      const int64_t row = p.gram ? 0 : begin, rows = p.gram ? p.rows : length;
      const int64_t column = p.gram ? begin : 0, columns = p.gram ? length : p.dim;
      const int64_t origin = (g * p.rows + row) * p.dim + column;
      centre(z, g, row, rows, column, columns, mean, zc);
      const Tensor centred = common::strided(scratch, {rows, columns}, {columns, 1}, 0);
      const Tensor product = common::strided(scratch, {rows, columns}, {columns, 1}, area);
      if (p.gram) {
        common::addmm_cpu(product, square, centred, 0.0);
      } else {
        common::addmm_cpu(product, centred, square, 0.0);
      }
      torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / columns),
                                  [&](int64_t first, int64_t last) {
        std::vector<float> own_scratch(columns), other_scratch(columns);
        for (int64_t n = first; n < last; ++n) {
          float* out = zc + area + n * columns;
          for (int64_t k = 0; k < p.deflated; ++k) {
            const int64_t j = index[g * p.deflated + k] - column;
            if (j >= 0 && j < columns) out[j] = deflated[(g * p.deflated + k) * p.rows + n];
          }
          const float* own = nullptr;
          const float* opposite = nullptr;
          if (other != nullptr) {
            own = z.read(g, row + n, column, columns, own_scratch.data());
            opposite = other->read(g, row + n, column, columns, other_scratch.data());
          }
          const bool in_place = dtype == ScalarType::Float;
          float* target = in_place ? static_cast<float*>(grad.data_ptr()) + origin + n * p.dim : out;
          gradient_row(out, zc + n * columns, factor.data() + column, own, opposite, a, columns,
                       target);
          if (!in_place) {
            common::write_row(target, columns, dtype, grad.data_ptr(), origin + n * p.dim);
          }
        }
      });
    }
  }
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, std::optional<Tensor> y, double margin, double eps, bool unbiased,
    std::vector<double> scales, std::vector<double> weights) {
  const Problem p(x, unbiased);
  const int64_t views = y ? 2 : 1;
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return common::empty(x, sizes, dtype);
  };
  const Tensor terms = make({4}, ScalarType::Float);
  const Tensor moments = make({views, p.groups, 2, p.dim}, ScalarType::Float);
  const Tensor squares = make({views, p.groups, p.side, p.side}, ScalarType::Float);
  const Tensor deflated = make({views, p.groups, p.deflated, p.rows}, ScalarType::Float);
  const Tensor index = make({views, p.groups, p.deflated}, ScalarType::Long);
  const Tensor centred = make({0}, ScalarType::Float);

  const Rows rows_x(x);
  const std::optional<Rows> rows_y = y ? std::optional<Rows>(Rows(*y)) : std::nullopt;
  float* moment = static_cast<float*>(moments.data_ptr());
  const double invariance = column_statistics(rows_x, rows_y ? &*rows_y : nullptr, p.groups,
                                              p.rows, p.dim, moment);

  const int64_t chunk = chunk_length(p.gram ? p.rows : p.dim, p.gram ? p.dim : p.rows);
  const Tensor scratch = make({chunk * (p.gram ? p.rows : p.dim)}, ScalarType::Float);
  double hinges = 0.0, squared = 0.0;
  for (int64_t v = 0; v < views; ++v) {
    const Rows& z = v == 0 ? rows_x : *rows_y;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t at = v * p.groups + g;
      const float* own = moment + at * 2 * p.dim;
      hinges += hinge_sum(own + p.dim, p.dim, p.degrees, static_cast<float>(margin),
                          static_cast<float>(eps));
      const Tensor square = common::strided(squares, {p.side, p.side}, {p.side, 1},
                                            at * p.side * p.side);
      squared += p.gram ? gram_side(p, z, g, own, square, scratch, chunk,
                                    static_cast<int64_t*>(index.data_ptr()) + at * p.deflated,
                                    static_cast<float*>(deflated.data_ptr()) +
                                        at * p.deflated * p.rows)
                        : covariance_side(p, z, g, own, square, scratch, chunk);
    }
  }

  const double groups = static_cast<double>(p.groups), columns = groups * p.dim;
  const std::array<double, 3> raw = {invariance / (columns * p.rows), hinges / columns,
                                     squared / (groups * p.degrees * p.degrees)};
  float* term = static_cast<float*>(terms.data_ptr());
  double loss = 0.0;
  for (int i = 0; i < 3; ++i) {
    loss += weights[i] * scales[i] * raw[i];
    term[i + 1] = static_cast<float>(scales[i] * raw[i]);
  }
  term[0] = static_cast<float>(loss);
  return {terms, moments, squares, deflated, index, centred};
}

std::tuple<Tensor, Tensor> backward(Tensor grads, Tensor x, std::optional<Tensor> y, Tensor moments,
                                    Tensor squares, Tensor deflated, Tensor index, Tensor,
                                    bool need_x, bool need_y, double margin, double eps,
                                    bool unbiased, std::vector<double> scales,
                                    std::vector<double> weights) {
  const Problem p(x, unbiased);
  const std::array<float, 3> scale = {float(scales[0]), float(scales[1]), float(scales[2])};
  const std::array<float, 3> weight = {float(weights[0]), float(weights[1]), float(weights[2])};
  const float groups = static_cast<float>(p.groups), columns = groups * p.dim;
  const Coefficients a =
      coefficients(static_cast<const float*>(grads.data_ptr()), grads.numel(), scale.data(),
                   weight.data(), groups, columns, columns * p.rows, p.degrees);

  const Rows rows_x(x);
  const std::optional<Rows> rows_y = y ? std::optional<Rows>(Rows(*y)) : std::nullopt;
  std::array<Tensor, 2> out;
  for (int64_t v = 0; v < 2; ++v) {
    if (!(v == 0 ? need_x : need_y)) {
      out[v] = common::empty(x, {0}, x.scalar_type());
      continue;
    }
    out[v] = common::empty(x, {p.groups, p.rows, p.dim}, x.scalar_type());
    const int64_t at = v * p.groups;
    const Rows& own = v == 0 ? rows_x : *rows_y;
    const Rows* other = y ? (v == 0 ? &*rows_y : &rows_x) : nullptr;
    view_gradient(p, own, other, a,
                  static_cast<const float*>(moments.data_ptr()) + at * 2 * p.dim,
                  common::strided(squares, {p.groups, p.side, p.side},
                                  {p.side * p.side, p.side, 1}, at * p.side * p.side),
                  static_cast<const float*>(deflated.data_ptr()) + at * p.deflated * p.rows,
                  static_cast<const int64_t*>(index.data_ptr()) + at * p.deflated,
                  static_cast<float>(margin), static_cast<float>(eps), out[v]);
  }
  return {out[0], out[1]};
}

}  // namespace vicreg
