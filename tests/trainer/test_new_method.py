"""A method that is written outside of the package: it is trained, resumed, probed and exported."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from vicreg_jepa import cli, config
from vicreg_jepa.config import settings as settings_module
from vicreg_jepa.methods import base, networks
from vicreg_jepa.methods.augment import Augment
from vicreg_jepa.methods.base import METHODS, MethodKind, register
from vicreg_jepa.training import checkpoint, trainer

from tests.trainer.runs import SMALL, column, steps_of


class Whitened(nn.Module):
    """Two views agree, and each has the identity as its covariance."""

    def __init__(self, encoder: nn.Module, expander: nn.Module, weight: float) -> None:
        super().__init__()
        self.encoder, self.expander, self.weight = encoder, expander, weight
        self.augment = Augment()

    def views(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        return self.augment(images, generator), self.augment(images, generator)

    def forward(self, view: Tensor) -> Tensor:
        return self.expander(self.encoder(view))

    def loss(self, x: Tensor, y: Tensor, *, process_group=None) -> Tensor:
        eye = torch.eye(x.shape[1])
        white = sum((z.T.cov() - eye).square().mean() for z in (x, y))
        return (x - y).square().mean() + self.weight * white

    def after_step(self) -> None:
        pass

    def features(self, x: Tensor) -> Tensor:
        return self.encoder(x)

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def build(settings, kernels, channels) -> Whitened:
    parts = networks.encoder_and_expander(settings, kernels, channels)
    return Whitened(*parts, settings.loss.covariance)


TAKES = ("model.expander", "model.activation", "loss.covariance")
KIND = MethodKind("whitened", Whitened, build, "views", "images", TAKES)


@pytest.fixture
def registered():
    register(KIND)
    yield
    del METHODS["whitened"]


@pytest.mark.usefixtures("registered")
def test_it_is_trained_resumed_probed_and_exported(tmp_path, capsys):
    words = ["train", "vicreg_digits", *SMALL, "method=whitened", "loss.covariance=0.5"]
    words += ["training.steps=4", "--output"]
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert cli.main([*words, str(whole)]) == 0
    taken = trainer.Trainer.take
    calls = []

    def interrupted(self, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return taken(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "take", interrupted)
        assert cli.main([*words, str(folder)]) == 130
    assert checkpoint.newest(folder / "checkpoints").name == "step_00000002"
    assert cli.main([*words, str(folder)]) == 0
    losses = [column(path, "loss") for path in (whole, folder)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
    assert steps_of(folder) == [1, 2, 3, 4]
    assert cli.main(["probe", str(folder)]) == 0
    assert "whitened, step 4: linear probe" in capsys.readouterr().out
    assert cli.main(["export", str(folder), str(tmp_path / "encoder.safetensors")]) == 0
    assert "tensors of the encoder" in capsys.readouterr().out


@pytest.mark.usefixtures("registered")
def test_it_takes_its_own_settings_and_no_others():
    taken = config.load("vicreg_digits", ["method=whitened", "loss.covariance=2"])
    assert taken.loss.covariance == 2
    with pytest.raises(
        config.ConfigError, match=r"loss\.sigreg: got 0\.5, but it is used by lejepa"
    ):
        config.load("vicreg_digits", ["method=whitened", "loss.sigreg=0.5"])


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(config.ConfigError, match=r"method: got 'whitened', takes .*vicreg, "):
        config.load("vicreg_digits", ["method=whitened"])


class Speechless(Whitened):
    exported = None
    views = None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"name": "vicreg"},
            "name: got 'vicreg', takes one that is free: it is vicreg_jepa.methods",
        ),
        ({"method": Speechless}, "method: Speechless lacks exported, views; with learns='views'"),
        ({"learns": "tokens"}, "method: Whitened lacks draw; with learns='tokens'"),
        ({"learns": "pixels"}, "learns: got 'pixels', takes 'views' or 'tokens'"),
        ({"data": "sound"}, "data: got 'sound', takes 'images' or 'videos'"),
        ({"data": "videos"}, "data: got 'videos' with learns='views', takes learns='tokens'"),
        ({"data": "videos", "learns": "tokens"}, "lacks draw, contexts, tokens, foreseen, targets"),
        (
            {"takes": ("loss.colour",)},
            "takes: got \\['loss.colour'\\], takes some of .*loss.sigreg",
        ),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(change, message):
    before = dict(METHODS)
    with pytest.raises(ValueError, match=message):
        register(replace(KIND, **change))
    assert before == METHODS


def test_the_settings_of_methods_are_settings():
    for key in base.taken_by():
        section, name = key.split(".")
        part = settings_module.Config.model_fields[section].annotation
        assert name in part.model_fields, key


def test_every_method_has_a_recipe():
    made = {config.load(name).method for name in config.recipes()}
    assert made == set(METHODS)
