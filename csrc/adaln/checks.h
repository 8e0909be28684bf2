// What the ops of adaptive layer norm take; contract.py documents every tensor.
#pragma once

#include "adaln/adaln.h"
#include "adaln/formula.h"
#include "common/checks.h"

namespace adaln {

using common::Argument, common::kFloats, common::kSome;

// Tokens, [G, T, D].
inline Argument check_tokens(const char* name, const Tensor& z) {
  const Argument tokens(name, z);
  tokens.dtype(kFloats).shape({kSome, kSome, kSome});
  return tokens;
}

// A vector for each frame of `tokens`, of their dtype or float32.
inline Argument check_vector(const char* name, const Tensor& z, const Argument& tokens) {
  const Argument vector(name, z);
  vector.dtype(kFloats).on(tokens).shape({tokens.size(0), tokens.size(2)});
  if (!vector.is(common::kFloat32)) vector.as(tokens);
  return vector;
}

inline void check_norm_forward(const Tensor& x, const Tensor& shift, const Tensor& scale, double) {
  const Argument tokens = check_tokens("x", x);
  const Argument moved = check_vector("shift", shift, tokens);
  check_vector("scale", scale, tokens).as(moved);
}

inline void check_norm_backward(const Tensor& grad, const Tensor& x, const Tensor& scale,
                                const Tensor& saved, bool, bool) {
  const Argument tokens = check_tokens("x", x);
  Argument("grad", grad).as(tokens).on(tokens).like(tokens);
  check_vector("scale", scale, tokens);
  Argument("saved", saved)
      .plain(common::kFloat32, tokens)
      .shape({tokens.size(0), tokens.size(1), 2});
}

// y beside x or its gradient: of its dtype, or any beside float32.
inline Argument check_branch(const Tensor& y, const Argument& tokens) {
  const Argument branch = check_tokens("y", y);
  branch.on(tokens).like(tokens);
  if (!tokens.is(common::kFloat32)) branch.as(tokens);
  return branch;
}

inline void check_gate_forward(const Tensor& x, const Tensor& y, const Tensor& gate) {
  check_vector("gate", gate, check_branch(y, check_tokens("x", x)));
}

inline void check_gate_backward(const Tensor& grad, const Tensor& y, const Tensor& gate, bool,
                                bool) {
  check_vector("gate", gate, check_branch(y, check_tokens("grad", grad)));
}

}  // namespace adaln
