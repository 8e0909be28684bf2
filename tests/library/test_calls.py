"""The direct call of an op's implementation, and checks that are remembered."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.recorded_ops import RecordedOps
from vicreg_kernels import barlow_twins_loss, vicreg_loss
from vicreg_kernels.core import calls


class Subclass(torch.Tensor):
    pass


def test_direct_for_ordinary_tensors():
    x = torch.zeros(3)
    assert calls.direct(x, None, nn.Parameter(x), x[1:])


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(3).as_subclass(Subclass), torch._neg_view(torch.zeros(3))],
    ids=["subclass", "negated"],
)
def test_not_direct_for_what_the_dispatcher_must_see(tensor):
    assert not calls.direct(torch.zeros(3), tensor)


def test_not_direct_under_a_dispatch_mode():
    x = torch.zeros(3)
    with RecordedOps():
        assert not calls.direct(x)
    with FakeTensorMode():
        assert not calls.direct(x)
    assert calls.direct(x)


def test_not_direct_under_a_transform():
    seen = []
    torch.func.vmap(lambda x: seen.append(calls.direct(x)) or x)(torch.zeros(3, 2))
    assert seen == [False]


def test_not_direct_while_compiling():
    @torch.compile(backend="eager", fullgraph=True)
    def function(x):
        return x + (1 if calls.direct(x) else 2)

    assert function(torch.zeros(())) == 2


@pytest.mark.parametrize("loss", [vicreg_loss, barlow_twins_loss])
def test_negated_views(loss):
    """Forward and backward, with a pending negation in an input and in the incoming gradient."""
    x, y = (torch.randn(6, 9, requires_grad=True) for _ in "xy")
    pending = torch._neg_view(torch.full((), 3.0))
    expected = torch.autograd.grad(loss(-x, y), (x, y), torch.tensor(-3.0))
    actual = torch.autograd.grad(loss(torch._neg_view(x), y), (x, y), pending)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


def counted():
    ran = []

    @calls.remembered
    def check(*arguments):
        ran.append(arguments)
        if arguments[-1] == "bad":
            raise ValueError("bad")
        if arguments[-1] == "wrong":
            raise TypeError("wrong")
        return arguments

    return ran, check


def test_remembered_by_value():
    ran, check = counted()
    for dtype in (torch.float32, torch.float16, torch.float32):
        assert check(torch.zeros(3, 4).shape, dtype, 0.5, None) == ((3, 4), dtype, 0.5, None)
    assert len(ran) == 2


def test_errors_are_raised_every_time():
    _, check = counted()
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            check("bad")
        with pytest.raises(TypeError, match="wrong"):
            check("wrong")


def test_what_can_change_is_checked_every_time():
    ran, check = counted()
    weight = torch.ones(())
    for value in (1.0, 2.0):
        weight.fill_(value)
        assert float(check(weight)[0]) == value
    assert len(ran) == 2


def test_memory_is_bounded():
    ran, check = counted()
    for size in range(257):
        check(size)
    check(0)
    assert len(ran) == 258
    check(256)
    assert len(ran) == 258
