"""Tier 6: Barlow Twins on two gloo ranks is held to float64 on the whole batch as every backend is;
what torch expects of its ops; its backward exchanges nothing.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers import gloo
from tests.helpers.recorded_ops import RecordedOps
from tests.helpers.tolerances import FEWEST_ROUNDINGS, assert_close_to_truth, differentiate
from tests.vicreg.test_ranks import rows_of, together
from vicreg_kernels.barlow import barlow_twins_loss, ranks

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs gloo",
)
# (N, D), dtype, convention; the last has several chunks.
PAIRS = {
    f"{rows}x{dim} {str(dtype)[6:]} {convention}": ((rows, dim), dtype, convention)
    for rows, dim in ((40, 70), (70, 40))
    for dtype, convention in (
        (torch.float32, "barlow_twins"),
        (torch.float32, "monai"),
        (torch.bfloat16, "lightly"),
        (torch.float16, "solo_learn"),
    )
} | {"300x260 float32": ((300, 260), torch.float32, "barlow_twins")}
WEIGHT = (0.5,)


def pair(name):
    """Correlated views with a common offset and scales that differ, strided."""
    shape, dtype, _ = PAIRS[name]
    torch.manual_seed(1)
    offset = 1e3 if dtype == torch.float32 else 1.0
    scale = torch.logspace(-1, 1, shape[1])
    base = torch.randn(shape)
    views = [(base + torch.randn(shape)) * scale + offset * scale for _ in "xy"]
    return [torch.stack((z, z), dim=-1)[..., 0].to(dtype) for z in views]


def loss(name):
    convention = PAIRS[name][2]
    return lambda x, y, **settings: barlow_twins_loss(x, y, convention=convention, **settings)


def fullgraph(rank, shapes):
    """Compiled and eager outcomes, and the compilations: shapes on one side."""

    def function(x, y):
        return barlow_twins_loss(2.0 * x, y, process_group=True)

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    outcomes, compilations = [], []
    for rows, dim in shapes:
        torch.manual_seed(2)
        views = [torch.randn(rows + 2 * rank, dim).requires_grad_() for _ in "xy"]
        outcomes += [differentiate(f, *views, cotangents=WEIGHT) for f in (compiled, function)]
        compilations.append(counter.frame_count)
    return outcomes, compilations


def penalty(views, rank):
    """Gradient of the squared gradient of the reference."""
    mine = [rows_of(z, rank) for z in views]
    value = barlow_twins_loss(*mine, backend="reference", process_group=True)
    grads = torch.autograd.grad(value, mine, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in grads), mine)


def worker(rank, _):
    ranks.CHUNK_ELEMENTS, kept = 1, ranks.CHUNK_ELEMENTS
    results = {}
    for name in PAIRS:
        views = [rows_of(z, rank) for z in pair(name)]
        function = partial(loss(name), process_group=True)
        for again in (name, f"{name} again"):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                results[again] = differentiate(function, *views, cotangents=WEIGHT)
    views[0].requires_grad_(False)
    results["only y"] = differentiate(function, *views, cotangents=WEIGHT)
    ranks.CHUNK_ELEMENTS = kept
    results["penalty"] = penalty([z.double() for z in pair("40x70 float32 barlow_twins")], rank)
    results["gram"] = fullgraph(rank, [(5, 40), (6, 30)])
    results["correlation"] = fullgraph(rank, [(20, 5), (30, 6)])
    for shape in ((4, 20), (20, 4)):
        views = [torch.randn(shape).requires_grad_() for _ in "xy"]
        with RecordedOps() as ops:
            barlow_twins_loss(*views, process_group=True).backward()
        for op, args in ops.calls:
            args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
            torch.library.opcheck(getattr(torch.ops.vicreg_kernels, op).default, tuple(args))
            results.setdefault("checked", []).append(op)
    (grad,) = torch.autograd.grad(
        barlow_twins_loss(*views, process_group=True), views[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="differentiates once"):
        grad.square().sum().backward()
    constant = torch.randn(4, 6)
    constant[:, 2] = 1.0
    x, y = constant.clone().requires_grad_(), torch.randn(4, 6)
    barlow_twins_loss(x, y, convention="monai", process_group=True).backward()
    results["constant"] = x.grad
    return results


@pytest.fixture(scope="module")
def everyone():
    return gloo.on_two("barlow.test_ranks")


def reference(name, wide):
    views = [(z.double() if wide else z).detach().requires_grad_() for z in pair(name)]
    function = loss(name)
    return differentiate(lambda *v: function(*v, backend="reference"), *views, cotangents=WEIGHT)


@pytest.mark.parametrize("name", PAIRS)
def test_loss_and_gradients(name, everyone):
    """The rule of tolerances.py; autocast lowers nothing; two runs are equal."""
    shape, dtype, _ = PAIRS[name]
    outcome = together([each[name] for each in everyone])
    again = together([each[f"{name} again"] for each in everyone])
    plain, truth = (reference(name, wide) for wide in (False, True))
    length = max(sum(shape), FEWEST_ROUNDINGS)
    for kind in ("values", "gradients"):
        for i, (mine, twice, true, formula) in enumerate(
            zip(*(getattr(o, kind) for o in (outcome, again, truth, plain)), strict=True)
        ):
            assert_close_to_truth(mine, true, formula, dtype, length, f"{kind} {i}")
            assert mine.dtype == (torch.float32 if kind == "values" else dtype)
            assert torch.equal(mine, twice)


def test_gradient_of_one_view(everyone):
    both = together([each[list(PAIRS)[-1]] for each in everyone])
    only = together([each["only y"] for each in everyone])
    assert only.gradients[0] is None
    assert torch.equal(only.gradients[1], both.gradients[1])


def test_constant_column(everyone):
    """Its standard deviation has no derivative; the other columns have theirs."""
    for each in everyone:
        assert each["constant"].isfinite().all()


def test_reference_differentiates_twice(everyone):
    """d/dz sum_ranks |R g_own|^2 = R^2 d|g|^2/dz, with g the whole batch's gradient."""
    views = [z.double().requires_grad_() for z in pair("40x70 float32 barlow_twins")]
    grads = torch.autograd.grad(barlow_twins_loss(*views), views, create_graph=True)
    expected = torch.autograd.grad(sum(g.square().sum() for g in grads), views)
    for v in range(2):
        mine = torch.cat([each["penalty"][v] for each in everyone])
        torch.testing.assert_close(mine, 4 * expected[v], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("side", ["gram", "correlation"])
def test_fullgraph_with_dynamic_shapes(side, everyone):
    for each in everyone:
        outcomes, compilations = each[side]
        for compiled, eager in zip(outcomes[::2], outcomes[1::2], strict=True):
            for kind in ("values", "gradients"):
                pairs = zip(getattr(compiled, kind), getattr(eager, kind), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
        assert compilations[-1] == compilations[0], compilations


def test_opcheck(everyone):
    for each in everyone:
        assert each["checked"] == ["barlow_ranks_forward", "barlow_ranks_backward"] * 2
