"""The switch between the fused ops and the ops of published code.

A method is written once, on the few functions that both classes have. `Fused` keeps ragged batches
packed; `Reference` pads to the longest sample, masks the padding, rotates queries and keys eagerly,
gathers through expanded int64 indices, sorts with an argsort, forms D x D covariances and updates
the teacher tensor by tensor. Both take the same masks, so they compute the same loss. Published
I-JEPA and V-JEPA cut every sample to the shortest of the batch, so they train on fewer tokens.
"""

from __future__ import annotations

from vicreg_jepa.ops.fused import Fused
from vicreg_jepa.ops.reference import Reference

KERNELS = ("fused", "reference")
Kernels = Fused | Reference


def named(name: str, backend: str | None = None) -> Kernels:
    if name == "fused":
        return Fused(backend)
    if name == "reference":
        if backend is not None:
            raise ValueError(f"backend: got {backend!r}, takes none with kernels='reference'")
        return Reference()
    raise ValueError(f"kernels: got {name!r}, takes one of {KERNELS}")
