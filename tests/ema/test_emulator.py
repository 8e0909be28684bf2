"""Tier 3: the bodies of the EMA's CUDA kernels give the reference's bits under the emulator.

Tables of 5 and 3 tensors make a list take several launches.
"""

from __future__ import annotations

import pytest
import torch

from tests.ema import tensors as ema_tensors
from tests.ema.tensors import FUSED, LAYOUTS, ROUNDINGS, assert_matches_reference
from tests.helpers import native
from vicreg_kernels.core import dispatch, loader
from vicreg_kernels.ema import contract, ema_update_, reference


def library(sanitize: bool = False):
    flags = ("-DEMA_TABLE=5", "-DEMA_STRIDED_TABLE=3")
    return native.emulated("ema", *flags, sanitize=sanitize)


@pytest.fixture(scope="module")
def kernel():
    torch.ops.load_library(str(library()))
    return loader.compiled("ema", contract.Kernels, "vicreg_kernels_emulator")


@pytest.fixture(autouse=True)
def emulated(kernel, monkeypatch):
    monkeypatch.setattr(loader, "load", lambda op, kind, name: {"cuda": kernel}[name])
    monkeypatch.setattr(dispatch, "missing", lambda *_: None)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.996, 1.0])
def test_every_mix_of_dtypes(momentum, rounding):
    lists = ema_tensors.every_dtype([(), (7,), (2, 3, 4), (300,)])
    assert_matches_reference("cuda", *lists, momentum, rounding=rounding, seed=8, step=5)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("target", FUSED)
@pytest.mark.parametrize("online", FUSED)
def test_vectors_and_tails(target, online, rounding):
    """Two passes of a block, a second block, and a tail; aligned and not; each kind of shadow."""
    for count, offset in ((8192 + 4096 + 77, 0), (4100, 3)):
        made = [torch.randn(count + offset)[offset:] for _ in range(3)]
        t, o = made[0].to(target), made[1].to(online)
        if offset:
            t, o = (torch.cat([z[:offset], z])[offset:] for z in (t, o))
        for shadow in ([], *([z] for z in (torch.empty(count, dtype=d) for d in FUSED))):
            assert_matches_reference(
                "cuda", [t], [o], shadow, 0.996, rounding=rounding, seed=3, step=2**33 + 1
            )


def test_many_small_tensors():
    """Several tables, with empty tensors among them."""
    shapes = [(k % 7,) for k in range(23)] + [(3, k % 4) for k in range(9)]
    lists = [[torch.randn(shape) for shape in shapes] for _ in range(3)]
    assert_matches_reference("cuda", *lists, 0.9)


@pytest.mark.parametrize("names", [("spread", "permuted"), ("permuted", "contiguous")])
def test_strided(names):
    lists = [[LAYOUTS[name](9, 31, 40)] for name in (*names, "rows")]
    assert_matches_reference("cuda", *lists, 0.9)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_more_dimensions_than_a_table_has_room_for(rounding):
    shape = (2, 1, 3, 2, 2, 2, 3, 2, 2)
    made = [LAYOUTS[name](*shape) for name in ("spread", "permuted", "contiguous")]
    lists = [[ema_tensors.cast(z, torch.bfloat16)] for z in made]
    assert_matches_reference("cuda", *lists, 0.9, rounding=rounding, step=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.996, 1.0])
def test_momentum_and_step_in_device_memory(kernel, dtype, momentum):
    """Handed to the kernel as pointers, as for a tensor on a GPU."""
    targets, onlines, copies = ema_tensors.every_dtype([(70,)], layouts=["contiguous"])
    value, step = torch.tensor(momentum, dtype=dtype), torch.tensor(2**40 + 3)
    mine, own = ema_tensors.again(targets), ema_tensors.again(copies)
    kernel.update_(mine, onlines, own, value, 0.5, True, 9, step, 0)
    reference.update_(targets, onlines, copies, None, value.item(), True, 9, None, step.item())
    ema_tensors.assert_same_bits(mine, targets, "targets")
    ema_tensors.assert_same_bits(own, copies, "shadows")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_any_order_of_blocks_gives_the_same_bits(rounding, monkeypatch):
    lists = ema_tensors.every_dtype([(9000,), (5, 6)])
    runs = []
    for seed in (0, 1, 2, 3):
        monkeypatch.setenv("EMULATOR_SEED", str(seed))
        targets, copies = ema_tensors.again(lists[0]), ema_tensors.again(lists[2])
        ema_update_(
            targets, lists[1], 0.9, shadows=copies, rounding=rounding, step=1, backend="cuda"
        )
        runs.append(targets + copies)
    for other in runs[1:]:
        ema_tensors.assert_same_bits(other, runs[0], "seeds")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf(bad):
    targets, onlines, copies = ema_tensors.every_dtype([(9,)], layouts=["contiguous"])
    for t, o in zip(targets, onlines, strict=True):
        t[3], o[5], t[7], o[7] = bad, bad, bad, -bad
    for rounding in ROUNDINGS:
        assert_matches_reference("cuda", targets, onlines, copies, 0.9, rounding=rounding, step=1)


SANITIZED = """
import sys, torch
from tests.helpers import native
sys.path.insert(0, ".")
from tests.ema import tensors as ema_tensors
from vicreg_kernels.ema import reference
library, mode = sys.argv[1:]
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_emulator.ema_update_
torch.manual_seed(0)
targets, onlines, copies = ema_tensors.every_dtype([(), (7,), (3, 5), (2, 3, 4), (513,)])
more = ema_tensors.every_dtype([(4096 + 17,)], layouts=["contiguous"])
if mode == "short":
    targets, onlines, copies = [torch.randn(600)], [torch.randn(600)], [torch.empty(600)]
for lists in ((targets, onlines, copies), more):
    for stochastic in (False, True):
        mine, own = ema_tensors.again(lists[0]), ema_tensors.again(lists[2])
        if mode == "short":
            native.shortened(own[0])
        op(mine, lists[1], own, None, 0.996, stochastic, 5, None, 2)
        expected, theirs = ema_tensors.again(lists[0]), ema_tensors.again(lists[2])
        reference.update_(expected, lists[1], theirs, None, 0.996, stochastic, 5, None, 2)
        ema_tensors.assert_same_bits(mine, expected, "targets")
        ema_tensors.assert_same_bits(own, theirs, "shadows")
print("clean")
"""


def run_sanitized(mode):
    return native.run_sanitized(SANITIZED, library(sanitize=True), mode)


@pytest.mark.thorough
def test_sanitized():
    done = run_sanitized("plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


@pytest.mark.thorough
def test_the_sanitizer_sees_a_short_shadow():
    done = run_sanitized("short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
