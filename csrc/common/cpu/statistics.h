// Column statistics on the CPU: mean, scatter and invariance in one read of both views.
//
// A block of 32 rows is summed in float32 about the mean of the rows before it, the first block about
// the mean of every fourth of its own, so that a large common offset cancels exactly; blocks merge in
// float64. What a block loses is a rounding of its squares about that mean, which together are about
// as large as the scatter of all rows so far; about one row they would be ten times that, where that
// row lies three deviations off.
#pragma once

#include <algorithm>
#include <vector>

#include "common/cpu/rows.h"
#include "common/cpu/vector.h"

namespace common {
namespace statistics {

constexpr int64_t kBlockRows = 32;
constexpr int64_t kTile = 512;  // columns a task holds in L1 and L2

// Sums of one block of rows, and of all blocks so far, for a tile of columns.
struct Tile {
  float shift[kTile], sum[kTile], square[kTile];
  double mean[kTile], scatter[kTile];
};

KERNELS_VECTOR inline void add_four_rows(const float* const* rows, int64_t width,
                                         const float* shift,
                                        float* sum, float* square) {
  const float *r0 = rows[0], *r1 = rows[1], *r2 = rows[2], *r3 = rows[3];
  for (int64_t j = 0; j < width; ++j) {
    const float a = r0[j] - shift[j], b = r1[j] - shift[j];
    const float c = r2[j] - shift[j], d = r3[j] - shift[j];
    sum[j] += (a + b) + (c + d);
    square[j] += (a * a + b * b) + (c * c + d * d);
  }
}

KERNELS_VECTOR inline void add_shifted(const float* row, int64_t width, const float* shift,
                                      float* sum) {
  for (int64_t j = 0; j < width; ++j) sum[j] += row[j] - shift[j];
}

KERNELS_VECTOR inline void add_share(const float* first, const float* sum, int64_t width,
                                    float share, float* to) {
  for (int64_t j = 0; j < width; ++j) to[j] = first[j] + sum[j] * share;
}

KERNELS_VECTOR inline void to_single(const double* from, int64_t width, float* to) {
  for (int64_t j = 0; j < width; ++j) to[j] = static_cast<float>(from[j]);
}

KERNELS_VECTOR inline void add_row(const float* row, int64_t width, const float* shift, float* sum,
                                  float* square) {
  for (int64_t j = 0; j < width; ++j) {
    const float a = row[j] - shift[j];
    sum[j] += a;
    square[j] += a * a;
  }
}

// shift = the mean of a block's rows, or of some of more than 8, which are summed about the first.
inline void mean_of_block(const float* const* rows, int64_t count, int64_t width, float* shift,
                          float* sum) {
  std::fill_n(sum, width, 0.f);
  const int64_t step = count > 8 ? 4 : 1, taken = (count + step - 1) / step;
  for (int64_t n = step; n < count; n += step) add_shifted(rows[n], width, rows[0], sum);
  add_share(rows[0], sum, width, 1.f / static_cast<float>(taken), shift);
}

KERNELS_VECTOR inline void add_difference(const float* x, const float* y, int64_t width,
                                         float* sum) {
  for (int64_t j = 0; j < width; ++j) {
    const float difference = x[j] - y[j];
    sum[j] += difference * difference;
  }
}

KERNELS_VECTOR inline void merge_block(const float* shift, const float* sum, const float* square,
                                      int64_t width, double before, double count, double* mean,
                                      double* scatter) {
  const double inverse = 1.0 / count, share = count / (before + count), both = before * share;
  for (int64_t j = 0; j < width; ++j) {
    const double s = sum[j];
    const double delta = shift[j] + s * inverse - mean[j];
    scatter[j] += square[j] - s * s * inverse + delta * delta * both;
    mean[j] += delta * share;
  }
}

inline void tile_task(const Rows& x, const Rows* y, int64_t group, int64_t rows, int64_t begin,
                      int64_t width, Tile* tiles, float* scratch, float* const* moments,
                      int64_t dim, double* invariance) {
  const int views = y == nullptr ? 1 : 2;
  float difference[kTile];
  double differences[kTile] = {};
  for (int v = 0; v < views; ++v) {
    std::fill_n(tiles[v].mean, width, 0.0);
    std::fill_n(tiles[v].scatter, width, 0.0);
  }
  for (int64_t block = 0; block < rows; block += kBlockRows) {
    const int64_t count = std::min(kBlockRows, rows - block);
    const float* pointers[2][kBlockRows];
    for (int v = 0; v < views; ++v) {
      const Rows& z = v == 0 ? x : *y;
      Tile& tile = tiles[v];
      for (int64_t n = 0; n < count; ++n) {
        pointers[v][n] =
            z.read(group, block + n, begin, width, scratch + (v * kBlockRows + n) * width);
      }
      if (block == 0) {
        mean_of_block(pointers[v], count, width, tile.shift, tile.sum);
      } else {
        to_single(tile.mean, width, tile.shift);
      }
      std::fill_n(tile.sum, width, 0.f);
      std::fill_n(tile.square, width, 0.f);
      int64_t n = 0;
      for (; n + 4 <= count; n += 4) {
        add_four_rows(pointers[v] + n, width, tile.shift, tile.sum, tile.square);
      }
      for (; n < count; ++n) add_row(pointers[v][n], width, tile.shift, tile.sum, tile.square);
      merge_block(tile.shift, tile.sum, tile.square, width, static_cast<double>(block),
                  static_cast<double>(count), tile.mean, tile.scatter);
    }
    if (views == 2) {
      std::fill_n(difference, width, 0.f);
      for (int64_t n = 0; n < count; ++n) {
        add_difference(pointers[0][n], pointers[1][n], width, difference);
      }
      for (int64_t j = 0; j < width; ++j) differences[j] += difference[j];
    }
  }
  for (int v = 0; v < views; ++v) {
    float* origin = moments[v];
    for (int64_t j = 0; j < width; ++j) {
      const double mean = tiles[v].mean[j], scatter = tiles[v].scatter[j];
      origin[j] = static_cast<float>(mean);
      origin[dim + j] = static_cast<float>(mean - origin[j]);
      origin[2 * dim + j] = static_cast<float>(scatter < 0.0 ? 0.0 : scatter);  // NaN stays NaN
    }
  }
  std::copy_n(differences, width, invariance);
}

}  // namespace statistics

// moments: [V, G, 3, D]: the mean as a sum of two floats, and the scatter. Returns sum (x - y)^2 over
// everything, 0 for one view.
inline double column_statistics(const Rows& x, const Rows* y, int64_t groups,
                                int64_t rows, int64_t dim, float* moments) {
  using namespace statistics;
  // Narrow enough that every thread has work; a column's result does not depend on the width.
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t share = (groups * dim + 2 * threads - 1) / (2 * threads);
  const int64_t width = std::clamp<int64_t>((share + 63) / 64 * 64, 64, kTile);
  const int64_t tiles = (dim + width - 1) / width;
  std::vector<double> invariance(groups * dim);
  torch::stable::parallel_for(0, groups * tiles, 1, [&](int64_t first, int64_t last) {
    Tile sums[2];
    // Rows that can be read in place need none, and allocating and zeroing takes tiny batches' time.
    const bool copies = x.copies() || (y != nullptr && y->copies());
    std::vector<float> scratch(copies ? 2 * kBlockRows * width : 0);
    for (int64_t task = first; task < last; ++task) {
      const int64_t group = task / tiles, begin = task % tiles * width;
      float* const own[2] = {moments + group * 3 * dim + begin,
                             moments + (groups + group) * 3 * dim + begin};
      tile_task(x, y, group, rows, begin, std::min(width, dim - begin), sums,
                scratch.data(), own, dim, invariance.data() + group * dim + begin);
    }
  });
  if (y == nullptr) return 0.0;
  double total = 0.0;
  for (const double value : invariance) total += value;
  return total;
}

}  // namespace common
