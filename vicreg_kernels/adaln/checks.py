"""What adaptive layer norm takes: every check, as functions of plain values whose results are kept
(`calls.remembered`).
"""

from __future__ import annotations

from typing import Any

import torch

from vicreg_kernels.adaln.contract import Settings
from vicreg_kernels.core import calls, dispatch, reals
from vicreg_kernels.core import checks as shared
from vicreg_kernels.core.checks import Seen


def check_settings(*, eps: float, backend: str | None) -> float:
    """eps as a number. Raises a ValueError or TypeError that names the first that is wrong."""
    dispatch.check_backend(backend)
    return float(reals.finite("eps", eps, 0))


def _tokens(x: Seen) -> None:
    shape, dtype, _, layout = x
    shared.dense_float("x", dtype, layout)
    if len(shape) < 2:
        raise ValueError(f"x: got shape {tuple(shape)}, takes [..., T, D]")
    shared.not_empty("x", shape)


def _beside(name: str, z: Seen, x: Seen) -> None:
    """A dense float tensor on x's device; float64 goes with float64."""
    _, dtype, device, layout = z
    shared.dense_float(name, dtype, layout)
    shared.same_device(name, device, x[2], "x's device")
    if (dtype == torch.float64) != (x[1] == torch.float64):
        raise TypeError(
            f"{name}: got dtype {dtype} with x in {x[1]}, takes float64 with float64, or"
            " float32, bfloat16 and float16"
        )


def _vector(name: str, z: Seen, x: Seen) -> bool:
    """Whether there is a vector for each token, not for each frame."""
    _beside(name, z, x)
    shape, (*frames, tokens, dim) = tuple(z[0]), tuple(x[0])
    if shape in ((*frames, dim), (*frames, 1, dim)):
        return False
    if shape == (*frames, tokens, dim):
        return True
    raise ValueError(
        f"{name}: got shape {shape}, takes a vector for each frame of x, {(*frames, dim)} or"
        f" {(*frames, 1, dim)}, or for each token, {(*frames, tokens, dim)}"
    )


@calls.remembered
def norm(eps: float, backend: str | None, *seen: Any) -> tuple[Settings, bool]:
    """The op's settings, and whether the vectors are for each token. seen: x, shift, scale."""
    settings = Settings(check_settings(eps=eps, backend=backend))
    x, shift, scale = (seen[at : at + 4] for at in (0, 4, 8))
    _tokens(x)
    each = _vector("shift", shift, x)
    _vector("scale", scale, x)
    if scale[0] != shift[0]:
        raise ValueError(f"scale: got shape {tuple(scale[0])}, takes shift's {tuple(shift[0])}")
    shared.same_dtype("scale", scale[1], shift[1], "shift's dtype")
    return settings, each


@calls.remembered
def gate(backend: str | None, *seen: Any) -> bool:
    """Whether there is a gate for each token. seen: x, y, gate."""
    dispatch.check_backend(backend)
    x, y, gate = (seen[at : at + 4] for at in (0, 4, 8))
    _tokens(x)
    _beside("y", y, x)
    if y[0] != x[0]:
        raise ValueError(f"y: got shape {tuple(y[0])}, takes x's shape {tuple(x[0])}")
    if y[1] != x[1] and x[1] != torch.float32:
        raise TypeError(
            f"y: got dtype {y[1]} with x in {x[1]}, takes x's dtype, or any with x in float32"
        )
    return _vector("gate", gate, x)
