"""jepa-science's SIGReg (jepa-science 0.1.0, import name `jepa_science`).

Left out, because the library has no fused op for it: reduction="none", the statistics of single
slices, which are never made here; `epps_pulley_quadrature`, which only makes tables.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vicreg_kernels import sigreg
from vicreg_kernels.compat import shared

__all__ = ["SIGReg", "sigreg_loss"]

# Where jepa-science defines each name.
HOMES = dict.fromkeys(__all__, "jepa_science.sigreg")


def _check(n_knots: int, t_max: float, reduction: str) -> None:
    if n_knots < 2 or n_knots % 2 == 0:
        raise ValueError(f"n_knots: got {n_knots}, takes an odd number, at least 3")
    if t_max <= 0:
        raise ValueError(f"t_max: got {t_max}, takes a number > 0")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: got {reduction!r}, takes 'mean' or 'sum'")


def sigreg_loss(
    embeddings: Tensor,
    num_slices: int = 1024,
    n_knots: int = 17,
    t_max: float = 3.0,
    *,
    reduction: str = "mean",
    generator: torch.Generator | None = None,
) -> Tensor:
    """`vicreg_kernels.sigreg_loss` with jepa-science's arguments and directions.

    Args:
        embeddings: [..., N, D], N >= 2.
        num_slices: number of random directions.
        n_knots, t_max: an odd number of equally spaced knots on [0, t_max].
        reduction: over directions, "mean" or "sum".
        generator: draws the directions; None takes torch's own, as jepa-science does.

    Returns: the loss of each leading index, [...], of the embeddings' dtype (float32 under
        autocast).

    Raises: ValueError and TypeError naming the argument.
    """
    _check(n_knots, t_max, reduction)
    if embeddings.dim() < 2:
        raise ValueError(f"embeddings: got shape {tuple(embeddings.shape)}, takes [..., N, D]")
    leading, (rows, dim) = embeddings.shape[:-2], embeddings.shape[-2:]
    directions = shared.unit_columns(
        dim, num_slices, embeddings.device, embeddings.dtype, generator
    )
    with shared.renamed(z="embeddings"):
        losses = [
            sigreg.sigreg_loss(z, knots=n_knots, t_max=t_max, directions=directions)
            for z in embeddings.reshape(-1, rows, dim)
        ]
    loss = torch.stack(losses).reshape(leading)
    return shared.rounded(loss * (num_slices if reduction == "sum" else 1), embeddings)


class SIGReg(nn.Module):
    """`sigreg_loss` of this file as a module, with jepa-science's state.

    Args: as in `sigreg_loss`.
    """

    def __init__(
        self,
        num_slices: int = 1024,
        n_knots: int = 17,
        t_max: float = 3.0,
        *,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check(n_knots, t_max, reduction)
        self.num_slices = num_slices
        self.n_knots = n_knots
        self.t_max = t_max
        self.reduction = reduction
        shared.register_quadrature(self, n_knots, t_max)
        del self.phi  # jepa-science keeps the other two

    def forward(self, embeddings: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        return sigreg_loss(
            embeddings,
            self.num_slices,
            self.n_knots,
            self.t_max,
            reduction=self.reduction,
            generator=generator,
        )
