"""Connects the processes of torchrun, or uses those of the caller."""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from vicreg_jepa.config import Config
from vicreg_jepa.distributed.ranks import Ranks


@contextmanager
def ranks(settings: Config) -> Iterator[Ranks]:
    """The ranks of torchrun or of the caller's process group; without either, one process."""
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if "RANK" not in os.environ:
        yield Ranks()
        return
    cuda = settings.training.device.startswith("cuda")
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # A model that outlives its process group can hang when it is deleted.
        gc.collect()
        dist.destroy_process_group()


def in_turn(process: Ranks, make: Callable[[], Any]) -> Any:
    """Call make() on rank 0, then on all others at once, which find the files that rank 0 wrote."""
    if process.ranks == 1:
        return make()
    # This needs its own group: simulating videos may take longer than the timeout of the default.
    group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
    result = make() if process.rank == 0 else None
    dist.barrier(group)
    dist.destroy_process_group(group)
    return make() if result is None else result
