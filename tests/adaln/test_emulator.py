"""Tier 3: the bodies of the CUDA kernels, and what launches them, under the emulator.

They run on CPU tensors behind the public functions, as backend "cuda", on a device of 4
multiprocessors.
"""

from __future__ import annotations

import pytest
import torch

from tests.adaln.cases import (
    FORMS,
    LAYOUTS,
    MIXES,
    check_gate,
    check_norm,
    draw,
    run,
    same,
    vectors,
)
from tests.helpers import native
from vicreg_kernels.adaln import contract, gated_residual, modulated_layer_norm
from vicreg_kernels.core import dispatch, loader

# Teams of 1, 2, 4 and 8 warps, whole and not, with accesses of 16 bytes and without.
WIDTHS = [1, 24, 513, 520, 1032, 2056, 4096]


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(native.emulated("adaln")))
    return loader.compiled("adaln", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


@pytest.mark.parametrize("mix", MIXES, ids=str)
@pytest.mark.parametrize("dim", [24, 17])
def test_dtypes(dim, mix):
    for form in FORMS:
        check_norm("cuda", (2, 2, 11, dim), mix, form=form)
        check_gate("cuda", (2, 2, 11, dim), mix, form=form)


@pytest.mark.parametrize("dim", WIDTHS)
def test_widths(dim):
    """Of a frame of one token too, and of more tokens than a block takes."""
    for shape, form in (((2, 5, dim), "frame"), ((3, 1, dim), "frame"), ((1, 3, dim), "token")):
        check_norm("cuda", shape, form=form)
        check_gate("cuda", shape, form=form)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mix", [MIXES[0], MIXES[1]], ids=str)
def test_layouts(layout, mix):
    check_norm("cuda", (3, 5, 24), mix, layout=layout)
    check_gate("cuda", (3, 5, 24), mix, layout=layout)


@pytest.mark.parametrize("frames", [1, 40])
def test_frames_of_many_tokens(frames):
    """Several blocks a frame, and one, whose sums need no second launch."""
    check_norm("cuda", (frames, 150, 8))
    check_gate("cuda", (frames, 150, 8))


def test_longer_tokens_are_refused_by_name(kernels):
    x, v = torch.randn(1, 2, 4097), torch.randn(1, 4097)
    with pytest.raises(RuntimeError, match=r"^x: got 4097 elements a token, takes at most 4096"):
        kernels.norm_forward(x, v, v, 1e-6)
    with pytest.raises(RuntimeError, match=r"^backend='cuda' cannot run adaln here: .*4096"):
        modulated_layer_norm(x, v, v, backend="cuda")
    check_gate("cuda", (1, 2, 4097))


def outcomes(frames=3, tokens=40):
    x, y = draw(frames, tokens, 40), draw(frames, tokens, 40)
    shift, scale, gate = vectors(3, x.shape)
    return (
        *run(lambda *z: modulated_layer_norm(*z, backend="cuda"), x, shift, scale),
        *run(lambda *z: gated_residual(*z, backend="cuda"), x, y, gate),
    )


def test_any_order_of_blocks_gives_the_same_bits(monkeypatch):
    def results(seed):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        torch.manual_seed(1)
        return outcomes()

    first = results(0)
    for seed in (1, 2):
        same(results(seed), first)


@pytest.mark.parametrize("count", [1, 132])
def test_any_number_of_multiprocessors(count, monkeypatch):
    monkeypatch.setenv("EMULATOR_MULTIPROCESSORS", str(count))
    check_norm("cuda", (3, 40, 24))
    check_gate("cuda", (3, 40, 24))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_stays_in_its_token(bad):
    x = draw(2, 3, 24, grad=False)
    x[1, 2, 5] = bad
    leaves = [x.requires_grad_(), *vectors(2, x.shape)]
    mine, theirs = (
        run(lambda *z, name=name: modulated_layer_norm(*z, backend=name), *leaves)
        for name in ("cuda", "reference")
    )
    for actual, expected in zip(mine, theirs, strict=True):
        assert torch.equal(actual.isnan(), expected.isnan())
