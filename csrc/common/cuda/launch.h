// What a CUDA file needs of the host: the current stream, launches, and shared memory, each the
// real thing under nvcc and the emulator's under g++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <type_traits>

#include "common/tensors.h"

// Shared memory of a size known at compile time, or at the launch; the emulator has its own.
#ifdef __CUDACC__
#define SHARED_ARRAY(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(type, name)                                \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

namespace common {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
T* data(const Tensor& z) {
  return static_cast<T*>(z.data_ptr());
}

template <typename T>
const T* reading(const Tensor& z) {
  return static_cast<const T*>(z.const_data_ptr());
}

// run(element) with an element of this dtype.
template <typename F>
void by_dtype(const char* op, ScalarType dtype, F&& run) {
  switch (dtype) {
    case ScalarType::Float:
      return run(float{});
    case ScalarType::Half:
      return run(__half{});
    default:
      STD_TORCH_CHECK(dtype == ScalarType::BFloat16, op, ": takes float32, bfloat16, float16");
      return run(__nv_bfloat16{});
  }
}

// run(element, vectors) with an element of this dtype and `vectors` as a constant.
template <typename F>
void by_kind(const char* op, ScalarType dtype, bool vectors, F&& run) {
  by_dtype(op, dtype, [&](auto element) {
    if (vectors) {
      run(element, std::true_type{});
    } else {
      run(element, std::false_type{});
    }
  });
}

// What tells a kernel a dtype that it does not know before the launch.
inline int dtype_code(ScalarType dtype) {
  return dtype == ScalarType::Float ? 0 : dtype == ScalarType::Half ? 1 : 2;
}

inline int64_t element_bytes(ScalarType dtype) { return dtype == ScalarType::Float ? 4 : 2; }

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// The device of a tensor, made current while this lives, and torch's current stream on it.
class Queue {
 public:
#ifdef __CUDACC__
  explicit Queue(const Tensor& like) : guard_(like.get_device_index()) {
    void* stream;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount,
                                 like.get_device_index()));
  }
#else
  explicit Queue(const Tensor&) {
    check(cudaDeviceGetAttribute(&multiprocessors_, cudaDevAttrMultiProcessorCount, 0));
  }
#endif

  int multiprocessors() const { return multiprocessors_; }

  // Bytes of dynamic shared memory that a block can have.
  size_t shared_limit() const {
    int bytes, device;
    check(cudaGetDevice(&device));
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    return static_cast<size_t>(bytes);
  }

  template <typename... Parameters, typename... Arguments>
  void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic,
              const Arguments&... arguments) const {
#ifdef __CUDACC__
    if (dynamic > kSharedWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(dynamic)));
    }
    kernel<<<grid, block, dynamic, stream_>>>(arguments...);
    check(cudaGetLastError());
#else
    emulator::launch(grid, block, dynamic, [&] { kernel(arguments...); });
#endif
  }

 private:
  static constexpr size_t kSharedWithoutAsking = 48 * 1024;
#ifdef __CUDACC__
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  cudaStream_t stream_ = nullptr;
  int multiprocessors_ = 1;
};

}  // namespace common
