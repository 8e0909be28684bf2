// The op schema's C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "ema/checks.h"

namespace ema {
namespace {

// Boxed by hand for Lists' sake. Returns whether the update ran; without `checked` it does not run
// where the lists are not plainly fit, and nothing has been written. With `checked` lists that do
// not match are an error.
void boxed_update(StableIValue* stack, uint64_t, uint64_t) {
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Lists lists(stack[0], stack[1], stack[2]);
  const auto momentum_tensor = to<std::optional<Tensor>>(stack[3]);
  const auto step_tensor = to<std::optional<Tensor>>(stack[7]);
  const double momentum = to<double>(stack[4]);
  const int64_t step = to<int64_t>(stack[8]);
  const bool checked = to<bool>(stack[9]), run = checked || lists.fit();
  if (checked) lists.check();
  if (run && lists.count() > 0) {
    check_settings(lists, momentum_tensor, momentum, step_tensor, step);
    update(lists, momentum_tensor, momentum, to<bool>(stack[5]), to<int64_t>(stack[6]),
           step_tensor, step);
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
