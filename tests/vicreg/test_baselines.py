"""What the VICReg op is measured against computes the op."""

from __future__ import annotations

import pytest
import torch

from bench import vicreg, vicreg_baselines
from tests.helpers.shapes import randn
from tests.helpers.tolerances import assert_close_to_truth, differentiate

GROUPED = [(3, 5, 9), (3, 9, 9), (3, 12, 9)]
# The last two are computed in block rows.
PLAIN = [(13, 67), (67, 13), (12, 12), (530, 560), (560, 530)]


def views(*shape: int) -> list[torch.Tensor]:
    x = 0.9 * randn(*shape)
    return [x.requires_grad_(), (x + 0.4 * randn(*shape)).detach().requires_grad_()]


def hold_to_reference(loss, *shape: int) -> None:
    """Value and gradients of float32 against the library's reference in float64."""

    def reference(x, y):
        return vicreg.ours(x, y, backend="reference")

    x, y = views(*shape)
    truth = differentiate(reference, *(z.detach().double().requires_grad_() for z in (x, y)))
    plain, actual = differentiate(reference, x, y), differentiate(loss, x, y)
    for name, *each in (
        ("value", actual.values[0], truth.values[0], plain.values[0]),
        ("x", actual.gradients[0], truth.gradients[0], plain.gradients[0]),
        ("y", actual.gradients[1], truth.gradients[1], plain.gradients[1]),
    ):
        assert_close_to_truth(*each, torch.float32, max(shape), name)


@pytest.mark.parametrize("shape", PLAIN + GROUPED, ids=str)
@pytest.mark.parametrize("name", ["eager", "gram_plain", "gram_best"])
def test_baselines_compute_the_op(name, shape):
    hold_to_reference(vicreg_baselines.BASELINES[name](), *shape)


def test_best_gram_version_scales_by_the_incoming_gradient():
    x, y = views(20, 30)
    once = torch.autograd.grad(vicreg_baselines.gram_best(x, y), (x, y))
    thrice = torch.autograd.grad(3 * vicreg_baselines.gram_best(x, y), (x, y))
    for a, b in zip(once, thrice, strict=True):
        torch.testing.assert_close(3 * a, b)


@pytest.mark.parametrize("name", vicreg_baselines.PEERS)
def test_peers_compute_the_op(name):
    try:
        loss = vicreg_baselines.BASELINES[name]()
    except ImportError as error:
        pytest.skip(str(error))
    hold_to_reference(loss, 13, 67)
    hold_to_reference(loss, 67, 13)


def test_a_missing_peer_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setattr(vicreg_baselines.importlib.util, "find_spec", lambda name: None)
    plan = vicreg.plan(vicreg.Shape(24, 64), torch.device("cpu"), torch.float32, None)
    assert {"ours", "eager"} <= plan.steps.keys()
    assert "lightly" not in plan.steps
    assert plan.skipped["lightly"] == "lightly is not installed"


def test_least_work_of_vicreg():
    shape = vicreg.Shape(10, 100)
    assert shape.least_bytes(4) == 4 * 4 * 1000
    # a view: 10 * 11 * 100 for the symmetric product, 2 * 10 * 10 * 100 for the gradient
    assert shape.least_operations() == 2 * (11000 + 20000)
    assert vicreg.Shape(100, 10).least_operations() == shape.least_operations()
    assert vicreg.Shape(10, 100, groups=7).least_operations() == 7 * shape.least_operations()
