"""The nn.Module that users drop in."""

from __future__ import annotations

from torch import Tensor, nn

from vicreg_kernels.attention.api import masked_attention, takes_head_dim
from vicreg_kernels.attention.masks import Rule
from vicreg_kernels.attention.rope import Rope3d
from vicreg_kernels.core import dispatch


class MaskedAttention(nn.Module):
    """Multi-head self-attention under a mask of rules; its layers are `qkv` and `proj`, as in timm.

    Args:
        dim: the elements of a token: num_heads times a head dim, a multiple of 8 from 16 to 128.
        num_heads: how many heads.
        qkv_bias, proj_bias: whether the two projections have biases.
        backend: "reference", "cpu", "triton", "cuda"; None takes the best for the input.

    Shapes: x [B, T, dim], or packed [total, dim] with a `Ragged` rule, or a jagged nested tensor
    [B, j, dim] -> the same. mask and rope are those of `masked_attention`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        dispatch.check_backend(backend)
        if num_heads < 1 or dim % num_heads or not takes_head_dim(dim // num_heads):
            raise ValueError(
                f"num_heads: got {num_heads} with dim {dim}, takes a divisor that leaves a head "
                "dim that is a multiple of 8 from 16 to 128"
            )
        self.num_heads = num_heads
        self.backend = backend
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(
        self, x: Tensor, mask: Rule | Tensor | None = None, rope: Rope3d | None = None
    ) -> Tensor:
        three = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in three)  # [..., T, H, d]
        dense = x.dim() == 3 and not x.is_nested
        if dense:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        out = masked_attention(q, k, v, mask=mask, rope=rope, backend=self.backend)
        return self.proj((out.transpose(1, 2) if dense else out).flatten(-2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, backend={self.backend!r}"
