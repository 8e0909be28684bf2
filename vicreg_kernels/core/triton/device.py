"""What launchers ask of the device, and the formats that its products take. Imports no triton."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Multiprocessors that the interpreter, which has none, is launched for.
INTERPRETED_PROCESSORS = 4


class Device(NamedTuple):
    """major: of the compute capability."""

    name: str
    processors: int
    major: int


@lru_cache(maxsize=64)
def device(index: int | None) -> Device:
    """The CUDA device of that index; None, or where there is no GPU (fake tensors): what the
    interpreter is launched for.
    """
    if index is None or not torch.cuda.is_available():
        return Device("default", INTERPRETED_PROCESSORS, 9)
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.name, properties.multi_processor_count, properties.major)


def device_of(z: Tensor) -> Device:
    return device(z.device.index if z.device.type == "cuda" else None)


def on_device(z: Tensor) -> AbstractContextManager[Any]:
    """The context in which kernels are launched on z's device."""
    return torch.cuda.device(z.device) if z.is_cuda else nullcontext()


def rounds_by_hand(z: Tensor) -> bool:
    """Whether kernels round to z's dtype themselves: the interpreter truncates to bfloat16."""
    return z.dtype == torch.bfloat16 and z.device.type == "cpu"


def operand_format(z: Tensor, tf32x3: bool = False) -> tuple[str, str, str]:
    """(operand format, precision of the forward product, of the backward product) for z's dtype and
    device; operands.py says what the formats are.

    float32 is multiplied as three tf32 products, which keep about 21 bits, unless the user allows
    tf32 through torch.set_float32_matmul_precision and the call does not ask for tf32x3.
    """
    major = device_of(z).major
    if z.dtype == torch.bfloat16:
        return "bf16 in fp32" if rounds_by_hand(z) else "bf16", "ieee", "ieee"
    if z.dtype == torch.float16:  # the square matrix leaves float16's range: tf32 has its precision
        return ("fp16", "ieee", "tf32") if major >= 8 else ("fp16", "ieee", "ieee")
    if major < 8:
        return "fp32", "ieee", "ieee"
    if tf32x3 or torch.get_float32_matmul_precision() == "highest":
        return "fp32", "tf32x3", "tf32x3"
    return "tf32", "tf32", "tf32"
