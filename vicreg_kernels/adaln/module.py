"""The nn.Module that users drop in."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from vicreg_kernels.adaln.api import gated_residual, modulated_layer_norm
from vicreg_kernels.adaln.checks import check_settings


class AdaLN(nn.Module):
    """A transformer block's conditioning (adaLN-Zero: Peebles and Xie, 2023, arXiv:2212.09748).

    One linear layer computes shift, scale and gate of two branches from the condition, in DiT's
    order. Its weights start at zero, so that the block starts as the identity:

        x = x + gate_1 attention(norm(x) (1 + scale_1) + shift_1)
        x = x + gate_2 mlp(norm(x) (1 + scale_2) + shift_2)

    Args:
        dim: D, the elements of a token.
        condition_dim: C, those of the condition; None: D.
        eps, backend: as in `modulated_layer_norm`.

    Shapes: x [..., T, D]; condition [..., C], one for each frame of T tokens, or [..., T, C], one
    for each token -> [..., T, D]. attention and mlp are functions from [..., T, D] to the same.
    """

    def __init__(
        self,
        dim: int,
        condition_dim: int | None = None,
        *,
        eps: float = 1e-6,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(eps=eps, backend=backend)
        self.linear = nn.Linear(dim if condition_dim is None else condition_dim, 6 * dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.eps = eps
        self.backend = backend

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        attention: Callable[[Tensor], Tensor],
        mlp: Callable[[Tensor], Tensor],
    ) -> Tensor:
        vectors = self.linear(F.silu(condition)).chunk(6, dim=-1)
        for branch, (shift, scale, gate) in ((attention, vectors[:3]), (mlp, vectors[3:])):
            normed = modulated_layer_norm(x, shift, scale, eps=self.eps, backend=self.backend)
            x = gated_residual(x, branch(normed), gate, backend=self.backend)
        return x

    def extra_repr(self) -> str:
        return f"eps={self.eps}"
