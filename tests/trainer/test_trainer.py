"""The trainer: a run resumes where it was killed, and in pieces or whole it is the same run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from vicreg_jepa import config
from vicreg_jepa.data import batches, image_sets, sources
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.evaluation import collapse
from vicreg_jepa.methods import build
from vicreg_jepa.methods.base import METHODS, taken_by
from vicreg_jepa.models import masks
from vicreg_jepa.models.vit import Grid, ViT
from vicreg_jepa.ops import choose
from vicreg_jepa.ops.encode import encode
from vicreg_jepa.ops.published import variance_covariance as plain_terms
from vicreg_jepa.training import checkpoint, schedule
from vicreg_jepa.training.trainer import Diverged, Trainer

ROOT = Path(__file__).resolve().parents[2]
CAUSAL = ("vjepa_causal", "jepa_causal", "pixels")
# `hierarchy` trains above a run of another method: tests/trainer/test_hierarchy_runs.py.
ALONE = [method for method in METHODS if method != "hierarchy"]
# Every term of the loss of world models.
WORLD: dict[str, dict] = {
    "data": {"kind": "world", "size": 65, "window": 4, "length": 20},
    "model": {
        "encoder": "conv", "dim": 8, "latent": 16, "action_dim": 8, "predictor": "transformer",
        "predictor_depth": 1,
    },
    "loss": {"unroll": 3, "time_variance": 1.0, "time_covariance": 1.0, "slices": 32},
}  # fmt: skip


def settings(method: str, steps: int = 6, **training):
    kernels = training.pop("kernels", "fused")
    values = {
        "method": method,
        "kernels": kernels,
        "data": {"kind": "digits", "size": 8},
        "model": {"encoder": "conv", "dim": 32, "expander": [48, 64]},
        "optimizer": {"rate": 1e-3},
        "training": {"steps": steps, "batch": 32, "save_every": 2, **training},
    }
    if method == "vicreg_jepa":
        values["model"]["predictor_dim"] = 32
    if METHODS[method].learns == "tokens":
        values["model"] = {
            "encoder": "vit", "dim": 48, "depth": 2, "heads": 3, "patch": 2,
            "predictor_dim": 48, "predictor_depth": 1, "predictor_heads": 3,
        }  # fmt: skip
    if METHODS[method].data == "videos":
        values["data"] = {"kind": "physics", "size": 64, "frames": 4, "path": "unused"}
        values["model"] |= {"patch": 16, "tubelet": 2}
        if method in CAUSAL:
            values["model"]["sees"] = "frame"
        values["training"] |= {"batch": 8}
    if METHODS[method].data == "trajectories":
        values |= {"data": dict(WORLD["data"]), "model": dict(WORLD["model"])}
        values["loss"] = dict(WORLD["loss"])
        values["training"] |= {"batch": 8}
    if method == "world_pixels":
        values["model"] = {"encoder": "conv", "dim": 8, "action_dim": 8, "predictor_dim": 32}
        values["loss"] = {"unroll": 3}
    return config.parse(values)


def samples(made: config.Config):
    if made.is_of_trajectories:
        return sources.source(made)
    if not made.is_video:
        return batches.ImageSource(image_sets.digits(), made.training.batch, made.seed)
    videos = torch.randint(0, 256, (12, 9, 64, 64, 3), dtype=torch.uint8)
    clips = batches.Clips(videos, made.data.frames, made.data.stride)
    return batches.ClipSource(clips, made.training.batch, made.seed)


def run(made: config.Config, folder: Path, stop: int | None = None) -> list[float]:
    torch.manual_seed(7)
    source = samples(made)
    trainer = Trainer(made, build.method(made, source.channels), Ranks(), folder)
    trainer.resume()
    losses: list[float] = []

    def log(step: int, loss: float, seconds: float) -> None:
        losses.append(loss)
        if step == stop:
            raise KeyboardInterrupt

    try:
        trainer.fit(source, log)
    except KeyboardInterrupt:
        assert stop is not None
    return losses


@pytest.mark.parametrize("method", ALONE)
def test_a_resumed_run_is_the_same_bit_for_bit(method, tmp_path):
    made = settings(method)
    whole = run(made, tmp_path / "whole")
    run(made, tmp_path / "killed", stop=5)
    assert run(made, tmp_path / "killed") == whole[4:]


@pytest.mark.parametrize("method", ["ijepa", "vjepa"])
def test_micro_batches_train_alike(method, tmp_path):
    whole = run(settings(method), tmp_path / "whole")
    pieces = run(settings(method, accumulate=4), tmp_path / "pieces")
    torch.testing.assert_close(pieces, whole, rtol=1e-5, atol=0)


def test_checkpointing_changes_nothing(tmp_path):
    whole = run(settings("ijepa", steps=3), tmp_path / "whole")
    assert run(settings("ijepa", steps=3, checkpointing=True), tmp_path / "again") == whole


@pytest.mark.parametrize("method", ["ijepa", "vicreg"])
def test_bfloat16_is_autocast(method, tmp_path):
    whole = run(settings(method, steps=3), tmp_path / "whole")
    half = run(settings(method, steps=3, precision="bfloat16"), tmp_path / "half")
    torch.testing.assert_close(half, whole, rtol=1e-2, atol=0)
    assert half != whole


def test_micro_batches_of_batch_statistics_train_alike(tmp_path):
    """In evaluation mode: batch norm sees a micro-batch at a time."""
    losses = []
    for pieces in (1, 4):
        made = settings("vicreg", accumulate=pieces)
        source = samples(made)
        trainer = Trainer(made, build.method(made, 1).eval(), Ranks(), tmp_path / str(pieces))
        losses.append([float(trainer.take(next(source.batches(0, Ranks().share)))) for _ in "abc"])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


KILLED = """
import sys
from pathlib import Path
sys.path[:0] = [".", "python"]
from tests.trainer import test_trainer
made = test_trainer.settings("vicreg", steps=4000)
test_trainer.run(made, Path(sys.argv[1]))
"""


def test_a_killed_process_loses_only_the_steps_since_the_last_checkpoint(tmp_path):
    folder = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 300  # what takes longer hangs
        while len(checkpoint.existing(folder / "checkpoints")) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    step = int(checkpoint.newest(folder / "checkpoints").name.removeprefix("step_"))
    made = settings("vicreg", steps=4000)
    again = run(made, folder, stop=step + 3)
    assert len(again) == 3
    assert again == run(made, tmp_path / "whole", stop=step + 3)[step:]


def saved(tmp_path: Path) -> tuple[config.Config, Path]:
    made = settings("vicreg", steps=2)
    run(made, tmp_path)
    return made, checkpoint.newest(tmp_path / "checkpoints")


def refused(made: config.Config, folder: Path, message: str) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=message):
        run(made, folder)


def test_truncated_and_altered_checkpoints_are_refused(tmp_path):
    made, path = saved(tmp_path)
    tensors = path / "tensors.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-100])
    refused(made, tmp_path, "truncated")
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused(made, tmp_path, "not those that were written")
    tensors.unlink()
    refused(made, tmp_path, "is missing")
    tensors.write_bytes(whole)
    state = path / "state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    refused(made, tmp_path, "truncated or not JSON")
    state.write_text(json.dumps({"format": "another"}))
    refused(made, tmp_path, "has format 'another'")
    state.write_text(text)
    assert run(made, tmp_path) == []


def test_another_runs_checkpoint_is_refused(tmp_path):
    saved(tmp_path)
    refused(settings("lejepa"), tmp_path, "was written with method vicreg")


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    run(settings("vicreg", steps=9, keep=3), tmp_path)
    names = [path.name for path in checkpoint.existing(tmp_path / "checkpoints")]
    assert names == ["step_00000006", "step_00000008", "step_00000009"]


def test_a_loss_that_is_not_finite_leaves_its_batch(tmp_path):
    from safetensors.torch import load_file

    made = settings("vicreg")
    method = build.method(made, 1)
    trainer = Trainer(made, method, Ranks(), tmp_path)
    batch = image_sets.digits().images[:32]
    with torch.no_grad():
        next(method.parameters()).fill_(float("nan"))
    with pytest.raises(Diverged, match="step 0 is nan"):
        trainer.take(batch)
    (path,) = tmp_path.glob("diverged*.safetensors")
    assert torch.equal(load_file(path)["batch"], batch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.stps=3"], "training.stps: unknown key"),
        (["method=byol"], "method: got 'byol'"),
        (["training.batch=1"], "training.batch: got 1"),
        (["data.kind=images"], "path: missing"),
        (["method=vjepa"], "vjepa takes videos"),
        (["optimizer=3"], "optimizer: got 3"),
        (["kernels=reference", "backend=cpu"], "backend: got 'cpu', takes none"),
        (["steps"], "override: got 'steps'"),
        (["seed=1", "training.steps=2", "seed=2"], "seed: given 2 times"),
        (["model.depth=2"], "model.depth: got 2, but it is used by model.encoder 'vit'"),
        (["optimizer.name=lars", "optimizer.betas=[0.8,0.9]"], "optimizer.betas: got"),
        (["training.parallel=fsdp"], "training.parallel: got 'fsdp', which shards transformers"),
        (["training.parallel=fsdp", "model.encoder=vit", "optimizer.name=lars"], "'lars'"),
        (["training.parallel=fsdp", "model.encoder=vit", "training.compile=true"], "compile takes"),
    ],
)
def test_wrong_settings_are_named(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("vicreg_digits", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.frames=1"], "data.frames: got 1, vjepa_causal takes at least two token frames"),
        (["model.sees=clip"], "model.sees: got 'clip', vjepa_causal takes 'frame'"),
        (["training.accumulate=2"], "training.accumulate: got 2, takes 1 with loss.vc_weight"),
        (["method=vjepa", "loss.future=0.5", "loss.frames_seen=[1,8]"], "clip's 8 token frames"),
        (["method=vjepa", "loss.future=0.5", "loss.frames_seen=[3,2]"], "takes least and most"),
    ],
)
def test_wrong_settings_of_videos_are_named(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("vjepa_causal_physics", words)


@pytest.mark.parametrize("key", taken_by())
def test_a_setting_that_a_method_does_not_take_is_refused(key):
    """The method takes the default alone, and those of TAKEN_BY take more."""
    section, name = key.split(".")
    default = type(getattr(config.load("vicreg_digits"), section)).model_fields[name].default
    others = {"clip": "frame", "gelu": "relu", "auto": "pyav", "mlp": "gru", None: "held_out"}
    others["digits"] = "natural"
    points, mlp = {"keypoints": 4}, {"predictor": "mlp", "history": 4}
    needed = {"sharpness": points, "keypoint_map": points, "waves": mlp}
    needed["frequency"] = {**mlp, "waves": 4}
    if isinstance(default, tuple):
        other = [value / 2 if isinstance(value, float) else value + 1 for value in default]
    elif isinstance(default, bool):
        other = not default
    elif isinstance(default, int):
        other = 2 * default or 1
    elif isinstance(default, float):
        other = (default + 1) / 2 if default != 1 else 0.5
    else:
        other = 4095.0 if name == "white" else others[default]
    for method in ALONE:
        values = config.describe(settings(method))
        if METHODS[method].data == "videos":
            values["data"]["frames"] = 16
        if METHODS[method].data == "trajectories":
            values["data"] |= {"window": 16, "length": 90}
        # 16 frames are enough for any method; one head fits any width.
        values[section] |= {name: {"frames": 16, "predictor_heads": 1}.get(name, other)}
        if method in taken_by()[key]:
            kinds = {"data.test": "images", "data.white": "images", "data.decoder": "videos"}
            kind = kinds.get(key)
            if section == "augment":
                values["augment"]["name"], kind = "natural", "images"
            if kind:
                values["data"] |= {"kind": kind, "path": "somewhere"}
            values["model"] |= needed.get(name, {})
            config.parse(values)
        else:
            with pytest.raises(config.ConfigError, match=rf"{name}: got"):
                config.parse(values)


def test_recipes_are_whole():
    assert set(config.recipes()) >= {f"{m}_digits" for m in METHODS if METHODS[m].data == "images"}
    for name in config.recipes():
        made = config.load(name, ["training.begin=runs/maze"] if "hierarchy" in name else [])
        assert config.parse(json.loads(json.dumps(config.describe(made)))) == made


def test_an_override_takes_the_place_of_a_recipes_value():
    assert config.load("vicreg_digits", ["training.steps=7", "seed=3"]).training.steps == 7


def test_schedules():
    made = config.Optimizer(rate=1.0, warmup=0.1, final_rate=0.1, final_weight_decay=0.4)
    rates = [schedule.rate(made, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[100] == pytest.approx(0.1)
    assert schedule.weight_decay(made, 0, 100) == pytest.approx(0.05)
    assert schedule.weight_decay(made, 100, 100) == pytest.approx(0.4)


def test_every_epoch_takes_each_sample_once_in_a_new_order():
    plan = batches.Plan(samples=10, batch=3, seed=0)
    epochs = [torch.cat([plan.rows(3 * e + s) for s in range(3)]) for e in range(2)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)


def test_the_monitor_names_what_collapses():
    torch.manual_seed(0)
    z = torch.randn(200, 16)
    assert collapse.spread(z).effective_rank == pytest.approx(15.4, abs=0.6)
    assert collapse.spread(z).warnings() == []
    assert "complete collapse" in collapse.spread(z * 1e-5).warnings()[0]
    line = torch.randn(200, 1) * torch.randn(1, 16)
    text = " ".join(collapse.spread(line).warnings())
    assert "dimensional collapse" in text
    assert "redundancy" in text
    z[:, 3] = 1.0
    assert collapse.spread(z).warnings() == ["1 of 16 dimensions are constant"]


def test_what_changes_is_always_predicted():
    """One token of one frame differs: it, and its place before and after, where it is new again."""
    grid = Grid(4, 2, 2)
    patches = torch.zeros(1, 16, 5)
    patches[0, 2 * 4 + 1, 3] = 0.2
    assert masks.changing(patches, grid).nonzero()[:, 1].tolist() == [5, 9, 13]
    patches[0, 2 * 4 + 1, 3] = 0.1  # noise
    assert not masks.changing(patches, grid).any()
    drawn = masks.following(grid, 1, torch.Generator())
    keep = torch.zeros(1, 16, dtype=torch.bool)
    keep[0, [1, 5, 13]] = True
    some = masks.chosen(drawn, keep)
    assert some.targets[0][0].tolist() == [5, 13]  # the first frame is never a target
    assert masks.chosen(drawn, torch.zeros_like(keep)).tokens() == drawn.tokens() == 12


def test_still_tokens_are_left_out_of_a_step(tmp_path):
    """In a clip in which one token of the last frames lights up, it alone is predicted."""
    values = config.describe(settings("vjepa_causal", batch=2))
    values["data"]["frames"] = 8
    values["loss"]["static_token_share"] = 0.0
    made = config.parse(values)
    trainer = Trainer(made, build.method(made, 3), Ranks(), tmp_path)
    clips = torch.full((2, 3, 8, 64, 64), 0.5)
    clips[:, :, 6:, 16:32, 32:48] = 1.0
    seen = []
    trainer.method.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1].targets))
    trainer.take(clips)
    changing = [(frame * 16) + 4 + 2 for frame in (2, 3)]  # before it and then
    assert [places.tolist() for places in seen[0][0]] == [changing, changing]


def test_spread_is_the_variance_and_covariance_of_the_contexts_tokens(tmp_path):
    plain, spread = (
        build.method(config.parse(config.describe(settings("vjepa")) | {"loss": loss}), 3)
        for loss in ({}, {"vc_weight": 2.0})
    )
    clips = torch.rand(4, 3, 4, 64, 64)
    drawn = plain.draw(clips, 0, len(clips), torch.Generator().manual_seed(0))
    tokens = encode(plain.encoder, plain.kernels, clips, drawn.context).x
    variance, covariance = plain_terms(tokens)
    expected = plain(clips, drawn, 0.5) + 2 * (variance + covariance / 25)
    torch.testing.assert_close(spread(clips, drawn, 0.5), expected)


def test_the_backend_that_is_named_is_taken_everywhere():
    made = config.parse(config.describe(settings("ijepa")) | {"backend": "reference"})
    method = build.method(made, 1)
    backends = {part.backend for part in method.modules() if hasattr(part, "backend")}
    assert backends == {"reference"}


def test_nothing_is_foreseen_from_later_frames():
    made = config.describe(settings("vjepa_causal"))
    made["data"]["frames"] = 8
    method = build.method(config.parse(made), 3).eval()
    clips = torch.rand(2, 3, 8, 64, 64)
    changed = clips.clone()
    changed[:, :, 4:] = torch.rand(2, 3, 4, 64, 64)
    before, after = (method.foreseen(x, [1, 2, 3]) for x in (clips, changed))
    torch.testing.assert_close(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])


@pytest.mark.parametrize("kernels", ["fused", "reference"])
def test_an_encoder_of_frames_sees_no_other_frame(kernels):
    """Whole or at places, a clip's tokens are those of its frames as clips of one token frame."""
    choice = choose.named(kernels)
    torch.manual_seed(0)
    shared = ((2, 8, 8), 32, 2, 2, "rope", "frame")
    whole, one = ViT((3, 6, 32, 32), *shared), ViT((3, 2, 32, 32), *shared)
    one.load_state_dict(whole.state_dict())
    clips = torch.rand(2, 3, 6, 32, 32)
    frames = clips.unflatten(2, (3, 2)).transpose(1, 2).flatten(0, 1)
    expected = encode(one, choice, frames, None).reshape(2, 48, 32)
    encoded = encode(whole, choice, clips, None)
    torch.testing.assert_close(encoded, expected, rtol=1e-5, atol=1e-6)
    places = [torch.arange(16), torch.tensor([0, 5, 6, 40, 47])]  # no token of the middle frame
    seen = encode(whole, choice, clips, places)
    for clip, at in enumerate(places):
        plane = at.tolist()
        alone = encode(one, choice, frames[3 * clip :][:3], _by_frame(plane))
        rows = seen.x[clip, : len(plane)] if kernels == "reference" else _rows(seen, clip)
        kept = alone.x if kernels == "fused" else alone.x[alone.keep]
        torch.testing.assert_close(rows, kept, rtol=1e-5, atol=1e-6)


def _by_frame(places: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([p % 16 for p in places if p // 16 == frame]).long() for frame in range(3)]


def _rows(sequences, sample: int) -> torch.Tensor:
    return sequences.x[sequences.offsets[sample] : sequences.offsets[sample + 1]]
