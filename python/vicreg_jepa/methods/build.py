"""A method from its configuration; the weights depend on the seed alone, not on the kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

import vicreg_kernels as vk
from vicreg_jepa.config import CAUSAL, ON_VIDEO, Config
from vicreg_jepa.methods.augment import Augment
from vicreg_jepa.methods.ijepa import IJEPA
from vicreg_jepa.methods.lejepa import LeJEPA
from vicreg_jepa.methods.pixels import Pixels
from vicreg_jepa.methods.vicreg import VICReg
from vicreg_jepa.methods.vicreg_jepa import VICRegJEPA
from vicreg_jepa.methods.vjepa import VJEPA
from vicreg_jepa.methods.vjepa_causal import CausalVJEPA
from vicreg_jepa.models.conv import ACTIVATIONS, ConvEncoder, Expander
from vicreg_jepa.models.masks import VideoMasks, following
from vicreg_jepa.models.vit import Predictor, ViT
from vicreg_jepa.ops import choose
from vicreg_jepa.ops.encode import encode


class Pooled(nn.Module):
    """A ViT's tokens averaged: images [N, C, H, W] -> [N, features]."""

    def __init__(self, vit: ViT, kernels: choose.Kernels) -> None:
        super().__init__()
        self.vit, self.kernels, self.features = vit, kernels, vit.features

    def forward(self, images: Tensor) -> Tensor:
        return encode(self.vit, self.kernels, images, None).mean(dim=1)


def method(config: Config, channels: int) -> nn.Module:
    """On the CPU, in training mode, for images or clips of so many channels."""
    torch.manual_seed(config.seed)
    made = _method(config, channels)
    for part in made.modules():
        if isinstance(part, vk.MaskedAttention):
            part.backend = config.backend
    made.channels = channels  # what a checkpoint needs to build it again
    return made


def _method(config: Config, channels: int) -> nn.Module:
    kernels = choose.named(config.kernels, config.backend)
    model, loss, data = config.model, config.loss, config.data
    if config.method in ("ijepa", *ON_VIDEO):
        return _predictive(config, kernels, channels)
    activation = ACTIVATIONS[model.activation]
    encoder: Any
    if model.encoder == "conv":
        encoder = ConvEncoder(channels, model.dim, activation)
    else:
        vit = ViT(
            (channels, 1, data.size, data.size), (1, model.patch, model.patch), model.dim,
            model.depth, model.heads,
        )  # fmt: skip
        encoder = Pooled(vit, kernels)
    expander = Expander(encoder.features, *model.expander, activation)
    shared = (encoder, expander, kernels, Augment())
    weights = (loss.invariance, loss.variance, loss.covariance)
    if config.method == "vicreg":
        return VICReg(*shared, weights=weights)
    if config.method == "vicreg_jepa":
        width = model.expander[1]
        predictor = mlp(width, model.predictor_dim, width)
        return VICRegJEPA(encoder, expander, predictor, *shared[2:], weights=weights)
    return LeJEPA(*shared, sigreg=loss.sigreg, slices=loss.slices, views=loss.views)


def _predictive(config: Config, kernels: choose.Kernels, channels: int) -> nn.Module:
    model, data, video = config.model, config.data, config.method in ON_VIDEO
    position = "rope" if video else "sincos"
    encoder = ViT(
        (channels, data.frames if video else 1, data.size, data.size),
        (model.tubelet if video else 1, model.patch, model.patch),
        model.dim,
        model.depth,
        model.heads,
        position,
        model.sees,
    )
    patch = encoder.patch_embed.proj.weight[0].numel()
    predictor = Predictor(
        encoder.grid,
        model.dim,
        model.predictor_dim,
        model.predictor_depth,
        model.predictor_heads,
        "both" if config.method in CAUSAL else position,
        targets=patch if config.method == "pixels" else None,
        local=config.method in CAUSAL,
    )
    for part in (encoder, predictor):
        part.checkpointing = config.training.checkpointing
    draw = VideoMasks(future=config.loss.future, frames_seen=config.loss.frames_seen)
    video_loss = {"still": config.loss.still, "spread": config.loss.spread}
    if config.method == "pixels":
        return Pixels(encoder, predictor, kernels, following, **video_loss)
    shared = {"momentum": config.optimizer.momentum, "steps": config.training.steps}
    if config.method == "vjepa":
        return VJEPA(encoder, predictor, kernels, draw, **shared, **video_loss)
    if config.method == "vjepa_causal":
        return CausalVJEPA(encoder, predictor, kernels, following, **shared, **video_loss)
    return IJEPA(encoder, predictor, kernels, **shared)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between."""
    layers: list[nn.Module] = []
    for inward, outward in pairwise(widths):
        layers += [nn.Linear(inward, outward), nn.GELU()]
    return nn.Sequential(*layers[:-1])
