"""Lines of barlow_twins_loss."""

from __future__ import annotations

from tests.fuzz.inputs import Draw
from vicreg_kernels.barlow.conventions import CONVENTIONS


def barlow_twins_loss(r: Draw) -> str:
    shape, dtype = [r.extent(), r.extent()], r.dtype()
    size = r.size(dtype)
    arguments = {name: r.tensor(shape, dtype, size) for name in "xy"}
    arguments |= r.some(
        convention=r.one_of(*CONVENTIONS),
        lambd=r.number(5e-3, 1.0, 0.0),
        eps=r.number(1e-5, 1e-12, 0.0),
        precision=r.one_of(None, "tf32x3"),
    )
    return r.line("barlow_twins_loss", arguments | r.backend())
