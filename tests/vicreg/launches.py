"""What the interpreter's tests of VICReg's Triton kernels share: inputs, launch settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.helpers.shapes import randn
from tests.helpers.tolerances import differentiate
from vicreg_kernels import vicreg_terms

TERMS = (1.0, 0.7, -1.3, 0.4)  # cotangents of (loss, invariance, variance, covariance)
FLOATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def views(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    x, y = randn(rows, dim), randn(rows, dim)
    return [z.to(dtype).requires_grad_() for z in (x, 0.7 * y + 0.3 * x + 2.0)]


def reconfiguring(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """f(field=...) changes the launch configuration, for every shape and format."""
    from vicreg_kernels.vicreg.triton import configs

    shipped = configs.nearest

    def change(**fields: Any) -> None:
        changed = lambda *key: dataclasses.replace(shipped(*key), **fields)  # noqa: E731
        monkeypatch.setattr(configs, "nearest", changed)

    return change


def assert_alike_where_not_finite(inputs: list[torch.Tensor], *, nan: bool) -> None:
    """Values and gradients of "triton" are finite where the reference's are; with `nan`, NaN where
    those are.
    """
    runs = [
        differentiate(lambda x, y, b=b: vicreg_terms(x, y, backend=b), *inputs)
        for b in ("triton", "reference")
    ]
    for got, want in zip(*(r.values + r.gradients for r in runs), strict=True):
        assert torch.equal(got.isfinite(), want.isfinite())
        if nan:
            assert torch.equal(got.isnan(), want.isnan())
