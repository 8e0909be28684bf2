// The VICReg op on the CPU.
//
// Memory: x and y are read twice forward (statistics; centring) and once backward, in cache-sized
// chunks of columns (N < D) or rows (N >= D), so that no centred N x D copy is ever stored. The
// products, 2 N D min(N, D) operations each, go to torch's own matmul chunk by chunk; of the
// symmetric one only the lower trapezoids of row blocks are computed. Everything elementwise runs
// on a chunk that is still in cache.
//
// Threads take whole tasks (a view of a group, or a part of its chunks): three parallel regions a
// step in place of one around every pass over every chunk, which cost up to 50 times the work
// itself where another process held a core. Inside a task torch's matmul runs on one thread.
//
// Own AVX2 products (4 x 24 and 3 x 4 tiles, centring and epilogue fused) reached 43-77 GFLOP/s a
// core where MKL reached 41-75 of a peak of 101: no gain worth the code.
#include <algorithm>
#include <array>
#include <numeric>

#include "common/cpu/products.h"
#include "common/cpu/rows.h"
#include "common/cpu/statistics.h"
#include "common/cpu/tasks.h"
#include "common/tensors.h"
#include "common/cpu/vector.h"
#include "vicreg/formula.h"
#include "vicreg/cpu/deflation.h"
#include "vicreg/cpu/hinge.h"
#include "vicreg/vicreg.h"

namespace vicreg {
namespace {

using common::Chunk;
using common::Matrix;
using common::Range;
using common::Rows;
using common::ScalarType;
using common::Split;

struct Problem {
  explicit Problem(const Tensor& x, bool unbiased)
      : groups(x.dim() == 3 ? x.size(0) : 1),
        rows(x.size(-2)),
        dim(x.size(-1)),
        gram(rows < dim),
        side(std::min(rows, dim)),
        length(std::max(rows, dim)),
        deflated_count(gram ? std::min(kDeflatedColumns, dim) : 0),
        degrees(static_cast<float>(rows - (unbiased ? 1 : 0))) {}

  int64_t groups, rows, dim;
  bool gram;
  int64_t side, length, deflated_count;
  float degrees;
};

KERNELS_VECTOR void centre_row(const float* row, const float* origin, const float* offset,
                              int64_t count, float* out) {
  for (int64_t j = 0; j < count; ++j) out[j] = (row[j] - origin[j]) - offset[j];
}

// zc[n - c.row, j - c.column] = z[n, j] - mean[j], the mean in two parts: moments [3, dim].
void centre(const Rows& z, int64_t group, const Chunk& c, const float* moments, int64_t dim,
            float* zc) {
  const int64_t grain = std::max<int64_t>(1, 32768 / c.columns);
  torch::stable::parallel_for(0, c.rows, grain, [&](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      float* out = zc + n * c.columns;  // also the scratch: it is read before it is written
      centre_row(z.read(group, c.row + n, c.column, c.columns, out), moments + c.column,
                 moments + dim + c.column, c.columns, out);
    }
  });
}

// The part of Kr = Zr Zr^T that the columns of `range` add (docs/cancellation.md), lower triangle.
// deflated_columns: [K, N], where those of the range go.
void add_gram(const Problem& p, const Rows& z, int64_t group, const float* moments,
              const int64_t* index, const Range& range, const Matrix& matrix,
              float* deflated_columns) {
  const Tensor scratch = common::empty(matrix.base, {p.rows * range.chunk}, ScalarType::Float);
  float* zc = static_cast<float*>(scratch.data_ptr());
  for (int64_t begin = range.begin; begin < range.end; begin += range.chunk) {
    const Chunk c(p.rows, p.dim, begin, range.chunk, range.end);
    centre(z, group, c, moments, p.dim, zc);
    for (int64_t k = 0; k < p.deflated_count; ++k) {
      if (index[k] < begin || index[k] >= begin + c.columns) continue;
      const int64_t j = index[k] - begin;
      for (int64_t n = 0; n < p.rows; ++n) {
        deflated_columns[k * p.rows + n] = zc[n * c.columns + j];
        zc[n * c.columns + j] = 0.f;
      }
    }
    common::add_symmetric(matrix, common::contiguous(scratch, c, 0), begin > range.begin);
  }
}

// The part of Zc^T Zc that the rows of `range` add, lower triangle.
void add_covariance(const Problem& p, const Rows& z, int64_t group, const float* moments,
                    const Range& range, const Matrix& matrix) {
  const Tensor scratch = common::empty(matrix.base, {p.dim * range.chunk}, ScalarType::Float);
  float* zc = static_cast<float*>(scratch.data_ptr());
  for (int64_t begin = range.begin; begin < range.end; begin += range.chunk) {
    const Chunk c(p.rows, p.dim, begin, range.chunk, range.end);
    centre(z, group, c, moments, p.dim, zc);
    common::add_symmetric(matrix, common::contiguous(scratch, c, 0).transposed(),
                          begin > range.begin);
  }
}

// Makes the lower triangle the whole saved matrix; returns the covariance sum before scaling.
double finish_square(const Problem& p, const float* scatter, const int64_t* index,
                     const float* deflated_columns, float* matrix, float* deflated) {
  common::mirror(matrix, p.side);
  if (!p.gram) {
    for (int64_t j = 0; j < p.dim; ++j) matrix[j * (p.dim + 1)] = 0.f;
    return common::square_sum(matrix, p.dim * p.dim);
  }
  double sum = restore_deflated(matrix, p.rows, deflated_columns, p.deflated_count, deflated);
  for (int64_t j = 0; j < p.dim; ++j) {
    if (std::find(index, index + p.deflated_count, j) == index + p.deflated_count) {
      sum -= static_cast<double>(scatter[j]) * scatter[j];
    }
  }
  return sum;
}

KERNELS_VECTOR void gradient_row(const float* product, const float* centred, const float* factor,
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

// The gradient of one view of one group, over the columns or rows of `range`. `other` is the other
// view, or null; grad is the whole view's.
void add_gradient(const Problem& p, const Rows& z, const Rows* other, int64_t group,
                  const Coefficients& a, const float* moments, const Matrix& square,
                  const float* deflated, const int64_t* index, float margin, float eps,
                  const Range& range, const Tensor& grad) {
  const ScalarType dtype = grad.scalar_type();
  const int64_t area = range.chunk * (p.gram ? p.rows : p.dim);
  const Tensor scratch = common::empty(grad, {2, area}, ScalarType::Float);
  float* zc = static_cast<float*>(scratch.data_ptr());
  std::vector<float> factor(p.dim);
  const float* scatter = moments + 2 * p.dim;
  hinge_slopes(scatter, p.dim, p.degrees, margin, eps, factor.data());
  // An index out of range is never followed.
  const auto named = [&](int64_t k) { return index[k] >= 0 && index[k] < p.dim; };
  std::vector<float> slope(p.deflated_count);
  for (int64_t k = 0; k < p.deflated_count; ++k) slope[k] = named(k) ? factor[index[k]] : 0.f;
  for (int64_t j = 0; j < p.dim; ++j) {
    factor[j] = column_factor(a, factor[j], p.gram ? scatter[j] : 0.f);
  }
  for (int64_t k = 0; k < p.deflated_count; ++k) {
    if (named(k)) factor[index[k]] = column_factor(a, slope[k], 0.f);
  }

  for (int64_t begin = range.begin; begin < range.end; begin += range.chunk) {
    const Chunk c(p.rows, p.dim, begin, range.chunk, range.end);
    const int64_t origin = (group * p.rows + c.row) * p.dim + c.column;
    centre(z, group, c, moments, p.dim, zc);
    // Not into the gradient itself: its rows lie D apart, and D is a power of two more often than
    // not, which puts a tile of the product's result into one cache set.
    const Matrix centred = common::contiguous(scratch, c, 0);
    const Matrix product = common::contiguous(scratch, c, area);
    common::multiply(product, p.gram ? square : centred, p.gram ? centred : square, false);
    torch::stable::parallel_for(0, c.rows, std::max<int64_t>(1, 16384 / c.columns),
                                [&](int64_t first, int64_t last) {
      std::vector<float> own_scratch(c.columns), other_scratch(c.columns);
      for (int64_t n = first; n < last; ++n) {
        float* out = zc + area + n * c.columns;
        for (int64_t k = 0; k < p.deflated_count; ++k) {
          if (index[k] < c.column || index[k] >= c.column + c.columns) continue;
          out[index[k] - c.column] = deflated[k * p.rows + n];
        }
        const float* own = nullptr;
        const float* opposite = nullptr;
        if (other != nullptr) {
          own = z.read(group, c.row + n, c.column, c.columns, own_scratch.data());
          opposite = other->read(group, c.row + n, c.column, c.columns, other_scratch.data());
        }
        const bool in_place = dtype == ScalarType::Float;
        const int64_t at = origin + n * p.dim;
        float* target = in_place ? static_cast<float*>(grad.data_ptr()) + at : out;
        gradient_row(out, zc + n * c.columns, factor.data() + c.column, own, opposite, a,
                     c.columns, target);
        if (!in_place) common::write_row(target, c.columns, dtype, grad.data_ptr(), at);
      }
    });
  }
}

}  // namespace

const bool kSavesCentred = false;
const bool kTakesRows = true;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, std::optional<Tensor> y, double margin, double eps, bool unbiased,
    std::vector<double> scales, std::vector<double> weights, bool) {
  const Problem p(x, unbiased);
  const int64_t views = y ? 2 : 1;
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return common::empty(x, sizes, dtype);
  };
  const Tensor terms = make({4}, ScalarType::Float);
  const Tensor moments = make({views, p.groups, 3, p.dim}, ScalarType::Float);
  const Tensor squares = make({views, p.groups, p.side, p.side}, ScalarType::Float);
  const Tensor deflated = make({views, p.groups, p.deflated_count, p.rows}, ScalarType::Float);
  const Tensor index = make({views, p.groups, p.deflated_count}, ScalarType::Long);
  const Tensor centred = make({0}, ScalarType::Float);

  const Rows rows_x(x);
  const std::optional<Rows> rows_y = y ? std::optional<Rows>(Rows(*y)) : std::nullopt;
  float* moment = static_cast<float*>(moments.data_ptr());
  const double invariance = common::column_statistics(
      rows_x, rows_y ? &*rows_y : nullptr, p.groups, p.rows, p.dim, moment);

  // Parts of one matrix's long side, when there are fewer matrices than threads; every part but the
  // first sums into a matrix of its own.
  const int64_t planes = views * p.groups;
  const Split split(p.side, p.length, planes, 1 + p.length / p.side);
  const int64_t area = p.side * p.side;
  const Tensor partial =
      split.parts == 1 ? squares : make({planes * (split.parts - 1) * area}, ScalarType::Float);
  // Zero where there are none.
  std::vector<float> deflated_columns(p.gram ? planes * kDeflatedColumns * p.rows : 0);
  std::vector<double> hinges(planes), squared(planes);
  int64_t* chosen = static_cast<int64_t*>(index.data_ptr());
  const auto scatter_of = [&](int64_t plane) { return moment + (3 * plane + 2) * p.dim; };
  for (int64_t plane = 0; p.gram && plane < planes; ++plane) {
    largest_columns(scatter_of(plane), p.dim, p.deflated_count, chosen + plane * p.deflated_count);
  }
  const auto finish = [&](int64_t plane) {
    float* matrix = static_cast<float*>(squares.data_ptr()) + plane * area;
    for (int64_t part = 1; part < split.parts; ++part) {
      common::add_scaled(static_cast<float*>(partial.data_ptr()) +
                             (plane * (split.parts - 1) + part - 1) * area,
                         1.f, area, matrix);
    }
    hinges[plane] = hinge_sum(scatter_of(plane), p.dim, p.degrees, static_cast<float>(margin),
                              static_cast<float>(eps));
    squared[plane] = finish_square(
        p, scatter_of(plane), chosen + plane * p.deflated_count,
        deflated_columns.data() + (p.gram ? plane * kDeflatedColumns * p.rows : 0), matrix,
        static_cast<float*>(deflated.data_ptr()) + plane * p.deflated_count * p.rows);
  };
  common::run_tasks(planes * split.parts, [&](int64_t task) {
    const int64_t plane = task / split.parts, part = task % split.parts;
    const Rows& z = plane < p.groups ? rows_x : *rows_y;
    const int64_t place = part == 0 ? plane : plane * (split.parts - 1) + part - 1;
    const Matrix matrix =
        common::contiguous(part == 0 ? squares : partial, p.side, p.side, place * area);
    const float* own = moment + 3 * plane * p.dim;
    if (p.gram) {
      add_gram(p, z, plane % p.groups, own, chosen + plane * p.deflated_count, split.range(part),
               matrix, deflated_columns.data() + plane * kDeflatedColumns * p.rows);
    } else {
      add_covariance(p, z, plane % p.groups, own, split.range(part), matrix);
    }
    if (split.parts == 1) finish(plane);
  });
  if (split.parts > 1) common::run_tasks(planes, finish);

  const double groups = static_cast<double>(p.groups), columns = groups * p.dim;
  const double hinge_total = std::accumulate(hinges.begin(), hinges.end(), 0.0);
  const double squared_total = std::accumulate(squared.begin(), squared.end(), 0.0);
  const std::array<double, 3> raw = {invariance / (columns * p.rows), hinge_total / columns,
                                     squared_total / (groups * p.degrees * p.degrees)};
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
                                    std::vector<double> weights, bool) {
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
  std::vector<int64_t> planes;
  for (int64_t v = 0; v < 2; ++v) {
    const bool need = v == 0 ? need_x : need_y;
    out[v] = !need          ? common::empty(x, {0}, x.scalar_type())
             : x.dim() == 2 ? common::empty(x, {p.rows, p.dim}, x.scalar_type())
                            : common::empty(x, {p.groups, p.rows, p.dim}, x.scalar_type());
    for (int64_t g = 0; need && g < p.groups; ++g) planes.push_back(v * p.groups + g);
  }
  const Split split(p.side, p.length, static_cast<int64_t>(planes.size()), p.length);
  common::run_tasks(static_cast<int64_t>(planes.size()) * split.parts, [&](int64_t task) {
    const int64_t plane = planes[task / split.parts], group = plane % p.groups;
    const bool first = plane < p.groups;
    const Rows* other = y ? (first ? &*rows_y : &rows_x) : nullptr;
    add_gradient(p, first ? rows_x : *rows_y, other, group, a,
                 static_cast<const float*>(moments.data_ptr()) + 3 * plane * p.dim,
                 common::contiguous(squares, p.side, p.side, plane * p.side * p.side),
                 static_cast<const float*>(deflated.data_ptr()) + plane * p.deflated_count * p.rows,
                 static_cast<const int64_t*>(index.data_ptr()) + plane * p.deflated_count,
                 static_cast<float>(margin), static_cast<float>(eps),
                 split.range(task % split.parts), out[first ? 0 : 1]);
  });
  return {out[0], out[1]};
}

}  // namespace vicreg
