"""A method that is written outside of the package: it is trained, resumed, probed and exported."""

from __future__ import annotations

import re
import sys
from dataclasses import replace

import pytest
from torch import nn
from vicreg_jepa import cli, config
from vicreg_jepa.config import settings as settings_module
from vicreg_jepa.methods import base
from vicreg_jepa.methods.base import METHODS, register
from vicreg_jepa.training import checkpoint, trainer

from tests.trainer.runs import SMALL, column, steps_of

MODULE = "tests.trainer.whitened"
NAME = f"{MODULE}.views"


def forget() -> None:
    """As in a process that has not imported the method's module."""
    METHODS.pop(NAME, None)
    sys.modules.pop(MODULE, None)


@pytest.fixture(autouse=True)
def forgotten():
    forget()
    yield
    forget()


def test_it_is_trained_resumed_probed_and_exported(tmp_path, capsys):
    words = ["train", "vicreg_digits", *SMALL, f"method={NAME}", "loss.covariance=0.5"]
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
    forget()
    assert cli.main(["probe", str(folder)]) == 0
    assert f"{NAME}, step 4: linear probe" in capsys.readouterr().out
    assert cli.main(["export", str(folder), str(tmp_path / "encoder.safetensors")]) == 0
    assert "tensors of the encoder" in capsys.readouterr().out


def test_it_takes_its_own_settings_and_no_others():
    taken = config.load("vicreg_digits", [f"method={NAME}", "loss.covariance=2"])
    assert taken.loss.covariance == 2
    with pytest.raises(
        config.ConfigError, match=r"loss\.sigreg: got 0\.5, but it is used by .*lejepa"
    ):
        config.load("vicreg_digits", [f"method={NAME}", "loss.sigreg=0.5"])


def test_an_unknown_method_is_refused_with_the_known_ones():
    with pytest.raises(config.ConfigError, match=r"method: got 'whitened', takes .*vicreg, "):
        config.load("vicreg_digits", ["method=whitened"])


NOT_THERE = {
    "absent.views": r"takes a module that Python finds, .* of PYTHONPATH: No module named 'absent'",
    "tests.absent.views": r"takes a module that Python finds, .*No module named 'tests\.absent'",
    f"{MODULE}.pairs": rf"takes {NAME}",
    "json.views": r"takes what json registers: nothing",
    "needs_more.views": r"its module cannot be imported: No module named 'not_installed'",
    "broken.views": r"its module cannot be imported: ZeroDivisionError: division by zero",
    ".views": r"takes .*vicreg, ",
    "tests..views": r"takes a module",
}


@pytest.mark.parametrize(("name", "message"), NOT_THERE.items(), ids=NOT_THERE)
def test_a_module_without_the_method_is_refused(name, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "needs_more.py").write_text("import not_installed\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(config.ConfigError, match=rf"method: got '{re.escape(name)}', {message}"):
        config.load("vicreg_digits", [f"method={name}"])


class Speechless(nn.Module):
    def after_step(self): ...

    def forward(self, view): ...

    def features(self, x): ...

    def loss(self, *views): ...


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
        ({"data": "sound"}, "data: got 'sound', takes 'images' or 'videos' or 'trajectories'"),
        ({"data": "trajectories"}, "'trajectories' with learns='views', takes 'trajectories' for"),
        (
            {"data": "trajectories", "learns": "trajectories"},
            "Whitened lacks prepare, encode, rollout",
        ),
        ({"data": "videos"}, "data: got 'videos' with learns='views', takes learns='tokens'"),
        ({"data": "videos", "learns": "tokens"}, "lacks draw, contexts, tokens, foreseen, targets"),
        (
            {"takes": ("loss.colour",)},
            "takes: got \\['loss.colour'\\], takes some of .*loss.sigreg",
        ),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(change, message):
    kind = base.find(NAME)
    before = dict(METHODS)
    with pytest.raises(ValueError, match=message):
        register(replace(kind, **{"name": "free", **change}))
    assert before == METHODS


def test_the_settings_of_methods_are_settings():
    for key in base.taken_by():
        section, name = key.split(".")
        part = settings_module.Config.model_fields[section].annotation
        assert name in part.model_fields, key


def test_every_method_has_a_recipe():
    below = {"hierarchy_maze": ["training.begin=runs/maze"]}
    made = {config.load(name, below.get(name, [])).method for name in config.recipes()}
    assert made == set(METHODS)
