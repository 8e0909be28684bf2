"""Runs that tests/trainer/test_ranks.py compares, all in one launch: torchrun's processes run each
of RUNS in a folder of its own, in one process group.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch.distributed as dist
from vicreg_jepa import config
from vicreg_jepa.methods.base import METHODS, taken_by
from vicreg_jepa.training.run import train

EXPANDER = {"expander": [48, 64]}
CONV = {"encoder": "conv", "dim": 48, **EXPANDER}
VIT = {"encoder": "vit", "dim": 48, "depth": 2, "heads": 3, "patch": 4}
JEPA = VIT | {"predictor_dim": 48, "predictor_depth": 1, "predictor_heads": 3}
FRAMES = JEPA | {"sees": "frame"}
# Shards, with all that touches them: pieces, recomputed blocks, clipped gradients.
SHARDS = {"parallel": "fsdp", "accumulate": 2, "checkpointing": True}

WORLD = {"encoder": "conv", "dim": 8, "latent": 16, "predictor": "transformer"}
WORLD_LOSS = {"unroll": 3, "time_variance": 1.0, "time_covariance": 1.0, "slices": 32}

# name -> method, model, training: what two ranks are given beside what one process is.
RUNS: dict[str, tuple[str, dict, dict, dict]] = {
    "vicreg": ("vicreg", CONV, {}, {}),
    "vicreg_pieces": ("vicreg", CONV, {"accumulate": 2}, {}),
    "vicreg_jepa": ("vicreg_jepa", CONV | {"predictor_dim": 48}, {}, {}),
    "lejepa": ("lejepa", CONV, {}, {}),
    "vicreg_shards": ("vicreg", VIT | EXPANDER, {}, {"parallel": "fsdp"}),
    "ijepa_shards": ("ijepa", JEPA, {}, {"parallel": "fsdp"}),
    "vjepa": ("vjepa", JEPA, {}, {}),
    "vjepa_shards": ("vjepa", JEPA, {}, SHARDS),
    "vjepa_causal": ("vjepa_causal", FRAMES, {}, {}),
    "pixels_shards": ("pixels", FRAMES, {}, {"parallel": "fsdp"}),
    "world": ("world", WORLD, {}, {}),
}


def settings(name: str, root: Path, ranks: int) -> config.Config:
    """Of the run `name` in one process, or on ranks."""
    method, model, training, on_ranks = RUNS[name]
    data, loss, optimizer = {"kind": "digits", "size": 8}, {}, {"rate": 1e-3, "clip": 0.5}
    if method in taken_by()["optimizer.momentum"]:
        optimizer["momentum"] = 0.5
    if "frame" in model.values():
        loss = {"static_token_share": 0.3, "vc_weight": 1.0}
    if METHODS[method].data == "videos":
        data = {"kind": "physics", "size": 64, "frames": 4, "videos": 8, "path": root / "videos"}
        model = model | {"patch": 16, "tubelet": 2}
    if METHODS[method].data == "trajectories":
        data, loss = {"kind": "world", "size": 65, "window": 4, "length": 20}, WORLD_LOSS
    training = {"steps": 4, "batch": 8, "save_every": 2, "log_every": 2} | training
    return config.parse(
        {
            "method": method,
            "data": data,
            "model": model,
            "loss": loss,
            "optimizer": optimizer,
            "training": training | (on_ranks if ranks > 1 else {}),
        }
    )


def main(root: Path) -> None:
    """Those that have a folder under root / "two"; a checkpoint in it is resumed."""
    dist.init_process_group("gloo")
    try:
        for folder in sorted((root / "two").iterdir()):
            train(settings(folder.name.split("-")[0], root, 2), folder)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
