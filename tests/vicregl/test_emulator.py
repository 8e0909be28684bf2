"""Tier 3: the bodies of the VICRegL ops' CUDA kernels, and what launches them, under the emulator;
with AddressSanitizer and UBSan too.

They run on CPU tensors behind the ops, as backend "cuda", on a device of 4 multiprocessors.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import native
from tests.vicregl import matches as cases
from tests.vicregl.matches import DTYPES, LAYOUTS, maps, rules, same
from vicreg_kernels.core import loader
from vicreg_kernels.vicregl import contract, op

# U, V, B, L1, L2, C: both sizes of a lane's share on both sides, one tile and several, one stage of
# channels and several, rows that allow wide accesses and not, a position that is a whole map.
SHAPES = [
    (1, 1, 2, 49, 49, 72),
    (2, 3, 2, 30, 9, 33),
    (3, 1, 2, 9, 60, 40),
    (2, 2, 3, 9, 9, 2),
    (1, 2, 2, 1, 1, 600),
    (1, 1, 1, 300, 28, 3),
    (1, 1, 1, 13, 113, 1),
]


@pytest.fixture(scope="module")
def kernels() -> contract.Kernels:
    torch.ops.load_library(str(native.emulated("vicregl")))
    return loader.compiled("vicregl", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernels, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernels}[name])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_and_pairs(shape):
    cases.check("cuda", *maps(shape))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_dtypes(dtype):
    for layout in LAYOUTS:
        a, b = maps((2, 2, 2, 14, 11, 24), dtype=dtype, layout=layout)
        cases.check("cuda", a, b, cases.SETS[:1])


@settings(max_examples=15)
@given(*(st.integers(1, most) for most in (3, 3, 3, 70, 70, 50)), st.sampled_from([1, 4]))
def test_any_shape(views_a, views_b, batch, rows_a, rows_b, dim, by):
    shape = (views_a, views_b, batch, rows_a, rows_b, by * dim)
    cases.check("cuda", *maps(shape), cases.SETS[:1])


def test_one_side_alone():
    for need_a, need_b in ((True, False), (False, True)):
        a, b = maps((2, 2, 2, 12, 9, 16))
        a.requires_grad_(need_a), b.requires_grad_(need_b)
        cases.check("cuda", a, b)


def test_ties():
    cases.check_ties("cuda")


def test_close_positions():
    cases.check_close_positions("cuda")


def test_nan_and_inf():
    cases.check_not_finite("cuda")


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31)])
def test_indices_out_of_range_are_never_followed(kernels, bad):
    cases.check_out_of_range(kernels, bad)


def test_any_device_and_any_order_of_blocks_gives_the_same_bits(monkeypatch):
    """A search and a gradient have no order; the value's partial sums depend on their number."""

    def results(seed, multiprocessors):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        monkeypatch.setenv("EMULATOR_MULTIPROCESSORS", str(multiprocessors))
        torch.manual_seed(1)
        a, b = maps((2, 2, 2, 40, 20, 40))
        matches = op.match(a, b, "cuda")
        value = op.pairs(a, b, matches, rules(40)[2], rules(20)[2], "cuda")
        return *matches, *torch.autograd.grad(value, (a, b)), value.detach()

    first = results(0, 4)
    for seed, multiprocessors in ((1, 4), (2, 4), (3, 1), (4, 132)):
        made = results(seed, multiprocessors)
        for mine, theirs in zip(made[:-1], first[:-1], strict=True):
            same(mine, theirs, f"seed {seed}")
        if multiprocessors == 4:
            same(made[-1], first[-1], f"value, seed {seed}")
        torch.testing.assert_close(made[-1], first[-1], rtol=1e-6, atol=0.0)


PROGRAM = """
import sys

from tests.helpers import native
import torch

torch.ops.load_library(sys.argv[1])
op = torch.ops.vicreg_kernels_emulator
torch.manual_seed(0)
for U, V, B, L1, L2, C in [(1, 1, 1, 1, 1, 1), (1, 3, 2, 9, 57, 33), (1, 1, 1, 29, 17, 600),
                           (2, 2, 1, 3, 2, 2), (2, 1, 2, 13, 9, 40)]:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.randn(v, B, l, C).to(dtype) for v, l in ((U, L1), (V, L2)))
        if dtype == torch.float16:
            a = a.mT.contiguous().mT
        matches = op.vicregl_match(a, b)
        for nearest, rank, length in ((*matches[:2], L2), (*matches[2:], L1)):
            assert nearest.min() >= 0 and nearest.max() < length
            assert (rank.sort(-1).values == torch.arange(rank.shape[-1])).all()
        settings = [L1, 1], [1.0, 0.5], [L2, 1], [1.0, 0.5]
        loss = op.vicregl_pairs_forward(a, b, *matches, *settings)
        grads = op.vicregl_pairs_backward(loss, a, b, *matches, True, True, *settings)
        assert loss.isfinite() and all(grad.isfinite().all() for grad in grads)
print("clean", flush=True)
native.shortened(matches[3])
op.vicregl_pairs_backward(loss, a, b, *matches, True, True, *settings)
"""


@pytest.mark.thorough
def test_every_edge_is_clean_under_sanitizers():
    """The build really is instrumented: ranks short of memory are reported, and nothing before."""
    done = native.run_sanitized(PROGRAM, native.emulated("vicregl", "-O0", "-g1", sanitize=True))
    assert done.stdout.strip() == "clean", done.stderr[-4000:]
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
