"""The nn.Module that users drop in."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from vicreg_kernels.tokens.checks import Offsets
from vicreg_kernels.tokens.loss import Masks, check_settings, prediction_loss


class PredictionLoss(nn.Module):
    """`prediction_loss` as a module.

    Args:
        kind, normalize_target, beta, eps, reduction, backend: as in `prediction_loss`. The defaults
            are I-JEPA's; kind="l1" is V-JEPA's.

    Shapes: pred [B, K, D] (or the other forms), teacher [B, T, D], index [B, K] -> scalar.
    """

    def __init__(
        self,
        kind: str = "smooth_l1",
        *,
        normalize_target: bool = True,
        beta: float = 1.0,
        eps: float = 1e-5,
        reduction: str = "masks",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_settings(kind=kind, beta=beta, eps=eps, reduction=reduction, backend=backend)
        self.kind = kind
        self.normalize_target = normalize_target
        self.beta = beta
        self.eps = eps
        self.reduction = reduction
        self.backend = backend

    def forward(
        self,
        pred: Masks,
        teacher: Tensor,
        index: Masks,
        offsets: Offsets | Sequence[Offsets] | None = None,
    ) -> Tensor:
        return prediction_loss(
            pred,
            teacher,
            index,
            kind=self.kind,
            normalize_target=self.normalize_target,
            beta=self.beta,
            eps=self.eps,
            offsets=offsets,
            reduction=self.reduction,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"kind={self.kind!r}, normalize_target={self.normalize_target}, beta={self.beta}, "
            f"eps={self.eps}, reduction={self.reduction!r}"
        )
