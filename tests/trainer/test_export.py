"""`vicreg-jepa export`, and what loads its files: vicreg_jepa.load_encoder, timm, plain torch."""

from __future__ import annotations

import importlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vicreg_jepa import cli, load_encoder
from vicreg_jepa.data import batches, sources
from vicreg_jepa.evaluation import drift
from vicreg_jepa.training import export
from vicreg_jepa.training.run import restore

from tests.helpers import timm_alone

SMALL = ["training.steps=2", "training.batch=4", "training.save_every=2"]
VIT = ["model.dim=32", "model.depth=2", "model.heads=2"]
RUNS = {
    "vicreg": ["vicreg_digits", "model.dim=16", "model.expander=[16,32]"],
    "resnet": ["vicreg_digits", "model.encoder=resnet18_small", "model.dim=16",
               "model.expander=[16,32]"],
    "vicreg_vit": ["vicreg_digits", "model.encoder=vit", "model.expander=[16,32]", *VIT],
    "ijepa": ["ijepa_digits", *VIT, "model.predictor_dim=32", "model.predictor_heads=2"],
    "vjepa": ["vjepa_physics", *VIT, "model.predictor_dim=32", "model.predictor_heads=2",
              "model.predictor_depth=1", "data.videos=4"],
    "world": ["world_two_rooms", "model.dim=8", "model.keypoints=4", "model.latent=8",
              "model.predictor_dim=16", "data.window=6", "loss.unroll=4", "loss.pairs=2"],
    "world_pixels": ["world_two_rooms_pixels", "model.dim=8", "model.keypoints=4",
                     "model.predictor_dim=16", "data.window=6"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("export")


def trained(folder, name):
    run = folder / name
    if not run.exists():
        words = list(RUNS[name])
        if name == "vjepa":
            words.append(f"data.path={folder / 'videos'}")
        assert cli.main(["train", *words, *SMALL, "--output", str(run)]) == 0
    return run


def samples(settings, channels):
    torch.manual_seed(1)
    size = settings.data.size
    if settings.is_of_trajectories:
        return torch.randint(0, 256, (3, size, size, channels), dtype=torch.uint8)
    shape = (settings.data.frames,) if settings.is_video else ()
    return torch.rand(3, channels, *shape, size, size)


@pytest.mark.parametrize("name", RUNS)
def test_a_loaded_encoder_gives_the_run_s_features(folder, name, tmp_path):
    run, file = trained(folder, name), tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(run), str(file)]) == 0
    settings, method, step = restore(run)
    before = torch.random.get_rng_state()
    encoder = load_encoder(file)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (encoder.step, encoder.settings, encoder.training) == (step, settings, False)
    seen = samples(settings, method.channels)
    with torch.no_grad():
        wanted = method.features(seen)
        assert torch.equal(encoder(seen), wanted)
    with pytest.raises(ValueError, match=r"^samples: got shape \[3, "):
        encoder(seen[:, :-1])
    if settings.model.encoder.startswith(("conv", "resnet")) and seen.is_floating_point():
        assert encoder(seen.repeat(1, 1, 2, 2)).shape == wanted.shape  # images of any size
    with pytest.raises(ValueError, match=r"^samples: got shape \["):
        encoder(seen[0])
    # The weights were loaded, and all of them: the encoder before the training differs.
    state = encoder.state_dict()
    assert {name.removeprefix("network.") for name in state} == set(load_file(file))
    for tensor in state.values():
        tensor.zero_()
    with torch.no_grad():
        assert not torch.equal(encoder(seen), wanted)


@pytest.fixture
def timm():
    """timm's module of ViTs."""
    with timm_alone.importable():
        yield importlib.import_module("timm.models.vision_transformer")


@pytest.mark.parametrize("name", ["ijepa", "vicreg_vit"])
def test_timm_gives_the_same_features(folder, name, tmp_path, timm):
    run, file = trained(folder, name), tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(run), str(file), "--format", "timm"]) == 0
    with safe_open(file, "pt") as opened:
        arguments = json.loads(opened.metadata()["timm"])
    vit = timm.VisionTransformer(**arguments).eval()
    vit.load_state_dict(load_file(file))
    settings, method, _ = restore(run)
    seen = samples(settings, method.channels)
    with torch.no_grad():
        torch.testing.assert_close(vit(seen), method.features(seen), rtol=1e-4, atol=1e-5)


def test_plain_torch_loads_a_conv_encoder(folder, tmp_path):
    run, file = trained(folder, "vicreg"), tmp_path / "encoder.safetensors"
    assert cli.main(["export", str(run), str(file)]) == 0
    layers = []
    for inward, outward, stride in ((1, 4, 1), (4, 8, 2), (8, 16, 1)):
        layers += [torch.nn.Conv2d(inward, outward, 3, stride, 1, bias=False),
                   torch.nn.BatchNorm2d(outward), torch.nn.GELU()]  # fmt: skip
    plain = torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()).eval()
    plain.load_state_dict(load_file(file))
    images, _ = sources.images(restore(run)[0])
    seen = next(batches.in_order(images, 5, 0))
    with torch.no_grad():
        torch.testing.assert_close(plain(seen), restore(run)[1].features(seen))


def test_only_vits_of_images_are_timm_s(folder, tmp_path, capsys):
    for name in ("vicreg", "vjepa", "world"):
        words = ["export", str(trained(folder, name)), str(tmp_path / "x"), "--format", "timm"]
        assert cli.main(words) == 2
        assert "--format: got 'timm', but the encoder of" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_other_files_are_refused(folder, tmp_path):
    run, file = trained(folder, "ijepa"), tmp_path / "encoder.safetensors"
    with pytest.raises(ValueError, match=r"^file: "):
        load_encoder(tmp_path / "none")
    (tmp_path / "text").write_text("no tensors")
    with pytest.raises(ValueError, match=r"^file: .* is no intact safetensors file"):
        load_encoder(tmp_path / "text")
    save_file({"x": torch.zeros(1)}, tmp_path / "bare")
    with pytest.raises(
        ValueError, match=r"^file: .* has the metadata \[\] and the kind None, takes"
    ):
        load_encoder(tmp_path / "bare")
    assert cli.main(["export", str(run), str(file), "--format", "timm"]) == 0
    with pytest.raises(ValueError, match="--format own"):
        load_encoder(file)
    assert cli.main(["export", str(run), str(file)]) == 0
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    tensors = load_file(file)
    tensors.pop("norm.weight")
    save_file(tensors, file, metadata=about)
    with pytest.raises(ValueError, match="does not fit its configuration"):
        load_encoder(file)


@pytest.mark.parametrize("name", ["vjepa", "world"])
def test_a_whole_method_is_the_run_s_in_float16(folder, name, tmp_path):
    run, file = trained(folder, name), tmp_path / "whole.safetensors"
    assert cli.main(["export", str(run), str(file), "--format", "whole"]) == 0
    settings, method, step = restore(run)
    its_settings, loaded, its_step = restore(file)
    assert (its_settings, its_step, loaded.training) == (settings, step, False)
    state = loaded.state_dict()
    assert state.keys() == method.state_dict().keys()
    for key, z in method.state_dict().items():
        assert torch.equal(state[key], z.half().float() if z.is_floating_point() else z)
    assert file.stat().st_size < 0.6 * sum(z.nbytes for z in state.values()) + 20_000


def test_a_whole_method_that_float16_cannot_hold(folder, tmp_path):
    settings, method, step = restore(trained(folder, "world"))
    next(method.parameters()).data.view(-1)[0] = 1e6
    with pytest.raises(ValueError, match=r"beyond float16's range"):
        export.write(settings, method, step, tmp_path / "whole.safetensors", "whole")
    assert not list(tmp_path.iterdir())


def test_files_of_other_kinds(folder, tmp_path, capsys):
    run, encoder = trained(folder, "world"), tmp_path / "encoder.safetensors"
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert cli.main(["export", str(run), str(encoder)]) == 0
    assert cli.main(["export", str(run), str(whole), "--format", "whole"]) == 0
    with pytest.raises(ValueError, match=r"^file: .*takes a file of `.* --format own`"):
        load_encoder(whole)
    capsys.readouterr()
    assert cli.main(["plan", str(encoder)]) == 2
    assert "--format whole`" in capsys.readouterr().err
    tensors = load_file(whole)
    with safe_open(whole, "pt") as opened:
        about = opened.metadata()
    for wrong in ({"channels": "two"}, {"config": "{"}, {"step": ""}):
        save_file(tensors, tmp_path / "wrong", metadata=about | wrong)
        assert cli.main(["plan", str(tmp_path / "wrong")]) == 2
        assert "wrong has damaged metadata" in capsys.readouterr().err
    cut.write_bytes(whole.read_bytes()[:-100])
    assert cli.main(["plan", str(cut)]) == 2
    assert "no intact safetensors file" in capsys.readouterr().err


def test_other_forms_and_weights_that_are_not_finite(folder, tmp_path):
    settings, method, step = restore(trained(folder, "world"))
    with pytest.raises(ValueError, match=r"^form: got 'Whole', takes own, timm, whole"):
        export.write(settings, method, step, tmp_path / "whole.safetensors", "Whole")
    next(method.parameters()).data.view(-1)[0] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        export.write(settings, method, step, tmp_path / "whole.safetensors", "whole")


def test_pictures_of_a_file_are_in_the_current_folder(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(drift, "FITTED", 500)
    monkeypatch.setattr(drift, "PROBE_STEPS", 20)
    whole, place = tmp_path / "files/whole.safetensors", tmp_path / "here"
    whole.parent.mkdir()
    place.mkdir()
    assert cli.main(["export", str(trained(folder, "world")), str(whole), "--format", "whole"]) == 0
    monkeypatch.chdir(place)
    assert cli.main(["drift", str(whole), "--walks", "2"]) == 0
    assert "whole, step 2" in capsys.readouterr().out
    assert [path.name for path in place.iterdir()] == ["drift"]
    assert [path.name for path in whole.parent.iterdir()] == [whole.name]
    assert cli.main(["plan", str(trained(folder, "vjepa"))]) == 2  # no world: no folder is made
    assert [path.name for path in place.iterdir()] == ["drift"]


@pytest.mark.parametrize("words", [["plan"], ["surprise"], ["surprise", "RUN", "--pretrained"]])
def test_a_run_or_the_package_s_model(folder, words, capsys):
    run = str(trained(folder, "world"))
    assert cli.main([run if word == "RUN" else word for word in words]) == 2
    assert "takes a run or --pretrained" in capsys.readouterr().err
