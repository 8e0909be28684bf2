"""Views of photographs: what each change does, how often, and that only seed and step decide."""

from __future__ import annotations

import math
import sys
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from vicreg_jepa import config
from vicreg_jepa.data import batches, sources
from vicreg_jepa.methods import build, natural
from vicreg_jepa.methods.natural import Natural
from vicreg_jepa.methods.vicreg import weights as weights_of
from vicreg_jepa.models.resnet import ResNet18
from vicreg_jepa.ops import choose
from vicreg_jepa.training.run import train

NOTHING = {
    "crop": (1.0, 1.0), "flip": 0.0, "jitter_probability": 0.0, "grayscale": 0.0, "blur": 0.0,
    "solarize": 0.0,
}  # fmt: skip
REDUCED = ["model.dim=16", "model.expander=[16, 32]", "training.batch=8", "training.device=cpu"]
REDUCED += ["data.workers=0", "training.steps=1", "training.precision=float32"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int, size: int = 16) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=generator(7))


def photos(root: Path, size: int = 20) -> Path:
    for number, image in enumerate((255 * pictures(24, size)).byte()):
        place = root / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number:02d}.png")
    return root


def recipe(name: str, root: Path, *words: str) -> config.Config:
    """A recipe of photographs, on the CPU with small networks; natural views of 16 pixels."""
    given = ["data.kind=images", f"data.path={root}", "data.size=16", *REDUCED, *words]
    if name == "vicreg_imagenet100":
        given.append(f"data.test={root}")
    return config.load(name, given)


def views_of(made: config.Config, step: int, share: batches.Share) -> list[torch.Tensor]:
    """The views of a step, as a rank's trainer draws and shares them."""
    method = build.method(made, 3)
    seed = batches.seed_for(batches.Stream.METHOD, made.seed, step)
    batch = next(iter(sources.source(made).batches(step, share)))
    return [share.of(view) for view in method.views(batch, generator(seed))]


def test_views_depend_on_seed_and_step_alone(tmp_path):
    made = recipe("vicreg_imagenet100", photos(tmp_path))
    one = views_of(made, 2, batches.Share())
    torch.manual_seed(1)  # nobody else's random numbers matter
    state = torch.get_rng_state()
    again = views_of(made, 2, batches.Share())
    two = [views_of(made, 2, batches.Share(rank, 2)) for rank in (0, 1)]
    for view, same, parts in zip(one, again, zip(*two, strict=True), strict=True):
        assert view.shape == (8, 3, 16, 16)
        assert torch.equal(view, same)
        assert torch.equal(view, torch.cat(parts))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one[0], views_of(made, 1, batches.Share())[0])
    augment, images = Natural(), pictures(4)
    torch.set_rng_state(state)
    augment(images, generator(0))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("name", "probability"),
    [("flip", 0.5), ("jitter_probability", 0.8), ("grayscale", 0.2), ("blur", 0.1),
     ("solarize", 0.2), ("blur", 1.0), ("solarize", 0.0)],
)  # fmt: skip
def test_each_change_comes_as_often_as_it_should(name, probability):
    images = pictures(2000)
    nothing = Natural(**NOTHING)(images, generator(3))
    torch.testing.assert_close(nothing, images, rtol=0, atol=1e-5)
    views = Natural(**NOTHING | {name: probability})(images, generator(3))
    changed = (views - nothing).abs().amax(dim=(1, 2, 3)) > 1e-3
    spread = 4 * math.sqrt(probability * (1 - probability) / len(images))
    # a blur of less than a quarter of a pixel, a twelfth of all, leaves a picture as it is
    unseen = probability / 10 if name == "blur" else 0.01
    assert probability - spread - unseen <= float(changed.float().mean()) <= probability + spread
    if probability == 0:
        return
    seen, source = views[changed], images[changed]
    if name == "flip":
        torch.testing.assert_close(seen, source.flip(-1), rtol=0, atol=1e-5)
    if name == "grayscale":
        assert torch.equal(seen[:, 0], seen[:, 1])
        weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
        torch.testing.assert_close(seen[:, 0], (source * weights).sum(1), rtol=0, atol=1e-3)
    if name == "solarize":
        expected = torch.where(source < 0.5, source, 1 - source)
        assert ((seen - expected).abs() < 1e-4).float().mean() > 0.999  # of values near a half
    if name == "blur":
        assert (seen.var(dim=(1, 2, 3)) < source.var(dim=(1, 2, 3)) + 1e-4).all()


@pytest.mark.parametrize("which", range(4))
def test_each_part_of_the_jitter_stays_in_its_range(which):
    strength = (0.4, 0.4, 0.2, 0.1)[which]
    jitter = tuple(strength if part == which else 0.0 for part in range(4))
    # in the middle of the range, where nothing is cut off at black or white
    images = 0.4 + 0.2 * pictures(500, 8)
    words = NOTHING | {"jitter_probability": 1.0, "jitter": jitter}
    views = Natural(**words)(images, generator(4))
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    gray, gray_before = ((x * weights).sum(1, keepdim=True) for x in (views, images))
    if which == 0:
        factor = (views / images).flatten(1).median(1).values
    elif which == 1:
        factor = views.flatten(1).std(1) / images.flatten(1).std(1)
    elif which == 2:
        factor = (views - gray).flatten(1).std(1) / (images - gray_before).flatten(1).std(1)
    else:
        torch.testing.assert_close(views.amax(1), images.amax(1))  # the value of HSV
        torch.testing.assert_close(views.amin(1), images.amin(1))
        assert ((views - images).abs().amax(dim=(1, 2, 3)) > 1e-3).float().mean() > 0.95
        return
    assert float(factor.min()) >= 1 - strength - 0.02
    assert float(factor.max()) <= 1 + strength + 0.02
    assert float(factor.max() - factor.min()) > 1.8 * strength


def test_the_changes_of_colour_come_in_an_order_of_their_own():
    """Equal pictures with equal strengths of change: only the order tells them apart."""
    image = pictures(1).expand(64, -1, -1, -1)

    augment = Natural(**NOTHING | {"jitter_probability": 1.0, "jitter": (0.4, 0.4, 0.2, 0.1)})
    draws = iter([torch.zeros(64), torch.ones(4, 64), torch.rand(4, 64, generator=generator(1))])

    def drawn(shape, _):
        return next(draws, torch.zeros(shape)).reshape(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(natural, "_uniform", drawn)
        views = augment._jitter(image, generator(0), natural.kornia())
    assert len(views.flatten(1).unique(dim=0)) > 6


def test_crops_have_the_areas_and_ratios_that_are_asked_for():
    left, top, width, height = Natural(crop=(0.2, 0.9)).boxes(20000, generator(5))
    area, ratio = width * height, width / height
    assert 0.2 - 1e-6 <= float(area.min()) < 0.21
    assert 0.89 < float(area.max()) <= 0.9 + 1e-6
    assert 3 / 4 - 1e-5 <= float(ratio.min()) < 0.76
    assert 1.31 < float(ratio.max()) <= 4 / 3 + 1e-5
    assert float(torch.stack((left, top)).min()) >= 0
    assert float(torch.stack((left + width, top + height)).max()) <= 1 + 1e-6
    # a picture whose values are the places of its pixels shows where a crop lies
    size = 32
    places = (torch.arange(size) + 0.5) / size
    image = torch.stack((places.expand(size, size), places[:, None].expand(size, size)))
    image = torch.cat((image, torch.zeros(1, size, size))).expand(64, -1, -1, -1)
    augment = Natural(**NOTHING | {"crop": (0.2, 0.9)})
    left, top, width, height = augment.boxes(64, generator(6))
    view = augment(image, generator(6))
    middle = view[:, :, size // 2 - 1 : size // 2 + 1, size // 2 - 1 : size // 2 + 1]
    middle = middle.mean(dim=(2, 3))
    torch.testing.assert_close(middle[:, 0], left + width / 2, rtol=0, atol=3e-3)
    torch.testing.assert_close(middle[:, 1], top + height / 2, rtol=0, atol=3e-3)


def test_views_stay_in_range_under_autocast_and_are_of_float32():
    images = pictures(64).round()
    augment = Natural(blur=0.5, solarize=0.5)
    view = augment(images, generator(1))
    assert float(view.min()) >= 0
    assert float(view.max()) <= 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment(images, generator(1)), view)


def test_the_first_view_has_probabilities_of_its_own(tmp_path):
    words = ["augment.blur=[1.0, 0.1]", "augment.solarize=[0.0, 0.2]"]
    made = recipe("vicreg_imagenet100", tmp_path, *words)
    first, second = build.method(made, 3).augments
    assert (first.blur, first.solarize, first.crop) == (1.0, 0.0, (0.2, 1.0))
    assert (second.blur, second.solarize, second.crop) == (0.1, 0.2, (0.2, 1.0))
    defaults = config.Augmentation()
    for field in fields(Natural):
        theirs = getattr(defaults, field.name)
        assert field.default == (theirs[0] if field.name in ("blur", "solarize") else theirs)


def test_kornia_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(ImportError, match="'natural' needs kornia: pip install kornia"):
        Natural()(pictures(2), generator(0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["augment.flip=0.1"], "augment.flip: got 0.1, but it is used by augment.name 'natural'"),
        (["augment.name=natural"], "augment.name: got 'natural', takes images in colour"),
        (["augment.colour=1"], "augment.colour: unknown key"),
        (
            ["data.kind=images", "data.path=x", "augment.name=natural", "data.size=6"],
            "data.size: got 6, takes at least 7",
        ),
        (
            ["data.kind=images", "data.path=x", "augment.name=natural", "augment.crop=[0.5, 0.2]"],
            "augment.crop: got .*takes the smallest area first",
        ),
        (["model.encoder=resnet18", "model.dim=12"], "model.dim: got 12, takes a multiple of 8"),
        (["optimizer.trust=0.02"], "optimizer.trust: got 0.02, but it is used by .*'lars'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("vicreg_digits", words)


def test_methods_without_views_refuse_augmentations_and_resnets():
    with pytest.raises(config.ConfigError, match=r"augment\.name: got 'natural'.* not by ijepa"):
        config.load("ijepa_digits", ["augment.name=natural"])
    for name in ("ijepa_digits", "world_two_rooms"):
        with pytest.raises(config.ConfigError, match=r"model\.encoder: got 'resnet18'"):
            config.load(name, ["model.encoder=resnet18"])


@pytest.mark.parametrize("name", ["vicreg_cifar10", "vicreg_imagenet100"])
def test_recipes_of_photographs(name, tmp_path):
    """The published sizes can be built; a small network takes a step on a folder of pictures."""
    whole = config.load(name)
    with torch.device("meta"):
        encoder = ResNet18(3, whole.model.dim, small=name == "vicreg_cifar10")
    weights = sum(part.numel() for part in encoder.parameters())
    assert weights == {"vicreg_cifar10": 11_168_832, "vicreg_imagenet100": 11_176_512}[name]
    made = recipe(name, photos(tmp_path / "photos"))
    assert made.augment == whole.augment
    train(made, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "step_00000001").is_dir()
    assert len(list(islice(sources.source(made).batches(0, batches.Share()), 2))) == 2
    # another choice drops what only this one takes
    digits = config.load(name, ["augment.name=digits", "optimizer.name=adamw"])
    assert (digits.augment, digits.optimizer.trust) == (config.Augmentation(), 0.001)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("vicreg_cifar10", (1.0, 1.0, 80.0 / 2047)), ("vicreg_imagenet100", (25.0, 25.0, 1.0))],
)
def test_the_losses_of_recipes_are_the_published_ones(name, weights):
    """eb_jepa's and solo-learn's add the hinges of both views; eb_jepa's covariance term is the
    mean over the off-diagonal elements, of which there are 2047 in a row.
    """
    x, y = (torch.randn(12, 2048, generator=generator(seed)) / 2 for seed in (1, 2))
    expected = weights[0] * (x - y).square().mean()
    for z in (x, y):
        hinge = (1 - (z.var(dim=0) + 1e-4).sqrt()).relu().mean()
        covariance = z.T.cov()
        others = covariance.square().sum() - covariance.diagonal().square().sum()
        expected = expected + weights[1] * hinge + weights[2] * others / 2048
    made = config.load(name)
    assert made.model.expander[1] == 2048
    loss = choose.named("fused", None).vicreg(x, y, weights_of(made), None)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
