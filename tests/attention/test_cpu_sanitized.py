"""Tier 2: attention's CPU kernels under ASan and UBSan, on shapes of every edge."""

from __future__ import annotations

import os

import pytest

from tests.helpers import native

pytestmark = pytest.mark.thorough

# The op of the sanitized library in place of the cpu backend's.
PROGRAM = """
import sys, torch
from tests.helpers import native
from tests.attention import cases
from vicreg_kernels.core import dispatch, library, loader
from vicreg_kernels.attention import apply_rope, contract
torch.ops.load_library(sys.argv[1])
library.CPU_MISSING = None
kernels = loader.compiled("attention", contract.Kernels, "vicreg_kernels_sanitized")
if sys.argv[2] == "off_by_one":
    whole = kernels.backward
    def backward(grad, q, k, v, out, lse, *rest):
        return whole(grad, q, k, v, out, native.shortened(lse.clone()), *rest)
    kernels = contract.Kernels(kernels.forward, backward, kernels.rotate)
loader.load = lambda op, kind, backend: kernels
torch.set_num_threads(2)
torch.manual_seed(0)
combined = [(), *((rule,) for rule in cases.RULES), ("keep", "window"), ("ragged", "blocks")]
count = 0
for i, rules in enumerate(combined):
    for tokens, keys, dim in ((1, 1, 16), (2, 65, 40), (65, 3, 64), (130, 97, 128), (64, 48, 88)):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[count % 3]
        layout = cases.LAYOUTS[count % len(cases.LAYOUTS)]
        call = cases.draw(rules, batch=3, heads_=2, tokens=tokens, keys=keys, dim=dim, dtype=dtype,
                          layout=layout, axes=count % 4, indexed=bool(count % 2),
                          tokens_per_frame=1 + tokens // 4)
        wanted = [(True,) * 3, (True, False, True), (False, True, False)][count % 3]
        cases.hold("cpu", call.wanting(*wanted))
        if call.rope is not None and tokens == keys:
            apply_rope(call.q, cases.Rope3d((tokens + 600,)), backend="cpu")
        count += 1
# several chunks of keys, several tasks a sample and head, and numbers that are not finite
for rules in ((), ("frames",), ("keep", "blocks")):
    call = cases.draw(rules, batch=1, heads_=1, tokens=1000, dim=16, tokens_per_frame=90, axes=3)
    cases.hold("cpu", call.wanting(True, True, True))
    call.k[:, :, 700] = float("nan")
    cases.run("cpu", call.wanting(True, True, True), torch.ones_like(call.q))
# scores past float32's digits, which one key or several equal ones share, and past its range
for size in (3e2, 3e3, 1e6, 1e18, 1e30):
    call = cases.draw(("keep",), batch=1, heads_=2, tokens=70, dim=16)
    call.q.mul_(size)
    call.k.mul_(size)
    call.k[:, :, 5] = call.k[:, :, 9]
    cases.run("cpu", call.wanting(True, True, True), torch.ones_like(call.q))
print("clean")
"""


def run(mode: str, capacity: str | None = None):
    if capacity is not None:
        os.environ["ATEN_CPU_CAPACITY"] = capacity
    try:
        return native.run_sanitized(PROGRAM, native.sanitized("attention"), mode)
    finally:
        os.environ.pop("ATEN_CPU_CAPACITY", None)


@pytest.mark.parametrize("capacity", [None, "avx2", "default"])
def test_every_edge_is_clean(capacity) -> None:
    done = run("plain", capacity)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.strip() == "clean"


def test_a_planted_overrun_is_seen() -> None:
    """The build really is instrumented: saved logarithms short of memory must be reported."""
    done = run("off_by_one")
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
