"""The nn.Module that users drop in."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vicreg_kernels.barlow.api import barlow_twins_loss
from vicreg_kernels.barlow.checks import check_settings
from vicreg_kernels.core import checks as shared


class BarlowTwinsLoss(nn.Module):
    """`barlow_twins_loss` as a module.

    Args:
        lambd: weight of the off-diagonal sum; None takes the convention's own.
        convention: which published implementation to reproduce; see `barlow_twins_loss`.
        eps: None takes the convention's own.
        precision, process_group: as in `barlow_twins_loss`.
        backend: "reference", "cpu", "triton", "cuda"; None takes the best for the input.

    Shapes: x, y: [N, D] -> scalar. The projections are standardised here: no BatchNorm before it.
    """

    def __init__(
        self,
        lambd: float | None = None,
        *,
        convention: str = "barlow_twins",
        eps: float | None = None,
        process_group: Any = None,
        precision: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(lambd=lambd, convention=convention, eps=eps, backend=backend)
        shared.precision(precision, process_group)
        self.lambd = lambd
        self.convention = convention
        self.eps = eps
        self.process_group = process_group
        self.precision = precision
        self.backend = backend

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return barlow_twins_loss(
            x,
            y,
            lambd=self.lambd,
            convention=self.convention,
            eps=self.eps,
            process_group=self.process_group,
            precision=self.precision,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"lambd={self.lambd}, convention={self.convention!r}"
