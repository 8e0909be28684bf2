// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "adaln/checks.h"
#include "common/registration.h"

KERNELS_LIBRARY(m) {
  m.def(
      "adaln_norm_forward(Tensor x, Tensor shift, Tensor scale, float eps) -> (Tensor, Tensor)");
  m.def(
      "adaln_norm_backward(Tensor grad, Tensor x, Tensor scale, Tensor saved, bool need_x, "
      "bool need_vectors) -> (Tensor, Tensor, Tensor)");
  m.def("adaln_gate_forward(Tensor x, Tensor y, Tensor gate) -> Tensor");
  m.def(
      "adaln_gate_backward(Tensor grad, Tensor y, Tensor gate, bool need_y, bool need_gate) -> "
      "(Tensor, Tensor)");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("adaln_norm_forward", KERNELS_CHECKED(adaln, norm_forward));
  m.impl("adaln_norm_backward", KERNELS_CHECKED(adaln, norm_backward));
  m.impl("adaln_gate_forward", KERNELS_CHECKED(adaln, gate_forward));
  m.impl("adaln_gate_backward", KERNELS_CHECKED(adaln, gate_backward));
}
