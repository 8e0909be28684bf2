// The EMA op on CUDA. Times: not measured yet.
//
// Memory bound: 12 bytes an element for float32 (read target and online, write target) and for a
// bfloat16 student with a float32 teacher and a bfloat16 shadow (2 + 4 + 4 + 2). On an H100 (3.35
// TB/s) the 86 M elements of a ViT-B take 0.31 ms at the peak, the 1.01 G of a ViT-g 3.6 ms.
//
// One launch takes up to EMA_TABLE tensors of any sizes and dtypes; a block finds its tensor in a
// table that travels as a kernel parameter (28 KiB of the 32 KiB that CUDA 12.1 and later give).
// So no host buffer and no device buffer has to outlive the call: a captured CUDA graph keeps its
// own copy of the parameters. Momentum and step may be read from device memory, for graphs that are
// replayed with a schedule.
//
// A block takes kChunk elements. Each thread first loads 64 or 128 bytes in 16-byte accesses (8
// bytes where a half row lies beside a float32 one), then computes, then stores: 256 threads keep 16
// KiB or more in flight, and two such blocks cover the 15 KiB a multiprocessor needs by Little's law
// (3.35 TB/s x 600 ns / 132). What is left of a tensor, and unaligned ones, go element by element.
#include "ema/ema.h"

#include <algorithm>

#include "common/cuda/columns.cuh"
#include "common/cuda/launch.h"
#include "common/search.h"
#include "common/tensors.h"
#include "ema/formula.h"
#include "ema/layout.h"

// Tensors in one launch; small in the emulator's build, so that several launches are tested.
#ifndef EMA_TABLE
#define EMA_TABLE 640
#endif
#ifndef EMA_STRIDED_TABLE
#define EMA_STRIDED_TABLE 64
#endif

#if defined(__CUDACC__) && CUDART_VERSION < 12010
#error "kernel parameters of more than 4 KiB need CUDA 12.1"
#endif

namespace ema {
namespace kernels {

using common::kThreads, common::narrow, common::Pack, common::widen;
using common::pieces::load, common::pieces::store;

constexpr int kChunk = 8192;   // elements a block
constexpr int kAtOnce = 16;    // elements a thread has in flight
constexpr int kPass = kThreads * kAtOnce;
constexpr int kDims = 6;       // of strided tensors; more are split on the host

struct Scalars {
  const void* momentum_at;  // null: `mix` holds
  const int64_t* step_at;   // null: `step` holds
  uint64_t seed, step;
  Blend mix;
  bool momentum_is_double, stochastic;
};

struct Kinds {
  Code target, online, shadow;
  bool vectors;  // 16-byte accesses are aligned
};

struct Table {
  void* target[EMA_TABLE];
  const void* online[EMA_TABLE];
  void* shadow[EMA_TABLE];
  int64_t elements[EMA_TABLE];
  uint32_t first_block[EMA_TABLE];
  uint32_t tensor[EMA_TABLE];
  Kinds kinds[EMA_TABLE];
  int count;
};

struct StridedEntry {
  void* target;
  const void* online;
  void* shadow;
  int64_t elements, first_element;  // the latter: its place in the tensor, for the random bits
  Dim dims[kDims];
  uint32_t first_block, tensor;
  Kinds kinds;
  int dim_count;
};

struct StridedTable {
  StridedEntry entries[EMA_STRIDED_TABLE];
  int count;
};

static_assert(sizeof(Table) + sizeof(Scalars) <= 32764);
static_assert(sizeof(StridedTable) + sizeof(Scalars) <= 32764);

struct Settings {
  Blend mix;
  bool stochastic;
  uint64_t seed, step;
};

__device__ __forceinline__ Settings read_settings(const Scalars& given) {
  Settings result = {given.mix, given.stochastic, given.seed, given.step};
  if (given.momentum_at != nullptr) {
    result.mix = blend(given.momentum_is_double
                           ? *static_cast<const double*>(given.momentum_at)
                           : static_cast<double>(*static_cast<const float*>(given.momentum_at)));
  }
  if (given.step_at != nullptr) result.step = static_cast<uint64_t>(*given.step_at);
  return result;
}

template <typename T>
__device__ __forceinline__ T from_bits(uint16_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// `value` as the target keeps it. random: 16 bits, for a half target.
template <typename T>
__device__ __forceinline__ T keep(float value, uint32_t random, bool stochastic) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (stochastic) return from_bits<T>(stochastic_bfloat16(value, random));
  } else if constexpr (std::is_same_v<T, __half>) {
    if (stochastic) return from_bits<T>(stochastic_float16(value, random));
  }
  return narrow<T>(value);
}

__device__ __forceinline__ uint32_t half_word(const Words& words, int k) {
  const uint32_t word = k < 2 ? words.x : k < 4 ? words.y : k < 6 ? words.z : words.w;
  return k % 2 == 0 ? word & 0xffffu : word >> 16;
}

__device__ __forceinline__ void store_one(void* shadow, Code code, int64_t at, float value) {
  if (code == kFloat) static_cast<float*>(shadow)[at] = value;
  if (code == kBFloat16) static_cast<__nv_bfloat16*>(shadow)[at] = narrow<__nv_bfloat16>(value);
  if (code == kFloat16) static_cast<__half*>(shadow)[at] = narrow<__half>(value);
}

// One element, `number` its place in the target's memory order.
template <typename T, typename O>
__device__ __forceinline__ void update_one(T* target, const O* online, void* shadow, Code code,
                                           int64_t at_shadow, int64_t number, uint32_t tensor,
                                           const Settings& s) {
  const float value = interpolate(widen(*target), widen(*online), s.mix);
  uint32_t random = 0;
  if (sizeof(T) == 2 && s.stochastic) {
    random = half_word(draw(s.seed, s.step, tensor, static_cast<uint64_t>(number / kGroup)),
                       static_cast<int>(number % kGroup));
  }
  const T kept = keep<T>(value, random, s.stochastic);
  *target = kept;
  store_one(shadow, code, at_shadow, widen(kept));
}

// kPass elements from `first` on, all of them there and aligned. N: elements of 16 bytes of the
// target, adjacent in a thread, so that a warp's accesses fall together.
template <typename T, typename O>
__device__ __forceinline__ void update_vectors(T* target, const O* online, void* shadow, Code code,
                                               int64_t first, uint32_t tensor, const Settings& s) {
  constexpr int N = 16 / static_cast<int>(sizeof(T));
  constexpr int kPacks = kAtOnce / N;
  const int64_t begin = first + static_cast<int64_t>(threadIdx.x) * N;
  float own[kPacks][N], other[kPacks][N];
#pragma unroll
  for (int p = 0; p < kPacks; ++p) load(target + begin + p * kThreads * N, own[p]);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) load(online + begin + p * kThreads * N, other[p]);
#pragma unroll
  for (int p = 0; p < kPacks; ++p) {
    const int64_t at = begin + p * kThreads * N;
    Words words = {};
    if (sizeof(T) == 2 && s.stochastic) {
      words = draw(s.seed, s.step, tensor, static_cast<uint64_t>(at / kGroup));
    }
    Pack<T, N> pack;
#pragma unroll
    for (int w = 0; w < N; ++w) {
      const float value = interpolate(own[p][w], other[p][w], s.mix);
      pack.values[w] = keep<T>(value, half_word(words, w), s.stochastic);
      own[p][w] = widen(pack.values[w]);
    }
    pack.write(target + at);
    if (code == kFloat) store(static_cast<float*>(shadow) + at, own[p]);
    if (code == kBFloat16) store(static_cast<__nv_bfloat16*>(shadow) + at, own[p]);
    if (code == kFloat16) store(static_cast<__half*>(shadow) + at, own[p]);
  }
}

template <typename T, typename O>
__device__ __forceinline__ void update_chunk(void* target_at, const void* online_at, void* shadow,
                                             const Kinds& kinds, int64_t first, int64_t elements,
                                             uint32_t tensor, const Settings& s) {
  T* target = static_cast<T*>(target_at);
  const O* online = static_cast<const O*>(online_at);
  const int64_t last = first + kChunk < elements ? first + kChunk : elements;
  int64_t at = first;
  if (kinds.vectors) {
    for (; at + kPass <= last; at += kPass) {
      update_vectors(target, online, shadow, kinds.shadow, at, tensor, s);
    }
  }
  for (at += threadIdx.x; at < last; at += kThreads) {
    update_one(target + at, online + at, shadow, kinds.shadow, at, at, tensor, s);
  }
}

// run(T{}, O{}) with the types of the two codes.
template <typename Run>
__device__ __forceinline__ void with_types(Code target, Code online, const Run& run) {
  const auto inner = [&](auto t) {
    if (online == kFloat) run(t, float{});
    if (online == kBFloat16) run(t, __nv_bfloat16{});
    if (online == kFloat16) run(t, __half{});
  };
  if (target == kFloat) inner(float{});
  if (target == kBFloat16) inner(__nv_bfloat16{});
  if (target == kFloat16) inner(__half{});
}

__global__ void __launch_bounds__(kThreads, 3)
    update_kernel(const Table table, const Scalars given) {
  const int i = common::last_not_above(table.count, blockIdx.x,
                                       [&](int k) { return table.first_block[k]; });
  const Settings s = read_settings(given);
  const Kinds kinds = table.kinds[i];
  const int64_t first = static_cast<int64_t>(blockIdx.x - table.first_block[i]) * kChunk;
  with_types(kinds.target, kinds.online, [&](auto t, auto o) {
    update_chunk<decltype(t), decltype(o)>(table.target[i], table.online[i], table.shadow[i], kinds,
                                           first, table.elements[i], table.tensor[i], s);
  });
}

// Tensors that are no one run of memory: rare, so one element a thread and no care for speed.
__global__ void __launch_bounds__(kThreads)
    strided_kernel(const StridedTable table, const Scalars given) {
  const int i = common::last_not_above(table.count, blockIdx.x,
                                       [&](int k) { return table.entries[k].first_block; });
  const StridedEntry& entry = table.entries[i];
  const Settings s = read_settings(given);
  const int64_t first = static_cast<int64_t>(blockIdx.x - entry.first_block) * kChunk;
  const int64_t last = first + kChunk < entry.elements ? first + kChunk : entry.elements;
  for (int64_t element = first + threadIdx.x; element < last; element += kThreads) {
    int64_t rest = element, target = 0, online = 0, shadow = 0;
    for (int d = entry.dim_count - 1; d >= 0; --d) {
      const int64_t index = rest % entry.dims[d].size;
      rest /= entry.dims[d].size;
      target += index * entry.dims[d].target;
      online += index * entry.dims[d].online;
      shadow += index * entry.dims[d].shadow;
    }
    with_types(entry.kinds.target, entry.kinds.online, [&](auto t, auto o) {
      update_one(static_cast<decltype(t)*>(entry.target) + target,
                 static_cast<const decltype(o)*>(entry.online) + online, entry.shadow,
                 entry.kinds.shadow, shadow, entry.first_element + element, entry.tensor, s);
    });
  }
}

}  // namespace kernels

namespace {

using common::ScalarType;
using namespace kernels;

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Collects tensors and launches whenever a table is full.
class Launcher {
 public:
  Launcher(const common::Queue& queue, const Scalars& scalars) : queue_(queue), scalars_(scalars) {}

  void add(const View& target, const View& online, const View* shadow, uint32_t tensor) {
    const int64_t elements = target.elements;
    if (elements == 0) return;
    Kinds kinds = {target.dtype, online.dtype, shadow ? shadow->dtype : kNone, false};
    void* to = target.data;
    const void* from = online.data;
    void* copy = shadow ? shadow->data : nullptr;
    if (!(target.contiguous && online.contiguous && (shadow == nullptr || shadow->contiguous))) {
      const Layout layout = make_layout(target, online, shadow);
      if (!layout.flat()) {
        StridedEntry entry = {to, from, copy, elements, 0, {}, 0, tensor, kinds, 0};
        add_strided(entry, layout, 0);
        return;
      }
    }
    kinds.vectors = aligned(to) && aligned(from) && (copy == nullptr || aligned(copy));
    const int k = table_.count++;
    table_.target[k] = to;
    table_.online[k] = from;
    table_.shadow[k] = copy;
    table_.elements[k] = elements;
    table_.first_block[k] = blocks_;
    table_.tensor[k] = tensor;
    table_.kinds[k] = kinds;
    blocks_ += static_cast<uint32_t>((elements + kChunk - 1) / kChunk);
    if (table_.count == EMA_TABLE) flush();
  }

  void flush() {
    if (table_.count > 0) {
      queue_.launch(update_kernel, dim3(blocks_), dim3(kThreads), 0, table_, scalars_);
    }
    table_.count = 0;
    blocks_ = 0;
  }

  void flush_strided() {
    if (strided_.count > 0) {
      queue_.launch(strided_kernel, dim3(strided_blocks_), dim3(kThreads), 0, strided_, scalars_);
    }
    strided_.count = 0;
    strided_blocks_ = 0;
  }

 private:
  // Dimensions [d, end) of a layout: the outer ones that an entry has no room for become entries.
  void add_strided(StridedEntry entry, const Layout& layout, int d) {
    if (layout.count - d > kDims) {
      const Dim& dim = layout.dims[d];
      const int64_t elements = entry.elements / dim.size, first = entry.first_element;
      for (int64_t index = 0; index < dim.size; ++index) {
        StridedEntry part = entry;
        const Kinds& kinds = entry.kinds;
        part.target = static_cast<char*>(entry.target) + index * dim.target * item_size(kinds.target);
        part.online =
            static_cast<const char*>(entry.online) + index * dim.online * item_size(kinds.online);
        if (entry.shadow != nullptr) {
          part.shadow =
              static_cast<char*>(entry.shadow) + index * dim.shadow * item_size(kinds.shadow);
        }
        part.elements = elements;
        part.first_element = first + index * elements;
        add_strided(part, layout, d + 1);
      }
      return;
    }
    entry.dim_count = layout.count - d;
    std::copy(layout.dims + d, layout.dims + layout.count, entry.dims);
    entry.first_block = strided_blocks_;
    strided_.entries[strided_.count++] = entry;
    strided_blocks_ += static_cast<uint32_t>((entry.elements + kChunk - 1) / kChunk);
    if (strided_.count == EMA_STRIDED_TABLE) flush_strided();
  }

  const common::Queue& queue_;
  const Scalars& scalars_;
  Table table_ = {};
  StridedTable strided_ = {};
  uint32_t blocks_ = 0, strided_blocks_ = 0;
};

}  // namespace

void update(const Lists& lists, std::optional<Tensor> momentum_tensor, double momentum,
            bool stochastic, int64_t seed, std::optional<Tensor> step_tensor, int64_t step) {
  const common::Queue queue(lists.first());
  Scalars scalars = {};
  scalars.mix = blend(momentum);
  scalars.stochastic = stochastic;
  scalars.seed = static_cast<uint64_t>(seed);
  scalars.step = static_cast<uint64_t>(step);
  if (momentum_tensor) {
    scalars.momentum_at = momentum_tensor->const_data_ptr();
    scalars.momentum_is_double = momentum_tensor->scalar_type() == ScalarType::Double;
  }
  if (step_tensor) scalars.step_at = static_cast<const int64_t*>(step_tensor->const_data_ptr());
  Launcher launcher(queue, scalars);
  for (size_t i = 0; i < lists.count(); ++i) {
    launcher.add(lists.target(i), lists.online(i), lists.shadow(i), static_cast<uint32_t>(i));
  }
  launcher.flush();
  launcher.flush_strided();
}

}  // namespace ema
