"""Matrix products of a rank's share in plain torch, with float32 results of half operands."""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, of float32 or half operands; [G, ., .] each."""
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    if a.is_cuda:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())


def add_product(out: Tensor, square: Tensor, z: Tensor) -> None:
    """out += square @ z, [G, ., .] each; float32 but for z, whose dtype the product has."""
    if z.dtype == torch.float32:
        out.baddbmm_(square, z)
        return
    # Rounded to half, each row scaled by a power of two: float16 neither over- nor underflows.
    power = torch.frexp(square.abs().amax(dim=-1, keepdim=True)).exponent
    out.add_(torch.ldexp(product(torch.ldexp(square, -power).to(z.dtype), z), power))
