"""The method `hierarchy`, from a run of a world model to the plans of its levels."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from PIL import Image
from vicreg_jepa import cli, config
from vicreg_jepa.config import ConfigError
from vicreg_jepa.methods import build
from vicreg_jepa.models.macro import Macro
from vicreg_jepa.planning import report
from vicreg_jepa.planning.report import Row
from vicreg_jepa.training.run import restore

TINY = ["data.settings={cells: 2, maze: 0}", "data.size=27"]
NETWORKS = ["model.dim=8", "model.keypoints=4", "model.predictor_dim=32", "model.latent=8"]
NETWORKS += ["model.waves=8", "model.frequency=1"]
WORLD = [*TINY, *NETWORKS, "data.window=6", "loss.unroll=4", "training.batch=8"]
WORLD += ["training.steps=2", "training.save_every=2"]
LEVELS = [*TINY, *NETWORKS, "data.window=16", "model.macros=[4, 12]", "training.batch=8"]
LEVELS += ["training.steps=4", "training.save_every=2", "model.landmarks=400"]
LITTLE = ["candidates=8", "elites=4", "kept=2", "iterations=2", "horizon=2", "every=1"]
KINDS = (", flat", ", flat, counted steps", "")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a world model, and one of levels above it."""
    folder = tmp_path_factory.mktemp("runs")
    assert cli.main(["train", "world_maze", *WORLD, "--output", str(folder / "world")]) == 0
    words = [*LEVELS, f"training.begin={folder / 'world'}"]
    assert cli.main(["train", "hierarchy_maze", *words, "--output", str(folder / "levels")]) == 0
    return folder


def test_the_world_model_stays_as_it_is(runs):
    _, below, _ = restore(runs / "world")
    _, method, step = restore(runs / "levels")
    assert step == 4
    theirs = below.state_dict()
    for name, z in method.world.state_dict().items():
        assert name == "step" or torch.equal(z, theirs[name]), name
    frames = torch.randint(256, (3, 27, 27, 2), dtype=torch.uint8)
    assert torch.equal(method.encode(frames), below.encode(frames))
    actions = torch.rand(3, 4, 5, 2)
    latents = below.encode(frames)
    assert torch.equal(method.rollout(latents, actions), below.rollout(latents, actions))


@pytest.mark.thorough
def test_a_resumed_run_is_the_same(runs, tmp_path):
    """As it was interrupted after two steps; the world model's run is gone by then."""
    world = shutil.copytree(runs / "world", tmp_path / "world")
    words = [*LEVELS, f"training.begin={world}", "--output", str(tmp_path / "run")]
    assert cli.main(["train", "hierarchy_maze", *words]) == 0
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    shutil.rmtree(world)
    assert cli.main(["train", "hierarchy_maze", *words]) == 0
    first, again = restore(runs / "levels")[1], restore(tmp_path / "run")[1]
    for name, z in first.state_dict().items():
        assert torch.equal(z, again.state_dict()[name]), name


def test_landmarks_are_counted_while_it_trains(runs):
    method = restore(runs / "levels")[1]
    landmarks = method.landmarks()
    assert len(landmarks.places) == int(method.counts.found) > 10
    assert torch.isfinite(landmarks.steps).double().mean() > 0.2
    frames, actions = torch.zeros(8, 17, 27, 27, 2, dtype=torch.uint8), torch.zeros(8, 16, 2)
    before = {name: z.clone() for name, z in method.state_dict().items()}
    method(frames, actions)  # in evaluation mode nothing is counted
    assert all(torch.equal(z, before[name]) for name, z in method.state_dict().items())


def test_plan_compares_levels_with_flat_planning(runs, capsys):
    output = runs / "pictures"
    words = ["--episodes", "4", "--steps", "12", "--output", str(output)]
    assert cli.main(["plan", str(runs / "levels"), *words, "--planner", *LITTLE]) == 1
    rows = {row["name"]: row for row in json.loads((output / "plan.json").read_text())}
    name = "levels, step 4"
    true = "true dynamics"
    named = [f"{each}{kind}" for each in (true, name) for kind in KINDS]
    assert list(rows) == ["walk", "straight", "expert", *named]
    assert rows[f"{name}, flat"]["of"] == name
    assert all(len(row["thirds"]) == 3 for row in rows.values())
    assert all(sum(row["thirds"]) == row["success"] for row in rows.values())
    out = capsys.readouterr().out
    assert f"failed: {name}: " in out
    assert f"failed: {name}, flat" not in out
    with Image.open(output / "episodes.png") as picture:
        assert picture.width > 800
    with Image.open(output / "episode.gif") as film:
        assert film.n_frames > 5


def test_plan_takes_levels_in_any_environment_too(tmp_path, capsys):
    """They had been planned with as if the run had none."""
    walks = tmp_path / "walks"
    collected = ["vicreg_jepa/Maze-v0", "cells=2", "maze=0", "max_episode_steps=24"]
    collected += ["--repeat", "3", "--episodes", "4", "--length", "8", "--output", str(walks)]
    assert cli.main(["collect", *collected]) == 0
    data = "data={kind: trajectories, path: " + str(walks) + ", size: 27, window: "
    common = [*NETWORKS, "training.batch=2", "training.steps=2", "training.save_every=2"]
    below = [f"{data}6}}", *common, "loss.unroll=4", "--output", str(tmp_path / "world")]
    assert cli.main(["train", "world_maze", *below]) == 0
    levels = [f"{data}8}}", *common, f"training.begin={tmp_path / 'world'}"]
    levels += ["model.macros=[3]", "--output", str(tmp_path / "levels")]
    assert cli.main(["train", "hierarchy_maze", *levels]) == 0
    assert (
        cli.main(["plan", str(tmp_path / "levels"), "--episodes", "4", "--planner", *LITTLE]) == 1
    )
    rows = {
        row["name"]: row for row in json.loads((tmp_path / "levels/plan/plan.json").read_text())
    }
    assert list(rows) == ["walk", *(f"levels, step 2{kind}" for kind in KINDS)]
    assert [row["of"] for row in rows.values()] == [None, "levels, step 2", "levels, step 2", None]
    assert "failed: levels, step 2: " in capsys.readouterr().out


def test_a_whole_run_is_exported_with_its_levels(runs, tmp_path):
    file = tmp_path / "levels.safetensors"
    assert cli.main(["export", str(runs / "levels"), str(file), "--format", "whole"]) == 0
    method, again = restore(runs / "levels")[1], restore(file)[1]
    torch.testing.assert_close(again.landmarks().steps, method.landmarks().steps)


@pytest.mark.parametrize(
    ("levels", "steps", "fine"),
    [
        (30, 100.0, True),
        (29, 100.0, False),
        (30, 101.0, False),
        (20, 33.0, True),
        (20, 34.0, False),
    ],
)
def test_a_verdict_compares_levels_with_flat_planning(levels, steps, fine):
    rows = [
        Row("straight", 50, 5),
        Row("run, flat", 50, 20, 100.0, of="run"),
        Row("run, flat, counted steps", 50, 50, 1.0, of="run"),
        Row("run", 50, levels, steps),
    ]
    assert (report.verdict(rows) == []) == fine


def test_a_chunk_counts_as_far_as_it_goes():
    level = Macro(6, 2, 8, 3, 16, 1)
    chunks, lengths = torch.rand(5, 6, 2), torch.tensor([1, 2, 3, 6, 6])
    codes = level.codes(chunks, lengths)
    assert codes.abs().max() < 1
    chunks[0, 1:], chunks[2, 3:] = 9.0, -9.0
    assert torch.equal(level.codes(chunks, lengths), codes)
    assert not torch.equal(level.codes(chunks, lengths - 1), codes)


@pytest.mark.thorough
def test_the_codes_learn_what_moves_a_latent():
    """A world on a line: 250 steps teach the code the sum of a chunk's actions, which is what moves
    the latent, and the prediction follows it.
    """
    torch.manual_seed(0)
    words = ["training.begin=none", "model.latent=4", "model.macros=[6]", "model.macro_dim=1"]
    words += ["model.dim=8", "model.predictor_dim=32", "model.keypoints=4"]
    words += ["model.waves=0", "model.frequency=5"]
    settings = config.load("hierarchy_maze", [*TINY, "data.window=16", *words])
    method = build.method(settings, 2)
    method.latents.copy_(torch.randn(len(method.latents), 8, 4))
    method.acted.uniform_(-1, 1)
    times = torch.arange(8) * 2
    method.times.copy_(times.expand_as(method.times))
    places = torch.cat([torch.zeros(len(method.acted), 1), method.acted[..., 0].cumsum(1)], dim=1)
    method.latents[:] = places[:, times, None] * torch.tensor([0.5, -0.5, 0.0, 0.0])
    level = method.levels[0]
    optimizer = torch.optim.AdamW(level.parameters(), lr=1e-2)
    for step in range(250):
        loss = method._loss(level, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chunks = torch.rand(300, 6, 2) * 2 - 1
    codes = level.codes(chunks, torch.full((300,), 6))[:, 0]
    moved = chunks[..., 0].sum(dim=1)
    fit = torch.corrcoef(torch.stack([codes, moved]))[0, 1].abs()
    still = torch.corrcoef(torch.stack([codes, chunks[..., 1].sum(dim=1)]))[0, 1].abs()
    assert fit > 0.9 > 0.3 > still
    predicted = level.rollout(torch.zeros(1, 4), codes[None, :, None, None])[0, :, 0, 0]
    assert (predicted - 0.5 * moved).square().mean() < 0.2 * (0.5 * moved).square().mean()


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.begin="], "training.begin: missing"),
        (["model.macros=[12, 4]"], "model.macros: got "),
        (["model.macros=[4, 40]"], "model.macros: got .* at most data.window, 16"),
        (["data.window=4", "model.macros=[4]"], "data.window: got 4"),
        (["model.history=3"], "model.history: got 3"),
    ],
)
def test_settings_that_do_not_fit_are_errors(words, message):
    with pytest.raises(ConfigError, match=message):
        config.load("hierarchy_maze", config.layered([*LEVELS, "training.begin=x"], words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.settings={cells: 2, maze: 1}"], "data.settings: got "),
        (["model.predictor_dim=16"], "training.begin: the run does not fit"),
        (["model.landmarks=3"], "model.landmarks: got 3"),
    ],
)
def test_another_world_model_is_an_error(runs, tmp_path, capsys, words, message):
    given = config.layered([*LEVELS, f"training.begin={runs / 'world'}"], words)
    assert cli.main(["train", "hierarchy_maze", *given, "--output", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err


def test_a_hierarchy_does_not_begin_from_a_hierarchy(runs, tmp_path, capsys):
    given = [*LEVELS, f"training.begin={runs / 'levels'}"]
    assert cli.main(["train", "hierarchy_maze", *given, "--output", str(tmp_path / "run")]) == 2
    assert "trained hierarchy, takes world" in capsys.readouterr().err
