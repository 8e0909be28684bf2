"""The files of measured configurations: what is valid, how they are written, who takes them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from bench import tune, tune_tables
from vicreg_kernels import configs
from vicreg_kernels.attention.triton import configs as attention_configs
from vicreg_kernels.barlow.triton import configs as barlow_configs
from vicreg_kernels.vicreg.triton import configs as vicreg_configs

NAME = "Made-up GPU (R) 80GB"
GENERAL = vicreg_configs.nearest("no such GPU", "bf16", 64, 8192)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The devices' files are in tmp_path."""
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    configs.forget()
    yield tmp_path
    monkeypatch.undo()
    configs.forget()


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    path = configs.path_of(NAME)
    configs.write(path, configs.empty(NAME))
    before = path.read_text()
    record = configs.empty(NAME) | {"triton_from": {"vicreg": {"half": 4096}}}
    real = Path.write_text

    def full(self, text):
        real(self, text[: len(text) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="no space"):
        configs.write(path, record)
    assert path.read_text() == before


def test_no_file_that_is_shipped_is_broken(monkeypatch):
    monkeypatch.undo()
    configs.forget()
    for device in configs.devices():
        assert configs.load(device)["device"] == device
        assert configs.path_of(device).exists(), "the file is named after its device"
        for op, entry in tune_tables.TABLES.items():
            configs.rows(device, op, entry.module.Config, entry.module.KEYS)


def valid() -> dict:
    row = {"format": "half", "shape": [64, 8192], **dataclasses.asdict(GENERAL), "ms": 1.5}
    record = configs.empty(NAME) | {"triton_from": {"vicreg": {"half": 2048, "single": None}}}
    return json.loads(json.dumps(record | {"rows": {"vicreg": [row]}}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"schema": "of old"}, "schema: got 'of old', takes 'vicreg-kernels/configs/1'"),
        ({"rows": []}, r"rows: got \[\], takes a dict"),
        ({"triton_from": {"vicreg": 2048}}, r"triton_from\.vicreg: got 2048, takes an object"),
        ({"triton_from": {"vicreg": {"half": "2048"}}}, r"triton_from\.vicreg\.half: got '2048'"),
        (
            {"triton_from": {"vicreg": {"half": 0}}},
            r"half: got 0, takes a positive integer or null",
        ),
        ({"triton_from": {"vicreg": {"bf16": 1}}}, r"vicreg\.bf16: got 'bf16', takes one of"),
        ({"rows": {"vicreg": [{"format": "fp8"}]}}, r"rows\.vicreg\[0\]\.format: got 'fp8'"),
    ],
)
def test_a_file_that_is_not_valid_says_where(change, named):
    path = configs.path_of(NAME)
    path.write_text(json.dumps(valid() | change))
    with pytest.raises(ValueError, match=named) as error:
        configs.load(NAME)
    assert str(path) in str(error.value)
    assert "bench --tune" in str(error.value)
    assert tune.start(NAME, path) == configs.empty(NAME), "the tuner begins anew"


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("product", [64, 32, 4], r"product: got \[64, 32, 4\], takes 4 integers"),
        ("product", [64, 32, 4, 1.5], "product: .* takes 4 integers"),
        ("occupancy", True, "occupancy: got True, takes a value of int"),
        ("occupancy", None, "occupancy: got None"),
        ("shape", [64], "shape: got .* takes 2 integers"),
        ("tile", 3, r"tile: is no field of vicreg_kernels\.vicreg\.triton\.configs\.Config"),
        ("gradient", "absent", "gradient: got None, takes"),
    ],
)
def test_a_row_that_is_not_valid_says_where(field, value, named):
    record = valid()
    row = record["rows"]["vicreg"][0]
    row[field] = value
    if value == "absent":
        del row[field]
    configs.path_of(NAME).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=rf"rows\.vicreg\[0\]\.{named}"):
        vicreg_configs.nearest(NAME, "bf16", 64, 8192)


def test_a_file_that_is_no_json_says_so():
    configs.path_of(NAME).write_text("{")
    with pytest.raises(ValueError, match=r"made-up-gpu-80gb\.json: .*bench --tune"):
        configs.load(NAME)


def test_attention_and_barlow_take_measured_rows_where_they_fit():
    general = attention_configs.nearest("none", 9, "bf16", 64, 69)
    record = configs.empty(NAME)
    row = json.loads(json.dumps(dataclasses.asdict(general))) | {"forward": [16, 16, 4, 1]}
    record["rows"]["attention"] = [{"format": "half", "head_dim": 64, "tokens": 64, **row}]
    mine = barlow_configs.Config(occupancy=3)
    row = json.loads(json.dumps(dataclasses.asdict(mine)))
    record["rows"]["barlow"] = [{"format": "single", "shape": [64, 8192], **row}]
    configs.write(configs.path_of(NAME), record)
    config = attention_configs.nearest(NAME, 9, "bf16", 48, 2048)
    assert config == dataclasses.replace(general, forward=(16, 16, 4, 1))
    wider = attention_configs.nearest(NAME, 9, "bf16", 80, 64)
    assert wider == attention_configs.nearest("none", 9, "bf16", 80, 64), "it holds no head dim 80"
    assert barlow_configs.choose(NAME, "tf32", 100, 9000) == mine
    for format, rows, dim in (("bf16", 64, 8192), ("tf32", 9000, 100)):
        expected = barlow_configs.choose("none", format, rows, dim)
        assert barlow_configs.choose(NAME, format, rows, dim) == expected != mine
