"""Images that stay on the disk: the same batches by seed and step however they are read."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from vicreg_jepa import cli, config
from vicreg_jepa.data import batches, image_files, image_sets, sources
from vicreg_jepa.files import tar_index
from vicreg_jepa.training import checkpoint

SMALL = ["training.batch=8", "training.steps=2", "model.dim=8", "model.expander=[8, 16]"]


def shade(number: int) -> tuple[int, int, int]:
    return 8 * number, 255 - 8 * number, 40


def picture(number: int, format: str = "PNG") -> bytes:
    packed = io.BytesIO()
    Image.new("RGB", (20 + number, 16), shade(number)).save(packed, format)
    return packed.getvalue()


def number_of(image: torch.Tensor) -> int:
    return round(float(image[0].mean()) * 255 / 8)


def folder_of(root: Path, each: int = 6) -> Path:
    for number in range(2 * each):
        place = root / ("ab"[number // each])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:02d}.png").write_bytes(picture(number))
    return root


def write(path: Path, files: dict[str, bytes], format: int = tarfile.USTAR_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as shard:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


@pytest.fixture
def shards(tmp_path) -> Path:
    """Three shards of four: .cls, .json with `label`, .json with `cls`; names that tar extends."""
    folder = tmp_path / "shards"
    for shard in range(3):
        files = {}
        for number in range(4 * shard, 4 * shard + 4):
            key = f"{'deep' * 30}/v1.0/{number:04d}"
            files[f"{key}.{('png', 'webp', 'JPG')[shard]}"] = picture(
                number, ("PNG", "WEBP", "JPEG")[shard]
            )
            label = number % 2
            name, content = (
                ("cls", f"{label}\n"),
                ("json", json.dumps({"label": label})),
                ("json", json.dumps({"cls": label, "caption": "x"})),
            )[shard]
            files[f"{key}.{name}"] = content.encode()
        write(folder / f"part-{shard:03d}.tar", files, tarfile.PAX_FORMAT)
    return folder


def settings(method: str, *words: str) -> config.Config:
    own = [word for word in SMALL if method != "ijepa" or "expander" not in word]
    return config.load(f"{method}_digits", config.layered(own, words))


def test_batches_depend_on_seed_and_step_alone(tmp_path):
    root = folder_of(tmp_path)
    words = ("data.kind=images", f"data.path={root}", "data.size=8", "training.batch=4")
    alone = sources.source(
        settings("ijepa", "model.patch=2", "model.heads=1", "model.dim=16", *words)
    )
    whole = list(islice(alone.batches(0, batches.Share()), 7))
    many = sources.source(
        settings(
            "ijepa", "model.patch=2", "model.heads=1", "model.dim=16", "data.workers=2", *words
        )
    )
    for start in (0, 3):
        later = islice(many.batches(start, batches.Share()), 4)
        assert all(torch.equal(a, b) for a, b in zip(later, whole[start:], strict=False))
    ranks = [islice(many.batches(5, batches.Share(rank, 2)), 2) for rank in (0, 1)]
    for batch, parts in zip(whole[5:], zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), batch)
    # views are drawn for the whole batch: every rank takes it
    views = sources.source(settings("vicreg", *words))
    assert torch.equal(next(views.batches(6, batches.Share(1, 2))), whole[6])
    # the batch that collapse is measured on is of all classes
    assert [number_of(image) for image in alone.sample(3)] == [
        number_of(image) for image in alone.images[[0, 4, 9]]
    ]


def test_a_stored_folder_is_the_one_in_memory(tmp_path):
    root = folder_of(tmp_path)
    stored = image_files.stored("x", image_files.ImageFolder(root), 8)
    held = image_sets.Images("x", stored[range(12)], stored.labels, stored.classes)
    for ours, theirs in zip(image_sets.split(stored, 3), image_sets.split(held, 3), strict=True):
        assert torch.equal(ours[range(len(ours))], theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_a_corrupt_image_is_named_by_the_worker_that_reads_it(tmp_path):
    bad = folder_of(tmp_path) / "b" / "07.png"
    bad.write_bytes(bad.read_bytes()[:60])
    stored = image_files.stored("x", image_files.ImageFolder(tmp_path), 8)
    with pytest.raises(ValueError, match=r"b/07\.png is truncated"):
        list(batches.in_order(stored, 5, workers=1))


def test_shards_train_and_are_probed(shards, tmp_path, capsys):
    run = str(tmp_path / "run")
    words = [*SMALL, "data.kind=webdataset", f"data.path={shards}/part-{{000..001}}.tar",
             f"data.test={shards}/part-*2.tar", "data.size=8"]  # fmt: skip
    assert cli.main(["train", "vicreg_digits", *words, "--output", run]) == 0
    assert cli.main(["probe", run]) == 0
    assert "linear probe" in capsys.readouterr().out
    # a checkpoint from before a setting existed can be resumed: the setting has its default
    (state,) = Path(run).glob("checkpoints/*/state.json")
    held = json.loads(state.read_text())
    del held["state"]["config"]["data"]["decoder"]
    state.write_text(json.dumps(checkpoint.sealed(held)))
    assert cli.main(["train", "vicreg_digits", *words, "--output", run]) == 0
    assert "resuming at step 2" in capsys.readouterr().err
    train, held_out = sources.images(settings("vicreg", *words))
    assert [number_of(i) for i in train[range(8)]] == list(range(8))
    assert [number_of(i) for i in held_out[range(4)]] == [8, 9, 10, 11]
    assert train.labels.tolist() == [0, 1] * 4
    assert held_out.labels.tolist() == [0, 1] * 2
    # without a test set a fifth is held out, and no label is asked for
    over = config.layered(words, ["data.test=", f"data.path={shards}"])
    train, held_out = sources.images(settings("vicreg", *over))
    seen = [[number_of(i) for i in part[range(len(part))]] for part in (train, held_out)]
    assert [len(part) for part in seen] == [10, 2]
    assert sorted(seen[0] + seen[1]) == list(range(12))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"0.txt": b""}, r"a\.tar': sample '0' has \.txt, takes one of .*\.png"),
        ({"0.left.png": picture(0)}, r"a\.tar': sample '0' has \.left\.png, takes one of"),
        ({"0.png": b"", "0.PNG": b""}, r"a\.tar': holds '0.PNG' twice"),
        ({"0.png": b"no image"}, r"a\.tar', sample '0' is not an image Pillow reads"),
        ({"0.png": picture(0), "0.cls": b"cat"}, r"a\.tar', sample '0': has no label"),
        ({"0.png": picture(0), "0.json": b"{}"}, r"a\.tar', sample '0': has no label"),
        ({"0.png": picture(0)}, r"a\.tar', sample '0': has no label"),
    ],
)
def test_what_is_wrong_in_a_shard_is_named(files, message, tmp_path):
    write(tmp_path / "a.tar", files)

    def read() -> None:
        stored = image_files.stored("x", image_files.ImageShards(tmp_path), 8)
        assert stored[[0]].shape == (1, 3, 8, 8)
        assert stored.labels is None

    with pytest.raises(ValueError, match=message):
        read()


def test_a_truncated_shard_is_named(tmp_path):
    path = tmp_path / "a.tar"
    write(path, {f"{n}.png": picture(n) for n in range(30)})
    whole = path.read_bytes()
    (place,) = tar_index.index(path)[7].files.values()
    for size in (0, 1, place[0] - 512, place[0] + 10, 10240):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"a\.tar' is truncated"):
            tar_index.index(path)


@pytest.fixture
def tars_named(tmp_path, monkeypatch):
    for name in ("x-08", "x-09", "x-10", "y-7"):
        write(tmp_path / f"{name}.tar", {})
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("pattern", "stems"),
    [
        (".", ["x-08", "x-09", "x-10", "y-7"]),
        ("x-{08..10}.tar", ["x-08", "x-09", "x-10"]),
        ("{y-7,x-{10,09}}.tar", ["y-7", "x-10", "x-09"]),
        ("x-*.tar", ["x-08", "x-09", "x-10"]),
    ],
)
def test_shards_are_named_by_folder_braces_and_stars(pattern, stems, tars_named):
    assert [path.stem for path in tar_index.paths(pattern)] == stems


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("{y,x}-{7..7}.tar", r"'x-7\.tar' is no file"),
        ("x-{9..10}.tar", r"'x-9\.tar' is no file"),
        ("z*.tar", r"'z\*\.tar' is no file"),
        ("x-{08}.tar", "braces take"),
        ("x-{10..08}.tar", "braces take"),
    ],
)
def test_shards_that_are_not_there_are_named(pattern, message, tars_named):
    with pytest.raises(ValueError, match=r"data\.path or data\.test: got .*" + message):
        tar_index.paths(pattern)


class ByTrain:
    """Of torchvision's interface: what its sets have in common."""

    def __init__(self, root, train=True, transform=None, target_transform=None, download=False):
        if not (download or Path(root).is_dir()):
            raise RuntimeError("Dataset not found. You can use download=True to download it")
        self.numbers = range(12) if train else range(12, 16)
        self.targets = [number % 3 for number in self.numbers]

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, at):
        return Image.new("RGB", (9, 9), shade(self.numbers[at])), self.numbers[at] % 3


class BySplit(ByTrain):
    def __init__(self, root, split="trainval", transform=None):
        if split not in ("trainval", "test"):
            raise ValueError(f"Unknown value '{split}' for argument split")
        super().__init__(root, split == "trainval")
        del self.targets


class WithLabels(ByTrain):
    def __init__(self, root, train=True):
        super().__init__(root, train)
        self.labels = np.array(self.targets)
        del self.targets

    def __getitem__(self, at):
        return super().__getitem__(at)[0], None  # read for its picture alone


class Boxes(ByTrain):
    def __init__(self, root, boxes, train=True):
        super().__init__(root, train)


@pytest.fixture
def torchvision(monkeypatch):
    """torchvision's place in sys.modules: it is not installed where the tests run."""
    package, sets = ModuleType("torchvision"), ModuleType("torchvision.datasets")
    for kind in (ByTrain, BySplit, WithLabels, Boxes):
        setattr(sets, kind.__name__, kind)
    package.datasets = sets
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", sets)


@pytest.mark.parametrize("name", ["ByTrain", "BySplit", "WithLabels"])
def test_torchvisions_sets(name, torchvision, tmp_path):
    words = ("data.kind=torchvision", f"data.name={name}", f"data.path={tmp_path}", "data.size=8")
    train, test = sources.images(settings("vicreg", *words))
    assert [number_of(i) for i in train[range(12)]] == list(range(12))
    assert [number_of(i) for i in test[[0, 3]]] == [12, 15]
    assert train.labels.tolist() == [0, 1, 2] * 4
    assert test.labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("name", "download", "error", "message"),
    [
        ("ByTrain", False, ValueError, r"Dataset not found.*here: data\.download=true"),
        ("BySplit", True, ValueError, "data.download: torchvision's BySplit takes false"),
        ("Boxes", False, ValueError, "data.name: got 'Boxes', takes a class"),
        ("Nothing", False, ValueError, "data.name: got 'Nothing', takes a class"),
    ],
)
def test_what_torchvision_cannot_give_is_named(name, download, error, message, torchvision):
    with pytest.raises(error, match=message):
        image_files.torchvision(name, Path("/nowhere"), 8, download)


def test_download_is_asked_for_and_torchvision_is_optional(torchvision, monkeypatch):
    train, _ = image_files.torchvision("ByTrain", Path("/nowhere"), 8, True)
    assert len(train) == 12
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(ImportError, match="torchvision cannot be imported, pip install"):
        image_files.torchvision("ByTrain", Path("/nowhere"), 8, False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data.kind=shards"], "data.kind: got 'shards'"),
        (["data.kind=torchvision", "data.path=x"], "name: missing, takes a set of torchvision's"),
        (["data.kind=webdataset"], "path: missing"),
        (["data.path=x"], "path: got 'x', but it is used by data.kind images, torchvision"),
        (
            ["data.videos=3"],
            "videos: got '3', but it is used by data.kind physics, not by",
        ),
        (["data.kind=images", "data.path=x", "data.name=y"], "name: got 'y'"),
        (["data.kind=images", "data.path=x", "data.download=true"], "download: got 'True'"),
        (["data.kind=images", "data.path=x", "data.decoder=pyav"], "decoder: got 'pyav'"),
        (
            ["data.kind=webdataset", "data.path=x", "data.decoder=pyav"],
            "data.decoder: got 'pyav', but it is used by",
        ),
        (["data.kind=videos", "data.path=x"], "got 'videos', vicreg takes images: digits, images"),
    ],
)
def test_settings_of_another_kind_are_refused(words, message):
    with pytest.raises(config.ConfigError, match=message):
        config.load("vicreg_digits", words)
