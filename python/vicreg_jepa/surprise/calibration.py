"""One threshold for single videos: what possible videos reach, by split conformal prediction.

The peak of a possible video that is drawn like the calibration's exceeds the threshold with at most
the stated probability. For another kind of video, such as one of another renderer, nothing is
guaranteed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vicreg_jepa.files import output
from vicreg_jepa.physics import possible
from vicreg_jepa.planning.conformal import quantile
from vicreg_jepa.surprise.curves import Curve, curves

FIRST, COUNT = 10**9, 160  # the seeds of the calibration, which no training of a seed uses


def peaks(method: Any, settings: Any, path: Path) -> list[float]:
    """The peaks of COUNT possible videos, with the noise of the model's training. They are kept in
    the file `path`, which is read if it is of this model.
    """
    model = digest(method, settings)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept.get("model") == model:
            return kept["peaks"]
    videos = [possible(FIRST + i, settings.data.noise).video for i in range(COUNT)]
    found = curves(method, torch.from_numpy(np.stack(videos)), stride=settings.data.stride)
    values = sorted(round(curve.peak, 6) for curve in found)
    output.replace(path, (json.dumps({"model": model, "peaks": values}) + "\n").encode())
    return values


def digest(method: Any, settings: Any) -> str:
    """What tells a model from others whose peaks may be kept in the same file: its weights, and
    how it sees videos.
    """
    seen = hashlib.sha256(f"{settings.data.stride} {settings.data.noise}".encode())
    for name, tensor in sorted(method.state_dict().items()):
        seen.update(name.encode())
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()[:32]


def beside(model: Path) -> Path:
    """Where the peaks of a file of `export --format whole` are kept."""
    return model.with_suffix(".peaks.json")


def check(false_alarms: float, count: int) -> None:
    """Raises ValueError for a rate that so few peaks cannot give."""
    least = 1 / (count + 1)
    if not least <= false_alarms < 1:
        raise ValueError(
            f"--false-alarms: got {false_alarms}, takes {least:.4f} to 1 with {count} peaks"
        )


def threshold(peaks: Sequence[float], false_alarms: float) -> float:
    """The peak that a further possible video exceeds with a probability of at most `false_alarms`.

    Raises ValueError for a rate that so few peaks cannot give.
    """
    check(false_alarms, len(peaks))
    return quantile(torch.tensor(peaks), 1 - false_alarms)


def verdict(curve: Curve, limit: float, false_alarms: float, count: int) -> str:
    """Whether a video is impossible, and from which frame on it is known to be."""
    rate = (
        f"false alarms: at most {100 * false_alarms:g} % of videos like the {count} calibrated on"
    )
    above = curve.local.nan_to_num(-1.0) > limit
    peak = f"peak {curve.peak:.4f}, threshold {limit:.4f}"
    if not above.any():
        return f"nothing impossible ({peak}; {rate})"
    return f"impossible at frame {int(above.int().argmax())} ({peak}; {rate})"
