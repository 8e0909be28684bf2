"""`vicreg-jepa plan` and `vicreg-jepa drift`, from a run to the table and the pictures; and the
world model of pixels, their control.
"""

from __future__ import annotations

import json

import pytest
import torch
from matplotlib import pyplot
from PIL import Image
from torch import Tensor
from vicreg_jepa import cli, config
from vicreg_jepa.evaluation import drift
from vicreg_jepa.methods import build
from vicreg_jepa.planning import adapted, adapted_report, figure, report
from vicreg_jepa.planning.evaluate import followed, rank_correlation
from vicreg_jepa.planning.model import TrueModel
from vicreg_jepa.planning.planner import Effort
from vicreg_jepa.planning.planners import ICEM
from vicreg_jepa.training.run import restore
from vicreg_jepa.worlds.policies import straight, walk
from vicreg_jepa.worlds.two_rooms import TwoRooms

SMALL = [
    "model.dim=8", "model.keypoints=4", "model.predictor_dim=32", "training.batch=8",
    "training.steps=2", "training.save_every=2", "data.window=6", "loss.unroll=4",
]  # fmt: skip
# Settings of the planner.
LITTLE = ["candidates=8", "elites=4", "kept=2", "iterations=2", "every=1", "horizon=2"]
OF_LATENTS = [*SMALL, "loss.pairs=2", "model.latent=8"]


@pytest.fixture(autouse=True)
def small_probe(monkeypatch):
    monkeypatch.setattr(drift, "FITTED", 2000)
    monkeypatch.setattr(drift, "PROBE_STEPS", 800)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for recipe, words in (("world_two_rooms", OF_LATENTS), ("world_two_rooms_pixels", SMALL)):
        assert cli.main(["train", recipe, *words, "--output", str(folder / recipe)]) == 0
    return folder


class Position:
    """A model of two rooms that is right: its latents are the dot's position, read from frames."""

    actions = 2

    def encode(self, frames: Tensor) -> Tensor:
        pixels = frames.movedim(-1, 1).float().flatten(1) / 255
        return drift.centre(pixels, (2, 65, 65))

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        layout = TwoRooms().reset(torch.zeros(1, dtype=torch.int64)).layout
        known = torch.cat([start, layout.float().expand(len(start), -1)], dim=1)
        return TrueModel(TwoRooms()).rollout(known, actions)[..., :2]


# ------------------------------------------------------------------------------ plan


def test_plan_writes_its_table_and_pictures_and_fails_an_untrained_model(runs, capsys):
    run, output = runs / "world_two_rooms", runs / "pictures"
    words = ["--episodes", "4", "--full", "--output", str(output)]
    longer = ["horizon=6", "iterations=4", "interval=30"]  # than plans of a lowest level are
    words += ["--planner", "candidates=8", "elites=4", "kept=2", "every=1", *longer]
    assert cli.main(["plan", str(run), *words]) == 1
    out = capsys.readouterr().out
    text = (output / "plan.json").read_text()
    rows = {row["name"]: row for row in json.loads(text, parse_constant=pytest.fail)}
    assert list(rows) == ["walk", "straight", "expert", "true dynamics", "world_two_rooms, step 2",
                          "world_two_rooms, step 2, full budget"]  # fmt: skip
    assert rows["expert"]["success"] == 4
    # With the whole budget all episodes have as many iterations: there is no correlation.
    assert rows["world_two_rooms, step 2, full budget"]["rank"] is None
    for name, row in rows.items():
        assert f"{row['success']} of 4" in next(line for line in out.splitlines() if name in line)
    assert "failed: world_two_rooms, step 2:" in out
    with Image.open(output / "episodes.png") as picture:
        assert picture.width > 800
    with Image.open(output / "episode.gif") as film:
        assert film.n_frames > 10


def test_plan_takes_runs_on_one_world(runs, capsys):
    other = runs / "random"
    words = [*OF_LATENTS, "--output", str(other)]
    assert cli.main(["train", "world_two_rooms_random", *words]) == 0
    assert cli.main(["plan", str(runs / "world_two_rooms"), str(other)]) == 2
    assert "takes that of the first run" in capsys.readouterr().err


def test_a_good_model_passes_and_walking_straight_does_not():
    effort = report.planner({"candidates": 64})
    rows, result = report.measured([("position", Position())], TwoRooms(), effort, 10, full=True)
    by_name = {row.name: row for row in rows}
    assert by_name["straight"].success == int(
        followed(TwoRooms(), straight, report.seeds_of(10)).sum()
    )
    assert by_name["position"].success >= 9
    assert by_name["position"].rollout_steps < by_name["position, full budget"].rollout_steps
    assert report.verdict(rows) == []
    poor = report.Row("poor", 10, by_name["straight"].success + 1, 1.0, 1.0, 0.0, 1.0)
    assert report.verdict([*rows, poor])[0].startswith("poor: ")
    decode = figure.Decoder(Position(), TwoRooms(), TwoRooms().reset(report.seeds_of(1)))
    place = decode(result.positions[0, :5])
    assert torch.linalg.vector_norm(place - result.positions[0, :5], dim=1).max() < figure.GRID


@pytest.mark.parametrize("wall", ["fixed", "random"])
def test_the_effort_of_the_command_follows_the_difficulty(wall):
    """With two iterations of each horizon, not four, the rank correlation is 0.52 and 0.58."""
    world, seeds = TwoRooms(wall=wall), torch.arange(2000, 2100)
    result = report.planned(TrueModel(world), world, report.planner(), seeds, report.TRUE_NEAR)
    assert int(result.success.sum()) == 100
    assert rank_correlation(result.iterations, result.distance) >= 0.7


@pytest.mark.parametrize(
    ("episodes", "straight_has", "success", "takes"),
    [
        (50, 10, 20, None),
        (50, 10, 19, "takes 20 or more: straight has 10"),
        (6, 1, 3, None),
        (6, 1, 2, "takes 3 or more: straight has 1"),  # 2.2
        (4, 3, 4, None),
        (4, 4, 4, "but straight has 4, too many for a margin of 20%"),
    ],
)
def test_a_verdict_says_what_would_do(episodes, straight_has, success, takes):
    rows = [
        report.Row("straight", episodes, straight_has),
        report.Row("model", episodes, success, 1.0, 1.0, 0.0, 1.0),
    ]
    advice = report.verdict(rows)
    assert advice == [] if takes is None else takes in advice[0]


def test_a_verdict_without_the_straight_line_takes_the_walk():
    rows = [report.Row("walk", 10, 2), report.Row("model", 10, 3, 1.0, 1.0)]
    assert report.verdict(rows) == ["model: 3 of 10, takes 4 or more: walk has 2"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["speed=2"], "--planner: got 'speed', takes every, horizon, "),
        (["effort=1"], "--planner: got 'effort', takes every, horizon, "),
        (["every=0"], "every: got 0"),
        (["iterations=10"], "got horizon=12, every=4 and iterations=10, which end at plans of 4 "),
        (["every=6"], "got horizon=12, every=6 and iterations=20, which end at plans of 8 actions"),
        (["horizon=0"], "horizon: got 0"),
        (["interval=7"], "interval: got 7, takes a multiple of repeat"),
    ],
)
def test_the_planner_takes_its_settings_alone(runs, capsys, words, message):
    run = str(runs / "world_two_rooms")
    assert cli.main(["plan", run, "--planner", *words]) == 2
    assert message in capsys.readouterr().err


# A world as any environment: of its state only `goal` and `success` in its info are used.


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapted")
    words = ["--episodes", "4", "--length", "20", "--history", "2", "--repeat", "3"]
    name = "vicreg_jepa/TwoRooms-v0"
    assert cli.main(["collect", name, *words, "--output", str(folder / "walks")]) == 0
    data = ["data={kind: trajectories, path: " + str(folder / "walks") + ", size: 65, window: 6}"]
    words = [*data, *[word for word in OF_LATENTS if not word.startswith("data.")]]
    assert cli.main(["train", "world_two_rooms", *words, "--output", str(folder / "run")]) == 0
    return folder


def test_plan_acts_in_any_environment(adapted_run, capsys, monkeypatch):
    monkeypatch.setattr(adapted_report, "NEAR", 1e-3)  # or nothing is searched for
    folder = adapted_run
    words = ["--episodes", "4", "--planner", *LITTLE]
    assert cli.main(["plan", str(folder / "run"), *words]) == 1
    rows = json.loads((folder / "run/plan/plan.json").read_text())
    assert [row["name"] for row in rows] == ["walk", "run, step 2"]
    assert rows[1]["rank"] is None
    # 7 plans, each of at most 2 iterations.
    assert 1 <= rows[1]["iterations"] <= 14
    assert "failed: run, step 2:" in capsys.readouterr().out
    with Image.open(folder / "run/plan/episodes.png") as picture:
        assert picture.size == (9 * 132 + 80, 4 * 132 + 16)
    with Image.open(folder / "run/plan/episode.gif") as film:
        assert film.n_frames > 1


class Seer:
    """A model that is right, of two stacked frames of two rooms: it reads the newest."""

    actions = 2

    def __init__(self, held: int) -> None:
        self.held = held

    def encode(self, frames: Tensor) -> Tensor:
        return Position().encode(frames[..., -2:])

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        held = actions.repeat_interleave(self.held, dim=2)
        return Position().rollout(start, held)[:, :, self.held - 1 :: self.held]


def test_a_right_model_succeeds_in_any_environment(monkeypatch):
    make = adapted_report.maker(
        {"world": "vicreg_jepa/TwoRooms-v0", "settings": {}, "history": 2, "repeat": 2}
    )
    assert adapted_report.steps_of(make) == 100
    seeds = torch.arange(6)
    planner = report.planner({"repeat": 3, "interval": 6})
    played, control = adapted.episodes(Seer(2), make, planner, seeds, 3.0, 100)
    assert played.success.tolist() == [True] * 6
    closed = []
    monkeypatch.setattr(adapted.Adapter, "close", lambda one: closed.append(one))
    walked = adapted.followed(make, adapted.walk, seeds, 100)
    assert len(closed) == 6
    assert not walked.success.all()
    assert torch.equal(walked.goals, played.goals)
    assert torch.equal(walked.frames[:, 0], played.frames[:, 0])
    # Success is what the world says of the last frame.
    state = TwoRooms().reset(seeds)
    last = Seer(2).encode(played.frames[:, -1])
    assert torch.linalg.vector_norm(last - state.goal, dim=1).max() < 4.1
    assert control.iterations.min() >= 1


def test_a_run_that_cannot_be_planned_with_says_why(adapted_run, tmp_path, capsys):
    run = str(adapted_run / "run")
    assert cli.main(["plan", run, "--full"]) == 2
    assert "--full: takes runs with data.kind 'world'" in capsys.readouterr().err
    described = {"world": "Pendulum-v1", "settings": {}, "policy": "walk", "seed": 0}
    with pytest.raises(ValueError, match=r"^data.path: its trajectories do not name 'history'"):
        adapted_report.maker(described)
    (adapted_run / "walks").rename(adapted_run / "gone")
    assert cli.main(["plan", run]) == 2
    assert "walks" in capsys.readouterr().err
    (adapted_run / "gone").rename(adapted_run / "walks")


@pytest.mark.parametrize("picture", ["draw", "animate"])
def test_a_picture_that_cannot_be_written_is_named(runs, capsys, monkeypatch, picture):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "draw", lambda *args: None)
    monkeypatch.setattr(figure, picture, full)
    output = runs / "full"
    assert cli.main(["plan", str(runs / "world_two_rooms"), "--episodes", "4",
                     "--output", str(output), "--planner", *LITTLE]) == 2  # fmt: skip
    name = {"draw": "episodes.png", "animate": "episode.gif"}[picture]
    assert f"{output / name}: cannot be written" in capsys.readouterr().err


def test_the_length_of_a_step_is_that_of_walks():
    """An action is uniform in [-1, 1]^2 and 2 pixels long: about 1.5 pixels."""
    assert report.step_length(Position(), TwoRooms()) == pytest.approx(1.4, abs=0.15)


# ------------------------------------------------------------------------------ drift


def test_drift_writes_its_table_and_picture(runs, capsys, monkeypatch):
    monkeypatch.setattr(drift, "FITTED", 200)  # untrained latents tell nothing
    monkeypatch.setattr(drift, "PROBE_STEPS", 20)
    run, beside = (str(runs / name) for name in ("world_two_rooms", "world_two_rooms_pixels"))
    assert cli.main(["drift", run, "--beside", beside, "--walks", "6"]) == 0
    out = capsys.readouterr().out
    assert "leaves 36.770% after 1,000 steps and 0.005% after 10,000" in out
    rows = json.loads((runs / "world_two_rooms" / "drift" / "drift.json").read_text())
    assert [row["name"] for row in rows] == [
        "world_two_rooms, step 2", "world_two_rooms_pixels, step 2", "standing still"
    ]  # fmt: skip
    assert all(len(row["mean"]) == len(row["median"]) == drift.STEPS for row in rows)
    assert (runs / "world_two_rooms" / "drift" / "drift.png").exists()


def test_drift_reads_all_runs_before_it_writes_or_measures(runs, capsys, monkeypatch):
    monkeypatch.delattr(drift, "measured")
    absent = runs / "absent"
    assert cli.main(["drift", str(absent)]) == 2
    assert not absent.exists()
    run = runs / "world_two_rooms"
    assert cli.main(["drift", str(run), "--beside", str(absent)]) == 2
    assert f"{absent}: holds no checkpoint" in capsys.readouterr().err


def test_the_picture_of_a_drift_has_a_line_for_every_run(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    steps = [1.0] * drift.STEPS
    drift.draw([drift.Drift(f"run {n}", steps, steps, 0.5) for n in range(7)], tmp_path / "x.png")
    (axis,) = figures[0].axes
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        f"run {n}" for n in range(7)
    ]


def test_a_right_model_does_not_drift():
    settings = config.load("world_two_rooms")
    curve = drift.measured("right", settings, Position(), TwoRooms(), 4)
    still = drift.still(TwoRooms(), 4)
    assert max(curve.mean) < 0.5 + curve.read
    assert still.mean[31] > 5


def test_the_centre_of_a_dot_is_its_position():
    world = TwoRooms()
    state = world.reset(torch.arange(20))
    pixels = world.render(state).movedim(-1, 1).float().flatten(1) / 255
    torch.testing.assert_close(drift.centre(pixels, (2, 65, 65)), state.position, rtol=0, atol=0.05)


# ------------------------------------------------------------------------------ pixels


def test_pixels_are_predicted_from_predicted_pixels(runs):
    _, method, _ = restore(runs / "world_two_rooms_pixels")
    frames = TwoRooms().render(TwoRooms().reset(torch.arange(3)))
    start, actions = method.encode(frames), 2 * torch.rand(3, 2, 4, 2) - 1
    with torch.no_grad():
        path = method.rollout(start, actions)
        embedded = method.action_encoder(actions[1, 1])
        pixels = start[1:2]
        for step in range(4):
            pixels = method.following(pixels, embedded[step : step + 1]).clamp(0, 1)
            torch.testing.assert_close(path[1, 1, step], pixels[0], rtol=1e-4, atol=1e-5)
    assert path.shape == (3, 2, 4, 2 * 65 * 65)


def test_the_control_has_no_op_to_choose_a_backend_for():
    with pytest.raises(config.ConfigError, match="backend: got 'cpu', world_pixels takes none"):
        config.load("world_two_rooms_pixels", ["backend=cpu"])


def test_the_control_has_as_many_parameters_and_steps():
    both = [config.load(name) for name in ("world_two_rooms", "world_two_rooms_pixels")]
    assert both[0].training == both[1].training
    sizes = [sum(p.numel() for p in build.method(one, 2).parameters()) for one in both]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


# ------------------------------------------------------------------------------ a small world model


def test_a_short_training_predicts_and_plans(tmp_path):
    """The whole chain in little: 150 steps from pixels, against no training and standing still."""
    words = ["training.steps=150", "training.save_every=150", "--output", str(tmp_path / "run")]
    assert cli.main(["train", "world_two_rooms", *words]) == 0
    settings, method, _ = restore(tmp_path / "run")
    untrained = build.method(settings, 2).eval()
    world = TwoRooms()
    off, none = (drift.measured("", settings, each, world, 40).mean for each in (method, untrained))
    still = drift.still(world, 40).mean
    for step in (4, 8, 16):
        assert off[step - 1] < 0.6 * min(still[step - 1], none[step - 1])
    seeds = torch.arange(24)
    planner = ICEM(horizon=12, candidates=48, elites=8, iterations=8, effort=Effort())
    near = report.NEAR * report.step_length(method, world)
    result = report.planned(method, world, planner, seeds, near)
    gone = torch.linalg.vector_norm(result.positions[:, -1] - result.goal, dim=1)
    began = torch.linalg.vector_norm(result.positions[:, 0] - result.goal, dim=1)
    walked = followed(world, walk, seeds)
    assert int(result.success.sum()) >= int(walked.sum()) + 3
    assert gone.mean() < 0.5 * began.mean()
