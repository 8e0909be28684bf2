"""The comparison of embeddings and pixels under noise: its arms, probes, cells and report."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from vicreg_jepa import config
from vicreg_jepa.evaluation import physics_probe, state_probe, token_probe
from vicreg_jepa.methods import build, pixels
from vicreg_jepa.models import masks
from vicreg_jepa.physics import PROPERTIES
from vicreg_jepa.surprise import filter as comparison
from vicreg_jepa.surprise import filter_report
from vicreg_jepa.surprise.arms import BROKEN
from vicreg_jepa.surprise.filter import ARMS, Plan

SMALL = (
    *("model.dim=16", "model.depth=1", "model.heads=1"),
    *("model.predictor_dim=16", "model.predictor_depth=1", "model.predictor_heads=1"),
    "training.precision=float32",
)
PLAN = Plan(3, 1, 40, SMALL)


def test_every_arm_has_the_same_network_steps_and_videos(tmp_path):
    made = [PLAN.settings(arm, 0.5, 3, tmp_path) for arm in ARMS]
    for settings in made:
        assert (settings.data, settings.training) == (made[0].data, made[0].training)
        assert settings.data.noise == 0.5
        assert settings.seed == 3
        plain = config.describe(settings)["model"]
        assert {**plain, "blur": 0} == config.describe(made[0])["model"]
    of = dict(zip(ARMS, made, strict=True))
    assert of["blur"].model.blur > 0 == of["pixels"].model.blur
    assert of["vicreg"].loss.vc_weight > 0 == of["vicreg"].loss.sigreg
    assert of["sigreg"].loss.sigreg > 0 == of["sigreg"].loss.vc_weight


@pytest.mark.parametrize("arm", ["vicreg", "sigreg"])
def test_without_a_teacher_the_loss_is_of_its_own_next_tokens(arm, tmp_path):
    """The gradient goes through the targets too, and its own term is added."""
    method = build.method(PLAN.settings(arm, 0.0, 0, tmp_path), 3)
    x = torch.rand(2, 3, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    drawn = masks.following(method.encoder.grid, 2, torch.Generator())
    tokens, plane = method.tokens(x), method.encoder.grid.frame.tokens
    normed = torch.nn.functional.layer_norm(tokens, tokens.shape[-1:])
    predicted = method.following(method.states(tokens[:, :-plane]), normed[:, :-plane])
    error = (predicted - normed[:, plane:]).square().mean()
    seen = tokens[:, :-plane].flatten(0, 1)
    if arm == "vicreg":
        term = method.variance_covariance(seen, None)
    else:
        term = method.sigreg * method.kernels.sigreg(seen[None], method.slices, 0, None)
    loss = method(x, drawn)
    torch.testing.assert_close(loss, error + term)
    weights = list(method.encoder.parameters())
    wanted = torch.autograd.grad(error + term, weights)
    for got, one in zip(torch.autograd.grad(loss, weights), wanted, strict=True):
        torch.testing.assert_close(got, one, atol=1e-5, rtol=1e-3)
    assert not method.targets(x).requires_grad
    method.after_step()
    assert int(method.step) == 1


def test_something_must_keep_the_tokens_from_collapsing():
    words = ["loss.vc_weight=0", "loss.sigreg=0"]
    with pytest.raises(ValueError, match=r"loss\.vc_weight: got 0 with loss\.sigreg 0"):
        config.load("jepa_causal_physics", words)


def test_the_blur_is_a_gaussian_and_hides_what_it_takes(tmp_path):
    clips = torch.rand(1, 3, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    got = pixels.blurred(clips, 1.5)
    wanted = gaussian_filter(clips.numpy(), (0, 0, 0, 1.5, 1.5), mode="nearest", radius=5)
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-5)
    assert pixels.blurred(clips, 0.0) is clips
    method = build.method(PLAN.settings("blur", 0.0, 0, tmp_path), 3).eval()
    method.blur = 0.0

    def outputs(x):
        return method.tokens(x), method.targets(x), *method.foreseen(x, [3])

    plain = outputs(got)
    method.blur = 1.5
    for a, b in zip(plain, outputs(clips), strict=True):
        torch.testing.assert_close(a, b)


def test_probes_read_what_is_there_and_nothing_else(monkeypatch):
    monkeypatch.setattr(token_probe, "STEPS", 300)
    videos = physics_probe.seen(40, 0.5, 4)
    of_video = videos.frames["colour"].view(40, physics_probe.EACH)
    assert torch.equal(of_video, of_video[:, :1].expand_as(of_video))  # all pairs of a video
    assert set(videos.patches) == {"texture", "camera", "leaves"}

    def facts(clips):
        """Tokens that hold the position alone."""
        first = facts.at
        facts.at += len(clips)
        place = videos.frames["position"][first : facts.at]
        return place[:, None].expand(-1, 128, -1)

    facts.at = 0
    told = physics_probe.scores(facts, videos)
    assert told["position"] > 0.98
    assert max(told[name] for name in ("shake", "texture", "camera", "leaves")) < 0.3
    quiet = physics_probe.seen(8, 0.0, 4)
    assert set(quiet.frames) == {"position", "velocity", "colour", "shape"}
    assert not quiet.patches


def test_an_token_probe_finds_the_token_that_matters(monkeypatch):
    """One token of 64 is marked, at a random place, and holds a number; ridge regression of all
    tokens knows neither from so few samples.
    """
    monkeypatch.setattr(token_probe, "STEPS", 400)
    generator = torch.Generator().manual_seed(0)
    place = torch.randint(64, (600,), generator=generator)
    number = torch.randn(600, generator=generator)
    tokens = torch.randn(600, 1, 64, 4, generator=generator)
    tokens[torch.arange(600), 0, place, 0] = 6.0
    tokens[torch.arange(600), 0, place, 1] = number
    goal = torch.stack((place // 8, place % 8, number), dim=1).double()
    rest = slice(500, None)
    guess = token_probe.predicted(tokens[:500], goal[:500], tokens[rest], 0)
    left = (guess - goal[rest]).square().mean(dim=0) / goal[rest].var(dim=0)
    assert left.max() < 0.1
    middle = goal[:500].mean(dim=0)
    linear = state_probe.ridge(
        tokens[:500].flatten(1), goal[:500] - middle, tokens[rest].flatten(1)
    )
    assert ((linear + middle - goal[rest]).square().mean(dim=0) / goal[rest].var(dim=0)).min() > 0.5
    with pytest.raises(ValueError, match="tokens: got 60 a frame, takes a square number"):
        token_probe.TokenProbe(1, 60, 4, 1)


def cell(arm: str, strength: float, seed: int, accuracy: float) -> dict:
    view = {name: {"accuracy": accuracy, "auroc": 0.5} for name in PROPERTIES}
    view["control"] = {"accuracy": 0.5, "auroc": 0.5}
    panel = {**view, "colour": {"accuracy": 0.0, "auroc": 0.5}}
    untrained = {name: {"accuracy": 0.1, "auroc": 0.5} for name in PROPERTIES}
    facts = dict.fromkeys((*filter_report.FACTS, *filter_report.NOISES), 0.9)
    del facts["camera"]
    probes = {"model": {**facts, "light": 0.25}}
    return {
        "plan": json.loads(json.dumps(asdict(PLAN))),
        "arm": arm,
        "strength": strength,
        "seed": seed,
        "surprise": {"in view": view, "behind a panel": panel},
        "untrained": {"in view": untrained, "behind a panel": untrained},
        "probes": probes,
    }


def test_the_report_averages_seeds_and_marks_what_is_missing(tmp_path):
    for arm, seed, accuracy in (("teacher", 0, 0.9), ("teacher", 1, 0.8), ("pixels", 0, 0.6)):
        made = cell(arm, 0.5, seed, accuracy)
        folder = tmp_path / f"{made['arm']}-{made['seed']}"
        folder.mkdir()
        (folder / "filter.json").write_text(json.dumps(made))
    lines = filter_report.write(tmp_path).splitlines()
    names = lines[0].split()
    rows = {
        tuple(line.split()[:2]): dict(zip(names, line.split(), strict=True)) for line in lines[1:]
    }
    assert rows["teacher", "0.5"]["seeds"] == "2"
    count = len(BROKEN)
    teacher = rows["teacher", "0.5"]
    assert teacher["accuracy"] == f"{85 * (2 * count - 1) / (2 * count):.1f}"
    assert teacher["hidden"] == f"{85 * (count - 1) / count:.1f}"
    assert [teacher[name] for name in ("least", "control", "untrained")] == ["0.0", "50.0", "10.0"]
    assert rows["pixels", "0.5"]["light"] == "25.0"
    assert rows["pixels", "0.5"]["camera"] == rows["pixels", "1"]["accuracy"] == "-"
    assert (tmp_path / "filter.png").stat().st_size > 5000


def test_cells_of_another_plan_are_refused(tmp_path):
    (tmp_path / "filter.json").write_text(json.dumps(cell("pixels", 0.0, 0, 0.5)))
    comparison._measured(tmp_path, "pixels", 0.0, 0, PLAN)
    with pytest.raises(ValueError, match=r"steps: got 9, but .* was measured with 3"):
        comparison._measured(tmp_path, "pixels", 0.0, 0, Plan(9, 1, 40, SMALL))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "magic"], "invalid choice: 'magic'"),
        (["--strengths", "2"], "--strengths: got '2', takes a number from 0 to 1"),
        (["--steps", "0"], "--steps: got '0', takes an integer from 1"),
    ],
)
def test_bad_options_are_named(words, message, capsys):
    with pytest.raises(SystemExit):
        comparison.main(words)
    assert message in capsys.readouterr().err


@pytest.mark.thorough
def test_the_command_trains_measures_and_resumes(tmp_path, capsys):
    words = [
        "--output",
        str(tmp_path),
        "--arms",
        "vicreg",
        "pixels",
        "--strengths",
        "0.5",
        "--seeds",
    ]
    words += ["0", "--steps", "2", "--quadruplets", "1", "--videos", "40", *SMALL, "data.videos=8"]
    assert comparison.main(words) == 0
    first = {path: path.read_text() for path in tmp_path.glob("*/filter.json")}
    assert len(first) == 2
    assert comparison.main(words) == 0
    assert first == {path: path.read_text() for path in tmp_path.glob("*/filter.json")}
    assert "vicreg" in capsys.readouterr().out
