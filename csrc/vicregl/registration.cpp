// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "vicregl/checks.h"

#define VICREGL_MATCHES \
  "Tensor a, Tensor b, Tensor nearest_a, Tensor rank_a, Tensor nearest_b, Tensor rank_b"
#define VICREGL_KEPT "int[] counts_a, float[] weights_a, int[] counts_b, float[] weights_b"

KERNELS_LIBRARY(m) {
  m.def("vicregl_match(Tensor a, Tensor b) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("vicregl_pairs_forward(" VICREGL_MATCHES ", " VICREGL_KEPT ") -> Tensor");
  m.def("vicregl_pairs_backward(Tensor grad, " VICREGL_MATCHES
        ", bool need_a, bool need_b, " VICREGL_KEPT ") -> (Tensor, Tensor)");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("vicregl_match", KERNELS_CHECKED(vicregl, match));
  m.impl("vicregl_pairs_forward", KERNELS_CHECKED(vicregl, pairs_forward));
  m.impl("vicregl_pairs_backward", KERNELS_CHECKED(vicregl, pairs_backward));
}
