"""Tier 6: the EMA op under torch's own machinery: opcheck, compile, autograd, memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from bench.measure import peak_memory
from tests.ema import tensors as ema_tensors
from tests.ema.tensors import ROUNDINGS, assert_same_bits
from tests.helpers import inductor
from vicreg_kernels.ema import EMA, ema_update_

OP = torch.ops.vicreg_kernels.ema_update_.default


def lists(device, shadows=True):
    targets = [torch.randn(5, 3), torch.randn(7).bfloat16(), torch.randn(2, 2).half()]
    onlines = [torch.randn(5, 3).bfloat16(), torch.randn(7), torch.randn(2, 2)]
    copies = [torch.empty_like(t, dtype=torch.bfloat16) for t in targets] if shadows else []
    return [[t.to(device) for t in ts] for ts in (targets, onlines, copies)]


@pytest.mark.parametrize("shadows", [True, False])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_opcheck(fused, shadows, as_tensor):
    targets, onlines, copies = lists(fused.device, shadows)
    momentum = torch.tensor(0.9, device=fused.device) if as_tensor else None
    step = torch.tensor(3, device=fused.device) if as_tensor else None
    torch.library.opcheck(
        OP, (targets, onlines, copies, fused.name, momentum, 0.9, True, 5, step, 3)
    )


@pytest.mark.parametrize(
    ("backend", "rounding"),
    [
        ("aot_eager", "nearest"),
        ("aot_eager", "stochastic"),
        pytest.param("inductor", "stochastic", marks=pytest.mark.thorough),
    ],
)
def test_fullgraph_training_step(fused, backend, rounding):
    """A loss against the teacher and the update of the teacher in one graph, its gradient outside,
    give what they give eagerly.
    """

    def step(x, weight, teachers, shadows, momentum, number):
        loss = (torch.tanh(x @ weight) - x @ teachers[0].float()).square().mean()
        ema_update_(
            teachers, [weight], momentum, shadows=shadows, rounding=rounding, step=number,
            backend=fused.name,
        )  # fmt: skip
        return loss, teachers[0].float().sum()

    x = torch.randn(8, 6, device=fused.device)
    start, first = torch.randn(2, 6, 6, device=fused.device)
    runs = []
    with inductor.anew():
        compiled = torch.compile(step, fullgraph=True, backend=backend)
        for function in (step, compiled):
            weight = first.clone().requires_grad_()
            teachers = [start.bfloat16() if rounding == "stochastic" else start.clone()]
            shadows = [torch.empty_like(start, dtype=torch.float16)]
            results = []
            for number in range(3):
                momentum = torch.tensor(0.5 + 0.1 * number, device=fused.device)
                where = torch.tensor(number, device=fused.device)
                loss, total = function(x, weight, teachers, shadows, momentum, where)
                loss.backward()
                results += [loss.detach(), total.detach(), weight.grad.clone()]
                with torch.no_grad():
                    weight.sub_(weight.grad)
            runs.append((*results, *teachers, *shadows))
    assert not torch.equal(runs[0][-2].float(), start)
    for eager, other in zip(*runs, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-5, atol=1e-5)


def test_a_schedule_of_tensors_compiles_once(fused):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda t, o, m, n: ema_update_([t], [o], m, rounding="stochastic", step=n),
        fullgraph=True,
        backend=counter,
    )
    t, o = torch.randn(2, 40, device=fused.device).bfloat16()
    expected = t.clone()
    for number in range(5):
        m, n = torch.tensor(0.9 + 0.01 * number), torch.tensor(number)
        compiled(t, o, m.to(fused.device), n.to(fused.device))
        ema_update_([expected], [o], m, rounding="stochastic", step=n)
    assert_same_bits([t], [expected], "targets")
    assert counter.frame_count == 1


def test_numbers_that_change_under_compile(fused):
    compiled = torch.compile(
        lambda t, o, m, n: ema_update_([t], [o], m, rounding="stochastic", step=n),
        fullgraph=True,
        backend="aot_eager",
    )
    t, o = torch.randn(2, 40, device=fused.device).bfloat16()
    expected = t.clone()
    for number in range(5):
        compiled(t, o, 0.9 + 0.01 * number, number)
        ema_update_([expected], [o], 0.9 + 0.01 * number, rounding="stochastic", step=number)
    assert_same_bits([t], [expected], "targets")


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_checks_that_a_graph_cannot_make_are_made_at_run_time(fused, backend):
    compiled = torch.compile(
        lambda t, o, m: ema_update_([t], [o], m), fullgraph=True, backend=backend
    )
    t = torch.ones(4, device=fused.device)
    if fused.device == "cpu":
        with pytest.raises(ValueError, match=r"momentum: got 1\.5"):
            compiled(t, torch.zeros_like(t), torch.tensor(1.5))
    assert t.eq(1).all()
    base = torch.ones(8)
    with pytest.raises(ValueError, match="overlaps"):
        ema_update_([base[:5]], [base[3:]], 0.5)


def test_version_counters(fused):
    """A backward through a value that the update has changed is an error, not a wrong gradient."""
    targets, onlines, copies = lists(fused.device)
    before = [t._version for t in (*targets, *copies, *onlines)]
    ema_update_(targets, onlines, 0.9, shadows=copies, backend=fused.name)
    after = [t._version for t in (*targets, *copies, *onlines)]
    count = len(targets) + len(copies)
    assert all(b > a for a, b in zip(before[:count], after[:count], strict=True))
    assert before[count:] == after[count:]
    x = torch.randn(5, 3, device=fused.device, requires_grad=True)
    out = (x * targets[0]).sum()
    ema_update_(targets, onlines, 0.9, backend=fused.name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_no_graph_is_recorded(fused):
    """Parameters on both sides, gradients enabled: the targets stay leaves without a history."""
    t = nn.Parameter(torch.randn(6, device=fused.device))
    o = nn.Parameter(torch.randn(6, device=fused.device))
    expected = torch.lerp(t.detach(), o.detach(), 0.1)
    # Triton compiles here, and may warn of itself
    ema_update_([t.detach().clone()], [o], 0.9, backend=fused.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ema_update_([t], [o], 0.9, backend=fused.name)
        (t * o).sum().backward()
    torch.testing.assert_close(t.detach(), expected)
    assert t.is_leaf
    assert t.requires_grad
    assert torch.equal(o.grad, t.detach())


def test_inference_mode(fused):
    with torch.inference_mode():
        t, o = torch.ones(4, device=fused.device), torch.zeros(4, device=fused.device)
        ema_update_([t], [o], 0.5, backend=fused.name)
        assert t.eq(0.5).all()


def test_conjugated_and_negated_views():
    """Memory that means its negative."""
    z = torch.randn(6, dtype=torch.complex64)
    t, o = torch.randn(6), z.conj().imag
    assert o.is_neg()
    expected = torch.lerp(t, o.clone(), 0.25)
    ema_update_([t], [o], 0.75)
    torch.testing.assert_close(t, expected)


def test_autocast_changes_nothing(fused):
    targets, onlines, copies = lists(fused.device)
    again = [ema_tensors.again(z) for z in (targets, copies)]
    ema_update_(targets, onlines, 0.9, shadows=copies, backend=fused.name)
    with torch.autocast(fused.device, dtype=torch.bfloat16):
        ema_update_(again[0], onlines, 0.9, shadows=again[1], backend=fused.name)
    assert_same_bits(again[0] + again[1], targets + copies, "tensors")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_two_runs_are_bitwise_equal(fused, rounding):
    targets, onlines, copies = lists(fused.device)
    runs = []
    for _ in range(2):
        mine, own = ema_tensors.again(targets), ema_tensors.again(copies)
        ema_update_(mine, onlines, 0.9, shadows=own, rounding=rounding, step=3, backend=fused.name)
        runs.append(mine + own)
    assert_same_bits(*runs, "tensors")


@pytest.mark.parametrize("kind", ["float32", "half and shadow", "strided"])
def test_no_temporary_of_a_tensors_size(fused, kind):
    """A thousandth of the tensors at most: tables of addresses, not copies. Triton's table holds 8
    bytes for each 1024 elements of a strided tensor, twice that share.
    """
    shape = (1000, 1000)
    t, o = torch.randn(shape, device=fused.device), torch.randn(shape, device=fused.device)
    shadow = None
    if kind == "half and shadow":
        o, shadow = o.bfloat16(), [torch.empty_like(t, dtype=torch.bfloat16)]
    if kind == "strided":
        o = o.t()
    peak = peak_memory(
        lambda: ema_update_([t], [o], 0.9, shadows=shadow, backend=fused.name), t.device
    )
    assert peak <= t.nbytes / (400 if fused.name == "triton" else 1000)


def test_thousands_of_tensors(fused):
    targets = [torch.full((k % 5 + 1,), float(k), device=fused.device) for k in range(3000)]
    onlines = [torch.zeros_like(t) for t in targets]
    ema_update_(targets, onlines, 0.5, backend=fused.name)
    assert all(t.eq(k / 2).all() for k, t in enumerate(targets))


def test_the_modules_update_in_one_graph(fused):
    """EMA.update under fullgraph, compiled once for a moving schedule."""
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).to(fused.device)
    settings = {"schedule": "cosine", "total_steps": 5, "shadow_dtype": torch.bfloat16}
    eager, graphed = (EMA(model, 0.9, **settings).to(fused.device) for _ in range(2))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda: graphed.update(model), fullgraph=True, backend=counter)
    for _ in range(4):
        with torch.no_grad():
            for z in model.parameters():
                z.add_(0.1)
        eager.update(model)
        compiled()
    for a, b in zip(eager.state_dict().values(), graphed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert counter.frame_count <= 2
