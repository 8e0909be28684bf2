"""What a CUDA graph of a search needs, without a GPU: a search is a tensor program of its inputs
alone, on one device, without a wait for the host. tests/trainer/test_gpu.py replays the graph.
"""

from __future__ import annotations

import dataclasses
from dataclasses import fields

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from vicreg_jepa.methods import build
from vicreg_jepa.planning.captured import Captured, inputs, kind_of, of, on
from vicreg_jepa.planning.energies import Arrival, GoalDistance
from vicreg_jepa.planning.noise import coloured
from vicreg_jepa.planning.planner import Effort, Plan, Planner, PlanRequest
from vicreg_jepa.planning.planners import CEM, ICEM, MPPI, CategoricalCEM, Gradient

from tests.trainer.test_world_model import changed
from tests.trainer.test_world_networks import moved

COUNT, SIZES = 5, {"horizon": 2, "repeat": 2, "candidates": 16, "iterations": 2, "interval": 2}
CHOICES = torch.tensor([[x, y] for x in (-1.0, 0.0, 1.0) for y in (-1.0, 1.0)])
PLANNERS: dict[str, Planner] = {
    "CEM": CEM(elites=8, **SIZES),
    "ICEM": ICEM(elites=8, kept=4, **SIZES),
    "MPPI": MPPI(elites=8, **SIZES),
    "Gradient": Gradient(**SIZES),
    "CategoricalCEM": CategoricalCEM(choices=CHOICES, elites=8, **SIZES),
}
each_planner = pytest.mark.parametrize("name", PLANNERS)


def world_model(predictor: str = "mlp"):
    """A world model whose predictions move."""
    return moved(build.method(changed(model={"predictor": predictor}), 2))


def request(latent: int, seed: int) -> PlanRequest:
    random = torch.Generator().manual_seed(seed)
    start, goal = torch.randn(2, COUNT, latent, generator=random)
    former = torch.rand(COUNT, SIZES["horizon"], 2, generator=random) * 2 - 1
    return PlanRequest(
        start, None, torch.arange(COUNT) + seed, 4 * seed, former, Arrival(goal, 0.5)
    )


def values(plan: Plan) -> list[Tensor]:
    return [getattr(plan, one.name) for one in fields(Plan) if one.name != "above"]


@each_planner
def test_a_traced_search_gives_the_plans_of_other_requests(name):
    """Nothing of the request that is traced is a constant of the program: no size, no time, no
    branch that it took. Tracing with fake tensors would also raise where a value is read.
    """
    planner, model = PLANNERS[name], world_model()
    latent = model.encoder.head.out_features
    first, other = (Captured(planner).asked(model, request(latent, seed)) for seed in (1, 2))
    planner.search(model, first)  # the constants that a planner keeps are made

    def search(*given: Tensor) -> list[Tensor]:
        return values(planner.search(model, of(first, *given)))

    program = make_fx(search, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs(first))
    expected = values(planner.plan(model, request(latent, 2)))
    torch.testing.assert_close(
        program(*inputs(other)), expected, rtol=1e-5, atol=1e-5, equal_nan=True
    )
    assert not torch.equal(expected[0], planner.plan(model, request(latent, 1)).actions)


class OneDevice(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor that is not on `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in tree_leaves((args, kwargs, result)):
            if isinstance(one, Tensor):
                assert one.device.type == self.device, f"{function} has a tensor on {one.device}"
        return result


@pytest.mark.parametrize(
    ("name", "predictor"),
    [*((name, "mlp") for name in PLANNERS), ("ICEM", "gru"), ("ICEM", "transformer")],
)
def test_a_search_stays_on_its_device(name, predictor):
    """A copy from the host cannot be captured, nor can a value that is read by the host, which
    meta tensors do not have.
    """
    model = world_model(predictor).to("meta")
    latent = model.encoder.head.out_features
    asked = Captured(PLANNERS[name]).asked(model, request(latent, 1))
    moved_there = of(asked, *(value.to("meta") for value in inputs(asked)))
    planner = on(PLANNERS[name], torch.device("meta"))
    planner.search(model, moved_there)
    with OneDevice("meta"):
        plan = planner.search(model, moved_there)
    assert plan.actions.shape == (COUNT, SIZES["horizon"], 2)


def test_a_recording_serves_requests_of_its_kind_alone(monkeypatch):
    model, captured = world_model(), Captured(PLANNERS["ICEM"])
    latent = model.encoder.head.out_features
    first = captured.asked(model, request(latent, 1))
    kind = kind_of(model, first)
    assert kind_of(model, captured.asked(model, request(latent, 2))) == kind
    nearer = dataclasses.replace(first, arrival=Arrival(first.arrival.goal, 0.25))
    passing = dataclasses.replace(first, arrival=Arrival(first.arrival.goal, 0.5, at="any"))
    exact = dataclasses.replace(first, start=first.start.double())
    for other in (nearer, passing, exact):
        assert kind_of(model, other) != kind
    assert kind_of(world_model(), first) != kind
    with monkeypatch.context() as autocast:
        autocast.setattr(torch, "is_autocast_enabled", lambda device: True)
        assert kind_of(model, first) != kind
    with torch.no_grad():
        model.predictor.change[0].weight.mul_(2)
    assert kind_of(model, first) == kind  # in place
    model.predictor.change[0].weight.data = model.predictor.change[0].weight.data.clone()
    assert kind_of(model, first) != kind


def test_what_a_graph_reads_is_kept():
    """A matrix of the noise is not made anew in between."""
    kept = coloured(3, 2.0, torch.device("cpu"))
    for colour in range(200):
        coloured(3, colour / 7, torch.device("cpu"))
    assert coloured(3, 2.0, torch.device("cpu")) is kept


def test_what_a_graph_cannot_hold_is_refused():
    model, planner = world_model(), PLANNERS["ICEM"]
    asked = request(model.encoder.head.out_features, 0)
    with pytest.raises(ValueError, match="planner: got one with effort"):
        Captured(dataclasses.replace(planner, effort=Effort()))
    with pytest.raises(ValueError, match="planner: got int"):
        Captured(3)
    captured = Captured(planner)
    with pytest.raises(ValueError, match="start: got a tensor on cpu"):
        captured.plan(model, asked)
    for change, words in (
        ({"energy": GoalDistance(asked.arrival.goal)}, "energy: got one"),
        ({"arrival": None}, "arrival: got None"),
        ({"arrival": Arrival(asked.arrival.goal[1:], 1.0)}, "goal: got shape"),
        ({"former": asked.former[:, 1:]}, "former: got shape"),
    ):
        with pytest.raises(ValueError, match=words):
            captured.asked(model, dataclasses.replace(asked, **change))
