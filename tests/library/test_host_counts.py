"""What a step on tiny inputs does, counted and not timed: calls of ops and tensors allocated.

A view, a copy or a product through torch costs the host 1 to 2 us each, of the 70 us that a
whole loss may take, and no test of values sees one more of them.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from bench import host
from vicreg_kernels.barlow import barlow_twins_loss
from vicreg_kernels.core import library
from vicreg_kernels.sigreg import sigreg_loss
from vicreg_kernels.vicreg import vicreg_loss

pytestmark = pytest.mark.skipif(
    library.CPU_MISSING is not None, reason="counts the calls of the CPU kernels"
)

# Of a forward and a backward, or of an update: tensors allocated, other calls of torch's own ops.
MOST = {
    "vicreg_loss": (10, {"aten::select": 1, "aten::as_strided": 1}),
    "barlow_twins_loss": (9, {"aten::select": 1, "aten::as_strided": 1}),
    "sigreg_loss": (7, {"aten::unsqueeze": 1, "aten::view": 1, "aten::as_strided": 1}),
    "masked_attention": (5, {}),
    "prediction_loss": (3, {}),
    "EMA.update_vit_b": (0, {"aten::item": 2, "aten::_local_scalar_dense": 2, "aten::add_": 1}),
}
ALLOCATION = ("aten::empty", "aten::empty_strided")
# What allocates by one of those, and the poison that conftest.py fills new memory with.
WITHIN = ("aten::new_empty", "aten::new_empty_strided", "aten::fill_")


def counted(step) -> Counter[str]:
    step()  # the first call loads kernels and matches models
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        step()
    return Counter(event.name for event in recorded.events() if "::" in event.name)


@pytest.mark.parametrize("name", MOST)
def test_a_step_on_the_cpu(name):
    torch.use_deterministic_algorithms(False)  # its fill of new memory is counted too
    counts = counted(
        host.CASES[name].build(torch.device("cpu"), torch.float32, "cpu").steps["ours"]
    )
    own = [count for key, count in counts.items() if key.startswith("vicreg_kernels_cpu::")]
    assert own
    assert set(own) == {1}  # each kernel once
    allocations, most = MOST[name]
    assert sum(counts[key] for key in ALLOCATION) <= allocations
    others = {
        key: count
        for key, count in counts.items()
        if key.startswith("aten::") and key not in (*ALLOCATION, *WITHIN)
    }
    assert {key: count for key, count in others.items() if count > most.get(key, 0)} == {}


LOSSES = {
    "vicreg": lambda x, y, backend: vicreg_loss(x, y, backend=backend),
    "barlow": lambda x, y, backend: barlow_twins_loss(x, y, backend=backend),
    "sigreg": lambda x, y, backend: sigreg_loss(x, slices=16, backend=backend) + 0 * y.sum(),
}


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(16, 16), (15, 17), (17, 15), (16, 17), (17, 17), (4, 3), (3, 1)]
)
@pytest.mark.parametrize("loss", LOSSES)
def test_products_by_loops_and_by_torch(loss, shape, dtype, turned):
    """Both sides of the size up to which the CPU kernels multiply by plain loops."""
    drawn = [torch.randn(shape[::-1] if turned else shape).to(dtype) for _ in "xy"]
    outcomes = []
    for backend in ("cpu", "reference"):
        leaves = [z.double() if backend == "reference" else z.clone() for z in drawn]
        for leaf in leaves:
            leaf.requires_grad_()
        views = [leaf.T if turned else leaf for leaf in leaves]
        value = LOSSES[loss](*views, backend)
        outcomes.append((value.detach(), *torch.autograd.grad(value, leaves)))
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(*outcomes, strict=True):
        scale = theirs.abs().max().clamp(min=1e-6)
        assert (mine.double() - theirs).abs().max() <= tolerance * scale
