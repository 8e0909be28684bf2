// The VICRegL ops on the CPU.
#include <algorithm>
#include <vector>

#include "common/rows.h"
#include "common/tensors.h"
#include "common/vector.h"
#include "vicregl/vicregl.h"

namespace vicregl {
namespace {

using common::Rows;
using common::ScalarType;

// Rows of [views, B, L, C]: group = view * B + sample.
Tensor grouped(const Tensor& z, int64_t view) {
  return common::strided(z, {z.size(1), z.size(2), z.size(3)},
                         {z.stride(1), z.stride(2), z.stride(3)}, view * z.stride(0));
}

float squared_distance(const float* a, const float* b, int64_t count) {
  float total = 0.f;
  for (int64_t c = 0; c < count; ++c) total += (a[c] - b[c]) * (a[c] - b[c]);
  return total;
}

void ranks(const float* least, int64_t count, int32_t* rank) {
  std::vector<int32_t> order(count);
  for (int64_t i = 0; i < count; ++i) order[i] = static_cast<int32_t>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t i, int32_t j) { return least[i] < least[j]; });
  for (int64_t i = 0; i < count; ++i) rank[order[i]] = static_cast<int32_t>(i);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> match(Tensor a, Tensor b) {
  const int64_t U = a.size(0), V = b.size(0), B = a.size(1), l1 = a.size(2), l2 = b.size(2);
  const int64_t dim = a.size(3);
  const auto make = [&](int64_t l) { return common::empty(a, {U, V, B, l}, ScalarType::Int); };
  const Tensor nearest_a = make(l1), rank_a = make(l1), nearest_b = make(l2), rank_b = make(l2);
  std::vector<float> own(dim), other(dim), least_a(l1), least_b(l2);
  for (int64_t u = 0; u < U; ++u) {
    for (int64_t v = 0; v < V; ++v) {
      const Tensor view_a = grouped(a, u), view_b = grouped(b, v);
      const Rows rows_a(view_a), rows_b(view_b);
      for (int64_t s = 0; s < B; ++s) {
        const int64_t at = (u * V + v) * B + s;
        int32_t* near_a = static_cast<int32_t*>(nearest_a.data_ptr()) + at * l1;
        int32_t* near_b = static_cast<int32_t*>(nearest_b.data_ptr()) + at * l2;
        for (int64_t i = 0; i < l1; ++i) {
          const float* x = rows_a.read(s, i, 0, dim, own.data());
          for (int64_t j = 0; j < l2; ++j) {
            const float* y = rows_b.read(s, j, 0, dim, other.data());
            const float d = ordered(squared_distance(x, y, dim));
            if (j == 0 || d < least_a[i]) { least_a[i] = d; near_a[i] = static_cast<int32_t>(j); }
            if (i == 0 || d < least_b[j]) { least_b[j] = d; near_b[j] = static_cast<int32_t>(i); }
          }
        }
        ranks(least_a.data(), l1, static_cast<int32_t*>(rank_a.data_ptr()) + at * l1);
        ranks(least_b.data(), l2, static_cast<int32_t*>(rank_b.data_ptr()) + at * l2);
      }
    }
  }
  return {nearest_a, rank_a, nearest_b, rank_b};
}

namespace {

template <typename Each>
void each_match(const Tensor& a, const Tensor& b, const Tensor& nearest, const Tensor& rank,
                const Kept& kept, bool swapped, const Each& each) {
  const int64_t U = a.size(0), V = b.size(0), B = a.size(1);
  const int64_t l = swapped ? b.size(2) : a.size(2);
  const int32_t* near = static_cast<const int32_t*>(nearest.const_data_ptr());
  const int32_t* order = static_cast<const int32_t*>(rank.const_data_ptr());
  for (int64_t u = 0; u < U; ++u)
    for (int64_t v = 0; v < V; ++v)
      for (int64_t s = 0; s < B; ++s)
        for (int64_t i = 0; i < l; ++i) {
          const int64_t at = ((u * V + v) * B + s) * l + i;
          const float factor = kept.factor(order[at]);
          if (factor == 0.f) continue;
          if (swapped) each(u, v, s, near[at], i, factor);
          else each(u, v, s, i, near[at], factor);
        }
}

}  // namespace

Tensor pairs_forward(Tensor a, Tensor b, Tensor nearest_a, Tensor rank_a, Tensor nearest_b,
                     Tensor rank_b, std::vector<int64_t> counts_a, std::vector<double> weights_a,
                     std::vector<int64_t> counts_b, std::vector<double> weights_b) {
  const int64_t dim = a.size(3);
  const Tensor out = common::empty(a, {}, ScalarType::Float);
  std::vector<float> own(dim), other(dim);
  double total = 0.0;
  const auto each = [&](int64_t u, int64_t v, int64_t s, int64_t i, int64_t j, float factor) {
    const Tensor view_a = grouped(a, u), view_b = grouped(b, v);
    total += static_cast<double>(factor) *
             squared_distance(Rows(view_a).read(s, i, 0, dim, own.data()),
                              Rows(view_b).read(s, j, 0, dim, other.data()), dim);
  };
  each_match(a, b, nearest_a, rank_a, kept(a, counts_a, weights_a), false, each);
  each_match(a, b, nearest_b, rank_b, kept(b, counts_b, weights_b), true, each);
  *static_cast<float*>(out.data_ptr()) = static_cast<float>(total);
  return out;
}

std::tuple<Tensor, Tensor> pairs_backward(Tensor grad, Tensor a, Tensor b, Tensor nearest_a,
                                          Tensor rank_a, Tensor nearest_b, Tensor rank_b,
                                          bool need_a, bool need_b, std::vector<int64_t> counts_a,
                                          std::vector<double> weights_a,
                                          std::vector<int64_t> counts_b,
                                          std::vector<double> weights_b) {
  const int64_t U = a.size(0), V = b.size(0), B = a.size(1), l1 = a.size(2), l2 = b.size(2);
  const int64_t dim = a.size(3);
  const float g = *static_cast<const float*>(grad.const_data_ptr());
  std::vector<float> own(dim), other(dim), sum_a(U * B * l1 * dim), sum_b(V * B * l2 * dim);
  const auto each = [&](int64_t u, int64_t v, int64_t s, int64_t i, int64_t j, float factor) {
    const Tensor view_a = grouped(a, u), view_b = grouped(b, v);
    const float* x = Rows(view_a).read(s, i, 0, dim, own.data());
    const float* y = Rows(view_b).read(s, j, 0, dim, other.data());
    float* to_a = sum_a.data() + ((u * B + s) * l1 + i) * dim;
    float* to_b = sum_b.data() + ((v * B + s) * l2 + j) * dim;
    for (int64_t c = 0; c < dim; ++c) {
      const float step = slope(g, factor) * (x[c] - y[c]);
      to_a[c] += step;
      to_b[c] -= step;
    }
  };
  each_match(a, b, nearest_a, rank_a, kept(a, counts_a, weights_a), false, each);
  each_match(a, b, nearest_b, rank_b, kept(b, counts_b, weights_b), true, each);
  const auto write = [&](bool need, const Tensor& like, const std::vector<float>& sum) {
    if (!need) return common::empty(like, {0}, like.scalar_type());
    const Tensor out = common::empty(
        like, {like.size(0), like.size(1), like.size(2), like.size(3)}, like.scalar_type());
    if (like.scalar_type() == ScalarType::Float) {
      std::copy(sum.begin(), sum.end(), static_cast<float*>(out.data_ptr()));
    } else {
      common::write_row(sum.data(), sum.size(), like.scalar_type(), out.data_ptr(), 0);
    }
    return out;
  };
  return {write(need_a, a, sum_a), write(need_b, b, sum_b)};
}

}  // namespace vicregl
