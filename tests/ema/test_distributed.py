"""Tier 6: two gloo ranks with DistributedDataParallel, and with fully_shard, hold the teacher that
one process has; neither communicates in the update.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import gloo
from vicreg_kernels.ema import EMA

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
STEPS = 4


def make() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def data(step: int) -> torch.Tensor:
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


def alone() -> EMA:
    model = make()
    ema = EMA(model, 0.9, shadow_dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        train(model, optimizer, data(step))
        ema.update(model)
    return ema


def distributed(rank: int, ema: EMA, model: nn.Module) -> None:
    student = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(student.parameters(), 0.5)
    for step in range(STEPS):
        train(student, optimizer, data(step).chunk(2)[rank])
        ema.update(student)


def sharded(rank: int, ema: EMA, model: nn.Module) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    for part in (ema.module, ema.shadow, model):
        for layer in part:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        fully_shard(part)
    assert isinstance(ema.module[0].weight, torch.distributed.tensor.DTensor)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    for step in range(STEPS):
        train(model, optimizer, data(step).chunk(2)[rank])
        with CommDebugMode() as communication:
            ema.update(model)
        assert communication.get_total_counts() == 0
    with pytest.raises(ValueError, match="fully_shard has sharded"):
        EMA(model)
    with pytest.raises(ValueError, match="is sharded, but"):
        EMA(make()).update(model)


def whole(z: torch.Tensor) -> torch.Tensor:
    return z.full_tensor() if hasattr(z, "full_tensor") else z


KINDS = {"ddp": distributed, "fsdp2": sharded}


def worker(rank: int, ranks: int) -> dict[str, dict[str, Any]]:
    states = {}
    for kind, train_on in KINDS.items():
        model = make()
        ema = EMA(copy.deepcopy(model), 0.9, shadow_dtype=torch.bfloat16)
        train_on(rank, ema, model)
        state = {name: whole(z.detach()) for name, z in ema.named_parameters()}
        states[kind] = state | {"step": ema.step}
    return states


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_equal_one_process(kind: str) -> None:
    states = [each[kind] for each in gloo.on_two("ema.test_distributed")]
    ema = alone()
    expected = dict(ema.named_parameters())
    assert expected.keys() == states[0].keys() - {"step"}
    for state in states:
        assert state["step"] == STEPS
        for name, z in expected.items():
            close = {"rtol": 1e-2, "atol": 1e-3} if z.dtype == torch.bfloat16 else {}
            torch.testing.assert_close(state[name], z.detach(), msg=name, **close)
    for name in expected:
        assert torch.equal(states[0][name], states[1][name])
