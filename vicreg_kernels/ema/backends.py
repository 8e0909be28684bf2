"""The backends of the EMA op behind one function; reference.py's `update` says what it takes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import lru_cache

import torch

from vicreg_kernels import dispatch
from vicreg_kernels.library import NAMESPACES

dispatch.register("ema_update_")


@lru_cache(maxsize=64)
def load(backend: str) -> Callable[..., None]:
    if backend in ("reference", "triton"):
        return importlib.import_module(f"vicreg_kernels.ema.{backend}").update
    namespace = NAMESPACES[backend]
    return getattr(torch.ops, namespace).ema_update_.default
