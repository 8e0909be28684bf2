"""What the EMA refuses: the message names the argument, and no target has been changed."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn

from vicreg_kernels.core import dispatch
from vicreg_kernels.ema import EMA, ema_update_

NAN = float("nan")


def good():
    return [torch.ones(3), torch.ones(2, 4).bfloat16()], [torch.zeros(3), torch.zeros(2, 4)]


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged)


def non_leaf():
    return torch.ones(3, requires_grad=True) * 1.0


BAD_ONES = {  # what takes the place of one tensor of 3 elements: (made by, error, what is said)
    "list": (lambda: [1.0, 2.0, 3.0], TypeError, "got list, takes a torch.Tensor"),
    "none": (lambda: None, TypeError, "got NoneType"),
    "integer": (lambda: torch.ones(3).int(), TypeError, "got dtype torch.int32"),
    "complex": (lambda: torch.ones(3, dtype=torch.complex64), TypeError, "complex64"),
    "shape": (lambda: torch.ones(4), ValueError, "shape"),
    "more dimensions": (lambda: torch.ones(3, 1), ValueError, "shape"),
    "sparse": (lambda: torch.ones(3).to_sparse(), TypeError, "layout torch.sparse_coo"),
    "nested": (nested, TypeError, "layout nested"),
    "device": (lambda: torch.ones(3, device="meta"), ValueError, "device meta"),
}


@pytest.mark.parametrize("kind", BAD_ONES)
@pytest.mark.parametrize("name", ["targets", "onlines", "shadows"])
def test_one_bad_tensor(name, kind, fused):
    """The first list's second tensor, so that a careless loop would have written the first."""
    make, error, said = BAD_ONES[kind]
    targets, onlines = good()
    lists = {"targets": targets, "onlines": onlines, "shadows": [t.clone() for t in targets]}
    for other in lists.values():
        other.reverse()
    lists[name][1] = make()
    before = [t.clone() if isinstance(t, torch.Tensor) else t for t in lists["targets"][:1]]
    where = rf"(targets|onlines|{name})\[[01]\]"  # a bad shape shows in what is compared with it
    with pytest.raises(error, match=rf"{where}: .*") as caught:
        ema_update_(
            lists["targets"], lists["onlines"], 0.5, shadows=lists["shadows"], backend=fused.name
        )
    if kind not in ("shape", "more dimensions", "device"):
        assert f"{name}[1]" in str(caught.value)
        assert said in str(caught.value)
    assert torch.equal(lists["targets"][0], before[0])


@pytest.mark.parametrize(
    ("momentum", "error"),
    [
        (-0.1, ValueError),
        (1.0001, ValueError),
        (NAN, ValueError),
        (float("inf"), ValueError),
        ("0.5", TypeError),
        (None, TypeError),
        (True, TypeError),
        (torch.tensor(1.5), ValueError),
        (torch.tensor(NAN), ValueError),
        (torch.tensor([0.5]), ValueError),
        (torch.tensor(1), TypeError),
        (torch.tensor(0.5).half(), TypeError),
        (torch.tensor(0.5, device="meta"), ValueError),
    ],
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_momentum(momentum, error, backend):
    targets, onlines = good()
    with pytest.raises(error, match="momentum: got"):
        ema_update_(targets, onlines, momentum, backend=backend)
    assert all(t.eq(1).all() for t in targets)
    if not isinstance(momentum, torch.Tensor):
        with pytest.raises(error, match="momentum: got"):
            ema_update_([], [], momentum)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"rounding": "stochastic"}, ValueError, "step: got None"),
        ({"seed": -1}, ValueError, "seed"),
        ({"seed": 2**63}, ValueError, "seed"),
        ({"seed": 0.5}, TypeError, "seed"),
        ({"step": -1}, ValueError, "step"),
        ({"step": 2**48}, ValueError, "step"),
        ({"step": 1.0}, TypeError, "step"),
        ({"step": torch.tensor(-1)}, ValueError, "step"),
        ({"step": torch.tensor(1.0)}, TypeError, "step"),
        ({"step": torch.tensor([1])}, ValueError, "step"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"shadows": [torch.ones(3)]}, ValueError, "shadows: got 1 tensors, takes 2"),
        ({"shadows": torch.ones(3)}, TypeError, "shadows: got Tensor"),
    ],
)
def test_settings(settings, error, said):
    targets, onlines = good()
    with pytest.raises(error, match=said):
        ema_update_(targets, onlines, 0.5, **settings)
    assert all(t.eq(1).all() for t in targets)


@pytest.mark.parametrize(
    ("targets", "onlines", "error", "said"),
    [
        ([torch.ones(3)], [], ValueError, "onlines: got 0 tensors, takes 1"),
        ([], [torch.ones(3)], ValueError, "onlines: got 1 tensors, takes 0"),
        (torch.ones(3), torch.ones(3), TypeError, "targets: got Tensor, takes a list"),
        (5, [], TypeError, "targets: got int, takes a list"),
        ([torch.ones(3)], "abc", TypeError, "onlines: got str, takes a list"),
    ],
)
def test_lists(targets, onlines, error, said):
    with pytest.raises(error, match=said):
        ema_update_(targets, onlines, 0.5)


def overlapping():
    base = torch.ones(4, 6)
    storage = torch.ones(20)
    return {
        "expanded": ([torch.ones(3, 1).expand(3, 4)], [torch.zeros(3, 4)], [], r"targets\[0\]"),
        "windows": ([storage.unfold(0, 4, 2)], [torch.zeros(9, 4)], [], r"targets\[0\]"),
        "itself": ([base], [base], [], r"onlines\[0\].*targets\[0\]"),
        "its part": ([base[0]], [base[0:1].flatten()], [], r"onlines\[0\].*targets\[0\]"),
        "twice": ([base[1], base[1]], [torch.zeros(6)] * 2, [], r"targets\[1\].*targets\[0\]"),
        "crosswise": (
            [torch.ones(6), base[0]],
            [base.view(-1)[5:11], torch.zeros(6)],
            [],
            r"onlines\[0\].*targets\[1\]",
        ),
        "shadow and target": (
            [base[0]],
            [torch.zeros(6)],
            [base.view(-1)[3:9]],
            r"shadows\[0\].*targets\[0\]",
        ),
        "shadow and online": ([torch.ones(6)], [base[0]], [base[0]], r"shadows\[0\].*onlines\[0\]"),
        "a read tensor between": (
            [torch.ones(24), base[3]],
            [base.view(-1), base[0]],
            [],
            r"onlines\[0\].*targets\[1\]",
        ),
    }


@pytest.mark.parametrize("kind", overlapping())
def test_overlap(kind, fused):
    with torch.device(fused.device):
        targets, onlines, shadows, said = overlapping()[kind]
    with pytest.raises(ValueError, match=said):
        ema_update_(targets, onlines, 0.5, shadows=shadows or None, backend=fused.name)
    assert all(t.eq(1).all() for t in targets)


def test_what_may_overlap():
    """Read tensors among themselves, empty ones, and views side by side."""
    base, online = torch.ones(4, 6), torch.zeros(6)
    ema_update_([base[0], base[1]], [online, online], 0.5)
    ema_update_([base[2:2], base[3]], [online.expand(0, 6), online], 0.5)
    assert base.tolist() == [[0.5] * 6, [0.5] * 6, [1.0] * 6, [0.5] * 6]


@pytest.mark.parametrize("name", ["targets", "shadows"])
def test_what_is_written_must_be_a_leaf(name):
    lists = {"targets": [torch.ones(3)], "shadows": [torch.ones(3)]}
    lists[name] = [non_leaf()]
    with pytest.raises(ValueError, match=rf"{name}\[0\].*takes a leaf"):
        ema_update_(lists["targets"], [torch.zeros(3)], 0.5, shadows=lists["shadows"])
    leaf = nn.Parameter(torch.ones(3))
    ema_update_([leaf], [non_leaf()], 0.5)
    assert leaf.eq(1.0).all()


def test_float64_and_fused_backends(fused):
    wide = [torch.ones(3, dtype=torch.float64)]
    for lists in ((wide, [torch.zeros(3)]), ([torch.ones(3)], [torch.zeros(3).double()])):
        with pytest.raises(RuntimeError, match=r"cannot run ema_update_ here: .*float64"):
            ema_update_(*lists, 0.5, backend=fused.name)
        ema_update_(*lists, 0.5)
        assert lists[0][0].eq(0.5).all()
        lists[0][0].fill_(1)


def test_a_backend_that_is_missing():
    reason = dispatch.missing("cuda", "cpu", torch.float32)
    with pytest.raises(RuntimeError, match="backend='cuda' cannot run ema_update_") as caught:
        ema_update_(*good(), 0.5, backend="cuda")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "error", "said"),
    [
        ({"momentum": 1.5}, ValueError, "momentum"),
        ({"final_momentum": NAN}, ValueError, "final_momentum"),
        ({"schedule": "square"}, ValueError, "schedule"),
        ({"schedule": "linear"}, ValueError, "total_steps"),
        ({"schedule": "cosine", "total_steps": 0}, ValueError, "total_steps"),
        ({"dtype": torch.int32}, TypeError, "dtype"),
        ({"shadow_dtype": torch.int8}, TypeError, "shadow_dtype"),
        ({"buffers": "drop"}, ValueError, "buffers"),
        ({"rounding": "up"}, ValueError, "rounding"),
        ({"backend": "fast"}, ValueError, "backend"),
    ],
)
def test_module_settings(settings, error, said):
    with pytest.raises(error, match=f"{said}: got"):
        EMA(nn.Linear(2, 2), **settings)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (nn.Linear(2, 2, bias=False), r"parameters .*missing \['bias'\]"),
        (nn.Linear(2, 3), r"'weight' has shape \(3, 2\)"),
        (nn.Sequential(nn.Linear(2, 2)), r"unexpected \['0.weight', '0.bias'\]"),
    ],
)
def test_a_student_that_does_not_match(other, said):
    ema = EMA(nn.Linear(2, 2))
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        ema.update(other)
    assert all(torch.equal(v, before[k]) for k, v in ema.state_dict().items())


def test_a_student_that_changes_after_the_first_update():
    """The match is kept between updates; what it was made for is looked at each time."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    ema = EMA(model)
    ema.update(model)
    model[1] = nn.Linear(2, 5)
    with pytest.raises(ValueError, match=r"'1\.weight'"):
        ema.update(model)
    model[1] = nn.Linear(2, 2)
    ema.update(model)
    model[0].weight = nn.Parameter(torch.full((2, 2), 100.0))
    ema.update(model, 0.0)
    assert ema.module[0].weight.eq(100.0).all()
    model[0].register_buffer("extra", torch.ones(1))
    with pytest.raises(ValueError, match=r"buffers .*unexpected \['0.extra'\]"):
        ema.update(model)


def test_not_a_module():
    with pytest.raises(TypeError, match="module: got Tensor"):
        EMA(torch.ones(2))
    with contextlib.suppress(TypeError):
        EMA(nn.Linear)


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("first", [None, 1, "a", [torch.ones(3)]])
def test_the_first_target_is_no_tensor(first, backend):
    """It is looked at before any other, for its device."""
    for onlines, said in (([torch.ones(3)], r"targets\[0\]: got"), ([], "onlines: got 0 tensors")):
        with pytest.raises((TypeError, ValueError), match=said):
            ema_update_([first], onlines, 0.5, backend=backend)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_an_empty_list_of_shadows_is_not_none(backend):
    targets = [torch.ones(3)]
    with pytest.raises(ValueError, match="shadows: got 0 tensors, takes 1"):
        ema_update_(targets, [torch.zeros(3)], 0.5, shadows=[], backend=backend)
    assert targets[0].tolist() == [1.0, 1.0, 1.0]
