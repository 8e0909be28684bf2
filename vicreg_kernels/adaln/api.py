"""The public functions of adaptive layer norm."""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.adaln import checks, contract, reference
from vicreg_kernels.adaln.op import Gate, Norm
from vicreg_kernels.core import calls, dispatch


def _frames(z: Tensor, each: bool) -> Tensor:
    """[..., T, D] as [G, T, D]; with a vector for each token, as frames of one token."""
    tokens, dim = z.shape[-2:]
    if each:
        return z.reshape(-1, 1, dim)
    return z if z.dim() == 3 else z.reshape(-1, tokens, dim)


def _vectors(z: Tensor, dim: int, beside: torch.dtype) -> Tensor:
    """[G, D], of the dtype `beside` or float32, as which kernels take any other."""
    z = z if z.dim() == 2 else z.reshape(-1, dim)
    return z if z.dtype in (beside, torch.float32, torch.float64) else z.float()


def _choose(op: str, backend: str | None, x: Tensor, cannot_run: dict[str, str]) -> str:
    name = dispatch.choose(op, backend, x.device, x.dtype, cannot_run=cannot_run)
    if not torch.compiler.is_compiling():
        dispatch.log_choice(op, name, backend, x.device, x.shape)
    return name


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str | None = None
) -> Tensor:
    """Normalise over D without affine and modulate by a condition: norm(x) (1 + scale) + shift.

    With mean and variance over a token's D elements (the variance divided by D),
    norm(x) = (x - mean) / sqrt(variance + eps). Peebles and Xie, 2023, arXiv:2212.09748 (DiT's
    adaLN), whose eps is the default.

    Args:
        x: tokens, [..., T, D], at least two dimensions and one element; float32, bfloat16, float16
            or float64. Any strides; x is copied if its leading dimensions cannot be viewed as
            one.
        shift, scale: both of one shape and dtype: a vector for each frame of T tokens, [..., D] or
            [..., 1, D], or for each token, [..., T, D]; none is repeated in memory. The dtype may
            differ from x's (float64 goes with float64), as it does under autocast.
        eps: added to the variance; finite and at least 0, in the square of x's unit.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the input. "triton"
            and "cuda" take up to 4096 elements a token.

    Returns:
        x's shape and dtype, contiguous; computed in float32 whatever autocast says. NaN where
        float32 does not hold a token's sum of squares. Gradients of x, shift and scale have their
        dtypes; those of a frame's vectors are sums over its tokens in a fixed order, so that two
        runs are bitwise equal. Fused backends differentiate once; "reference" to any order.

    Raises:
        ValueError, TypeError: a shape, dtype, device or setting is not one of the above; the
            message names the argument.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    seen = (*calls.seen("x", x), *calls.seen("shift", shift), *calls.seen("scale", scale))
    settings, each = checks.norm(eps, backend, *seen)
    dim = x.shape[-1]
    name = _choose("adaln", backend, x, contract.cannot_run(dim))
    frames = _frames(x, each)
    moved, scaled = _vectors(shift, dim, x.dtype), _vectors(scale, dim, x.dtype)
    if name == "reference":
        out = reference.modulated_layer_norm(frames, moved, scaled, *settings)
    else:
        out = Norm.apply(frames, moved, scaled, name, settings)
    return out if frames is x else out.reshape(x.shape)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, *, backend: str | None = None) -> Tensor:
    """Add a gated residual branch: x + gate y (adaLN-Zero: Peebles and Xie, 2023,
    arXiv:2212.09748).

    Args:
        x: the residual stream, [..., T, D], as in `modulated_layer_norm`.
        y: the branch, of x's shape and dtype; in any of float32, bfloat16 and float16 where x is
            float32, as under autocast.
        gate: a vector for each frame or token, as `shift` in `modulated_layer_norm`.
        backend: as in `modulated_layer_norm`; any number of elements a token.

    Returns:
        x's shape and dtype, contiguous. Gradients have their tensors' dtypes; that of a frame's
        gate is a sum over its tokens in a fixed order. Fused backends differentiate once,
        "reference" to any order.

    Raises: as `modulated_layer_norm`.
    """
    seen = (*calls.seen("x", x), *calls.seen("y", y), *calls.seen("gate", gate))
    each = checks.gate(backend, *seen)
    name = _choose("gated_residual", backend, x, {})
    frames, branch = _frames(x, each), _frames(y, each)
    opened = _vectors(gate, x.shape[-1], y.dtype)
    if name == "reference":
        out = reference.gated_residual(frames, branch, opened)
    else:
        out = Gate.apply(frames, branch, opened, name)
    return out if frames is x else out.reshape(x.shape)
