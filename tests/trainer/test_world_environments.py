"""The worlds as gymnasium's environments, and environments that others wrote.

gym-pusht, gymnasium-robotics and minari are not installed by `make setup`: their tests skip without
them.
"""

from __future__ import annotations

import warnings

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode
from vicreg_jepa import cli
from vicreg_jepa.worlds import (
    adapter,
    collect,
    environments,
    episodes,
    point_maze,
    policies,
    store,
)
from vicreg_jepa.worlds.named import named
from vicreg_jepa.worlds.two_rooms import TwoRooms

WORLDS = ("TwoRooms", "Maze", "MazeWindow")


@pytest.mark.parametrize("world", WORLDS)
def test_gymnasium_is_content(world):
    one = gymnasium.make(f"vicreg_jepa/{world}-v0", render_mode="rgb_array", noise=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(one.unwrapped)
    assert one.spec.max_episode_steps == 200
    one.reset(seed=0)
    assert one.render().shape == (*one.observation_space.shape[:2], 3)


@pytest.mark.parametrize("world", WORLDS)
def test_an_environment_is_the_world(world):
    one = gymnasium.make(f"vicreg_jepa/{world}-v0", max_episode_steps=4, noise=0.2)
    true = named(world, noise=0.2)
    state = true.reset(torch.tensor([11]))
    frame, info = one.reset(seed=11)
    assert np.array_equal(info["goal"], true.render(true.at(state, state.goal))[0].numpy())
    for time in range(4):
        assert np.array_equal(frame, true.render(state)[0].numpy())
        for name, value in true.facts(state).items():
            assert np.array_equal(info[name], value[0].numpy())
        assert info["distance"] == true.from_goal(state)[0]
        action = true.expert(state)
        info["position"][:] = 0  # what is given away is not the state
        frame, reward, terminated, truncated, info = one.step(action[0].numpy())
        state = true.step(state, action)
        assert (terminated, truncated) == (False, time == 3)
        assert reward == float(true.success(state)[0]) == float(info["success"])
    second, _ = one.reset()
    third, _ = one.reset()
    assert not np.array_equal(second, third)
    one.reset(seed=11)
    assert np.array_equal(one.reset()[0], second)


@pytest.mark.parametrize("world", WORLDS)
def test_a_vector_is_its_environments(world):
    name = f"vicreg_jepa/{world}-v0"
    many = gymnasium.make_vec(name, num_envs=3, max_episode_steps=5, noise=0.2)
    assert many.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    alone = [gymnasium.make(name, max_episode_steps=5, noise=0.2) for _ in range(3)]
    frames, info = many.reset(seed=20)
    assert many.observation_space.contains(frames)
    firsts = [one.reset(seed=20 + number) for number, one in enumerate(alone)]
    assert np.array_equal(frames, np.stack([frame for frame, _ in firsts]))
    assert np.array_equal(info["goal"], np.stack([its["goal"] for _, its in firsts]))
    many.action_space.seed(0)
    for time in range(5):
        actions = many.action_space.sample()
        frames, rewards, terminated, truncated, info = many.step(actions)
        singles = [one.step(action) for one, action in zip(alone, actions, strict=True)]
        assert np.array_equal(frames, np.stack([single[0] for single in singles]))
        assert rewards.tolist() == [single[1] for single in singles]
        assert not terminated.any()
        assert truncated.tolist() == [time == 4] * 3
        assert np.array_equal(info["position"], np.stack([s[4]["position"] for s in singles]))
        assert "goal" not in info
    last = info["position"]
    frames, rewards, _, truncated, info = many.step(actions)
    assert not truncated.any()
    assert rewards.tolist() == [0, 0, 0]
    assert info["_goal"].all()
    assert not np.array_equal(info["position"], last)
    assert many.step(actions)[3].tolist() == [False] * 3


def test_only_what_ended_begins_anew():
    many = gymnasium.make_vec("vicreg_jepa/TwoRooms-v0", num_envs=2, max_episode_steps=3)
    many.reset(seed=[4, None])
    many.state = many.state._replace(time=torch.tensor([2, 0]))
    still = np.zeros((2, 2), dtype=np.float32)
    assert many.step(still)[3].tolist() == [True, False]
    before = many.state.position.clone()
    _, _, _, _, info = many.step(still)
    assert info["_goal"].tolist() == [True, False]
    assert torch.equal(many.state.position[1], before[1])
    assert not torch.equal(many.state.position[0], before[0])
    assert many.state.time.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: environments.WorldEnv("Garden"), "world: got 'Garden'"),
        (lambda: environments.WorldEnv("Maze", cells=1), "cells: got 1"),
        (lambda: environments.WorldEnv("Maze", render_mode="human"), "render_mode: got 'human'"),
        (lambda: environments.WorldVectorEnv("Maze", num_envs=0), "num_envs: got 0"),
        (
            lambda: environments.WorldVectorEnv("Maze", max_episode_steps=0),
            "max_episode_steps: got 0",
        ),
        (lambda: environments.WorldVectorEnv("Maze", 3).reset(seed=[1]), "seed: got 1 seeds"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


# -------------------------------------------------------------------------- of others, by adapters


class Lamp(gymnasium.Env):
    """Its picture is as bright as its last action; it ends at the fourth step."""

    observation_space = spaces.Dict({"picture": spaces.Box(0, 255, (4, 4, 1), np.uint8)})
    action_space = spaces.Box(np.float32([0, -10]), np.float32([100, 10]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.given = 0, [np.float32([0, 0])]
        return {"picture": np.full((4, 4, 1), seed % 256, np.uint8)}, {}

    def step(self, action):
        self.time += 1
        self.given.append(action)
        picture = np.full((4, 4, 1), int(action[0]), np.uint8)
        return {"picture": picture}, 0.5, self.time == 4, False, {}


def test_any_environment_with_a_picture():
    lamp = adapter.Adapter(Lamp(), "picture", lambda seen, info: {"light": seen["picture"][0, 0]})
    played = list(lamp.play("walk", seed=1, episodes=2, length=9))
    assert [len(episode.actions) for episode in played] == [4, 4]
    for episode in played:
        assert episode.frames.shape == (5, 4, 4, 1)
        assert episode.frames[1:, 0, 0, 0].tolist() == [
            int(50 + 50 * action) for action in episode.actions[:, 0]
        ]
        assert np.array_equal(episode.states["light"], episode.frames[:, 0, 0])
        assert episode.record["rewards"] == [0.5] * 4
    again = list(lamp.play("walk", seed=1, episodes=1, length=9, first=1))
    assert np.array_equal(again[0].frames, played[1].frames)
    assert not np.array_equal(played[0].actions, played[1].actions)
    lamp.reset(0)
    lamp.step(np.float32([3, -3]))
    assert lamp.env.given[-1].tolist() == [100, -10]
    assert lamp.env.given[-1].dtype == np.float32


def test_frames_are_stacked_and_actions_held():
    lamp = adapter.Adapter(Lamp(), "picture", history=3, repeat=2)
    first = lamp.reset(7)
    assert first.frame.shape == (4, 4, 3)
    assert (first.frame == 7).all()
    seen = lamp.step(np.float32([-1, 0]))
    assert seen.frame[0, 0].tolist() == [7, 7, 0]
    assert (seen.reward, seen.ended, lamp.env.time) == (1.0, False, 2)
    seen = lamp.step(np.float32([1, 0]))
    assert seen.frame[0, 0].tolist() == [7, 0, 100]
    assert seen.ended  # at the fourth step
    assert (lamp.reset(9).frame == 9).all()
    lamp = adapter.Adapter(Lamp(), "picture", repeat=3)
    lamp.reset(0)
    lamp.step(np.float32([0, 0]))
    assert lamp.step(np.float32([0, 0])).reward == 0.5  # it ends within the hold
    (episode,) = adapter.Adapter(Lamp(), "picture", history=2, repeat=2).play("walk", 1, 1, 9)
    assert episode.frames.shape == (3, 4, 4, 2)
    assert np.array_equal(episode.frames[1:, ..., 0], episode.frames[:-1, ..., 1])


def test_a_task_is_what_the_info_says():
    rooms = collect.adapted("vicreg_jepa/TwoRooms-v0", {}, history=2, repeat=1)
    rooms.reset(3)
    state = TwoRooms().reset(torch.tensor([3]))
    goal = TwoRooms().render(TwoRooms().at(state, state.goal))[0].numpy()
    assert np.array_equal(rooms.goal(), np.concatenate([goal, goal], axis=2))
    assert not rooms.success()
    rooms.env.unwrapped.state = state._replace(position=state.goal)
    rooms.step(np.float32([0, 0]))
    assert rooms.success()


def test_collect_from_gymnasium(tmp_path, capsys):
    words = ["vicreg_jepa/TwoRooms-v0", "wall=random", "--episodes", "2", "--length", "5"]
    assert cli.main(["collect", *words, "--output", str(tmp_path / "rooms")]) == 0
    shards = store.Shards(tmp_path / "rooms")
    episode = shards.episode(1)
    state = TwoRooms(wall="random").reset(torch.tensor([episode.record["seed"]]))
    for action in torch.from_numpy(episode.actions):
        state = TwoRooms().step(state, action[None])
    assert np.array_equal(episode.frames[-1], TwoRooms().render(state)[0].numpy())
    for name, message in (
        ("CartPole-v1", "env: got actions Discrete(2)"),
        ("Pendulum-v1", "frame: got the observation Box"),
        ("NoSuch-v3", "world: 'NoSuch-v3' cannot be made"),
    ):
        assert cli.main(["collect", name, "--output", str(tmp_path / "none")]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adapter.Adapter(Lamp()), "frame: got the observation Dict"),
        (lambda: adapter.Adapter(Lamp(), "sound"), r"frame: got 'sound', takes one of \['picture'"),
        (lambda: adapter.Adapter(gymnasium.make("CartPole-v1")), "env: got actions Discrete"),
        (
            lambda: adapter.Adapter(Lamp(), lambda seen, info: np.zeros((4, 4))).reset(0),
            r"frame: got float64 \[4, 4\], takes uint8",
        ),
        (lambda: adapter.Adapter(Lamp(), "picture").step(np.zeros(3)), "action: got shape"),
        (lambda: adapter.Adapter(Lamp(), "picture", history=0), "history: got 0, takes an int"),
        (lambda: adapter.Adapter(Lamp(), "picture", repeat=0), "repeat: got 0, takes an integer"),
        (lambda: adapter.Adapter(Lamp(), "picture").goal(), "task: got None for"),
        (lambda: adapter.Adapter(Lamp(), "picture").success(), "task: got None for"),
        (
            lambda: adapter.Adapter(Lamp(), "picture", task=collect.TASK_OF_INFO).goal(),
            r"info: got \[\], takes 'goal' too",
        ),
        (
            lambda: collect.collect("Maze", "never", 1, 1, 0, history=2),
            "history: got 2, Maze takes 1",
        ),
        (
            lambda: adapter.Adapter(Lamp(), "picture").step(np.float32([np.nan, 0])),
            "action: got values that are not finite",
        ),
        (
            lambda: next(adapter.Adapter(Lamp(), "picture").play("expert", 0, 1, 1)),
            "policy: got 'expert', takes walk or uniform",
        ),
    ],
)
def test_what_does_not_fit_is_named(make, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make()


def test_pusht(tmp_path):
    pytest.importorskip("gym_pusht")
    words = ["gym_pusht:gym_pusht/PushT-v0", "obs_type=pixels", "--episodes", "2", "--length", "8"]
    assert cli.main(["collect", *words, "--output", str(tmp_path / "t")]) == 0
    episode = store.Shards(tmp_path / "t").episode(1)
    assert episode.frames.shape == (9, 96, 96, 3)
    assert (episode.frames[0] != episode.frames[8]).any()


def test_point_maze():
    pytest.importorskip("gymnasium_robotics")
    pytest.importorskip("mujoco")
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    maze = point_maze.point_maze(gymnasium.make("PointMaze_UMaze-v3"))
    (episode,) = maze.play("walk", seed=2, episodes=1, length=60)
    assert episode.frames.shape == (61, 64, 64, 2)
    dot = episode.frames[..., 0].astype(float)
    weight = dot / dot.sum((1, 2), keepdims=True)
    middle = np.arange(64) + 0.5
    x, y = (weight.sum(1) * middle).sum(1), (weight.sum(2) * middle).sum(1)
    drawn = np.stack([5 * x / 64 - 2.5, 2.5 - 5 * y / 64], axis=1)
    assert np.abs(drawn - episode.states["position"]).max() < 0.005
    # It has moved, and its middle was never on a wall.
    assert np.ptp(episode.states["position"], axis=0).max() > 0.2
    walls = episode.frames[0, ..., 1] > 0
    assert not walls[y.astype(int), x.astype(int)].any()
    # Its expert succeeds where the straight line does not.
    held = point_maze.point_maze(gymnasium.make("PointMaze_Medium-v3"), history=2, repeat=5)
    successes = {}
    for control in ("straight", "expert"):
        successes[control] = 0
        for seed in range(6):
            seen = held.reset(seed)
            while not seen.ended:
                seen = held.step(held.control(control))
            successes[control] += held.success()
    assert successes["expert"] == 6 > successes["straight"]


def test_the_way_through_a_map():
    rows = ["#####", "#..##", "##..#", "#...#", "#####"]
    walls = np.array([[cell == "#" for cell in row] for row in rows])
    nexts = point_maze.following(walls, (3, 1))
    assert nexts[1, 1] == (1, 2)
    assert nexts[1, 2] == (2, 2)
    assert nexts[2, 2] == (3, 2)
    assert nexts[2, 3] in ((2, 2), (3, 3))
    assert (3, 1) not in nexts
    assert len(nexts) == 6


def test_minari(tmp_path, monkeypatch):
    minari = pytest.importorskip("minari")
    pytest.importorskip("h5py")
    from minari.data_collector import EpisodeBuffer
    from vicreg_jepa.worlds.minari_data import MinariTrajectories

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    played = list(episodes.play(TwoRooms(), policies.walk, seed=0, episodes=3, length=6))
    picture = spaces.Box(0, 255, (65, 65, 2), np.uint8)
    for name, space in (("rooms/image-v0", picture), ("rooms/dict-v0", spaces.Dict(image=picture))):
        buffers = [
            EpisodeBuffer(
                id=number,
                observations=episode.frames if space is picture else {"image": episode.frames},
                actions=episode.actions,
                rewards=[0.0] * 6,
                terminations=[False] * 6,
                truncations=[False] * 5 + [True],
            )
            for number, episode in enumerate(played)
        ]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it wants an author, a licence and more
            minari.create_dataset_from_buffers(
                name,
                buffers,
                observation_space=space,
                action_space=spaces.Box(-1, 1, (2,), np.float32),
                jpeg_encoding=False,
            )
    for shards in (
        MinariTrajectories("rooms/image-v0"),
        MinariTrajectories("rooms/dict-v0", image="image"),
    ):
        assert list(shards.lengths) == [6, 6, 6]
        frames, actions = shards.windows(4).batch([8, 1])
        assert np.array_equal(frames[0].numpy(), played[2].frames[2:7])
        assert np.array_equal(actions[1].numpy(), played[0].actions[1:5])
    with pytest.raises(ValueError, match=r"^name: got 'no/such-v0'"):
        MinariTrajectories("no/such-v0")
    with pytest.raises(ValueError, match=r"^image: got 'sound', but 'rooms/dict-v0' takes"):
        MinariTrajectories("rooms/dict-v0", image="sound").episode(0)
    with pytest.raises(ValueError, match=r"^image: 'rooms/dict-v0' has"):
        MinariTrajectories("rooms/dict-v0").episode(0)
