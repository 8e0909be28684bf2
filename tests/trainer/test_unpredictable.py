"""What nobody can predict: it changes every picture, tells nothing, and is not carried on."""

from __future__ import annotations

import numpy as np
import pytest
from vicreg_jepa import config
from vicreg_jepa.data import videos
from vicreg_jepa.physics import PROPERTIES, possible, quadruplet, shards
from vicreg_jepa.physics.unpredictable import LAYERS, Disturbance, of_quadruplet
from vicreg_jepa.surprise import physics_test

FRAMES = range(32)


@pytest.fixture(scope="module")
def clean():
    return possible(3).video


@pytest.fixture(scope="module")
def noisy():
    return {name: quadruplet(name, 1, noise=0.5) for name in ("permanence", "size", "control")}


def test_strength_zero_changes_no_bit(clean):
    assert np.array_equal(Disturbance(5, 0.0)(clean, FRAMES), clean)
    assert np.array_equal(possible(3, noise=0.0).video, clean)
    assert not np.array_equal(possible(3, noise=0.25).video, clean)


def test_the_four_videos_have_one_disturbance(noisy):
    """At each frame it is one function of the picture, so the frames that were equal are equal."""
    for name, four in noisy.items():
        plain = quadruplet(name, 1)
        assert (plain.videos != four.videos).any(axis=(2, 3, 4)).all()
        disturbance = of_quadruplet(1 + list(PROPERTIES).index(name), 1, 0.5)
        for frame in (0, 13, 31):
            for video in range(4):
                alone = disturbance(plain.videos[video, frame : frame + 1], [frame])
                assert np.array_equal(alone[0], four.videos[video, frame])
        first = four.first_difference
        assert first == plain.first_difference
        for original, exchanged in ((0, 2), (1, 3)):
            assert np.array_equal(four.videos[original, :first], four.videos[exchanged, :first])
        for frame in FRAMES:
            both = [
                sorted(four.videos[n, frame].tobytes() for n in pair) for pair in ((0, 1), (2, 3))
            ]
            assert both[0] == both[1]


def test_balanced_scores_still_cancel():
    def brightness(batch):
        return {"mean": batch.long().sum(dim=(1, 2, 3, 4)).tolist()}

    for name in ("permanence", "solidity", "size"):
        clips = physics_test.quadruplets(name, 2, noise=1.0)
        assert physics_test.scores(brightness, clips, name)["mean"].told == (0.5, 0.5)


@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_grows_with_the_strength_and_is_not_carried_on(layer, clean):
    grey = np.full_like(clean, 128)
    grey[:, 20:40, 20:40] = (200, 40, 40)
    changes = [
        Disturbance(7, strength, (layer,))(grey, FRAMES).astype(float) - grey
        for strength in (0.25, 1.0)
    ]
    low, high = (np.abs(change).mean() for change in changes)
    assert 0.1 < low < high
    # Four frames later, the distance of a model's frames, it is another one.
    change = changes[1].reshape(32, -1)
    change -= change.mean(axis=0)
    likeness = [np.corrcoef(change[t], change[t + 4])[0, 1] for t in range(28)]
    assert np.mean(likeness) < (0.35 if layer == "leaves" else 0.15)


def test_facts_say_what_is_drawn(clean):
    every = [Disturbance(2, 1.0).facts(frame) for frame in FRAMES]
    facts = {name: np.stack([facts[name] for facts in every]) for name in every[0]}
    flat = np.full_like(clean, 100)
    lit = Disturbance(2, 1.0, ("light",))(flat, FRAMES).mean(axis=(1, 2, 3))
    assert np.corrcoef(lit, facts["light"][:, 0])[0, 1] > 0.95
    grain = Disturbance(2, 1.0, ("camera",))(flat, FRAMES)[:, 4::8, 4::8, 0].reshape(32, -1)
    assert np.corrcoef(grain.ravel(), facts["camera"].ravel())[0, 1] > 0.99
    field = Disturbance(2, 1.0, ("texture",))(flat, FRAMES)[:, 4::8, 4::8, 0].reshape(32, -1)
    assert np.corrcoef(field.ravel(), facts["texture"].ravel())[0, 1] > 0.99
    shifted = clean.copy()
    shifted[:] = np.arange(64, dtype=np.uint8)[:, None, None] * 3
    down = Disturbance(2, 1.0, ("shake",))(shifted, FRAMES)[:, 20:40].mean(axis=(1, 2, 3))
    assert np.corrcoef(down, facts["shake"][:, 0])[0, 1] < -0.95
    green = np.abs(Disturbance(2, 1.0, ("leaves",))(flat, FRAMES).astype(int) - 100).sum(axis=-1)
    covered = green.reshape(32, 8, 8, 8, 8).sum(axis=(2, 4)).reshape(32, -1)
    assert covered[facts["leaves"] > 0].mean() > 10 * covered[facts["leaves"] == 0].mean()


def test_training_reads_the_same_noise(tmp_path):
    """Shards are without noise; what is read from them has it."""
    read = videos.simulated(tmp_path, 3, seed=7, workers=0, size=64, noise=0.5)
    for index in range(3):
        wanted = possible(shards.sample_seed(7, index), noise=0.5).video
        assert np.array_equal(read[index][1:30:4], wanted[1:30:4])
    plain = videos.simulated(tmp_path, 3, seed=7, workers=0, size=64)
    assert np.array_equal(plain[1][:], possible(shards.sample_seed(7, 1)).video)
    halved = videos.simulated(tmp_path, 1, seed=7, workers=0, size=32, noise=0.5)
    assert halved[0][:2].shape == (2, 32, 32, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: possible(0, noise=1.5), "noise: got 1.5, takes a number from 0 to 1"),
        (lambda: quadruplet("shape", 0, noise=-1), "noise: got -1"),
        (lambda: Disturbance(0, 1.0, ("snow",)), "layers: got 'snow', takes some of texture"),
        (lambda: config.load("vicreg_digits", ["data.noise=0.5"]), r"noise: got '0\.5', but it is"),
        (lambda: config.load("pixels_physics", ["data.noise=2"]), r"data\.noise"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
