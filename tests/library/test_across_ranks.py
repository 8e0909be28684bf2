"""Tier 6: every batch-statistic loss, on 2 and 4 gloo ranks under DistributedDataParallel, gives
the loss and the parameter gradients of one process with the whole batch.

A file tests/library/across_ranks/<op>.py gives CASES: name -> Case. All cases of all ops run in one
spawn a number of ranks (two ranks: in that of tests/helpers/gloo.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import gloo

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
ROWS = 12
# Rows of each rank: even, uneven, a rank with one row.
SPLITS = {2: ((6, 6), (9, 3), (1, 11)), 4: ((3, 3, 3, 3), (2, 5, 1, 4))}
FEATURES = 10


@dataclass(frozen=True)
class Case:
    """loss(model, batch, process_group) -> 0-d loss; batch: each tensor's rows of this rank, the
    batch dimension first; model() -> the parameters it trains, built under a fixed seed.
    differentiated: the loss has already put its gradient into the parameters.

    relative: bound on |mine - whole| / |whole|, for the loss and for each parameter's gradient.
    """

    loss: Callable[[nn.Module, tuple[Tensor, ...], Any], Tensor]
    batch: Callable[[], tuple[Tensor, ...]]
    model: Callable[[], nn.Module]
    relative: float = 1e-6
    differentiated: bool = False
    splits: dict[int, tuple[tuple[int, ...], ...]] = field(default_factory=lambda: SPLITS)


def encoder(dim: int) -> Callable[[], nn.Module]:
    """A small encoder of [N, FEATURES] to [N, dim]; a bias of its last layer would have no gradient
    where embeddings are centred.
    """

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Linear(16, dim, bias=False))

    return build


def views(count: int = 2, *shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """`count` correlated views [ROWS, *shape, FEATURES]."""

    def build() -> tuple[Tensor, ...]:
        base = torch.randn(ROWS, *shape, FEATURES)
        return tuple(base + 0.3 * torch.randn_like(base) for _ in range(count))

    return build


def cases() -> dict[str, Case]:
    by_name = {}
    for path in sorted((Path(__file__).parent / "across_ranks").glob("[a-z]*.py")):
        op = path.stem.removeprefix("across_ranks_")
        for name, case in importlib.import_module(
            f"tests.library.across_ranks.{path.stem}"
        ).CASES.items():
            by_name[f"{op}-{name}"] = case
    return by_name


def build(case: Case) -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return case.model(), case.batch()


def outcome(case: Case, model: nn.Module, batch: tuple[Tensor, ...], group: Any) -> dict[str, Any]:
    loss = case.loss(model, batch, group)
    if not case.differentiated:
        loss.backward()
    grads = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
    return {"loss": loss.detach(), **grads}


def worker(rank: int, ranks: int) -> dict[Any, Any]:
    results = {}
    for name, case in cases().items():
        for split in case.splits[ranks]:
            model, batch = build(case)
            own = tuple(z.split(split)[rank] for z in batch)
            results[name, split] = outcome(
                case, nn.parallel.DistributedDataParallel(model), own, True
            )
    return results


FEW, *MORE = sorted(SPLITS)
# Four processes on two cores take a minute.
RANKS = [FEW, *(pytest.param(ranks, marks=pytest.mark.thorough) for ranks in MORE)]


@pytest.fixture(scope="module", params=RANKS)
def everyone(request, tmp_path_factory) -> tuple[int, list[dict[Any, Any]]]:
    ranks = request.param
    if ranks == FEW:
        return ranks, gloo.on_two("library.test_across_ranks")
    return ranks, gloo.run(ranks, tmp_path_factory.mktemp("ranks"), worker)


@pytest.mark.parametrize("name", cases())
def test_ranks_equal_one_process(name: str, everyone) -> None:
    ranks, outcomes = everyone
    case = cases()[name]
    whole = outcome(case, *build(case), None)
    for split in case.splits[ranks]:
        for rank in range(ranks):
            mine = outcomes[rank][name, split]
            assert mine.keys() == whole.keys()
            for key, expected in whole.items():
                error = (mine[key] - expected).norm() / expected.norm()
                assert error <= case.relative, (split, rank, key, error.item())
