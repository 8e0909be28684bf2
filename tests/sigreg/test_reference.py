"""Tier 1: SIGReg's reference against closed forms, its quadrature, variants and modules."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.tolerances import SAME_FORMULA, relative_error
from vicreg_kernels.sigreg import LeJEPALoss, SIGRegLoss, reference, sigreg_directions, sigreg_loss
from vicreg_kernels.sigreg.conventions import CONVENTIONS, quadrature

# Of Random123's published known answers for philox4x32, 10 rounds: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def loss(z, **settings):
    return sigreg_loss(z, **{"slices": 12, "backend": "reference", **settings})


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_known_answers(counter, key, expected):
    words = reference.philox([torch.tensor(word) for word in counter], tuple(key))
    assert [int(word) for word in words] == expected


def test_uniforms_stay_inside():
    """The words nearest 0 and 2^32, and the float32 nearest 1."""
    words = torch.tensor([0, 1, 2**32 - 1, 2**32 - 128, 2**31])
    u = reference._uniform(words)
    assert u.min() == 2.0**-33
    assert u.max() == 1.0 - 2.0**-24
    assert u[-1] == 0.5


def test_directions_are_uniform_on_the_sphere():
    """Length 1; with M directions in D dimensions, A A^T is M / D times I + O(sqrt(D / M)); a
    coordinate's fourth moment is 3 / (D (D + 2)); all of D's residues mod 4 are used.
    """
    for dim in (3, 4, 5, 6):
        a = sigreg_directions(dim, 40000, seed=1, backend="reference").double()
        assert (a.norm(dim=0) - 1.0).abs().max() < 1e-6
        second = a @ a.t() * dim / a.shape[1]
        assert (second - torch.eye(dim)).abs().max() < 0.03
        assert a.mean(dim=1).abs().max() < 0.02
        fourth = a.pow(4).mean(dim=1) * dim * (dim + 2) / 3.0
        assert (fourth - 1.0).abs().max() < 0.06


def test_directions_by_seed_and_step():
    """Every bit of both counts; an int step and a tensor's are one; a slice does not depend on how
    many there are.
    """

    def draw(step, seed, slices=6):
        return sigreg_directions(9, slices, step=step, seed=seed, backend="reference")

    first = draw(7, 3)
    assert torch.equal(first, draw(torch.tensor(7), 3))
    assert torch.equal(first, draw(7, 3, slices=11)[:, :6])
    assert torch.equal(draw(None, 0), draw(0, 0))
    others = [(8, 3), (7, 4), (7 + 2**32, 3), (7, 3 + 2**32), (7, -3), (7, 3 - 2**63)]
    for step, seed in others:
        assert (draw(step, seed) - first).abs().max() > 0.1, (step, seed)


def test_integral_in_closed_form():
    """Enough knots far enough out: the integral of |ecf - phi|^2 phi (Epps and Pulley, 1983)."""
    z, a = double(9, 5), torch.nn.functional.normalize(double(5, 4), dim=0)
    p = z @ a
    pairs = torch.exp(-0.5 * (p[:, None] - p[None, :]).square()).mean(dim=(0, 1))
    single = torch.exp(-0.25 * p.square()).mean(dim=0)
    closed = math.sqrt(2 * math.pi) * (pairs - math.sqrt(2.0) * single + 1 / math.sqrt(3.0))
    for convention, knots, factor in (("lejepa", 64, 9), ("eb_jepa", 128, 1), ("eb_jepa", 127, 1)):
        value = loss(z, slices=None, directions=a, knots=knots, t_max=8.0, convention=convention)
        assert relative_error(value, factor * closed.mean()) < 1e-10


def test_two_points_in_closed_form():
    """Rows at +-x on a line: the mean cosine is cos(t x), the mean sine 0, whatever the slice."""
    x = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    z = torch.stack((x, -x)).reshape(2, 1)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    phi = torch.exp(-0.5 * t * t)
    expected = 2.0 * 2.0 * torch.trapezoid(phi * (torch.cos(t * x) - phi).square(), t)
    (wanted,) = torch.autograd.grad(expected, x, retain_graph=True)
    value = loss(z, slices=None, directions=torch.ones(1, 1))
    assert relative_error(value, expected) < SAME_FORMULA
    assert relative_error(torch.autograd.grad(value, x)[0], wanted) < SAME_FORMULA


@pytest.mark.parametrize(
    ("convention", "knots", "t_max"),
    [
        ("lejepa", 17, 3.0),
        ("lejepa", 2, 1.0),
        ("lejepa", [0.0, 0.1, 0.5, 2.0], None),
        ("lejepa", [0.5, 0.75, 2.0], None),
        ("eb_jepa", 10, 3.0),
        ("eb_jepa", 7, 2.0),
        ("eb_jepa", [-2.0, -0.5, 0.0, 0.5, 1.0], None),
    ],
)
def test_quadrature_is_the_trapezoid_rule(convention, knots, t_max):
    """Of an even function that vanishes at 0, times exp(-t^2 / 2), on the whole line's knots."""
    rule = CONVENTIONS[convention]
    positions, weights = quadrature(rule, knots, 3.0 if t_max is None else t_max)
    assert positions == sorted(set(positions))
    assert positions[0] > 0.0
    if isinstance(knots, int):
        t = torch.linspace(-t_max if rule.symmetric else 0.0, t_max, knots, dtype=torch.float64)
    else:
        t = torch.tensor(knots, dtype=torch.float64)

    def f(t):
        return 1.0 - torch.cos(0.7 * t)

    expected = torch.trapezoid(f(t) * torch.exp(-0.5 * t * t), t) * (1 if rule.symmetric else 2)
    positions, weights = (torch.tensor(z, dtype=torch.float64) for z in (positions, weights))
    integral = weights @ f(positions)
    assert abs(integral.item() - expected.item()) < 1e-13


def test_knots_by_number_and_by_name():
    z = double(6, 4)
    by_name = loss(z, knots=[3 * k / 16 for k in range(17)])
    assert relative_error(loss(z), by_name) < SAME_FORMULA
    ten = [-3 + 6 * k / 9 for k in range(10)]
    by_name = loss(z, knots=ten, convention="eb_jepa")
    assert relative_error(loss(z, convention="eb_jepa"), by_name) < SAME_FORMULA


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 2)])
def test_gradcheck(convention, shape):
    z = double(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: loss(z, slices=3, convention=convention), (z,))
    few = {"slices": 2, "knots": 3, "convention": convention}
    assert torch.autograd.gradgradcheck(lambda z: loss(z, **few), (z,))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_views(convention):
    """The mean over views, or all of them as one sample; and the convention's number of slices."""
    z = double(3, 5, 4)
    alone = torch.stack([loss(view, convention=convention) for view in z]).mean()
    pooled = loss(z.reshape(15, 4), convention=convention)
    expected = pooled if convention == "stable_pretraining" else alone
    assert relative_error(loss(z, convention=convention), expected) < SAME_FORMULA
    rows = 1.0 if convention == "eb_jepa" else 2.0
    twice = loss(torch.cat((z[0], z[0])), convention=convention)
    assert relative_error(twice, rows * loss(z[0], convention=convention)) < SAME_FORMULA
    slices = 256 if convention == "eb_jepa" else 1024
    default = loss(z[0], slices=None, convention=convention)
    assert torch.equal(default, loss(z[0], slices=slices, convention=convention))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_is_computed_in_float32(dtype):
    z = torch.randn(20, 6).to(dtype).requires_grad_()
    a = sigreg_directions(6, 12, backend="reference").to(dtype)
    value, wide = loss(z), loss(z.detach().float(), directions=a.float())
    assert value.dtype == torch.float32
    assert torch.equal(value, wide)
    assert torch.autograd.grad(value, z)[0].dtype == dtype


def test_the_module_counts():
    z = double(6, 4)
    module = SIGRegLoss(12, seed=5, backend="reference")
    values = [module(z) for _ in range(3)]
    assert [v.item() for v in values] == [loss(z, step=k, seed=5).item() for k in range(3)]
    assert len({v.item() for v in values}) == 3
    assert module(z, step=1) == values[1]
    module.eval()
    assert module(z) == module(z) == loss(z, step=3, seed=5)
    resumed = SIGRegLoss(12, seed=5, backend="reference")
    resumed.load_state_dict(module.state_dict())
    assert resumed(z) == module(z)
    assert resumed.step == 4


@pytest.mark.parametrize("weighting", ["convex", "sum"])
@pytest.mark.parametrize("global_views", [None, 1, 2])
def test_lejepa(weighting, global_views):
    z = double(3, 6, 4)
    module = LeJEPALoss(0.3, weighting=weighting, slices=12, backend="reference")
    first = z[:global_views].mean(dim=0)
    invariance = sum((view - first).square().mean() for view in z) / 3
    share = 0.7 if weighting == "convex" else 1.0
    expected = share * invariance + 0.3 * loss(z)
    assert relative_error(module(z, global_views), expected) < SAME_FORMULA
    predicted, target = double(6, 2, 4), double(6, 2, 4)
    distance = (predicted - target).square().mean()
    value = module(z, predicted=predicted, target=target, step=8)
    assert relative_error(value, share * distance + 0.3 * loss(z, step=8)) < SAME_FORMULA
    assert module.sigreg.step == 1
