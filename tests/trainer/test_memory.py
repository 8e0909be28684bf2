"""The memory of a world model: what is remembered is found exactly, by embedding and by place, in
its own world, in later sessions too; what neither surprised nor was used goes when the space ends.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vicreg_jepa.memory import eviction
from vicreg_jepa.memory.memory import Memory
from vicreg_jepa.memory.reader import Reader
from vicreg_jepa.memory.rows import Format
from vicreg_jepa.memory.scan import Vectors
from vicreg_jepa.memory.writer import Writer
from vicreg_jepa.planning.control import Control
from vicreg_jepa.planning.model import TrueModel
from vicreg_jepa.planning.planners import CEM
from vicreg_jepa.worlds.two_rooms import TwoRooms

from tests.trainer.memory_processes import (
    AT_ONCE,
    FORMAT,
    QUERY,
    WORLDS,
    digest,
    drawn,
    filled,
)

SMALL = Format(model="a test", embedding=2, place=1, action=1, outcome=1)


def draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture
def store(tmp_path):
    with Writer(tmp_path / "store", FORMAT) as writer:
        yield writer


def small(writer: Writer, surprises: list[float]) -> np.ndarray:
    count = len(surprises)
    episodes = np.resize(writer.begin(["w"]), count)
    floats = np.ones((count, 1))
    return writer.write(
        episodes, np.arange(count), np.ones((count, 2)), floats, floats, floats, surprises
    )


CLOUDS = {
    "normal": lambda x: x,
    "far from zero": lambda x: 1e4 + 1e-3 * x,  # float32's formula has no digit left
    "all but equal": lambda x: np.round(x),
    "huge": lambda x: 1e20 * x,
    "tiny": lambda x: 1e-22 * x,
    "of many sizes": lambda x: x * 10.0 ** np.arange(-24, 24, 2)[: x.shape[1]],
}


class TestSearch:
    @pytest.mark.parametrize("cloud", CLOUDS)
    def test_it_is_exact(self, cloud):
        for size in (1, 7, 24):
            vectors = CLOUDS[cloud](draw().standard_normal((500, size))).astype(np.float32)
            queries = CLOUDS[cloud](draw(1).standard_normal((3, size))).astype(np.float32)
            queries[0] = vectors[77]
            its = Vectors(size, np.dtype(np.float32))
            for begin in range(0, 500, 123):
                part = np.arange(begin, min(500, begin + 123))
                its.add(part, part % 10, vectors[part])
            for k in (1, 9, 600):
                for query, (ids, squared) in zip(queries, its.search(queries, k), strict=True):
                    true = np.square(vectors.astype(np.float64) - query).sum(axis=1)
                    assert ids.tolist() == np.lexsort((np.arange(500), true))[:k].tolist()
                    assert (squared == true[ids]).all()

    def test_it_depends_on_the_vectors_alone(self):
        vectors = (1e3 + draw().standard_normal((300, 19))).astype(np.float32)
        grown, kept = Vectors(19, np.dtype(np.float32)), np.arange(300)[5::3]
        for id in range(300):
            grown.add(np.array([id]), np.array([0]), vectors[[id]])
        grown.remove(np.setdiff1d(np.arange(300), kept))
        once = Vectors(19, np.dtype(np.float32))
        once.add(kept, kept, vectors[kept])
        for (a, d), (b, e) in zip(*(v.search(vectors, 9) for v in (grown, once)), strict=True):
            assert a.tolist() == b.tolist()
            assert d.tobytes() == e.tobytes()

    def test_times_bound_it(self):
        its = Vectors(1, np.dtype(np.float64))
        its.add(np.arange(9), np.arange(9), np.arange(9.0)[:, None])
        ((ids, squared),) = its.search(np.zeros((1, 1)), 3, first=4, last=5)
        assert (ids.tolist(), squared.tolist()) == ([4, 5], [16.0, 25.0])
        assert not len(its.search(np.zeros((1, 1)), 3, first=10)[0][0])


BAD = {
    "episodes: got 77": {"episodes": [77]},
    "episodes: got float": {"episodes": [1.0]},
    "times: got shape": {"times": [0, 1]},
    "times: got -1": {"times": [-1]},
    "embeddings: got shape": {"embeddings": np.ones((1, 15))},
    "embeddings: got numbers that are not finite": {"embeddings": np.full((1, 16), np.nan)},
    "embeddings: got .* as float32": {"embeddings": np.full((1, 16), 1e39)},
    "places: got shape": {"places": np.ones((2, 2))},
    "actions: got <U1": {"actions": [["a", "b"]]},
    "outcomes: got shape": {"outcomes": np.ones(3)},
    "surprises: got -1": {"surprises": [-1.0]},
    "surprises: got numbers": {"surprises": [np.inf]},
    "surprises: got shape": {"surprises": [[1.0]]},
}


class TestStore:
    def test_what_is_written_is_read(self, store):
        filled(store, range(3))
        rows = store.rows()
        assert rows.id.tolist() == list(range(1, 3 * AT_ONCE + 1))
        for name, values in drawn(1).items():
            column = getattr(rows, name.removesuffix("s"))
            assert np.array_equal(column[AT_ONCE : 2 * AT_ONCE], values)
        assert set(rows.session) == {store.session}
        assert len(store) == len(rows)
        assert store.rows([5, 2]).id.tolist() == [5, 2]
        with pytest.raises(ValueError, match="ids: got 99"):
            store.rows([99])

    def test_the_same_bits_after_a_restart(self, tmp_path):
        path = tmp_path / "store"
        with Writer(path, FORMAT, most=64) as store:
            filled(store, range(40))  # some are evicted
            before = digest(store)
            with Reader(path) as reader:
                assert digest(reader) == before
        with Reader(path) as reader:
            assert digest(reader) == before
        with Writer(path, FORMAT, most=64) as store:
            assert digest(store) == before
            assert store.session == 2
            assert set(store.rows().session) == {1}

    def test_the_same_plan_after_a_restart(self, tmp_path):
        """The goal is the outcome of what was recalled."""
        world = TwoRooms()
        model = TrueModel(world)
        states = world.reset(torch.arange(8))
        latents = model.observe(states)
        sizes = Format("the true one", latents.shape[1], 2, 2, latents.shape[1])

        def plan(reader: Reader) -> torch.Tensor:
            found = reader.nearest(latents[:1], 2)[0].rows
            goal = torch.from_numpy(found.outcome[-1:])
            planner = CEM(horizon=4, candidates=16, iterations=2, elites=4)
            control = Control(model, planner, torch.tensor([3]), goal, near=2.0)
            return torch.stack([control.action(step, lambda: latents[:1]) for step in range(10)])

        with Writer(tmp_path / "store", sizes) as store:
            episodes = store.begin(["rooms"] * 8)
            places = states.position
            store.write(episodes, [0] * 8, latents, places, places, latents.flip(0), [0.0] * 8)
            before = plan(store)
        with Reader(tmp_path / "store") as reader:
            assert torch.equal(plan(reader), before)

    def test_readers_follow_the_writer(self, store):
        with Reader(store.path) as reader:
            assert (len(reader), reader.worlds()) == (0, [])
            assert len(reader.nearest(QUERY, 3)[0].rows) == 0
            assert len(reader.around(QUERY[:, :2], 3, "first")[1].rows) == 0
            for number in range(3):
                filled(store, range(number, number + 1))
                assert len(reader.nearest(QUERY, 99)[0].rows) == AT_ONCE * (number + 1)
                assert digest(reader) == digest(store)
            assert reader.worlds() == list(WORLDS)

    def test_places_that_are_not_known_are_not_near(self, store):
        values = drawn(0)
        episodes = np.resize(store.begin(WORLDS), AT_ONCE)
        store.write(episodes, [0] * AT_ONCE, **values)
        store.write(episodes, [1] * AT_ONCE, **(values | {"places": None}))
        assert np.isnan(store.rows().place[AT_ONCE:]).all()
        found = store.around(values["places"][:1], 9, "first")[0]
        assert set(found.rows.time) == {0}
        assert found.distance[0] == 0
        assert len(store.around(values["places"][:1], 9, "first", first=1)[0].rows) == 0

    def test_tensors_of_any_float_are_taken(self, store):
        episodes, ones = store.begin(["w"]), torch.ones(1, 16, dtype=torch.bfloat16)
        half = torch.full((1, 2), 0.5, dtype=torch.float64, requires_grad=True)
        store.write(episodes, [0], ones, half, half.half(), ones[:, :3], torch.tensor([2.0]))
        rows = store.rows()
        assert (rows.embedding.dtype, rows.place.dtype) == (np.float32, np.float64)
        assert (rows.embedding == 1).all()
        assert (rows.place == 0.5).all()
        assert rows.surprise.tolist() == [2.0]

    @pytest.mark.parametrize("words", BAD)
    def test_bad_rows_are_named_and_leave_none(self, words, store):
        episodes = store.begin(["w"])
        good = {"episodes": episodes, "times": [0], **drawn(0, 1)}
        with pytest.raises(ValueError, match=f"^{words}"):
            store.write(**(good | BAD[words]))
        assert len(store) == 0
        store.write(**good)
        assert len(store) == 1

    def test_bad_calls_are_named(self, store, tmp_path):
        for words, call in {
            "queries: got shape": lambda: store.nearest(QUERY[0], 1),
            "k: got 0": lambda: store.nearest(QUERY, 0),
            "world: got ''": lambda: store.nearest(QUERY, 1, ""),
            "places: got shape": lambda: store.around(QUERY, 1, "first"),
            "last: got 2": lambda: store.around(QUERY[:, :2], 1, "first", 3, 2),
            "worlds: got 'ab', takes a list": lambda: store.begin("ab"),
            "worlds: got 3": lambda: store.begin(["a", 3]),
            "worlds: got <generator": lambda: store.begin(w for w in ["a", "b"]),
            "worlds: got None": lambda: Memory(store, None),
            "k: got True": lambda: store.nearest(QUERY, True),
            r"embeddings: got \[tensor": lambda: store.write(
                [1], [0], [torch.ones(16, requires_grad=True)], None, [[0, 0]], [[0] * 3], [0]
            ),
            "model: got ''": lambda: Format("", 2, 0, 0, 0),
            "embedding: got 0": lambda: Format("m", 0, 0, 0, 0),
            "most: got 15": lambda: Writer(tmp_path / "new", FORMAT, most=15),
            "format: got str": lambda: Writer(tmp_path / "new", "m"),
            "ids: got -1": lambda: store.used([-1]),
            "store: got Reader": lambda: Memory(Reader(store.path), ["w"]),
        }.items():
            with pytest.raises(ValueError, match=f"^{words}"):
                call()
        assert not (tmp_path / "new").exists()

    def test_another_model_or_size_is_refused(self, store, tmp_path):
        store.close()
        for other in (Format("another", 16, 2, 2, 3), Format("a test", 16, 2, 2, 4)):
            with pytest.raises(ValueError, match=r"^format: got Format.*has Format"):
                Writer(store.path, other)
        Writer(store.path, FORMAT).close()  # the lock is free again

    def test_numbers_of_numpy_and_far_places(self, store):
        filled(store, range(1))
        (one,) = store.nearest(QUERY[:1], np.int64(1))
        assert len(one.rows) == 1
        with np.errstate(all="raise"):
            assert store.around([[1e200, 0.0]], 1, "first")[0].distance[0] == np.inf


class TestEviction:
    def test_the_rule(self):
        ids, surprise = np.arange(1, 9), np.array([5.0, 0, 9, 0, 1, 0, 2, 7])
        uses = np.array([0, 3, 0, 0, 0, 0, 1, 0])
        value = eviction.worth(surprise, uses)
        assert value.tolist() == [5 / 8, 7 / 8, 7 / 8, 0, 3 / 8, 0, 10 / 8, 6 / 8]
        assert not len(eviction.evicted(ids, surprise, uses, most=8))
        many = np.arange(1, 41)
        gone = eviction.evicted(many, np.zeros(40), np.zeros(40, np.int64), most=32)
        assert gone.tolist() == list(range(1, 11))  # 8 too many and 2 of room, the oldest
        gone = eviction.evicted(many, np.arange(40.0)[::-1].copy(), np.zeros(40, int), most=32)
        assert gone.tolist() == list(range(23, 33))  # the youngest 8 stay, surprising or not
        scaled = eviction.evicted(many, np.exp(-np.arange(40.0)), np.zeros(40, int), most=32)
        assert scaled.tolist() == gone.tolist()  # the scale of the surprise does not matter

    def test_the_bound_holds_and_what_matters_stays(self, tmp_path):
        with Writer(tmp_path / "store", SMALL, most=64) as store, Reader(store.path) as reader:
            surprising = small(store, [100.0] * 4)
            used = small(store, [0.0] * 4)
            store.used(used)
            for round in range(60):
                young = small(store, draw(round).random(5).tolist())
                assert len(reader) <= 64
                here = reader.nearest(np.ones((1, 2)), 100)[0].rows.id
                assert {*surprising, *used, *young} <= set(here)
                assert len(here) == len(reader)
            assert store.rows().uses.sum() == 4
            assert len(reader) > 55
            with pytest.raises(ValueError, match="episodes: got 17 rows, takes at most 16"):
                small(store, [0.0] * 17)

    def test_a_smaller_bound_holds_from_the_next_row_on(self, tmp_path):
        with Writer(tmp_path / "store", SMALL, most=400) as store:
            small(store, [0.0] * 100)
        with Writer(tmp_path / "store", SMALL, most=16) as store:
            assert len(store) == 100
            small(store, [0.0])
            assert len(store) == 15

    def test_episodes_of_former_sessions_go_with_their_rows(self, tmp_path):
        for _ in range(3):
            with Writer(tmp_path / "store", SMALL, most=16) as store:
                for _ in range(10):
                    small(store, [0.0] * 4)
                query = "SELECT count(DISTINCT session) FROM episodes"
                assert store._number(query) == 1

    def test_an_episode_of_this_session_outlives_its_rows(self, tmp_path):
        with Writer(tmp_path / "store", SMALL, most=16) as store:
            (episode,) = store.begin(["w"])
            floats = np.ones((1, 1))
            row = [np.ones((1, 2)), floats, floats, floats, [0.0]]
            store.write([episode], [0], *row)
            for _ in range(10):
                small(store, [1.0] * 4)
            assert episode not in store.rows().episode
            store.write([episode], [1], *row)
            assert episode in store.rows().episode

    def test_an_id_is_never_used_twice(self, tmp_path):
        with Writer(tmp_path / "store", SMALL) as store:
            small(store, [0.0] * 3)
            store._connection.execute("DELETE FROM rows")
        with Writer(tmp_path / "store", SMALL) as store:
            assert small(store, [0.0]).tolist() == [4]


class TestMemory:
    def step(self, memory: Memory, time: int, **others) -> np.ndarray:
        count = len(memory.worlds)
        values = {name: torch.as_tensor(value) for name, value in drawn(time, count).items()}
        return memory.remember(time, **(values | others))

    def test_a_second_visit_finds_the_first(self, tmp_path):
        for visit in range(2):
            with Writer(tmp_path / "store", FORMAT) as store:
                memory = Memory(store, ["maze 1", "maze 2", "maze 1"])
                for time in range(3):
                    self.step(memory, 10 * visit + time)
                queries = torch.as_tensor(drawn(1, 3)["embeddings"])
                found = memory.recall(queries, 1)
                if visit:
                    assert [int(one.rows.time[0]) for one in found] == [1, 1, 1]
                    assert [one.distance[0] for one in found] == [0, 0, 0]
                    assert {int(one.rows.session[0]) for one in found} == {1}
                    memory.used(found)
                    assert store.rows().uses.tolist() == [0, 0, 0, 1, 1, 1] + [0] * 12
        with Reader(tmp_path / "store") as reader:
            assert reader.rows().episode.reshape(6, 3).tolist() == 3 * [[1, 2, 3]] + 3 * [[4, 5, 6]]

    def test_a_world_recalls_its_own_rows(self, store):
        memory = Memory(store, ["a", "b", "a", "c"])
        self.step(memory, 0, active=torch.tensor([True, True, False, False]))
        queries = drawn(0, 4)["embeddings"]
        own = memory.recall(queries, 5)
        assert [one.rows.world.tolist() for one in own] == [["a"], ["b"], ["a"], []]
        every = memory.recall(queries, 5, everywhere=True)
        assert [len(one.rows) for one in every] == [2, 2, 2, 2]
        places = drawn(0, 4)["places"]
        near = memory.recall_around(places, 5)
        assert [one.rows.world.tolist() for one in near] == [["a"], ["b"], ["a"], []]
        assert len(memory.recall_around(places, 5, first=1)[0].rows) == 0

    def test_a_place_may_be_unknown_and_episodes_end_apart(self, store):
        memory = Memory(store, ["a", "b"])
        assert len(self.step(memory, 0, places=None)) == 2
        assert len(self.step(memory, 1, active=np.array([False, True]))) == 1
        assert len(self.step(memory, 2, active=np.array([False, False]))) == 0
        assert store.rows().world.tolist() == ["a", "b", "b"]

    def test_bad_input_is_named(self, store):
        memory = Memory(store, ["a", "b"])
        for words, others in {
            "active: got int64": {"active": [1, 0]},
            "active: got shape": {"active": [True]},
            "surprises: got shape": {"surprises": [1.0]},
            "embeddings: got shape": {"embeddings": np.ones((3, 16))},
            "actions: got shape": {"actions": np.ones((2, 5))},
        }.items():
            with pytest.raises(ValueError, match=f"^{words}"):
                self.step(memory, 0, **others)
        with pytest.raises(ValueError, match=r"^queries: got shape"):
            memory.recall(np.ones((1, 16)), 1)
        with pytest.raises(ValueError, match=r"^time: got -1"):
            memory.remember(-1, *drawn(0, 2).values())
