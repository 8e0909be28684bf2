"""Lines of modulated_layer_norm and gated_residual."""

from __future__ import annotations

from tests.fuzz.inputs import Draw


def _shapes(r: Draw) -> tuple[list[int], list[int]]:
    """Of the tokens and of a vector."""
    frames = [r.extent(5) for _ in range(r.choice((0, 1, 1, 2)))]
    tokens, dim = r.extent(13), r.extent()
    form = r.choice(([*frames, dim], [*frames, dim], [*frames, 1, dim], [*frames, tokens, dim]))
    return [*frames, tokens, dim], form


def _other(r: Draw, dtype: str) -> str:
    """The dtype of what stands beside `dtype`."""
    if dtype == "float64" or r.chance(0.6):
        return dtype
    return r.choice(("float32", "bfloat16", "float16"))


def modulated_layer_norm(r: Draw) -> str:
    (shape, vector), dtype = _shapes(r), r.dtype()
    other = _other(r, dtype)
    arguments = {"x": r.tensor(shape, dtype, r.size(dtype))}
    size = r.size("float16", 3.0)
    arguments |= {name: r.tensor(vector, other, size) for name in ("shift", "scale")}
    arguments |= r.some(eps=r.number(1e-6, 1e-5, 0.0))
    return r.line("modulated_layer_norm", arguments | r.backend())


def gated_residual(r: Draw) -> str:
    (shape, vector), dtype = _shapes(r), r.dtype()
    other = _other(r, dtype) if dtype == "float32" else dtype
    size = r.size("float16" if "float16" in (dtype, other) else dtype, 15.0)
    arguments = {"x": r.tensor(shape, dtype, size), "y": r.tensor(shape, other, size)}
    arguments["gate"] = r.tensor(vector, _other(r, other), r.size("float16", 3.0))
    return r.line("gated_residual", arguments | r.backend())
