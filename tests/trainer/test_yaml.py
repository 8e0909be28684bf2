"""Configuration files that are not what they seem: refused by name, with the line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from vicreg_jepa import cli, config


def load(path: Path, text: str | bytes, *words: str) -> config.Config:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return config.load(path, words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: vicreg\nseed: 1\nmethod: lejepa\n", r"method: given twice, in lines 1 and 3"),
        ("method: vicreg\nseed: 1\n'seed': 1\n", r"seed: given twice, in lines 2 and 3"),
        ("method: vicreg\ntraining:\n  steps: 1\n  batch: 2\n  steps: 3\n",
         r"training\.steps: given twice, in lines 3 and 5"),
        ("method: vicreg\ntraining: {steps: 1, steps: 2}\n", r"training\.steps: given twice"),
        ("method: vicreg\ndata: {size: 8}\nseed: 3\ndata: {size: 9}\n", "data: given twice, in "),
        ("? [a, b]\n: 1\n", "line 1: a key is a list"),
        ("method: vicreg\n1: 2\n", "1: unknown key|keys and values|1: .*string"),
        ("[" * 600, "is nested too deeply"),
        ("method: " + "{a: " * 600, "is nested too deeply"),
        ("seed: " + "9" * 5000, "x.yaml"),
        ("method: vicreg\nseed: 0x" + "f" * 8000, "seed: got a number of 32000 bits"),
        ("method: vicreg\nseed: !!bool maybe", "is not YAML"),
        ("method: vicreg\nseed: 2020-13-45\n", "x.yaml is not YAML"),
        ("a: &a [*a]\nmethod: vicreg", "a: unknown key"),
        ("method: *nothing", "is not YAML"),
        ("method: !!python/object/apply:os.system [exit]", "is not YAML"),
        (b"method: \xff\xfe vicreg", r"x\.yaml is not UTF-8 text"),
        (b"method: vicreg\0", r"x\.yaml is not YAML"),
        ("- method\n", "holds a list"),
        ("method: vicreg\n---\nmethod: lejepa\n", "is not YAML"),
        ("method: vicreg\nseed: 2020-01-01\n", "seed: got"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named(text, message, tmp_path):
    with pytest.raises(config.ConfigError, match=message) as caught:
        load(tmp_path / "x.yaml", text)
    assert len(str(caught.value)) < 2000


def test_a_merged_key_may_be_given_again(tmp_path):
    text = "method: vicreg\ntraining: &t {steps: 3, batch: 4}\n"
    with pytest.raises(config.ConfigError, match="more: unknown key"):
        load(tmp_path / "x.yaml", text + "more: {<<: *t, steps: 5}\n")


def test_values_that_share_much_are_not_written_out(tmp_path):
    """Aliases of aliases: a kilobyte that would be a gigabyte of text."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    lines += [
        f"{n}: &{n} [{', '.join(['*' + p] * 10)}]"
        for p, n in zip("abcdefgh", "bcdefghi", strict=True)
    ]
    with pytest.raises(config.ConfigError, match=r"data\.size: got \[") as caught:
        load(tmp_path / "x.yaml", "\n".join([*lines, "method: vicreg", "data: {size: *i}"]))
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("training={steps: 1, steps: 2}", r"training\.steps: given twice"),
        ("seed=" + "[" * 600, "seed: got .* is nested too deeply"),
        ("seed=" + "9" * 5000, "seed: "),
        ("seed=*x", "seed: got '\\*x', which is not a YAML value"),
    ],
)
def test_what_is_wrong_in_an_override_is_named(word, message):
    with pytest.raises(config.ConfigError, match=message) as caught:
        config.load("vicreg_digits", [word])
    assert len(str(caught.value)) < 1000


def test_what_is_no_readable_file_is_named(tmp_path, capsys):
    os.mkfifo(tmp_path / "x.yaml")
    (tmp_path / "y.yaml").mkdir()
    for name in "xyz":
        words = ["train", str(tmp_path / f"{name}.yaml"), "--output", str(tmp_path / "run")]
        assert cli.main(words) == 2
        assert "takes a YAML file or one of" in capsys.readouterr().err


# ---------------------------------------------------------------- a recipe's own kind is replaced


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("vjepa_physics", ["data.kind=videos", "data.path=x"]),
        ("vjepa_physics", ["data={kind: videos, path: x, frames: 16}"]),
        ("vjepa_physics", ["data.kind=webdataset", "data.path=x", "data.decoder=pyav"]),
        ("vjepa_large_videos", ["data.kind=physics"]),
        ("vjepa_causal_physics", ["optimizer.name=lars"]),
        ("vjepa_causal_physics", ["method=pixels"]),
        ("vjepa_physics", ["method=pixels", "model.sees=frame"]),
        ("ijepa_digits", ["method=vicreg", "model.encoder=conv"]),
        ("vicreg_digits", ["method=ijepa", "model.encoder=vit", "model.patch=2"]),
        ("lejepa_digits", ["method=vicreg"]),
    ],
)
def test_a_recipes_settings_of_its_own_kind_give_way(recipe, words):
    """What the recipe says of the kind, method, encoder or optimizer that is replaced."""
    made = config.load(recipe, words)
    assert config.parse(config.describe(made)) == made


def test_a_physics_recipe_on_a_folder_keeps_all_that_fits():
    was, made = (
        config.load("vjepa_physics"),
        config.load("vjepa_physics", ["data.kind=videos", "data.path=x"]),
    )
    assert made.data.videos == config.Data().videos
    for name in ("size", "frames", "stride"):
        assert getattr(made.data, name) == getattr(was.data, name)
    assert (made.model, made.loss, made.training) == (was.model, was.loss, was.training)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["data.kind=videos", "data.path=x", "data.videos=9"],
            "videos: got '9', but it is used by data.kind",
        ),
        (["data.kind=videos"], "path: missing"),
        (["data.kind=digits"], "data.kind: got 'digits', vjepa takes videos"),
        (["method=ijepa", "loss.future=0.5"], "data.kind: got 'physics', ijepa takes images"),
        (["optimizer.name=lars", "optimizer.betas=[0.5, 0.5]"], "optimizer.betas: got"),
    ],
)
def test_what_the_command_itself_gives_is_not_dropped(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("vjepa_physics", words)


def test_a_file_that_contradicts_itself_is_refused(tmp_path):
    with pytest.raises(config.ConfigError, match="videos: got '3'"):
        load(tmp_path / "x.yaml", "method: vjepa\ndata: {kind: videos, path: x, videos: 3}\n")
