"""Tier 2: the CPU kernels built with AddressSanitizer and UBSan, on shapes that meet every edge."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
SOURCES = [
    "csrc/registration.cpp",
    "csrc/vicreg/cpu.cpp",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/common/*.h")),
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/vicreg/*.h")),
]

# Run in a process of its own, because the sanitizer must be the first library loaded.
PROGRAM = """
import sys, torch
from vicreg_kernels.vicreg import reference
library, off_by_one = sys.argv[1], sys.argv[2] == "off_by_one"
torch.ops.load_library(library)
op = torch.ops.vicreg_kernels_sanitized
settings = (1.1, 1e-4, True, [1.0, 0.5, 0.2], [25.0, 25.0, 1.0])
torch.manual_seed(0)
shapes = [(1, 2, 2), (1, 2, 3), (1, 3, 2), (2, 5, 1), (1, 17, 17), (3, 31, 37), (1, 33, 600),
          (1, 300, 19), (2, 129, 257), (1, 260, 130), (1, 700, 701)]
for groups, rows, dim in shapes:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(groups, rows, dim).to(dtype)
        y = torch.randn(groups, dim, rows).to(dtype).transpose(1, 2)
        out = op.vicreg_forward(x, y, *settings)
        saved = list(out[1:])
        if off_by_one:
            saved[0] = saved[0].flatten()[:-1].clone()  # the moments, one element short
        grads = op.vicreg_backward(torch.ones(1), x, y, *saved, True, True, *settings)
        a, b = x.double().requires_grad_(), y.double().requires_grad_()
        loss = reference.terms(a, b, *settings)[0]
        loss.backward()
        torch.testing.assert_close(out[0][0].double(), loss.detach(), rtol=1e-5, atol=1e-6)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        for grad, truth in zip(grads, (a.grad, b.grad)):
            error = (grad.double() - truth).norm() / truth.norm()
            assert error < tolerance, (groups, rows, dim, dtype, error)
        op.vicreg_forward(x, None, *settings)
print("clean")
"""


@pytest.fixture(scope="module")
def library() -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ with its sanitizer libraries")
    key = hashlib.sha256(b"".join((ROOT / s).read_bytes() for s in SOURCES))
    key.update(torch.__version__.encode())
    target = ROOT / ".cache" / f"sanitized_{key.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        torch_directory = Path(torch.__file__).parent
        scratch = target.with_suffix(".partial")
        command = [compiler, "-O1", "-g", "-std=c++20", "-fPIC", "-shared"]
        command += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
        command += ["-fno-omit-frame-pointer", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
        command += ["-DVICREG_NAMESPACE=vicreg_kernels_sanitized", "-DVICREG_KEY=CPU", "-Icsrc"]
        command += ["-isystem", str(torch_directory / "include"), *SOURCES[:2]]
        command += [f"-L{torch_directory / 'lib'}", "-ltorch_cpu", "-o", str(scratch)]
        subprocess.run(command, cwd=ROOT, check=True)
        scratch.rename(target)
    return target


def run(library: Path, mode: str) -> subprocess.CompletedProcess[str]:
    found = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = dict(os.environ)
    environment["LD_PRELOAD"] = ":".join(path.strip() for path in found)
    # torch and Python keep memory until the process ends
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, str(library), mode],
        env=environment,
        capture_output=True,
        text=True,
    )


def test_every_edge_is_clean(library: Path) -> None:
    done = run(library, "plain")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_planted_overrun_is_seen(library: Path) -> None:
    """The build really is instrumented: saved moments one element short must be reported."""
    done = run(library, "off_by_one")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
