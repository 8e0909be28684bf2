"""Adaptive layer norm in plain PyTorch: the specification every backend is held to.

Differentiable by autograd to any order, and float64-capable. A condition's vector is broadcast over
its frame's tokens, as published code writes it once it does not repeat it. The one addition to the
published formula: where float32 does not hold a token's sum of squares the result is NaN, and not
the `shift` that a division by infinity would leave.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.core import library


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x: [G, T, D]; shift, scale: [G, D]. Half inputs are computed in float32, whatever autocast
    says.
    """
    with library.no_autocast(x.device):
        wide, moved, scaled = (_wide(z) for z in (x, shift, scale))
        centred = wide - wide.mean(dim=-1, keepdim=True)
        variance = centred.square().mean(dim=-1, keepdim=True)
        variance = variance.masked_fill(variance.isinf(), torch.nan)
        normed = centred * (variance + eps).rsqrt()
        return (normed * (1.0 + scaled[:, None]) + moved[:, None]).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y: [G, T, D]; gate: [G, D]; in the dtype of x."""
    with library.no_autocast(x.device):
        return (_wide(x) + _wide(gate)[:, None] * _wide(y)).to(x.dtype)


def _wide(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
