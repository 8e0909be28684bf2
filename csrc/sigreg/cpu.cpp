// The SIGReg op on the CPU.
//
// Products: 2 N D M operations forward (p = z A) and as many backward (dz = dp A^T), by torch's own
// matmul. Between them an element of p costs 29 + 20 + 2 K operations forward (angle, multiples,
// sums; cpu/sums.h) and as many backward. N = 1024, D = 128, M = 1024, K = 16 on one core of an AMD
// EPYC at 3.6 GHz, of which a vector multiply-add a cycle is the most: predicted 2 x 2.3 ms of
// products and, by 70 multiply-adds an element, 2 x 1.3 ms of the rest; measured 2 x 2.4 and
// 2 x 1.25, and 0.3 ms for drawing the directions.
//
// Memory: p is written once and read twice, by chunks of rows that are still in cache when their
// sums are formed; z is read once a task, A once a chunk. Beyond the inputs live p, the sums, the
// coefficients, a chunk a thread and, while sums are added up, their float64 doubles.
//
// Threads take whole tasks: columns (slices) forward, so that no two add to one sum, and rows
// backward. Inside a task torch's matmul runs on one thread.
#include <algorithm>
#include <vector>

#include "common/cpu/products.h"
#include "common/cpu/rows.h"
#include "common/tensors.h"
#include "sigreg/cpu/directions.h"
#include "sigreg/cpu/sums.h"
#include "sigreg/formula.h"
#include "sigreg/sigreg.h"

namespace sigreg {
namespace {

using common::Matrix;
using common::ScalarType;

// Rows and columns of p that are worked on at a time: 256 KiB, a quarter of a core's L2.
constexpr int64_t kRowChunk = 128;
constexpr int64_t kColumnChunk = 512;
// Fewer columns than this are not worth a task.
constexpr int64_t kFewColumns = 64;

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Items of `size` elements, a few nanoseconds each, that are worth a thread's waking.
int64_t worth(int64_t size) { return std::max<int64_t>(1, (int64_t{1} << 17) / size); }

int64_t threads() { return std::max<int64_t>(1, torch::stable::get_num_threads()); }

// Memory for `size` floats, or, as an empty tensor costs the host 2 us too, none: `like` again.
Tensor scratch(const Tensor& like, int64_t size) {
  return size == 0 ? like : common::empty(like, {size}, ScalarType::Float);
}

// [begin, end) cut into pieces of `size`: the i-th.
struct Piece {
  Piece(int64_t index, int64_t size, int64_t end)
      : begin(index * size), count(std::min(size, end - begin)) {}
  int64_t begin, count;
};

// Parts of a matrix of any strides and dtype as float32 matrices: views of float32, else copies in
// `scratch`.
class Block {
 public:
  explicit Block(const Tensor& matrix)  // [..., rows, columns]
      : matrix_(matrix), single_(matrix.scalar_type() == ScalarType::Float) {}

  bool single() const { return single_; }

  // Rows and columns of [G, R, C], or of [R, C] with group 0.
  Matrix read(int64_t group, Piece rows, Piece columns, const Tensor& scratch) const {
    const bool grouped = matrix_.dim() == 3;
    const int64_t down = matrix_.stride(grouped ? 1 : 0), across = matrix_.stride(grouped ? 2 : 1);
    const int64_t at = (grouped ? group * matrix_.stride(0) : 0) + rows.begin * down +
                       columns.begin * across;
    if (single_) return {matrix_, rows.count, columns.count, down, across, at};
    float* out = static_cast<float*>(scratch.mutable_data_ptr());
    const auto copy = [&](const auto* from) {
      for (int64_t n = 0; n < rows.count; ++n) {
        common::to_float(from + at + n * down, across, columns.count, out + n * columns.count);
      }
    };
    if (matrix_.scalar_type() == ScalarType::BFloat16) {
      copy(static_cast<const torch::headeronly::BFloat16*>(matrix_.const_data_ptr()));
    } else {
      copy(static_cast<const torch::headeronly::Half*>(matrix_.const_data_ptr()));
    }
    return common::contiguous(scratch, rows.count, columns.count, 0);
  }

 private:
  const Tensor& matrix_;
  bool single_;
};

}  // namespace

Tensor directions(Tensor like, std::optional<Tensor> step, int64_t number, int64_t seed,
                  int64_t dim, int64_t slices) {
  Tensor out = common::empty(like, {dim, slices}, ScalarType::Float);
  const uint64_t at = static_cast<uint64_t>(
      step ? *static_cast<const int64_t*>(step->const_data_ptr()) : number);
  float* target = static_cast<float*>(out.mutable_data_ptr());
  const int64_t grain = worth(dim * kLanes);
  torch::stable::parallel_for(0, divide_up(slices, kLanes), grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const Piece columns(i, kLanes, slices);
      draw_columns(at, static_cast<uint64_t>(seed), dim, slices, columns.begin, columns.count,
                   target);
    }
  });
  const ScalarType dtype = like.scalar_type();
  return dtype == ScalarType::Float ? out : torch::stable::to(out, dtype);
}

std::tuple<Tensor, Tensor> sums(Tensor z, Tensor directions, std::vector<double> knots) {
  const int64_t groups = z.size(0), rows = z.size(1), dim = z.size(2);
  const int64_t slices = directions.size(1), count = static_cast<int64_t>(knots.size());
  const Spacing spacing = spacing_of(knots.data(), count);
  const float start = static_cast<float>(spacing.start);
  Tensor out = common::empty(z, {groups, 2, count, slices}, ScalarType::Float);
  Tensor p = common::empty(z, {groups, rows, slices}, ScalarType::Float);
  float* const target = static_cast<float*>(out.mutable_data_ptr());
  const float* const values = static_cast<const float*>(p.const_data_ptr());
  const Block left(z), right(directions);

  // Columns a task: all threads busy, whole vectors.
  const int64_t wanted = divide_up(slices * groups, threads());
  const int64_t width = std::clamp(divide_up(wanted, kLanes) * kLanes, kFewColumns, kColumnChunk);
  const int64_t across = divide_up(slices, width);
  const int64_t held = spacing.equal ? (giants(count) + 1) * 2 * kLow : 2 * count;
  torch::stable::parallel_for(0, groups * across, 1, [&](int64_t from, int64_t to) {
    std::vector<double> running;
    const int64_t copied_z = left.single() ? 0 : kRowChunk * dim;
    const int64_t copied_a = right.single() ? 0 : dim * width;
    const Tensor z_scratch = scratch(p, copied_z), a_scratch = scratch(p, copied_a);
    for (int64_t task = from; task < to; ++task) {
      const int64_t g = task / across;
      const Piece columns(task % across, width, slices);
      const Matrix a = right.read(0, Piece(0, dim, dim), columns, a_scratch);
      const int64_t vectors = divide_up(columns.count, kLanes);
      running.assign(vectors * held * kLanes, 0.0);
      for (int64_t n = 0; n < rows; n += kRowChunk) {
        const Piece piece(n / kRowChunk, kRowChunk, rows);
        const int64_t at = (g * rows + n) * slices + columns.begin;
        common::multiply({p, piece.count, columns.count, slices, 1, at},
                         left.read(g, piece, Piece(0, dim, dim), z_scratch), a, false);
        if (spacing.equal) {
          add_rows(values + at, piece.count, slices, columns.count, giants(count), start,
                   spacing.half, running.data());
        } else {
          add_rows_each(values + at, piece.count, slices, columns.count, knots.data(), count,
                        running.data());
        }
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const Piece lanes(v, kLanes, columns.count);
        const double* own = running.data() + v * held * kLanes;
        float* to_sums = target + g * 2 * count * slices + columns.begin + lanes.begin;
        if (!spacing.equal) {
          for (int64_t i = 0; i < held; ++i) {
            for (int64_t m = 0; m < lanes.count; ++m) {
              to_sums[i * slices + m] = static_cast<float>(own[i * kLanes + m]);
            }
          }
        } else if (spacing.half) {
          resolve<true>(own, rows, count, lanes.count, slices, to_sums);
        } else {
          resolve<false>(own, rows, count, lanes.count, slices, to_sums);
        }
      }
    }
  });
  return {out, p};
}

std::tuple<Tensor, Tensor> statistic(Tensor sums, std::vector<double> knots,
                                     std::vector<double> weights, double count, double factor,
                                     double ranks) {
  const int64_t groups = sums.size(0), knot_count = sums.size(2), slices = sums.size(3);
  Tensor loss = common::empty(sums, {}, ScalarType::Float);
  Tensor out = common::empty(sums, {groups, 2, knot_count, slices}, ScalarType::Float);
  const float* const source = static_cast<const float*>(sums.const_data_ptr());
  float* const target = static_cast<float*>(out.mutable_data_ptr());
  const double share = factor / static_cast<double>(groups * slices);
  std::vector<double> partial(groups * knot_count);
  torch::stable::parallel_for(0, groups * knot_count, worth(slices), [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const int64_t k = i % knot_count;
      const int64_t at = (i / knot_count * 2 * knot_count + k) * slices;
      const int64_t other = at + knot_count * slices;
      const double phi = phi_of(knots[k]);
      double total = 0.0;
      for (int64_t m = 0; m < slices; ++m) {
        const KnotTerm term = knot_term(source[at + m], source[other + m], knots[k], phi,
                                        weights[k], count, ranks * share);
        total += term.loss;
        target[at + m] = static_cast<float>(term.a);
        target[other + m] = static_cast<float>(term.b);
      }
      partial[i] = total;
    }
  });
  double total = 0.0;
  for (const double value : partial) total += value;
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(share * total);
  return {loss, out};
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor z, Tensor directions, std::vector<double> knots,
                                           std::vector<double> weights, double count,
                                           double factor) {
  const auto [own, projections] = sums(z, directions, knots);
  const auto [loss, coefficients] = statistic(own, knots, weights, count, factor, 1.0);
  return {loss, coefficients, projections};
}

Tensor gradient(Tensor grad, Tensor coefficients, Tensor projections, Tensor directions,
                std::vector<double> knots) {
  const int64_t groups = projections.size(0), rows = projections.size(1);
  const int64_t slices = projections.size(2), dim = directions.size(0);
  const int64_t count = static_cast<int64_t>(knots.size());
  const Spacing spacing = spacing_of(knots.data(), count);
  const float start = static_cast<float>(spacing.start);
  const ScalarType dtype = directions.scalar_type();
  const bool single = dtype == ScalarType::Float;
  Tensor out = common::empty(projections, {groups, rows, dim}, dtype);
  const float scale = *static_cast<const float*>(grad.const_data_ptr());
  const float* const p = static_cast<const float*>(projections.const_data_ptr());
  const float* const factors = static_cast<const float*>(coefficients.const_data_ptr());
  const Block right(directions);

  const int64_t width = std::min(slices, kColumnChunk);
  const int64_t wanted = divide_up(rows * groups, threads());
  const int64_t height = std::clamp<int64_t>(wanted, 16, kRowChunk);
  const int64_t down = divide_up(rows, height);
  torch::stable::parallel_for(0, groups * down, 1, [&](int64_t from, int64_t to) {
    const Tensor slope = common::empty(projections, {height, width}, ScalarType::Float);
    float* const slope_at = static_cast<float*>(slope.mutable_data_ptr());
    const int64_t copied = single ? 0 : dim * width, narrowed = single ? 0 : height * dim;
    const Tensor a_scratch = scratch(projections, copied), wide = scratch(projections, narrowed);
    for (int64_t task = from; task < to; ++task) {
      const int64_t g = task / down;
      const Piece piece(task % down, height, rows);
      const int64_t row = g * rows + piece.begin;
      const Matrix target =
          common::contiguous(single ? out : wide, piece.count, dim, single ? row * dim : 0);
      for (int64_t m = 0; m < slices; m += width) {
        const Piece columns(m / width, width, slices);
        const float* own = factors + g * 2 * count * slices + m;
        if (spacing.equal) {
          slopes(p + row * slices + m, own, scale, piece.count, slices, columns.count, count,
                 slices, start, spacing.half, slope_at, width);
        } else {
          slopes_each(p + row * slices + m, own, scale, piece.count, slices, columns.count,
                      knots.data(), count, slices, slope_at, width);
        }
        const Matrix a = right.read(0, Piece(0, dim, dim), columns, a_scratch);
        common::multiply(target, {slope, piece.count, columns.count, width, 1, 0}, a.transposed(),
                         m > 0);
      }
      if (!single) {
        const float* from_wide = static_cast<const float*>(wide.const_data_ptr());
        common::write_row(from_wide, piece.count * dim, dtype, out.mutable_data_ptr(), row * dim);
      }
    }
  });
  return out;
}

}  // namespace sigreg
