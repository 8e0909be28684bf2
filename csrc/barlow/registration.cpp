// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "barlow/checks.h"
#include "common/registration.h"

#define BARLOW_SETTINGS \
  "float eps, float std_eps, bool unbiased, float lambd, bool tf32x3=False"

KERNELS_LIBRARY(m) {
  m.def("barlow_forward(Tensor x, Tensor y, " BARLOW_SETTINGS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "barlow_backward(Tensor grad, Tensor x, Tensor y, Tensor moments, Tensor diagonal, "
      "Tensor products, Tensor standardised, bool need_x, bool need_y, " BARLOW_SETTINGS
      ") -> (Tensor, Tensor)");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("barlow_forward", KERNELS_CHECKED(barlow, forward));
  m.impl("barlow_backward", KERNELS_CHECKED(barlow, backward));
}
