"""Writes a trained encoder, or a whole trained method, into one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor, nn

from vicreg_jepa import config
from vicreg_jepa.files import output
from vicreg_jepa.methods.networks import Pooled
from vicreg_jepa.models.vit import CENTRE, SCALE, ViT
from vicreg_jepa.training import exported

FORMS = ("own", "timm", "whole")


def write(
    settings: config.Config, method: nn.Module, step: int, file: Path, form: str = "own"
) -> str:
    """Write the encoder of a method, as `restore` gives it; returns a sentence about it.

    form: "own", for load_encoder: the tensors, and in the metadata the configuration. "timm", for
    timm's VisionTransformer: its names and shapes, and in the metadata its arguments; it takes
    images with values in [0, 1], and its features are the same. "whole": the whole method with its
    floating-point tensors in float16, for `restore`, and so for the commands that take a run.
    Raises ValueError for another form, for "timm", if the encoder is not a ViT of images, and for
    "whole", if a weight is not finite in float16.
    """
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}, takes {', '.join(FORMS)}")
    part, network = method.exported()
    about = {"kind": exported.ENCODER, "method": settings.method, "step": str(step)}
    described = {"config": json.dumps(config.describe(settings)), "channels": str(method.channels)}
    if form == "timm":
        tensors, arguments = _timm(settings, network)
        about["timm"] = json.dumps(arguments)
    elif form == "whole":
        part, tensors = "method", _halved(method.state_dict())
        about |= {**described, "kind": exported.WHOLE}
    else:
        tensors = dict(network.state_dict())
        about |= described
    content = save({name: z.contiguous() for name, z in tensors.items()}, metadata=about)
    with output.writing(file):
        output.replace(file, content)
    return f"{len(tensors)} tensors of the {part}: {file}"


def _halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating-point ones in float16."""
    halved = {name: z.half() if z.is_floating_point() else z for name, z in tensors.items()}
    for name, z in halved.items():
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"--format: got 'whole', but {name} has values that are not finite")
        if not bool(z.isfinite().all()):
            raise ValueError(f"--format: got 'whole', but {name} has values beyond float16's range")
    return halved


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
