"""torch.compile, arranged so that it compiles once per kind of call instead of once per batch.

A transformer is compiled block by block with dynamic shapes. Blocks share one graph, in which the
number of packed tokens and the longest sample are symbols. The code that depends on the samples
(lists of places, their checks on the host) stays outside. A method of batch statistics has batches
of one shape, so everything before its loss is one graph; views and loss are computed outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vicreg_jepa.models.vit import Block

# The options of "reduce-overhead", and an error if a CUDA graph would be silently skipped.
CUDA_GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
BACKEND = "inductor"


def compile_method(method: nn.Module, *, whole: bool, cuda_graphs: bool = False) -> None:
    """Compile a method in place, before DistributedDataParallel wraps it; parameters keep their
    names.

    whole: compile its whole forward as one graph, for batches of one shape.
    """
    # Each block has its own graph, so its gradients are reduced while earlier blocks are
    # differentiated. Without this line torch would also split each graph at the ends of DDP's
    # buckets.
    torch._dynamo.config.optimize_ddp = False
    if whole:
        options: dict[str, Any] = {"options": CUDA_GRAPHS} if cuda_graphs else {}
        method.compile(fullgraph=True, backend=BACKEND, **options)
        return
    for module in method.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=True, backend=BACKEND)
