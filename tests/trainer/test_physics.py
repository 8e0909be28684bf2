"""Physics videos: what is possible obeys physics, what is impossible is made of the same frames."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product

import numpy as np
import pytest
from PIL import Image
from vicreg_jepa.physics import PROPERTIES, contact_sheet, possible, quadruplet
from vicreg_jepa.physics.scene import COLOURS, SIZE
from vicreg_jepa.physics.videos import FAMILIES

SEEDS = range(160)


@pytest.fixture(scope="module")
def samples():
    return [possible(seed) for seed in SEEDS]


def outline(thing: dict, points: int = 5) -> np.ndarray:
    """[K, 2]: points on a thing's edge at angle 0, written anew from the documented sizes."""
    r = thing["radius"]
    if thing["shape"] == "ball":
        turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
        return r * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    degrees = {"box": (45, 135, 225, 315), "triangle": (30, 150, 270)}[thing["shape"]]
    reach = {"box": 0.9 * 2**0.5, "triangle": 1.4}[thing["shape"]] * r
    turns = np.radians(degrees)
    corners = reach * np.stack([np.cos(turns), np.sin(turns)], axis=1)
    share = np.linspace(0, 1, points, endpoint=False)[:, None]
    following = np.roll(corners, -1, axis=0)
    return np.concatenate([a + share * (b - a) for a, b in zip(corners, following, strict=True)])


def edges(record: dict, thing: int) -> np.ndarray:
    """[T, K, 2]: the points on a thing's edge in every frame."""
    local = outline(record["things"][thing])
    angle = np.array(record["angle"])[:, thing]
    turn = np.stack([np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)], axis=1)
    turned = np.einsum("tij,kj->tki", turn.reshape(-1, 2, 2), local)
    return turned + np.array(record["position"])[:, thing, None]


def depth_in(points: np.ndarray, corners: np.ndarray) -> np.ndarray:
    """How deep points [..., 2] lie in convex corners [..., K, 2]; negative outside."""
    following = np.roll(corners, -1, axis=-2)
    along = following - corners
    away = points[..., None, :] - corners
    cross = along[..., 0] * away[..., 1] - along[..., 1] * away[..., 0]
    x, y = np.moveaxis(corners, -1, 0)
    turn = np.sign((x * following[..., 1] - y * following[..., 0]).sum(-1))
    return (cross / np.linalg.norm(along, axis=-1) * turn[..., None]).min(axis=-1)


# Possible videos


def test_a_video_depends_on_its_seed_alone(samples):
    again = possible(3)
    assert np.array_equal(again.video, samples[3].video)
    assert json.dumps(again.record) == json.dumps(samples[3].record)
    assert len({sample.video.tobytes() for sample in samples}) == len(samples)
    assert all(s.video.shape == (32, 64, 64, 3) and s.video.dtype == np.uint8 for s in samples)


def test_nothing_is_inside_anything(samples):
    deepest = 0.0
    for record in (sample.record for sample in samples):
        for number in range(len(record["things"])):
            points = edges(record, number)
            assert points[..., 1].max() < record["floor"] + 0.5
            for block in record["blocks"]:
                deepest = max(deepest, depth_in(points, np.array(block["corners"])).max())
            for other in range(len(record["things"])):
                if other != number:
                    corners = edges(record, other)[:, None]
                    deepest = max(deepest, depth_in(points, corners).max())
    assert deepest < 0.6


def test_energy_does_not_grow(samples):
    for record in (sample.record for sample in samples):
        r = np.array([thing["radius"] for thing in record["things"]])
        shapes = [thing["shape"] for thing in record["things"]]
        if not shapes:
            continue
        area = {"ball": np.pi, "box": 1.8**2, "triangle": 0.75 * 3**0.5 * 1.4**2}
        inertia = {"ball": 1 / 2, "box": 1.8**2 / 6, "triangle": 1.4**2 / 4}
        mass = r**2 * [area[shape] for shape in shapes]
        moment = mass * r**2 * [inertia[shape] for shape in shapes]
        position, velocity, spin = (np.array(record[k]) for k in ("position", "velocity", "spin"))
        kinetic = (mass * (velocity**2).sum(2) + moment * spin**2) / 2
        energy = (kinetic + mass * record["gravity"] * (record["floor"] - position[..., 1])).sum(1)
        scale = (mass * record["gravity"] * 20).sum()  # to lift everything by 20 pixels
        assert np.diff(energy).max() < 0.01 * max(energy[0], scale)


def test_things_fall_freely_or_touch_something(samples):
    """Between contacts a thing that touches nothing is accelerated by gravity alone."""
    seen = 0
    for record in (sample.record for sample in samples):
        velocity = np.array(record["velocity"])
        for number in range(len(record["things"])):
            free = edges(record, number)[..., 1].max(1) < record["floor"] - 1
            met = {frame for frame, one, _ in record["contacts"] if one == number}
            first = min(met, default=32)
            for frame in range(1, min(first, 32)):
                if free[frame] and free[frame - 1]:
                    change = velocity[frame, number] - velocity[frame - 1, number]
                    np.testing.assert_allclose(change, [0, record["gravity"]], atol=2e-3)
                    seen += 1
    assert seen > 500


def test_things_stay_what_they_are_and_are_drawn_where_they_are(samples):
    """Every thing has its colour at its place in every frame in which nothing is before it."""
    for video, record in samples:
        for number, thing in enumerate(record["things"]):
            colour = np.array(COLOURS[thing["colour"]])
            points = edges(record, number)
            # Left of the centre in its own frame, away from a ball's spot.
            position, angle = (np.array(record[k])[:, number] for k in ("position", "angle"))
            at = position - 1.2 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
            x, y = np.floor(at).astype(int).T
            for frame in range(32):
                low, high = points[frame].min(0), points[frame].max(0)
                before = any(
                    high[0] > panel["left"] - 1 and low[0] < panel["right"] + 1
                    for panel in record["panels"]
                )
                if not before and low.min() >= 0 and high.max() <= SIZE:
                    pixel = video[frame, y[frame], x[frame]].astype(int)
                    assert np.abs(pixel - colour).max() <= 45, (record["seed"], frame, number)


def test_the_mixture_shows_every_property_kept(samples):
    families = Counter(sample.record["family"] for sample in samples)
    assert set(families) == {*FAMILIES, "staged"}
    assert 0.35 < families["staged"] / len(samples) < 0.65
    met: Counter = Counter()
    for record in (sample.record for sample in samples):
        kinds = {what if isinstance(what, str) else "thing" for _, _, what in record["contacts"]}
        met.update(kinds)
        points = [edges(record, n) for n in range(len(record["things"]))]
        for n, frames in enumerate(record["hidden"]):
            left = [f for f in range(max(frames, default=32), 32) if points[n][f, :, 0].min() > 0]
            met["hidden"] += bool(frames)
            met["comes out again"] += bool(frames) and min(frames) > 0 and len(left) > 1
    for what, least in {
        "floor": 120, "wall": 15, "shelf": 8, "ramp": 6, "pillar": 1, "thing": 20,
        "hidden": 30, "comes out again": 20,
    }.items():  # fmt: skip
        assert met[what] >= least, (what, met)


# Quadruplets


CASES = list(product(PROPERTIES, (False, True), range(3)))


@pytest.fixture(scope="module")
def quadruplets():
    return {case: quadruplet(case[0], case[2], behind_occluder=case[1]) for case in CASES}


def test_quadruplets_are_made_of_the_same_frames(quadruplets):
    for (name, hidden, _), quad in quadruplets.items():
        videos, first = quad.videos, quad.first_difference
        assert videos.shape == (4, 32, 64, 64, 3)
        assert videos.dtype == np.uint8
        assert quad.behind_occluder is hidden
        assert quad.possible.tolist() == [True, True, name == "control", name == "control"]
        for original, exchanged in ((0, 2), (1, 3)):
            assert np.array_equal(videos[original, :first], videos[exchanged, :first])
            assert not np.array_equal(videos[original, first], videos[exchanged, first])
        # From there on they go on as the other one does, whose picture a frame earlier is the
        # same one too, unless the exchange is a break that is seen.
        unseen = quad.record["same"] > 0
        for original, exchanged in ((1, 2), (0, 3)):
            start = first - unseen
            assert np.array_equal(videos[original, start:], videos[exchanged, start:])
        # At every frame both pairs show the same two pictures, each one once.
        for t in range(32):
            both = [sorted(videos[n, t].tobytes() for n in pair) for pair in ((0, 1), (2, 3))]
            assert both[0] == both[1]
        assert 3 <= first <= 29
        # All four differ by what a person sees.
        for a, b in ((0, 1), (0, 2), (0, 3)):
            far = np.maximum(videos[a], videos[b]) - np.minimum(videos[a], videos[b]) > 40
            assert (far.any(axis=-1).sum(axis=(1, 2)) >= 14).sum() >= 3


def test_the_exchange_is_hidden_or_in_view_as_said(quadruplets):
    for (name, hidden, _), quad in quadruplets.items():
        cut = quad.record["cut"]
        pictures = quad.videos[:2, cut - 1 : cut + 1]
        same = np.array_equal(pictures[0], pictures[1])
        # The control's exchange is when the one has left and the other has not come.
        assert same == (hidden or name == "control"), (name, hidden)
        if not hidden and name != "control":
            # Those who meet in one place part a frame later.
            assert 0 <= quad.first_difference - cut <= (name in ("gravity", "inertia"))
            for record in quad.record["possible"]:
                assert not record["panels"]
        else:
            # No run of so many frames is in the exchanged videos alone.
            length = quad.record["same"] + 1
            assert length >= 4
            runs = [
                {quad.videos[n, t : t + length].tobytes() for n in pair for t in range(33 - length)}
                for pair in ((0, 1), (2, 3))
            ]
            assert runs[0] == runs[1]
        if hidden:
            assert quad.first_difference > cut
            assert all(record["panels"] for record in quad.record["possible"])


def at_cut(quad, key: str, before: int = 0) -> np.ndarray:
    """[2, 2]: the exchanged thing's state in both possible videos."""
    records = quad.record["possible"]
    return np.array([record[key][quad.record["cut"] - before][-1] for record in records])


def things(quad) -> list[list[dict]]:
    return [record["things"] for record in quad.record["possible"]]


def one(quad, key: str) -> list:
    return [part[-1][key] for part in things(quad)]


@pytest.mark.parametrize("hidden", [False, True])
def test_each_exchange_breaks_its_property_alone(quadruplets, hidden):
    def of(name):
        return [quad for (p, h, _), quad in quadruplets.items() if (p, h) == (name, hidden)]

    def distance(quad):
        return np.linalg.norm(np.subtract(*at_cut(quad, "position")))

    for quad in of("permanence"):
        first, second = things(quad)
        assert first[:-1] == second
    for quad in of("shape"):
        assert len(set(one(quad, "shape"))) == 2
        assert len(set(one(quad, "colour"))) == 1
        assert distance(quad) < 3
    for quad in of("colour"):
        assert len(set(one(quad, "colour"))) == 2
        assert len(set(one(quad, "shape"))) == 1
        assert distance(quad) == 0
    for quad in of("continuity"):
        assert distance(quad) >= 16
        assert one(quad, "colour")[0] == one(quad, "colour")[1]
        np.testing.assert_allclose(*at_cut(quad, "velocity"), atol=0.1)
    for quad in of("inertia"):
        assert distance(quad) < 0.5
        first, second = at_cut(quad, "velocity")[:, 0]
        assert abs(first - second) > 1.2
        # The spot shows no break either.
        assert abs(np.subtract(*at_cut(quad, "angle")) % (2 * np.pi)) < 0.05
        # Nothing is there that could turn or stop it: no contact but with the floor.
        for record in quad.record["possible"]:
            assert {what for _, _, what in record["contacts"]} <= {"floor"}
    for quad in of("gravity"):
        blocks = [record["blocks"] for record in quad.record["possible"]]
        assert distance(quad) < 0.5
        if hidden:
            assert [[block["kind"] for block in some] for some in blocks] == [["pillar"], []]
        else:
            first, second = at_cut(quad, "velocity")[:, 1]
            assert first > 0.5
            assert second < -0.5
            assert not any(blocks)
    for quad in of("solidity"):
        barrier = np.array(quad.record["possible"][0]["blocks"][0]["corners"])
        axis = 0 if quad.record["possible"][0]["blocks"][0]["kind"] == "wall" else 1
        places = at_cut(quad, "position")[:, axis]
        assert min(places) < barrier[:, axis].min()
        assert max(places) > barrier[:, axis].max()
        for record in quad.record["possible"]:
            frames = [f for f, _, what in record["contacts"] if what in ("wall", "shelf")]
            assert abs(frames[0] - quad.record["cut"]) <= (8 if hidden else 1)
    for quad in of("control"):
        for record in quad.record["possible"]:
            cut = quad.record["cut"]
            left, right = (edges(record, n)[cut, :, 0] for n in (0, 1))
            assert left.max() < 0 or left.min() > SIZE
            assert right.max() < 0 or right.min() > SIZE or cut in record["hidden"][1]


def test_inertia_is_broken_in_each_way(quadruplets):
    """By turning round, the one against the other, and by stopping or starting."""
    ways = Counter(
        float(np.prod(np.round(at_cut(quad, "velocity")[:, 0], 2))) < 0
        for (name, _, _), quad in quadruplets.items()
        if name == "inertia"
    )
    assert min(ways[True], ways[False]) >= 1


def test_quadruplets_repeat_and_draw_what_is_not_said():
    first, second = quadruplet("colour", 5), quadruplet("colour", 5)
    assert np.array_equal(first.videos, second.videos)
    assert first.record == second.record
    drawn = Counter(quadruplet("gravity", seed).behind_occluder for seed in range(12))
    assert min(drawn[True], drawn[False]) >= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: possible(-1), "seed: got -1"),
        (lambda: quadruplet("magic", 0), "property: got 'magic', takes one of permanence"),
        (lambda: quadruplet("shape", -2), "seed: got -2"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sheets_are_drawn(tmp_path):
    contact_sheet.main(["--output", str(tmp_path), "--seed", "1"])
    for name in ("possible", "in_view", "behind_panels"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("L")))) > 50
