"""Benchmarks: this library's ops against the published formulas and the best plain PyTorch."""

from pathlib import Path

_HERE = Path(__file__).parent
# In the order in which a GPU's time is spent; an op that is not named here comes before vicreg.
_ORDER = ("sigreg", "barlow", "vicregl", "attention", "ema", "tokens", "adaln", "jepa_step")


def _place(op: str) -> tuple[int, int]:
    return op == "vicreg", _ORDER.index(op) if op in _ORDER else len(_ORDER)


# The library's ops, which are known by their contract.py (nothing is imported: torch may be
# absent), and the step of a whole model; each with its bench/<op>.py.
_FOUND = {path.parent.name for path in (_HERE.parent / "vicreg_kernels").glob("*/contract.py")}
OPS = tuple(
    op for op in sorted(_FOUND | {"jepa_step"}, key=_place) if (_HERE / f"{op}.py").exists()
)
# Those, what the calls of all of them cost the host, and what only a CPU is measured on.
ALL = (*OPS, "host", "ranks")
