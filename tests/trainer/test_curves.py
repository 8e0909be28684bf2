"""The fused kernels train as plain PyTorch does, for as long as rounding lets two runs be one.

With ReLU two runs of the reference itself, 1e-7 apart, part by 3e-2 of LeJEPA's loss here: a unit
at the kink is on or off by rounding, and its weights get a gradient or none. With GELU all five
methods stay 5e-7 together. 3e-5 leaves room for other machines, and is a quarter of what a teacher
whose momentum is one step ahead makes.
"""

from __future__ import annotations

import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.data import batches, sources
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.evaluation import probe
from vicreg_jepa.evaluation.features import features
from vicreg_jepa.methods import build
from vicreg_jepa.methods.base import taken_by
from vicreg_jepa.training.trainer import Trainer

from tests.trainer.test_trainer import ALONE, METHODS, run, settings

STEPS = 80


def small(method: str, kernels: str) -> config.Config:
    made = config.describe(settings(method, steps=STEPS, kernels=kernels, save_every=STEPS))
    batch = {"images": 32, "videos": 4, "trajectories": 4}[METHODS[method].data]
    made["training"]["batch"] = batch
    if method == "ijepa":
        made["training"]["batch"] = 8
    if METHODS[method].data == "trajectories":
        return config.parse(made)
    made["model"]["dim"] = 32
    if method == "lejepa":
        made["loss"]["slices"] = 32
    if METHODS[method].learns == "tokens":
        made["model"] |= {"heads": 2, "depth": 1, "predictor_dim": 32, "predictor_heads": 2}
    if method in taken_by()["optimizer.momentum"]:
        made["optimizer"]["momentum"] = 0.9  # the teacher follows, or it would not matter
    return config.parse(made)


@pytest.mark.parametrize("method", ALONE)
def test_fused_and_reference_have_one_loss_curve(method, tmp_path):
    fused = torch.tensor(run(small(method, "fused"), tmp_path / "fused"))
    plain = torch.tensor(run(small(method, "reference"), tmp_path / "plain"))
    assert len(fused) == STEPS
    torch.testing.assert_close(fused, plain, rtol=3e-5, atol=0)
    assert fused[-20:].mean() < fused[:20].mean()


def test_lejepa_learns(tmp_path):
    """Eight features of an untrained network separate the digits badly, of a trained one better."""
    values = config.describe(settings("lejepa", steps=150, batch=128, save_every=150))
    values["model"] |= {"dim": 8, "expander": [64, 16]}
    values["loss"] |= {"views": 4, "slices": 64}
    values["optimizer"]["rate"] = 5e-3
    made = config.parse(values)
    train, test = sources.images(made)
    method = build.method(made, 1).train()

    def score() -> float:
        seen, held_out = (features(method, part.images) for part in (train, test))
        return probe.accuracy(seen, train.labels, held_out, test.labels)

    before = score()
    trainer = Trainer(made, method, Ranks(), tmp_path)
    trainer.fit(batches.ImageSource(train, 128, made.seed), lambda *_: None)
    assert score() > before + 0.08
