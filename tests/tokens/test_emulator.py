"""Tier 3: the bodies of the tokens ops' CUDA kernels, and what launches them, under the emulator.

They run on CPU tensors behind the public functions, as backend "cuda", on a device of 4
multiprocessors.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers import native
from tests.tokens.cases import (
    DTYPES,
    KINDS,
    LAYOUTS,
    check_assembly,
    check_gather,
    check_loss,
    check_out_of_range,
    check_scatter,
    draw,
    mask,
    run,
    same,
)
from vicreg_kernels.core import dispatch, loader
from vicreg_kernels.tokens import assemble_tokens, contract, gather_tokens, prediction_loss

# Rows of one warp's width and of more than it keeps, aligned and not.
DIMS = [1, 5, 8, 40, 264, 193]
SIZES = [(1, 5, 3), (3, 17, 9), (2, 40, 40)]


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(native.emulated("tokens")))
    return loader.compiled("tokens", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("repeat", [False, True])
def test_gather_and_scatter(dim, dtype, repeat):
    for batch, tokens, kept in SIZES:
        packed = [kept, 0, tokens][:batch]
        for index_dtype, count in ((torch.int64, kept), (torch.int32, packed)):
            chosen = mask(batch, tokens, count, dtype=index_dtype, repeat=repeat)
            check_gather("cuda", draw(batch, tokens, dim, dtype=dtype), chosen, repeats=kept)
            if not repeat:
                z = draw(*chosen.index.shape, dim, dtype=dtype)
                check_scatter("cuda", z, chosen, tokens, 1.5)


def test_no_rows():
    x = draw(2, 5, 8)
    chosen = mask(2, 5, 0)
    check_gather("cuda", x, chosen)
    check_scatter("cuda", draw(2, 0, 8), chosen, 5, -2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    x = draw(3, 9, 16, dtype=dtype, layout=layout)
    check_gather("cuda", x, mask(3, 9, 5))
    check_gather("cuda", x, mask(3, 9, 5, repeat=True), repeats=5)
    z = draw(3, 5, 16, dtype=dtype, layout=layout)
    check_scatter("cuda", z, mask(3, 9, 5), 9, 0.0)
    teacher = draw(3, 9, 16, dtype=torch.float32, layout=layout, grad=False)
    check_loss("cuda", z, teacher, mask(3, 9, 5).index)
    check_assembly("cuda", z, mask(3, 9, 5), draw(16), mask(3, 9, 4), draw(9, 16))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dim", [*DIMS, 1600])
def test_loss(dim, normalize, kind):
    for batch, tokens, kept in SIZES:
        settings = {"kind": kind, "normalize_target": normalize, "beta": 0.7}
        teacher = draw(batch, tokens, dim, grad=False)
        check_loss(
            "cuda", draw(2 * batch, kept, dim), teacher, _twice(batch, tokens, kept), **settings
        )
        packed = mask(batch, tokens, [kept, 0, tokens][:batch], dtype=torch.int32)
        pred = draw(packed.index.shape[0], dim)
        check_loss("cuda", pred, teacher, packed.index, offsets=packed.offsets, **settings)


def _twice(batch, tokens, kept):
    return torch.cat([mask(batch, tokens, kept).index for _ in range(2)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("teacher_dtype", DTYPES)
@pytest.mark.parametrize("dim", [24, 25])
def test_loss_of_every_pair_of_dtypes(dtype, teacher_dtype, dim):
    teacher = draw(2, 9, dim, dtype=teacher_dtype, grad=False)
    check_loss("cuda", draw(2, 5, dim, dtype=dtype), teacher, mask(2, 9, 5).index)


@pytest.mark.parametrize("beta", [0.0, 2.0])
def test_beta(beta):
    check_loss("cuda", draw(2, 5, 24), draw(2, 9, 24, grad=False), mask(2, 9, 5).index, beta=beta)


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 8, 40, 33])
def test_assembly(dim, dtype, rows, table):
    for ordered, repeat in ((True, False), (False, False), (False, True), (True, True)):
        settings = {"ordered": ordered, "repeat": repeat, "dtype": torch.int32}
        dense = mask(2, 30, 9, **settings), mask(4, 30, 17, **settings)
        packed = mask(3, 30, [9, 0, 4], **settings), mask(3, 30, [0, 5, 30], **settings)
        for kept, wanted in (dense, packed):
            context = draw(*kept.index.shape, dim, dtype=dtype)
            shape = (*wanted.index.shape, dim) if rows else (dim,)
            token = draw(*shape, dtype=dtype)
            check_assembly("cuda", context, kept, token, wanted, draw(30, dim) if table else None)


def test_assembly_of_more_tokens_than_a_block():
    kept, wanted = mask(2, 3000, 700, ordered=True), mask(2, 3000, 1500)
    check_assembly("cuda", draw(2, 700, 8), kept, draw(8), wanted)
    kept, wanted = mask(2, 3000, [700, 1300], ordered=True), mask(2, 3000, [0, 600])
    check_assembly("cuda", draw(2000, 8), kept, draw(8), wanted)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim", [16, 9])
def test_nan_and_inf_spread_as_in_the_reference(kind, bad, dim):
    index = mask(2, 6, 4).index
    for place in ("pred", "teacher"):
        pred, teacher = draw(2, 4, dim), draw(2, 6, dim, grad=False)
        with torch.no_grad():
            (pred[1, 2] if place == "pred" else teacher[1, index[1, 2]])[5] = bad

        def outcome(backend, pred=pred, teacher=teacher):
            loss = prediction_loss(pred, teacher, index, kind=kind, backend=backend)
            return loss.detach(), *torch.autograd.grad(loss, pred)

        for mine, theirs in zip(outcome("cuda"), outcome("reference"), strict=True):
            assert torch.equal(mine.isnan(), theirs.isnan())


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dim", [8, 5])
def test_indices_out_of_range_are_never_followed(kernels, bad, dtype, dim):
    check_out_of_range(kernels, bad, dtype, dim)


@pytest.mark.parametrize("offsets", [[0, 9, 3], [-5, 1, 99], [0, 0, 0], [2, 1, 0]])
def test_broken_offsets_stay_in_bounds(kernels, offsets):
    at = torch.tensor(offsets)
    x, index = torch.randn(2, 5, 8), torch.tensor([0, 4, 2])
    kernels.gather(x, index, at)
    rows = torch.randn(3, 8)
    kernels.scatter(rows, index, at, 2, 5, 0.0, True, False)
    _, saved = kernels.loss_forward(rows, x, index, at, 0, True, 1.0, 1e-5)
    kernels.loss_backward(torch.ones(()), rows, x, index, at, saved, 0, True, 1.0)
    kernels.order(index, index, at, at)


def outcomes():
    x, teacher = draw(3, 40, 40), draw(3, 40, 40, grad=False)
    chosen, kept, wanted = mask(3, 40, 30, repeat=True), mask(3, 40, 30), mask(3, 40, 20)
    token, table = draw(40), draw(40, 40)

    def loss(x):
        return prediction_loss(x, teacher, _first(40), backend="cuda")

    def assembled(x, token, table):
        made = assemble_tokens(
            x[:, :30], kept.index, token, wanted.index, positions=table, backend="cuda"
        )
        return made.tokens

    return (
        *run(lambda x: gather_tokens(x, chosen.index, backend="cuda"), x),
        *run(loss, x),
        *run(assembled, x, token, table),
    )


def _first(count):
    return torch.arange(count).expand(3, -1)


def test_any_order_of_blocks_gives_the_same_bits(monkeypatch):
    def results(seed):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        torch.manual_seed(1)
        return outcomes()

    first = results(0)
    for seed in (1, 2, 3):
        for a, b in zip(first, results(seed), strict=True):
            same(a, b, f"seed {seed}")


@pytest.mark.parametrize("count", [1, 132])
def test_any_number_of_multiprocessors(count, monkeypatch):
    monkeypatch.setenv("EMULATOR_MULTIPROCESSORS", str(count))
    check_loss("cuda", draw(3, 30, 40), draw(3, 40, 40, grad=False), mask(3, 40, 30).index)
    check_assembly(
        "cuda", draw(3, 30, 40), mask(3, 40, 30), draw(40), mask(3, 40, 200, repeat=True)
    )
