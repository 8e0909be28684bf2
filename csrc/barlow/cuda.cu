// Barlow Twins on CUDA: what is launched, and why. Times: not measured yet.
//
// With E = N D elements a view, m = min(N, D), e the bytes of an element:
//
//   forward                reads and writes (bytes)               operations
//   column_partials        2 e E                                  14 E
//   column_finish          20 D x row blocks                      small
//   standardise            4 e E                                  8 E
//   bmm (torch)            N < D: 2 e E + 8 N^2, else + 4 D^2     4 N^2 D (two Gram matrices), 2 N D^2
//   gram_rows, cross_rows  4 N^2, 8 D^2                           N^2, 2 D^2; then the loss
//   backward
//   round_grams            N < D, half inputs only: (8 + 2 e) N^2
//   cross_squares          N >= D: 4 D^2 (half inputs: + e D^2)   4 D^2
//   bmm a view (torch)     e E + 4 m^2 + 4 E                      2 m E
//   product_sums           N < D: (8 + 2 e) E                     4 E
//   gradient_rows          (8 + 4 e) E                            10 E
//   half inputs: products in pieces, each with its product_sums and gradient_rows
//
// So 5 launches forward and at most 5 backward. No result depends on the host: no synchronisation,
// and all memory from torch's allocator, so CUDA graphs capture it.
//
// The floor: at 2 x 2048 x 8192 the products are 8 N^2 D = 275 GFLOP against the 6 N D^2 = 825 of
// the published form. In float32 they take 4.1 ms at an H100's 67 TFLOP/s, and everything above
// moves 1.6 GB, 0.5 ms at 3.35 TB/s. In bfloat16 the products fall to 0.3 ms at the tensor cores'
// peak and the 1.1 GB to 0.3 ms, which is why each pass reads both views at once.
//
// The products run on `standardised`, written once in the input's dtype, so that half inputs use the
// tensor cores with float32 results, and on contiguous rows whatever strides came in; the epilogues
// standardise the views' own values, which that dtype rounds no further. What comes off the Gram matrices' inner product, the squared
// diagonal of C, is computed from the values that are multiplied, rounding included; the C_jj of the
// loss's first term and of the gradient come from the comoment in float32.
//
// The standardisation's gradient needs for each column the means of g and of g z. The first is zero:
// g is a combination of columns that are centred, z of the other view and K z with K centred on both
// sides; what rounding leaves of it is below the rounding of g. The second where N >= D is
// 2 ((C_jj - 1) C_jj + lambd sum over i != j of C_ij^2), so there the epilogue is a single pass; where
// N < D that sum is z' K z and takes a pass over the product.
//
// Float products follow torch's own TF32 setting, off unless the user turns it on; where the call
// asks for tf32x3, common/cuda/tf32_product.cuh multiplies in place of bmm. For half inputs
// the gradient's product multiplies the square matrix rounded to half, times a power of two by which
// float16 cannot overflow: C_ij is at most 1, an element of a Gram matrix at most N D.
#include <algorithm>
#include <array>

#include "barlow/barlow.h"
#include "barlow/formula.h"
#include "barlow/cuda/gradient.cuh"
#include "barlow/cuda/squares.cuh"
#include "barlow/cuda/statistics.cuh"
#include "common/cuda/plan.cuh"
#include "common/cuda/tf32_product.h"

// Elements of float32 that a product for half inputs may take before it is done in pieces; small in
// the emulator's build, so that the pieces are tested.
#ifndef BARLOW_PRODUCT_ELEMENTS
#define BARLOW_PRODUCT_ELEMENTS (4 << 20)
#endif

namespace barlow {
namespace {

using common::aligned, common::blocks_of, common::blocks_of_warps, common::ceil_div, common::Chunk;
using common::cut, common::data, common::product, common::Queue, common::ScalarType;
using namespace kernels;

struct Problem {
  Problem(const Tensor& x, double eps, double std_eps, bool unbiased, bool tf32x3)
      : rows(x.size(0)),
        dim(x.size(1)),
        gram(rows < dim),
        side(std::min(rows, dim)),
        standard{static_cast<float>(rows - (unbiased ? 1 : 0)), static_cast<float>(eps),
                 static_cast<float>(std_eps)},
        dtype(x.scalar_type()),
        tf32x3(tf32x3 && dtype == ScalarType::Float) {}

  int64_t rows, dim;
  bool gram;
  int64_t side;
  Standard standard;
  ScalarType dtype;
  bool tf32x3;
};

template <typename T>
View<T> view(const Tensor& z) {  // [N, D]
  return {static_cast<const T*>(z.const_data_ptr()), 0, z.stride(0), z.stride(1)};
}

// run(element, vectors) with an element of the views' dtype and whether 16-byte accesses are aligned.
template <typename F>
void by_kind(const Tensor& x, const Tensor& y, F&& run) {
  common::by_kind("barlow", x.scalar_type(), aligned(x) && aligned(y), run);
}

// A chunk of one of the two views of `standardised`: upright [1, rows, columns], else its transpose.
Tensor part(const Problem& p, const Tensor& standardised, int64_t v, bool upright, const Chunk& c) {
  const int64_t at = (v * p.rows + c.row) * p.dim + c.column, all = p.rows * p.dim;
  return upright ? common::strided(standardised, {1, c.rows, c.columns}, {all, p.dim, 1}, at)
                 : common::strided(standardised, {1, c.columns, c.rows}, {all, 1, p.dim}, at);
}

template <typename T, bool Vectors>
void forward_kernels(const Problem& p, const Tensor& x, const Tensor& y, double lambd,
                     const Tensor& loss, const Tensor& moments, const Tensor& diagonal,
                     const Tensor& products, const Tensor& standardised) {
  const Queue queue(x);
  const Views<T> both = {view<T>(x), view<T>(y)};
  const Cut c = cut(1, 0, p.rows, 0, p.dim, kColumns<T, Vectors>, 2 * queue.multiprocessors());
  const auto finish_blocks = static_cast<unsigned>(ceil_div(p.dim, kThreads));
  const unsigned square_blocks = blocks_of_warps(p.side, queue);

  // Scratch: float64 sums of blocks; float32 partial statistics, then parts of the diagonal; the
  // counter.
  const Tensor sums = common::empty(x, {int64_t{finish_blocks} + square_blocks},
                                    ScalarType::Double);
  const int64_t partial_count = c.row_blocks * kMoments * p.dim;
  const Tensor floats = common::empty(
      x, {partial_count + (p.gram ? c.row_blocks * p.dim : 0)}, ScalarType::Float);
  float* stored = p.gram ? data<float>(floats) + partial_count : nullptr;
  const Tensor counter = common::empty(x, {1}, ScalarType::Int);
  auto* done = reinterpret_cast<unsigned*>(data<int>(counter));

  queue.launch(&column_partials<T, Vectors>, blocks_of(c), kThreads, 0, both, c, p.dim,
               data<float>(floats));
  queue.launch(&column_finish<T>, finish_blocks, kThreads, 0, both, c, p.standard,
               data<float>(floats), data<float>(moments), data<float>(diagonal),
               data<double>(sums), done);
  queue.launch(&standardise<T, Vectors>, blocks_of(c), kThreads, 0, both, c, p.standard,
               data<float>(moments), data<T>(standardised), stored);

  const double factor = p.gram ? lambd / (static_cast<double>(p.rows) * p.rows) : lambd;
  const Finish finish = {data<double>(sums), finish_blocks, factor, done, data<float>(loss)};
  double* square_sums = data<double>(sums) + finish_blocks;
  const int64_t scratch = common::product_scratch(standardised);
  if (p.gram) {
    const int64_t all = p.rows * p.dim;
    product(queue, p.tf32x3, common::strided(standardised, {2, p.rows, p.dim}, {all, p.dim, 1}, 0),
            common::strided(standardised, {2, p.dim, p.rows}, {all, 1, p.dim}, 0), products, true,
            scratch);
    queue.launch(&gram_rows, square_blocks, kThreads, 0, p.rows, p.dim, c.row_blocks,
                 data<float>(products), stored, square_sums, finish);
  } else {
    const Chunk whole(p.rows, p.dim, 0, p.rows, p.rows);
    product(queue, p.tf32x3, part(p, standardised, 0, false, whole),
            part(p, standardised, 1, true, whole), products, false, scratch);
    queue.launch(&cross_rows, square_blocks, kThreads, 0, p.dim, 1.f / static_cast<float>(p.rows),
                 data<float>(products), square_sums, finish);
  }
}

// The largest power of two that keeps the square matrix in float16's range.
template <typename T>
double rounding_power(const Problem& p) {
  if (std::is_same_v<T, float>) return 1.0;
  const double largest = p.gram ? static_cast<double>(p.rows) * p.dim : 1.0;
  return std::exp2(std::floor(std::log2(32768.0 / largest)));
}

template <typename T, bool Vectors>
void backward_kernels(const Problem& p, const Tensor& grad, const Tensor& x, const Tensor& y,
                      const Tensor& moments, const Tensor& diagonal, const Tensor& products,
                      const Tensor& standardised, double lambd, std::array<Tensor, 2> out,
                      std::array<bool, 2> wanted) {
  constexpr bool direct = std::is_same_v<T, float>;  // the product lands in the gradient itself
  const Queue queue(x);
  const Views<T> both = {view<T>(x), view<T>(y)};
  const double power = rounding_power<T>(p);

  Gradient<T> g = {};
  g.grad = data<float>(grad);
  g.standard = p.standard;
  g.lambd = static_cast<float>(lambd);
  g.power = static_cast<float>(1.0 / power);
  g.rows = p.rows;
  g.dim = p.dim;
  g.moments = data<float>(moments);
  g.diagonal = data<float>(diagonal);

  // The square operand, and where N >= D the sums of its squares.
  const int64_t area = p.side * p.side;
  Tensor square = products, sums;
  if (!direct) square = common::empty(products, {p.gram ? 2 : 1, p.side, p.side}, p.dtype);
  if (!p.gram) {
    const Cut c = cut(1, 0, p.dim, 0, p.dim, 4, 2 * queue.multiprocessors());
    sums = common::empty(products, {c.tiles + c.row_blocks, p.dim}, ScalarType::Float);
    float* by_row = data<float>(sums);
    float* by_column = by_row + c.tiles * p.dim;
    queue.launch(&cross_squares<T>, blocks_of(c), kThreads, 0, c, data<float>(products),
                 static_cast<float>(power), data<T>(square), by_row, by_column);
    g.parts[0] = {by_row, c.tiles, p.dim};
    g.parts[1] = {by_column, c.row_blocks, p.dim};
  } else if constexpr (!direct) {
    queue.launch(&round_grams<T>, blocks_of_warps(2 * p.rows, queue), kThreads, 0, p.rows,
                 data<float>(products), static_cast<float>(power), data<T>(square));
  }

  // Pieces are columns (N < D) or rows.
  const int64_t extent = p.gram ? p.dim : p.rows;
  const int64_t piece =
      direct ? extent : common::piece_length(BARLOW_PRODUCT_ELEMENTS, p.side, extent);
  std::array<Tensor, 2> scratch;
  for (int v = 0; v < 2; ++v) {
    if (!wanted[v]) continue;
    g.out[v] = data<T>(out[v]);
    scratch[v] = direct ? out[v] : common::empty(products, {p.side * piece}, ScalarType::Float);
  }
  for (int64_t begin = 0; begin < extent; begin += piece) {
    const Chunk chunk(p.rows, p.dim, begin, piece, extent);
    const Cut c = cut(1, chunk, kGradientColumns, 4 * queue.multiprocessors());
    for (int v = 0; v < 2; ++v) {
      if (!wanted[v]) continue;
      const Tensor target = common::strided(scratch[v], {1, c.rows, c.columns},
                                            {c.rows * c.columns, c.columns, 1}, 0);
      if (p.gram) {  // K of the other view times this one
        product(queue, p.tf32x3,
                common::strided(square, {1, p.side, p.side}, {area, p.side, 1}, (1 - v) * area),
                part(p, standardised, v, true, chunk), target, false, 0);
      } else {  // the other view times C^T or C
        product(queue, p.tf32x3, part(p, standardised, 1 - v, true, chunk),
                common::strided(square, {1, p.side, p.side},
                                {area, v == 0 ? 1 : p.side, v == 0 ? p.side : 1}, 0),
                target, false, 0);
      }
      const bool apart = p.gram && !direct;  // the diagonal, from the Gram matrix
      g.product[v] = {data<float>(target), c.columns,
                      apart ? data<float>(products) + (1 - v) * area : nullptr};
    }
    if (p.gram) {
      const Cut s = cut(1, chunk, kGradientColumns, 2 * queue.multiprocessors());
      sums = common::empty(products, {s.row_blocks, 2, s.columns}, ScalarType::Float);
      queue.launch(&product_sums<T, Vectors>, blocks_of(s), kThreads, 0, both, s, g,
                   data<float>(sums));
      for (int v = 0; v < 2; ++v) {
        g.parts[v] = {data<float>(sums) + v * s.columns, s.row_blocks, 2 * s.columns};
      }
    }
    queue.launch(&gradient_rows<T, Vectors>, blocks_of(c), kThreads, 0, both, c, g);
  }
}

}  // namespace

const bool kSavesStandardised = true;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> forward(Tensor x, Tensor y, double eps,
                                                           double std_eps, bool unbiased,
                                                           double lambd, bool tf32x3) {
  const Problem p(x, eps, std_eps, unbiased, tf32x3);
  const Tensor loss = common::empty(x, {1}, ScalarType::Float);
  const Tensor moments = common::empty(x, {2, 3, p.dim}, ScalarType::Float);
  const Tensor diagonal = common::empty(x, {p.dim}, ScalarType::Float);
  const Tensor products = common::empty(x, {p.gram ? 2 : 1, p.side, p.side}, ScalarType::Float);
  const Tensor standardised = common::empty(x, {2, p.rows, p.dim}, p.dtype);
  by_kind(x, y, [&](auto element, auto vectors) {
    forward_kernels<decltype(element), vectors>(p, x, y, lambd, loss, moments, diagonal, products,
                                                standardised);
  });
  return {loss, moments, diagonal, products, standardised};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor x, Tensor y, Tensor moments,
                                    Tensor diagonal, Tensor products, Tensor standardised,
                                    bool need_x, bool need_y, double eps, double std_eps,
                                    bool unbiased, double lambd, bool tf32x3) {
  const Problem p(x, eps, std_eps, unbiased, tf32x3);
  const std::array<bool, 2> wanted = {need_x, need_y};
  std::array<Tensor, 2> out;
  for (int v = 0; v < 2; ++v) {
    out[v] = wanted[v] ? common::empty(x, {p.rows, p.dim}, p.dtype)
                       : common::empty(x, {0}, p.dtype);
  }
  if (need_x || need_y) {
    by_kind(x, y, [&](auto element, auto vectors) {
      backward_kernels<decltype(element), vectors>(p, grad, x, y, moments, diagonal, products,
                                                   standardised, lambd, out, wanted);
    });
  }
  return {out[0], out[1]};
}

}  // namespace barlow
