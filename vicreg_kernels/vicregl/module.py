"""The nn.Module that users drop in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vicreg_kernels.vicregl import checks
from vicreg_kernels.vicregl.api import vicregl_loss


class VICRegLLoss(nn.Module):
    """`vicregl_loss` as a module.

    Args:
        alpha, num_matches, l2_all_matches, fast_vc_reg, covariance, match_order,
        invariance_weight, variance_weight, covariance_weight, margin, eps, process_group,
        backend: as in `vicregl_loss`. The defaults are those of facebookresearch/VICRegL.

    Shapes: embeddings [B, D], maps [B, H, W, C] (or [B, L, C]) and grids [B, H, W, 2] (or
    [B, L, 2]), a sequence of one each a view, the two large views first -> scalar.
    """

    def __init__(
        self,
        alpha: float = 0.75,
        num_matches: Sequence[int | None] = (20, 4),
        *,
        l2_all_matches: bool = True,
        fast_vc_reg: bool = False,
        covariance: str = "all_views",
        match_order: str = "position",
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        covariance_weight: float = 1.0,
        margin: float = 1.0,
        eps: float = 1e-4,
        process_group: Any = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.settings: dict[str, Any] = {
            "alpha": alpha,
            "num_matches": num_matches,
            "l2_all_matches": l2_all_matches,
            "fast_vc_reg": fast_vc_reg,
            "covariance": covariance,
            "match_order": match_order,
            "invariance_weight": invariance_weight,
            "variance_weight": variance_weight,
            "covariance_weight": covariance_weight,
            "margin": margin,
            "eps": eps,
            "backend": backend,
        }
        checks.settings(**self.settings)
        self.process_group = process_group

    def forward(
        self,
        embeddings: Sequence[Tensor] | None,
        maps: Sequence[Tensor] | None,
        grids: Sequence[Tensor] | None,
    ) -> Tensor:
        return vicregl_loss(
            embeddings, maps, grids, process_group=self.process_group, **self.settings
        )

    def extra_repr(self) -> str:
        named = ("alpha", "num_matches", "l2_all_matches", "fast_vc_reg")
        return ", ".join(f"{name}={self.settings[name]!r}" for name in named)
