"""Views that more than one test file of the Barlow Twins op draws."""

from __future__ import annotations

import torch
from torch import Tensor

# ([N, D], what y has of x, lambd, the error of the gradient that is allowed, in eps of the dtype):
# where the rounded Gram matrix counts, and the rounded views of either side, which cost 1.2 and
# more.
AGREEING = [((24, 512), 30.0, 0.0051, 0.8), ((12, 60), 3.0, 0.0, 0.6), ((60, 12), 3.0, 0.0, 0.6)]


def rounded_alike(dtype: torch.dtype) -> tuple[Tensor, float]:
    """(z, eps), z [32, 33] of +-1: 31 orthogonal centred columns, two of them twice, so that
    sum_j C_jj^2 is 8 times sum_{i != j} C_ij^2; with eps, every standardised value lies 0.4 ulp
    below 1, to which it rounds.
    """
    z = torch.ones(1, 1)
    for _ in range(5):
        z = torch.cat([torch.cat([z, z], dim=1), torch.cat([z, -z], dim=1)])
    value = 1.0 - 0.2 * torch.finfo(dtype).eps
    return torch.cat([z[:, 1:], z[:, 1:3]], dim=1).to(dtype), 1.0 / value**2 - 1.0
