"""Checks of combinations of settings, so that no setting is silently ignored."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vicreg_jepa.methods import drawing
from vicreg_jepa.methods.base import METHODS, check_encoder, check_heads, taken_by

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config

# The settings that only some kinds of data take.
KINDS = {
    "path": ("images", "torchvision", "videos", "webdataset", "physics", "trajectories"),
    "test": ("images", "webdataset"),
    "name": ("torchvision",),
    "download": ("torchvision",),
    "decoder": ("videos", "webdataset"),
    "videos": ("physics",),
    "noise": ("physics",),
    "white": ("images", "webdataset"),
    "world": ("world",),
    "settings": ("world",),
    "policy": ("world",),
    "length": ("world",),
    "max_pixels": ("images", "videos", "webdataset"),
    "max_bytes": ("webdataset", "physics"),
}

OF_VIT = ("depth", "heads", "patch")
OF_NATURAL = drawing.NATURAL
OF_LARS = ("trust", "cap_trust")
DATA_KINDS = {
    "images": ("digits", "images", "torchvision", "webdataset"),
    "videos": ("videos", "webdataset", "physics"),
    "trajectories": ("world", "trajectories"),
}


def check(config: Config) -> None:
    """Raises ValueError that names the setting."""
    method, kind = config.method, METHODS[config.method]
    kinds = DATA_KINDS[kind.data]
    if config.data.kind not in kinds:
        takes = f"{kind.data}: {', '.join(kinds)}"
        raise ValueError(f"data.kind: got {config.data.kind!r}, {method} takes {takes}")
    if kind.learns == "tokens" and config.model.encoder != "vit":
        raise ValueError(f"model.encoder: got {config.model.encoder!r}, {method} takes 'vit'")
    _all_are_taken(config)
    if kind.check is not None:
        kind.check(config)
    check_encoder(config)
    drawing.check(config)
    if kind.learns == "tokens":
        check_heads(config.model, "predictor_heads", "predictor_dim")
    if config.loss.vc_weight and config.training.accumulate > 1:
        raise ValueError(
            f"training.accumulate: got {config.training.accumulate}, takes 1 with "
            "loss.vc_weight, whose terms need the whole batch"
        )
    if kind.learns == "trajectories":
        _is_of_whole_batches(config)
    if config.training.compile == "reduce-overhead":
        _can_be_captured(config)
    if config.training.parallel == "fsdp":
        _can_be_sharded(config)
    if config.places.meeting is not None and config.training.parallel != "ddp":
        got = config.training.parallel
        raise ValueError(f"training.parallel: got {got!r}, takes 'ddp' with places.meeting")
    if config.kernels == "reference" and config.backend is not None:
        raise ValueError(f"backend: got {config.backend!r}, takes none with kernels='reference'")


def _all_are_taken(config: Config) -> None:
    for key, methods in taken_by().items():
        if config.method not in methods:
            _has_its_default(config, key, f"used by {', '.join(methods)}, not by {config.method}")
    encoder = config.model.encoder
    if encoder != "vit":
        for name in OF_VIT:
            key = f"model.{name}"
            _has_its_default(config, key, f"used by model.encoder 'vit', not by {encoder!r}")
    if config.augment.name != "natural":
        for name in OF_NATURAL:
            used = f"used by augment.name 'natural', not by {config.augment.name!r}"
            _has_its_default(config, f"augment.{name}", used)
    if config.optimizer.name == "lars":
        _has_its_default(config, "optimizer.betas", "used by optimizer.name 'adamw', not by 'lars'")
    else:
        for name in OF_LARS:
            key = f"optimizer.{name}"
            _has_its_default(config, key, "used by optimizer.name 'lars', not by 'adamw'")


def _has_its_default(config: Config, key: str, users: str) -> None:
    section, name = key.split(".")
    settings: Any = getattr(config, section)
    value = getattr(settings, name)
    if value != type(settings).model_fields[name].default:
        raise ValueError(f"{key}: got {value!r}, but it is {users}")


def _is_of_whole_batches(config: Config) -> None:
    training, method = config.training, config.method
    if training.accumulate > 1:
        raise ValueError(
            f"training.accumulate: got {training.accumulate}, {method} takes 1: a step on "
            "trajectories takes the whole batch"
        )
    if training.compile:
        raise ValueError(f"training.compile: got {training.compile!r}, {method} takes false")
    if training.parallel == "fsdp":
        raise ValueError(f"training.parallel: got 'fsdp', {method} takes 'ddp'")


def _can_be_sharded(config: Config) -> None:
    got = "training.parallel: got 'fsdp'"
    if config.model.encoder != "vit":
        encoder = config.model.encoder
        raise ValueError(f"{got}, which shards transformers; model.encoder {encoder!r} takes 'ddp'")
    if config.optimizer.name == "lars":
        raise ValueError(f"{got}; optimizer.name 'lars' needs whole tensors and takes 'ddp'")
    if config.training.compile:
        raise ValueError(f"{got}; training.compile takes 'ddp'")


def _can_be_captured(config: Config) -> None:
    """Refuse settings that a CUDA graph would compute wrongly or cannot capture."""
    key, training = "training.compile: got 'reduce-overhead'", config.training
    if not training.device.startswith("cuda"):
        raise ValueError(f"{key} on {training.device!r}, takes a CUDA device")
    if METHODS[config.method].learns == "tokens":
        raise ValueError(f"{key}, {config.method}'s batches change their shape: takes true")
    if training.accumulate > 1:
        raise ValueError(f"{key} with accumulate {training.accumulate}, takes accumulate 1")
