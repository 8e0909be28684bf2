// A chunk of an [N, D] matrix along its long side.
#pragma once

#include <algorithm>
#include <cstdint>

namespace common {

// Rows [row, row + rows) and columns [column, column + columns).
struct Chunk {
  // Of a matrix [n, d]: columns [begin, begin + length) where n < d, else such rows, whole across,
  // and no further than `end`.
  Chunk(int64_t n, int64_t d, int64_t begin, int64_t length, int64_t end) {
    const int64_t inside = std::min(length, end - begin);
    row = n < d ? 0 : begin;
    rows = n < d ? n : inside;
    column = n < d ? begin : 0;
    columns = n < d ? inside : d;
  }

  int64_t row, rows, column, columns;
};

}  // namespace common
