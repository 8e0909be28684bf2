"""The public function of the EMA op."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from vicreg_kernels.core import calls, dispatch
from vicreg_kernels.core.library import NAMESPACES
from vicreg_kernels.ema import checks
from vicreg_kernels.ema.contract import Settings
from vicreg_kernels.ema.op import update


def ema_update_(
    targets: Sequence[Tensor],
    onlines: Sequence[Tensor],
    momentum: float | Tensor,
    *,
    shadows: Sequence[Tensor] | None = None,
    rounding: str = "nearest",
    seed: int = 0,
    step: int | Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Update targets[i] <- momentum targets[i] + (1 - momentum) onlines[i], all in one pass.

    The exponential moving average of a teacher's parameters (Tarvainen and Valpola, 2017,
    arXiv:1703.01780; BYOL, DINO, I-JEPA). It is computed in float32 as a linear interpolation that
    starts at the nearer end, and is exact at momentum 0 and 1. No graph is recorded.

    Args:
        targets: the tensors to update in place; float32, bfloat16, float16 or float64 in any mix,
            any shapes and strides whose elements do not overlap; all on one device. Leaves may
            require a gradient.
        onlines: as many tensors of the same shapes, of any of these dtypes and any strides.
        momentum: in [0, 1]; or a 0-d float32 or float64 tensor on the targets' device (a captured
            CUDA graph reads it at each replay) or on the CPU. On a GPU its value is not checked.
        shadows: None, or as many tensors of the targets' shapes that receive a copy of the updated
            target, rounded to nearest to their own dtype: a half teacher for the forward.
        rounding: "nearest", or "stochastic" for bfloat16 and float16 targets: up or down with the
            probability that keeps the mean, so that steps below half a unit in the last place are
            not lost. float32 and float64 targets are the same with both.
        seed, step: what stochastic rounding draws from: the bits depend on (seed, step, i, the
            element's place in the target's memory) alone and are the same on every backend. step:
            an int in [0, 2^48) or a 0-d int64 tensor; must differ from call to call.
        backend: "reference", "cpu", "triton" or "cuda"; None takes the best for the device.

    Raises:
        ValueError, TypeError: lists, shapes, dtypes, devices, layouts or settings do not fit, or
            written memory overlaps another tensor's; the message names the argument and index, and
            no target has been changed.
        RuntimeError: the named backend cannot run here; the message says why.
    """
    targets = checks.as_list("targets", targets)
    onlines = checks.as_list("onlines", onlines)
    copies = None if shadows is None else checks.as_list("shadows", shadows)
    dispatch.check_backend(backend)
    checks.check_rounding(rounding, seed)
    if targets and (not isinstance(targets[0], Tensor) or copies == []):
        checks.check_lists(targets, onlines, copies)  # names it
    device = targets[0].device if targets else torch.device("cpu")

    momentum_tensor = step_tensor = None
    if isinstance(momentum, Tensor):
        checks.check_scalar("momentum", momentum, (torch.float32, torch.float64), device)
        momentum_tensor, momentum = momentum.detach(), 0.0
    elif isinstance(momentum, bool) or not isinstance(momentum, (int, float)):
        raise TypeError(f"momentum: got {type(momentum).__name__}, takes a number or a 0-d tensor")
    else:
        checks.check_momentum("momentum", momentum)
    if isinstance(step, Tensor):
        checks.check_scalar("step", step, (torch.int64,), device)
        step_tensor, step = step, 0
    elif step is None:
        if rounding == "stochastic":
            raise ValueError("step: got None, takes an int or a tensor with rounding='stochastic'")
        step = 0
    elif isinstance(step, bool) or not isinstance(step, int):
        raise TypeError(f"step: got {type(step).__name__}, takes an int or a 0-d int64 tensor")
    else:
        checks.check_step(step)
    if not targets:
        checks.check_lists(targets, onlines, copies)
        return
    settings = Settings(
        momentum_tensor,
        float(momentum),
        rounding == "stochastic",
        seed,
        step_tensor,
        step,
    )
    if calls.direct(targets[0]) and _update_directly(targets, onlines, copies, settings, backend):
        return

    checks.check_lists(targets, onlines, copies)
    everything = (*targets, *onlines, *(copies or ()))
    dtypes = {z.dtype for z in everything}
    widest = torch.float64 if torch.float64 in dtypes else targets[0].dtype
    name = dispatch.choose("ema_update_", backend, device.type, widest)
    if not torch.compiler.is_compiling():
        dispatch.log_choice("ema_update_", name, backend, device, (len(targets),))
    # Only where it is needed: a compiled graph that fails inside leaves gradients switched off.
    with torch.no_grad() if any(z.requires_grad for z in everything) else nullcontext():
        if not torch.compiler.is_compiling() and dispatch.is_transforming():
            # torch.func cannot look into the registered op and would give derivatives of 0
            update(True, targets, onlines, copies or [], name, settings)
        else:
            torch.ops.vicreg_kernels.ema_update_(targets, onlines, copies or [], name, *settings)


def _update_directly(
    targets: list[Tensor],
    onlines: list[Tensor],
    shadows: list[Tensor] | None,
    settings: Settings,
    backend: str | None,
) -> bool:
    """The update past the dispatcher and the checks in Python, which would take longer than the
    kernel; False where a compiled kernel does not run at once. Nothing has been written then.
    """
    first = targets[0]
    if first.dtype not in dispatch.FUSED_DTYPES:
        return False
    name = dispatch.choose("ema_update_", backend, first.device.type, first.dtype)
    if name not in NAMESPACES:
        return False
    try:
        if any([z.grad_fn is not None for z in targets + (shadows or [])]):
            return False
    except AttributeError:  # no tensor
        return False
    dispatch.log_choice("ema_update_", name, backend, first.device, (len(targets),))
    try:
        with torch.no_grad() if torch.is_grad_enabled() else nullcontext():
            return update(False, targets, onlines, shadows or [], name, settings)
    except (RuntimeError, TypeError):
        checks.check_lists(targets, onlines, shadows)  # the dispatcher's words name no tensor
        raise
