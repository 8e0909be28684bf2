"""VICReg as a method: two views of every image, one encoder, one expander, one loss.

A method is an nn.Module with an `encoder` and `forward(images, generator) -> loss`; `train` needs
no more of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import vicreg_kernels
from jepa import plain
from jepa.augment import Augment
from jepa.models import ConvEncoder, Expander

# x, y: [N, D] -> a 0-d loss.
Loss = Callable[[Tensor, Tensor], Tensor]

LOSSES = ("fused", "reference")


def loss_named(name: str, backend: str | None = None) -> Loss:
    """ "fused": vicreg_kernels' op on `backend`; "reference": the published eager formula."""
    if name == "fused":
        return partial(vicreg_kernels.vicreg_loss, backend=backend)
    if name == "reference":
        return plain.vicreg_loss
    raise ValueError(f"loss: got {name!r}, takes one of {LOSSES}")


class VICReg(nn.Module):
    """Two views through the same encoder and expander, then `loss` of the two embeddings."""

    def __init__(self, encoder: nn.Module, expander: nn.Module, loss: Loss, augment: Augment):
        super().__init__()
        self.encoder = encoder
        self.expander = expander
        self.loss = loss
        self.augment = augment

    def forward(self, images: Tensor, generator: torch.Generator) -> Tensor:
        x = self.expander(self.encoder(self.augment(images, generator)))
        y = self.expander(self.encoder(self.augment(images, generator)))
        return self.loss(x, y)


def build(channels: int, dim: int, hidden: int, loss: Loss, seed: int) -> VICReg:
    """A VICReg whose initial weights depend on `seed` alone, not on the loss."""
    torch.manual_seed(seed)
    encoder = ConvEncoder(channels)
    return VICReg(encoder, Expander(encoder.features, hidden, dim), loss, Augment())
