"""What a memory is for: after a restart of the process the agent finds a goal that it saw before,
which it does not find without the memory; and a thing that is gone surprises.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vicreg_jepa import cli, pretrained
from vicreg_jepa.memory.rows import Format, Rows
from vicreg_jepa.memory.writer import Writer
from vicreg_jepa.recall import absence, places, report
from vicreg_jepa.recall.agent import AGREE, LOCATED, Mind
from vicreg_jepa.recall.graph import Graph, ahead
from vicreg_jepa.recall.tour import Tour
from vicreg_jepa.recall.visits import SPAN, begun, visit
from vicreg_jepa.worlds.episodes import walks
from vicreg_jepa.worlds.window import MazeWindow
from vicreg_jepa.worlds.world import SPEED, State

from tests.trainer.recall_processes import WORLD, models, seeds

ROOT = Path(__file__).resolve().parents[2]


# Along a wall, around its end, and back on the other side of it, 7 pixels away.
WAY = [(float(x), 0.0) for x in range(0, 41, 2)]
WAY += [(40.0, y) for y in (2.0, 4.0, 6.0)] + [(float(x), 7.0) for x in range(40, -1, -2)]


def stored(folder: Path) -> Rows:
    """The rows of two episodes on this way, the second from the middle of it on."""
    size = Format("a test", embedding=1, place=2, action=0, outcome=0)
    with Writer(folder / "store", size) as store:
        for part in (WAY[:25], WAY[24:]):
            count, none = len(part), np.empty((len(part), 0))
            store.write(
                np.resize(store.begin(["w"]), count), np.arange(count), np.ones((count, 1)), part,
                none, none, np.zeros(count),
            )  # fmt: skip
        return store.rows()


def test_a_way_goes_around_a_wall(tmp_path):
    graph = Graph.of(stored(tmp_path))
    lengths, before = graph.ways(graph.nearest(np.array([0.0, 0.0])))
    end = graph.nearest(np.array([0.0, 7.0]))
    assert 83 < lengths[end] <= 87
    way = graph.way(before, end)
    assert [way[0].tolist(), way[-1].tolist()] == [[0, 0], [0, 7]]
    there = ahead(np.array([0.0, 0.0]), way, 30.0)
    assert there.tolist() == [30, 0]
    assert ahead(np.array([0.0, 0.0]), way, 1000.0).tolist() == [0, 7]


def test_places_that_did_not_follow_each_other_are_apart():
    graph = Graph()
    graph.add(np.zeros(2), 0)
    graph.leave()
    graph.add(np.array([7.0, 0.0]), 1)
    assert graph.ways(0)[0].tolist() == [0, np.inf]
    graph.leave()
    graph.add(np.array([3.5, 0.0]), 2)
    assert graph.ways(0)[0].tolist() == [0, 7, 3.5]


def test_votes_that_agree_locate(tmp_path):
    mind = Mind(stored(tmp_path), deque([(0, np.array([1.0, 0.0]))]))
    mind.vote(np.array([[5.0, 5.0], [40.0, 1.0]]), np.array([0.4 * LOCATED, 0.7 * LOCATED]))
    assert mind.offset is None
    mind.refused = [np.array([1.0, 2.0])]
    mind.vote(np.array([[5.0, 5.0 + AGREE / 2]]), np.array([0.7 * LOCATED]))
    assert np.allclose(mind.refused[0] - mind.offset, [1.0, 2.0])  # the same place
    assert np.linalg.norm(mind.offset - [5.0, 5.0]) < AGREE / 2
    assert len(mind.graph) > 40  # what was remembered
    assert mind.graph.from_nodes(np.array([6.0, 5.5])).min() < AGREE  # and where it is


def test_the_picture_of_the_goal_may_be_a_frame_that_was_seen():
    mind = Mind(None, deque(), alike=[(0, np.array([1.0, 2.0]), 0.0), (1, np.zeros(2), 2.0)])
    assert mind.goal(5.0).tolist() == [1.0, 2.0]
    mind.refused.append(np.array([1.0, 2.0]))
    assert mind.goal(5.0) is None  # the other is beside it


def test_a_tour_comes_through_every_cell():
    world = MazeWindow(cells=4)
    state = world.reset(torch.arange(5))
    tour, seen = Tour(world, state), torch.zeros(5, 4, 4, dtype=torch.bool)
    for _ in range(190):
        state = world.step(state, tour(world, state))
        column, row = world.facts(state)["cell"].unbind(1)
        seen[torch.arange(5), row, column] = True
    assert seen.all()


@pytest.fixture(scope="module")
def led(tmp_path_factory) -> Path:
    """The store of three mazes that another process was led through."""
    store = tmp_path_factory.mktemp("led") / "store"
    words = [sys.executable, "-m", "tests.trainer.recall_processes", str(store), "3", "360"]
    paths = f"{ROOT}{os.pathsep}{ROOT / 'python'}"
    subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=True)
    return store


def test_a_goal_is_found_after_a_restart(led, tmp_path):
    """With the store of the process that ended; not with the last frames alone."""
    store, its = shutil.copy(led, tmp_path / "store"), models()
    starts = begun(WORLD, seeds(3), 0, torch.load(f"{led}.positions"))
    assert not WORLD.in_view(starts, starts.goal).any()
    found = visit(WORLD, starts, its, 160, Path(store))
    assert found.success.tolist() == [True] * 3
    alone = visit(WORLD, starts, its, 160, span=SPAN)
    assert int(alone.success.sum()) <= 1
    # It knows where it is: places are in the frame of the first visit, which began at its start.
    places = found.places[:, -1] + WORLD.reset(seeds(3)).position
    assert (places - found.positions[:, -1]).abs().max() < 4


@torch.no_grad()
def test_what_is_gone_surprises():
    """A row of a window, and the same place seen again, 2 pixels from there: with a thing in view,
    and without it.
    """
    its, right, tried = models(), 0, 0
    state = WORLD.reset(torch.arange(40))
    for number in range(40):
        one = state.rows(slice(number, number + 1))
        seen = absence.seen_cells(WORLD, one.position)[0]
        things = (seen & (one.layout[0, :, :, 2] > 0)).nonzero().tolist()
        if not things:
            continue
        tried += 1
        row, column = things[0]
        case = absence.Case(0, one.position[0], (row, column), (row, column))
        after = WORLD.step(one, torch.tensor([[0.6, -0.8]]))
        rows = SimpleNamespace(
            place=one.position.double().numpy(), embedding=its.model.encode(WORLD.render(one))
            .numpy(),
        )  # fmt: skip
        expected = absence.carried(its, rows, after.position.double())
        true, gone = (
            float(torch.linalg.vector_norm(expected - its.model.encode(WORLD.render(scene))))
            for scene in (after, absence.changed(after, case, "removed"))
        )
        right += gone > true
    assert tried >= 10
    assert right >= 0.9 * tried


@torch.no_grad()
def test_places_are_predicted_from_what_is_seen(monkeypatch):
    """Walls stop the dot: a motion that is fitted to few walks knows of them from the latents, and
    is nearer to the true places of other walks than one that takes every action to succeed.
    """
    monkeypatch.setattr(places, "WALKS", 96)
    monkeypatch.setattr(places, "FITTED", 300)
    model = models().model
    states, actions = walks(WORLD, 77, 24, 8)
    first = State(*(field[:, 0] for field in states))
    latents = model.encode(WORLD.render(first))
    with torch.enable_grad():
        learned = places.LearnedPlaces(model, places.fitted(model, WORLD))
    predicted = learned.rollout(learned.start(first.position, latents, first), actions[:, None])
    free = first.position[:, None] + SPEED * actions.cumsum(dim=1)
    errors = [
        float(torch.linalg.vector_norm(path - states.position[:, 1:], dim=2).mean())
        for path in (predicted[:, 0, :, :2], free)
    ]
    assert errors[0] < 0.7 * errors[1], errors


def test_a_verdict_can_fail():
    """No memory in the place of memory."""

    def of(success, steps):
        return SimpleNamespace(success=torch.tensor(success), rollout_steps=torch.tensor(steps))

    none = {kind: [1.0, 1.0] for kind in absence.KINDS}
    bad = absence.Surprises({report.WITH: none, "without memory": none}, {}, [1.0], 0)
    bad.changed = {report.WITH: none, "without memory": {k: [2.0, 2.0] for k in none}}
    poor, good = of([True, False], [10, 10]), of([True, True], [10, 10])
    result = SimpleNamespace(
        starts=SimpleNamespace(seed=[0, 1]), found={report.WITH: poor, report.ALONE: good},
        again={"first visit": good, "second visit": good}, surprises=bad,
    )  # fmt: skip
    words = report.verdict(result)
    assert [each[:3] for each in words] == ["(a)", "(a)", "(b)", "(c)", "(c)"]
    bad.lost = 100
    words = report.verdict(result)
    assert words[3:] == [
        "(c): 0 of 206 with memory, takes 90%",
        "(c): 6 of 6 without memory, takes 70% at most",
    ]


def test_a_run_on_another_world_is_refused(tmp_path, capsys):
    other = str(pretrained.path("plan"))
    assert cli.main(["recall", other, "--output", str(tmp_path)]) == 2
    assert "takes a run on MazeWindow" in capsys.readouterr().err
    assert cli.main(["recall"]) == 2
    assert "takes a run or --pretrained" in capsys.readouterr().err


def test_a_store_of_someone_else_is_left_alone(tmp_path):
    store = tmp_path / "memory.store"
    store.write_text("precious")
    with pytest.raises(ValueError, match=r"^--output: .* has a memory.store, takes a folder with"):
        report.emptied(tmp_path, "memory.store", "recall.json")
    assert store.read_text() == "precious"
    (tmp_path / "recall.json").write_text("{}")  # of the same command
    assert report.emptied(tmp_path, "memory.store", "recall.json") == store
    assert not store.exists()


@pytest.mark.thorough
def test_the_memory_does_what_it_is_for(tmp_path, capsys):
    """50 episodes of each use beside the controls: the command fails if one is not as it should."""
    words = ["recall", "--pretrained", "--output", str(tmp_path)]
    assert cli.main(words) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "recall.json").read_text())["found"]
    assert sum(found[report.WITH]["success"]) >= 45
    assert sum(found[report.ALONE]["success"]) <= 20
    assert (tmp_path / "episode.png").stat().st_size > 1000
