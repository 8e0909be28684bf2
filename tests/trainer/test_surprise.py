"""Surprise: what a window's error is, where it stands in time, and what the test makes of it."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from vicreg_jepa import config
from vicreg_jepa.evaluation.auroc import auroc
from vicreg_jepa.methods import build
from vicreg_jepa.models import masks
from vicreg_jepa.ops.encode import encode, predict
from vicreg_jepa.physics import possible, quadruplet
from vicreg_jepa.surprise import (
    calibration,
    controls,
    curves,
    expectation,
    physics_test,
    report,
)

from tests.trainer.test_trainer import settings


@pytest.fixture(scope="module")
def method():
    return build.method(settings("vjepa"), 3).eval()


def videos(count: int = 2, frames: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (count, frames, 64, 64, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_one_window_is_the_l1_to_the_layer_normed_teacher(method):
    clip = videos(1, 4)
    (curve,) = curves.curves(method, clip, contexts=(2,))
    x = clip.permute(0, 4, 1, 2, 3) / 255.0
    with torch.no_grad():
        drawn = masks.future(method.encoder.grid, 1, 1)
        context = encode(method.encoder, method.kernels, x, drawn.context)
        predicted = predict(method.predictor, method.kernels, context, drawn)
        teacher = encode(method.teacher.module, method.kernels, x, None)
    wanted = F.layer_norm(teacher, teacher.shape[-1:])[0, 16:]  # the second pair of frames
    expected = (predicted - wanted).abs().mean()
    assert curve.values[:, :2].isnan().all()
    torch.testing.assert_close(curve.values[0, 2:], expected.expand(2))
    assert curve.mean == pytest.approx(float(expected))


def test_a_causal_model_is_surprised_by_the_next_token_frame():
    made = config.describe(settings("vjepa_causal"))
    made["data"]["frames"] = 8
    causal = build.method(config.parse(made), 3).eval()
    clip = videos(1, 8)
    (curve,) = curves.curves(causal, clip)
    assert curve.contexts == (4, 6)
    assert curve.values.isfinite().nonzero().tolist() == [[0, 4], [0, 5], [1, 6], [1, 7]]
    x = clip.permute(0, 4, 1, 2, 3) / 255.0
    with torch.no_grad():
        tokens = encode(causal.encoder, causal.kernels, x[:, :, :6], None)
        normed = F.layer_norm(tokens, tokens.shape[-1:])
        following = causal.following(causal.states(tokens), normed)
        teacher = encode(causal.teacher.module, causal.kernels, x, None)
    wanted = F.layer_norm(teacher, teacher.shape[-1:])[0, 48:]  # the last of four pairs of frames
    torch.testing.assert_close(curve.values[1, 7], (following[0, 32:] - wanted).abs().mean())
    with pytest.raises(ValueError, match="a clip of 4 frames is too short for any"):
        curves.curves(build.method(settings("vjepa_causal"), 3), clip)


def test_a_frame_has_the_mean_of_the_windows_that_predict_it(method):
    clip = videos(1, 8)
    (whole,) = curves.curves(method, clip, contexts=(2,), step=2)
    parts = [curves.curves(method, clip[:, s : s + 4], contexts=(2,))[0] for s in (0, 2, 4)]
    for start, part in zip((0, 2, 4), parts, strict=True):
        torch.testing.assert_close(whole.values[0, start + 2 : start + 4], part.values[0, 2:])
    assert whole.maximum == pytest.approx(max(part.maximum for part in parts))


def test_a_change_surprises_from_its_moment_on(method):
    """Windows that end before the frames that differ do not see them."""
    clip = videos(1, 12)
    changed = clip.clone()
    changed[:, 8:] = 255 - changed[:, 8:]
    (a,), (b,) = (curves.curves(method, v, contexts=(2,), step=2) for v in (clip, changed))
    assert torch.equal(a.over_time[2:8], b.over_time[2:8])
    assert not torch.equal(a.over_time[8:], b.over_time[8:])


@pytest.mark.parametrize(
    ("frames", "contexts", "message"),
    [(3, (2,), "videos: got 3 frames"), (4, (1,), "contexts: got 1"), (4, (4,), "contexts: got 4")],
)
def test_what_does_not_fit_is_named(method, frames, contexts, message):
    with pytest.raises(ValueError, match=message):
        curves.curves(method, videos(1, frames), contexts=contexts)


def test_scores():
    possible, impossible = [1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 5.0]
    # of 16 pairs 7 are above and 3 equal
    assert auroc(possible, impossible) == pytest.approx((7 + 1.5) / 16)

    def surprise_of(batch: torch.Tensor) -> dict[str, list[float]]:
        return {"mean": [1, 2, 2, 2, 3, 3, 1, 4, 3, 3, 3, 3]}

    score = physics_test.scores(surprise_of, physics_test.quadruplets("colour", 3), "colour")
    assert score["mean"].told == (1.0, 0.0, 0.5)
    assert score["mean"].accuracy == 0.5


def test_delays_are_those_of_the_records():
    for hidden in (False, True):
        for name in ("permanence", "inertia", "size"):
            four = quadruplet(name, 4, hidden)
            assert physics_test.delay(torch.from_numpy(four.videos)) == four.record["same"]


def test_controls_tell_what_is_in_view_and_nothing_that_is_hidden():
    """Copying the last frame misses a break of velocity; a hidden exchange is an exact tie."""
    told = {}
    for name in ("permanence", "size", "inertia"):
        for place, hidden in physics_test.PLACES.items():
            clips = physics_test.quadruplets(name, 2, 0, hidden)
            for control, surprise_of in controls.CONTROLS.items():
                score = physics_test.scores(surprise_of, clips, name)["mean"]
                told[name, place, control] = score.told
    assert all(t == (0.5,) * 2 for (_, place, _), t in told.items() if place == "behind a panel")
    for name in ("permanence", "size"):
        assert told[name, "in view", "copy"] == told[name, "in view", "velocity"] == (1.0,) * 2
    for name in ("inertia",):
        assert sum(told[name, "in view", "copy"]) < sum(told[name, "in view", "velocity"])


def test_a_property_counts_by_its_margin_over_the_best_control():
    def score(accuracy: float) -> dict[str, physics_test.Score]:
        values = ((0.0, 2.0, 1.0, 3.0),) * 4
        one = physics_test.Score("", 4, accuracy, 0.5, (1.0,) * 4, (5, 5, 12, 20), values)
        return {"mean": one, "maximum": one, "peak": one}

    rows = {
        "model": {"shape": score(0.95), "colour": score(0.9), "control": score(0.5)},
        "untrained": {"shape": score(0.6), "colour": score(0.5), "control": score(0.5)},
        "copy": {"shape": score(0.5), "colour": score(0.7), "control": score(0.5)},
    }
    baselines = ("untrained", "copy")
    assert report.margin_of(rows, "shape", baselines) == pytest.approx(35)
    text = report.table({"in view": rows, "behind a panel": rows}, 4, baselines)
    (shape, *_), (colour, *_) = (
        [line for line in text.splitlines() if line.startswith(name)]
        for name in ("shape", "colour")
    )
    assert shape.endswith("35 *")
    assert colour.endswith("20")
    assert "100.0 of 4 after 5 to 9 frames, 100.0 of 2 after 10 to 16 frames" in text
    pooled = "AUROC of the peak over all properties: 75.0 (75.0 in view, 75.0 behind a panel)"
    assert pooled in text


def test_an_oracle_tells_every_property_and_the_control_not():
    """Surprise that knows which videos are exchanged; the control has nothing to know."""

    def oracle(batch: torch.Tensor) -> dict[str, list[float]]:
        return {"mean": [float(i % 4 >= 2) for i in range(len(batch))]}

    clips = physics_test.quadruplets("gravity", 3)
    score = physics_test.scores(oracle, clips, "gravity")["mean"]
    assert (score.accuracy, score.auroc, score.quadruplets) == (1.0, 1.0, 3)
    assert score.values == ((0.0, 0.0, 1.0, 1.0),) * 3


def test_brightness_alone_tells_nothing():
    """The impossible videos are made of the possible ones' frames: every set is a tie."""

    def brightness(batch: torch.Tensor) -> dict[str, list[float]]:
        return {"mean": batch.long().sum(dim=(1, 2, 3, 4)).tolist()}

    for name in ("permanence", "solidity", "control"):
        clips = physics_test.quadruplets(name, 4)
        assert physics_test.scores(brightness, clips, name)["mean"].accuracy == 0.5


def test_the_peak_is_of_the_worst_token_over_the_clips_that_meet_it():
    made = config.describe(settings("vjepa_causal"))
    made["data"]["frames"] = 8
    made["model"]["tubelet"] = 1
    causal = build.method(config.parse(made), 3).eval()
    clip = videos(1, 16)
    (curve,) = curves.curves(causal, clip, contexts=(3,), stride=2)
    worst = torch.full((16,), torch.nan)
    for start in (0, 1):
        x = clip[:, start : start + 15 : 2].permute(0, 4, 1, 2, 3) / 255.0
        with torch.no_grad():
            (predicted,) = causal.foreseen(x, [3])
            wanted = F.layer_norm(causal.targets(x), (causal.encoder.features,))
        tokens = causal.encoder.grid.frame.tokens
        apart = (predicted - wanted[:, 3 * tokens : 4 * tokens]).abs().mean(dim=-1)
        worst[start + 6] = apart.max()
    # Frame 7 is met by both clips, frame 6 by the first alone.
    assert curve.local.isfinite().nonzero().flatten().tolist() == [7]
    torch.testing.assert_close(curve.local[7], (worst[6] + worst[7]) / 2)
    assert curve.peak == pytest.approx(float(curve.local[7]))


def test_the_threshold_is_a_rank_and_the_verdict_names_the_frame():
    peaks = [float(i) for i in range(19)]
    assert calibration.threshold(peaks, 0.05) == 18.0
    assert calibration.threshold(peaks, 0.5) == 9.0
    with pytest.raises(ValueError, match=r"--false-alarms: got 0\.04, takes 0\.0500 to 1"):
        calibration.threshold(peaks, 0.04)
    local = torch.tensor([torch.nan, 0.2, 0.5, 0.9, 0.7])
    curve = curves.Curve((2,), local[None], local)
    text = calibration.verdict(curve, 0.6, 0.05, 19)
    assert text.startswith("impossible at frame 3 (peak 0.9000, threshold 0.6000; false alarms: at")
    assert calibration.verdict(curve, 0.9, 0.05, 19).startswith("nothing impossible (peak 0.9000")


def causal_settings():
    made = config.describe(settings("vjepa_causal"))
    made["data"] |= {"frames": 4, "stride": 2, "noise": 0.0}
    made["model"]["tubelet"] = 1
    return config.parse(made)


@pytest.fixture
def quick(monkeypatch):
    """A fit of seconds."""
    monkeypatch.setattr(calibration, "COUNT", 4)
    monkeypatch.setattr(expectation, "COUNT", 3)
    monkeypatch.setattr(expectation, "TOKENS", 200)
    monkeypatch.setattr(expectation, "STEPS", (60, 20))


def test_the_surprise_of_a_frame_is_beyond_what_is_expected():
    causal = build.method(causal_settings(), 3).eval()
    clips = videos(2, 4).permute(0, 4, 1, 2, 3) / 255.0
    with torch.no_grad():
        wanted = F.layer_norm(causal.targets(clips), (causal.encoder.features,))
        _, memory = causal.foreseen(clips, [2, 3])
        (short,) = causal.foreseen(clips[:, :, 1:], [2])
        tokens = causal.encoder.grid.frame.tokens
        target = wanted[:, 3 * tokens :]
        known = causal.known(clips, [2, 3])
        two, three = expectation.evidence(causal, clips, wanted, known, [2, 3])
    assert two.gain.abs().max() < 1e-5  # at two frames both predictions are one
    torch.testing.assert_close(three.error, (memory - target).abs().mean(dim=-1))
    apart = (memory - short).square().mean(dim=-1)
    gain = ((target - (memory + short) / 2) * (memory - short)).mean(dim=-1)
    torch.testing.assert_close(three.gain, gain / (apart + 0.05).sqrt(), rtol=1e-3, atol=1e-5)
    torch.manual_seed(0)
    expected = expectation.Expectation(three.features.shape[-1])
    expected.scale.fill_(0.5)
    with torch.no_grad():
        middle, spread = expected.error(three.features).unbind(-1)
        high = ((three.error + 1e-3).log() - middle) / spread.exp()
        missing = expected.gain(three.features)[..., 0] - three.gain / 0.5
        _, rows = curves.window_errors(causal, clips, [2, 3], expected)
    torch.testing.assert_close(rows[1, :, 0], high.amax(dim=1) + 0.15 * missing.amax(dim=1))
    torch.testing.assert_close(rows[0, :, 0], three.error.mean(dim=1))


def test_a_fit_expects_the_error_of_possible_videos(quick):
    causal = build.method(causal_settings(), 3).eval()
    expected = expectation.fitted(causal, 2, 0.0)
    again = expectation.fitted(causal, 2, 0.0)
    torch.testing.assert_close(expected.state_dict(), again.state_dict(), rtol=0, atol=0)
    tokens = expectation._tokens(causal, possible(7).video, 2)
    high, _ = expected.above(tokens)
    assert high.mean().abs() < 0.5
    # A token with three times its error stands out.
    assert (expected.above(tokens._replace(error=3 * tokens.error))[0] - high).mean() > 1


def test_a_calibration_is_kept_for_its_model_alone(quick, tmp_path, monkeypatch):
    made, kept = causal_settings(), tmp_path / "calibration.safetensors"
    causal = build.method(made, 3).eval()
    first = calibration.calibrated(causal, made, kept)
    assert len(first.peaks) == 4
    assert list(first.peaks) == sorted(first.peaks)
    with monkeypatch.context() as patch:
        patch.setattr(expectation, "fitted", None)
        second = calibration.calibrated(causal, made, kept)
    assert second.peaks == first.peaks
    torch.testing.assert_close(second.expected.state_dict(), first.expected.state_dict())
    before = kept.read_bytes()
    next(causal.parameters()).data.add_(0.01)
    calibration.calibrated(causal, made, kept)
    assert kept.read_bytes() != before
    kept.write_bytes(before[:100])
    with pytest.raises(ValueError, match=r"file: .*calibration\.safetensors is no intact"):
        calibration.calibrated(causal, made, kept)


def test_a_model_of_whole_clips_keeps_its_error(quick, tmp_path, method):
    made = settings("vjepa")
    assert calibration.calibrated(method, made, tmp_path / "kept.safetensors").expected is None
    assert calibration.calibrated(method, made, tmp_path / "kept.safetensors").expected is None
