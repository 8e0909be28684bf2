"""pytorch-metric-learning's VICRegLoss (KevinMusgrave/pytorch-metric-learning 2.9.0, losses/).

Left out, because the library has no fused op for it: every other loss; reducers, which take losses
of single elements, that are never made here; recorded statistics.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vicreg_kernels.compat import shared
from vicreg_kernels.vicreg import vicreg_loss

__all__ = ["VICRegLoss"]

# Where pytorch-metric-learning defines each name.
HOMES = {"VICRegLoss": "pytorch_metric_learning.losses.vicreg_loss"}

# Of the base class's arguments, those that change what is computed.
_REFUSED = (
    "distance",
    "embedding_regularizer",
    "embedding_reg_weight",
    "reducer",
    "collect_stats",
)


class VICRegLoss(nn.Module):
    """`vicreg_kernels.vicreg_loss` with pytorch-metric-learning's arguments.

    Args:
        invariance_lambda, variance_mu, covariance_v: weights of invariance, variance and
            covariance.
        eps: added to the variance under the root.
        reducer, collect_stats: None, the base class's defaults; anything else is a ValueError, as
            are a distance and an embedding_regularizer there.

    Shapes: embeddings, ref_emb: [N, D], N >= 2 -> scalar of their dtype, under autocast too, as
    there. Without ref_emb both views are the embeddings.

    Raises: ValueError for labels or an indices_tuple, as there; ValueError and TypeError for the
        rest, naming the argument.
    """

    def __init__(
        self,
        invariance_lambda: float = 25,
        variance_mu: float = 25,
        covariance_v: float = 1,
        eps: float = 1e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        for name, value in kwargs.items():
            if name not in _REFUSED:
                raise TypeError(f"{name}: VICRegLoss has no such argument")
            if value is not None or name in ("distance", "embedding_regularizer"):
                raise ValueError(f"{name}: got {value!r}, VICRegLoss takes none")
        self.invariance_lambda = invariance_lambda
        self.variance_mu = variance_mu
        self.covariance_v = covariance_v
        self.eps = eps

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Tensor:
        for name, value in (
            ("labels", labels),
            ("indices_tuple", indices_tuple),
            ("ref_labels", ref_labels),
        ):
            if value is not None:
                raise ValueError(f"{name}: got {type(value).__name__}, takes None")
        with shared.renamed(
            x="embeddings",
            y="ref_emb",
            invariance_weight="invariance_lambda",
            variance_weight="variance_mu",
            covariance_weight="covariance_v",
        ):
            loss = vicreg_loss(
                embeddings,
                embeddings if ref_emb is None else ref_emb,
                invariance_weight=self.invariance_lambda,
                variance_weight=self.variance_mu,
                covariance_weight=self.covariance_v,
                eps=self.eps,
                convention="pytorch_metric_learning",
            )
        return loss.to(embeddings.dtype)
