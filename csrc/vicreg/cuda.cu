// The VICReg op on CUDA: what is launched, and why. Times: not measured yet.
//
// With V views, E = V G N D elements, m = min(N, D), B = V G m^2, e the bytes of an element:
//
//   forward                     reads and writes (bytes)           operations
//   column_partials             e E                                9 E, 2 more for two views
//   column_finish               8 V G D x row blocks               small
//   centre                      2 e E                              4 E
//   bmm (torch)                 e E + 4 B                          2 m E
//   gram_rows, covariance_rows  8 B (N < D), 4 B                   30 B, 2 B; then the four terms
//   backward
//   bmm a view (torch)          e E + 4 B + 4 E                    2 m E
//   gradient_rows               (4 + 2 e) E                        8 E
//   half inputs only: round_rows 6 B once; products in pieces, each with its gradient_rows
//
// So 5 launches forward and, for float inputs, 3 backward (2 for one view). No result depends on
// the host: no synchronisation, and all memory from torch's allocator, so CUDA graphs capture it.
//
// On an H100 (3.35 TB/s; 67 TFLOP/s float32 outside the tensor cores) 2 x 256 x 8192 in float32 is
// 17 MB a pass, 5 us of memory time forward for each of 3 passes, against 32 us of products at the
// peak rate and about 25 us of launches, if one costs 5 us. That is why the products are torch's
// (cuBLAS), which near its peak below m = 2048 leaves a hand-written kernel nothing to gain but the
// symmetric half, and why the passes around them are few rather than clever.
//
// One persistent launch for the whole forward at small N was counted and left out. At 2 x 64 x 8192
// it would save 4 launches, 20 us at 5 us each, but needs 4 barriers over the grid of 1.5 to 2 us
// each and a product of its own: 134 MFLOP with a 64 x 64 result, which fills the device only when
// split along D with one more barrier and a reduction, 5 us or more where cuBLAS does the same
// split itself. What is left, below 10 us of 25, is gone once the step runs in a CUDA graph, where
// a launch costs about as much as a barrier of the grid. From N = 256 on the product alone
// outweighs all launches.
//
// The product runs on `centred`, written once in the input's dtype, so that half inputs use the
// tensor cores with float32 results. Its deflated columns are zero: Kr comes out of it directly,
// and the gradient of those columns was saved in `deflated`. Everything that the Gram side
// subtracts is computed from the values that are multiplied, rounding included. Float products
// follow torch's own TF32 setting, off unless the user turns it on; with it the covariance has
// TF32's accuracy. Where the call asks for tf32x3, common/cuda/tf32_product.cuh multiplies in place
// of bmm, the symmetric half alone (1 launch more where the sum is split). It takes `centred` as
// well: to subtract n m m^T from an uncentred product would lose all digits where the mean is large
// beside the spread, and the gradient's product needs the centred values anyway. For half inputs the
// gradient's product multiplies the squares rounded to half, an error within the rounding of the
// result, each row scaled by a power of two so that float16 neither over- nor underflows. A centred
// float16 value beyond 65504 is infinite.
#include <algorithm>
#include <array>

#include "common/cuda/plan.cuh"
#include "common/cuda/tf32_product.h"
#include "vicreg/formula.h"
#include "vicreg/cuda/gradient.cuh"
#include "vicreg/cuda/squares.cuh"
#include "vicreg/cuda/statistics.cuh"
#include "vicreg/vicreg.h"

// Elements of float32 that a product for half inputs may take before it is done in pieces; small in
// the emulator's build, so that the pieces are tested.
#ifndef VICREG_PRODUCT_ELEMENTS
#define VICREG_PRODUCT_ELEMENTS (4 << 20)
#endif

namespace vicreg {
namespace {

using common::aligned, common::blocks_of, common::blocks_of_warps, common::ceil_div, common::Chunk;
using common::cut, common::data, common::product, common::Queue, common::ScalarType, common::view;
using namespace kernels;

struct Problem {
  Problem(const Tensor& x, const std::optional<Tensor>& y, bool unbiased, bool tf32x3)
      : views(y ? 2 : 1),
        groups(x.size(0)),
        rows(x.size(1)),
        dim(x.size(2)),
        batches(views * groups),
        gram(rows < dim),
        side(std::min(rows, dim)),
        deflated_count(gram ? std::min(kDeflatedColumns, dim) : 0),
        degrees(static_cast<float>(rows - (unbiased ? 1 : 0))),
        dtype(x.scalar_type()),
        tf32x3(tf32x3 && dtype == ScalarType::Float) {}

  int64_t views, groups, rows, dim, batches;
  bool gram;
  int64_t side, deflated_count;
  float degrees;
  ScalarType dtype;
  bool tf32x3;
};

template <typename T>
Views<T> views(const Tensor& x, const std::optional<Tensor>& y) {
  return {view<T>(x), y ? view<T>(*y) : View<T>{nullptr, 0, 0, 0}};
}

// run(element, vectors) with an element of x's dtype and whether 16-byte accesses are aligned.
template <typename F>
void by_kind(const Tensor& x, const std::optional<Tensor>& y, F&& run) {
  common::by_kind("vicreg", x.scalar_type(), aligned(x) && (!y || aligned(*y)), run);
}

template <typename T, bool Vectors>
void forward_kernels(const Problem& p, const Tensor& x, const std::optional<Tensor>& y,
                     double margin, double eps, const std::vector<double>& scales,
                     const std::vector<double>& weights, const Tensor& terms, const Tensor& moments,
                     const Tensor& squares, const Tensor& deflated, const Tensor& index,
                     const Tensor& centred) {
  const Queue queue(x);
  const Views<T> all = views<T>(x, y);
  constexpr int width = kColumns<T, Vectors>;
  const int64_t wanted = 2 * queue.multiprocessors();
  const Cut statistics = cut(p.groups, 0, p.rows, 0, p.dim, width, wanted);
  const Cut centring = cut(p.batches, 0, p.rows, 0, p.dim, width, wanted);
  const int64_t column_blocks = ceil_div(p.dim, kThreads);
  const int64_t candidates = column_blocks * kMostDeflated;
  const unsigned statistics_blocks = blocks_of(statistics);
  const unsigned finish_blocks = static_cast<unsigned>(p.batches * column_blocks);
  const unsigned square_blocks = blocks_of_warps(p.batches * p.side, queue);

  // Scratch: float64 sums of blocks; float32 partial statistics, then the deflated columns, the
  // scatters of what is stored and the candidates' keys; int32 candidates and the counter.
  const Tensor sums = common::empty(x, {int64_t{statistics_blocks} + finish_blocks + square_blocks},
                                    ScalarType::Double);
  double* differences = data<double>(sums);
  double* hinges = differences + statistics_blocks;
  double* square_sums = hinges + finish_blocks;
  const int64_t partial_count = statistics.row_blocks * p.batches * 2 * p.dim;
  const int64_t deflated_elements = p.batches * p.deflated_count * p.rows;
  const int64_t scatter_count = p.gram ? centring.row_blocks * p.batches * p.dim : 0;
  const Tensor floats = common::empty(
      x, {partial_count + deflated_elements + scatter_count + p.batches * candidates},
      ScalarType::Float);
  float* partials = data<float>(floats);
  float* deflated_columns = partials + partial_count;
  float* scatters = deflated_columns + deflated_elements;
  float* keys = scatters + scatter_count;
  const Tensor integers = common::empty(x, {p.batches * candidates + 1}, ScalarType::Int);
  int* key_columns = data<int>(integers);
  auto* done = reinterpret_cast<unsigned*>(key_columns + p.batches * candidates);

  queue.launch(p.views == 2 ? &column_partials<T, Vectors, 2>
                            : &column_partials<T, Vectors, 1>, statistics_blocks,
               kThreads, 0, all, statistics, p.dim, partials, differences);
  queue.launch(&column_finish<T>, finish_blocks, kThreads, 0, all, statistics, p.batches, p.dim,
               static_cast<int>(p.deflated_count), p.degrees, static_cast<float>(margin),
               static_cast<float>(eps), partials, data<float>(moments), hinges, keys, key_columns,
               done);
  const Deflation deflation = {static_cast<int>(p.deflated_count),
                               candidates,
                               keys,
                               key_columns,
                               deflated_columns,
                               scatters,
                               p.deflated_count > 0 ? data<int64_t>(index) : nullptr};
  queue.launch(&centre<T, Vectors>, blocks_of(centring), kThreads, 0, all, p.groups, centring,
               data<float>(moments), deflation, data<T>(centred));

  const Tensor upright = common::strided(centred, {p.batches, p.rows, p.dim},
                                         {p.rows * p.dim, p.dim, 1}, 0);
  const Tensor across = common::strided(centred, {p.batches, p.dim, p.rows},
                                        {p.rows * p.dim, 1, p.dim}, 0);
  const Tensor square = common::strided(squares, {p.batches, p.side, p.side},
                                        {p.side * p.side, p.side, 1}, 0);
  product(queue, p.tf32x3, p.gram ? upright : across, p.gram ? across : upright, square, true,
          common::product_scratch(centred));

  const double groups = static_cast<double>(p.groups), columns = groups * p.dim;
  const Finish finish = {
      {differences, hinges, square_sums},
      {p.views == 2 ? int64_t{statistics_blocks} : 0, finish_blocks, square_blocks},
      {scales[0] / (columns * p.rows), scales[1] / columns,
       scales[2] / (groups * p.degrees * p.degrees)},
      {weights[0], weights[1], weights[2]},
      done,
      data<float>(terms)};
  if (p.gram) {
    queue.launch(&gram_rows, square_blocks, kThreads, 0, p.batches, p.rows, p.dim,
                 centring.row_blocks, deflation, data<float>(squares), data<float>(deflated),
                 square_sums, finish);
  } else {
    queue.launch(&covariance_rows, square_blocks, kThreads, 0, p.batches, p.dim,
                 data<float>(squares), square_sums, finish);
  }
}

// The operand that multiplies the centred values: the squares, or for half inputs their rounding.
template <typename T>
struct Operand {
  Tensor squares;  // [V, G, side, side]
  Tensor powers;   // [V, G, side], only for half inputs
};

template <typename T>
Operand<T> operand(const Problem& p, const Queue& queue, const Tensor& squares) {
  if constexpr (std::is_same_v<T, float>) {
    return {squares, squares};
  } else {
    const int64_t rows = p.batches * p.side;
    const Operand<T> result = {
        common::empty(squares, {p.batches, p.side, p.side}, p.dtype),
        common::empty(squares, {p.batches, p.side}, ScalarType::Float)};
    queue.launch(&round_rows<T>, blocks_of_warps(rows, queue), kThreads, 0, rows, p.side,
                 data<float>(squares), data<T>(result.squares), data<float>(result.powers));
    return result;
  }
}

// The products of the cut's part of view v into `out`.
void view_product(const Problem& p, const Queue& queue, int64_t v, const Cut& c, const Tensor& squares,
                  const Tensor& centred, const Tensor& out) {
  const int64_t side = p.side, area = side * side;
  // Symmetric, but its rounding to half is scaled by rows: on the right side it must be transposed.
  const Tensor square = common::strided(squares, {p.groups, side, side},
                                        {area, p.gram ? side : 1, p.gram ? 1 : side},
                                        v * p.groups * area);
  const Tensor part = common::strided(
      centred, {p.groups, c.rows, c.columns}, {p.rows * p.dim, p.dim, 1},
      v * p.groups * p.rows * p.dim + c.row0 * p.dim + c.column0);
  product(queue, p.tf32x3, p.gram ? square : part, p.gram ? part : square, out, false, 0);
}

template <typename T, bool Vectors>
void backward_kernels(const Problem& p, const Tensor& grads, const Tensor& x,
                      const std::optional<Tensor>& y, const Tensor& moments, const Tensor& squares,
                      const Tensor& deflated, const Tensor& index, const Tensor& centred,
                      double margin, double eps, const std::vector<double>& scales,
                      const std::vector<double>& weights, std::array<Tensor, 2> grad,
                      std::array<bool, 2> wanted) {
  constexpr bool direct = std::is_same_v<T, float>;  // the product lands in the gradient itself
  const Queue queue(x);
  const Views<T> all = views<T>(x, y);
  const Operand<T> left = operand<T>(p, queue, squares);

  Gradient<T> g = {};
  g.grads = data<float>(grads);
  g.grad_count = grads.numel();
  g.grad_stride = grads.dim() == 0 ? 0 : grads.stride(0);
  for (int i = 0; i < 3; ++i) {
    g.scales[i] = static_cast<float>(scales[i]);
    g.weights[i] = static_cast<float>(weights[i]);
  }
  g.degrees = p.degrees;
  g.margin = static_cast<float>(margin);
  g.eps = static_cast<float>(eps);
  g.groups = p.groups;
  g.rows = p.rows;
  g.dim = p.dim;
  g.deflated_count = static_cast<int>(p.deflated_count);
  g.moments = data<float>(moments);
  g.deflated = data<float>(deflated);
  g.index = data<int64_t>(index);

  // Pieces are columns (N < D) or rows, so that each is one product of all groups.
  const int64_t extent = p.gram ? p.dim : p.rows, across = p.groups * p.side;
  const int64_t piece =
      direct ? extent : common::piece_length(VICREG_PRODUCT_ELEMENTS, across, extent);
  std::array<Tensor, 2> scratch;
  for (int v = 0; v < 2; ++v) {
    if (!direct && wanted[v]) scratch[v] = common::empty(x, {across * piece}, ScalarType::Float);
  }
  for (int64_t begin = 0; begin < extent; begin += piece) {
    const Cut c = cut(p.groups, Chunk(p.rows, p.dim, begin, piece, extent), kGradientColumns,
                      4 * queue.multiprocessors());
    for (int v = 0; v < 2; ++v) {
      if (!wanted[v]) continue;
      const Tensor out = common::strided(direct ? grad[v] : scratch[v],
                                         {p.groups, c.rows, c.columns},
                                         {c.rows * c.columns, c.columns, 1}, 0);
      view_product(p, queue, v, c, left.squares, centred, out);
      const float* powers = direct ? nullptr : data<float>(left.powers) + v * p.groups * p.side;
      g.product[v] = {data<float>(out), c.rows * c.columns, c.columns, powers};
      g.out[v] = data<T>(grad[v]);
    }
    queue.launch(&gradient_rows<T, Vectors>, blocks_of(c), kThreads, 0, all, c, g);
  }
}

}  // namespace

const bool kSavesCentred = true;
const bool kTakesRows = false;

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, std::optional<Tensor> y, double margin, double eps, bool unbiased,
    std::vector<double> scales, std::vector<double> weights, bool tf32x3) {
  const Problem p(x, y, unbiased, tf32x3);
  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return common::empty(x, sizes, dtype);
  };
  const Tensor terms = make({4}, ScalarType::Float);
  const Tensor moments = make({p.views, p.groups, 3, p.dim}, ScalarType::Float);
  const Tensor squares = make({p.views, p.groups, p.side, p.side}, ScalarType::Float);
  const Tensor deflated = make({p.views, p.groups, p.deflated_count, p.rows}, ScalarType::Float);
  const Tensor index = make({p.views, p.groups, p.deflated_count}, ScalarType::Long);
  const Tensor centred = make({p.views, p.groups, p.rows, p.dim}, p.dtype);
  by_kind(x, y, [&](auto element, auto vectors) {
    forward_kernels<decltype(element), vectors>(p, x, y, margin, eps, scales, weights, terms,
                                                moments, squares, deflated, index, centred);
  });
  return {terms, moments, squares, deflated, index, centred};
}

std::tuple<Tensor, Tensor> backward(Tensor grads, Tensor x, std::optional<Tensor> y, Tensor moments,
                                    Tensor squares, Tensor deflated, Tensor index, Tensor centred,
                                    bool need_x, bool need_y, double margin, double eps,
                                    bool unbiased, std::vector<double> scales,
                                    std::vector<double> weights, bool tf32x3) {
  const Problem p(x, y, unbiased, tf32x3);
  const std::array<bool, 2> wanted = {need_x, need_y};
  std::array<Tensor, 2> grad;
  for (int v = 0; v < 2; ++v) {
    grad[v] = wanted[v] ? common::empty(x, {p.groups, p.rows, p.dim}, p.dtype)
                        : common::empty(x, {0}, p.dtype);
  }
  if (need_x || need_y) {
    by_kind(x, y, [&](auto element, auto vectors) {
      backward_kernels<decltype(element), vectors>(p, grads, x, y, moments, squares, deflated,
                                                   index, centred, margin, eps, scales, weights,
                                                   grad, wanted);
    });
  }
  return {grad[0], grad[1]};
}

}  // namespace vicreg
