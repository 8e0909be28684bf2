"""Tier 2: the CPU kernels of the tokens ops against the float64 reference, on random shapes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.tokens.cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    check_assembly,
    check_gather,
    check_loss,
    check_scatter,
    draw,
    mask,
    same,
)
from vicreg_kernels.core import dispatch
from vicreg_kernels.tokens import assemble_tokens, gather_tokens, prediction_loss

pytestmark = pytest.mark.skipif(
    dispatch.missing("cpu", "cpu", torch.float32) is not None, reason="the cpu backend is not built"
)

dtypes = st.sampled_from(DTYPES)
index_dtypes = st.sampled_from([torch.int32, torch.int64])
layouts = st.sampled_from(list(LAYOUTS))
dims = st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 40, 65])


@st.composite
def masks(draw_, batch, tokens, repeat=False, least=0):
    """Equal for every sample, or packed with empty and full samples."""
    most = tokens + 3 if repeat else tokens
    settings = {"dtype": draw_(index_dtypes), "repeat": repeat, "ordered": draw_(st.booleans())}
    if draw_(st.booleans()):
        return mask(batch, tokens, draw_(st.integers(least, most)), **settings)
    counts = [draw_(st.sampled_from([0, 1, tokens, tokens // 2])) for _ in range(batch)]
    if sum(counts) < least:
        counts[0] = least
    return mask(batch, tokens, counts, **settings)


sizes = st.tuples(st.integers(1, 4), st.integers(1, 12))


@settings(max_examples=80)
@given(data=st.data(), size=sizes, dim=dims, dtype=dtypes, layout=layouts, repeat=st.booleans())
def test_gather(data, size, dim, dtype, layout, repeat):
    batch, tokens = size
    chosen = data.draw(masks(batch, tokens, repeat))
    x = draw(batch, tokens, dim, dtype=dtype, layout=layout)
    check_gather("cpu", x, chosen, repeats=tokens + 3)


@settings(max_examples=60)
@given(data=st.data(), size=sizes, dim=dims, dtype=dtypes, layout=layouts)
def test_scatter(data, size, dim, dtype, layout):
    batch, length = size
    chosen = data.draw(masks(batch, length))
    if chosen.offsets is not None and layout == "batch_last":
        layout = "transposed"
    z = draw(*chosen.index.shape, dim, dtype=dtype, layout=layout)
    fill = data.draw(st.sampled_from([0.0, -1.5, float("inf")]))
    check_scatter("cpu", z, chosen, length, fill)


@settings(max_examples=120)
@given(
    data=st.data(),
    size=sizes,
    dim=dims,
    dtype=dtypes,
    teacher_dtype=dtypes,
    layout=layouts,
    teacher_layout=layouts,
    kind=st.sampled_from(KINDS),
    normalize=st.booleans(),
    beta=st.sampled_from([0.0, 0.3, 1.0, 4.0]),
)
def test_loss(data, size, dim, dtype, teacher_dtype, layout, teacher_layout, kind, normalize, beta):
    batch, tokens = size
    chosen = data.draw(masks(batch, tokens, repeat=data.draw(st.booleans()), least=1))
    if chosen.offsets is not None and layout == "batch_last":
        layout = "transposed"
    pred = draw(*chosen.index.shape, dim, dtype=dtype, layout=layout)
    teacher = draw(batch, tokens, dim, dtype=teacher_dtype, layout=teacher_layout, grad=False)
    check_loss(
        "cpu", pred, teacher, chosen.index,
        kind=kind, normalize_target=normalize, beta=beta, **chosen.settings,
    )  # fmt: skip


@pytest.mark.parametrize("reduction", ["masks", "tokens"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_several_masks(kind, reduction):
    teacher = draw(3, 20, 33, grad=False)
    chosen = [mask(3, 20, k) for k in (4, 9, 1)]
    preds = [draw(3, k, 33) for k in (4, 9, 1)]
    check_loss("cpu", preds, teacher, [m.index for m in chosen], kind=kind, reduction=reduction)
    packed = [mask(3, 20, counts) for counts in ((4, 0, 2), (1, 20, 0))]
    preds = [draw(m.index.shape[0], 33) for m in packed]
    check_loss(
        "cpu", preds, teacher, [m.index for m in packed],
        kind=kind, reduction=reduction, offsets=[m.offsets for m in packed],
    )  # fmt: skip


@pytest.mark.parametrize("contexts", [1, 2])
def test_loss_of_mask_major_predictions(contexts):
    teacher = draw(3, 20, 33, grad=False)
    index = [mask(3, 20, 6).index for _ in range(4)]
    check_loss("cpu", draw(4 * contexts * 3, 6, 33), teacher, index)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_of_difficult_rows(kind, scale, offset):
    """Long rows, small and large spreads, a common offset, constant rows."""
    teacher = draw(2, 8, 1280, grad=False) * scale + offset
    teacher[0, 3] = offset
    chosen = mask(2, 8, 8)
    check_loss("cpu", draw(2, 8, 1280), teacher, chosen.index, kind=kind)


@settings(max_examples=60)
@given(
    data=st.data(), size=sizes, dim=dims, dtype=dtypes, layout=layouts, table=st.booleans(),
    rows=st.booleans(), targets=st.integers(1, 3),
)  # fmt: skip
def test_assembly(data, size, dim, dtype, layout, table, rows, targets):
    batch, tokens = size
    tokens += 1
    repeat = data.draw(st.booleans())  # equal positions keep their order
    settings = {
        "dtype": data.draw(index_dtypes),
        "repeat": repeat,
        "ordered": data.draw(st.booleans()),
    }
    if data.draw(st.booleans()):
        kept = mask(batch, tokens, data.draw(st.integers(1, tokens)), **settings)
        wanted = mask(targets * batch, tokens, data.draw(st.integers(0, tokens)), **settings)
    else:
        counts = st.sampled_from([0, 1, tokens, tokens // 2])
        kept, wanted = (
            mask(batch, tokens, [data.draw(counts) for _ in range(batch)], **settings) for _ in "ct"
        )
        layout = "contiguous" if layout == "batch_last" else layout
        assume(kept.index.numel() + wanted.index.numel() > 0)
    context = draw(*kept.index.shape, dim, dtype=dtype, layout=layout)
    shape = (*wanted.index.shape, dim) if rows else (dim,)
    token = draw(*shape, dtype=dtype if rows else torch.float32)
    positions = draw(tokens, dim) if table else None
    check_assembly("cpu", context, kept, token, wanted, positions)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["pred", "teacher"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_inf_spread_as_in_the_reference(kind, normalize, place, bad, dtype):
    pred, teacher = draw(2, 4, 40, dtype=dtype), draw(2, 6, 40, dtype=dtype, grad=False)
    index = mask(2, 6, 4).index
    with torch.no_grad():
        if place == "pred":
            pred[1, 2, 5] = bad
        else:
            teacher[1, index[1, 2], 5] = bad

    def outcome(backend):
        loss = prediction_loss(
            pred, teacher, index, kind=kind, normalize_target=normalize, backend=backend
        )
        return loss.detach(), *torch.autograd.grad(loss, pred)

    for mine, theirs in zip(outcome("cpu"), outcome("reference"), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())
        assert torch.equal(mine[mine.isinf()], theirs[theirs.isinf()])


def test_rows_move_with_their_bits():
    """NaN payloads and infinities go through a gather untouched."""
    x = torch.tensor([[[0x7FC0DEAD, 0x7F800000, -1, 3]]], dtype=torch.int32).view(torch.float32)
    out = gather_tokens(x, torch.zeros(1, 1, dtype=torch.int32), backend="cpu")
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))


def test_inputs_are_not_written():
    pred, teacher = draw(2, 4, 40), draw(2, 6, 40, grad=False)
    index = mask(2, 6, 4).index
    kept = [z.detach().clone() for z in (pred, teacher, index)]
    prediction_loss(pred, teacher, index, backend="cpu").backward()
    gather_tokens(pred, index % 4, backend="cpu")
    for z, before in zip((pred, teacher, index), kept, strict=True):
        assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(threads):
    pred, teacher = draw(4, 50, 300), draw(4, 64, 300, grad=False)
    index = mask(4, 64, 50).index
    context, token = draw(4, 64, 300), draw(300)
    kept, wanted = mask(4, 64, 64), mask(4, 64, 50)
    before = torch.get_num_threads()

    def results():
        from vicreg_kernels.tokens import assemble_tokens

        loss = prediction_loss(pred, teacher, index, backend="cpu")
        made = assemble_tokens(context, kept.index, token, wanted.index, backend="cpu").tokens
        grads = torch.autograd.grad(made.sum(), (context, token))
        return loss.detach(), *torch.autograd.grad(loss, pred), *grads

    try:
        torch.set_num_threads(3)
        expected = results()
        torch.set_num_threads(threads)
        for mine, theirs in zip(results(), expected, strict=True):
            same(mine, theirs, f"{threads} threads")
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtypes", [(torch.int32, torch.int64), (torch.int64, torch.int32)])
@pytest.mark.parametrize("packed", [False, True])
def test_assembly_of_two_index_dtypes_gives_the_wider(dtypes, packed) -> None:
    shape, offsets = ((3,), {"context_offsets": [0, 3], "target_offsets": [0, 2]})
    if not packed:
        shape, offsets = (1, 3), {}
    index = torch.tensor([4, 0, 2], dtype=dtypes[0]).reshape(shape)
    target = torch.tensor([1, 3], dtype=dtypes[1]).reshape(*shape[:-1], 2)
    for backend in ("reference", "cpu"):
        made = assemble_tokens(
            torch.randn(*shape, 5), index, torch.zeros(5), target, backend=backend, **offsets
        )
        assert made.index.flatten().tolist() == [0, 1, 2, 3, 4]
        assert {z.dtype for z in made[1:4]} == {torch.int64}, backend


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_targets_wider_than_the_context_are_rounded_once(dtype, packed) -> None:
    """target + position in float32, then to the context's dtype: the bits of the reference."""
    torch.manual_seed(0)
    shape, offsets = ((3,), {"context_offsets": [0, 3], "target_offsets": [0, 4]})
    if not packed:
        shape, offsets = (1, 3), {}
    context = torch.randn(*shape, 64).to(dtype).requires_grad_()
    rows = torch.randn(*shape[:-1], 4, 64, requires_grad=True)
    table = torch.randn(7, 64, requires_grad=True)
    index = torch.tensor([4, 0, 2]).reshape(shape)
    target = torch.tensor([1, 3, 6, 5]).reshape(*shape[:-1], 4)
    runs = []
    for backend in ("reference", "cpu"):
        tokens = assemble_tokens(
            context, index, rows, target, positions=table, backend=backend, **offsets
        ).tokens
        leaves = (context, rows, table)
        gradients = torch.autograd.grad((tokens.float() ** 2).sum(), leaves)
        assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
        runs.append((tokens, *gradients))
    for one, two in zip(*runs, strict=True):
        assert torch.equal(one, two)
