"""The probes of video runs: they find what is in the tokens, and nothing where nothing is."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from vicreg_jepa import cli, config
from vicreg_jepa.data import video_decoders, videos
from vicreg_jepa.evaluation import video_probe
from vicreg_jepa.methods import build
from vicreg_jepa.physics.videos import possible
from vicreg_jepa.training.run import restore

from tests.trainer.test_tars import tar_of


@pytest.fixture(scope="module")
def hidden() -> tuple[torch.Tensor, video_probe.Labelled]:
    """Of 32 tokens of noise one, anywhere, is marked and says the class: their mean hardly does."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(240, 32, 32, generator=generator)
    labels = torch.randint(3, (240,), generator=generator)
    where = torch.randint(32, (240,), generator=generator)
    marked = torch.zeros(240, 32)
    marked[:, 0] = 6.0
    marked[torch.arange(240), 1 + labels] = 4.0
    tokens[torch.arange(240), where] += marked
    return tokens, video_probe.labelled([str(int(label)) for label in labels])


def test_the_attentive_probe_finds_the_token_that_matters(hidden):
    tokens, labels = hidden
    real = video_probe.scores(tokens, labels, heads=2, seed=0)
    assert real.attentive > 0.9
    assert real.linear < 0.75
    # the sceptic's control: a probe that could learn labels by heart would not show it here
    control = video_probe.scores(tokens, video_probe.shuffled(labels, 0), heads=2, seed=0)
    assert max(control.attentive, control.linear) < 0.5


def test_its_gradient_is_that_of_plain_attention(hidden):
    """The library's masked attention of one query is softmax(q k) v."""
    tokens = hidden[0][:5].double()
    probe = video_probe.AttentiveProbe(32, 2, 3, backend="reference").double()
    probe.query.data.normal_()
    k, v = probe.kv(probe.norm1(tokens)).chunk(2, -1)
    q = probe.q(probe.query).unflatten(0, (2, 16))
    k, v = (z.unflatten(2, (2, 16)) for z in (k, v))
    weights = torch.einsum("hd,bthd->bht", q, k).div(16**0.5).softmax(-1)
    h = probe.query + probe.proj(torch.einsum("bht,bthd->bhd", weights, v).flatten(1))
    expected = probe.head(probe.norm2(probe.mlp(h)))
    torch.testing.assert_close(probe(tokens), expected)
    single = video_probe.AttentiveProbe(32, 2, 3).requires_grad_(True)
    single.load_state_dict({k: z.float() for k, z in probe.state_dict().items()})
    (gradient,) = torch.autograd.grad(single(tokens.float()).square().sum(), [single.query])
    (wanted,) = torch.autograd.grad(expected.square().sum(), [probe.query])
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="heads: got 5, takes a divisor of 32"):
        video_probe.AttentiveProbe(32, 5, 3)


def test_physics_and_its_controls():
    """How many blocks stand in a scene: seen by an encoder with random weights already, so that the
    controls have something to be a control of; with shuffled labels it is gone."""
    words = ["data.frames=4", "model.patch=16", "loss.future=0", "model.dim=48", "model.depth=1"]
    words += ["model.heads=3", "model.predictor_dim=48", "model.predictor_depth=1"]
    method = build.method(config.load("vjepa_physics", words), 3).eval()
    samples = [possible(seed) for seed in range(160)]
    clips = torch.stack([torch.from_numpy(s.video[::8]).permute(3, 0, 1, 2) for s in samples])
    with torch.no_grad():
        tokens = method.tokens(clips.float() / 255)
    assert torch.equal(tokens.mean(dim=1), method.features(clips.float() / 255))
    labels = video_probe.labelled([str(len(s.record["blocks"]) > 0) for s in samples])
    real = video_probe.scores(tokens, labels, heads=3, seed=0)
    control = video_probe.scores(tokens, video_probe.shuffled(labels, 0), heads=3, seed=0)
    assert real.attentive > 0.75
    assert real.linear > 0.65
    assert max(control.attentive, control.linear) < 0.65


def npz(grey: int) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, video=np.full((4, 16, 16, 3), grey, np.uint8))
    return packed.getvalue()


@pytest.fixture
def run(tmp_path) -> Path:
    """One step on 40 grey clips, whose labels say how bright they are."""
    files = {}
    for number in range(40):
        label, grey = number % 2, 60 + 120 * (number % 2) + number // 2
        record = {"label": label, "shade": ["dark", "bright"][label], "parts": [1] * label}
        files |= {f"{number:02d}.npz": npz(grey), f"{number:02d}.json": json.dumps(record).encode()}
    (tmp_path / "a.tar").write_bytes(tar_of(files))
    words = ["data.kind=webdataset", f"data.path={tmp_path}", "data.size=16", "data.frames=4",
             "data.stride=1", "loss.future=0", "training.steps=1", "training.batch=4",
             "model.depth=1", "model.dim=32", "model.heads=2", "model.predictor_dim=32",
             "model.patch=8", "model.predictor_depth=1", "model.predictor_heads=2"]  # fmt: skip
    assert cli.main(["train", "vjepa_physics", *words, "--output", str(tmp_path / "run")]) == 0
    return tmp_path / "run"


def test_a_video_run_is_probed(run, capsys):
    capsys.readouterr()
    assert cli.main(["probe", str(run), "--label", "shade", "--videos", "30"]) == 0
    out = capsys.readouterr().out
    assert "30 videos of 2 classes" in out
    scores = {
        line[:24].strip(): [float(z) for z in re.findall(r"([\d.]+)%", line)]
        for line in out.splitlines()[2:-1]
    }
    assert scores["vjepa, step 1"] == [100.0, 100.0]
    assert [len(scores[name]) for name in ("untrained encoder", "shuffled labels")] == [2, 2]
    assert re.fullmatch(r"the commonest class alone: \d\d\.\d%", out.splitlines()[-1])
    settings = restore(run)[0]
    for key, names in ((None, "01"), ("shade", ["dark", "bright"]), ("parts", "01")):
        assert videos.labels(settings, key) == list(names) * 20  # a list counts as its length
    assert cli.main(["probe", str(run), "--label", "nothing"]) == 2
    assert "sample '00' has none, takes `nothing` in .json" in capsys.readouterr().err


def test_labels_of_folders_are_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(videos, "decoder", lambda name: video_decoders.PyAV)
    for name in ("cat/1.mp4", "cat/more/2.mp4", "dog/3.mp4"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    source = videos.VideoFolder(tmp_path, 16)
    assert source.labels(None) == ["cat", "cat", "dog"]
    with pytest.raises(ValueError, match="label: got 'x', but videos in folders"):
        source.labels("x")
    (tmp_path / "4.mp4").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"label: video '4\.mp4' is in no class folder"):
        videos.VideoFolder(tmp_path, 16).labels(None)


def test_one_class_is_no_task():
    with pytest.raises(ValueError, match=r"label: all videos have \['a'\], takes at least two"):
        video_probe.labelled(["a", "a"])
    with pytest.raises(ValueError, match="class 'b': got 1"):
        video_probe.scores(torch.randn(3, 2, 4), video_probe.labelled("aab"), heads=1, seed=0)
