"""Tier 2: SIGReg's fused backends against the float64 reference.

Written for the C++ CPU kernels and run on every fused backend the machine has: the `gpu` marked
cases are the same tests on CUDA tensors.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import shapes
from tests.helpers.tolerances import assert_matches_reference, differentiate
from vicreg_kernels.core import loader
from vicreg_kernels.sigreg import contract, sigreg_directions, sigreg_loss
from vicreg_kernels.sigreg.conventions import CONVENTIONS

HALVES = (torch.bfloat16, torch.float16)
LEJEPA = [3 * k / 16 for k in range(1, 17)]
# Equally spaced from the spacing on and from half of it, by fewer, as many and more than the eight
# that a kernel may form one by one; one knot; the most; and of no spacing.
KNOTS = {
    "lejepa": {},
    "eb_jepa": {"convention": "eb_jepa"},
    "many": {"knots": 41, "t_max": 5.0},
    "half, many": {"knots": 38, "convention": "eb_jepa", "t_max": 4.0},
    "one": {"knots": 2, "t_max": 1.0},
    "half, one": {"knots": 2, "convention": "eb_jepa", "t_max": 1.0},
    "most": {"knots": 65, "t_max": 6.0},
    "unequal": {"knots": [0.0, 0.1, 0.5, 0.75, 2.5]},
    "offset": {"knots": [0.5, 0.7, 0.9, 1.1]},
}
# [N, D], M: one of each, odd, prime, off the powers of two and off a vector's sixteen.
SHAPES = [
    ((2, 1), 1),
    ((2, 3), 2),
    ((3, 5), 16),
    ((17, 13), 17),
    ((127, 65), 31),
    ((130, 33), 80),
    ((257, 9), 150),
    ((300, 31), 600),
]


def unit_directions(dim, slices, fused, dtype=torch.float32):
    a = sigreg_directions(dim, slices, step=2, backend="reference")
    return a.to(device=fused.device, dtype=dtype)


def function(a, **given_settings):
    return lambda z, backend: sigreg_loss(z, directions=a, backend=backend, **given_settings)


def assert_correct(z, slices, fused, **given_settings):
    a = unit_directions(z.shape[-1], slices, fused, z.dtype)
    name = f"{tuple(z.shape)} {given_settings}"
    return assert_matches_reference(
        function(a, **given_settings), fused.name, z.requires_grad_(), cotangents=(0.7,), name=name
    )


@pytest.mark.parametrize("knots", KNOTS)
def test_shapes(fused, knots):
    for shape, slices in SHAPES:
        assert_correct(shapes.randn(*shape, device=fused.device), slices, fused, **KNOTS[knots])


@pytest.mark.triton_takes(lambda dtype, **_: dtype == torch.float16)
@pytest.mark.parametrize("dtype", HALVES)
def test_half(fused, dtype):
    """Sums in float32: the loss is as exact as the inputs allow."""
    for shape, slices in SHAPES:
        z = shapes.randn(*shape, dtype=dtype, device=fused.device)
        assert_correct(z, slices, fused)
        assert_correct(z, slices, fused, convention="eb_jepa")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides(fused, dtype):
    where = {"device": fused.device, "dtype": dtype}
    for layout in shapes.LAYOUTS.values():
        assert_correct(layout(23, 37, **where), 20, fused)
    grouped = (
        shapes.randn(9, 4, 11, **where).transpose(0, 1),
        shapes.randn(11, 9, 4, **where).permute(2, 1, 0),
        shapes.randn(1, 9, 11, **where).expand(4, 9, 11),
        shapes.randn(8, 9, 14, **where)[::2, :, 3:],
    )
    for z in grouped:
        for convention in ("lejepa", "stable_pretraining"):
            assert_correct(z, 20, fused, convention=convention)
    z = shapes.randn(9, 11, **where)
    a = unit_directions(11, 70, fused, dtype)
    expected = sigreg_loss(z, directions=a, backend=fused.name)
    for spread in (a.t().contiguous().t(), torch.stack((a, a), dim=2)[..., 0]):
        loss = sigreg_loss(z, directions=spread, backend=fused.name)
        assert abs(loss - expected) <= 1e-6 * expected


@pytest.mark.triton_takes(lambda **_: False)
@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 140), st.integers(1, 40)),
    slices=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.float32, *HALVES]),
    scale=st.sampled_from([0.05, 1.0, 8.0]),
    convention=st.sampled_from(sorted(CONVENTIONS)),
    knots=st.one_of(st.none(), st.integers(2, 40)),
    seed=st.integers(0, 2**31),
)
def test_random(fused, shape, slices, dtype, scale, convention, knots, seed):
    torch.manual_seed(seed)
    z = shapes.randn(*shape, scale=scale, dtype=dtype, device=fused.device)
    assert_correct(z, slices, fused, convention=convention, knots=knots)


def test_scales_and_offsets(fused):
    """Collapsed, far away, and spread over many periods of the last knot."""
    for scale, offset in [(0.0, 0.0), (0.0, 0.5), (1e-4, 0.0), (1.0, 10.0), (30.0, 0.0)]:
        z = offset + scale * shapes.randn(70, 12, device=fused.device)
        assert_correct(z, 40, fused)


@pytest.mark.parametrize(
    "knots",
    [LEJEPA, [(2 * k + 1) / 3 for k in range(5)], [k / 8 for k in range(1, 65)], [0.1, 0.5, 3.0]],
)
def test_accuracy_of_the_angles(fused, knots):
    """Of one row each, so that a sum is one cosine or sine: up to |p| = 50 within float32's own
    roundings of t and of t p, 2^-24 |t p| each and a tenth more (t = 3 k / 16 has none), and one
    for each knot, the last of which is a multiple of the first; 16 more for the chain of products.

    The gradient's, told apart by coefficients that pick one, are held to twice that.
    """
    kernels = loader.load("sigreg", contract.Kernels, fused.name)
    p = torch.linspace(-50.0, 50.0, 4099).to(fused.device)
    one = torch.ones(1, 1, 1, device=fused.device)
    sums, projections = kernels.sums(one, p[None], knots)
    t = torch.tensor(knots, dtype=torch.float64, device=fused.device)
    angles = t[:, None] * p.double()
    truth = torch.stack((angles.cos(), angles.sin()))  # [2, K, M]
    eps = torch.finfo(torch.float32).eps
    exact = all(t == torch.tensor(t).item() for t in knots)
    bound = eps * ((0.55 if exact else 1.05) * angles.abs() + len(knots) + 16.0)
    assert torch.equal(projections[0, 0], p)
    assert ((sums[0].double() - truth).abs() <= bound).all()
    few = p[::128].contiguous()
    identity = torch.eye(few.numel(), device=fused.device)
    for part in range(2):
        for k in range(len(knots)):
            pick = torch.zeros(1, 2, len(knots), few.numel(), device=fused.device)
            pick[0, part, k] = 1.0
            grad = kernels.gradient(one[0, 0], pick, few[None, None], identity, knots)
            error = (grad[0, 0].double() - truth[part, k, ::128]).abs()
            assert (error <= 2.0 * bound[k, ::128]).all()


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("count", "most"), [(16, 5.0), (33, 3.0), (64, 10.3)])
def test_accuracy_of_any_equal_knots(fused, count, most, half):
    """The bound of docs/sigreg.md, which counts the steps from the first knot to the last."""
    kernels = loader.load("sigreg", contract.Kernels, fused.name)
    knots = [most / count * (k + (0.5 if half else 1.0)) for k in range(count)]
    p = (100.0 * torch.rand(20000, generator=torch.Generator().manual_seed(count)) - 50.0)[None]
    one = torch.ones(1, 1, 1, device=fused.device)
    sums, _ = kernels.sums(one, p.to(fused.device), knots)
    angles = torch.tensor(knots, dtype=torch.float64)[:, None] * p.double()
    truth = torch.stack((angles.cos(), angles.sin()))
    bound = 2.0**-22 * (angles.abs() + knots[-1] / knots[0] + 16.0)
    assert ((sums[0].double().cpu() - truth).abs() <= bound).all()


def test_angles_far_out(fused):
    """Right to float32's own rounding while the angle is in the thousands, bounded beyond."""
    kernels = loader.load("sigreg", contract.Kernels, fused.name)
    p = torch.linspace(-3e3, 3e3, 4099).to(fused.device)
    sums, _ = kernels.sums(torch.ones(1, 1, 1, device=fused.device), p[None], LEJEPA)
    angles = torch.tensor(LEJEPA, dtype=torch.float64, device=fused.device)[:, None] * p.double()
    truth = torch.stack((angles.cos(), angles.sin()))
    bound = 2.0**-23 * (0.55 * angles.abs() + 32.0)
    assert ((sums[0].double() - truth).abs() <= bound).all()
    for far in (1e7, 1e20, 3e38):
        z = torch.full((4, 1), far, device=fused.device, requires_grad=True)
        a = torch.ones(1, 3, device=fused.device)
        loss = sigreg_loss(z, directions=a, backend=fused.name)
        (grad,) = torch.autograd.grad(loss, z)
        assert loss.isfinite()
        assert grad.isfinite().all()


def test_directions_are_the_references(fused):
    """Every residue of D, M mod what a kernel takes at a time, large seeds, steps and indices."""
    for dim, slices in [(1, 1), (2, 3), (5, 17), (128, 16), (33, 100)]:
        for step, seed in [(0, 0), (5, -1), (2**40 + 3, 2**50 + 7), (2**63 - 1, -(2**63))]:
            given_step = torch.tensor(step, device=fused.device)
            drawn = sigreg_directions(dim, slices, step=given_step, seed=seed, backend=fused.name)
            expected = sigreg_directions(dim, slices, step=step, seed=seed, backend="reference")
            assert drawn.is_contiguous()
            assert (drawn.cpu() - expected).abs().max() <= 8e-7, (dim, slices, step, seed)


def test_drawn_directions_are_used(fused):
    """The loss of the step and the seed is the loss of their directions."""
    z = shapes.randn(30, 12, device=fused.device)
    a = sigreg_directions(12, 50, step=4, seed=9, device=fused.device, backend=fused.name)
    expected = sigreg_loss(z, directions=a, backend=fused.name)
    for step in (4, torch.tensor(4, device=fused.device)):
        loss = sigreg_loss(z, slices=50, step=step, seed=9, backend=fused.name)
        assert torch.equal(loss, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_spread_as_in_the_reference(fused, bad):
    for dtype in (torch.float32, *HALVES):
        z = shapes.randn(6, 11, dtype=dtype, device=fused.device)
        z[1, 2] = bad
        a = unit_directions(11, 24, fused, dtype)
        every = ({}, {"convention": "eb_jepa"}, KNOTS["unequal"])
        if fused.name == "triton" and dtype != torch.float32:  # compiles all for each kind of knots
            every = every[:1]
        for given_settings in every:
            actual, expected = (
                differentiate(
                    lambda z, name=name: function(a, **given_settings)(z, name),  # noqa: B023
                    z.requires_grad_(),
                )
                for name in (fused.name, "reference")
            )
            assert expected.values[0].isnan()
            assert actual.values[0].isnan()
            assert torch.equal(actual.gradients[0].isnan(), expected.gradients[0].isnan())


def test_deterministic_and_inputs_untouched(fused):
    z = shapes.transposed(260, 33, device=fused.device).requires_grad_()
    a = unit_directions(33, 700, fused)
    before, versions = [z.detach().clone(), a.clone()], (z._version, a._version)

    def run():
        return differentiate(lambda z: function(a)(z, fused.name), z)

    first, second = run(), run()
    assert torch.equal(first.values[0], second.values[0])
    assert torch.equal(first.gradients[0], second.gradients[0])
    assert torch.equal(z, before[0])
    assert torch.equal(a, before[1])
    assert (z._version, a._version) == versions


@pytest.mark.triton_takes(lambda **_: False)
def test_any_number_of_threads(fused):
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 8):
            torch.set_num_threads(count)
            for shape, slices in [((3, 150, 20), 200), ((700, 5), 17), ((4, 9), 1200)]:
                assert_correct(shapes.randn(*shape, device=fused.device), slices, fused)
    finally:
        torch.set_num_threads(threads)


SCRATCH = """
import torch
from vicreg_kernels.sigreg import sigreg_loss
torch.manual_seed(0)
for shape in [(7, 13), (300, 70)]:
    for settings in ({}, {"convention": "eb_jepa"}, {"knots": [0.0, 0.3, 2.0]}):
        for dtype in (torch.float32, torch.bfloat16):
            z = torch.randn(shape).to(dtype).requires_grad_()
            outcomes = []
            for backend in ("cpu", "reference"):
                loss = sigreg_loss(z, slices=90, backend=backend, **settings)
                outcomes.append([loss, *torch.autograd.grad(loss, z)])
            for a, b in zip(*outcomes):
                torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2 * b.abs().max().item())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a glibc setting")
def test_scratch_memory_of_the_compiled_kernels(fused):
    """glibc fills every allocation with -1.7e38, torch's or not: nothing unwritten may be read."""
    if fused.name != "cpu":
        pytest.skip("host memory only")
    tunables = "glibc.malloc.perturb=1:glibc.malloc.tcache_count=0"
    done = subprocess.run(
        [sys.executable, "-c", SCRATCH],
        env={**os.environ, "GLIBC_TUNABLES": tunables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
