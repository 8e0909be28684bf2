"""Several places against the formulas by hand, a run that is resumed, and what a meeting decides;
where torchft is installed, also real meetings. The others are in one process, without a network.
"""

from __future__ import annotations

import copy
import sys
import threading
from pathlib import Path

import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.data import image_sets
from vicreg_jepa.data.batches import ImageSource
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.methods import build
from vicreg_jepa.places import agenda
from vicreg_jepa.places.agenda import NEW, Member, Standing
from vicreg_jepa.places.meetings import Meetings, Result
from vicreg_jepa.places.outer import Outer, Shared
from vicreg_jepa.places.place import Place
from vicreg_jepa.training import checkpoint
from vicreg_jepa.training.stopping import Stopped
from vicreg_jepa.training.trainer import Trainer

TINY = {
    "vicreg": ["training.batch=16", "model.dim=8", "model.expander=[8, 16]"],
    "ijepa": ["training.batch=8", "model.dim=16", "model.depth=1", "model.heads=1",
              "model.predictor_dim=16", "model.predictor_depth=1", "model.predictor_heads=1"],
}  # fmt: skip
MEETING = "places.meeting=localhost:29510"


class Room:
    """Meetings of so many places of one process, each in a thread of its own; no network."""

    def __init__(self, places: int, start: int = 1) -> None:
        self.barrier, self.start = threading.Barrier(places, timeout=60), start
        self.present: dict[str, tuple] = {}
        self.held = 0

    def door(self, name: str) -> Door:
        return Door(self, name)


class Door:
    def __init__(self, room: Room, name: str) -> None:
        self.room, self.name = room, name

    def close(self) -> None:
        pass

    def hold(self, standing, shared, contribution) -> Result:
        room = self.room
        room.present[self.name] = (standing, shared(), contribution())
        if room.barrier.wait() == 0:
            room.held += 1
        room.barrier.wait()
        planned = agenda.agenda([Member(n, "", p[0]) for n, p in room.present.items()], room.start)
        mean = None
        if planned.contributing:
            some = [room.present[m.name][2] for m in planned.contributing]
            mean = torch.stack(some).sum(dim=0) / len(some)
        joins = any(m.name == self.name for m in planned.joining)
        given = Shared(*(z.clone() for z in room.present[planned.source.name][1]))
        history = planned.source.standing.history
        if mean is not None or not history:
            history = f"meeting {room.held}"
        room.barrier.wait()
        return Result(planned, history, given if joins else None, mean, 0, 0)


def trainer(folder: Path, method: str, seed: int, words: list[str], door=None) -> Trainer:
    settings = config.load(f"{method}_digits", [*TINY[method], f"seed={seed}", *words])
    built = build.method(settings, 1).train()
    folder.mkdir(parents=True, exist_ok=True)
    place = Place(settings, built, folder, door) if door else None
    return Trainer(settings, built, Ranks(), folder, place)


def source(of: Trainer) -> ImageSource:
    return ImageSource(image_sets.digits(), of.config.training.batch, of.config.seed)


def together(*calls) -> None:
    """Call each in a thread; an error of any is raised."""
    errors = []

    def guarded(call) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def same(a: torch.nn.Module, b: torch.nn.Module, **tolerance) -> None:
    for (name, z), other in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
        torch.testing.assert_close(z, other, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


class TestOuterStep:
    @pytest.mark.parametrize("method", ["vicreg", "ijepa"])
    def test_two_places_are_the_formulas_by_hand(self, method, tmp_path):
        """Rounds of 3, 3 and 2 steps: pseudogradient, Nesterov's momentum, means of the rest."""
        steps, every, rate, momentum = 8, 3, 0.6, 0.8
        words = [MEETING, f"places.every={every}", f"places.rate={rate}", "training.steps=8",
                 f"places.momentum={momentum}", "places.start=2"]  # fmt: skip
        room = Room(2, start=2)
        two = [trainer(tmp_path / n, method, k, words, room.door(n)) for k, n in enumerate("ab")]
        hand = [trainer(tmp_path / n, method, k, words) for k, n in enumerate("xy")]
        assert not torch.equal(two[0].place.outer.anchor, two[1].place.outer.anchor)
        together(*(one._meet for one in two))  # the second takes the weights of the first
        hand[1].method.load_state_dict(hand[0].method.state_dict())

        learned = {n for n, p in hand[0].method.named_parameters() if p.requires_grad}
        w = copy.deepcopy(hand[0].method.state_dict())
        v = {n: torch.zeros_like(w[n]) for n in learned}
        batches = [source(one).batches(0, Ranks().share) for one in two]
        by_hand = [source(one).batches(0, Ranks().share) for one in hand]
        for end in (3, 6, 8):
            while two[0].step < end:
                for one, some in zip([*two, *hand], [*batches, *by_hand], strict=True):
                    one.take(next(some))
            assert all(one.place.due(end) for one in two)
            together(*(one._meet for one in two))
            ends = [one.method.state_dict() for one in hand]
            for name in w:
                if name in learned:
                    g = ((w[name] - ends[0][name]) + (w[name] - ends[1][name])) / 2
                    v[name] = momentum * v[name] + g
                    w[name] = w[name] - rate * (g + momentum * v[name])
                elif w[name].is_floating_point():
                    w[name] = (ends[0][name] + ends[1][name]) / 2
                else:
                    w[name] = ends[0][name].clone()
            hand[0].method.load_state_dict(w)
            same(two[0].method, hand[0].method, rtol=1e-6, atol=1e-7)
            same(two[0].method, two[1].method, rtol=0, atol=0)
            # The gradient of a key's bias is rounding alone, and AdamW makes whole steps of it: the
            # next round begins with the same bits.
            w = copy.deepcopy(two[0].method.state_dict())
            for one in hand:
                one.method.load_state_dict(w)
        assert two[0].place.finished
        assert steps == two[0].step

    def test_a_rate_of_one_without_momentum_is_the_mean_of_the_weights(self):
        methods = [torch.nn.Linear(3, 2) for _ in range(2)]
        outers = [Outer(m, 1.0, 0.0) for m in methods]
        outers[1].adopt(outers[0].shared())
        for k, m in enumerate(methods):
            with torch.no_grad():
                m.weight += k + 1.0
        mean = (methods[0].weight + methods[1].weight).detach() / 2
        gathered = (outers[0].contribution() + outers[1].contribution()) / 2
        outers[0].step(gathered)
        torch.testing.assert_close(methods[0].weight.detach(), mean)

    def test_counters_and_running_statistics(self):
        """A place that joins takes the counters; later each keeps its own."""
        norms = [torch.nn.BatchNorm1d(2) for _ in range(2)]
        norms[0](torch.randn(8, 2) + 3)
        outers = [Outer(m, 0.7, 0.9) for m in norms]
        outers[1].adopt(outers[0].shared())
        assert norms[1].num_batches_tracked == 1
        torch.testing.assert_close(norms[1].running_mean, norms[0].running_mean)
        norms[1](torch.randn(8, 2) - 3)
        mean = (norms[0].running_mean + norms[1].running_mean) / 2
        gathered = (outers[0].contribution() + outers[1].contribution()) / 2
        for outer in outers:
            outer.step(gathered.clone())
        torch.testing.assert_close(norms[0].running_mean, mean)
        assert [int(m.num_batches_tracked) for m in norms] == [1, 2]

    def test_other_floating_point_types_are_refused(self):
        with pytest.raises(ValueError, match=r"places: weight is torch.float64"):
            Outer(torch.nn.Linear(2, 2).double(), 0.7, 0.9)


class TestRun:
    WORDS = [MEETING, "places.every=4", "training.steps=10", "training.save_every=5"]  # noqa: RUF012

    def test_a_resumed_place_is_the_same(self, tmp_path):
        """Stopped within a round and at its end, before the meeting; bit for bit."""
        whole = trainer(tmp_path / "whole", "ijepa", 3, self.WORDS, Room(1).door("a"))
        whole.fit(source(whole), lambda *_: None)
        assert whole.step == 10
        # Its last checkpoint is of the shared weights, after the last meeting.
        tensors, _, state = checkpoint.load(tmp_path / "whole" / "checkpoints" / "step_00000010")
        assert state["places"]["round"] == 3
        assert torch.equal(tensors["places.anchor"], whole.place.outer.anchor)
        for stop in (6, 8, 10):
            folder = tmp_path / f"stopped_{stop}"
            one = trainer(folder, "ijepa", 3, self.WORDS, Room(1).door("a"))

            def stopping(step, *_, stop=stop) -> None:
                if step == stop:
                    raise Stopped(15)

            with pytest.raises(Stopped):
                one.fit(source(one), stopping)
            two = trainer(folder, "ijepa", 3, self.WORDS, Room(1).door("a"))
            assert two.resume() == stop
            two.fit(source(two), lambda *_: None)
            same(two.method, whole.method, rtol=0, atol=0)
            tensors, _, state = checkpoint.load(folder / "checkpoints" / "step_00000010")
            assert state["places"]["round"] == 3
            assert torch.equal(tensors["places.anchor"], whole.place.outer.anchor)

    def test_a_place_that_comes_back_goes_on_with_the_others(self, tmp_path):
        """It takes the weights and the step of the one that is ahead, and adds nothing."""
        room = Room(2)
        ahead = trainer(tmp_path / "a", "vicreg", 1, self.WORDS, room.door("a"))
        ahead.place.round, ahead.place.history, ahead.step = 1, "x", 4
        some = source(ahead).batches(4, Ranks().share)
        while ahead.step < 8:
            ahead.take(next(some))
        back = trainer(tmp_path / "b", "vicreg", 2, self.WORDS, room.door("b"))
        alone = Outer(copy.deepcopy(ahead.method), 0.7, 0.9)
        alone.restore(ahead.place.outer.anchor, ahead.place.outer.velocity)
        alone.step(ahead.place.outer.contribution())
        together(ahead._meet, back._meet)
        assert (back.step, back.place.round, back.place.taken) == (8, 2, 0)
        same(back.method, ahead.method, rtol=0, atol=0)
        torch.testing.assert_close(ahead.place.outer.anchor, alone.anchor)

    def test_a_run_with_other_rounds_is_not_resumed(self, tmp_path):
        one = trainer(tmp_path, "vicreg", 0, self.WORDS, Room(1).door("a"))
        one.fit(source(one), lambda *_: None)
        for words in ([*self.WORDS, "places.rate=0.5"], self.WORDS[2:]):
            other = trainer(tmp_path, "vicreg", 0, words, Room(1).door("a"))
            with pytest.raises(checkpoint.CheckpointError, match="was written with places"):
                other.resume()
        moved = [MEETING.replace("localhost", "elsewhere"), *self.WORDS[1:], "places.start=2"]
        assert trainer(tmp_path, "vicreg", 0, moved, Room(1).door("a")).resume() == 10


def standing(round=1, history="h", taken=4, due=True, settings=None, data="d") -> Standing:
    return Standing(round, history, taken, due, settings or {"method": "a"}, data)


def planned(start: int = 1, **present: Standing) -> agenda.Agenda:
    return agenda.agenda([Member(n, "", s) for n, s in present.items()], start)


def names(members) -> list[str]:
    return [m.name for m in members]


class TestAgenda:
    def test_all_are_due(self):
        made = planned(b=standing(), a=standing())
        assert names(made.contributing) == ["a", "b"]
        assert not made.joining
        assert made.round == 2

    def test_a_new_run_waits_and_begins_with_the_weights_of_the_first(self):
        new = standing(NEW, "", 0, False)
        assert planned(3, a=new, b=new).waits
        made = planned(2, b=new, a=new)
        assert not made.waits
        assert names(made.joining) == ["b"]
        assert not made.contributing
        assert made.round == 0

    def test_the_most_rounds_count_and_the_others_add_nothing(self):
        late, new = standing(1), standing(NEW, "", 0, False)
        made = planned(9, a=late, b=standing(2), c=new, d=standing(2))
        assert made.source.name == "b"
        assert names(made.joining) == ["a", "c"]
        assert names(made.contributing) == ["b", "d"]
        assert made.round == 3
        assert not made.waits  # the run has begun

    def test_the_same_round_of_another_history_joins(self):
        made = planned(a=standing(), b=standing(history="other"))
        assert names(made.joining) == ["b"]
        assert names(made.contributing) == ["a"]

    def test_nobody_is_due_when_all_resume(self):
        made = planned(a=standing(due=False), b=standing(due=False))
        assert not made.contributing
        assert made.round == 1
        # One that has resumed within the round adds its steps when another is due.
        made = planned(a=standing(due=False, taken=2), b=standing(), c=standing(due=False, taken=0))
        assert names(made.contributing) == ["a", "b"]

    def test_other_settings_are_refused_by_name(self):
        made = planned(a=standing(1), b=standing(2, settings={"method": "b"}))
        assert made.refused == {"a": "method: got a, takes that of the other places, b"}
        assert names(made.members) == ["b"]

    def test_the_same_data_and_seed(self):
        made = planned(a=standing(), b=standing(data="e"), c=standing())
        assert made.same_data("a") == ["c"]
        assert made.same_data("b") == []


class TestBadSettings:
    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["places.every=5"], "places.every: got 5, but it is used with places.meeting"),
            (["places.meeting=here"], "places.meeting: got 'here', takes host:port"),
            (["places.meeting=http://h:1"], "places.meeting: got 'http://h:1', takes host:port"),
            ([MEETING, "places.every=0"], "places.every: got 0"),
            ([MEETING, "places.momentum=1"], "places.momentum: got 1"),
            ([MEETING, "places.rate=0"], "places.rate: got 0"),
            ([MEETING, "places.rate=.inf"], "places.rate: got inf"),
            ([MEETING, "places.rounds=3"], "places.rounds: unknown key"),
            (
                [MEETING, "training.parallel=fsdp", "model.encoder=vit"],
                "training.parallel: got 'fsdp', takes 'ddp' with places.meeting",
            ),
        ],
    )
    def test_are_named(self, words, message):
        with pytest.raises(config.ConfigError, match=message):
            config.load("vicreg_digits", words)

    def test_torchft_is_missing(self, monkeypatch):
        for name in ("torchft", "torchft.coordination"):
            monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ImportError, match=r"pip install 'vicreg-kernels\[places\]'"):
            Meetings(config.load("vicreg_digits", [MEETING]).places, "a", print)
