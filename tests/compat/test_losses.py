"""Every drop-in loss gives the value, the gradient, the shape and the dtype of the library whose
name it has: restated from its definition, and of its own class where it is installed.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from bench import peers
from tests.compat.cases import CASES, inputs, tensors
from tests.helpers.tolerances import relative_error
from vicreg_kernels.compat import patching

EVERY = pytest.mark.parametrize("name", CASES)
# Of a float32 gradient, and of a value in roundings of the dtype.
SINGLE, ROUNDINGS = 1e-5, 40
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def run(loss, leaves):
    """The outcome, and the gradients of the first tensor and of all of them together."""
    outcome = loss(*leaves)
    values = tensors(outcome)
    total = sum((k + 1.0) * z.sum() for k, z in enumerate(values))
    gradients = [
        *torch.autograd.grad(values[0].sum(), leaves, retain_graph=True),
        *torch.autograd.grad(total, leaves),
    ]
    return outcome, values, gradients


def assert_same(ours, theirs, bound):
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine.shape == expected.shape
        if expected.abs().max() == 0:
            assert mine.abs().max() == 0
        else:
            assert relative_error(mine, expected) <= bound


@EVERY
def test_restated(name):
    case = CASES[name]
    _, values, gradients = run(case.make(peers.ours(case.peer)), inputs(case))
    _, expected, slopes = run(case.restated, inputs(case))
    assert_same(values, expected, case.bound)
    assert_same(gradients, slopes, case.bound)


def their_loss(case):
    try:
        return case.make(peers.theirs(case.peer))
    except ImportError as error:
        pytest.skip(f"{case.peer} cannot be imported: {error}")


@EVERY
def test_own_class(name):
    """In float64, if it takes that; in float32 and halves the dtypes and about the values."""
    case = CASES[name]
    with peers.importable(case.peer):
        theirs = their_loss(case)
        dtype = torch.float64 if case.double else torch.float32
        bound = case.bound if case.double else SINGLE
        expected, values, slopes = run(theirs, inputs(case, dtype))
        outcome, own_values, gradients = run(case.make(peers.ours(case.peer)), inputs(case, dtype))
        assert type(outcome) is type(expected)
        if isinstance(expected, dict):
            assert list(outcome) == list(expected)
        assert_same(own_values, values, bound)
        assert_same(gradients, slopes, bound)
        for dtype in DTYPES if case.half else DTYPES[:1]:
            _, values, slopes = run(case.make(peers.theirs(case.peer)), inputs(case, dtype))
            _, own_values, gradients = run(case.make(peers.ours(case.peer)), inputs(case, dtype))
            assert [z.dtype for z in own_values] == [z.dtype for z in values]
            assert [z.dtype for z in gradients] == [z.dtype for z in slopes]
            assert_same(own_values, values, ROUNDINGS * torch.finfo(dtype).eps)


@EVERY
def test_dtypes(name):
    """The inputs', as plain PyTorch has them; float32 under autocast, but for one library."""
    case = CASES[name]
    for dtype in DTYPES:
        _, own_values, gradients = run(case.make(peers.ours(case.peer)), inputs(case, dtype))
        assert {z.dtype for z in gradients} == {dtype}
        kinds = {True: {dtype}, False: {torch.float32}, None: {dtype, torch.float32}}
        assert {z.dtype for z in own_values} == kinds[case.rounds]
    with torch.autocast("cpu", torch.bfloat16):
        own_values = tensors(case.make(peers.ours(case.peer))(*inputs(case, torch.bfloat16)))
    stays = case.peer == "pytorch_metric_learning"
    assert {z.dtype for z in own_values} == {torch.bfloat16 if stays else torch.float32}


def test_every_name_has_a_case():
    """Of the losses; the updates of a momentum network are in test_momentum.py, what is no loss in
    test_meta_jepa.py.
    """
    elsewhere = {"EMA", "MomentumUpdater", "VICRegLLoss", "apply_masks", "update_momentum"}
    for peer in patching.PACKAGES:
        compat = importlib.import_module(f"vicreg_kernels.compat.{peer}")
        assert list(compat.HOMES) == compat.__all__ == sorted(compat.__all__)
        asked: set[str] = set()

        def get(name, asked=asked, peer=peer):
            asked.add(name)
            return peers.ours(peer)(name)

        for case in CASES.values():
            if case.peer == peer:
                case.make(get)(*inputs(case))
        assert set(compat.__all__) - elsewhere == asked - elsewhere


SIGREGS = {
    "lightly SIGReg": (("lightly", "SIGReg"), ["phi", "t", "weights"]),
    "stable-worldmodel SIGReg": (("stable_worldmodel", "SIGReg"), ["phi", "t", "weights"]),
    "pyjepa SIGReg": (("pyjepa", "SIGReg"), ["phi", "t", "weights"]),
    "jepa-science SIGReg": (("jepa_science", "SIGReg"), ["t", "weights"]),
    "stable-pretraining SlicedEppsPulley": (
        ("stable_pretraining", "SlicedEppsPulley"),
        ["ep.phi", "ep.t", "ep.weights", "global_step"],
    ),
}


@pytest.mark.parametrize("name", SIGREGS)
def test_state_of_sigreg(name):
    """A state dict loads in both directions."""
    (peer, of), keys = SIGREGS[name]
    mine = peers.ours(peer)(of)().state_dict()
    assert sorted(mine) == keys
    with peers.importable(peer):
        try:
            theirs = peers.theirs(peer)(of)()
        except ImportError as error:
            pytest.skip(f"{peer} cannot be imported: {error}")
        for key, expected in theirs.state_dict().items():
            torch.testing.assert_close(mine[key], expected)
        theirs.load_state_dict(mine)


def test_stateful_directions_change_from_call_to_call():
    x = torch.randn(12, 7)
    for module in (peers.ours("stable_pretraining")("SlicedEppsPulley")(30),):
        assert module(x) != module(x)
        assert module.global_step == 2
    bcs = peers.ours("eb_jepa")("BCS")(30)
    assert bcs(x, x)["loss"] != bcs(x, x)["loss"]
    assert bcs.step == 2


def test_projection_of_vcloss():
    """Rows of all places, through the module."""
    x, layer = torch.randn(2, 5, 3, 2, 2), torch.nn.Linear(5, 4)
    loss, total, values = peers.ours("eb_jepa")("VCLoss")(2.0, 3.0, layer)(x, actions=None)
    rows = layer(x.permute(0, 2, 3, 4, 1).reshape(-1, 5))[:, :, None, None, None]
    expected = peers.ours("eb_jepa")("VCLoss")(2.0, 3.0)(rows)
    torch.testing.assert_close((loss, total), expected[:2])
    assert values == pytest.approx(expected[2])
    assert total.item() == pytest.approx(values["std_loss"] + values["cov_loss"])


def test_compiled():
    """One graph: of a module, a function, and a dict."""
    for name in ("lightly VICRegLoss", "solo-learn barlow", "pyjepa VICRegLoss"):
        torch._dynamo.reset()
        case = CASES[name]
        loss = case.make(peers.ours(case.peer))
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        leaves = inputs(case, torch.float32)
        torch.testing.assert_close(run(compiled, leaves)[2], run(loss, leaves)[2])
