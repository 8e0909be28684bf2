"""The small trained models that come with the package."""

from __future__ import annotations

import json

import pytest
import torch
from vicreg_jepa import cli, config, pretrained
from vicreg_jepa.evaluation.auroc import auroc
from vicreg_jepa.physics import PROPERTIES, possible
from vicreg_jepa.surprise import calibration, curves, physics_test
from vicreg_jepa.training.run import restore

MOST = 5 * 2**20  # bytes of all files


def test_they_are_small():
    files = list(pretrained.path("plan").parent.glob("*.safetensors"))
    calibrated = calibration.beside(pretrained.path("surprise"))
    assert {file.name for file in files} == {*pretrained.FILES.values(), calibrated.name}
    assert calibrated.stat().st_size < 300_000
    assert sum(file.stat().st_size for file in files) <= MOST


@pytest.mark.parametrize("command", pretrained.FILES)
def test_each_is_a_recipe_trained_to_its_end(command):
    settings, _, step = restore(pretrained.path(command))
    recipe = config.load(pretrained.path(command).stem)
    assert step == recipe.training.steps
    for part in ("method", "data", "model", "loss", "optimizer", "training", "seed"):
        assert getattr(settings, part) == getattr(recipe, part)


def test_planning_reaches_the_goals(tmp_path, capsys):
    words = ["plan", "--pretrained", "--episodes", "8", "--output", str(tmp_path)]
    assert cli.main(words) == 0, capsys.readouterr().out
    rows = {row["name"]: row["success"] for row in json.loads((tmp_path / "plan.json").read_text())}
    assert rows["world_two_rooms, step 5000"] == 8 > rows["straight"]
    assert (tmp_path / "episode.gif").stat().st_size > 1000


def test_what_surprise_does_not_take(tmp_path, capsys):
    again = tmp_path / pretrained.FILES["surprise"]
    again.write_bytes(pretrained.path("surprise").read_bytes())
    words = ["surprise", "--pretrained", "--output", str(tmp_path / "pictures")]
    assert cli.main([*words, "--beside", str(again)]) == 2
    assert "has the name of another run" in capsys.readouterr().err
    assert cli.main([*words, "--video", "clip.mp4", "--beside", str(again)]) == 2
    assert "--video: takes no --beside" in capsys.readouterr().err


def test_a_vanished_thing_surprises():
    settings, method, _ = restore(pretrained.path("surprise"))
    surprise_of = physics_test.of_method(method, settings.data.stride)
    scores = physics_test.scores(
        surprise_of, physics_test.quadruplets("permanence", 4), "permanence"
    )
    assert scores["mean"].accuracy == 1.0


def test_the_calibration_beside_the_model_is_its_own():
    file = pretrained.path("surprise")
    settings, method, _ = restore(file)
    before = calibration.beside(file).read_bytes()
    kept = calibration.calibrated(method, settings, calibration.beside(file))
    assert calibration.beside(file).read_bytes() == before
    assert len(kept.peaks) == calibration.COUNT
    video = torch.from_numpy(possible(calibration.FIRST).video)[None]
    (curve,) = curves.curves(method, video, stride=settings.data.stride, expected=kept.expected)
    assert min(abs(curve.peak - peak) for peak in kept.peaks) < 1e-3


@pytest.mark.thorough
def test_one_threshold_tells_single_videos():
    """The AUROC on held-out quadruplets is in docs/surprise.md; here on 8 in view and 8 hidden."""
    settings, method, _ = restore(pretrained.path("surprise"))
    kept = calibration.calibrated(method, settings, calibration.beside(pretrained.path("surprise")))
    names = [name for name in PROPERTIES if name != "control"]
    each = [
        physics_test.quadruplets(name, 1, 9000, hidden)
        for name in names
        for hidden in (False, True)
    ]
    found = physics_test.of_method(method, settings.data.stride, kept.expected)
    peaks = torch.tensor(found(torch.cat(each).flatten(0, 1))["peak"]).view(-1, 4)
    assert auroc(*(peaks[:, half].flatten().tolist() for half in ([0, 1], [2, 3]))) > 0.75
