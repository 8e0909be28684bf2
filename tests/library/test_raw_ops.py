"""The raw compiled ops refuse by name what they do not take, and never crash.

raw_ops.py makes the cases. They run in a process of their own, all in one, which a crash would end.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vicreg_kernels as vk
from tests.helpers import native
from vicreg_kernels.core import library, registry
from vicreg_kernels.vicreg import reference

pytestmark = pytest.mark.skipif(library.CPU_MISSING is not None, reason=str(library.CPU_MISSING))

PROGRAM = str(Path(__file__).resolve().parents[1] / "helpers" / "raw_ops.py")
OPS = sorted(registry.OPS)
# Of the other tests' sanitized builds under the emulator, so that one build serves both.
FLAGS = {
    "barlow": ("-DBARLOW_PRODUCT_ELEMENTS=512", "-O0"),
    "ema": ("-DEMA_TABLE=5", "-DEMA_STRIDED_TABLE=3"),
    "vicreg": ("-DVICREG_PRODUCT_ELEMENTS=512",),
    "vicregl": ("-O0", "-g1"),
}
CPU = torch.ops.vicreg_kernels_cpu
SETTINGS = (1.0, 1e-4, True, [1.0, 0.5, 1.0], [25.0, 25.0, 1.0])


def assert_all_refused(done: subprocess.CompletedProcess[str], least: int) -> None:
    lines = done.stdout.splitlines()
    last = lines[-1] if lines else ""
    assert done.returncode == 0, f"{last}: {done.stderr[-4000:]}"
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert int(re.fullmatch(r"(\d+) cases", last)[1]) >= least


def test_what_the_cpu_ops_do_not_take() -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM, "vicreg_kernels_cpu", "cpu"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(native.ROOT)},
    )  # fmt: skip
    assert_all_refused(done, 4800)
    tried = {line.split("_")[0] for line in done.stdout.splitlines()}
    assert set(OPS) - tried == set(), "a new op needs tests/<op>/raw_ops.py"


RUN = "import sys; from tests.helpers import raw_ops; raw_ops.main(*sys.argv[2:])"


@pytest.mark.thorough
@pytest.mark.parametrize("op", OPS)
def test_what_the_cpu_ops_do_not_take_sanitized(op) -> None:
    built = native.sanitized(op)
    words = ("vicreg_kernels_sanitized", "cpu", str(built), f"{op}_")
    assert_all_refused(native.run_sanitized(RUN, built, *words), 90)


@pytest.mark.thorough
@pytest.mark.parametrize("op", OPS)
def test_what_the_cuda_ops_do_not_take_sanitized(op) -> None:
    built = native.emulated(op, *FLAGS.get(op, ()), sanitize=True)
    words = ("vicreg_kernels_emulator", "cuda", str(built), f"{op}_")
    assert_all_refused(native.run_sanitized(RUN, built, *words), 90)


def test_vicreg_index_out_of_range() -> None:
    """Columns that no index names are treated as every other one, which changes only rounding."""
    x, y = torch.randn(2, 5, 9), torch.randn(2, 5, 9)
    saved = list(CPU.vicreg_forward(x, y, *SETTINGS))[1:]
    a, b = x.double().requires_grad_(), y.double().requires_grad_()
    truth = torch.autograd.grad(reference.terms(a, b, *SETTINGS)[0], (a, b))
    for index in (-1, 9, 2**62, -(2**63)):
        saved[3] = torch.full_like(saved[3], index)
        grads = CPU.vicreg_backward(torch.ones(1), x, y, *saved, True, True, *SETTINGS)
        for grad, expected in zip(grads, truth, strict=True):
            torch.testing.assert_close(grad.double(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("place", [-1, 5, 2**31 - 1, -(2**31)])
def test_vicregl_match_out_of_range(place) -> None:
    """The position whose match it is gets NaN, and nothing else."""
    a, b = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 5, 3)
    matches = list(CPU.vicregl_match(a, b))
    matches[0][0, 0, 1, 2] = place
    kept = ([4], [1.0], [], [])
    assert CPU.vicregl_pairs_forward(a, b, *matches, *kept).isnan()
    for need_a, need_b in ((True, True), (True, False), (False, True)):
        to_a, to_b = CPU.vicregl_pairs_backward(
            torch.ones(()), a, b, *matches, need_a, need_b, *kept
        )
        assert to_b.isfinite().all()
        if need_a:
            bad = to_a.isnan().all(-1)
            assert bad[0, 1, 2]
            assert bad.sum() == 1
            assert to_a[~bad].isfinite().all()


@pytest.mark.parametrize("shape", [(8, 1, 3, 3), (2, 1, 1, 1), (3, 1, 2, 5)])
def test_vicregl_with_one_channel(shape) -> None:
    """Maps of [B, 1, H, W] seen as [B, H, W, 1]: the last stride is H W."""
    batch, _, height, width = shape
    maps = [torch.randn(shape).permute(0, 2, 3, 1).requires_grad_() for _ in range(2)]
    grids = [torch.rand(batch, height, width, 2) for _ in range(2)]
    outcomes = {}
    for backend in ("reference", "cpu"):
        settings = {"alpha": 0.0, "num_matches": (1, 1), "backend": backend}
        loss = vk.vicregl_loss(None, maps, grids, **settings)
        outcomes[backend] = (loss.detach(), *torch.autograd.grad(loss, maps))
    torch.testing.assert_close(outcomes["cpu"], outcomes["reference"], rtol=1e-4, atol=1e-5)


def test_ema_settings_in_tensors() -> None:
    """On the CPU too they take the numbers' place."""
    target, online = torch.ones(5), torch.zeros(5)
    for dtype in (torch.float32, torch.float64):
        mine, momentum = target.clone(), torch.tensor(0.25, dtype=dtype)
        CPU.ema_update_([mine], [online], [], momentum, 0.0, False, 0, None, 0)
        assert mine.eq(0.25).all()
    drawn = []
    for step_tensor, step in ((torch.tensor(9), 0), (None, 9)):
        mine = [torch.linspace(1, 2, 700).bfloat16()]
        CPU.ema_update_(mine, [torch.zeros(700)], [], None, 0.9, True, 3, step_tensor, step)
        drawn += mine
    assert torch.equal(*drawn)
