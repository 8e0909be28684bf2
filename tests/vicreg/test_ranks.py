"""Tier 6: VICReg on two gloo ranks is held to float64 on the whole batch as every backend is, where
squares cancel too; what torch expects of its ops; its backward exchanges nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import gloo, shapes
from tests.helpers.recorded_ops import RecordedOps
from tests.helpers.tolerances import (
    CANCELLATION,
    FEWEST_ROUNDINGS,
    PLAIN_FACTOR,
    Outcome,
    assert_close_to_truth,
    column_errors,
    differentiate,
    relative_error,
)
from vicreg_kernels import variance_covariance, vicreg_loss, vicreg_terms

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
TERMS = (0.5, 1.0, -2.0, 3.0)


def terms(*views, **settings):
    return vicreg_terms(*views, convention="lightly", **settings)


def covariance(z, **settings):
    return variance_covariance(z, **settings)[1]


def orthogonal(count):
    z = torch.randn(64, 512)
    z[:, 100 : 100 + count] = 300 * shapes.white(64, count)
    return z


def grouped():
    return torch.stack([shapes.dominated(32, 96, 300.0).roll(7 * g, 1) for g in range(3)], dim=1)


# Rows first, whole batch; the covariance term is what cancels.
CANCELLING = {
    "one dominates": lambda: shapes.dominated(64, 512, 300.0),
    "four dominate": lambda: shapes.dominated(128, 1024, 1000.0, 4),
    "eight dominate": lambda: shapes.dominated(64, 512, 300.0, 8),
    "scales decay fast": lambda: shapes.decaying(64, 512, 0.1),
    "scales decay slowly": lambda: shapes.decaying(64, 512, 0.9),
    "groups differ": grouped,
    "one orthogonal": lambda: orthogonal(1),
    "four orthogonal": lambda: orthogonal(4),
}
WHITE = {
    "near white, tall": lambda: shapes.white(2048, 64),
    "near white, wide": lambda: shapes.white(600, 512),
}
# Two views [N, (P,) D] and their dtype.
PAIRS = {
    f"{'x'.join(map(str, shape))} {str(dtype)[6:]}": (shape, dtype)
    for shape in ((40, 70), (70, 40), (33, 3, 50), (50, 3, 33))
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
} | {
    "300x260 float32": ((300, 260), torch.float32),
    # Sums of products beyond float16's largest number.
    "40x70 float16 large": ((40, 70), torch.float16),
    "70x40 float16 large": ((70, 40), torch.float16),
}


def pair(name):
    """Views with a common offset, strided."""
    shape, dtype = PAIRS[name]
    torch.manual_seed(1)
    offset = 1e3 if dtype == torch.float32 else 1.0
    scale = 60.0 if name.endswith("large") else 1.0
    return [(torch.randn(*shape, 2)[..., v] * scale + offset).to(dtype) for v in range(2)]


def one(name):
    torch.manual_seed(1)
    return (CANCELLING | WHITE)[name]()


def rows_of(whole, rank):
    """Uneven: a third on rank 0."""
    first = len(whole) // 3
    return whole.split((first, len(whole) - first))[rank].clone().requires_grad_()


def grouped_covariance(z, **settings):
    """z: [N, D] or [N, G, D]."""
    return covariance(z if z.dim() == 2 else z.transpose(0, 1), **settings)


def fullgraph(rank, shape, more):
    """Compiled and eager outcomes, the compilations for `shape` and all: shapes on one side."""

    def function(x, y):
        return terms(2.0 * x, y, process_group=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    outcomes, compilations = [], []
    for rows, dim in (shape, *more):
        torch.manual_seed(2)
        views = [torch.randn(rows + 2 * rank, dim).requires_grad_() for _ in "xy"]
        for f in (compiled, function):
            outcomes.append(differentiate(f, *views, cotangents=TERMS))
        compilations.append(counter.frame_count)
    return outcomes, compilations


def penalty(views, rank):
    """Gradient of the squared gradient of the reference."""
    mine = [rows_of(z, rank) for z in views]
    loss = vicreg_loss(*mine, backend="reference", process_group=True)
    grads = torch.autograd.grad(loss, mine, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), mine)


def worker(rank, ranks):
    results = {}
    for name in (*CANCELLING, *WHITE):
        z = rows_of(one(name), rank)
        results[name] = [
            differentiate(lambda z: grouped_covariance(z, process_group=True), z) for _ in "12"
        ]
    for name in PAIRS:
        views = [rows_of(z, rank) for z in pair(name)]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[name] = differentiate(
                lambda *v: terms(*v, process_group=True), *views, cotangents=TERMS
            )
    one_needed = [rows_of(z, rank) for z in pair("40x70 float32")]
    one_needed[0].requires_grad_(False)
    results["only y"] = differentiate(
        lambda *v: terms(*v, process_group=True), *one_needed, cotangents=TERMS
    )
    broken = torch.randn(8, 12).requires_grad_()
    with torch.no_grad():
        broken[0, 0] = torch.nan if rank == 1 else 0.0
    results["nan"] = differentiate(lambda z: covariance(z, process_group=True), broken)
    results["penalty"] = penalty([z.double() for z in pair("40x70 float32")], rank)
    results["gram compiled"] = fullgraph(rank, (5, 40), [(6, 30), (3, 25)])
    results["covariance compiled"] = fullgraph(rank, (20, 5), [(30, 6), (25, 7)])
    for shape in ((4, 2, 20), (20, 2, 4)):
        views = [torch.randn(shape).requires_grad_() for _ in "xy"]
        with RecordedOps() as ops:
            vicreg_loss(*views, convention="lightly", process_group=True).backward()
        for name, args in ops.calls:
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            op = getattr(torch.ops.vicreg_kernels, name).default
            torch.library.opcheck(op, tuple(args))
            results.setdefault("checked", []).append(name)
    x, y = (torch.randn(4, 9).requires_grad_() for _ in "xy")
    (grad,) = torch.autograd.grad(vicreg_loss(x, y, process_group=True), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiates once"):
        grad.square().sum().backward()
    return results


@pytest.fixture(scope="module")
def everyone():
    return gloo.on_two("vicreg.test_ranks")


def together(outcomes):
    """The whole batch's outcome from that of each rank."""
    first = outcomes[0]
    for outcome in outcomes:
        assert all(torch.equal(a, b) for a, b in zip(outcome.values, first.values, strict=True))
    grads = tuple(
        None if each[0] is None else torch.cat(each) / len(outcomes)
        for each in zip(*(o.gradients for o in outcomes), strict=True)
    )
    return Outcome(first.values, grads)


def reference(function, *views, wide):
    views = [(z.double() if wide else z).detach().requires_grad_() for z in views]
    return differentiate(lambda *v: function(*v, backend="reference"), *views, cotangents=TERMS)


@pytest.mark.parametrize("name", CANCELLING)
def test_squares_that_cancel(name, everyone):
    z = one(name)
    outcome = together([each[name][0] for each in everyone])
    plain, truth = (reference(grouped_covariance, z, wide=wide) for wide in (False, True))
    plain, truth = (
        Outcome(o.values, tuple(g / TERMS[0] for g in o.gradients)) for o in (plain, truth)
    )
    assert relative_error(outcome.values[0], truth.values[0]) <= CANCELLATION
    mine, theirs, true = (
        o.gradients[0] if z.dim() == 2 else o.gradients[0].transpose(0, 1)
        for o in (outcome, plain, truth)
    )
    assert relative_error(mine, true) <= CANCELLATION
    allowed = max(CANCELLATION, PLAIN_FACTOR * column_errors(theirs, true).max().item())
    assert column_errors(mine, true).max() <= allowed


@pytest.mark.parametrize("name", WHITE)
def test_near_white(name, everyone):
    """No worse than twice the plain D x D formula in float32, with nothing added for rounding."""
    outcome = together([each[name][0] for each in everyone])
    plain, truth = (reference(covariance, one(name), wide=wide) for wide in (False, True))
    for k, factor in (("values", 1.0), ("gradients", TERMS[0])):
        mine, theirs, true = (getattr(o, k)[0] for o in (outcome, plain, truth))
        allowed = PLAIN_FACTOR * relative_error(theirs, true)
        assert relative_error(mine * factor, true) <= allowed


@pytest.mark.parametrize("name", [*CANCELLING, *WHITE])
def test_two_runs_are_equal(name, everyone):
    for each in everyone:
        first, second = each[name]
        assert torch.equal(first.values[0], second.values[0])
        assert torch.equal(first.gradients[0], second.gradients[0])


@pytest.mark.parametrize("name", PAIRS)
def test_terms_and_gradients(name, everyone):
    """The rule of tolerances.py; autocast lowers nothing."""
    shape, dtype = PAIRS[name]
    outcome = together([each[name] for each in everyone])
    plain, truth = (reference(terms, *pair(name), wide=wide) for wide in (False, True))
    length = max(shape[0] + shape[-1], FEWEST_ROUNDINGS)
    for kind in ("values", "gradients"):
        for i, (mine, true, formula) in enumerate(
            zip(*(getattr(o, kind) for o in (outcome, truth, plain)), strict=True)
        ):
            assert_close_to_truth(mine, true, formula, dtype, length, f"{kind} {i}")
            assert mine.dtype == (torch.float32 if kind == "values" else dtype)


def test_gradient_of_one_view(everyone):
    both = together([each["40x70 float32"] for each in everyone])
    only = together([each["only y"] for each in everyone])
    assert only.gradients[0] is None
    assert torch.equal(only.gradients[1], both.gradients[1])


def test_nan_reaches_every_rank(everyone):
    for each in everyone:
        assert each["nan"].values[0].isnan()
        assert each["nan"].gradients[0].isnan().any()


def test_reference_differentiates_twice(everyone):
    """d/dz sum_ranks |R g_own|^2 = R^2 d|g|^2/dz, with g the whole batch's gradient."""
    views = [z.double().requires_grad_() for z in pair("40x70 float32")]
    grads = torch.autograd.grad(vicreg_loss(*views), views, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in grads), views)
    for v in range(2):
        mine = torch.cat([each["penalty"][v] for each in everyone])
        torch.testing.assert_close(mine, 4 * expected[v], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("side", ["gram", "covariance"])
def test_fullgraph_with_dynamic_shapes(side, everyone):
    for each in everyone:
        outcomes, compilations = each[f"{side} compiled"]
        for compiled, eager in zip(outcomes[::2], outcomes[1::2], strict=True):
            for kind in ("values", "gradients"):
                pairs = zip(getattr(compiled, kind), getattr(eager, kind), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        assert compilations[-1] == compilations[0], compilations


def test_opcheck(everyone):
    for each in everyone:
        assert each["checked"] == ["vicreg_ranks_forward", "vicreg_ranks_backward"] * 2
