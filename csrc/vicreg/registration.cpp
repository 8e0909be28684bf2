// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "vicreg/checks.h"

#define VICREG_SETTINGS "float margin, float eps, bool unbiased, float[] scales, float[] weights, " \
                        "bool tf32x3=False"

KERNELS_LIBRARY(m) {
  m.def("vicreg_forward(Tensor x, Tensor? y, " VICREG_SETTINGS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "vicreg_backward(Tensor grads, Tensor x, Tensor? y, Tensor moments, Tensor squares, "
      "Tensor deflated, Tensor index, Tensor centred, bool need_x, bool need_y, " VICREG_SETTINGS
      ") -> (Tensor, Tensor)");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("vicreg_forward", KERNELS_CHECKED(vicreg, forward));
  m.impl("vicreg_backward", KERNELS_CHECKED(vicreg, backward));
}
