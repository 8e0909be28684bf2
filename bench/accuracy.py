"""How far ours in a dtype is from the reference in float64, for `bench.run --accuracy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from bench.case import Case


def _results(case: Case, device: torch.device, dtype: torch.dtype, backend: str) -> list[Tensor]:
    """Of one step of ours on inputs drawn anew: a case draws the same ones from the same seed."""
    torch.manual_seed(0)
    returned: Any = case.build(device, dtype, backend).steps["ours"]()
    tensors = [leaf for leaf in _pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
    return [tensor.detach().double().cpu() for tensor in tensors]


def distance(got: list[Tensor], exact: list[Tensor]) -> float:
    """The largest difference over the largest magnitude, of the result where that is largest.

    Raises ValueError where there are no results, or those of the two differ in shape.
    """
    if not exact or [x.shape for x in got] != [x.shape for x in exact]:
        raise ValueError("the step returns no results that can be compared")
    return max(
        ((a - b).abs().max() / b.abs().max().clamp_min(1e-300)).item()
        for a, b in zip(got, exact, strict=True)
    )


def error(case: Case, backend: str, device: torch.device, dtype: str) -> float:
    """Of `backend` in dtype against `reference` in float64. A case draws its inputs in float32, so
    in a half type their rounding to it is part of the error.
    """
    got = _results(case, device, getattr(torch, dtype), backend)
    return distance(got, _results(case, device, torch.float64, "reference"))
