// The op schema's C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "ema/ema.h"

namespace ema {
namespace {

// Boxed by hand for Lists' sake. Returns whether the update ran; without `checked` it does not run
// where the lists are not plainly fit, and nothing has been written.
void boxed_update(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Lists lists(stack[0], stack[1], stack[2]);
  const auto momentum_tensor = to<std::optional<Tensor>>(stack[3]);
  const auto step_tensor = to<std::optional<Tensor>>(stack[7]);
  const bool run = to<bool>(stack[9]) || lists.fit();
  if (run && lists.count() > 0) {
    update(lists, momentum_tensor, to<double>(stack[4]), to<bool>(stack[5]), to<int64_t>(stack[6]),
           step_tensor, to<int64_t>(stack[8]));
  }
  stack[0] = from(run);
}

}  // namespace
}  // namespace ema

KERNELS_LIBRARY(m) {
  m.def(
      "ema_update_(Tensor(a!)[] targets, Tensor[] onlines, Tensor(b!)[] shadows, "
      "Tensor? momentum_tensor, float momentum, bool stochastic, int seed, Tensor? step_tensor, "
      "int step, bool checked=True) -> bool");
}

KERNELS_IMPLEMENTATION(m) { m.impl("ema_update_", &ema::boxed_update); }
