// The op schema's C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "ema/ema.h"

KERNELS_LIBRARY(m) {
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] onlines, Tensor(b!)[] shadows, "
      "Tensor? momentum_tensor, float momentum, bool stochastic, int seed, Tensor? step_tensor, "
      "int step) -> ()");
}

KERNELS_IMPLEMENTATION(m) { m.impl("ema_update_", TORCH_BOX(&ema::update)); }
