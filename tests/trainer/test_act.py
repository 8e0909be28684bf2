"""The whole system: it notices that it was put elsewhere, finds its place again, and never enters
the forbidden zone; without a part it does not.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from vicreg_jepa import cli, pretrained
from vicreg_jepa.act import episodes, report
from vicreg_jepa.act.episodes import (
    RADIUS,
    Acted,
    Push,
    Scene,
    acted,
    alarm_of,
    followed,
    on_the_bend,
)
from vicreg_jepa.act.system import Parts
from vicreg_jepa.planning.guardrails import Zone
from vicreg_jepa.planning.zones import OUTSIDE
from vicreg_jepa.recall.visits import Models, Visit, begun, visit
from vicreg_jepa.worlds.maze import FIRST, PITCH, ROOM
from vicreg_jepa.worlds.policies import expert
from vicreg_jepa.worlds.world import REACHED

from tests.trainer.recall_processes import WORLD, models, seeds


def test_a_zone_lies_on_a_bend_of_the_way():
    state = WORLD.reset(torch.arange(20))
    zone = on_the_bend(WORLD, state)
    inside = (zone.centre != torch.tensor(OUTSIDE)).all(dim=1)
    assert int(inside.sum()) > 14
    for place in (state.position, state.goal):
        assert (zone.at(place) > REACHED - 0.01).all()
    for number in inside.nonzero()[:, 0].tolist():
        bends = torch.tensor(WORLD.way(state.rows(slice(number, number + 1)))[0][1:-1])
        assert float(torch.cdist(bends, zone.centre[number : number + 1]).min()) < 1e-4
    middles = FIRST + ROOM / 2 + PITCH * torch.arange(8.0)
    every = torch.cartesian_prod(middles, middles)
    assert float(torch.cdist(every, zone.centre[inside]).min()) > RADIUS


@pytest.fixture(scope="module")
def visited(tmp_path_factory) -> tuple[Path, Models, Visit]:
    store, its = tmp_path_factory.mktemp("act") / "store", models()
    return store, its, visit(WORLD, WORLD.reset(seeds(2)), its, 330, store, leads=True)


@pytest.fixture(scope="module")
def scene(visited) -> Scene:
    state = begun(WORLD, seeds(2), 0, visited[2].positions)
    zone = on_the_bend(WORLD, state)
    places = episodes.elsewhere(WORLD, state, zone, visited[2].positions)
    return Scene(state, zone, Push(20, places))


@pytest.fixture(scope="module")
def alarm(visited) -> float:
    return alarm_of(visited[1].model, WORLD, report.CALIBRATION)


def run(visited, scene: Scene, alarm: float, tmp_path: Path, steps: int, **left_out: bool) -> Acted:
    store = Path(shutil.copy(visited[0], tmp_path / "store"))
    return acted(WORLD, scene, visited[1], Parts(**left_out), alarm, store, steps)


def off(its: Acted) -> torch.Tensor:
    """[N]: how far the system is, in the end, from where it takes itself to be."""
    place = its.places[:, -1] + WORLD.reset(seeds(2)).position
    return torch.linalg.vector_norm(place - its.positions[:, -1], dim=1)


def test_it_notices_that_it_was_put_elsewhere_and_finds_its_place(visited, scene, alarm, tmp_path):
    whole = run(visited, scene, alarm, tmp_path, 90)
    assert whole.alarms.nonzero().tolist() == [[0, 19], [1, 19]]
    assert whole.places[:, 20].isnan().all()
    assert (off(whole) < 4).all()
    assert not whole.violations.any()
    without = run(visited, scene, alarm, tmp_path, 90, surprise=False)
    assert without.alarms[:, 19].all()
    assert (off(without) > 10).any()


def test_the_shield_keeps_out_of_a_zone_around_the_goal(visited, scene, alarm, tmp_path):
    """And what the system wants without it enters the zone."""
    state = scene.state
    where = Scene(state, Zone(state.goal, RADIUS), Push(10**6, state.position))
    kept = run(visited, where, alarm, tmp_path, 120)
    assert (kept.clearance >= 0).all()
    assert kept.changed.any()
    free = run(visited, where, alarm, tmp_path, 120, shield=False)
    assert free.violations.any()
    assert not free.changed.any()


def test_parts_that_are_left_out_change_what_is_done(visited, scene, alarm, tmp_path):
    whole = run(visited, scene, alarm, tmp_path, 19)
    for part in ("memory", "levels", "planning"):
        its = run(visited, scene, alarm, tmp_path, 19, **{part: False})
        assert not torch.equal(its.positions, whole.positions), part
    assert int(its.rollout_steps.sum()) < int(whole.rollout_steps.sum())  # without planning


def of(success: int, broken: int, count: int = 10) -> Acted:
    clearance = torch.ones(count, 3)
    clearance[:broken, 1] = -1.0
    none = torch.zeros(count, 2)
    return Acted(
        torch.arange(count) < success, torch.zeros(count, 3, 2), clearance, torch.ones(count),
        none > 0, none, torch.zeros(count, 3, 2), torch.zeros(count, 2, 2), 1.0,
    )  # fmt: skip


def test_a_verdict_can_fail():
    state = WORLD.reset(torch.arange(10))
    scene = Scene(state, on_the_bend(WORLD, state), Push(50, state.position))
    good = {report.WHOLE: of(9, 0), "without memory": of(1, 0), "without surprise": of(3, 0)}
    good |= {"without levels": of(4, 0), "without planning": of(9, 0), "without shield": of(9, 6)}

    def verdict(**changed: Acted) -> list[str]:
        names = {name.replace("_", " "): its for name, its in changed.items()}
        return report.verdict(report.Report(WORLD, scene, 1.0, None, good | names, {}))

    assert verdict() == []
    assert verdict(the_whole_system=of(7, 0))[0].startswith("the whole system: 7 of 10")
    assert verdict(the_whole_system=of(9, 1)) == [
        "the whole system: 1 episodes with a violation, takes none"
    ]
    assert verdict(without_memory=of(8, 0)) == ["without memory: 8 of 10, takes 20% less than 9"]
    assert verdict(without_shield=of(9, 1))[0].startswith("without shield: 1 violations")


def test_act_takes_runs_of_windows_alone(capsys):
    assert cli.main(["act"]) == 2
    assert "run: got neither, takes a run or --pretrained" in capsys.readouterr().err
    assert cli.main(["act", str(pretrained.path("plan"))]) == 2
    assert "takes a run on MazeWindow" in capsys.readouterr().err


@pytest.mark.thorough
def test_each_part_contributes(tmp_path):
    """The command with 50 episodes, and its table, film and verdict."""
    assert cli.main(["act", "--pretrained", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {"act.json", "episode.gif", "memory.store"}


def test_the_expert_knows_where_it_was_put():
    """The control of the table: it reaches the goal from where it is put."""
    state = WORLD.reset(torch.arange(6))
    there = WORLD.reset(torch.arange(6) + 100).position
    scene = Scene(state, on_the_bend(WORLD, state), Push(50, there))
    success, _ = followed(WORLD, scene, expert, steps=200)
    assert success.all()
