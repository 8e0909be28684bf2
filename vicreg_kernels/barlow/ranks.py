"""The loss of the batch that all ranks of a group hold together."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def loss(
    x: Tensor,
    y: Tensor,
    eps: float,
    std_eps: float,
    unbiased: bool,
    lambd: float,
    backend: str | None,
    convention: str,
    group: Any,
) -> Tensor:
    """sum_i (C_ii - 1)^2 + lambd sum_{i != j} C_ij^2 over the rows of all ranks; 0-d.

    Called by `op.barlow_twins_loss` where `process_group` resolves to `group`, after its own
    checks (`op.check_views`): x, y: its rows, [N, D] of one dtype and device, N >= 1, D >= 1. That
    the ranks agree (`distributed.agree`) and hold two rows together is checked here. eps, std_eps,
    unbiased, lambd: the convention's numbers, as the library-level ops take them; `convention` is
    its name, for the agreement, and its scale is the caller's. backend: as the user named it.

    The value is the same on every rank; the gradient is as vicreg_kernels/distributed.py says.
    """
    raise NotImplementedError("process_group: not available for Barlow Twins yet")
