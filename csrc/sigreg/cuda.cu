// The SIGReg op on CUDA: what is launched, and why. Times: not measured yet.
//
// With E = G N M projections, K knots and e the bytes of an element of z:
//
//   directions                  reads and writes (bytes)             operations
//   draw_directions             e D M                                about 50 D M, twice
//   forward
//   bmm (torch)                 e (G N D + D M) + 4 E                E D multiply-adds
//   paired_sums                 4 E + 8 G K M x row blocks           (35 + 4 K) E
//   knot_terms                  8 G K M x (row blocks + 1)           about 30 G K M in float64
//   gradient
//   waves                       (4 + e) E                            (35 + 4 K) E
//   bmm (torch)                 e (E + D M + G N D)                  E D multiply-adds
//   float16 only: wave_powers, 8 G K M, before it, and unscale, 4 G N D, after
//
// So 6 launches with the directions, and 8 for float16. knot_terms adds up the row blocks' sums, and
// its last block the loss: three launches before, each at 2 to 5 us more than its bytes (estimates).
// paired_sums clears the counter that the last block is told by, in every run, so that a replayed
// graph starts at 0. Across ranks, whose sums are added up in between, finish_sums comes before it:
// 2 launches more, with the counter's. No result depends on the host: the step is read on the device
// or is an argument, no synchronisation, all memory from torch's allocator, so CUDA graphs capture
// it.
//
// At 2048 x 512 x 1024 x 17 (16 knots without 0) a product is 1.1 G multiply-adds: 32 us on an H100
// in float32 (67 TFLOP/s), 2 us in bfloat16 (990). The waves are 2.1 M x 99 operations a pass, 7 us
// of its 29 T lane operations a second, and 8 to 12 MB, 3 us from memory and less from L2. In
// float32 the vendor's products are four fifths of the whole; in bfloat16 the waves bound it, so
// their operations were counted and cut: one sincos a projection, pairs of knots, Horner.
//
// paired_sums fills one wave: as many blocks as its registers let run at once, 384 of 396 at 17 knots
// and M = 1024, where 4 blocks a multiprocessor for 3 that fit took two turns.
//
// What is not fused, and why. The sums could be taken in the product's epilogue, but then the
// product would be ours in three dtypes, to save one read of the projections, 2.5 us from L2; they
// have to be written for the backward in any case. The waves could be computed in the prologue of
// the gradient's product, but every tile along D would compute them anew, at D = 512 and tiles of
// 128 four times.
//
// Float products follow torch's own TF32 setting, and bfloat16 ones its setting of
// reduced-precision reductions. Half inputs give float32 projections. For the gradient's product
// the waves are rounded to the dtype, an error below the rounding of the result; float16 ones are
// scaled by a power of two found on the device, so that they neither over- nor underflow, and the
// result is scaled back.
#include <algorithm>
#include <array>
#include <optional>

#include "common/cuda/bmm.h"
#include "common/cuda/launch.h"
#include "common/cuda/plan.cuh"
#include "common/tensors.h"
#include "sigreg/cuda/columns.cuh"
#include "sigreg/cuda/directions.cuh"
#include "sigreg/formula.h"
#include "sigreg/sigreg.h"
#include "sigreg/cuda/statistic.cuh"
#include "sigreg/cuda/waves.cuh"

namespace sigreg {
namespace {

using common::by_dtype, common::data, common::grid, common::Queue, common::ScalarType;
using namespace kernels;

Table table_of(const std::vector<double>& knots) {
  Table table = {};
  for (size_t k = 0; k < knots.size(); ++k) table.turns[k] = turns_of(knots[k]);
  return table;
}

// out = a b in the dtype of all three.
void same_dtype_bmm(const Tensor& a, const Tensor& b, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::bmm", "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);
}

// projections = z A. One product for all groups where their rows lie evenly, else one a group.
void project(const Tensor& z, const Tensor& directions, const Tensor& projections) {
  const int64_t groups = z.size(0), rows = z.size(1), dim = z.size(2);
  const int64_t slices = directions.size(1), a_d = directions.stride(0), a_m = directions.stride(1);
  const bool even = groups == 1 || rows == 1 || z.stride(0) == rows * z.stride(1);
  const int64_t batches = even ? 1 : groups, height = even ? groups * rows : rows;
  const int64_t row = rows == 1 ? z.stride(0) : z.stride(1);
  common::bmm(common::strided(z, {batches, height, dim}, {z.stride(0), row, z.stride(2)}, 0),
              common::strided(directions, {batches, dim, slices}, {0, a_d, a_m}, 0),
              common::strided(projections, {batches, height, slices},
                              {height * slices, slices, 1}, 0));
}

// The kernel for P pairs.
using PairedSums = void (*)(Sums, Cut, Centres);
PairedSums paired(int64_t pairs) {
  constexpr std::array<PairedSums, kMostPairs> all = {
      &paired_sums<1>, &paired_sums<2>, &paired_sums<3>, &paired_sums<4>,
      &paired_sums<5>, &paired_sums<6>, &paired_sums<7>, &paired_sums<8>};
  return all[pairs - 1];
}

// What the kernels of the sums leave: parts [row blocks, G, 2, K, M] and a counter at 0.
struct Parts {
  Tensor sums, done;
  int64_t row_blocks() const { return sums.size(0); }
};

Parts column_sums(const Queue& queue, const Tensor& projections, const std::vector<double>& knots) {
  const int64_t groups = projections.size(0), rows = projections.size(1);
  const int64_t slices = projections.size(2), count = static_cast<int64_t>(knots.size());
  const Spacing spacing = spacing_of(knots.data(), count);
  const int64_t chunks = common::ceil_div(count, kChunk);
  const int64_t pairs = common::ceil_div(count, 2 * chunks);
  const int resident = !spacing.equal ? kSingleResident : pairs < 6 ? kResident<5> : kResident<6>;
  const Cut cut =
      common::cut(groups, 0, rows, 0, slices, 1, resident * queue.multiprocessors() / chunks);
  const Parts parts = {
      common::empty(projections, {cut.row_blocks, groups, 2, count, slices}, ScalarType::Float),
      common::empty(projections, {1}, ScalarType::Int)};
  const Sums sums = {data<float>(projections), data<float>(parts.sums), count, chunks,
                     reinterpret_cast<unsigned*>(data<int>(parts.done))};
  const unsigned blocks = grid(chunks * common::blocks_of(cut));
  if (spacing.equal) {
    const double step = spacing.half ? 2.0 * spacing.start : spacing.start;
    const double from_first = static_cast<double>(pairs) - (spacing.half ? 0.5 : 1.0);
    Centres centres = {turns_of(spacing.start), spacing.half, {}};
    for (int64_t c = 0; c < chunks; ++c) {
      centres.centre[c] = turns_of(spacing.start + (2.0 * c * pairs + from_first) * step);
    }
    queue.launch(paired(pairs), blocks, kThreads, 0, sums, cut, centres);
  } else {
    queue.launch(&single_sums, blocks, kThreads, 0, sums, cut, table_of(knots));
  }
  return parts;
}

// -> loss, 0-d, coefficients [G, 2, K, M].
std::tuple<Tensor, Tensor> terms(const Queue& queue, const Parts& parts,
                                 const std::vector<double>& knots,
                                 const std::vector<double>& weights, double count, double factor,
                                 double ranks) {
  const int64_t groups = parts.sums.size(1), slices = parts.sums.size(4);
  const int64_t number = static_cast<int64_t>(knots.size());
  const Tensor loss = common::empty(parts.sums, {}, ScalarType::Float);
  const Tensor coefficients =
      common::empty(parts.sums, {groups, 2, number, slices}, ScalarType::Float);
  const double scale = factor / (static_cast<double>(groups) * slices);
  Rule rule = {{}, {}, {}, count, ranks * scale};
  std::copy(knots.begin(), knots.end(), rule.knots);
  for (int64_t k = 0; k < number; ++k) rule.targets[k] = phi_of(knots[k]);
  std::copy(weights.begin(), weights.end(), rule.weights);
  const unsigned blocks = grid(groups * number * common::ceil_div(slices, kThreads));
  const Tensor shares = common::empty(parts.sums, {int64_t{blocks}}, ScalarType::Double);
  const Terms t = {data<float>(parts.sums), parts.row_blocks(), groups, number, slices,
                   data<float>(coefficients), data<double>(shares),
                   reinterpret_cast<unsigned*>(data<int>(parts.done)), scale, data<float>(loss)};
  queue.launch(&knot_terms, blocks, kThreads, 0, t, rule);
  return {loss, coefficients};
}

template <typename T>
void gradient_kernels(const Tensor& grad, const Tensor& coefficients, const Tensor& projections,
                      const Tensor& directions, const std::vector<double>& knots,
                      const Tensor& result) {
  constexpr bool scaled = std::is_same_v<T, __half>;
  const Queue queue(projections);
  const int64_t groups = projections.size(0), rows = projections.size(1);
  const int64_t slices = projections.size(2), dim = directions.size(0);
  const int64_t count = static_cast<int64_t>(knots.size());
  const Tensor scratch = common::empty(projections, {1, groups * rows, slices},
                                       directions.scalar_type());
  const Tensor powers = common::empty(projections, {scaled ? groups : 0}, ScalarType::Float);
  if constexpr (scaled) {
    queue.launch(&wave_powers, grid(groups), kThreads, 0, data<float>(coefficients), count, slices,
                 data<float>(powers));
  }
  const Waves w = {data<float>(grad), scaled ? data<float>(powers) : nullptr,
                   data<float>(coefficients), data<float>(projections), static_cast<int>(count)};
  const Cut cut = common::cut(groups, 0, rows, 0, slices, 1, 4 * queue.multiprocessors());
  const Spacing spacing = spacing_of(knots.data(), count);
  queue.launch(spacing.equal ? &waves<T, true> : &waves<T, false>, common::blocks_of(cut), kThreads,
               0, w, cut, turns_of(spacing.start), spacing.half, table_of(knots),
               data<T>(scratch));
  same_dtype_bmm(scratch,
                 common::strided(directions, {1, slices, dim},
                                 {0, directions.stride(1), directions.stride(0)}, 0),
                 common::strided(result, {1, groups * rows, dim}, {0, dim, 1}, 0));
  if constexpr (scaled) {
    const int64_t size = rows * dim;
    const int64_t share = std::clamp<int64_t>(4 * queue.multiprocessors() / groups, 1,
                                              common::ceil_div(size, kThreads));
    queue.launch(&unscale, grid(groups * share), kThreads, 0, data<float>(grad),
                 data<float>(powers), share, size, data<__half>(result));
  }
}

}  // namespace

Tensor directions(Tensor like, std::optional<Tensor> step, int64_t number, int64_t seed,
                  int64_t dim, int64_t slices) {
  const Tensor out = common::empty(like, {dim, slices}, like.scalar_type());
  const Queue queue(like);
  by_dtype("sigreg", out.scalar_type(), [&](auto element) {
    using T = decltype(element);
    queue.launch(&draw_directions<T>, grid(common::ceil_div(slices, kDrawn)), kThreads, 0,
                 step ? static_cast<const int64_t*>(step->const_data_ptr()) : nullptr, number,
                 static_cast<uint64_t>(seed), dim, slices, data<T>(out));
  });
  return out;
}

std::tuple<Tensor, Tensor> sums(Tensor z, Tensor directions, std::vector<double> knots) {
  const int64_t groups = z.size(0), slices = directions.size(1);
  const int64_t count = static_cast<int64_t>(knots.size());
  const Tensor projections = common::empty(z, {groups, z.size(1), slices}, ScalarType::Float);
  const Queue queue(z);
  project(z, directions, projections);
  const Parts parts = column_sums(queue, projections, knots);
  const Tensor out = common::empty(z, {groups, 2, count, slices}, ScalarType::Float);
  queue.launch(&finish_sums, grid(common::ceil_div(out.numel(), kThreads)), kThreads, 0,
               data<float>(parts.sums), parts.row_blocks(), out.numel(), data<float>(out));
  return {out, projections};
}

std::tuple<Tensor, Tensor> statistic(Tensor sums, std::vector<double> knots,
                                     std::vector<double> weights, double count, double factor,
                                     double ranks) {
  const int64_t groups = sums.size(0), number = sums.size(2), slices = sums.size(3);
  const int64_t size = number * slices;
  const Parts one = {common::strided(sums, {1, groups, 2, number, slices},
                                     {2 * groups * size, 2 * size, size, slices, 1}, 0),
                     torch::stable::new_zeros(sums, {1}, ScalarType::Int)};
  return terms(Queue(sums), one, knots, weights, count, factor, ranks);
}

std::tuple<Tensor, Tensor, Tensor> forward(Tensor z, Tensor directions, std::vector<double> knots,
                                           std::vector<double> weights, double count,
                                           double factor) {
  const Tensor projections =
      common::empty(z, {z.size(0), z.size(1), directions.size(1)}, ScalarType::Float);
  const Queue queue(z);
  project(z, directions, projections);
  const auto [loss, coefficients] = terms(queue, column_sums(queue, projections, knots), knots,
                                          weights, count, factor, 1.0);
  return {loss, coefficients, projections};
}

Tensor gradient(Tensor grad, Tensor coefficients, Tensor projections, Tensor directions,
                std::vector<double> knots) {
  const Tensor result =
      common::empty(projections, {projections.size(0), projections.size(1), directions.size(0)},
                    directions.scalar_type());
  by_dtype("sigreg", directions.scalar_type(), [&](auto element) {
    gradient_kernels<decltype(element)>(grad, coefficients, projections, directions, knots, result);
  });
  return result;
}

}  // namespace sigreg
