"""Windows of trajectories for training: simulated by number, or read from shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.data import sources, trajectories
from vicreg_jepa.distributed.ranks import Share
from vicreg_jepa.worlds import store
from vicreg_jepa.worlds.collect import collect
from vicreg_jepa.worlds.two_rooms import TwoRooms

WORDS = ["training.batch=6", "data.window=3", "data.length=12", "loss.unroll=2", "loss.pairs=2"]
WHOLE = Share()


def made(*words: str) -> config.Config:
    return config.load("world_two_rooms_random", config.layered(WORDS, words))


def first(settings: config.Config, count: int, start: int = 0, share: Share = WHOLE) -> list:
    batches = sources.source(settings).batches(start, share)
    return [next(batches) for _ in range(count)]


def same(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trajectories") / "rooms"
    collect("TwoRooms", folder, count=10, length=8, seed=5, settings={"wall": "random"})
    return folder


def stored(folder, *words: str) -> config.Config:
    base = config.describe(made())
    base["data"] |= {"kind": "trajectories", "path": str(folder), "settings": {}, "length": 90}
    base["data"] |= {"world": "TwoRooms", "window": 3}
    base["training"]["batch"] = 6
    return config.parse(base)


@pytest.fixture(params=["simulated", "stored"])
def settings(request, folder):
    return made() if request.param == "simulated" else stored(folder)


def test_a_step_is_the_same_whenever_it_is_taken(settings, monkeypatch):
    """From another first step, simulated with other steps, and in a worker process."""
    whole = first(settings, 6)
    assert whole[0][0].shape == (6, 4, 65, 65, 2)
    assert whole[0][1].shape == (6, 3, 2)
    assert not same(whole[0], whole[1])
    monkeypatch.setattr(trajectories, "STEPPED", 18)  # three steps at once
    assert all(same(a, b) for a, b in zip(first(settings, 4, start=2), whole[2:], strict=True))
    worked = config.parse(
        config.describe(settings) | {"data": config.describe(settings)["data"] | {"workers": 1}}
    )
    assert same(first(worked, 1, start=4)[0], whole[4])
    other = config.parse(config.describe(settings) | {"seed": 1})
    assert not same(first(other, 1)[0], whole[0])


def test_ranks_share_a_batch(settings):
    whole = first(settings, 2, start=3)
    parts = [first(settings, 2, start=3, share=Share(rank, 2)) for rank in range(2)]
    for step, one in enumerate(whole):
        joined = [torch.cat(z) for z in zip(*(part[step] for part in parts), strict=True)]
        assert same(joined, one)


def test_a_window_is_what_the_world_does_at_a_random_time():
    world = TwoRooms(wall="random", noise=0.2)
    simulation = trajectories.Simulation(world, "walk", 2**62 + 11, length=9, window=3)
    states, actions = simulation.windows(torch.arange(400))
    assert states.time[:, 0].unique().tolist() == list(range(7))  # every start, up to the last
    for step in range(3):
        before, after = (
            type(states)(*(field[:, time] for field in states)) for time in (step, step + 1)
        )
        again = world.step(before, actions[:, step])
        assert all(torch.equal(a, b) for a, b in zip(again, after, strict=True))
        assert torch.equal(simulation.drawn(states)[:, step], world.render(before))
    some = torch.tensor([250, 3])
    apart, acted = simulation.windows(some)
    assert torch.equal(apart.position, states.position[some])
    assert torch.equal(acted, actions[some])


def test_probes_and_the_monitor_see_no_episode_of_the_training():
    settings = made()
    source = sources.source(settings)
    train = set((torch.arange(10**4) + source.simulation.seed).tolist())
    held_out = set((torch.arange(10**4) + source.monitored.seed).tolist())
    evaluation = set(range(10**4))
    assert not train & held_out
    assert not train & evaluation
    fit, test = trajectories.labelled(settings, 20)
    assert len(fit.frames) == 16
    assert len(test.frames) == 4
    assert torch.equal(source.sample(20), torch.cat((fit.frames, test.frames)))
    world = TwoRooms(wall="random")
    state = source.monitored.windows(torch.arange(20))[0]
    facts = world.facts(type(state)(*(field[:, 0] for field in state)))
    for name, fact in facts.items():
        assert torch.equal(torch.cat((fit.facts[name], test.facts[name])), fact)


def test_a_fifth_of_the_stored_episodes_is_held_out(folder):
    whole = store.Shards(folder)
    settings = stored(folder)
    fit, test = trajectories.labelled(settings, 40)
    layouts = [
        {tuple(z) for z in torch.stack((p.facts["wall"], p.facts["door"]), 1).tolist()}
        for p in (fit, test)
    ]
    every = {
        (float(e.states["wall"][0]), float(e.states["door"][0]))
        for e in map(whole.episode, range(10))
    }
    assert len(layouts[1]) == 2
    assert layouts[0] | layouts[1] == every
    assert not layouts[0] & layouts[1]
    source = sources.source(settings)
    seen = torch.cat([frames for frames, _ in first(settings, 48 // 6)])
    assert len(source.windows) == 8 * 6
    held_out = {frame.numpy().tobytes() for frame in test.frames}
    assert not held_out & {frame.numpy().tobytes() for frame in seen.flatten(0, 1)}
    frames, actions = source.windows.batch([7])
    episode = source.part.episode(1)
    assert np.array_equal(frames[0], episode.frames[1:5])
    assert np.array_equal(actions[0], episode.actions[1:4])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.world=Rooms"], r"data\.world: got 'Rooms', takes TwoRooms or Maze"),
        (["data.settings={walls: 1}"], r"data\.settings\.walls: is no setting of TwoRooms"),
        (["data.settings={wall: none}"], r"data\.settings\.wall: got 'none', takes fixed or"),
        (["data.policy=fly"], r"data\.policy: got 'fly', takes walk, uniform"),
        (["data.size=64"], r"data\.size: got 64, takes the frames' 65 x 65 pixels"),
        (["data.actions=3"], r"data\.actions: got 3, takes the actions' 2"),
    ],
)
def test_what_does_not_fit_the_world_is_named(words, message):
    with pytest.raises(ValueError, match=message):
        sources.source(made(*words))


def test_one_stored_episode_cannot_be_split(tmp_path):
    collect("TwoRooms", tmp_path / "one", count=1, length=8, seed=0)
    with pytest.raises(ValueError, match=r"data\.path: .* holds one episode, takes at least 2"):
        sources.source(stored(tmp_path / "one"))
