// Kernels with known answers and known faults, for tests/library/test_emulator.py: `selftest CASE`.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdio>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/cuda/async.cuh"
#include "common/cuda/mma.cuh"

namespace {

constexpr unsigned kAll = 0xffffffffu;

void print(const std::vector<float>& values) {
  for (const float value : values) std::printf("%.9g ", value);
  std::printf("\n");
}

// Each block reverses its values through shared memory; without the barrier a thread may read what
// its partner has not written.
template <bool Barrier>
__global__ void reverse(float* values) {
  SHARED_ARRAY(float, tile, 96);
  float* own = values + blockIdx.x * blockDim.x;
  tile[threadIdx.x] = own[threadIdx.x];
  if (Barrier) __syncthreads();
  own[threadIdx.x] = tile[blockDim.x - 1 - threadIdx.x];
}

template <bool Barrier>
void run_reverse() {
  std::vector<float> values(3 * 96);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  emulator::launch(3, 96, 0, [&] { reverse<Barrier>(values.data()); });
  print(values);
}

// A static and a dynamic array, a barrier in a loop, more than one dimension of threads and blocks.
__global__ void prefix_sums(float* values) {
  SHARED_ARRAY(float, sums, 64);
  DYNAMIC_SHARED(float, next);
  const unsigned i = threadIdx.y * blockDim.x + threadIdx.x;
  float* own = values + (blockIdx.y * gridDim.x + blockIdx.x) * 64;
  sums[i] = own[i];
  __syncthreads();
  for (unsigned step = 1; step < 64; step *= 2) {
    next[i] = sums[i] + (i >= step ? sums[i - step] : 0.f);
    __syncthreads();
    sums[i] = next[i];
    __syncthreads();
  }
  own[i] = sums[i];
}

// Of 96 threads: all vote for, all but one, and all again.
__global__ void votes(float* values) {
  values[threadIdx.x] = static_cast<float>(__syncthreads_and(1));
  values[96 + threadIdx.x] = static_cast<float>(__syncthreads_and(threadIdx.x != 70));
  values[192 + threadIdx.x] = static_cast<float>(__syncthreads_and(7));
}

void run_votes() {
  std::vector<float> values(3 * 96);
  emulator::launch(1, 96, 0, [&] { votes(values.data()); });
  print(values);
}

void run_prefix_sums() {
  std::vector<float> values(6 * 64, 1.f);
  const dim3 grid(3, 2), block(16, 4);
  emulator::launch(grid, block, 64 * sizeof(float), [&] { prefix_sums(values.data()); });
  print(values);
}

// Ten values of each of 48 threads: a whole warp and half of one.
__global__ void exchanges(float* out) {
  const int lane = threadIdx.x % warpSize;
  const bool whole = threadIdx.x < 32;
  const unsigned mask = whole ? kAll : 0x0000ffffu;
  const float value = static_cast<float>(threadIdx.x);
  float* own = out + threadIdx.x * 10;
  own[0] = __shfl_xor_sync(mask, value, 5);
  own[1] = __shfl_down_sync(mask, value, 3);
  own[2] = __shfl_up_sync(mask, value, 2, 8);
  own[3] = __shfl_sync(mask, value, 7);
  own[4] = __shfl_sync(mask, value, 3, 4);
  own[5] = static_cast<float>(__ballot_sync(mask, lane % 3 == 0));
  own[6] = static_cast<float>(__any_sync(mask, lane == 2) + 2 * __any_sync(mask, lane == 99) +
                              4 * __all_sync(mask, lane < 32) + 8 * __all_sync(mask, lane != 4));
  float sum = value;
  for (int offset = whole ? 16 : 8; offset > 0; offset /= 2) {
    sum += __shfl_xor_sync(mask, sum, offset);
  }
  own[7] = sum;
  double wide = 0.5 * value;
  wide += __shfl_xor_sync(mask, wide, 1);
  own[8] = static_cast<float>(wide);
  __syncwarp(mask);
  // Two halves of a warp, each with its own mask, on their own paths.
  const unsigned half = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  own[9] = __shfl_xor_sync(whole ? half : mask, value, 15);
}

void run_exchanges() {
  std::vector<float> out(480);
  emulator::launch(1, 48, 0, [&] { exchanges(out.data()); });
  print(out);
}

// The block that comes last, and a count that every thread raises.
__global__ void arrivals(unsigned* count, unsigned* last) {
  atomicAdd(count, 1u);
  atomicMax(count + 1, blockIdx.x * 100 + threadIdx.x);
  if (threadIdx.x == 0) atomicExch(last, blockIdx.x);
}

void run_arrivals() {
  unsigned counts[2] = {0, 0}, last = 0;
  emulator::launch(50, 33, 0, [&] { arrivals(counts, &last); });
  std::printf("%u %u %u\n", counts[0], counts[1], last);
}

__global__ void unwritten(float* out) {
  SHARED_ARRAY(float, fixed, 8);
  DYNAMIC_SHARED(int, dynamic);
  out[2 * blockIdx.x] = fixed[3];
  out[2 * blockIdx.x + 1] = static_cast<float>(dynamic[3]);
  fixed[3] = 1.f;  // gone in the next block
  dynamic[3] = 1;
}

void run_unwritten() {
  std::vector<float> out(4);
  emulator::launch(2, 1, 4 * sizeof(int), [&] { unwritten(out.data()); });
  print(out);
}

__global__ void barrier_of_half() {
  if (threadIdx.x < 16) __syncthreads();
}
__global__ void barriers_on_two_lines() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void shuffle_of_half() {
  if (threadIdx.x < 16) __shfl_xor_sync(kAll, 1.f, 1);
}
__global__ void shuffle_against_barrier() {
  if (threadIdx.x < 16) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

template <size_t Count>
__global__ void fixed_access(int at, float* out) {
  SHARED_ARRAY(float, tile, Count);
  tile[at] = 1.f;
  out[0] = tile[at];
}
__global__ void dynamic_access(int at, float* out) {
  DYNAMIC_SHARED(float, tile);
  tile[at] = 1.f;
  out[0] = tile[at];
}

void run_accesses(int fixed, int dynamic) {
  std::vector<float> out(1);
  emulator::launch(1, 1, 0, [&] { fixed_access<16>(fixed, out.data()); });
  emulator::launch(1, 1, 16 * sizeof(float), [&] { dynamic_access(dynamic, out.data()); });
  print(out);
}

// Every bit pattern of both half types to float, and floats from stdin to both.
void run_halves() {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const float wide[2] = {__half2float(__half{static_cast<uint16_t>(bits)}),
                           __bfloat162float(__nv_bfloat16{static_cast<uint16_t>(bits)})};
    std::fwrite(wide, sizeof wide, 1, stdout);
  }
  float value;
  while (std::fread(&value, sizeof value, 1, stdin) == 1) {
    const uint16_t narrow[2] = {__float2half_rn(value).bits, __float2bfloat16_rn(value).bits};
    std::fwrite(narrow, sizeof narrow, 1, stdout);
  }
}

// c [16, 16] = a b with a [16, 16] and b [16, 16] given as they are or transposed; then c times b
// once more with c as it lies in registers.
template <typename T, bool TransposedA, bool TransposedB>
__global__ void products(const float* a, const float* b, float* out) {
  constexpr int stride = 24;
  SHARED_ARRAY(T, tiles, 2 * 16 * stride);
  T* const left = tiles;
  T* const right = tiles + 16 * stride;
  const unsigned lane = threadIdx.x, g = lane / 4, t = lane % 4;
  for (unsigned i = lane; i < 128; i += 32) {
    const unsigned row = i / 8, column = i % 8 * 2;
    for (const auto& [tile, from] : {std::pair{left, a}, std::pair{right, b}}) {
      const uint32_t bits = common::pack<T>(from[16 * row + column], from[16 * row + column + 1]);
      std::memcpy(tile + row * stride + column, &bits, sizeof bits);
    }
  }
  __syncwarp();
  uint32_t x[4], y[4];
  TransposedA ? common::load_a_transposed(x, left, stride) : common::load_a(x, left, stride);
  TransposedB ? common::load_b(y, right, stride) : common::load_b_transposed(y, right, stride);
  for (int again = 0; again < 2; ++again) {
    float c[2][4] = {};
    common::mma<T>(c[0], x, y[0], y[1]);
    common::mma<T>(c[1], x, y[2], y[3]);
    for (unsigned n = 0; n < 2; ++n) {
      for (unsigned e = 0; e < 4; ++e) {
        out[256 * again + (g + e / 2 * 8) * 16 + n * 8 + 2 * t + e % 2] = c[n][e];
      }
    }
    common::as_a<T>(x, c[0], c[1]);
  }
}

// Two matrices [16, 16] from stdin, row by row.
template <typename T>
void run_products() {
  std::vector<float> in(512), out(512);
  if (std::fread(in.data(), sizeof(float), 512, stdin) != 512) return;
  const float *a = in.data(), *b = a + 256;
  emulator::launch(1, 32, 0, [&] { products<T, false, false>(a, b, out.data()); });
  print(out);
  emulator::launch(1, 32, 0, [&] { products<T, true, false>(a, b, out.data()); });
  print(out);
  emulator::launch(1, 32, 0, [&] { products<T, false, true>(a, b, out.data()); });
  print(out);
  emulator::launch(1, 32, 0, [&] { products<T, true, true>(a, b, out.data()); });
  print(out);
}

// What a copy brings before and after its thread waits, and what one that is not valid brings.
__global__ void copies(const float* from, float* out) {
  SHARED_ARRAY(float4, tile, 2);
  common::copy_async(tile, from, true);
  common::copy_async(tile + 1, nullptr, false);
  out[0] = tile[0].y;
  common::wait_for_copies();
  out[1] = tile[0].y;
  out[2] = tile[1].y;
}

void run_copies() {
  alignas(16) const float from[4] = {1.f, 2.f, 3.f, 4.f};
  std::vector<float> out(3);
  emulator::launch(1, 1, 0, [&] { copies(from, out.data()); });
  print(out);
}

// An error must leave the emulator usable.
void run_after_error() {
  try {
    emulator::launch(1, 32, 0, barrier_of_half);
  } catch (const std::runtime_error&) {
    run_prefix_sums();
  }
}

}  // namespace

int main(int, char** arguments) {
  const std::map<std::string, std::function<void()>> cases = {
      {"reverse", run_reverse<true>},
      {"reverse_without_barrier", run_reverse<false>},
      {"prefix_sums", run_prefix_sums},
      {"votes", run_votes},
      {"exchanges", run_exchanges},
      {"arrivals", run_arrivals},
      {"unwritten", run_unwritten},
      {"halves", run_halves},
      {"products_bfloat16", run_products<__nv_bfloat16>},
      {"products_float16", run_products<__half>},
      {"copies", run_copies},
      {"after_error", run_after_error},
      {"barrier_of_half", [] { emulator::launch(1, 32, 0, barrier_of_half); }},
      {"barriers_on_two_lines", [] { emulator::launch(1, 32, 0, barriers_on_two_lines); }},
      {"shuffle_of_half", [] { emulator::launch(1, 32, 0, shuffle_of_half); }},
      {"shuffle_against_barrier", [] { emulator::launch(1, 32, 0, shuffle_against_barrier); }},
      {"too_many_threads", [] { emulator::launch(1, 1025, 0, [] {}); }},
      {"too_many_blocks", [] { emulator::launch(dim3(1, 65536), 1, 0, [] {}); }},
      {"too_much_dynamic", [] { emulator::launch(1, 1, 228 * 1024, [] {}); }},
      {"too_much_static",
       [] {
         float out;
         emulator::launch(1, 1, 0, [&] { fixed_access<12289>(0, &out); });
       }},
      {"in_bounds", [] { run_accesses(15, 15); }},
      {"past_fixed", [] { run_accesses(16, 15); }},
      {"before_fixed", [] { run_accesses(-1, 15); }},
      {"past_dynamic", [] { run_accesses(15, 16); }},
  };
  try {
    cases.at(arguments[1])();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
