"""Trajectories of worlds: collected into shards, read back by windows, and refused when damaged."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from vicreg_jepa import cli
from vicreg_jepa.worlds import episodes, policies, store
from vicreg_jepa.worlds.adapter import Raster
from vicreg_jepa.worlds.collect import collect
from vicreg_jepa.worlds.maze import Maze
from vicreg_jepa.worlds.two_rooms import TwoRooms

ROOMS = TwoRooms(wall="random", noise=0.2)
MADE = {"world": "TwoRooms", "settings": ROOMS.settings()}


@pytest.fixture(scope="module")
def played():
    return list(episodes.play(ROOMS, policies.walk, seed=3, episodes=7, length=12))


@pytest.fixture(scope="module")
def written(played, tmp_path_factory):
    folder = tmp_path_factory.mktemp("worlds") / "rooms"
    assert len(store.write(folder, played, MADE, per_shard=3)) == 3
    return folder


def same(one: episodes.Episode, other: episodes.Episode) -> bool:
    assert one.states.keys() == other.states.keys()
    return (
        np.array_equal(one.frames, other.frames)
        and np.array_equal(one.actions, other.actions)
        and all(np.array_equal(one.states[name], other.states[name]) for name in one.states)
        and one.record == other.record
    )


def test_an_episode_is_what_the_world_does(played):
    """Its frames, actions and truths are those of its seed, stepped here by hand."""
    for number in (0, 6):
        episode = played[number]
        assert episode.record["seed"] == (3 << 32) + number
        state = ROOMS.reset(torch.tensor([episode.record["seed"]]))
        assert episode.record["goal"] == state.goal[0].tolist()
        for time in range(13):
            assert np.array_equal(episode.frames[time], ROOMS.render(state)[0].numpy())
            for name, value in ROOMS.facts(state).items():
                assert np.array_equal(episode.states[name][time], value[0].numpy())
            if time < 12:
                state = ROOMS.step(state, torch.from_numpy(episode.actions[time])[None])
    (later,) = episodes.play(ROOMS, policies.walk, seed=3, episodes=1, length=12, first=6)
    assert same(later, played[6])


def test_shards_give_back_what_was_played(played, written):
    shards = store.Shards(written)
    assert len(shards) == 7
    assert list(shards.lengths) == [12] * 7
    assert shards.settings["settings"] == ROOMS.settings()
    assert all(same(shards.episode(number), played[number]) for number in (6, 0, 3, 2))
    files = {path.name: path.read_bytes() for path in written.iterdir()}
    again = written.parent / "again"
    store.write(again, played, MADE, per_shard=3)
    assert {path.name: path.read_bytes() for path in again.iterdir()} == files


def test_windows_are_runs_of_their_episodes(played, written):
    windows = store.Shards(written).windows(5)
    assert len(windows) == 7 * 8
    frames, actions = windows.batch([0, 55, 9, 13, 9])
    assert frames.shape == (5, 6, 65, 65, 2)
    assert actions.shape == (5, 5, 2)
    assert (frames.dtype, actions.dtype) == (torch.uint8, torch.float32)
    for place, (number, start) in enumerate([(0, 0), (6, 7), (1, 1), (1, 5), (1, 1)]):
        episode = played[number]
        assert np.array_equal(frames[place].numpy(), episode.frames[start : start + 6])
        assert np.array_equal(actions[place].numpy(), episode.actions[start : start + 5])
    assert len(store.Shards(written).windows(12)) == 7
    assert len(store.Shards(written).windows(5, stride=5)) == 7 * 2
    loaded = next(iter(DataLoader(windows, batch_size=3)))
    assert [tuple(one.shape) for one in loaded] == [(3, 6, 65, 65, 2), (3, 5, 2)]


def test_damage_is_named(played, written, tmp_path):
    name = "trajectories-000001.tar"
    whole = (written / name).read_bytes()
    entry = store.samples.index_of(written / name)[1]
    middle = entry.arrays[0] + entry.arrays[1] // 2

    def damaged(content: bytes | None, file: str = name) -> store.Shards:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(written, tmp_path / "copy")
        if content is None:
            (tmp_path / "copy" / file).unlink()
        else:
            (tmp_path / "copy" / file).write_bytes(content)
        return store.Shards(tmp_path / "copy")

    for size in (0, len(whole) // 2, len(whole) - 512, entry.arrays[0] - 512):
        with pytest.raises(ValueError, match=rf"shard '.*{name}' is truncated"):
            damaged(whole[:size])
    with pytest.raises(ValueError, match=rf"{name}': sample 000000004: "):
        damaged(whole[:middle] + bytes(8) + whole[middle + 8 :]).episode(4)
    with pytest.raises(ValueError, match=rf"shard: '.*{name}' is no file"):
        damaged(None)
    with pytest.raises(ValueError, match="names 7 episodes, but its shards hold 5"):
        damaged((written / "trajectories-000002.tar").read_bytes(), "trajectories-000001.tar")
    settings = (written / store.SETTINGS).read_bytes()
    with pytest.raises(ValueError, match=f"folder: got .* takes one with {store.SETTINGS}"):
        damaged(None, store.SETTINGS)
    for content in (b"", b"[]", settings[:30], settings.replace(b'"version": 1', b'"version": 9')):
        with pytest.raises(ValueError, match=rf"{store.SETTINGS}: is damaged"):
            damaged(content, store.SETTINGS)
    cut = dataclasses.replace(played[0], frames=played[0].frames[:12])
    store.write(tmp_path / "cut", [cut], MADE)
    path = tmp_path / "cut" / store.SETTINGS
    for text, what in ((b"[12]", "12 frames and 12"), (b"[11]", "12 frames and 12")):
        path.write_bytes(path.read_bytes().replace(b"[12]", text))
        with pytest.raises(ValueError, match=f"has {what} actions"):
            store.Shards(tmp_path / "cut").episode(0)
    wrong = settings.replace(b"[12, 12, 12", b"[12, 11, 12")
    with pytest.raises(ValueError, match="sample 000000001: has 13 frames and 12 actions"):
        damaged(wrong, store.SETTINGS).episode(1)


def test_what_was_stopped_is_not_read(played, tmp_path):
    def stopped():
        yield from played[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write(tmp_path / "half", stopped(), MADE, per_shard=3)
    assert [path.name for path in (tmp_path / "half").iterdir()] == ["trajectories-000000.tar"]
    with pytest.raises(ValueError, match=f"takes one with {store.SETTINGS}"):
        store.Shards(tmp_path / "half")


# The command


def test_collect(tmp_path, capsys):
    words = ["collect", "Maze", "cells=3", "noise=0.1", "--episodes", "3", "--length", "9"]
    output = tmp_path / "maze"
    assert cli.main([*words, "--policy", "expert", "--output", str(output)]) == 0
    assert "3 episodes in 1 shards" in capsys.readouterr().out
    shards = store.Shards(output)
    assert shards.settings["settings"] == {"noise": 0.1, "cells": 3, "maze": -1}
    assert (shards.settings["world"], shards.settings["policy"]) == ("Maze", "expert")
    world = Maze(noise=0.1, cells=3)
    for number, episode in enumerate(episodes.play(world, policies.expert, 0, 3, 9)):
        assert same(shards.episode(number), episode)
    before = sorted(path.name for path in output.iterdir())
    assert cli.main([*words, "--output", str(output)]) == 2
    assert "output: got" in capsys.readouterr().err
    assert sorted(path.name for path in output.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["Garden"], "world: got 'Garden', takes TwoRooms, Maze, MazeWindow or gymnasium's name"),
        (["TwoRooms", "cells=3"], "cells: is no setting of TwoRooms"),
        (["TwoRooms", "wall=soft"], "wall: got 'soft', takes fixed or random"),
        (["TwoRooms", "wall"], "setting: got 'wall', takes key=value"),
        (["TwoRooms", "noise=1", "noise=0"], "noise: given twice"),
        (["Maze", "--policy", "magic"], "policy: got 'magic', Maze takes walk"),
    ],
)
def test_mistakes_are_named(words, message, tmp_path, capsys):
    output = tmp_path / "none"
    assert cli.main(["collect", *words, "--output", str(output)]) == 2
    assert f"vicreg-jepa: {message}" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda played, one: one.windows(0), "length: got 0, takes an integer from 1"),
        (lambda played, one: one.windows(5, stride=0), "stride: got 0"),
        (lambda played, one: one.windows(13), "length: got 13, takes at most 12"),
        (lambda played, one: store.Shards("no/such"), "folder: got 'no/such', takes one with"),
        (lambda played, one: store.write(__file__, played, MADE), "output: got .*, a file"),
        (lambda played, one: collect("TwoRooms", "x", 0, 3, 0), "episodes: got 0"),
        (lambda played, one: collect("TwoRooms", "x", 3, 0, 0), "length: got 0"),
        (lambda played, one: collect("TwoRooms", "x", 3, 3, -1), "seed: got -1"),
    ],
)
def test_bad_arguments_are_named(make, message, played, written):
    with pytest.raises(ValueError, match=f"^{message}"):
        make(played, store.Shards(written))


def test_no_episode_leaves_no_shard(tmp_path):
    with pytest.raises(ValueError, match="episodes: got none"):
        store.write(tmp_path, [], MADE)
    assert list(tmp_path.iterdir()) == []


def test_a_position_is_drawn_where_it_is():
    walls = np.array([[True, False], [False, False]])
    frame = Raster((-1, 0), (1, 4), size=32, walls=walls)((0.5, 1.0))
    assert frame.shape == (32, 32, 2)
    weight = frame[..., 0].astype(float) / frame[..., 0].sum()
    middle = np.arange(32) + 0.5
    assert (weight.sum(0) * middle).sum() == pytest.approx(24, abs=0.02)
    assert (weight.sum(1) * middle).sum() == pytest.approx(24, abs=0.02)
    assert frame[:16, :16, 1].min() == 255
    assert frame[..., 1].astype(int).sum() == 255 * 16 * 16
