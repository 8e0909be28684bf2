// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "tokens/checks.h"

KERNELS_LIBRARY(m) {
  m.def("tokens_gather(Tensor x, Tensor index, Tensor? offsets) -> Tensor");
  m.def(
      "tokens_scatter(Tensor rows, Tensor index, Tensor? offsets, int batch, int length, "
      "float fill, bool accumulate, bool reduce) -> Tensor");
  m.def(
      "tokens_loss_forward(Tensor pred, Tensor teacher, Tensor index, Tensor? offsets, int kind, "
      "bool normalize, float beta, float eps) -> (Tensor, Tensor)");
  m.def(
      "tokens_loss_backward(Tensor grad, Tensor pred, Tensor teacher, Tensor index, "
      "Tensor? offsets, Tensor saved, int kind, bool normalize, float beta) -> Tensor");
  m.def(
      "tokens_order(Tensor context_index, Tensor target_index, Tensor? context_offsets, "
      "Tensor? target_offsets) -> (Tensor, Tensor, Tensor)");
  m.def(
      "tokens_assemble(Tensor context, Tensor context_index, Tensor context_rows, Tensor target, "
      "Tensor target_index, Tensor target_rows, Tensor? positions) -> Tensor");
  m.def("tokens_column_sum(Tensor sequence, Tensor rows) -> Tensor");
}

KERNELS_IMPLEMENTATION(m) {
  m.impl("tokens_gather", KERNELS_CHECKED(tokens, gather));
  m.impl("tokens_scatter", KERNELS_CHECKED(tokens, scatter));
  m.impl("tokens_loss_forward", KERNELS_CHECKED(tokens, loss_forward));
  m.impl("tokens_loss_backward", KERNELS_CHECKED(tokens, loss_backward));
  m.impl("tokens_order", KERNELS_CHECKED(tokens, order));
  m.impl("tokens_assemble", KERNELS_CHECKED(tokens, assemble));
  m.impl("tokens_column_sum", KERNELS_CHECKED(tokens, column_sum));
}
