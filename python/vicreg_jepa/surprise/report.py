"""The output of `vicreg-jepa surprise`: the table of the physics test, and pictures of surprise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vicreg_jepa.data import videos
from vicreg_jepa.physics import PROPERTIES, quadruplet
from vicreg_jepa.surprise import curves, figure, physics_test

# model -> property -> reduction of a curve -> score
Scores = dict[str, dict[str, dict[str, physics_test.Score]]]


def test(models: Mapping[str, physics_test.SurpriseOf], count: int, output: Path) -> Scores:
    """Score every property for each model; writes surprise.json into `output`."""
    scores: Scores = {name: {} for name in models}
    with tqdm(total=len(PROPERTIES) * len(models), desc="physics test", ncols=100) as bar:
        for property in PROPERTIES:
            clips = physics_test.quadruplets(property, count)
            for name, surprise_of in models.items():
                scores[name][property] = physics_test.scores(surprise_of, clips, property)
                bar.update()
    plain = {
        name: {prop: {k: asdict(s) for k, s in kinds.items()} for prop, kinds in row.items()}
        for name, row in scores.items()
    }
    (output / "surprise.json").write_text(json.dumps(plain, indent=1))
    return scores


def table(scores: Scores, count: int) -> str:
    """A table in per cent: both scores and the AUROC of the first model, and the score of the mean
    of the others. The average leaves out the control, whose unbiased score is 50.
    """
    first, *others = scores
    own_scores = scores[first]
    width = max(12, *(len(name) + 2 for name in scores))

    def row(name: str, pick: Any) -> str:
        cells = [pick(own_scores, "mean", "accuracy"), pick(own_scores, "maximum", "accuracy")]
        cells += [pick(own_scores, "mean", "auroc")]
        cells += [pick(scores[other], "mean", "accuracy") for other in others]
        widths = [12, 10, 8] + [width] * len(others)
        return f"{name:<12}" + "".join(
            f"{100 * cell:>{wide}.1f}" for cell, wide in zip(cells, widths, strict=True)
        )

    broken = [property for property in own_scores if property != "control"]

    def over(reduce: Any) -> Any:
        return lambda rows, kind, what: reduce([getattr(rows[p][kind], what) for p in broken])

    def of(property: str) -> Any:
        return lambda rows, kind, what: getattr(rows[property][kind], what)

    return "\n".join(
        (
            f"{first}: relative accuracy in %, {count} quadruplets per property",
            f"{'':<12}{'mean':>12}{'maximum':>10}{'AUROC':>8}"
            + "".join(f"{name:>{width}}" for name in others),
            *(row(property, of(property)) for property in broken),
            row("average", over(lambda values: sum(values) / len(values))),
            row("least", over(min)),
            row("control", of("control")),
        )
    )


def draw_quadruplet(
    method: Any, property: str, output: Path, *, stride: int, seed: int = 0
) -> None:
    """An impossible video and the possible ones that share its past and its future: PNG, GIF."""
    four = quadruplet(property, seed)
    three = torch.from_numpy(four.videos[[0, 2, 1]].copy())
    each = curves.curves(method, three, stride=stride)
    names = ("same past", "exchanged" if four.possible[2] else "impossible", "same future")
    clips = dict(zip(names, three, strict=True))
    shown = dict(zip(names, each, strict=True))
    figure.picture(clips, shown, output / f"{property}.png", property, four.first_difference)
    figure.animation(clips, shown, output / f"{property}.gif")


def draw_video(method: Any, path: Path, size: int, output: Path, *, stride: int) -> None:
    video = videos.decode(path, size)
    (curve,) = curves.curves(method, video[None], stride=stride)
    clip, shown = {"video": video}, {"video": curve}
    figure.picture(clip, shown, output / f"{path.stem}.png", path.name, None)
    figure.animation(clip, shown, output / f"{path.stem}.gif")
    values = curve.over_time.nan_to_num(-1.0)
    print(f"{path.name}: mean {curve.mean:.4f}, most {curve.maximum:.4f} at {int(values.argmax())}")
