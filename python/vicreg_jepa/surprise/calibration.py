"""One threshold for single videos: what possible videos reach, by split conformal prediction.

The peak of a possible video that is drawn like the calibration's exceeds the threshold with at most
the stated probability. For another kind of video, such as one of another renderer, nothing is
guaranteed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from vicreg_jepa.files import output
from vicreg_jepa.methods.causal import Causal
from vicreg_jepa.physics import possible
from vicreg_jepa.planning.conformal import quantile
from vicreg_jepa.surprise import expectation
from vicreg_jepa.surprise.curves import Curve, curves

FIRST, COUNT = 10**9, 160  # the seeds of the calibration, which no training of a seed uses


@dataclass(frozen=True)
class Calibration:
    """expected: what the errors of a model that predicts frame by frame are measured against, None
    for others; peaks: of COUNT possible videos, ascending.
    """

    expected: expectation.Expectation | None
    peaks: tuple[float, ...]


def calibrated(method: Any, settings: Any, path: Path) -> Calibration:
    """The calibration of a model on possible videos with the noise of its training. It is kept in
    the file `path`, which is read if it is of this model. Raises ValueError if the file is damaged.
    """
    model = digest(method, settings)
    kept = _read(path, model) if path.exists() else None
    if kept is not None:
        return kept
    stride, noise = settings.data.stride, settings.data.noise
    expected = expectation.fitted(method, stride, noise) if isinstance(method, Causal) else None
    videos = [possible(FIRST + i, noise).video for i in range(COUNT)]
    found = curves(method, torch.from_numpy(np.stack(videos)), stride=stride, expected=expected)
    peaks = torch.tensor(sorted(curve.peak for curve in found), dtype=torch.float64)
    tensors = {"peaks": peaks}
    if expected is not None:
        state = expected.state_dict()
        tensors |= {f"expected.{name}": tensor.contiguous() for name, tensor in state.items()}
    output.replace(path, save(tensors, {"model": model}))
    return Calibration(expected, tuple(peaks.tolist()))


def _read(path: Path, model: str) -> Calibration | None:
    """The calibration in a file, None if it is of another model."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("model") != model:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"file: {path} is no intact safetensors file ({error})") from error
    peaks = tuple(tensors.pop("peaks").tolist())
    if not tensors:
        return Calibration(None, peaks)
    expected = expectation.Expectation(tensors["expected.error.0.weight"].shape[1])
    expected.load_state_dict({name.removeprefix("expected."): x for name, x in tensors.items()})
    return Calibration(expected.requires_grad_(False).eval(), peaks)


def digest(method: Any, settings: Any) -> str:
    """What tells a model from others whose calibration may be kept in the same file: its weights,
    and how it sees videos.
    """
    seen = hashlib.sha256(f"{settings.data.stride} {settings.data.noise}".encode())
    for name, tensor in sorted(method.state_dict().items()):
        seen.update(name.encode())
        seen.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return seen.hexdigest()[:32]


def beside(model: Path) -> Path:
    """Where the calibration of a file of `export --format whole` is kept."""
    return model.with_suffix(".calibration.safetensors")


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
    above = curve.local.nan_to_num(-torch.inf) > limit
    peak = f"peak {curve.peak:.4f}, threshold {limit:.4f}"
    if not above.any():
        return f"nothing impossible ({peak}; {rate})"
    return f"impossible at frame {int(above.int().argmax())} ({peak}; {rate})"
