"""Loads the two compiled libraries, and remembers why one did not load.

`_C` holds the CPU kernels and loads wherever the wheel was built with a C++ compiler; `_C_cuda`
holds the CUDA kernels and is tried only where torch itself has CUDA, because it needs symbols that
a CPU build of torch lacks.
"""

from __future__ import annotations

from pathlib import Path

import torch

_PACKAGE = Path(__file__).parent


def _load(name: str) -> str | None:
    """Load `name`; None when it loaded, else the reason it did not."""
    path = _PACKAGE / f"{name}.abi3.so"
    if not path.exists():
        return f"{path.name} was not built (no compiler when the package was installed)"
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

try:
    import triton

    TRITON_MISSING: str | None = None
    TRITON_VERSION: str | None = triton.__version__
except ImportError as error:
    TRITON_MISSING = f"triton is not installed ({error})"
    TRITON_VERSION = None
