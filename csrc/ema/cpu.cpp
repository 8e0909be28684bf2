// The EMA op on the CPU.
//
// Memory bound: the floor is one read of the target and of the online tensor and one write of the
// target, and of the shadow where there is one: 12 bytes an element for float32 and for a bfloat16
// student with a float32 teacher and a bfloat16 shadow. All tensors together are cut into blocks of
// kBlock elements, and each thread takes one run of blocks, so that a hundred biases cost one
// parallel region and no thread waits for another at the end of each tensor. Halves are converted
// block by block in the L1 cache.
#include "ema/ema.h"

#include <algorithm>

#include "common/tensors.h"
#include "common/cpu/vector.h"
#include "ema/cpu/convert.h"
#include "ema/formula.h"
#include "ema/layout.h"

namespace ema {
namespace {

// A multiple of kGroup. Longer blocks are slower with streamed shadows: 1024 by a quarter.
constexpr int64_t kBlock = 512;
constexpr int64_t kLeastElements = 1 << 16;  // a second thread is worth its start from here on
// Shadows are streamed past the caches from here on: what is written is not read before, and the
// caches could not keep it. Saves the read of each line, 2 of 14 bytes; measured 1.2x.
constexpr int64_t kStreamElements = 1 << 22;

struct Rounding {
  bool stochastic;
  uint64_t seed, step;
};

// One tensor's work.
struct Job {
  char* target;
  const char* online;
  char* shadow;  // null: none
  Code target_dtype, online_dtype, shadow_dtype;
  uint32_t tensor;
  int64_t elements, first_block, layout;  // layout: -1 where all is one run of memory
};

// out may be target.
KERNELS_VECTOR void interpolate_row(const float* target, const float* online, Blend blend,
                                   int64_t count, float* out) {
  if (blend.near) {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = interpolate(target[i], online[i], blend);
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < count; ++i) out[i] = interpolate(target[i], online[i], blend);
  }
}

// Elements ahead that are asked for, 2 KiB of float32: further than the processor looks by itself.
// Measured: 1.1x of the plain loop over a ViT-B's float32 parameters on two cores.
constexpr int64_t kAhead = 512;
constexpr int64_t kStep = 64;
typedef float Lanes __attribute__((vector_size(64), aligned(4), may_alias));

// A run of memory longer than the caches, in place.
KERNELS_VECTOR void interpolate_run(float* target, const float* online, Blend blend,
                                    int64_t count) {
  const float factor = blend.factor;
  int64_t i = 0;
  for (; blend.near && i + kStep <= count; i += kStep) {
    for (int64_t j = i; j < i + kStep; j += 16) {
      __builtin_prefetch(target + j + kAhead);
      __builtin_prefetch(online + j + kAhead);
    }
    for (int64_t j = i; j < i + kStep; j += 16) {
      auto* own = reinterpret_cast<Lanes*>(target + j);
      *own = *own + factor * (*reinterpret_cast<const Lanes*>(online + j) - *own);
    }
  }
  interpolate_row(target + i, online + i, blend, count - i, target + i);
}

// `scratch` unless the row is float32 already.
const float* widen(const void* row, Code dtype, int64_t count, float* scratch) {
  if (dtype == kFloat) return static_cast<const float*>(row);
  const auto* bits = static_cast<const uint16_t*>(row);
  if (dtype == kBFloat16) {
    widen_bfloat16(bits, count, scratch);
  } else {
    widen_float16(bits, count, scratch);
  }
  return scratch;
}

void narrow(const float* from, int64_t count, Code dtype, void* to) {
  if (dtype == kFloat) {
    if (to != from) std::memcpy(to, from, count * sizeof(float));
  } else if (dtype == kBFloat16) {
    narrow_bfloat16(from, count, static_cast<uint16_t*>(to));
  } else {
    narrow_float16(from, count, static_cast<uint16_t*>(to));
  }
}

void stream(const char* from, int64_t bytes, char* to) {
  int64_t at = 0;
#ifdef EMA_X86
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (; at + 16 <= bytes; at += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + at),
                       _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at)));
    }
  }
#endif
  std::memcpy(to + at, from + at, bytes - at);
}

// Elements [first, first + count) of a job, count <= kBlock, in rows that are contiguous.
void update_row(const Job& job, const Blend& blend, const Rounding& rounding, int64_t first,
                int64_t count, void* target, const void* online, void* shadow) {
  alignas(64) float wide_online[kBlock], wide_target[kBlock];
  const float* other = widen(online, job.online_dtype, count, wide_online);
  const float* result = wide_target;
  if (job.target_dtype == kFloat) {
    float* own = static_cast<float*>(target);
    interpolate_row(own, other, blend, count, own);
    result = own;
  } else {
    widen(target, job.target_dtype, count, wide_target);
    interpolate_row(wide_target, other, blend, count, wide_target);
    if (rounding.stochastic) {
      alignas(64) uint16_t random[kBlock];
      auto* bits = static_cast<uint16_t*>(target);
      draw_row(rounding.seed, rounding.step, job.tensor, first, count, random);
      if (job.target_dtype == kBFloat16) {
        round_bfloat16(wide_target, random, count, bits);
      } else {
        round_float16(wide_target, random, count, bits);
      }
    } else {
      narrow(wide_target, count, job.target_dtype, target);
    }
    // the shadow is a copy of the target as it is stored
    if (shadow != nullptr) widen(target, job.target_dtype, count, wide_target);
  }
  if (shadow != nullptr) narrow(result, count, job.shadow_dtype, shadow);
}

template <typename T>
void gather(const char* from, int64_t stride, int64_t count, char* to) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) target[i] = source[i * stride];
}

template <typename T>
void scatter(const char* from, int64_t stride, int64_t count, char* to) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) target[i * stride] = source[i];
}

// A block of tensors that are no one run of memory: gathered, updated, scattered.
void update_strided(const Job& job, const Layout& layout, const Blend& blend,
                    const Rounding& rounding, int64_t first, int64_t count) {
  alignas(64) char own[4 * kBlock], third[4 * kBlock];
  alignas(64) char other[4 * kBlock] = {};  // GCC cannot see that the gathering fills it
  const int64_t sizes[3] = {item_size(job.target_dtype), item_size(job.online_dtype),
                            item_size(job.shadow_dtype)};
  const Dim& inner = layout.dims[layout.count - 1];
  // visit(done, offsets of the three in elements, how many) for each piece of a row
  const auto rows = [&](const auto& visit) {
    for (int64_t done = 0; done < count;) {
      int64_t row = (first + done) / inner.size;
      const int64_t column = (first + done) % inner.size;
      const int64_t take = std::min(count - done, inner.size - column);
      int64_t at[3] = {column * inner.target, column * inner.online, column * inner.shadow};
      for (int d = layout.count - 2; d >= 0; --d) {
        const Dim& dim = layout.dims[d];
        const int64_t index = row % dim.size;
        row /= dim.size;
        at[0] += index * dim.target;
        at[1] += index * dim.online;
        at[2] += index * dim.shadow;
      }
      visit(done, at, take);
      done += take;
    }
  };
  const auto read = [](int64_t size, const char* from, int64_t at, int64_t stride, int64_t take,
                       char* to, int64_t done) {
    (size == 4 ? gather<float> : gather<uint16_t>)(from + at * size, stride, take,
                                                      to + done * size);
  };
  const auto write = [](int64_t size, const char* from, int64_t done, int64_t stride, int64_t take,
                        char* to, int64_t at) {
    (size == 4 ? scatter<float> : scatter<uint16_t>)(from + done * size, stride, take,
                                                        to + at * size);
  };
  rows([&](int64_t done, const int64_t* at, int64_t take) {
    read(sizes[0], job.target, at[0], inner.target, take, own, done);
    read(sizes[1], job.online, at[1], inner.online, take, other, done);
  });
  update_row(job, blend, rounding, first, count, own, other, job.shadow ? third : nullptr);
  rows([&](int64_t done, const int64_t* at, int64_t take) {
    write(sizes[0], own, done, inner.target, take, job.target, at[0]);
    if (job.shadow) write(sizes[2], third, done, inner.shadow, take, job.shadow, at[2]);
  });
}

// Elements [first, last) of a job.
void update_range(const Job& job, const std::vector<Layout>& layouts, const Blend& blend,
                  const Rounding& rounding, int64_t first, int64_t last, bool streaming) {
  if (job.layout < 0 && job.shadow == nullptr && job.target_dtype == kFloat &&
      job.online_dtype == kFloat) {
    // In one go: the end of a loop every kBlock elements costs 5 % of the memory's speed.
    float* own = reinterpret_cast<float*>(job.target) + first;
    interpolate_run(own, reinterpret_cast<const float*>(job.online) + first, blend, last - first);
    return;
  }
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t count = std::min(kBlock, last - begin);
    if (job.layout >= 0) {
      update_strided(job, layouts[job.layout], blend, rounding, begin, count);
      continue;
    }
    alignas(64) char scratch[4 * kBlock];
    const int64_t size = item_size(job.shadow_dtype);
    char* shadow = job.shadow ? job.shadow + begin * size : nullptr;
    update_row(job, blend, rounding, begin, count,
               job.target + begin * item_size(job.target_dtype),
               job.online + begin * item_size(job.online_dtype),
               shadow && streaming ? scratch : shadow);
    if (shadow && streaming) stream(scratch, count * size, shadow);
  }
#ifdef EMA_X86
  _mm_sfence();
#endif
}

}  // namespace

void update(const Lists& lists, std::optional<Tensor> momentum_tensor, double momentum,
            bool stochastic, int64_t seed, std::optional<Tensor> step_tensor, int64_t step) {
  if (momentum_tensor) {
    const void* at = momentum_tensor->const_data_ptr();
    momentum = momentum_tensor->scalar_type() == common::ScalarType::Double
                   ? *static_cast<const double*>(at)
                   : *static_cast<const float*>(at);
  }
  if (step_tensor) step = *static_cast<const int64_t*>(step_tensor->const_data_ptr());
  const Blend mix = blend(momentum);
  const Rounding rounding = {stochastic, static_cast<uint64_t>(seed), static_cast<uint64_t>(step)};
  std::vector<Job> jobs;
  std::vector<Layout> layouts;
  jobs.reserve(lists.count());
  int64_t blocks = 0, all = 0;
  for (size_t i = 0; i < lists.count(); ++i) {
    const View &target = lists.target(i), &online = lists.online(i);
    const View* shadow = lists.shadow(i);
    if (target.elements == 0) continue;
    int64_t layout = -1;
    if (!target.contiguous || !online.contiguous || (shadow != nullptr && !shadow->contiguous)) {
      layouts.push_back(make_layout(target, online, shadow));
      if (layouts.back().flat()) {
        layouts.pop_back();
      } else {
        layout = static_cast<int64_t>(layouts.size()) - 1;
      }
    }
    jobs.push_back({static_cast<char*>(target.data), static_cast<const char*>(online.data),
                    shadow ? static_cast<char*>(shadow->data) : nullptr, target.dtype, online.dtype,
                    shadow ? shadow->dtype : target.dtype, static_cast<uint32_t>(i),
                    target.elements, blocks, layout});
    blocks += (target.elements + kBlock - 1) / kBlock;
    all += target.elements;
  }
  torch::stable::parallel_for(0, blocks, all < kLeastElements ? blocks : 1, [&](int64_t begin, int64_t end) {
    auto job = std::upper_bound(jobs.begin(), jobs.end(), begin,
                                [](int64_t block, const Job& j) { return block < j.first_block; }) -
               1;
    for (int64_t block = begin; block < end; ++job) {
      const int64_t first = (block - job->first_block) * kBlock;
      const int64_t last = std::min(job->elements, (end - job->first_block) * kBlock);
      update_range(*job, layouts, mix, rounding, first, last, all >= kStreamElements);
      block += (last - first + kBlock - 1) / kBlock;
    }
  });
}

}  // namespace ema
