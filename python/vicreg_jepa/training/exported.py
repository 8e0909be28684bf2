"""Reads the files that `vicreg-jepa export` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from vicreg_jepa import config
from vicreg_jepa.files import listing
from vicreg_jepa.methods import build

ENCODER, WHOLE = "vicreg_jepa encoder", "vicreg_jepa method"  # the kinds of files
FORMATS = {ENCODER: "own", WHOLE: "whole"}  # that `export --format` names


def built(
    file: str | Path, kind: str
) -> tuple[config.Config, nn.Module, int, Mapping[str, Tensor]]:
    """(configuration, method with the weights of its beginning, step, tensors) of a file of this
    kind. Raises ValueError if the file is another one, or damaged.
    """
    path = listing.regular(Path(file), "file")
    try:
        with safe_open(path, "pt") as opened:
            about: dict[str, str] = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"file: {path} is no intact safetensors file ({error})") from error
    if about.get("kind") != kind or "config" not in about:
        raise ValueError(
            f"file: {path} has the metadata {sorted(about)} and the kind {about.get('kind')!r}, "
            f"takes a file of `vicreg-jepa export --format {FORMATS[kind]}`"
        )
    try:
        settings = config.parse(json.loads(about["config"]))
        channels, step = int(about["channels"]), int(about["step"])
    except (KeyError, ValueError) as error:
        raise ValueError(f"file: {path} has damaged metadata ({error!r})") from error
    with torch.random.fork_rng():  # building draws weights, which are replaced
        method = build.method(settings, channels)
    return settings, method, step, tensors


def fill(network: nn.Module, tensors: Mapping[str, Tensor], file: str | Path) -> None:
    """Set the weights of a network. Raises ValueError if they do not fit."""
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"file: {file} does not fit its configuration ({error})") from error


def method(file: str | Path) -> tuple[config.Config, nn.Module, int]:
    """(configuration, trained method in evaluation mode, step) of a file of `--format whole`."""
    settings, trained, step, tensors = built(file, WHOLE)
    fill(trained, tensors, file)
    return settings, trained.eval(), step
