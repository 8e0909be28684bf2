// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "sigreg/checks.h"

KERNELS_LIBRARY(m) {
  m.def(
      "sigreg_directions(Tensor like, Tensor? step, int number, int seed, int dim, int slices) -> "
      "Tensor");
  m.def("sigreg_sums(Tensor z, Tensor directions, float[] knots) -> (Tensor, Tensor)");
  m.def(
      "sigreg_statistic(Tensor sums, float[] knots, float[] weights, float count, float factor, "
      "float ranks) -> (Tensor, Tensor)");
  m.def(
      "sigreg_forward(Tensor z, Tensor directions, float[] knots, float[] weights, float count, "
      "float factor) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sigreg_gradient(Tensor grad, Tensor coefficients, Tensor projections, Tensor directions, "
      "float[] knots) -> Tensor");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("sigreg_directions", KERNELS_CHECKED(sigreg, directions));
  m.impl("sigreg_sums", KERNELS_CHECKED(sigreg, sums));
  m.impl("sigreg_statistic", KERNELS_CHECKED(sigreg, statistic));
  m.impl("sigreg_forward", KERNELS_CHECKED(sigreg, forward));
  m.impl("sigreg_gradient", KERNELS_CHECKED(sigreg, gradient));
}
