// How the elements of a target, its online tensor and its shadow lie to each other.
//
// Elements are numbered in the order of the target's memory: dimensions by falling stride. Tensors
// that are dense and have the same strides are then one run of memory, whatever their shape.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ema/lists.h"

namespace ema {

constexpr int kMostDims = 64;  // torch's own limit

// One dimension: its size, and the strides in elements of the three tensors.
struct Dim {
  int64_t size, target, online, shadow;
};

struct Layout {
  Dim dims[kMostDims];
  int count = 0;

  // One run of memory in all three.
  bool flat() const {
    return count == 0 || (count == 1 && dims[0].target == 1 && dims[0].online == 1 &&
                          dims[0].shadow == 1);
  }
};

// shadow: null where there is none.
inline Layout make_layout(const View& target, const View& online, const View* shadow) {
  const int64_t* thirds = shadow ? shadow->strides : target.strides;
  Layout layout;
  for (int64_t d = 0; d < target.dims; ++d) {
    if (target.sizes[d] == 1) continue;
    layout.dims[layout.count++] = {target.sizes[d], target.strides[d], online.strides[d],
                                   thirds[d]};
  }
  std::stable_sort(layout.dims, layout.dims + layout.count,
                   [](const Dim& a, const Dim& b) { return a.target > b.target; });
  int kept = 0;
  for (int d = 1; d < layout.count; ++d) {
    Dim& outer = layout.dims[kept];
    const Dim& inner = layout.dims[d];
    if (outer.target == inner.target * inner.size && outer.online == inner.online * inner.size &&
        outer.shadow == inner.shadow * inner.size) {
      outer = {outer.size * inner.size, inner.target, inner.online, inner.shadow};
    } else {
      layout.dims[++kept] = inner;
    }
  }
  layout.count = layout.count == 0 ? 0 : kept + 1;
  return layout;
}

}  // namespace ema
