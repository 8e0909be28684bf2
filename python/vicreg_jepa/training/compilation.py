"""torch.compile, where shapes let it: once a kind of call, not once a batch.

A transformer is compiled block by block with dynamic shapes: blocks share one graph, the number of
packed tokens and the longest sample are symbols in it, and what differs from sample to sample
(lists of places, their checks on the host) stays outside. A method of batch statistics has batches
of one shape, so all that comes before its loss is one graph; views are drawn and losses taken
outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vicreg_jepa.models.vit import Block

# "reduce-overhead" by its parts, and an error where a graph would be left out in silence.
CUDA_GRAPHS = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
BACKEND = "inductor"


def compile_method(method: nn.Module, *, whole: bool, cuda_graphs: bool = False) -> None:
    """In place, before DistributedDataParallel wraps it; the parameters keep their names.

    whole: all of its forward as one graph, which takes batches of one shape.
    """
    # A block is a piece already: its gradients are reduced while earlier blocks are differentiated.
    # Torch would cut each graph again, at the ends of DDP's buckets.
    torch._dynamo.config.optimize_ddp = False
    if whole:
        options: dict[str, Any] = {"options": CUDA_GRAPHS} if cuda_graphs else {}
        method.compile(fullgraph=True, backend=BACKEND, **options)
        return
    for module in method.modules():
        if isinstance(module, Block):
            module.compile(fullgraph=True, dynamic=True, backend=BACKEND)
