"""Builds a method from its configuration; the weights depend only on the seed, not on the
kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

import vicreg_kernels as vk
from vicreg_jepa.methods.base import METHODS
from vicreg_jepa.ops import choose

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


def method(config: Config, channels: int) -> nn.Module:
    """Build it on the CPU, in training mode, for images or clips of this number of channels."""
    torch.manual_seed(config.seed)
    kernels = choose.named(config.kernels, config.backend)
    built = METHODS[config.method].build(config, kernels, channels)
    for part in built.modules():
        if isinstance(part, vk.MaskedAttention):
            part.backend = config.backend
    built.channels = channels  # what a checkpoint needs to build it again
    return built
