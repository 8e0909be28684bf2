// The op schemas' C++ side; common/registration.h says what a library and a key are.
#include "common/registration.h"
#include "tokens/tokens.h"

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
  m.impl("tokens_gather", TORCH_BOX(&tokens::gather));
  m.impl("tokens_scatter", TORCH_BOX(&tokens::scatter));
  m.impl("tokens_loss_forward", TORCH_BOX(&tokens::loss_forward));
  m.impl("tokens_loss_backward", TORCH_BOX(&tokens::loss_backward));
  m.impl("tokens_order", TORCH_BOX(&tokens::order));
  m.impl("tokens_assemble", TORCH_BOX(&tokens::assemble));
  m.impl("tokens_column_sum", TORCH_BOX(&tokens::column_sum));
}
