"""The fused kernels train as plain PyTorch does, for as long as rounding lets two runs be one.

Training enlarges rounding: two runs of the reference alone, 1e-7 apart, part company in time, the
sooner the higher the rate. These runs are 200 steps at rates where they do not.
"""

from __future__ import annotations

import pytest
import torch
from jepa import config
from test_trainer import METHODS, run, settings

STEPS = 200


def small(method: str, kernels: str) -> config.Config:
    made = config.describe(settings(method, steps=STEPS, kernels=kernels, save_every=STEPS))
    made["training"]["batch"] = 8 if method in ("ijepa", "vjepa") else 32
    made["loss"]["slices"] = 32
    made["model"] |= {"dim": 32, "heads": 2, "depth": 1, "predictor_dim": 32, "predictor_heads": 2}
    return config.parse(made)


@pytest.mark.parametrize("method", METHODS)
def test_fused_and_reference_have_one_loss_curve(method, tmp_path):
    fused = torch.tensor(run(small(method, "fused"), tmp_path / "fused"))
    plain = torch.tensor(run(small(method, "reference"), tmp_path / "plain"))
    assert len(fused) == STEPS
    torch.testing.assert_close(fused, plain, rtol=1e-3, atol=0)
    assert fused[-20:].mean() < 0.98 * fused[:20].mean()  # they do train
