"""Windows of trajectories: simulated anew for every step, or from a folder of shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_jepa.config import Config
from vicreg_jepa.data.batches import Plan, Steps, Stream, loader, seed_for
from vicreg_jepa.distributed.ranks import Share
from vicreg_jepa.worlds import draws, store
from vicreg_jepa.worlds.episodes import STEPPED, Episode, rollout, stacked
from vicreg_jepa.worlds.named import named
from vicreg_jepa.worlds.policies import POLICIES
from vicreg_jepa.worlds.world import ACTIONS, CHANNELS, State, World

HELD_OUT = 0.2  # the share of stored episodes that probes are tested on
FRAMES_OF_EPISODE = 4  # of a stored episode, for probes

Batch = tuple[Tensor, Tensor]  # frames uint8 [B, T + 1, H, W, C], actions float32 [B, T, A]


class Labelled(NamedTuple):
    """Frames uint8 [N, H, W, C] and the true state at each by name, [N, ...]."""

    frames: Tensor
    facts: dict[str, Tensor]


class Simulation:
    """Windows by number, each of an episode of its own: window n of a seed is always the same.

    A window of `window` actions begins at a random step of an episode of `length` actions. seed: of
    63 bits, from which the episodes' seeds count up.
    """

    def __init__(self, world: World, policy: str, seed: int, length: int, window: int) -> None:
        self.world, self.policy, self.seed = world, POLICIES[policy], seed >> 1
        self.length, self.window = length, window

    def windows(self, numbers: Tensor) -> tuple[State, Tensor]:
        """The states [N, T + 1, ...] and the actions [N, T, A] of the windows [N]."""
        seeds = numbers + self.seed
        u = draws.uniform(seeds, draws.Stream.WINDOW, 0, 1)[:, 0]
        start = draws.integers(u, 0, self.length - self.window)
        last = int(start.max()) + self.window
        states, actions = rollout(self.world, self.policy, self.world.reset(seeds), last)
        rows = torch.arange(len(numbers))[:, None]
        step = start[:, None] + torch.arange(self.window + 1)
        return stacked(states).rows((rows, step)), torch.stack(actions, dim=1)[rows, step[:, :-1]]

    def drawn(self, states: State) -> Tensor:
        """The frames uint8 [N, T + 1, H, W, C] of states [N, T + 1, ...]."""
        flat = State(*(field.flatten(0, 1) for field in states))
        return self.world.render(flat).unflatten(0, states.seed.shape)


class _SimulatedSteps:
    """This rank's windows of each step. Several steps are simulated at once, which is faster; the
    frames are drawn step by step.
    """

    def __init__(self, simulation: Simulation, batch: int, share: Share) -> None:
        self.simulation, self.batch, self.share = simulation, batch, share
        self.together = max(1, STEPPED * share.ranks // batch)  # steps
        self.first, self.block = -1, (State(*(torch.empty(0),) * 5), torch.empty(0))

    def __getitem__(self, step: int) -> Batch:
        first = step - step % self.together
        if first != self.first:
            steps = range(first, first + self.together)
            mine = [self.share.of(range(s * self.batch, (s + 1) * self.batch)) for s in steps]
            self.block = self.simulation.windows(torch.tensor([n for rows in mine for n in rows]))
            self.first = first
        size = self.batch // self.share.ranks
        rows = slice((step - first) * size, (step - first + 1) * size)
        states, actions = self.block
        return self.simulation.drawn(states.rows(rows)), actions[rows]


class SimulatedSource:
    """Batches of windows of a world that is simulated for every step; no window comes again."""

    channels = CHANNELS

    def __init__(
        self, simulation: Simulation, monitored: Simulation, batch: int, workers: int
    ) -> None:
        self.simulation, self.monitored = simulation, monitored
        self.batch, self.workers = batch, workers

    def batches(self, start: int, share: Share) -> Iterator[Batch]:
        """The batches from step `start` on, without end."""
        steps = _SimulatedSteps(self.simulation, self.batch, share)
        return loader(steps, count(start), self.workers)

    def sample(self, most: int) -> Tensor:
        """`most` frames uint8 [N, H, W, C], of episodes that are in no batch."""
        states, _ = self.monitored.windows(torch.arange(most))
        return self.monitored.drawn(states)[:, 0]


class _Part(store.Trajectories):
    """Some of the episodes of a store."""

    def __init__(self, whole: store.Trajectories, rows: Sequence[int]) -> None:
        self.whole, self.chosen, self.settings = whole, rows, whole.settings
        self.lengths = [whole.lengths[row] for row in rows]

    def episode(self, number: int) -> Episode:
        return self.whole.episode(self.chosen[number])


class _StoredSteps:
    def __init__(self, windows: store.Windows) -> None:
        self.windows = windows

    def __getitem__(self, rows: list[int]) -> Batch:
        return self.windows.batch(rows)


class StoredSource:
    """Batches of windows of stored episodes; every epoch takes each window once."""

    def __init__(
        self, part: store.Trajectories, window: int, batch: int, seed: int, workers: int
    ) -> None:
        self.part, self.workers = part, workers
        with _renamed({"length": "data.window"}):
            self.windows = part.windows(window)
        self.plan = Plan(len(self.windows), batch, seed)
        self.channels = part.episode(0).frames.shape[-1]

    def batches(self, start: int, share: Share) -> Iterator[Batch]:
        """The batches from step `start` on, without end."""
        steps = Steps(self.plan, start, share)
        return loader(_StoredSteps(self.windows), steps, self.workers)

    def sample(self, most: int) -> Tensor:
        """At most `most` frames uint8 [N, H, W, C], spread evenly over the windows."""
        rows = torch.linspace(0, len(self.windows) - 1, min(most, len(self.windows))).long()
        return self.windows.batch(rows.numpy())[0][:, 0]


def source(settings: Config) -> SimulatedSource | StoredSource:
    """The windows that a run trains on. Raises ValueError that names the setting."""
    data, batch, workers = settings.data, settings.training.batch, settings.data.workers
    if data.kind == "world":
        monitored = _simulation(settings, Stream.HELD_OUT, 1)
        simulation = _simulation(settings, Stream.EPISODE, data.window)
        return SimulatedSource(simulation, monitored, batch, workers)
    train, _ = _parts(settings)
    return StoredSource(train, data.window, batch, settings.seed, workers)


def labelled(settings: Config, most: int) -> tuple[Labelled, Labelled]:
    """(to fit probes to, to test them on): frames of different episodes, at most `most` in all and
    a fifth of them for the test.

    Neither part is of the training, if it is simulated; stored episodes of the training are in the
    part to fit to.
    """
    held_out = round(HELD_OUT * most)
    if settings.data.kind == "world":
        simulation = _simulation(settings, Stream.HELD_OUT, 1)
        states, _ = simulation.windows(torch.arange(most))
        frames, first = simulation.drawn(states)[:, 0], State(*(field[:, 0] for field in states))
        facts = simulation.world.facts(first)
        cut = most - held_out
        parts = (slice(cut), slice(cut, None))
        some = [Labelled(frames[p], {k: z[p] for k, z in facts.items()}) for p in parts]
        return some[0], some[1]
    train, test = _parts(settings)
    return _frames(train, most - held_out), _frames(test, held_out)


def world_of(settings: Config) -> World:
    """The world of a run. Raises ValueError if it is not trained on one, or its settings are
    wrong.
    """
    data = settings.data
    if not settings.is_of_trajectories or data.kind != "world":
        raise ValueError(
            f"run: got method {settings.method} on data.kind {data.kind!r}, takes a run with "
            "data.kind 'world'"
        )
    keys = {"world": "data.world"} | {name: f"data.settings.{name}" for name in data.settings}
    with _renamed(keys):
        return named(data.world, **data.settings)


@contextmanager
def _renamed(keys: dict[str, str]) -> Iterator[None]:
    """Inside, an error that begins with an argument's name begins with that of the setting."""
    try:
        yield
    except ValueError as error:
        name, _, text = str(error).partition(":")
        if name not in keys:
            raise
        raise ValueError(f"{keys[name]}:{text}") from error


def _shards(path: Path) -> store.Shards:
    with _renamed({"folder": "data.path"}):
        return store.Shards(path)


def collected(settings: Config) -> dict[str, Any]:
    """Return the origin of a run's trajectories, as `collect` wrote it: the world and its settings.
    Raises ValueError if the run used other data, or the folder is gone.
    """
    data = settings.data
    if not settings.is_of_trajectories or data.kind != "trajectories" or data.path is None:
        raise ValueError(
            f"run: got method {settings.method} on data.kind {data.kind!r}, takes a run on a "
            "world, or on collected trajectories"
        )
    described = dict(_shards(data.path).settings)
    return {name: described[name] for name in sorted(described) if name not in ("policy", "seed")}


def _simulation(settings: Config, stream: Stream, window: int) -> Simulation:
    data, world = settings.data, world_of(settings)
    if data.policy not in POLICIES:
        raise ValueError(f"data.policy: got {data.policy!r}, takes {', '.join(POLICIES)}")
    _fits(settings, (world.size, world.size), ACTIONS)
    seed = seed_for(stream, settings.seed)
    return Simulation(world, data.policy, seed, data.length, window)


def _parts(settings: Config) -> tuple[_Part, _Part]:
    """The stored episodes of the training, and those held out, chosen by the seed."""
    assert settings.data.path is not None
    whole = _shards(settings.data.path)
    if len(whole) < 2:
        raise ValueError(
            f"data.path: {settings.data.path} holds one episode, takes at least 2 (one to test on)"
        )
    first = whole.episode(0)
    _fits(settings, first.frames.shape[1:3], first.actions.shape[1])
    generator = torch.Generator().manual_seed(seed_for(Stream.HELD_OUT, settings.seed))
    order = torch.randperm(len(whole), generator=generator).tolist()
    held_out = max(1, round(HELD_OUT * len(whole)))
    return _Part(whole, sorted(order[held_out:])), _Part(whole, sorted(order[:held_out]))


def _fits(settings: Config, extent: tuple[int, ...], actions: int) -> None:
    data = settings.data
    if extent != (data.size, data.size):
        raise ValueError(
            f"data.size: got {data.size}, takes the frames' {extent[0]} x {extent[1]} pixels"
        )
    if actions != data.actions:
        raise ValueError(f"data.actions: got {data.actions}, takes the actions' {actions}")


def _frames(part: store.Trajectories, most: int) -> Labelled:
    """Frames spread evenly over episodes, and over the steps of each."""
    chosen = torch.linspace(0, len(part) - 1, min(len(part), -(-most // FRAMES_OF_EPISODE))).long()
    frames, facts = [], []
    for number in chosen.tolist():
        episode = part.episode(number)
        rows = torch.linspace(0, len(episode.frames) - 1, FRAMES_OF_EPISODE).long().numpy()
        frames.append(torch.from_numpy(episode.frames[rows]))
        facts.append({k: torch.from_numpy(z[rows]) for k, z in episode.states.items()})
    names: dict[str, Any] = facts[0]
    return Labelled(
        torch.cat(frames), {name: torch.cat([one[name] for one in facts]) for name in names}
    )
