"""A method of one's own: what docs/trainer.md says it must have is all that it must have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from vicreg_jepa import config
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.models.masks import Masks, multi_block
from vicreg_jepa.models.vit import Grid
from vicreg_jepa.training import checkpoint
from vicreg_jepa.training.trainer import Trainer


class Tokens(nn.Module):
    """Has the parts of TokenMethod."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def draw(self, x: Tensor, first: int, batch: int, generator: torch.Generator) -> Masks:
        return multi_block(Grid(1, 8, 8), batch, generator).part(first, first + len(x))

    def forward(self, x: Tensor, drawn: Masks, weight: float = 1.0, process_group=None) -> Tensor:
        return weight * self.linear(x.flatten(1)).square().mean()

    def after_step(self) -> None:
        pass

    def features(self, x: Tensor) -> Tensor:
        return self.linear(x.flatten(1))


class Statistics(nn.Module):
    """Has the parts of ViewMethod."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 4)

    def views(self, x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return x, x.flip(-1)

    def forward(self, view: Tensor) -> Tensor:
        return self.linear(view.flatten(1))

    def loss(self, x: Tensor, y: Tensor, *, process_group=None) -> Tensor:
        return (x - y).square().mean()

    def after_step(self) -> None:
        pass

    def features(self, x: Tensor) -> Tensor:
        return self(x)


class Batches:
    def batches(self, start, share):
        while True:
            yield torch.rand(4, 1, 8, 8)


@pytest.mark.parametrize("method", [Tokens, Statistics])
@pytest.mark.parametrize("pieces", [1, 2])
def test_a_method_of_ones_own_trains_and_goes_on(method, pieces, tmp_path):
    words = ["training.steps=2", "training.batch=4", f"training.accumulate={pieces}"]
    name = "ijepa_digits" if method is Tokens else "vicreg_digits"
    made = config.load(name, [*words, "training.save_every=1"])
    losses = []
    trainer = Trainer(made, method(), Ranks(), tmp_path)
    trainer.fit(Batches(), lambda step, loss, seconds: losses.append(loss))
    assert len(losses) == 2
    assert losses[0] > 0
    again = Trainer(made, method(), Ranks(), tmp_path)
    assert again.resume() == 2
    assert torch.equal(again.method.linear.weight, trainer.method.linear.weight)
    assert checkpoint.newest(tmp_path / "checkpoints").name == "step_00000002"
