"""Tier 7: the trainer on an NVIDIA GPU: fused against reference, torch.compile, CUDA graphs of
training steps and of searches.
"""

from __future__ import annotations

import pytest
import torch
from vicreg_jepa.methods import build
from vicreg_jepa.planning.captured import Captured
from vicreg_jepa.planning.energies import Arrival
from vicreg_jepa.planning.planner import PlanRequest

from tests.trainer.test_planning_graph import PLANNERS
from tests.trainer.test_trainer import METHODS, run, settings
from tests.trainer.test_world_model import changed
from tests.trainer.test_world_networks import moved

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("method", METHODS)
def test_fused_and_reference_train_alike_in_bfloat16(method, tmp_path):
    """A bfloat16 has 8 bits, so that an activation is off by 4e-3 of itself, in another direction
    in each; the loss averages over all of them: 1e-2 holds its bias and two steps' updates.
    """
    half = {"steps": 3, "device": "cuda", "precision": "bfloat16"}
    fused = run(settings(method, **half), tmp_path / "fused")
    plain = run(settings(method, kernels="reference", **half), tmp_path / "plain")
    torch.testing.assert_close(fused, plain, rtol=1e-2, atol=0)


def test_compiled_and_eager_train_alike(tmp_path):
    """On packed tokens of changing number. Compiling is slow: the others are compiled below."""
    torch._dynamo.reset()
    eager = run(settings("vjepa", device="cuda"), tmp_path / "eager")
    whole = run(settings("vjepa", device="cuda", compile=True), tmp_path / "compiled")
    torch.testing.assert_close(whole, eager, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("method", "precision"),
    [("vicreg", "float32"), ("vicreg_jepa", "bfloat16"), ("lejepa", "bfloat16")],
)
def test_compiled_steps_and_cuda_graphs_of_them_train_as_eager_ones(method, precision, tmp_path):
    """The first steps warm up and record, the others replay the kernels that compile=True runs, so
    those two differ by what cuDNN picks at most. Eager: its convolutions are TF32's or bfloat16's.
    """
    losses = {}
    for compile in (False, True, "reduce-overhead"):
        torch._dynamo.reset()
        made = settings(method, steps=8, device="cuda", precision=precision, compile=compile)
        losses[compile] = run(made, tmp_path / str(compile))
    torch.testing.assert_close(losses["reduce-overhead"], losses[True], rtol=1e-3, atol=0)
    torch.testing.assert_close(losses[True], losses[False], rtol=2e-2, atol=0)
    assert len(set(losses["reduce-overhead"])) == 8


@pytest.mark.parametrize("name", PLANNERS)
def test_a_captured_search_gives_the_plans_of_the_planner(name):
    """For other requests than the one that was recorded, for another number of environments, and
    after the model has changed in place.
    """
    planner = PLANNERS[name]
    method = moved(build.method(changed(model={"predictor": "mlp"}), 2)).cuda()
    captured = Captured(planner)
    random = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for count, scale in ((5, 1.0), (5, 1.0), (3, 1.0), (5, 0.5)):
            for parameter in method.predictor.parameters():
                parameter.mul_(scale)
            size = method.encoder.head.out_features
            start, goal = torch.randn(2, count, size, generator=random, device="cuda")
            seeds = torch.randint(1 << 40, (count,), generator=random, device="cuda")
            request = PlanRequest(start, None, seeds, int(seeds[0]) % 99, None, Arrival(goal, 1.0))
            plan, graphed = planner.plan(method, request), captured.plan(method, request)
            torch.testing.assert_close(graphed.actions, plan.actions, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(graphed.path, plan.path, rtol=1e-4, atol=1e-4)
            assert torch.equal(graphed.arrived, plan.arrived)
            assert torch.equal(graphed.rollout_steps, plan.rollout_steps)
