"""The output of `vicreg-jepa surprise`: the table of the physics test, and pictures of surprise."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from vicreg_jepa.data import videos
from vicreg_jepa.evaluation.auroc import auroc
from vicreg_jepa.physics import PROPERTIES, quadruplet
from vicreg_jepa.surprise import calibration, curves, figure, physics_test
from vicreg_jepa.surprise.controls import CONTROLS

DELAYS = ((1, 4), (5, 9), (10, 16), (17, 26))  # frames; 26 is the most of 32
# place of the exchange -> model -> property -> reduction of a curve -> score
Scores = dict[str, dict[str, dict[str, dict[str, physics_test.Score]]]]


def test(
    models: Mapping[str, physics_test.SurpriseOf], count: int, output: Path, strength: float
) -> Scores:
    """Score `count` quadruplets of every property and place of the exchange for each model and
    control; writes surprise.json into `output`. strength: of the videos' noise.
    """
    scorers = {**models, **CONTROLS}
    scores: Scores = {place: {name: {} for name in scorers} for place in physics_test.PLACES}
    rounds = len(physics_test.PLACES) * len(PROPERTIES) * len(scorers)
    with tqdm(total=rounds, desc="physics test", ncols=100) as bar:
        for place, hidden in physics_test.PLACES.items():
            for property in PROPERTIES:
                clips = physics_test.quadruplets(property, count, 0, hidden, strength)
                for name, surprise_of in scorers.items():
                    made = physics_test.scores(surprise_of, clips, property)
                    scores[place][name][property] = made
                    bar.update()
    plain = {
        place: {
            name: {prop: {k: asdict(s) for k, s in kinds.items()} for prop, kinds in row.items()}
            for name, row in rows.items()
        }
        for place, rows in scores.items()
    }
    (output / "surprise.json").write_text(json.dumps(plain, indent=1))
    return scores


def table(scores: Scores, count: int, baselines: Sequence[str]) -> str:
    """A table of each place of the exchange, in per cent: both scores of the first model, the AUROC
    of its mean and of its peak, the score of the mean of the others, and how far the first is above
    the best of the `baselines`. The average leaves out the control, whose unbiased score is 50.
    """
    first = next(iter(next(iter(scores.values()))))
    return "\n".join(
        (
            f"{first}: relative accuracy in %, {count} quadruplets per property and place",
            *(_of_place(place, rows, baselines) for place, rows in scores.items()),
            *(_by_delay(rows[first]) for rows in list(scores.values())[1:]),
            _one_threshold({place: rows[first] for place, rows in scores.items()}),
            f"A property counts (*) at {physics_test.MARGIN} points or more above the best of "
            f"{', '.join(baselines)}.",
        )
    )


def _of_place(
    place: str, rows: dict[str, dict[str, dict[str, physics_test.Score]]], baselines: Sequence[str]
) -> str:
    first, *others = rows
    width = max(10, *(len(name) + 2 for name in others))
    broken = [property for property in rows[first] if property != "control"]

    def cells(properties: Sequence[str], reduce: Any) -> list[float]:
        def of(name: str, kind: str, what: str) -> float:
            return 100 * reduce([getattr(rows[name][p][kind], what) for p in properties])

        own = [of(first, "mean", "accuracy"), of(first, "maximum", "accuracy")]
        own += [of(first, kind, "auroc") for kind in ("mean", "peak")]
        return [*own, *(of(other, "mean", "accuracy") for other in others)]

    def line(label: str, values: list[float], end: str = "") -> str:
        widths = [9, 10, 8, 8] + [width] * len(others)
        numbers = (f"{v:>{wide}.1f}" for v, wide in zip(values, widths, strict=True))
        return f"{label:<15}{''.join(numbers)}{end}"

    def above(property: str) -> str:
        margin = margin_of(rows, property, baselines)
        return f"{margin:>9.0f}{' *' if margin >= physics_test.MARGIN else ''}"

    names = "".join(f"{name:>{width}}" for name in others)
    return "\n".join(
        (
            f"{place:<15}{'mean':>9}{'maximum':>10}{'AUROC':>8}{'of peak':>8}{names}{'margin':>9}",
            *(line(p, cells([p], sum), above(p)) for p in broken),
            line("average", cells(broken, lambda values: sum(values) / len(values))),
            line("least", cells(broken, min)),
            line("control", cells(["control"], sum)),
        )
    )


def _by_delay(own: dict[str, dict[str, physics_test.Score]]) -> str:
    """The accuracy of the first model by the time that the exchange stays hidden."""
    pairs = [
        (delay, told)
        for property, kinds in own.items()
        if property != "control"
        for delay, told in zip(kinds["mean"].delays, kinds["mean"].told, strict=True)
    ]
    parts = []
    for least, most in DELAYS:
        some = [told for delay, told in pairs if least <= delay <= most]
        if some:
            share = 100 * sum(some) / len(some)
            parts.append(f"{share:.1f} of {len(some)} after {least} to {most} frames")
    return f"by the time behind the panel: {', '.join(parts)}"


def _one_threshold(own: dict[str, dict[str, dict[str, physics_test.Score]]]) -> str:
    """The AUROC of the first model's peak over the videos of all properties."""
    possible: dict[str, list[float]] = {}
    impossible: dict[str, list[float]] = {}
    for place, properties in own.items():
        kinds = [kinds for property, kinds in properties.items() if property != "control"]
        four = [values for kind in kinds for values in kind["peak"].values]
        possible[place] = [value for values in four for value in values[:2]]
        impossible[place] = [value for values in four for value in values[2:]]
    each = [f"{100 * auroc(possible[p], impossible[p]):.1f} {p}" for p in own]
    both = 100 * auroc(*([x for p in own for x in of[p]] for of in (possible, impossible)))
    return f"AUROC of the peak over all properties: {both:.1f} ({', '.join(each)})"


def margin_of(
    rows: dict[str, dict[str, dict[str, physics_test.Score]]],
    property: str,
    baselines: Sequence[str],
) -> float:
    """How many points of accuracy the first model is above the best baseline at a property."""
    own = next(iter(rows.values()))[property]["mean"].accuracy
    return 100 * (own - max(rows[name][property]["mean"].accuracy for name in baselines))


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


def read_video(method: Any, path: Path, size: int, stride: int) -> Tensor:
    """The frames of a video, uint8 [F, size, size, 3]. Raises ValueError if they are fewer than the
    model's clips span.
    """
    video = videos.decode(path, size)
    curves.check_length(method, len(video), stride)
    return video


def draw_video(
    method: Any,
    video: Tensor,
    path: Path,
    output: Path,
    *,
    stride: int,
    calibrated: calibration.Calibration,
    false_alarms: float,
) -> None:
    """Draw the surprise at the frames `video` of the file `path`, and print whether and when it is
    above what one of the share `false_alarms` of possible videos reaches.
    """
    peaks = calibrated.peaks
    (curve,) = curves.curves(method, video[None], stride=stride, expected=calibrated.expected)
    threshold = calibration.threshold(peaks, false_alarms)
    clip, shown = {"video": video}, {"video": curve}
    figure.picture(clip, shown, output / f"{path.stem}.png", path.name, None)
    figure.animation(clip, shown, output / f"{path.stem}.gif")
    values = curve.over_time.nan_to_num(-1.0)
    print(f"{path.name}: mean {curve.mean:.4f}, most {curve.maximum:.4f} at {int(values.argmax())}")
    print(f"{path.name}: {calibration.verdict(curve, threshold, false_alarms, len(peaks))}")
