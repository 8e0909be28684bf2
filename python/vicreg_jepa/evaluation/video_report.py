"""`vicreg-jepa probe` of a run on videos: its inputs, its baselines and its table."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from vicreg_jepa.config import Config
from vicreg_jepa.data import videos
from vicreg_jepa.data.batches import Clips, in_order
from vicreg_jepa.evaluation import video_probe
from vicreg_jepa.methods import build


class _Middle:
    """The middle clip of some of the videos."""

    def __init__(self, clips: Clips, rows: list[int]) -> None:
        self.clips, self.rows = clips, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: range) -> Tensor:
        return torch.stack([self.clips[self.rows[number], 0.5] for number in numbers])


@torch.no_grad()
def _tokens(settings: Config, middles: _Middle, methods: list[nn.Module]) -> list[Tensor]:
    """[N, T, D] on the CPU, of each method; every clip is decoded once."""
    parts: list[list[Tensor]] = [[] for _ in methods]
    for clips in in_order(middles, 16, settings.data.workers):
        for part, method in zip(parts, methods, strict=True):
            part.append(method.tokens(clips).float())
    return [torch.cat(part) for part in parts]


def probed(settings: Config, method: nn.Module, step: int, label: str | None, most: int) -> str:
    """The table of both probes for the trained encoder, for an untrained one, and with shuffled
    labels.

    It uses at most `most` videos, spread evenly over the set. Raises ValueError if they have no
    labels.
    """
    names = videos.labels(settings, label)
    count = min(most, len(names))
    rows = torch.linspace(0, len(names) - 1, count).long().tolist()
    labelled = video_probe.labelled([names[row] for row in rows])
    clips = Clips(videos.of(settings), settings.data.frames, settings.data.stride)
    untrained = build.method(settings, method.channels).eval()
    trained, others = _tokens(settings, _Middle(clips, rows), [method, untrained])
    probes: dict[str, Any] = {
        "heads": settings.model.heads,
        "seed": settings.seed,
        "backend": settings.backend,
    }
    table = {
        f"{settings.method}, step {step}": video_probe.scores(trained, labelled, **probes),
        "untrained encoder": video_probe.scores(others, labelled, **probes),
        "shuffled labels": video_probe.scores(
            trained, video_probe.shuffled(labelled, settings.seed), **probes
        ),
    }
    commonest = Counter(labelled.labels.tolist()).most_common(1)[0][1] / count
    lines = [f"{count} videos of {len(labelled.classes)} classes, a fifth held out"]
    lines += [f"{'':24} {'attentive':>10} {'linear':>10}"]
    lines += [f"{k:24} {s.attentive:10.1%} {s.linear:10.1%}" for k, s in table.items()]
    return "\n".join([*lines, f"the commonest class alone: {commonest:.1%}"])
