"""Lines of sigreg_loss and sigreg_directions."""

from __future__ import annotations

from tests.fuzz.inputs import Draw

CONVENTIONS = ("lejepa", "eb_jepa", "lewm", "lightly", "stable_pretraining")


def _drawn(r: Draw) -> dict[str, str]:
    step = r.choice(("0", "3", "None", "2**40", "I(7)", "I(7, 'int32')"))
    return r.some(step=step, seed=r.one_of(0, 1, -1, 2**62))


def sigreg_loss(r: Draw) -> str:
    shape = [r.extent(5), r.extent(), r.extent()][r.choice((0, 1)) :]
    dtype = r.dtype()
    arguments = {"z": r.tensor(shape, dtype, r.size(dtype, 3.0))}
    if r.chance(0.3):
        columns = [shape[-1], r.extent()]
        arguments["directions"] = r.tensor(columns, r.dtype(), grad=False)
    else:
        arguments |= {"slices": repr(r.extent())} | _drawn(r)
    if r.chance(0.3):
        arguments["knots"] = r.choice(
            ("[0.1, 0.5, 2.0]", "[0.0, 3.0]", "[1.0, 0.5]", "[-1.0, 1.0]")
        )
    else:
        arguments |= r.some(knots=repr(r.randrange(1, 70)), t_max=r.number(3.0, 5.0))
    arguments |= r.some(convention=r.one_of(*CONVENTIONS))
    return r.line("sigreg_loss", arguments | r.backend())


def sigreg_directions(r: Draw) -> str:
    arguments = {"dim": repr(r.extent()), "slices": repr(r.extent())} | _drawn(r)
    return r.line("sigreg_directions", arguments | r.backend())
