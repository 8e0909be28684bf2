"""`vicreg-jepa train | probe | surprise | compare | export`, on runs of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from vicreg_jepa import cli
from vicreg_jepa.data import videos
from vicreg_jepa.surprise import calibration
from vicreg_jepa.training.run import restore

SMALL = ["training.batch=64", "model.dim=32", "model.expander=[32, 64]", "training.save_every=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    words = ["train", "vicreg_digits", *SMALL, "training.steps=3", "training.log_every=1"]
    assert cli.main([*words, "--output", str(folder)]) == 0
    return folder


def test_train_leaves_a_record_of_each_step(trained, capsys):
    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] > 0 and 1 <= row["effective_rank"] <= 32 for row in rows)
    words = ["train", "vicreg_digits", *SMALL, "training.steps=3", "--output", str(trained)]
    assert cli.main(words) == 0
    assert "resuming at step 3" in capsys.readouterr().err


def test_probe(trained, capsys):
    assert cli.main(["probe", str(trained)]) == 0
    out = capsys.readouterr().out
    score = float(out.split("linear probe ")[1].split(" %")[0])
    assert 60 < score <= 100  # what pixels and a random encoder give is above it too
    assert "effective rank" in out


def test_export_holds_the_encoder(trained, tmp_path):
    file = tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(trained), str(file)]) == 0
    _, method, _ = restore(trained)
    for name, z in load_file(file).items():
        assert torch.equal(z, method.encoder.state_dict()[name])


def test_compare(capsys):
    words = ["compare", "vicreg_digits", *SMALL, "training.steps=9", "--rounds", "1"]
    assert cli.main(words) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[0] == "vicreg"
    assert float(line[-1]) < 1e-4  # the losses of the same steps


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "nothing", "--output", "x"], "takes a YAML file or one of"),
        (["train", "vicreg_digits", "training.x=1", "--output", "x"], "training.x: unknown key"),
        (["probe", "/nowhere"], "holds no checkpoint"),
    ],
)
def test_mistakes_are_named(words, message, capsys):
    assert cli.main(words) == 2
    assert message in capsys.readouterr().err


def test_surprise_takes_a_video_model(trained, capsys):
    assert cli.main(["surprise", str(trained)]) == 2
    takes = "surprise takes jepa_causal or pixels or vjepa or vjepa_causal"
    assert takes in capsys.readouterr().err


def test_surprise_draws_a_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibration, "COUNT", 4)
    words = ["training.steps=1", "training.batch=2", "model.depth=1", "model.dim=48",
             "model.predictor_depth=1", "model.predictor_dim=48", "data.videos=2",
             "data.frames=16", "data.stride=1", f"data.path={tmp_path / 'data'}"]  # fmt: skip
    run = tmp_path / "run"
    assert cli.main(["train", "vjepa_physics", *words, "--output", str(run)]) == 0
    pytest.importorskip("av")
    from PIL import Image

    frames = [Image.new("RGB", (80, 64), (8 * i, 0, 0)) for i in range(18)]
    clip = tmp_path / "clip.gif"
    frames[0].save(clip, save_all=True, append_images=frames[1:], duration=50)
    decoded = videos.decode(clip, 64)
    assert decoded.shape == (18, 64, 64, 3)
    assert abs(int(decoded[10, 32, 32, 0]) - 80) < 8
    words = ["surprise", str(run), "--video", str(clip), "--false-alarms"]
    assert cli.main([*words, "0.1"]) == 2
    assert "--false-alarms: got 0.1, takes 0.2000 to 1 with 4 peaks" in capsys.readouterr().err
    # A clip that is too short is refused before anything is calibrated.
    kept, short = run / "surprise" / "calibration.safetensors", tmp_path / "short.gif"
    frames[0].save(short, save_all=True, append_images=frames[1:4], duration=50)
    assert cli.main(["surprise", str(run), "--video", str(short), "--false-alarms", "0.2"]) == 2
    assert "videos: got 4 frames, takes at least the model's 16" in capsys.readouterr().err
    assert not kept.exists()
    save_file({"peaks": torch.zeros(4)}, kept)  # of no model: it is made anew
    assert cli.main([*words, "0.2"]) == 0
    assert load_file(kept)["peaks"].all()
    assert "impossible" in capsys.readouterr().out
    assert (run / "surprise" / "clip.png").stat().st_size > 5000
    assert (run / "surprise" / "clip.gif").stat().st_size > 5000


def test_a_file_that_is_no_video_is_named(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "bad.mp4").write_bytes(b"not a video")
    with pytest.raises(ValueError, match=r"bad\.mp4"):
        videos.decode(tmp_path / "bad.mp4", 64)
