// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "attention/checks.h"
#include "common/registration.h"

#define ATTENTION_RULES                                                                         \
  "Tensor? q_offsets, Tensor? k_offsets, Tensor? lengths, Tensor? keep, Tensor? bounds, "       \
  "int max_q, int max_k, int tokens_per_frame, int window, Tensor? table, Tensor? q_index, "    \
  "Tensor? k_index, int[] grid, "

KERNELS_LIBRARY(m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " ATTENTION_RULES
        "float scale) -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      ATTENTION_RULES
      "bool need_q, bool need_k, bool need_v, float scale) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_rotate(Tensor x, Tensor table, Tensor? index, Tensor? offsets, int[] grid, "
      "bool adjoint) -> Tensor");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("attention_forward", KERNELS_CHECKED(attention, forward));
  m.impl("attention_backward", KERNELS_CHECKED(attention, backward));
  m.impl("attention_rotate", KERNELS_CHECKED(attention, rotate));
}
