"""The demo from end to end in a few steps, and its parts: views, images, probe, measurements."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from threadpoolctl import threadpool_limits
from vicreg_jepa import config
from vicreg_jepa.compare import memory, timing
from vicreg_jepa.data import batches, image_files, image_sets
from vicreg_jepa.demo import __main__ as demo
from vicreg_jepa.demo import digits, parity, physics, steps, table, world
from vicreg_jepa.demo import losses as demo_losses
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.evaluation import probe
from vicreg_jepa.evaluation.features import features
from vicreg_jepa.methods import augment, build
from vicreg_jepa.ops import published
from vicreg_jepa.training import run
from vicreg_jepa.training.run import restore, train
from vicreg_jepa.training.trainer import Trainer

import vicreg_kernels


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The published formula


@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (16, 16), (24, 67), (130, 31)])
def test_plain_is_the_reference_in_float64(shape):
    x, y = (torch.randn(shape, dtype=torch.float64).mul_(s).requires_grad_() for s in (0.9, 1.1))
    ours = published.vicreg_loss(x, y)
    theirs = vicreg_kernels.vicreg_loss(x, y, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for actual, wanted in zip(
        torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max())


def test_off_diagonal_leaves_out_the_diagonal_alone():
    square = torch.arange(16.0).view(4, 4)
    wanted = [v for v in range(16) if v % 5]
    assert published.off_diagonal(square).tolist() == wanted


# Views


def test_views_depend_on_the_seed_alone_and_stay_images():
    images = image_sets.digits().images[:64]
    before = images.clone()
    view = augment.Augment()(images, generator(1))
    assert torch.equal(view, augment.Augment()(images, generator(1)))
    assert not torch.equal(view, augment.Augment()(images, generator(2)))
    assert torch.equal(images, before)
    assert view.shape == images.shape
    assert view.dtype == images.dtype
    assert view.min() >= 0
    assert view.max() <= 1


def test_views_are_made_where_the_images_are():
    """The trainer's generator is a CPU one, also for images on a GPU; meta tells devices apart."""
    images = torch.empty(4, 1, 8, 8, device="meta")
    assert augment.Augment()(images, generator(0)).device.type == "meta"


def test_autocast_does_not_change_views():
    images = image_sets.digits().images[:64]
    view = augment.Augment()(images, generator(1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.Augment()(images, generator(1)), view)


def test_every_image_has_its_own_draw():
    image = image_sets.digits().images[:1]
    view = augment.Augment()(image.expand(16, -1, -1, -1), generator(0))
    assert len(torch.unique(view.flatten(1), dim=0)) == 16


NOTHING = {"rotation": 0, "shift": 0, "zoom": 1, "shear": 0, "contrast": 0, "noise": 0, "erase": 0}


def test_strengths_of_zero_leave_the_images():
    images = torch.rand(5, 3, 12, 10)
    view = augment.Augment(**NOTHING)(images, generator(0))
    torch.testing.assert_close(view, images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strength", [s for s in NOTHING if s != "erase"])
def test_each_strength_changes_the_images(strength):
    images = torch.rand(5, 3, 12, 10)
    amount = {"rotation": 20.0, "zoom": 1.3}.get(strength, 0.2)
    view = augment.Augment(**{**NOTHING, strength: amount})(images, generator(0))
    assert (view - images).abs().flatten(1).max(dim=1).values.min() > 1e-3


def test_erasing_clears_one_rectangle_of_at_most_the_given_edge():
    images = torch.ones(64, 2, 16, 16)
    erased = augment.Augment(**{**NOTHING, "erase": 0.5})(images, generator(0)) < 0.5
    assert torch.equal(erased[:, 0], erased[:, 1])
    rows, columns = erased[:, 0].any(dim=2), erased[:, 0].any(dim=1)
    assert torch.equal(erased[:, 0], rows[:, :, None] & columns[:, None, :])
    assert rows.sum(dim=1).max() in (7, 8)
    assert columns.sum(dim=1).max() in (7, 8)


# Data


def test_split_keeps_proportions_and_loses_nothing():
    whole = image_sets.digits()
    first, second = image_sets.split(whole, 3)
    again, _ = image_sets.split(whole, 3)
    other, _ = image_sets.split(whole, 4)
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert len(first) + len(second) == len(whole) == 1797
    total = first.images.double().sum() + second.images.double().sum()
    torch.testing.assert_close(total, whole.images.double().sum())
    share = second.labels.bincount() / whole.labels.bincount()
    assert share.sub(0.2).abs().max() < 0.01


def paint(folder: Path, name: str, count: int, colour: tuple[int, int, int]) -> None:
    (folder / name).mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (20 + index, 16), colour).save(folder / name / f"{index}.png")


def test_image_folder_reads_every_class(tmp_path):
    paint(tmp_path, "red", 3, (255, 0, 0))
    paint(tmp_path, "blue", 2, (0, 0, 255))
    (tmp_path / "red" / "notes.txt").write_text("not an image")
    stored = image_files.stored("x", image_files.ImageFolder(tmp_path), 8)
    assert stored.classes == ("blue", "red")
    assert stored.labels.tolist() == [0, 0, 1, 1, 1]
    images = stored[range(5)]
    assert images.shape == (5, 3, 8, 8)
    assert torch.equal(images[0, :, 4, 4], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(images[4, :, 4, 4], torch.tensor([1.0, 0.0, 0.0]))


def test_image_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="takes a folder"):
        image_files.ImageFolder(tmp_path / "none")
    paint(tmp_path, "red", 1, (255, 0, 0))
    with pytest.raises(ValueError, match="1 sub-folders"):
        image_files.ImageFolder(tmp_path)
    (tmp_path / "blue").mkdir()
    (tmp_path / "blue" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
        image_files.stored("x", image_files.ImageFolder(tmp_path), 8)[range(2)]


# Training


def small(words: tuple[str, ...] = ()) -> config.Config:
    shape = ("training.batch=128", "model.expander=[64, 128]", "optimizer.rate=2e-3")
    return config.load("vicreg_digits", (*shape, *words))


def test_training_teaches_the_encoder(tmp_path):
    made = small(("training.steps=80",))
    sets = image_sets.split(image_sets.digits(), 0)
    method = build.method(made, 1)
    untrained = probe.calibrated(method, sets[0].images)
    losses: list[float] = []
    trainer = Trainer(made, method, Ranks(), tmp_path)
    trainer.fit(batches.ImageSource(sets[0], 128, 0), lambda step, loss, s: losses.append(loss))
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])

    def score(encoder):
        seen = [features(encoder, part.images) for part in sets]
        return probe.probe(*seen, *sets, seed=0, draws=4).few_labels

    assert score(method) > score(untrained) + 0.02


# Probe


def test_probe_separates_what_is_separable_and_no_more():
    labels = torch.arange(200) % 4
    apart = torch.nn.functional.one_hot(labels, 4) * 10.0 + torch.randn(200, 4)
    assert probe.accuracy(apart[:120], labels[:120], apart[120:], labels[120:]) == 1.0
    noise = torch.randn(200, 4)
    assert probe.accuracy(noise[:120], labels[:120], noise[120:], labels[120:]) < 0.6


def test_few_takes_so_many_of_each_class():
    labels = torch.arange(100) % 5
    index = probe.few(labels, 3, generator(0))
    assert labels[index].bincount().tolist() == [3] * 5
    assert len(index.unique()) == 15


def test_calibration_sets_the_copys_statistics():
    method = build.method(small(), 1)
    encoder, images = method.encoder, image_sets.digits().images[:200]
    calibrated = probe.calibrated(method, images).encoder
    assert torch.equal(encoder[1].running_mean, torch.zeros(32))
    torch.testing.assert_close(calibrated[1].running_mean, encoder[0](images).mean(dim=(0, 2, 3)))


# Measuring


def test_parity_sees_a_difference():
    losses = {
        "fused": lambda x, y: 1.01 * published.vicreg_loss(x, y),
        "reference": published.vicreg_loss,
    }
    comparison = parity.compare(losses, torch.randn(32, 48), torch.randn(32, 48))
    assert comparison.loss_between == pytest.approx(0.01, rel=1e-2)
    assert comparison.gradient_between == pytest.approx(0.01, rel=1e-2)
    assert comparison.loss_truth["reference"] < 1e-6
    assert comparison.gradient_truth["reference"] < 1e-5
    assert parity.worst([comparison, comparison]) == comparison


def test_worst_keeps_not_a_number():
    fine = parity.Parity(0.0, 0.0, {"fused": 0.0}, {"fused": 0.0})
    broken = parity.Parity(float("nan"), 0.0, {"fused": 1.0}, {"fused": 0.0})
    worst = parity.worst([fine, broken])
    assert np.isnan(worst.loss_between)
    assert worst.loss_truth == {"fused": 1.0}


def test_peak_memory_sees_what_is_freed_again():
    peak = memory.PeakMemory(torch.device("cpu"))
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    assert 63 << 20 <= peak.extra() <= 80 << 20


def test_interleaved_takes_turns():
    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleaved(actions, torch.device("cpu"), rounds=3, warmup=1)
    assert "".join(calls) == "abababab"
    assert [len(taken) for taken in seconds.values()] == [3, 3]
    assert timing.median_ratio([4.0, 6.0, 100.0], [2.0, 2.0, 1.0]) == 3.0


# The whole


@pytest.mark.parametrize("apart", [False, pytest.param(True, marks=pytest.mark.thorough)])
def test_the_digits_are_compared(tmp_path, capsys, monkeypatch, apart):
    """apart: each training and the comparison in a process of its own, not the memory's alone."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    if not apart:
        monkeypatch.setattr(digits, "in_own_process", lambda function, *words: function(*words))
        monkeypatch.setattr(demo_losses, "ROUNDS", 3)
    out = tmp_path / "out"
    words = ["training.steps=4", "training.save_every=2", "training.batch=32"]
    words += ["model.expander=[16, 48]", "--only", "digits", "--output", str(out)]
    with threadpool_limits(1):  # so little work is slower on two
        assert demo.main(words) == 0
    results = json.loads((out / "results.json").read_text())
    losses = results["training"]["losses"]
    assert [len(curve) for curve in losses.values()] == [4, 4]
    np.testing.assert_allclose(losses["fused"][0], losses["reference"][0], rtol=1e-6)
    # AdamW's first steps are near the gradients' signs, so that rounding grows fast.
    assert results["training"]["curves_apart"]["largest"] < 5e-3
    assert results["parity"]["moments"] == 3
    for error in (results["parity"]["worst"][k] for k in ("loss_between", "gradient_between")):
        assert 0 <= error < 1e-4
    # Three moments, not one three times.
    assert len({moment["loss_truth"]["reference"] for moment in results["parity"]["each"]}) == 3
    for measured in (results["throughput"]["step"], results["throughput"]["loss"]):
        assert all(rate > 0 for rate in measured["images_per_second"].values())
    assert all(size > 1 << 20 for size in results["memory"]["training"].values())
    with Image.open(out / "vicreg_digits.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    encoders = [load_file(out / f"encoder_{name}.safetensors") for name in losses]
    untrained = build.method(small(), 1).encoder.state_dict()
    for name in ("0.weight", "6.weight"):
        assert (encoders[0][name] - encoders[1][name]).abs().mean() < 1e-4
        assert (encoders[0][name] - untrained[name]).abs().max() > 1e-3

    printed = capsys.readouterr().out
    rows = {
        line[: table.LABEL].strip(): line[table.LABEL :].split() for line in printed.split("\n")
    }
    assert max(len(line) for line in table.render(results).split("\n")) <= table.WIDTH == 100
    assert all(line[table.LABEL - 1] == " " for line in printed.split("\n") if " lower " in line)
    for label in (
        "training step",
        "loss alone, forward + backward",
        "training, all of it",
        "loss, fused against reference",
        "gradient, fused against reference",
        "loss curves, largest difference at a step",
    ):
        assert any(character.isdigit() for character in rows[label][-1] + rows[label][-2]), label
    for label, who in (("trained encoder", "fused"), ("raw pixels", "pixels")):
        shown = rows[f"{label}, 10 labels a class"][2]
        assert shown == f"{100 * results['probe'][who]['few_labels']:.1f}"


def test_the_physics_are_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(physics, "in_own_process", lambda function, *words: function(*words))
    monkeypatch.setattr(physics, "QUADRUPLETS", 1)
    words = ["training.steps=1", "training.batch=2", "model.depth=1", "model.dim=48",
             "model.predictor_depth=1", "model.predictor_dim=48", "data.videos=2"]  # fmt: skip
    words += ["--only", "physics", "--output", str(tmp_path)]
    assert demo.main(words) == 0
    printed = capsys.readouterr().out
    for kind, least in (("png", 20_000), ("gif", 50_000)):
        assert str(tmp_path / f"permanence.{kind}") in printed
        assert (tmp_path / f"permanence.{kind}").stat().st_size > least
    assert f"vicreg-jepa surprise {tmp_path / 'vjepa_causal_physics'}" in printed
    assert any(f"permanence: {share} % of 1" in printed for share in (0, 50, 100))
    assert restore(tmp_path / "vjepa_causal_physics")[2] == 1


def test_the_world_is_planned_in(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(world, "in_own_process", lambda function, *words: function(*words))
    monkeypatch.setattr(world, "EPISODES", 4)
    words = ["training.steps=2", "training.batch=4", "model.dim=8", "model.keypoints=4",
             "model.latent=8", "model.predictor_dim=16"]  # fmt: skip
    assert demo.main([*words, "--only", "world", "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    for row in ("walk", "straight", "expert", "true dynamics", "world model, step 2"):
        assert any(line.startswith(row) and " of 4" in line for line in printed.splitlines()), row
    for name, least in (("plan.png", 20_000), ("plan.gif", 2_000)):
        assert str(tmp_path / name) in printed
        assert (tmp_path / name).stat().st_size > least
    assert restore(tmp_path / "world_two_rooms")[2] == 2


def test_a_slow_machine_takes_fewer_steps_and_says_so(capsys):
    made = config.load("vjepa_causal_physics", ["training.steps=700"])
    assert steps.within(made, 0.3, 210) == made
    assert steps.within(made, 1e-9, 210) == made
    assert capsys.readouterr().err == ""
    fewer = steps.within(made, 2.0, 210)
    assert fewer.training.steps == 105
    changed = {"training": {**config.describe(made)["training"], "steps": 105}}
    assert config.describe(fewer) == config.describe(made) | changed
    assert "a step takes 2.00 s on this machine" in capsys.readouterr().err
    assert steps.within(made, 1e9, 210).training.steps == 1


@pytest.mark.parametrize("slow", [True, False])
def test_the_physics_are_in_float32_where_bfloat16_is_slow(tmp_path, monkeypatch, slow):
    monkeypatch.setattr(physics.trainer, "bfloat16_is_slow", lambda device: slow)
    monkeypatch.setattr(steps, "in_own_process", lambda function, *words: 1e-6)
    made = physics.settings(tmp_path, [])
    assert made.training.precision == ("float32" if slow else "bfloat16")
    assert made.training.steps == physics.STEPS
    asked = physics.settings(tmp_path, ["training.precision=bfloat16", "training.steps=9"])
    assert (asked.training.precision, asked.training.steps) == ("bfloat16", 9)


def test_the_time_of_a_step_is_measured():
    words = ["training.steps=1", "training.batch=2", "model.depth=1", "model.dim=48",
             "model.predictor_depth=1", "model.predictor_dim=48", "data.videos=2"]  # fmt: skip
    made = config.load("vjepa_causal_physics", [*words, "training.precision=float32"])
    assert 1e-4 < steps.seconds_of_a_step(config.describe(made)) < 60


@pytest.mark.parametrize("slow", [True, False])
def test_a_run_in_bfloat16_on_a_cpu_without_it_is_warned(tmp_path, monkeypatch, capsys, slow):
    monkeypatch.setattr(run, "bfloat16_is_slow", lambda device: slow)
    for precision in ("bfloat16", "float32"):
        words = ["training.steps=1", f"training.precision={precision}", "training.batch=64"]
        train(config.load("vicreg_digits", words), tmp_path / precision)
        warned = "training.precision: this CPU" in capsys.readouterr().err
        assert warned == (slow and precision == "bfloat16")


def exit_code(words: list[str]) -> object:
    try:
        return demo.main(words)
    except SystemExit as stopped:  # argparse's
        return stopped.code


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["training.steps=3"], "training.steps=3: takes --only"),
        (["--only", "sound"], "--only: invalid choice: 'sound'"),
        (["--output", __file__], "a file; takes a folder"),
        (["--only", "digits", "training.steps=0"], "training.steps: got 0"),
        (["--only", "digits", "method=lejepa"], "method: got 'lejepa', the demo takes 'vicreg'"),
        (["--only", "digits", "kernels=reference"], "kernels: got 'reference', the demo trains"),
        (["--only", "digits", "backend=cuda"], "backend='cuda' cannot run vicreg here"),
        (["--only", "digits", "training.device=tpu9"], "training.device: got 'tpu9'"),
        (["--only", "digits", "data.kind=images", "data.path=none"], "takes a folder"),
        (["--only", "physics", "model.heads=0"], "model.heads: got 0"),
        (["--only", "world", "data.world=Garden"], "data.world: got 'Garden'"),
    ],
)
def test_mistakes_are_named(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert exit_code(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    made = small(("training.device=cuda:99",))
    with pytest.raises(ValueError, match="got 'cuda:99', but torch sees 2 GPUs"):
        Trainer(made, build.method(made, 1), Ranks(), tmp_path)


def test_a_package_that_is_missing_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vicreg_jepa.demo", None)
    assert demo.main(["--only", "digits"]) == 2
    assert "pip install 'vicreg-kernels[trainer]'" in capsys.readouterr().err


def test_a_memory_too_small_to_be_seen_gives_no_ratio():
    for reference, fused in ((0.0, 8.0), (8.0, 0.0)):
        assert table.less({"reference": reference, "fused": fused}) == ""
    assert table.less({"reference": 1.0, "fused": 4.0}) == "4.0x more"
    assert table.less({"reference": 8.0, "fused": 4.0}) == "2.0x less"
    assert table.less({"reference": 8.0, "fused": 8.1}) == "1.0x"
