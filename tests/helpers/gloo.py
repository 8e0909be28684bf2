"""Runs functions on several gloo ranks, one process each, and gives back what each returned.

Starting a process costs seconds, so files that want two ranks share them: `on_two(name)` gives what
`worker(rank, ranks)` of the module tests.<name> returned on each.
"""

from __future__ import annotations

import atexit
import fcntl
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Of every collective: what waits longer has lost a rank.
TIMEOUT = timedelta(seconds=300)
# In this order: the last one changes the sizes of chunks.
SHARED = (
    "ema.test_distributed",
    "library.test_across_ranks",
    "compat.test_ranks",
    "vicreg.test_ranks",
    "barlow.test_ranks",
    "library.test_distributed",
)


def _main(rank: int, function: Callable[..., Any], ranks: int, folder: str, args: Any) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    torch.manual_seed(0)
    try:
        result = function(rank, ranks, *args)
        torch.save(result, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def run(ranks: int, folder: Path, function: Callable[..., Any], *args: Any) -> list[Any]:
    """function(rank, ranks, *args) on each of them, NaN in torch.empty, one thread each; None for
    a rank that ended before it returned.
    """
    mp.spawn(_main, (function, ranks, str(folder), args), nprocs=ranks)
    paths = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _shared(rank: int, ranks: int) -> dict[str, Any]:
    results = {}
    for name in SHARED:
        torch.manual_seed(0)
        torch._dynamo.reset()
        results[name] = importlib.import_module(f"tests.{name}").worker(rank, ranks)
    return results


@cache
def _on_two() -> list[dict[str, Any]]:
    """Once a run of pytest: with xdist its workers share what the first of them has found."""
    name = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if name is None:
        with tempfile.TemporaryDirectory() as folder:
            return run(2, Path(folder), _shared)
    folder = Path(tempfile.gettempdir()) / f"vicreg_kernels_gloo_{os.getuid()}_{name}"
    folder.mkdir(exist_ok=True)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "results.pt").exists():
            with tempfile.TemporaryDirectory() as scratch:
                torch.save(run(2, Path(scratch), _shared), folder / "results.pt")
        return torch.load(folder / "results.pt", weights_only=False)


def on_two(name: str) -> list[Any]:
    """What each of two ranks found in the module tests.<name>, one of SHARED."""
    return [results[name] for results in _on_two()]
