"""The nn.Modules that users drop in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vicreg_kernels.core import checks as shared
from vicreg_kernels.vicreg.api import variance_covariance, vicreg_loss
from vicreg_kernels.vicreg.checks import check_settings
from vicreg_kernels.vicreg.views import loss_of_views


class VICRegLoss(nn.Module):
    """`vicreg_loss` as a module.

    Args:
        invariance_weight, variance_weight, covariance_weight: weights of the three terms; None
            takes the convention's own. A torch.nn.Parameter is learned with the module.
        margin: target standard deviation of each dimension.
        eps: added to the variance under the square root.
        convention: which published implementation's scaling; see `vicreg_loss`.
        backend: "reference", "cpu", "triton", "cuda"; None takes the best for the input.
        precision: None or "tf32x3"; see `vicreg_loss`.
        process_group: None, True or a ProcessGroup whose ranks hold the batch; see `vicreg_loss`.
            A module that is copied or pickled takes True.

    Shapes: x, y: [N, D] (or [B, ..., D] for the conventions that take it) -> scalar. In place of x
    and y, a list or tuple of two or more views of that shape: the invariance is then the mean over
    pairs of views, variance and covariance are those of a mean view (docs/vicreg.md).
    """

    def __init__(
        self,
        invariance_weight: float | Tensor | None = None,
        variance_weight: float | Tensor | None = None,
        covariance_weight: float | Tensor | None = None,
        *,
        margin: float = 1.0,
        eps: float = 1e-4,
        convention: str = "vicreg",
        precision: str | None = None,
        backend: str | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_settings(margin=margin, eps=eps, convention=convention, backend=backend)
        shared.precision(precision, process_group)
        self.invariance_weight = invariance_weight
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.margin = margin
        self.eps = eps
        self.convention = convention
        self.precision = precision
        self.backend = backend
        self.process_group = process_group

    def forward(self, x: Tensor | Sequence[Tensor], y: Tensor | None = None) -> Tensor:
        if isinstance(x, (list, tuple)):
            return self._of_views(x, y)
        return vicreg_loss(
            x,
            y,
            invariance_weight=self.invariance_weight,
            variance_weight=self.variance_weight,
            covariance_weight=self.covariance_weight,
            **self._settings(),
        )

    def _settings(self) -> dict[str, Any]:
        return {
            "margin": self.margin,
            "eps": self.eps,
            "convention": self.convention,
            "precision": self.precision,
            "backend": self.backend,
            "process_group": self.process_group,
        }

    def _of_views(self, views: Sequence[Tensor], y: Tensor | None) -> Tensor:
        if y is not None:
            raise TypeError(f"y: got {type(y).__name__} with a {type(views).__name__}, takes None")
        if len(views) == 2:
            return self.forward(*views)
        return loss_of_views(
            views,
            (self.invariance_weight, self.variance_weight, self.covariance_weight),
            **self._settings(),
        )

    def extra_repr(self) -> str:
        return f"convention={self.convention!r}, margin={self.margin}, eps={self.eps}"


class VCRegLoss(nn.Module):
    """The variance and covariance terms of one set of embeddings (VCReg), as a module.

    Args:
        variance_weight, covariance_weight: weights of the two terms.
        margin, eps, unbiased, covariance_normalizer, precision, backend, process_group: as in
            `variance_covariance`.

    Shapes: z: [N, D] or grouped [G, N, D] -> scalar.
    """

    def __init__(
        self,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        *,
        margin: float = 1.0,
        eps: float = 1e-4,
        unbiased: bool = True,
        covariance_normalizer: str = "d",
        precision: str | None = None,
        backend: str | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        check_settings(
            margin=margin, eps=eps, covariance_normalizer=covariance_normalizer, backend=backend
        )
        shared.precision(precision, process_group)
        self.variance_weight = variance_weight
        self.covariance_weight = covariance_weight
        self.margin = margin
        self.eps = eps
        self.unbiased = unbiased
        self.covariance_normalizer = covariance_normalizer
        self.precision = precision
        self.backend = backend
        self.process_group = process_group

    def forward(self, z: Tensor) -> Tensor:
        variance, covariance = variance_covariance(
            z,
            margin=self.margin,
            eps=self.eps,
            unbiased=self.unbiased,
            covariance_normalizer=self.covariance_normalizer,
            precision=self.precision,
            backend=self.backend,
            process_group=self.process_group,
        )
        return self.variance_weight * variance + self.covariance_weight * covariance

    def extra_repr(self) -> str:
        return (
            f"variance_weight={self.variance_weight}, covariance_weight={self.covariance_weight}, "
            f"margin={self.margin}, normalizer={self.covariance_normalizer!r}"
        )
