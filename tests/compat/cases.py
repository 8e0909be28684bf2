"""What the drop-in losses are called with, and what each library computes, restated from its
definition: the conventions' tests have the formulas of VICReg, Barlow Twins and SIGReg.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from bench.peers import Get
from tests.barlow import test_peers as barlow
from tests.sigreg import test_peers as sigreg
from tests.vicreg import test_conventions as vicreg

# Relative error of the value and of each gradient in float64. SIGReg's peers have float32 knots.
SAME, SIGREG = 1e-12, 2e-6


@dataclass(frozen=True)
class Case:
    """peer: whose names. make(get) -> the loss of the inputs, made of what `get` gives for a name:
    a tensor, or several in a dict or tuple. restated: the same of the published definition.
    shapes: of the inputs. double, half: whether the peer takes such inputs on a CPU. rounds:
    whether all that half inputs give is half; None: some of it.
    """

    peer: str
    make: Callable[[Get], Callable[..., Any]]
    restated: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...] = ((12, 7), (12, 7))
    bound: float = SAME
    double: bool = True
    half: bool = True
    rounds: bool | None = True


def tensors(outcome: Any) -> list[Tensor]:
    """The tensors of an outcome, in order; floats are values without a gradient."""
    if isinstance(outcome, Tensor):
        return [outcome]
    parts = outcome.values() if isinstance(outcome, dict) else outcome
    return [z for part in parts if not isinstance(part, float) for z in tensors(part)]


def inputs(case: Case, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Correlated inputs of which the hinge cuts some columns."""
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(max(case.shapes), generator=generator, dtype=torch.float64)
    leaves = []
    for shape in case.shapes:
        own = torch.randn(shape, generator=generator, dtype=torch.float64)
        common = base if base.shape == shape else 0.0
        scale = torch.linspace(0.4, 1.8, shape[-1], dtype=torch.float64)
        leaves.append(((0.8 * common + 0.5 * own) * scale + 0.3).to(dtype).requires_grad_())
    return leaves


def eb_jepa_terms(x: Tensor, y: Tensor, std: float, cov: float) -> list[Tensor]:
    hinge = vicreg.hinge(x).mean() + vicreg.hinge(y).mean()
    dim = x.shape[1]
    squares = vicreg.off_diagonal_squares(x) + vicreg.off_diagonal_squares(y)
    covariance = squares / (dim * (dim - 1))
    return [mse_loss(x, y) + std * hinge + cov * covariance, mse_loss(x, y), hinge, covariance]


def eb_jepa_channels(x: Tensor, std: float, cov: float) -> list[Tensor]:
    rows, dim = x.movedim(1, -1).reshape(-1, x.shape[1]), x.shape[1]
    hinge = vicreg.hinge(rows).mean()
    covariance = vicreg.off_diagonal_squares(rows) / (dim * (dim - 1))
    return [std * hinge + cov * covariance, hinge + covariance]


def pyjepa_terms(x: Tensor, y: Tensor) -> list[Tensor]:
    x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
    one = [vicreg.vicregl(x, y, weights) for weights in ((1, 0, 0), (0, 1, 0), (0, 0, 1))]
    return [25 * one[0] + 25 * one[1] + one[2], *one]


def pyjepa_one_view(x: Tensor) -> list[Tensor]:
    hinge = vicreg.hinge(x).mean()
    covariance = vicreg.off_diagonal_squares(x) / x.shape[1]
    return [25 * hinge + covariance, torch.zeros_like(hinge), hinge, covariance]


def vcreg(x: Tensor) -> Tensor:
    squares = vicreg.off_diagonal_squares(x) / x.shape[1]
    return 25 * vicreg.hinge(x).mean() / 2 + squares


def columns(dim: int, slices: int, dtype: torch.dtype, seed: int, default: bool) -> Tensor:
    """Directions of torch's default generator, or of one of their own."""
    generator = torch.default_generator if default else torch.Generator()
    generator.manual_seed(seed)
    a = torch.randn(dim, slices, dtype=dtype, generator=generator)
    return a / a.norm(dim=0)


def seeded(function: Callable[..., Any]) -> Callable[..., Any]:
    """With torch's generator in a known state."""

    def run(*inputs: Tensor) -> Any:
        torch.manual_seed(3)
        return function(*inputs)

    return run


def lejepa(x: Tensor, y: Tensor) -> Tensor:
    a, views = columns(x.shape[-1], 40, x.dtype, 3, True), torch.cat((y, x))
    distance = (views - y.mean(dim=0)).square().mean()
    return 0.05 * sigreg.half_line(views, a) + 0.95 * distance


def bcs(x: Tensor, y: Tensor) -> list[Tensor]:
    a = columns(x.shape[-1], 40, torch.float32, 0, False).double()
    statistic = (sigreg.whole_line(x, a) + sigreg.whole_line(y, a)) / 2
    return [mse_loss(x, y) + 10 * statistic, statistic, mse_loss(x, y)]


def half_line(slices: int, double: bool = True) -> Callable[[Tensor], Tensor]:
    """On directions of torch's generator, drawn in float64 or float32."""

    def run(z: Tensor) -> Tensor:
        dtype = torch.float64 if double else torch.float32
        return sigreg.half_line(z, columns(z.shape[-1], slices, dtype, 3, True).double())

    return run


def pooled(z: Tensor) -> Tensor:
    a = columns(z.shape[-1], 40, torch.float32, 0, False).double()
    return sigreg.half_line(z, a)


def summed_science(x: Tensor) -> Tensor:
    a = columns(x.shape[-1], 40, torch.float64, 9, False)
    return 40 * torch.stack([sigreg.half_line(z, a) for z in x])


def science(get: Get) -> Callable[[Tensor], Tensor]:
    module = get("SIGReg")(40, reduction="sum")
    return lambda z: module(z, generator=torch.Generator().manual_seed(9))


def lejepa_of_views(get: Get) -> Callable[..., Tensor]:
    loss = get("LeJEPALoss")(sigreg_num_vectors=40)
    return seeded(lambda x, y: loss(local_proj=x, global_proj=y))


def metric_learning(get: Get) -> Callable[..., Tensor]:
    loss = get("VICRegLoss")()
    return lambda x, y: loss(x, ref_emb=y)


ONE, VIEWS, TIMES = ((12, 7),), ((3, 12, 7), (2, 12, 7)), ((3, 12, 7),)
CASES = {
    "lightly VICRegLoss": Case("lightly", lambda get: get("VICRegLoss")(), vicreg.lightly),
    "lightly VICRegLoss, weights": Case(
        "lightly",
        lambda get: get("VICRegLoss")(3.0, mu_param=2.0, nu_param=0.5),
        lambda x, y: vicreg.lightly(x, y, (3.0, 2.0, 0.5)),
    ),
    "lightly VICRegLoss, positions": Case(
        "lightly", lambda get: get("VICRegLoss")(), vicreg.lightly, ((6, 4, 5), (6, 4, 5))
    ),
    "lightly BarlowTwinsLoss": Case(
        "lightly", lambda get: get("BarlowTwinsLoss")(0.02), lambda x, y: barlow.lightly(x, y, 0.02)
    ),
    "lightly SIGReg": Case(
        "lightly",
        lambda get: seeded(get("SIGReg")(num_vectors=40)),
        half_line(40),
        TIMES,
        SIGREG,
        rounds=False,
    ),
    "lightly LeJEPALoss": Case(
        "lightly",
        lejepa_of_views,
        lejepa,
        VIEWS,
        SIGREG,
        rounds=False,
    ),
    "solo-learn vicreg": Case("solo_learn", lambda get: get("vicreg_loss_func"), vicreg.solo_learn),
    "solo-learn vicreg, weights": Case(
        "solo_learn",
        lambda get: lambda x, y: get("vicreg_loss_func")(x, y, 3.0, cov_loss_weight=0.5),
        lambda x, y: vicreg.solo_learn(x, y, (3.0, 25.0, 0.5)),
    ),
    "solo-learn barlow": Case(
        "solo_learn",
        lambda get: get("barlow_loss_func"),
        barlow.solo_learn,
        double=False,
        half=False,
    ),
    "solo-learn barlow, scale": Case(
        "solo_learn",
        lambda get: lambda x, y: get("barlow_loss_func")(x, y, lamb=0.02, scale_loss=2.0),
        lambda x, y: 2.0 * barlow.lightly(x, y, 0.02),
        double=False,
        half=False,
    ),
    "stable-pretraining VICRegLoss": Case(
        "stable_pretraining", lambda get: get("VICRegLoss")(), vicreg.stable_pretraining
    ),
    "stable-pretraining VCRegLoss": Case(
        "stable_pretraining", lambda get: get("VCRegLoss")(), vcreg, ONE
    ),
    "stable-pretraining BarlowTwinsLoss": Case(
        "stable_pretraining",
        lambda get: get("BarlowTwinsLoss")(0.02),
        lambda x, y: barlow.stable_pretraining(x, y, 0.02),
    ),
    "stable-pretraining SlicedEppsPulley": Case(
        "stable_pretraining",
        lambda get: get("SlicedEppsPulley")(40),
        pooled,
        ONE,
        SIGREG,
        half=False,
        double=False,
        rounds=False,
    ),
    "stable-worldmodel SIGReg": Case(
        "stable_worldmodel",
        lambda get: seeded(get("SIGReg")(num_proj=40)),
        half_line(40, double=False),
        TIMES,
        SIGREG,
        half=False,
        double=False,
        rounds=False,
    ),
    "eb_jepa VICRegLoss": Case(
        "eb_jepa",
        lambda get: get("VICRegLoss")(25.0, 80.0),
        lambda x, y: eb_jepa_terms(x, y, 25.0, 80.0),
    ),
    "eb_jepa CovarianceLoss": Case(
        "eb_jepa",
        lambda get: get("CovarianceLoss")(),
        lambda x: eb_jepa_channels(x, 0.0, 1.0)[:1],
        ONE,
    ),
    "eb_jepa VCLoss": Case(
        "eb_jepa",
        lambda get: get("VCLoss")(2.0, 3.0),
        lambda x: eb_jepa_channels(x, 2.0, 3.0),
        ((2, 5, 3, 2, 2),),
    ),
    "eb_jepa BCS": Case(
        "eb_jepa",
        lambda get: get("BCS")(40),
        bcs,
        bound=SIGREG,
        half=False,
        double=False,
        rounds=False,
    ),
    "pytorch-metric-learning VICRegLoss": Case(
        "pytorch_metric_learning",
        metric_learning,
        vicreg.pytorch_metric_learning,
    ),
    "pytorch-metric-learning VICRegLoss, one view": Case(
        "pytorch_metric_learning",
        lambda get: get("VICRegLoss")(variance_mu=5),
        lambda x: vicreg.pytorch_metric_learning(x, x, (25.0, 5.0, 1.0)),
        ONE,
    ),
    "pyjepa VICRegLoss": Case("pyjepa", lambda get: get("VICRegLoss")(), pyjepa_terms),
    "pyjepa VICRegLoss, positions": Case(
        "pyjepa", lambda get: get("VICRegLoss")(), pyjepa_terms, ((4, 5, 6), (4, 5, 6))
    ),
    "pyjepa VICRegLoss, one view": Case(
        "pyjepa", lambda get: get("VICRegLoss")(), pyjepa_one_view, ONE, rounds=None
    ),
    "pyjepa SIGReg": Case(
        "pyjepa",
        lambda get: seeded(get("SIGReg")(num_proj=40)),
        half_line(40),
        TIMES,
        SIGREG,
        double=False,
        rounds=False,
    ),
    "jepa-science sigreg_loss": Case(
        "jepa_science",
        lambda get: seeded(lambda z: get("sigreg_loss")(z, 40)),
        half_line(40),
        ONE,
    ),
    "jepa-science SIGReg, sums": Case("jepa_science", science, summed_science, TIMES, SIGREG),
}
