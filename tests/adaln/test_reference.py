"""Tier 1: the reference against closed forms, torch's own layer norm, sums written out by hand, and
finite differences.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from tests.adaln.cases import FORMS, MIXES, draw, vectors, weights
from tests.helpers.tolerances import SAME_FORMULA
from vicreg_kernels.adaln import AdaLN, gated_residual, modulated_layer_norm


def close(actual, expected, tolerance=SAME_FORMULA):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def double(*shape):
    return draw(*shape, dtype=torch.float64)


def doubles(count, shape, form="frame"):
    return [z.detach().requires_grad_() for z in vectors(count, shape, form, dtype=torch.float64)]


def test_worked_example():
    """Mean 2 and deviation 1, or with eps = 3 twice that."""
    x = torch.tensor([[1.0, 3.0], [3.0, 1.0]], dtype=torch.float64)
    shift, scale = torch.tensor([10.0, 20.0]).double(), torch.tensor([1.0, -0.5]).double()
    out = modulated_layer_norm(x, shift, scale, eps=0.0)
    close(out, [[10.0 - 2.0, 20.0 + 0.5], [10.0 + 2.0, 20.0 - 0.5]])
    close(modulated_layer_norm(x, shift, scale, eps=3.0), [[9.0, 20.25], [11.0, 19.75]])
    close(gated_residual(x, 2.0 * x, scale), [[3.0, 0.0], [9.0, 0.0]])


@pytest.mark.parametrize("form", FORMS)
def test_the_published_formula(form):
    """A layer norm without affine, and a vector repeated for each of its frame's tokens."""
    shape = (2, 3, 4, 6)
    x, (shift, scale, gate) = double(*shape), doubles(3, shape, form)
    repeated = [z.reshape(2, 3, -1, 6).repeat_interleave(1 if form == "token" else 4, dim=2)
                for z in (shift, scale, gate)]  # fmt: skip
    plain = F.layer_norm(x, (6,), eps=1e-6) * (1 + repeated[1]) + repeated[0]
    leaves = (x, shift, scale)
    out = modulated_layer_norm(*leaves)
    close(out, plain)
    weight = weights(plain)
    for mine, theirs in zip(
        *(torch.autograd.grad(z, leaves, weight, retain_graph=True) for z in (out, plain)),
        strict=True,
    ):
        close(mine, theirs)
    close(gated_residual(x, x.sin(), gate), x + repeated[2] * x.sin())


def test_sums_written_out():
    """Python floats and loops: the value and the closed-form gradients of formula.h."""
    tokens, dim, eps = 3, 4, 0.2
    x, (shift, scale) = double(tokens, dim), doubles(2, (tokens, dim))
    out = modulated_layer_norm(x, shift, scale, eps=eps)
    grads = torch.autograd.grad(out, (x, shift, scale), weights(out))
    g, by_shift, by_scale = weights(out).tolist(), [0.0] * dim, [0.0] * dim
    for t, row in enumerate(x.tolist()):
        mean = sum(row) / dim
        rstd = 1 / math.sqrt(sum((v - mean) ** 2 for v in row) / dim + eps)
        n = [(v - mean) * rstd for v in row]
        s = [g[t][j] * (1 + scale[j].item()) for j in range(dim)]
        a, b = sum(s) / dim, sum(s[j] * n[j] for j in range(dim)) / dim
        for j in range(dim):
            close(out[t, j], n[j] * (1 + scale[j].item()) + shift[j].item())
            close(grads[0][t, j], rstd * (s[j] - a - b * n[j]))
            by_shift[j] += g[t][j]
            by_scale[j] += g[t][j] * n[j]
    close(grads[1], by_shift)
    close(grads[2], by_scale)


@pytest.mark.parametrize("form", FORMS)
def test_finite_differences(form):
    shape = (2, 2, 3)
    x, (shift, scale, gate) = double(*shape), doubles(3, shape, form)
    for function, leaves in (
        (lambda *z: modulated_layer_norm(*z, eps=0.1), (x, shift, scale)),
        (gated_residual, (x, double(*shape), gate)),
    ):
        assert gradcheck(function, leaves)
        assert gradgradcheck(function, leaves)


def test_one_element_and_equal_elements():
    """The norm is 0, and x's gradient that of one element too; with eps = 0 it is undefined."""
    for shape in ((2, 3, 1), (2, 3, 5)):
        x = torch.ones(shape, dtype=torch.float64, requires_grad=True)
        shift, scale = doubles(2, shape)
        out = modulated_layer_norm(x, shift, scale)
        close(out, shift[:, None].expand(shape))
        if shape[-1] == 1:
            close(torch.autograd.grad(out.sum(), x)[0], torch.zeros(shape))
        assert modulated_layer_norm(x, shift, scale, eps=0.0).isnan().all()


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_results_have_the_dtype_of_x(mix):
    shape = (2, 3, 8)
    x, y = draw(*shape, dtype=mix[0]), draw(*shape, dtype=mix[1])
    shift, scale, gate = vectors(3, shape, dtype=mix[2])
    assert modulated_layer_norm(x, shift, scale, backend="reference").dtype == mix[0]
    assert gated_residual(x, y, gate, backend="reference").dtype == mix[0]


@pytest.mark.parametrize("per_token", [False, True])
def test_the_module(per_token):
    """It begins as the identity, and takes shift, scale and gate in DiT's order."""
    block = AdaLN(6, 4).double()
    x, condition = double(2, 3, 5, 6), double(2, 3, *([5] if per_token else []), 4)
    attention, mlp = torch.nn.Linear(6, 6).double(), torch.nn.Linear(6, 6).double()
    close(block(x, condition, attention, mlp), x)
    torch.nn.init.normal_(block.linear.weight)
    parts = block.linear(F.silu(condition)).reshape(2, 3, -1, 36).chunk(6, dim=-1)
    expected = x
    for layer, (shift, scale, gate) in ((attention, parts[:3]), (mlp, parts[3:])):
        normed = F.layer_norm(expected, (6,), eps=1e-6) * (1 + scale) + shift
        expected = expected + gate * layer(normed)
    close(block(x, condition, attention, mlp), expected)
    assert sorted(block.state_dict()) == ["linear.bias", "linear.weight"]
    assert "eps=1e-06" in repr(block)
