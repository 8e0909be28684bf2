"""Lines of vicreg_loss, vicreg_terms and variance_covariance."""

from __future__ import annotations

from tests.fuzz.inputs import Draw

CONVENTIONS = ("vicreg", "vicregl", "eb_jepa", "solo_learn", "stable_pretraining", "lightly",
               "pytorch_metric_learning")  # fmt: skip


def _settings(r: Draw) -> dict[str, str]:
    return r.some(
        margin=r.number(1.0, 0.0),
        eps=r.number(1e-4, 1e-4, 0.0),
        precision=r.one_of(None, "tf32x3", "tf32"),
    )


def _two_views(function: str, r: Draw) -> str:
    positions = [r.extent(5) for _ in range(r.choice((0, 0, 0, 0, 1, 2)))]
    shape = [r.extent(), *positions, r.extent()]
    dtype = r.dtype()
    size = r.size(dtype)
    arguments = {name: r.tensor(shape, dtype, size) for name in "xy"}
    if positions or r.chance(0.5):
        arguments["convention"] = r.one_of(*CONVENTIONS, *(("lightly", "vicregl") * 5))
    weights = {f"{w}_weight": r.number(25.0, 1.0, 0.0) for w in ("invariance", "covariance")}
    arguments |= _settings(r) | r.some(0.3, variance_weight=r.number(25.0), **weights)
    return r.line(function, arguments | r.backend())


def vicreg_loss(r: Draw) -> str:
    return _two_views("vicreg_loss", r)


def vicreg_terms(r: Draw) -> str:
    return _two_views("vicreg_terms", r)


def variance_covariance(r: Draw) -> str:
    shape = [r.extent(5), r.extent(), r.extent()][r.choice((0, 1)) :]
    dtype = r.dtype()
    arguments = {"z": r.tensor(shape, dtype, r.size(dtype))} | _settings(r)
    arguments |= r.some(
        unbiased=r.one_of(True, False), covariance_normalizer=r.one_of("d", "d(d-1)", "n")
    )
    return r.line("variance_covariance", arguments | r.backend())
