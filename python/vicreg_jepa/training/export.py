"""Writes a trained encoder into one safetensors file, and loads it from there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vicreg_jepa import config
from vicreg_jepa.files import listing, output
from vicreg_jepa.methods import build
from vicreg_jepa.methods.networks import Pooled
from vicreg_jepa.models.vit import CENTRE, SCALE, ViT
from vicreg_jepa.training.run import restore

FORMATS = ("own", "timm")
KIND = "vicreg_jepa encoder"


class Encoder(nn.Module):
    """A trained encoder. forward: images [B, C, H, W] or clips [B, C, F, H, W], floats in [0, 1],
    or a world model's frames, uint8 [B, H, W, C] -> features [B, D], as probes see them.

    network: the exported part of the method, with its weights; settings: the run's configuration;
    step: the step of the training.
    """

    def __init__(self, method: nn.Module, settings: config.Config, step: int) -> None:
        super().__init__()
        self.network = method.exported()[1]
        self.settings, self.step = settings, step
        # Not registered: the rest of the method, such as the expander, was not exported.
        self.methods = (method,)

    def forward(self, samples: Tensor) -> Tensor:
        return self.methods[0].features(samples)


def write(run: Path, file: Path, form: str = "own") -> str:
    """Write the encoder of a run's newest checkpoint; returns a sentence about it.

    form: "own", for load_encoder: the tensors, and in the metadata the configuration. "timm", for
    timm's VisionTransformer: its names and shapes, and in the metadata its arguments; it takes
    images with values in [0, 1], and its features are the same. Raises ValueError for "timm", if
    the encoder is not a ViT of images.
    """
    settings, method, step = restore(run)
    part, network = method.exported()
    if form == "timm":
        tensors, arguments = _timm(settings, network)
        about = {"timm": json.dumps(arguments)}
    else:
        tensors = dict(network.state_dict())
        about = {"config": json.dumps(config.describe(settings)), "channels": str(method.channels)}
    about |= {"kind": KIND, "method": settings.method, "step": str(step)}
    with output.writing(file):
        save_file({name: z.contiguous() for name, z in tensors.items()}, file, metadata=about)
    return f"{len(tensors)} tensors of the {part}: {file}"


def load_encoder(file: str | Path) -> Encoder:
    """Load what `vicreg-jepa export RUN FILE` wrote, on the CPU and in evaluation mode. Raises
    ValueError if the file is another one, or damaged.
    """
    path = listing.regular(Path(file), "file")
    try:
        with safe_open(path, "pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"file: {path} is no intact safetensors file ({error})") from error
    if about.get("kind") != KIND or "config" not in about:
        raise ValueError(
            f"file: {path} has the metadata {sorted(about)}, takes a file of `vicreg-jepa export` "
            "without --format timm"
        )
    settings = config.parse(json.loads(about["config"]))
    with torch.random.fork_rng():  # building draws weights, which are replaced
        method = build.method(settings, int(about["channels"]))
    encoder = Encoder(method, settings, int(about["step"]))
    try:
        encoder.network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"file: {path} does not fit its configuration ({error})") from error
    method.eval()
    return encoder.eval()


def _timm(settings: config.Config, network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors by timm's names, and the arguments of its VisionTransformer."""
    vit = network.vit if isinstance(network, Pooled) else network
    if not isinstance(vit, ViT) or vit.grid.frames != 1 or settings.is_video:
        raise ValueError(
            f"--format: got 'timm', but the encoder of {settings.method} is no ViT of images"
        )
    tensors = dict(vit.state_dict())
    weight, bias = tensors["patch_embed.proj.weight"], tensors["patch_embed.proj.bias"]
    # Ours scales pixels before the projection: here that is part of the projection.
    tensors["patch_embed.proj.bias"] = bias - (CENTRE / SCALE) * weight.flatten(1).sum(dim=1)
    tensors["patch_embed.proj.weight"] = weight.squeeze(2) / SCALE
    tensors["pos_embed"] = vit.pos_embed[None]
    block: Any = vit.blocks[0]
    return tensors, {
        "img_size": settings.data.size,
        "patch_size": settings.model.patch,
        "in_chans": weight.shape[1],
        "embed_dim": vit.features,
        "depth": len(vit.blocks),
        "num_heads": block.attn.num_heads,
        "num_classes": 0,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    }
