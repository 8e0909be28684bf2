"""The nn.Modules that users drop in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_kernels import distributed
from vicreg_kernels.core import library, reals
from vicreg_kernels.sigreg.api import sigreg_loss
from vicreg_kernels.sigreg.checks import check_settings, check_z
from vicreg_kernels.sigreg.ranks import OP

WEIGHTINGS = ("convex", "sum")


class SIGRegLoss(nn.Module):
    """`sigreg_loss` as a module that counts its own steps.

    Every forward in training mode draws the directions of the next step; in evaluation mode the
    count does not change. The count is the buffer `step` (0-d int64), which is saved with the
    module. It is incremented on the device, so that a replayed CUDA graph draws new directions.
    Activation checkpointing calls forward twice; pass `step` there.

    Args:
        slices, knots, t_max, convention, seed, process_group, backend: as in `sigreg_loss`.

    Shapes: z: [N, D] or [G, N, D] -> scalar.
    """

    step: Tensor

    def __init__(
        self,
        slices: int | None = None,
        *,
        knots: int | Sequence[float] | None = None,
        t_max: float | None = None,
        convention: str = "lejepa",
        seed: int = 0,
        process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(
            slices=slices,
            knots=knots,
            t_max=t_max,
            convention=convention,
            seed=seed,
            backend=backend,
        )
        self.slices = slices
        self.knots = knots
        self.t_max = t_max
        self.convention = convention
        self.seed = seed
        self.process_group = process_group
        self.backend = backend
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, step: int | Tensor | None = None) -> Tensor:
        """step: used in place of the count, which then does not change."""
        counted = step is None
        if counted:
            if isinstance(z, Tensor) and self.step.device != z.device:
                self.step = self.step.to(z.device)
            step = self.step
        loss = sigreg_loss(
            z,
            slices=self.slices,
            knots=self.knots,
            t_max=self.t_max,
            convention=self.convention,
            step=step,
            seed=self.seed,
            process_group=self.process_group,
            backend=self.backend,
        )
        if counted and self.training:
            self.step.add_(1)
        return loss

    def extra_repr(self) -> str:
        return (
            f"convention={self.convention!r}, slices={self.slices}, knots={self.knots}, "
            f"t_max={self.t_max}, seed={self.seed}"
        )


class LeJEPALoss(nn.Module):
    """Invariance of views and SIGReg (LeJEPA, arXiv:2511.08544), or prediction and SIGReg (LeWM).

    With c the mean over the global views, invariance = mean((c - z)^2); of a prediction, mean(
    (predicted - target)^2). The loss is

        weighting="convex"   (1 - weight) invariance + weight sigreg    lejepa 0.02, lightly 0.05
        weighting="sum"      invariance + weight sigreg    stable-pretraining 0.02, LeWM 0.09

    Args:
        weight: the weight of SIGReg, at most 1 with "convex".
        weighting: "convex" or "sum".
        The others: as in `SIGRegLoss`. With a process_group the invariance too is that of all
        ranks' rows.
    """

    def __init__(
        self,
        weight: float = 0.02,
        *,
        weighting: str = "convex",
        slices: int | None = None,
        knots: int | Sequence[float] | None = None,
        t_max: float | None = None,
        convention: str = "lejepa",
        seed: int = 0,
        process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: got {weighting!r}, takes one of {WEIGHTINGS}")
        most = 1.0 if weighting == "convex" else float("inf")
        if not isinstance(weight, Tensor):
            weight = reals.real("weight", weight, "a number or a tensor")
        if not 0.0 <= weight <= most or weight == float("inf"):
            raise ValueError(f"weight: got {weight}, takes a finite number from 0 to {most}")
        self.weight = weight
        self.weighting = weighting
        self.sigreg = SIGRegLoss(
            slices,
            knots=knots,
            t_max=t_max,
            convention=convention,
            seed=seed,
            process_group=process_group,
            backend=backend,
        )

    def forward(
        self,
        z: Tensor,
        global_views: int | None = None,
        *,
        predicted: Tensor | None = None,
        target: Tensor | None = None,
        step: int | Tensor | None = None,
    ) -> Tensor:
        """z: views [V, N, D], the global ones first; global_views: how many, None for all.

        predicted, target: of one shape; their squared distance then takes the invariance's place,
        and z is what SIGReg sees: [N, D], or time steps [T, B, D]. Neither is detached.
        """
        process_group = self.sigreg.process_group
        group = None if process_group is None else distributed.group_name(process_group)
        difference = distributed.check_on_all_ranks(
            OP, group, _difference, z, global_views, predicted, target
        )
        regularizer = self.sigreg(z, step)
        with library.no_autocast(z.device):
            wide = difference.to(torch.promote_types(difference.dtype, torch.float32))
            square = wide.square()
            if group is None:
                invariance = square.mean()
            else:
                invariance = distributed.mean_over_ranks(OP, square, group)
        share = 1.0 - self.weight if self.weighting == "convex" else 1.0
        return share * invariance + self.weight * regularizer

    def extra_repr(self) -> str:
        return f"weight={self.weight}, weighting={self.weighting!r}"


def _difference(
    z: Tensor, global_views: int | None, predicted: Tensor | None, target: Tensor | None
) -> Tensor:
    """What the invariance squares."""
    check_z(z, least_rows=1)
    if predicted is not None or target is not None:
        for name, value in (("predicted", predicted), ("target", target)):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}: got {type(value).__name__}, takes a torch.Tensor")
        assert predicted is not None
        assert target is not None
        if global_views is not None:
            raise ValueError(f"global_views: got {global_views} with a prediction, takes None")
        if predicted.shape != target.shape or predicted.numel() == 0:
            raise ValueError(
                f"target: got shape {tuple(target.shape)}, takes predicted's shape "
                f"{tuple(predicted.shape)}, not empty"
            )
        return predicted - target
    if z.dim() != 3:
        raise ValueError(f"z: got shape {tuple(z.shape)}, takes views [V, N, D]")
    views = z.shape[0] if global_views is None else global_views
    if not 1 <= views <= z.shape[0]:
        raise ValueError(f"global_views: got {views}, takes 1 to {z.shape[0]} or None")
    return z[:views].mean(dim=0) - z
