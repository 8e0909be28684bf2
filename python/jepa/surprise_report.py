"""What `jepa surprise` leaves: the table of the physics test, and pictures of surprise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from jepa import intuition, surprise, surprise_figure, videos
from jepa.physics import PROPERTIES, quadruplet

Surprise = Callable[[Tensor], dict[str, list[float]]]


def test(method: Any, surprise_of: Surprise, count: int, output: Path) -> list[dict[str, Any]]:
    """Every property's scores, surprise.json, and a picture and a GIF of one pair of each."""
    found = []
    scores = intuition.scores(surprise_of, count)
    for result in tqdm(scores, total=len(PROPERTIES), desc="properties", ncols=100):
        found.append({kind: asdict(score) for kind, score in result.items()})
        draw_pair(method, found[-1]["mean"]["property"], output)
    (output / "surprise.json").write_text(json.dumps(found, indent=1))
    return found


def table(found: list[dict[str, Any]], title: str) -> str:
    """Relative accuracy and AUROC in per cent, a line a property; the control is not averaged."""
    kinds = list(found[0])
    lines = [title, f"{'property':<14}" + "".join(f"{k + ' sets':>16}{'AUROC':>8}" for k in kinds)]
    rows = {next(iter(row.values()))["property"]: row for row in found}
    for name, row in rows.items():
        figures = (f"{100 * row[k]['accuracy']:>16.1f}{100 * row[k]['auroc']:>8.1f}" for k in kinds)
        lines.append(f"{name:<14}" + "".join(figures))
    averaged = [row for name, row in rows.items() if name != "control"]
    for label, pick in (("average", lambda v: sum(v) / len(v)), ("least", min)):
        figures = (
            f"{100 * pick([row[k]['accuracy'] for row in averaged]):>16.1f}"
            f"{100 * pick([row[k]['auroc'] for row in averaged]):>8.1f}"
            for k in kinds
        )
        lines.append(f"{label:<14}" + "".join(figures))
    return "\n".join(lines)


def draw_pair(method: Any, property: str, output: Path, seed: int = 0) -> None:
    """An impossible video above the possible one that shares its past."""
    made = quadruplet(property, seed)
    both = torch.from_numpy(made.videos[[0, 2]].copy())
    curves = surprise.curves(method, both)
    names = ("possible", "impossible")
    clips = dict(zip(names, both, strict=True))
    found = dict(zip(names, curves, strict=True))
    surprise_figure.picture(
        clips, found, output / f"{property}.png", property, made.first_difference
    )
    surprise_figure.animation(clips, found, output / f"{property}.gif")


def draw_video(method: Any, path: Path, size: int, output: Path) -> None:
    video = videos.decode(path, size)
    (curve,) = surprise.curves(method, video[None])
    clip, found = {"video": video}, {"video": curve}
    surprise_figure.picture(clip, found, output / f"{path.stem}.png", path.name, None)
    surprise_figure.animation(clip, found, output / f"{path.stem}.gif")
    values = curve.over_time.nan_to_num(-1.0)
    print(f"{path.name}: mean {curve.mean:.4f}, most {curve.maximum:.4f} at {int(values.argmax())}")
