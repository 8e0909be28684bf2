// The op schemas' C++ side, compiled into each library: VICREG_NAMESPACE names the library's ops
// and VICREG_KEY the dispatch key they serve (vicreg_kernels_cpu and CPU, vicreg_kernels_cuda and
// CUDA, and for the emulator's test build vicreg_kernels_emulator and CPU).
#include <torch/csrc/stable/library.h>

#include "vicreg/vicreg.h"

#define VICREG_SETTINGS "float margin, float eps, bool unbiased, float[] scales, float[] weights"

// A level of indirection, so that the two macros are expanded before they are pasted.
#define VICREG_LIBRARY(ns, m) STABLE_TORCH_LIBRARY(ns, m)
#define VICREG_LIBRARY_IMPL(ns, key, m) STABLE_TORCH_LIBRARY_IMPL(ns, key, m)

VICREG_LIBRARY(VICREG_NAMESPACE, m) {
  m.def("vicreg_forward(Tensor x, Tensor? y, " VICREG_SETTINGS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "vicreg_backward(Tensor grads, Tensor x, Tensor? y, Tensor moments, Tensor squares, "
      "Tensor deflated, Tensor index, Tensor centred, bool need_x, bool need_y, " VICREG_SETTINGS
      ") -> (Tensor, Tensor)");
}

VICREG_LIBRARY_IMPL(VICREG_NAMESPACE, VICREG_KEY, m) {
  m.impl("vicreg_forward", TORCH_BOX(&vicreg::forward));
  m.impl("vicreg_backward", TORCH_BOX(&vicreg::backward));
}
