"""lightly's losses and momentum update (lightly-ai/lightly 1.6.0, loss/ and models/utils.py).

Left out, because the library has no fused op for it: everything else of lightly.loss; the parts
`invariance_loss`, `variance_loss`, `covariance_loss` and `lejepa_invariance_loss`; `LeWMLoss`,
whose SIGReg is this one after `vicreg_kernels.patch("lightly")`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.compat import shared
from vicreg_kernels.ema import ema_update_
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.vicreg import vicreg_loss
from vicreg_kernels.vicregl import vicregl_loss

__all__ = [
    "BarlowTwinsLoss",
    "LeJEPALoss",
    "SIGReg",
    "VICRegLLoss",
    "VICRegLoss",
    "update_momentum",
]

# Where lightly defines each name.
HOMES = {
    "BarlowTwinsLoss": "lightly.loss.barlow_twins_loss",
    "LeJEPALoss": "lightly.loss.lejepa_loss",
    "SIGReg": "lightly.loss.lejepa_loss",
    "VICRegLLoss": "lightly.loss.vicregl_loss",
    "VICRegLoss": "lightly.loss.vicreg_loss",
    "update_momentum": "lightly.models.utils",
}


def _check_gather(gather_distributed: bool) -> None:
    if gather_distributed and not dist.is_available():
        raise ValueError(
            "gather_distributed: got True, but this torch is built without torch.distributed"
        )


def _check_pair(z_a: Tensor, z_b: Tensor) -> None:
    """lightly's own assertions; the op checks the rest."""
    if not isinstance(z_a, Tensor) or not isinstance(z_b, Tensor):
        return
    for name, z in (("z_a", z_a), ("z_b", z_b)):
        if z.dim() > 0 and z.shape[0] < 2:
            raise AssertionError(f"{name}: got {z.shape[0]} rows, takes at least 2")
    if z_a.shape != z_b.shape:
        raise AssertionError(
            f"z_b: got shape {tuple(z_b.shape)}, takes z_a's shape {tuple(z_a.shape)}"
        )


class _VICRegWeights(nn.Module):
    """The settings that lightly's VICReg and VICRegL share."""

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        gather_distributed: bool = False,
        eps: float = 0.0001,
    ) -> None:
        super().__init__()
        _check_gather(gather_distributed)
        self.lambda_param = lambda_param
        self.mu_param = mu_param
        self.nu_param = nu_param
        self.gather_distributed = gather_distributed
        self.eps = eps


class VICRegLoss(_VICRegWeights):
    """`vicreg_kernels.vicreg_loss` with lightly's arguments.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        gather_distributed: take the batch of all ranks, where torch.distributed runs.
        eps: added to the variance under the root.

    Shapes: z_a, z_b: [B, ..., D], B >= 2 -> scalar of their dtype (float32 under autocast).

    Raises: AssertionError for fewer than two rows or two shapes, as lightly's does; ValueError and
        TypeError for the rest, naming the argument.
    """

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        group = shared.ranks(self.gather_distributed)
        shared.checked("vicreg", group, _check_pair, z_a, z_b)
        with shared.renamed(
            x="z_a",
            y="z_b",
            invariance_weight="lambda_param",
            variance_weight="mu_param",
            covariance_weight="nu_param",
        ):
            loss = vicreg_loss(
                z_a,
                z_b,
                invariance_weight=self.lambda_param,
                variance_weight=self.mu_param,
                covariance_weight=self.nu_param,
                eps=self.eps,
                convention="lightly",
                process_group=group,
            )
        return shared.rounded(loss, z_a)


class VICRegLLoss(_VICRegWeights):
    """`vicreg_kernels.vicregl_loss` with lightly's arguments, two global views and any number of
    local ones.

    Args:
        lambda_param, mu_param, nu_param: weights of invariance, variance and covariance.
        alpha: the share of the global features' loss.
        gather_distributed: take the batch of all ranks, where torch.distributed runs.
        eps: added to the variance under the root.
        num_matches: how many closest matches are kept, from the first map to the second and back.

    Shapes: a (global features [B, D], local features [B, H, W, C]) pair and a grid [B, H, W, 2] a
    view -> [1], of the features' dtype (float32 under autocast).

    Raises: ValueError for lists of two lengths, one of the two lists alone, or another number of
        global views than two; ValueError and TypeError for the rest, naming the argument.
    """

    def __init__(
        self,
        lambda_param: float = 25.0,
        mu_param: float = 25.0,
        nu_param: float = 1.0,
        alpha: float = 0.75,
        gather_distributed: bool = False,
        eps: float = 0.0001,
        num_matches: tuple[int, int] = (20, 4),
    ) -> None:
        super().__init__(lambda_param, mu_param, nu_param, gather_distributed, eps)
        self.alpha = alpha
        self.num_matches = num_matches

    def forward(
        self,
        global_view_features: Sequence[tuple[Tensor, Tensor]],
        global_view_grids: Sequence[Tensor],
        local_view_features: Sequence[tuple[Tensor, Tensor]] | None = None,
        local_view_grids: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if (local_view_features is None) != (local_view_grids is None):
            name = "local_view_features" if local_view_features is None else "local_view_grids"
            raise ValueError(f"{name}: got None, takes a sequence as its companion, or both None")
        local_features, local_grids = local_view_features or (), local_view_grids or ()
        for name, views, expected in (
            ("global_view_features", global_view_features, 2),
            ("global_view_grids", global_view_grids, 2),
            ("local_view_grids", local_grids, len(local_features)),
        ):
            if len(views) != expected:
                raise ValueError(f"{name}: got {len(views)} views, takes {expected}")
        features, grids = (
            [*global_view_features, *local_features],
            [*global_view_grids, *local_grids],
        )
        with shared.renamed(
            invariance_weight="lambda_param",
            variance_weight="mu_param",
            covariance_weight="nu_param",
        ):
            loss = vicregl_loss(
                [vector for vector, _ in features],
                [places for _, places in features],
                grids,
                alpha=self.alpha,
                num_matches=self.num_matches,
                l2_all_matches=False,
                match_order="distance",
                invariance_weight=self.lambda_param,
                variance_weight=self.mu_param,
                covariance_weight=self.nu_param,
                eps=self.eps,
                process_group=shared.ranks(self.gather_distributed),
            )
        return shared.rounded(loss, features[0][0]).reshape(1)


class BarlowTwinsLoss(nn.Module):
    """`vicreg_kernels.barlow_twins_loss` with lightly's arguments.

    Args:
        lambda_param: weight of the off-diagonal sum.
        gather_distributed: take the batch of all ranks, where torch.distributed runs.

    Shapes: z_a, z_b: [N, D], N >= 2 -> scalar of their dtype (float32 under autocast).
    """

    def __init__(self, lambda_param: float = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        _check_gather(gather_distributed)
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        with shared.renamed(x="z_a", y="z_b", lambd="lambda_param"):
            loss = barlow_twins_loss(
                z_a,
                z_b,
                lambd=self.lambda_param,
                convention="lightly",
                process_group=shared.ranks(self.gather_distributed),
            )
        return shared.rounded(loss, z_a)


class SIGReg(nn.Module):
    """`vicreg_kernels.sigreg_loss` with lightly's arguments, directions and state.

    The directions are drawn from torch's generator, as lightly draws them: the same seed gives the
    same loss.

    Args:
        knots, t_max: equally spaced knots on [0, t_max].
        num_vectors: number of random directions.
        gather_distributed: take the batch of all ranks, where torch.distributed runs.

    Shapes: proj: [..., N, C], N >= 2 -> scalar, float32 (float64 for float64).
    """

    def __init__(
        self,
        *,
        knots: int = 17,
        t_max: float = 3.0,
        num_vectors: int = 1024,
        gather_distributed: bool = False,
    ) -> None:
        super().__init__()
        for name, value, least in (("knots", knots, 2), ("num_vectors", num_vectors, 1)):
            if value < least:
                raise ValueError(f"{name}: got {value}, takes at least {least}")
        if t_max <= 0:
            raise ValueError(f"t_max: got {t_max}, takes a number > 0")
        _check_gather(gather_distributed)
        self.knots = knots
        self.t_max = t_max
        self.num_vectors = num_vectors
        self.gather_distributed = gather_distributed
        shared.register_quadrature(self, knots, t_max)

    def _generate_unit_vectors(
        self, device: torch.device, dtype: torch.dtype, num_features: int
    ) -> Tensor:
        """Rank 0's directions on every rank."""
        directions = shared.unit_columns(num_features, self.num_vectors, device, dtype)
        if shared.ranks(self.gather_distributed):
            dist.broadcast(directions, src=0)
        return directions

    def forward(self, proj: Tensor) -> Tensor:
        with shared.renamed(z="proj"):
            z = shared.grouped(proj)
            return sigreg_loss(
                z,
                knots=self.knots,
                t_max=self.t_max,
                convention="lightly",
                directions=self._generate_unit_vectors(z.device, z.dtype, z.shape[-1]),
                process_group=shared.ranks(self.gather_distributed),
            )


class LeJEPALoss(nn.Module):
    """lightly's convex sum of SIGReg and the distance from the mean global view.

    Args:
        lambda_param: weight of SIGReg, 0 to 1; the invariance has 1 - lambda_param.
        gather_distributed, sigreg_knots, sigreg_t_max, sigreg_num_vectors: as in `SIGReg`. The
            invariance is that of this rank's rows.

    Shapes: local_proj [V, N, D], global_proj [W, N, D] -> scalar, float32 (float64 for float64).
    """

    def __init__(
        self,
        lambda_param: float = 0.05,
        gather_distributed: bool = False,
        sigreg_knots: int = 17,
        sigreg_t_max: float = 3.0,
        sigreg_num_vectors: int = 1024,
    ) -> None:
        super().__init__()
        if not 0.0 <= lambda_param <= 1.0:
            raise ValueError(f"lambda_param: got {lambda_param}, takes a number from 0 to 1")
        self.lambda_param = lambda_param
        self.sigreg = SIGReg(
            knots=sigreg_knots,
            t_max=sigreg_t_max,
            num_vectors=sigreg_num_vectors,
            gather_distributed=gather_distributed,
        )

    def forward(self, *, local_proj: Tensor, global_proj: Tensor) -> Tensor:
        for name, views in (("local_proj", local_proj), ("global_proj", global_proj)):
            if views.dim() != 3 or views.shape[0] < 1:
                raise ValueError(f"{name}: got shape {tuple(views.shape)}, takes [V, N, D]")
        if local_proj.shape[1:] != global_proj.shape[1:]:
            raise ValueError(
                f"local_proj: got shape {tuple(local_proj.shape)}, takes the N and D of "
                f"global_proj, {tuple(global_proj.shape)}"
            )
        views = torch.cat((global_proj, local_proj))
        invariance = shared.mean_square(global_proj.mean(dim=0) - views)
        return self.lambda_param * self.sigreg(views) + (1.0 - self.lambda_param) * invariance


@torch.no_grad()
def update_momentum(model: nn.Module, model_ema: nn.Module, m: float) -> None:
    """model_ema's parameters <- m model_ema + (1 - m) model, in one pass (`ema_update_`).

    Args:
        model, model_ema: modules of the same parameters; buffers are left alone.
        m: in [0, 1].

    Raises: ValueError and TypeError naming the argument; no parameter has changed then.
    """
    with shared.renamed(targets="model_ema", onlines="model", momentum="m"):
        ema_update_(list(model_ema.parameters()), list(model.parameters()), m)
