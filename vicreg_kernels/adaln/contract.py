"""The fused backends of adaptive layer norm behind one set of functions.

G frames of T tokens of D elements, a condition's vector for each frame; vectors for each token are
frames of one token. x, y and grad are [G, T, D], shift, scale and gate [G, D], all of any strides.

    norm_forward(x, shift, scale, eps) -> out [G, T, D], saved float32 [G, T, 2] (mean and rstd)
    norm_backward(grad, x, scale, saved, need_x, need_vectors) -> gradients of x, shift and scale;
        [0] where not needed
    gate_forward(x, y, gate) -> out [G, T, D]
    gate_backward(grad, y, gate, need_y, need_gate) -> gradients of y and gate; [0] where not needed

x, out and grad have one dtype; shift and scale that one or float32, both the same; y has x's too,
or x is float32 and y any; gate has y's dtype or float32. A gradient has the dtype of what it is of.
That of a vector is the sum over its frame's tokens, in an order that depends on shapes and the
device alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vicreg_kernels.core import loader, registry

# Elements of a token that the GPU kernels keep in registers.
LONGEST = 4096


def cannot_run(dim: int) -> dict[str, str]:
    """The backends that do not take tokens of `dim` elements, and why."""
    if dim <= LONGEST:
        return {}
    why = f"it takes at most {LONGEST} elements a token, not {dim}"
    return {"triton": why, "cuda": why}


def _sizes(name: str, device: Any, dtype: Any) -> list[registry.Size]:
    return [registry.Size(least, {"cannot_run": cannot_run(least)}) for least in (0, LONGEST + 1)]


registry.register("adaln", adaln=registry.Sizes("D", _sizes), gated_residual=registry.ANY_SIZE)


class Settings(NamedTuple):
    """What a modulated layer norm computes, as the ops take it."""

    eps: float


@dataclass(frozen=True)
class Kernels(loader.Functions):
    norm_forward: Callable[..., Any]
    norm_backward: Callable[..., Any]
    gate_forward: Callable[..., Any]
    gate_backward: Callable[..., Any]
