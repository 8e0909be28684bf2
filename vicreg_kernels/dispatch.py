"""Which backend runs: the choice, the override, the report.

`backend=None` takes the best one for the device and shape. A backend named in the call that cannot
run there is an error. The environment variable VICREG_KERNELS_BACKEND, read at import, takes the
place of None; VICREG_KERNELS_DEBUG is read then too. What ran, and why, goes to the debug log of
the logger "vicreg_kernels".
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch

from vicreg_kernels import library

BACKENDS = ("reference", "cpu", "triton", "cuda")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Whether checks that wait for the device are wanted.
DEBUG: bool = os.environ.get("VICREG_KERNELS_DEBUG", "0") == "1"
ENVIRONMENT_BACKEND: str | None = os.environ.get("VICREG_KERNELS_BACKEND") or None

# Below this min(N, D) a vendor product beats a hand-written triangular one (published H100 figures:
# 0.7-0.8x at <= 2048, 1.3x at 4096); not measured here yet.
TRIANGULAR_FROM = 2048

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


def choose(
    op: str,
    backend: str | None,
    device_type: str,
    dtype: torch.dtype,
    side: int | None = None,
    unfit: Mapping[str, str] | None = None,
) -> str:
    """The name of the backend that runs `op`; side is the edge of its square matrix, if it has one.

    unfit: backends that do not take this call's sizes, and why, beyond what `missing` knows.

    Raises ValueError for an unknown backend, RuntimeError for a named one that cannot run here.
    """
    check_backend(backend)
    unfit = unfit or {}
    named = backend if backend is not None else ENVIRONMENT_BACKEND
    if named is not None:
        if named not in BACKENDS:
            raise ValueError(f"VICREG_KERNELS_BACKEND: got {named!r}, takes one of {BACKENDS}")
        reason = missing(named, device_type, dtype) or unfit.get(named)
        if reason is not None:
            raise RuntimeError(f"{_source(backend)} cannot run {op} here: {reason}")
        return named
    order = ["cpu"]
    if device_type == "cuda":
        large = side is not None and side > TRIANGULAR_FROM
        order = ["triton", "cuda"] if large else ["cuda", "triton"]
    for name in order:
        if name not in unfit and missing(name, device_type, dtype) is None:
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
