"""Which backend runs: the choice, the override, the report.

`backend=None` takes the best one for the device and shape. A backend named in the call that cannot
run there is an error. The environment variable VICREG_KERNELS_BACKEND, read at import, takes the
place of None; VICREG_KERNELS_DEBUG is read then too. What ran, and why, goes to the debug log of
the logger "vicreg_kernels".

On a CUDA device that is `cuda`, then `triton`. An op of a square matrix, which passes its edge as
`side`, takes `triton` first from the edge on at which the device's measurements say that it is the
faster (vicreg_kernels/configs); without measurements, at none.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping

import torch
from torch.autograd import forward_ad

from vicreg_kernels import configs
from vicreg_kernels.core import library

BACKENDS = ("reference", "cpu", "triton", "cuda")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether checks that wait for the device are wanted.
DEBUG: bool = os.environ.get("VICREG_KERNELS_DEBUG", "0") == "1"
ENVIRONMENT_BACKEND: str | None = os.environ.get("VICREG_KERNELS_BACKEND") or None

logger = logging.getLogger("vicreg_kernels")


def interpreting() -> bool:
    """Whether Triton runs its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


_INTERPRETING = interpreting()


def missing(backend: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `backend` cannot run on `device_type` and `dtype`; None when it can."""
    if backend == "reference":
        return None
    if dtype not in FUSED_DTYPES:
        return f"it takes float32, bfloat16 or float16, not {dtype}; float64 runs on 'reference'"
    if backend == "cpu":
        if library.CPU_MISSING is not None:
            return library.CPU_MISSING
        return None if device_type == "cpu" else f"it runs on CPU tensors, not {device_type}"
    if backend == "triton":
        if library.TRITON_MISSING is not None:
            return library.TRITON_MISSING
        if device_type == "cuda" or (device_type == "cpu" and _INTERPRETING):
            return None
        return f"it runs on CUDA tensors, not {device_type}"
    if library.CUDA_MISSING is not None:
        return library.CUDA_MISSING
    return None if device_type == "cuda" else f"it runs on CUDA tensors, not {device_type}"


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: got {backend!r}, takes one of {BACKENDS} or None")


def _source(backend: str | None) -> str:
    """Who named the backend: the call or the environment."""
    if backend is not None:
        return f"backend={backend!r}"
    return f"VICREG_KERNELS_BACKEND={ENVIRONMENT_BACKEND!r}"


# (op, index of a CUDA device, dtype) -> the least side for which triton is chosen; filled once a
# device, so that a call reads no file and asks the driver nothing.
_thresholds: dict[tuple[str, int, torch.dtype], float] = {}
configs.on_forget(_thresholds.clear)


@library.constant_in_graphs
def triton_from(op: str, index: int | None, dtype: torch.dtype) -> float:
    """The smallest side at which the op runs on `triton` on a CUDA device; inf if there is none.

    index: the device's, or None for the current one. It is a constant of a compiled graph.
    """
    key = (op, index, dtype)
    return _thresholds[key] if key in _thresholds else _read_threshold(op, index, dtype)  # type: ignore[index]


def _gpu(index: int | None) -> tuple[int, str] | None:
    """Index and name of a CUDA device, by default the current one; None where there is no CUDA."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if index is None else index
    return index, torch.cuda.get_device_name(index)


def _read_threshold(op: str, index: int | None, dtype: torch.dtype) -> float:
    gpu = _gpu(index)
    if gpu is None:
        return math.inf
    by_format = configs.load(gpu[1])["triton_from"].get(op, {})
    least = by_format.get("single" if dtype == torch.float32 else "half")
    threshold = math.inf if dtype not in FUSED_DTYPES or least is None else least
    _thresholds[op, gpu[0], dtype] = threshold
    return threshold


is_transforming: Callable[[], bool] = torch._C._are_functorch_transforms_active


def carries_tangents() -> bool:
    """Whether a tensor may carry a forward-mode derivative (torch.autograd.forward_ad)."""
    return forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether what runs now is under a transform of torch.func or carries forward-mode derivatives,
    neither of which the fused ops have a rule for.
    """
    return is_transforming() or carries_tangents()


_CPU_ORDER: tuple[str, ...] = ("cpu",)
_CUDA_ORDER, _LARGE_ORDER = ("cuda", "triton"), ("triton", "cuda")


def choose(
    op: str,
    backend: str | None,
    device: torch.device | str,
    dtype: torch.dtype,
    side: int | None = None,
    cannot_run: Mapping[str, str] | None = None,
) -> str:
    """Return the name of the backend that runs `op`. side: the edge of its square matrix, if any.

    device: the tensors' device; a device type such as "cuda" means its current device.
    cannot_run: backends that do not take this call's sizes, and why, in addition to `missing`.

    Under a transform of torch.func (grad, vmap, jvp), and inside forward_ad.dual_level(), it is the
    reference, whose operations torch can transform.

    Raises ValueError for an unknown backend, RuntimeError for a named one that cannot run here.
    """
    check_backend(backend)
    plain = not torch.compiler.is_compiling() and transformed()
    device_type = device if isinstance(device, str) else device.type
    named = backend if backend is not None else ENVIRONMENT_BACKEND
    if named is not None:
        if named not in BACKENDS:
            raise ValueError(f"VICREG_KERNELS_BACKEND: got {named!r}, takes one of {BACKENDS}")
        reason = missing(named, device_type, dtype) or (cannot_run or {}).get(named)
        if plain and named != "reference":
            reason = (
                "torch.func and forward-mode derivatives take plain PyTorch alone; leave the "
                "backend to the library"
            )
        if reason is not None:
            raise RuntimeError(f"{_source(backend)} cannot run {op} here: {reason}")
        return named
    if plain:
        return "reference"
    order = _CPU_ORDER
    if device_type == "cuda":
        order = _CUDA_ORDER
        if side is not None:
            index = None if isinstance(device, str) else device.index
            least = triton_from(op, index, dtype)
            # A size under torch.compile may be a symbol, which a comparison would fix to a range.
            if least != math.inf and side >= least:
                order = _LARGE_ORDER
    for name in order:
        if not (cannot_run and name in cannot_run) and missing(name, device_type, dtype) is None:
            return name
    return "reference"


def log_choice(
    op: str, chosen: str, asked: str | None, device: torch.device, shape: object
) -> None:
    """One debug line a call; not called under torch.compile."""
    if logger.isEnabledFor(logging.DEBUG):
        named = asked or ENVIRONMENT_BACKEND
        why = _source(asked) if named else "best for the device and shape"
        logger.debug("%s %s on %s: %s (%s)", op, tuple(shape), device, chosen, why)  # type: ignore[arg-type]
