// Rotary position on the CPU: cosines and sines laid out once a call by token, for all heads.
#pragma once

#include <cstring>
#include <vector>

#include "attention/formula.h"
#include "common/tensors.h"
#include "common/cpu/vector.h"

namespace attention {
namespace {  // included by cpu.cpp alone
namespace cpu {

// x [rotated] turned; cosine, sine: [rotated].
KERNELS_VECTOR inline void turn_row(float* x, const float* cosine, const float* sine,
                                   int64_t rotated, bool adjoint) {
  if (adjoint) {
    for (int64_t j = 0; j < rotated; j += 2) {
      turn(x[j], x[j + 1], cosine[j], sine[j], cosine[j + 1], sine[j + 1], true);
    }
  } else {
    for (int64_t j = 0; j < rotated; j += 2) {
      turn(x[j], x[j + 1], cosine[j], sine[j], cosine[j + 1], sine[j + 1], false);
    }
  }
}

// The angles of one side's tokens. By an index there is a row for each of its entries, else one for
// each place up to the longest sample.
class Rotary {
 public:
  Rotary() = default;
  Rotary(const torch::stable::Tensor& table, const torch::stable::Tensor* index,
         const std::vector<int64_t>& grid, int64_t longest)
      : indexed_(index != nullptr) {
    const int axes = static_cast<int>(grid[3]);
    const int64_t part = table.size(1);
    rotated_ = axes * part;
    const int64_t rows = indexed_ ? index->numel() : longest;
    tokens_ = indexed_ && index->size(0) > 1 ? index->size(1) : 0;
    angles_.resize(2 * rows * rotated_);
    const float* values = static_cast<const float*>(table.const_data_ptr());
    const int* places = indexed_ ? static_cast<const int*>(index->const_data_ptr()) : nullptr;
    torch::stable::parallel_for(0, rows, 512, [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        const Rows at = table_rows(grid.data(), axes, places == nullptr ? row : places[row]);
        float* cosine = angles_.data() + 2 * row * rotated_;
        for (int axis = 0; axis < axes; ++axis) {
          spread(values + 2 * part * at.row[axis], part, cosine + axis * part,
                 cosine + rotated_ + axis * part);
        }
      }
    });
  }

  bool any() const { return rotated_ > 0; }

  // Turns the row of `token` of batch row `batch`, at `place` in its sample.
  void apply(float* x, int64_t batch, int64_t token, int64_t place, bool adjoint) const {
    const int64_t row = indexed_ ? batch * tokens_ + token : place;
    const float* cosine = angles_.data() + 2 * row * rotated_;
    turn_row(x, cosine, cosine + rotated_, rotated_, adjoint);
  }

 private:
  static void spread(const float* pairs, int64_t count, float* cosine, float* sine) {
    for (int64_t j = 0; j < count; ++j) {
      cosine[j] = pairs[2 * j];
      sine[j] = pairs[2 * j + 1];
    }
  }

  bool indexed_ = false;
  int64_t rotated_ = 0, tokens_ = 0;
  std::vector<float> angles_;  // [rows, cosine and sine, rotated]
};

}  // namespace cpu
}  // namespace
}  // namespace attention
