"""What the VICReg op is measured against: the published formula, two Gram versions, the peers.

A baseline maps two views, [N, D] or grouped [G, N, D], to the loss, differentiable in both. Two
views give 25 invariance + 25 variance + covariance as facebookresearch/vicreg weighs them; grouped
views give the regularisers only, 25 variance + covariance summed over views and averaged over
groups, as VICRegL computes them for each location.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.measure import compiled
from bench.vicreg_gram import gram_best, gram_plain

Loss = Callable[[Tensor, Tensor], Tensor]

EPS = 1e-4


def off_diagonal(square: Tensor) -> Tensor:
    """The off-diagonal elements of [..., D, D] through a strided view: [..., D - 1, D]."""
    edge = square.shape[-1]
    # Without its last element the matrix reads as rows of D + 1, each beginning on the diagonal.
    rows = square.flatten(-2)[..., :-1].unflatten(-1, (edge - 1, edge + 1))
    return rows[..., 1:].flatten(-2)


def eager(x: Tensor, y: Tensor) -> Tensor:
    """The published formula: a D x D covariance a view, its off-diagonal copied, squared, summed.

    Grouped views take one batched product, with the strided copy in place of the boolean mask of
    VICRegL, which is slower.
    """
    rows, dim = x.shape[-2:]
    loss = x.new_zeros(())
    for view in (x, y):
        centred = view - view.mean(dim=-2, keepdim=True)
        std = torch.sqrt(centred.var(dim=-2) + EPS)
        hinge = torch.relu(1 - std).mean()
        covariance = centred.mT @ centred / (rows - 1)
        squares = off_diagonal(covariance).pow_(2).sum(dim=-1) / dim
        loss = loss + 25 * (hinge / 2 if x.dim() == 2 else hinge) + squares.mean()
    if x.dim() == 2:
        loss = loss + 25 * torch.nn.functional.mse_loss(x, y)
    return loss


def lightly_loss() -> Loss:
    """lightly's VICRegLoss, loaded by path: importing lightly.loss would need torchvision."""
    package = importlib.util.find_spec("lightly")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("lightly is not installed")
    path = Path(package.submodule_search_locations[0]) / "loss" / "vicreg_loss.py"
    spec = importlib.util.spec_from_file_location("_lightly_vicreg_loss", path)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{path} cannot be loaded")
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.VICRegLoss()


def metric_learning_loss() -> Loss:
    """pytorch-metric-learning's VICRegLoss."""
    from pytorch_metric_learning.losses import VICRegLoss

    loss = VICRegLoss()
    return lambda x, y: loss(x, ref_emb=y)


# Each builds its baseline; a peer that is not installed raises ImportError.
BASELINES: dict[str, Callable[[], Loss]] = {
    "eager": lambda: eager,
    "compiled": lambda: compiled(eager),
    "gram_plain": lambda: gram_plain,
    "gram_compiled": lambda: compiled(gram_plain),
    "gram_best": lambda: gram_best,
    "lightly": lightly_loss,
    "metric_learning": metric_learning_loss,
}
COMPILED = ("compiled", "gram_compiled")
PEERS = ("lightly", "metric_learning")
