"""What the windows of surprise span, and that the rest is a tie for any model."""

from __future__ import annotations

import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.methods import build
from vicreg_jepa.physics import quadruplet
from vicreg_jepa.surprise import curves, physics_test, reach

from tests.trainer.test_trainer import settings


def dots(*places: int) -> torch.Tensor:
    """A video of 8 frames, in each of which one pixel is lit; -1: none is."""
    video = torch.zeros(8, 4, 4, 3, dtype=torch.uint8)
    for frame, place in enumerate(places):
        if place >= 0:
            video[frame, 0, place] = 255
    return video


def test_a_window_spans_an_exchange_if_it_shows_both_sides_of_it():
    """Both possible videos are dark from frame 2 to 4, so a window must show 1 and 5 to tell."""
    first, second = dots(0, 0, -1, -1, -1, 0, 0, 0), dots(1, 1, -1, -1, -1, 1, 1, 1)
    exchanged = [torch.cat((a[:4], b[4:])) for a, b in ((first, second), (second, first))]
    four = torch.stack((first, second, *exchanged))
    spans = {(n, s): reach.spanned(four, n, s) for n, s in ((4, 1), (5, 1), (2, 4), (2, 3))}
    assert spans == {(4, 1): False, (5, 1): True, (2, 4): True, (2, 3): False}
    assert not reach.spanned(torch.stack((first, second, second, first)), 8, 1)
    with pytest.raises(ValueError, match="window: got 5 frames, 2 apart, takes up to 8"):
        reach.spanned(four, 5, 2)


def test_what_no_window_spans_is_a_tie_for_any_model():
    """Surprise of 16 consecutive frames cannot tell a thing that is hidden for longer."""
    seed = next(s for s in range(9) if quadruplet("colour", s, True).record["same"] > 14)
    four = physics_test.quadruplets("colour", 1, seed, True)[0]
    assert not reach.spanned(four, 16, 1)
    assert reach.spanned(four, 16, 2)
    made = config.describe(settings("vjepa"))
    made["data"]["frames"] = 16
    method = build.method(config.parse(made), 3).eval()
    for stride, tie in ((1, True), (2, False)):
        each = curves.curves(method, four, contexts=(4,), stride=stride)
        a, b, c, d = (curve.mean for curve in each)
        assert (abs(a + b - c - d) < 1e-6) == tie
        surprise_of = lambda videos, each=each: {"mean": [curve.mean for curve in each]}  # noqa: E731
        told = physics_test.scores(surprise_of, four[None], "colour")["mean"].told
        assert (told == (0.5,)) == tie


def test_a_tie_up_to_rounding_is_a_tie():
    """The same windows in another batch differ in the last bits."""
    videos = torch.zeros(3, 4, 2, 1, 1, 3, dtype=torch.uint8)
    rows = [0.5, 0.7, 0.5, 0.700001, 0.5, 0.7, 0.5, 0.7001, 0.5, 0.7, 0.5, 0.6999]
    scores = physics_test.scores(lambda videos: {"mean": rows}, videos, "colour")
    assert scores["mean"].told == (0.5, 1.0, 0.0)


def test_the_line_counts_ties_as_half(monkeypatch):
    monkeypatch.setattr(reach, "PROPERTIES", {"colour": None, "inertia": None, "control": None})
    monkeypatch.setattr(reach, "spanned", lambda four, frames, stride: frames > stride)
    assert reach.hidden_spanned(2, 1, 1) == {"colour": 1, "inertia": 1}
    assert "span 0 of 2" in reach.line(1, 1, 1)
    assert "at most 50.0 %" in reach.line(1, 1, 1)
