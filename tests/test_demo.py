"""The trainer: its parts one by one, and the demo from end to end in a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jepa import augment, data, demo, memory, parity, plain, probe, table, timing, train, vicreg
from PIL import Image

import vicreg_kernels

CPU = torch.device("cpu")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The published formula


@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (16, 16), (24, 67), (130, 31)])
def test_plain_is_the_reference_in_float64(shape):
    x, y = (torch.randn(shape, dtype=torch.float64).mul_(s).requires_grad_() for s in (0.9, 1.1))
    ours = plain.vicreg_loss(x, y)
    theirs = vicreg_kernels.vicreg_loss(x, y, backend="reference")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    for found, wanted in zip(
        torch.autograd.grad(ours, (x, y)), torch.autograd.grad(theirs, (x, y)), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * wanted.abs().max())


def test_off_diagonal_leaves_out_the_diagonal_alone():
    square = torch.arange(16.0).view(4, 4)
    wanted = [v for v in range(16) if v % 5]
    assert plain.off_diagonal(square).tolist() == wanted


# Views


def test_views_depend_on_the_seed_alone_and_stay_images():
    images = data.digits().images[:64]
    before = images.clone()
    view = augment.Augment()(images, generator(1))
    assert torch.equal(view, augment.Augment()(images, generator(1)))
    assert not torch.equal(view, augment.Augment()(images, generator(2)))
    assert torch.equal(images, before)
    assert view.shape == images.shape
    assert view.dtype == images.dtype
    assert view.min() >= 0
    assert view.max() <= 1


def test_every_image_has_its_own_draw():
    image = data.digits().images[:1]
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
    whole = data.digits()
    first, second = data.split(whole, 3)
    again, _ = data.split(whole, 3)
    other, _ = data.split(whole, 4)
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
    found = data.image_folder(tmp_path, 8)
    assert found.classes == ("blue", "red")
    assert found.labels.tolist() == [0, 0, 1, 1, 1]
    assert found.images.shape == (5, 3, 8, 8)
    assert torch.equal(found.images[0, :, 4, 4], torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(found.images[4, :, 4, 4], torch.tensor([1.0, 0.0, 0.0]))


def test_image_folder_says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match="takes a folder"):
        data.image_folder(tmp_path / "none")
    paint(tmp_path, "red", 1, (255, 0, 0))
    with pytest.raises(ValueError, match="1 sub-folders"):
        data.image_folder(tmp_path)
    (tmp_path / "blue").mkdir()
    (tmp_path / "blue" / "broken.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"broken\.png is not an image"):
        data.image_folder(tmp_path)


# Training


def test_batches_give_each_image_once_an_epoch():
    images = torch.arange(10.0).view(10, 1, 1, 1)
    source = train.batches(images, 3, seed=0)
    epochs = [torch.cat([next(source) for _ in range(3)]).flatten() for _ in range(2)]
    assert all(len(epoch.unique()) == 9 for epoch in epochs)
    assert not torch.equal(*epochs)
    with pytest.raises(ValueError, match="batch: got 11, takes 2 to 10"):
        next(train.batches(images, 11, seed=0))


def test_schedule_rises_then_falls_to_nothing():
    schedule = train.Schedule(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [schedule.rate(step) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] < 1e-3


def short_run(loss_name: str, seed: int, steps: int, dim: int = 64) -> tuple[train.Trainer, list]:
    train_set, _ = data.split(data.digits(), 0)
    method = vicreg.build(1, dim, 64, vicreg.loss_named(loss_name), seed)
    trainer = train.Trainer(method, train.Schedule(steps), CPU, seed)
    return trainer, train.fit(trainer, train_set.images, 128, seed, "test").losses


def test_runs_repeat_by_seed_and_follow_each_other():
    fused, again, other = (short_run("fused", seed, 6)[1] for seed in (0, 0, 1))
    assert fused == again
    assert fused != other
    reference = short_run("reference", 0, 6)[1]
    np.testing.assert_allclose(fused[0], reference[0], rtol=1e-6)
    # AdamW's first steps are near the gradients' signs, so that rounding grows fast.
    np.testing.assert_allclose(fused, reference, rtol=5e-3)


def test_training_teaches_the_encoder():
    train_set, test_set = data.split(data.digits(), 0)
    trainer, losses = short_run("fused", 0, 80, dim=128)
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])

    def score(encoder):
        features = [probe.features(encoder, part.images) for part in (train_set, test_set)]
        return probe.probe(*features, train_set, test_set, seed=0, draws=4).few_labels

    fresh = vicreg.build(1, 128, 64, plain.vicreg_loss, 0).encoder
    untrained = score(probe.calibrated(fresh, train_set.images))
    assert score(trainer.method.encoder) > untrained + 0.02


def test_a_loss_that_is_not_finite_stops_the_run():
    method = vicreg.build(1, 8, 8, lambda x, y: (x - y).sum() * float("nan"), 0)
    trainer = train.Trainer(method, train.Schedule(2), CPU, 0)
    with pytest.raises(FloatingPointError, match="step 0 is nan"):
        train.fit(trainer, data.digits().images[:32], 16, 0, "test")


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
    encoder = vicreg.build(1, 8, 8, plain.vicreg_loss, 0).encoder
    images = data.digits().images[:200]
    calibrated = probe.calibrated(encoder, images)
    assert torch.equal(encoder[1].running_mean, torch.zeros(32))
    torch.testing.assert_close(calibrated[1].running_mean, encoder[0](images).mean(dim=(0, 2, 3)))


# Measuring


def test_parity_sees_a_difference():
    losses = {"fused": lambda x, y: 1.01 * plain.vicreg_loss(x, y), "reference": plain.vicreg_loss}
    found = parity.compare(losses, torch.randn(32, 48), torch.randn(32, 48))
    assert found.loss_between == pytest.approx(0.01, rel=1e-2)
    assert found.gradient_between == pytest.approx(0.01, rel=1e-2)
    assert found.loss_truth["reference"] < 1e-6
    assert found.gradient_truth["reference"] < 1e-5
    assert parity.worst([found, found]) == found


def test_worst_keeps_not_a_number():
    fine = parity.Parity(0.0, 0.0, {"fused": 0.0}, {"fused": 0.0})
    broken = parity.Parity(float("nan"), 0.0, {"fused": 1.0}, {"fused": 0.0})
    worst = parity.worst([fine, broken])
    assert np.isnan(worst.loss_between)
    assert worst.loss_truth == {"fused": 1.0}


def test_peak_memory_sees_what_is_freed_again():
    peak = memory.PeakMemory(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    del held
    assert 63 << 20 <= peak.extra() <= 80 << 20


def test_interleaved_takes_turns():
    calls: list[str] = []
    actions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleaved(actions, CPU, rounds=3, warmup=1)
    assert "".join(calls) == "abababab"
    assert [len(taken) for taken in seconds.values()] == [3, 3]
    assert timing.median_ratio([4.0, 6.0, 100.0], [2.0, 2.0, 1.0]) == 3.0


# The whole


SMALL = ["--steps", "4", "--batch", "32", "--dim", "48", "--hidden", "16"]


@pytest.fixture
def one_thread(monkeypatch):
    """For the demo's own processes: so little work is slower on two."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_demo_compares_both_losses(tmp_path, capsys, one_thread):
    demo.main([*SMALL, "--output", str(tmp_path / "out")])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    losses = results["training"]["losses"]
    np.testing.assert_allclose(losses["fused"][0], losses["reference"][0], rtol=1e-6)
    assert len(losses["fused"]) == 4
    assert results["training"]["curves_apart"]["largest"] < 5e-3
    assert results["parity"]["moments"] == 4
    for error in (results["parity"]["worst"][k] for k in ("loss_between", "gradient_between")):
        assert 0 <= error < 1e-4
    for measured in (results["throughput"]["step"], results["throughput"]["loss"]):
        assert all(rate > 0 for rate in measured["images_per_second"].values())
    assert all(size > 1 << 20 for size in results["memory"]["training_peak_bytes"].values())
    with Image.open(tmp_path / "out" / "vicreg_digits.png") as picture:
        assert picture.format == "PNG"
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50
    for name in ("fused", "reference"):
        assert (tmp_path / "out" / f"encoder_{name}.pt").exists()

    printed = capsys.readouterr().out
    rows = {
        line[: table.LABEL].strip(): line[table.LABEL :].split() for line in printed.split("\n")
    }
    assert max(len(line) for line in table.render(results).split("\n")) <= table.WIDTH == 100
    for label in (
        "training step",
        "loss alone, forward + backward",
        "loss alone, above its two inputs",
        "loss, fused against reference",
        "gradient, fused against reference",
        "loss curves, largest difference at a step",
    ):
        assert any(character.isdigit() for character in rows[label][-1] + rows[label][-2]), label
    for label, who in (("trained encoder", "fused"), ("raw pixels", "pixels")):
        shown = rows[f"{label}, 10 labels a class"][2]
        assert shown == f"{100 * results['probe'][who]['few_labels']:.1f}"


def test_demo_runs_one_loss(tmp_path, capsys, one_thread):
    demo.main([*SMALL, "--loss", "reference", "--output", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["training"]["losses"]) == ["reference"]
    assert results["parity"] is None
    assert results["environment"]["backend"] is None
    assert "fused" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: got '0', takes an integer from 1"),
        (["--batch", "one"], "--batch: got 'one', takes an integer from 2"),
        (["--batch", "5000"], "--batch: got 5000, takes at most 1438"),
        (["--dim", "1"], "--dim: got '1'"),
        (["--seed", "-1"], "--seed: got '-1'"),
        (["--loss", "barlow"], "--loss: invalid choice: 'barlow'"),
        (["--backend", "metal"], "--backend: invalid choice: 'metal'"),
        (["--backend", "cuda"], "backend='cuda' cannot run vicreg here"),
        (["--backend", "cpu", "--loss", "reference"], "--backend: names the fused loss's"),
        (["--device", "tpu9"], "--device: got 'tpu9'"),
        (["--device", "meta"], "--device: got 'meta', takes cpu or cuda"),
        (["--device", "cuda:99"], "--device: got 'cuda:99', but torch sees"),
        (["--images", "no/such/folder"], "takes a folder"),
        (["--output", __file__], "a file; takes a folder"),
    ],
)
def test_bad_options_are_named(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        demo.main(options)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_memory_too_small_to_be_seen_gives_no_ratio():
    for reference, fused in ((0.0, 8.0), (8.0, 0.0)):
        ratio = table._ratio({"reference": reference, "fused": fused})
        assert table._times(ratio, "less", "more") == ""
    assert (
        table._times(table._ratio({"reference": 1.0, "fused": 4.0}), "less", "more") == "4.0x more"
    )
