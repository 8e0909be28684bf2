"""Runs a function on several gloo ranks, one process each, and gives back what each returned."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Of every collective: what waits longer has lost a rank.
TIMEOUT = timedelta(seconds=60)


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
    found = [folder / f"{rank}.pt" for rank in range(ranks)]
    return [torch.load(path, weights_only=False) if path.exists() else None for path in found]
