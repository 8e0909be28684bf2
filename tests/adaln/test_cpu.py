"""Tier 2: the fused backends against the float64 reference.

Written for the C++ CPU kernels and run on every fused backend the machine has.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adaln.cases import (
    FORMS,
    LAYOUTS,
    MIXES,
    SHAPES,
    check,
    check_gate,
    check_norm,
    draw,
    run,
    same,
    vectors,
)
from vicreg_kernels.adaln import gated_residual, modulated_layer_norm

# Of those that follow, Triton's kernels are compiled for few: float32 and what autocast makes of it
# in accesses of one element and of 16 bytes, float16 in the latter.
FEW = {(3, 5, 7): MIXES[:4:3], (2, 3, 4, 16): MIXES[::3]}


@pytest.mark.triton_takes(lambda shape, mix, **_: mix in FEW.get(shape, ()))
@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_dtypes(fused, shape, mix):
    for form in FORMS:
        check_norm(fused.name, shape, mix, form=form, device=fused.device)
        check_gate(fused.name, shape, mix, form=form, device=fused.device)


@pytest.mark.triton_takes(lambda layout, **_: layout in ("sliced", "transposed"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(fused, layout):
    for shape in ((3, 5, 24), (2, 3, 5, 17)):
        check_norm(fused.name, shape, layout=layout, device=fused.device)
        check_gate(fused.name, shape, layout=layout, device=fused.device)


# How an incoming gradient may lie: as sum() makes it, and transposed.
GRADS = {
    "expanded": lambda out: out.new_ones(()).expand(out.shape),
    "transposed": lambda out: torch.randn_like(out.mT.contiguous()).mT,
}


@pytest.mark.triton_takes(lambda **_: False)
@pytest.mark.parametrize("grad", GRADS)
def test_incoming_gradients_of_any_strides(fused, grad):
    torch.manual_seed(0)
    x, y = (draw(2, 3, 5, 17, device=fused.device) for _ in "xy")
    shift, scale, gate = vectors(3, x.shape, device=fused.device)
    drawn = GRADS[grad](x.detach())
    for function, leaves in (
        (modulated_layer_norm, (x, shift, scale)),
        (gated_residual, (x, y, gate)),
    ):
        check(function, fused.name, *leaves, grad=lambda out: drawn.to(out.dtype))


@pytest.mark.triton_takes(lambda **_: False)
@settings(max_examples=60)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 2, 15, 16, 17, 40])),
    mix=st.sampled_from(MIXES),
    form=st.sampled_from(FORMS),
    layout=st.sampled_from(sorted(LAYOUTS)),
    eps=st.sampled_from([1e-6, 1e-2, 3.0]),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seed=st.integers(0, 2**31),
)
def test_random(fused, shape, mix, form, layout, eps, needs, seed):
    torch.manual_seed(seed)
    where = {"device": fused.device}
    x, y = (draw(*shape, dtype=d, layout=layout, grad=False, **where) for d in mix[:2])
    shift, scale, gate = (z.detach() for z in vectors(3, shape, form, dtype=mix[2], **where))

    def asking(*leaves):
        return [z.detach().requires_grad_(need) for z, need in zip(leaves, needs, strict=True)]

    check(modulated_layer_norm, fused.name, *asking(x, shift, scale), eps=eps)
    check(gated_residual, fused.name, *asking(x, y, gate))


@pytest.mark.triton_takes(lambda **_: False)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)])
def test_gradients_of_some(fused, needs):
    """Each alone has the bits that it has among all."""
    x, y = (draw(2, 200, 33, device=fused.device) for _ in "xy")
    shift, scale, gate = vectors(3, x.shape, device=fused.device)
    for function, leaves in (
        (modulated_layer_norm, (x, shift, scale)),
        (gated_residual, (x, y, gate)),
    ):
        every = run(lambda *z, f=function: f(*z, backend=fused.name), *leaves)
        some = [
            z.detach().requires_grad_(bool(need)) for z, need in zip(leaves, needs, strict=True)
        ]
        results = run(lambda *z, f=function: f(*z, backend=fused.name), *some)
        same(results[1:], [z for z, need in zip(every[1:], needs, strict=True) if need])


@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_threads_gives_the_same_bits(fused, threads):
    if fused.device != "cpu":
        pytest.skip("threads of the CPU")
    x, y = (draw(2, 700, 40) for _ in "xy")
    shift, scale, gate = vectors(3, x.shape)

    def outcome():
        return (
            *run(lambda *z: modulated_layer_norm(*z, backend="cpu"), x, shift, scale),
            *run(lambda *z: gated_residual(*z, backend="cpu"), x, y, gate),
        )

    expected, before = outcome(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        same(outcome(), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("size", "offset"), [(1e6, 0.0), (1e-2, 0.0), (1.0, 1e3)])
def test_scales_and_offsets(fused, size, offset):
    x = (draw(3, 5, 40, grad=False, device=fused.device) * size + offset).requires_grad_()
    shift, scale = vectors(2, x.shape, device=fused.device)
    if size < 1:  # where eps counts
        check(modulated_layer_norm, fused.name, x, shift, scale, eps=1e-4)
    check(modulated_layer_norm, fused.name, x, shift, scale)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_stays_in_its_token(fused, bad):
    """NaN where float32 does not hold the squares too, and not a finite wrong `shift`."""
    x = draw(2, 3, 20, grad=False, device=fused.device)
    x[1, 2, 5] = bad
    shift, scale = vectors(2, x.shape, device=fused.device)
    results = {}
    for backend in (fused.name, "reference"):
        leaves = [z.detach().requires_grad_() for z in (x, shift, scale)]
        results[backend] = run(
            lambda *z, name=backend: modulated_layer_norm(*z, backend=name), *leaves
        )
    for mine, theirs in zip(results[fused.name], results["reference"], strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
    out, grad_x, grad_shift, grad_scale = results[fused.name]
    assert out.isnan().all(-1).nonzero().tolist() == [[1, 2]]
    assert grad_x.isnan().all(-1).nonzero().tolist() == [[1, 2]]
    assert grad_shift.isfinite().all()
    assert grad_scale.isnan().all(-1).tolist() == [False, True]
