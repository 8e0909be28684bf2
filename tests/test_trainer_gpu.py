"""Tier 7: the trainer on an NVIDIA GPU: fused against reference, torch.compile, CUDA graphs."""

from __future__ import annotations

import pytest
import torch
from test_trainer import METHODS, run, settings

pytestmark = pytest.mark.gpu

STATIC = ("vicreg", "vicreg_jepa", "lejepa")


@pytest.mark.parametrize("method", METHODS)
def test_fused_and_reference_train_alike_in_bfloat16(method, tmp_path):
    """A bfloat16 has 8 bits, so that an activation is off by 4e-3 of itself, in another direction
    in each; the loss averages over all of them: 1e-2 holds its bias and two steps' updates.
    """
    half = {"steps": 3, "device": "cuda", "precision": "bfloat16"}
    fused = run(settings(method, **half), tmp_path / "fused")
    plain = run(settings(method, kernels="reference", **half), tmp_path / "plain")
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_and_eager_train_alike(method, tmp_path):
    """1e-3: the convolutions of both are TF32's, not all of the same algorithm."""
    torch._dynamo.reset()
    eager = run(settings(method, device="cuda"), tmp_path / "eager")
    whole = run(settings(method, device="cuda", compile=True), tmp_path / "compiled")
    torch.testing.assert_close(whole, eager, rtol=1e-3, atol=0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", STATIC)
def test_cuda_graphs_replay_the_same_training(method, precision, tmp_path):
    """The first steps warm up and record, the others replay the kernels that compile=True runs."""
    torch._dynamo.reset()
    shared = {"steps": 8, "device": "cuda", "precision": precision}
    whole = run(settings(method, compile=True, **shared), tmp_path / "compiled")
    torch._dynamo.reset()
    graphs = run(settings(method, compile="reduce-overhead", **shared), tmp_path / "graphs")
    torch.testing.assert_close(graphs, whole, rtol=1e-4, atol=0)
    assert len(set(graphs)) == 8
