// The VICRegL ops on CUDA: what is launched, and why. Times: not measured yet.
//
// With U views of a, V of b, B samples, S = U V B, maps of L1 and L2 positions of C channels, e the
// bytes of an element, K = the kept matches of all samples, both directions (at most S (L1 + L2)):
//
//   op              launches                  bytes                                 operations
//   match           match_tiles               e S C (L1 tiles_b + L2 tiles_a)       2 S L1 L2 C
//                   match_ranks               8 S (L1 tiles_b + L2 tiles_a) twice,  S (L1^2 + L2^2)
//                                             8 S (L1 + L2)
//   pairs forward   pair_sums, pair_finish    2 e K C, 4 S (L1 + L2)                2 K C
//   pairs backward  pair_gradients            2 e K C and twice e B C (U L1 +       4 K C
//                                             V L2), or less
//
// A search is bound by arithmetic: 2 x 64 maps of 49 x 512 in float32 are 157 M subtractions and
// multiply-adds, 5 us of an H100's float32 units (33.5 T instructions/s), 6 us with tiles of 28 x 56
// over 49 x 49, against 13 MB of memory, 4 us. |a|^2 + |b|^2 - 2 a.b would halve the instructions,
// but its rounding, eps |a|^2, exceeds the distances themselves where positions nearly coincide,
// and tensor cores would round the operands too. So distances are sums of squared differences, to
// eps sqrt(C) of each, and one search serves both directions. The 128 tiles of that shape fill 128
// of 132 multiprocessors; a warp has 49 independent sums, 8 warps cover each other's latency.
// With all matches kept the pairs of that shape read 26 MB forward, of which 13 MB are different
// ones, 4 to 8 us. Backward each match is read by both its ends, beside their own rows: 39 MB, most
// of it from L2, and 13 MB written; 26 MB are different, 8 us.
//
// The minima go through memory between the two launches of a search: 8 bytes a position and tile.
// No result depends on the host: no synchronisation, and all memory from torch's allocator, so CUDA
// graphs capture it. A match out of range is never followed: what it would add is NaN.
#include <algorithm>

#include "common/cuda/plan.cuh"
#include "common/tensors.h"
#include "vicregl/cuda/match.cuh"
#include "vicregl/cuda/pairs.cuh"
#include "vicregl/vicregl.h"

namespace vicregl {
namespace {

using common::aligned, common::blocks_of_warps, common::ceil_div, common::data, common::grid;
using common::Queue, common::reading, common::ScalarType;
using namespace kernels;

template <typename T>
Maps<T> maps(const Tensor& z) {
  return {reading<T>(z), z.stride(0), z.stride(1), z.stride(2), z.stride(3)};
}

Shape shape(const Tensor& a, const Tensor& b) {
  return {a.size(0), b.size(0), a.size(1), a.size(2), b.size(2), a.size(3)};
}

AnyMaps any_maps(const Tensor& z) {
  const ScalarType dtype = z.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Half ||
                      dtype == ScalarType::BFloat16,
                  "vicregl: takes float32, bfloat16, float16");
  return {z.const_data_ptr(), z.stride(0), z.stride(1), z.stride(2), z.stride(3),
          common::dtype_code(dtype)};
}

// run(element, vectors): an element of the maps' dtype, and whether 16-byte accesses are aligned.
template <typename F>
void by_kind(const Tensor& a, const Tensor& b, F&& run) {
  common::by_kind("vicregl", a.scalar_type(), aligned(a) && aligned(b), run);
}

// run(W, RA, RB): elements of an access, and a lane's rows and columns, few for maps of few positions.
template <typename F>
void by_tile(const Tensor& a, const Tensor& b, F&& run) {
  const auto with = [&](auto ra, auto rb) {
    if (aligned(a, 4) && aligned(b, 4)) {
      run(std::integral_constant<int, 4>{}, ra, rb);
    } else {
      run(std::integral_constant<int, 1>{}, ra, rb);
    }
  };
  constexpr std::integral_constant<int, 2> two;
  constexpr std::integral_constant<int, 3> three;
  constexpr std::integral_constant<int, 7> seven;
  if (a.size(2) <= 4 * three) {
    b.size(2) <= 8 * two ? with(three, two) : with(three, seven);
  } else {
    b.size(2) <= 8 * two ? with(seven, two) : with(seven, seven);
  }
}

Matches matches(const Tensor& nearest, const Tensor& rank, const Tensor& z,
                const std::vector<int64_t>& counts, const std::vector<double>& weights) {
  const auto most = std::max_element(counts.begin(), counts.end());
  return {reading<int>(nearest), reading<int>(rank), most == counts.end() ? 0 : *most,
          kept(z, counts, weights)};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> match(Tensor a, Tensor b) {
  const Shape q = shape(a, b);
  const auto made = [&](int64_t rows) {
    return common::empty(a, {q.views_a, q.views_b, q.batch, rows}, ScalarType::Int);
  };
  const Tensor nearest_a = made(q.rows_a), rank_a = made(q.rows_a);
  const Tensor nearest_b = made(q.rows_b), rank_b = made(q.rows_b);
  const Queue queue(a);
  const int64_t samples = q.samples();
  by_tile(a, b, [&](auto width, auto ra, auto rb) {
    const int64_t tiles_a = ceil_div(q.rows_a, 4 * ra), tiles_b = ceil_div(q.rows_b, 8 * rb);
    const int64_t of_a = samples * tiles_b * q.rows_a, of_b = samples * tiles_a * q.rows_b;
    const Tensor keys = common::empty(a, {of_a + of_b}, ScalarType::Long);
    uint64_t* row_keys = data<uint64_t>(keys);
    uint64_t* column_keys = row_keys + of_a;
    queue.launch(&match_tiles<width, ra, rb>, grid(samples * tiles_a * tiles_b), kThreads, 0,
                 any_maps(a), any_maps(b), q, tiles_a, tiles_b, row_keys, column_keys);
    const Ranking side_a = {row_keys, tiles_b, q.rows_a, data<int>(nearest_a), data<int>(rank_a)};
    const Ranking side_b = {column_keys, tiles_a, q.rows_b, data<int>(nearest_b),
                            data<int>(rank_b)};
    const int64_t threads = ceil_div(std::max(q.rows_a, q.rows_b), kLanes) * kLanes;
    queue.launch(&match_ranks, grid(2 * samples),
                 static_cast<unsigned>(std::min<int64_t>(threads, kThreads)), 0, side_a, side_b);
  });
  return {nearest_a, rank_a, nearest_b, rank_b};
}

Tensor pairs_forward(Tensor a, Tensor b, Tensor nearest_a, Tensor rank_a, Tensor nearest_b,
                     Tensor rank_b, std::vector<int64_t> counts_a, std::vector<double> weights_a,
                     std::vector<int64_t> counts_b, std::vector<double> weights_b) {
  const Shape q = shape(a, b);
  const Tensor result = torch::stable::new_empty(a, {}, ScalarType::Float);
  const Queue queue(a);
  const unsigned blocks = blocks_of_warps(q.samples() * (q.rows_a + q.rows_b), queue);
  const Tensor partials = common::empty(a, {blocks}, ScalarType::Double);
  const Matches from_a = matches(nearest_a, rank_a, a, counts_a, weights_a);
  const Matches from_b = matches(nearest_b, rank_b, b, counts_b, weights_b);
  by_kind(a, b, [&](auto element, auto vectors) {
    using T = decltype(element);
    queue.launch(&pair_sums<T, vectors>, blocks, kThreads, 0, maps<T>(a), maps<T>(b), q, from_a,
                 from_b, data<double>(partials));
  });
  queue.launch(&pair_finish, 1, kThreads, 0, reading<double>(partials), int64_t{blocks},
               data<float>(result));
  return result;
}

std::tuple<Tensor, Tensor> pairs_backward(Tensor grad, Tensor a, Tensor b, Tensor nearest_a,
                                          Tensor rank_a, Tensor nearest_b, Tensor rank_b,
                                          bool need_a, bool need_b, std::vector<int64_t> counts_a,
                                          std::vector<double> weights_a,
                                          std::vector<int64_t> counts_b,
                                          std::vector<double> weights_b) {
  const Shape q = shape(a, b);
  const ScalarType dtype = a.scalar_type();
  const auto made = [&](bool needed, const Tensor& z) {
    return needed ? common::empty(z, {z.size(0), z.size(1), z.size(2), z.size(3)}, dtype)
                  : common::empty(z, {0}, dtype);
  };
  const Tensor out_a = made(need_a, a), out_b = made(need_b, b);
  if (!need_a && !need_b) return {out_a, out_b};
  const Queue queue(a);
  const Matches from_a = matches(nearest_a, rank_a, a, counts_a, weights_a);
  const Matches from_b = matches(nearest_b, rank_b, b, counts_b, weights_b);
  const int64_t rows = q.batch * ((need_a ? q.views_a * q.rows_a : 0) +
                                  (need_b ? q.views_b * q.rows_b : 0));
  by_kind(a, b, [&](auto element, auto vectors) {
    using T = decltype(element);
    const Side<T> side_a = {maps<T>(a), maps<T>(b), q.views_a, q.views_b, q.rows_a, q.rows_b,
                            q.views_b, 1, from_a, from_b, need_a ? data<T>(out_a) : nullptr};
    const Side<T> side_b = {maps<T>(b), maps<T>(a), q.views_b, q.views_a, q.rows_b, q.rows_a,
                            1, q.views_b, from_b, from_a, need_b ? data<T>(out_b) : nullptr};
    queue.launch(&pair_gradients<T, vectors>, blocks_of_warps(rows, queue), kThreads, 0, side_a,
                 side_b, q.batch, q.channels, reading<float>(grad));
  });
  return {out_a, out_b};
}

}  // namespace vicregl
