"""Which inputs the Triton products with TMA operands take (tma_products.py): a rule of shapes,
dtypes and the GPU alone, so that the shapes of what is saved follow from it under torch.compile.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vicreg_kernels.core.triton.device import device_of
from vicreg_kernels.vicreg.triton import configs

# Compute capabilities whose blocks have the 227 KB of shared memory that the tiles may need.
CAPABILITIES = (9, 10)


def takes(x: Tensor) -> bool:
    """x: [G, N, D] or [N, D]. Half precision, min(N, D) at least the table's for this GPU, and rows
    of the operands, of D and (Gram side) of N elements, in whole 16 bytes, as a TMA descriptor
    wants them.

    The views may have any strides: the operands are written by a pass that centres them.
    """
    rows, dim = x.shape[-2:]
    if x.dtype not in (torch.bfloat16, torch.float16):
        return False
    name, _, capability = device_of(x)
    side = configs.tma_side(name)
    if capability not in CAPABILITIES or side is None or rows < side or dim < side:
        return False
    return dim % 8 == 0 and (rows >= dim or rows % 8 == 0)


def saves_operands(x: Tensor) -> bool:
    """Whether the gradient's product takes its operands from the forward: the centred views and
    the square matrix in bfloat16. A square matrix leaves float16's range, so float16 multiplies
    in tf32, in the other kernel.
    """
    return x.dtype == torch.bfloat16 and takes(x)
