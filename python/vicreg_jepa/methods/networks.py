"""Builds the networks of a method from its settings; the order of building is the order in which
their weights are drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vicreg_jepa.methods.base import RESNETS
from vicreg_jepa.models.conv import ACTIVATIONS, ConvEncoder, Expander
from vicreg_jepa.models.resnet import ResNet18
from vicreg_jepa.models.vit import Predictor, ViT
from vicreg_jepa.ops.choose import Kernels
from vicreg_jepa.ops.encode import encode

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


class Pooled(nn.Module):
    """A ViT and the mean over its tokens: images [N, C, H, W] -> [N, features]."""

    def __init__(self, vit: ViT, kernels: Kernels) -> None:
        super().__init__()
        self.vit, self.kernels, self.features = vit, kernels, vit.features

    def forward(self, images: Tensor) -> Tensor:
        return encode(self.vit, self.kernels, images, None).mean(dim=1)


def encoder_and_expander(
    config: Config, kernels: Kernels, channels: int
) -> tuple[nn.Module, nn.Module]:
    """Build the networks of a method of views: images -> [N, features] -> [N, D]."""
    model, data = config.model, config.data
    activation = ACTIVATIONS[model.activation]
    encoder: Any
    if model.encoder == "conv":
        encoder = ConvEncoder(channels, model.dim, activation)
    elif model.encoder in RESNETS:
        small = model.encoder == "resnet18_small"
        encoder = ResNet18(channels, model.dim, activation, small=small)
    else:
        vit = ViT(
            (channels, 1, data.size, data.size), (1, model.patch, model.patch), model.dim,
            model.depth, model.heads,
        )  # fmt: skip
        encoder = Pooled(vit, kernels)
    return encoder, Expander(encoder.features, *model.expander, activation)


def encoder_and_predictor(
    config: Config, channels: int, *, video: bool, causal: bool = False, pixels: bool = False
) -> tuple[ViT, Predictor]:
    """Build the networks of a method of tokens.

    causal: for prediction frame by frame; pixels: the predictor outputs tubelets of pixels.
    """
    model, data = config.model, config.data
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
        "both" if causal else position,
        targets=patch if pixels else None,
        local=causal,
    )
    for part in (encoder, predictor):
        part.checkpointing = config.training.checkpointing
    return encoder, predictor
