"""Loads the two compiled libraries, and remembers why one did not load.

`_C` holds the CPU kernels and loads wherever the wheel was built with a C++ compiler; `_C_cuda`
holds the CUDA kernels and is tried only where torch itself has CUDA, because it needs symbols that
a CPU build of torch lacks.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

# Where each library's ops are, below torch.ops.
NAMESPACES = {"cpu": "vicreg_kernels_cpu", "cuda": "vicreg_kernels_cuda"}
_PACKAGE = Path(__file__).parents[1]


def _not_built(name: str) -> str:
    """What setup.py wrote down about a library that it did not build."""
    report = _PACKAGE / "build_report.json"
    reasons = json.loads(report.read_text()) if report.exists() else {}
    return reasons.get(name, f"{name}.abi3.so was not built (`make setup` or `pip install .` does)")


def _load(name: str) -> str | None:
    """Load `name`; None when it loaded, else the reason it did not."""
    path = _PACKAGE / f"{name}.abi3.so"
    if not path.exists():
        return _not_built(name)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} did not load: {error}"
    return None


def _load_cuda() -> str | None:
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) has no CUDA"
    return _load("_C_cuda")


# None: loaded. A string: why not.
CPU_MISSING: str | None = _load("_C")
CUDA_MISSING: str | None = _load_cuda()

if CPU_MISSING is not None:
    warnings.warn(f"vicreg-kernels runs in plain PyTorch on CPUs: {CPU_MISSING}", stacklevel=2)

TRITON_VERSION: str | None
TRITON_MISSING: str | None
try:
    import triton
except ImportError as error:
    TRITON_VERSION, TRITON_MISSING = None, f"triton is not installed ({error})"
else:
    TRITON_VERSION, TRITON_MISSING = triton.__version__, None


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_in_graphs(function: Function) -> Function:
    """Mark a function that torch.compile calls while it traces, keeping the result as a constant.

    torch.compiler.assume_constant_result sets the same mark, but imports torch._dynamo for it: a
    second at every import of this package, also where nothing is compiled.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def no_autocast(device: torch.device) -> Any:
    """A context without autocast on `device`; an empty one if torch has no autocast there."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def without_autocast(op: Any) -> Callable[..., Any]:
    """Wrap an op, a packet of torch.ops with one overload, so that it runs with autocast off, which
    would lower the products inside. Its first argument is a tensor. Entering the context costs
    20 us, so it is entered only if autocast is on.
    """
    call = op.default

    def run(*arguments: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return call(*arguments)
        with no_autocast(arguments[0].device):
            return call(*arguments)

    return run
