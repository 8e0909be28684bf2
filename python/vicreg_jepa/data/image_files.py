"""Labelled images that stay on disk and are read when a batch needs them: folders, torchvision's
sets, WebDataset shards.
"""

from __future__ import annotations

import importlib
import inspect
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from vicreg_jepa.files import listing, pictures, tar_index
from vicreg_jepa.files.pictures import DEFAULT, Limits

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
# Names of splits in torchvision's datasets, the most likely first.
TRAINING, TEST = ("train", "trainval"), ("test", "val", "valid")


class Pictures(Protocol):
    """A source of images: picture(i) opens one, where(i) names it, labels holds all classes."""

    classes: tuple[str, ...]

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def picture(self, number: int) -> Any: ...

    def where(self, number: int) -> str: ...


@dataclass(frozen=True)
class Stored:
    """Some of the images, as RGB, cropped to their central square and resized to `size`.

    rows: int64 [N], the chosen images; `stored[numbers]` reads float32 [B, 3, size, size] in [0,
    1].
    """

    name: str
    pictures: Pictures
    size: int
    rows: Tensor
    limits: Limits = DEFAULT

    channels = 3

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: Sequence[int]) -> Tensor:
        return torch.stack([self._read(int(self.rows[number])) for number in numbers])

    def _read(self, row: int) -> Tensor:
        try:
            with pictures.own_bound(), self.pictures.picture(row) as opened:
                pixels = pictures.decoded(opened, self.size, self.limits)
        except pictures.Refused as error:
            raise ValueError(f"images: {self.pictures.where(row)} {error}") from error
        except Exception as error:  # each of Pillow's formats raises its own
            where = self.pictures.where(row)
            raise ValueError(f"images: {where} is not an image Pillow reads: {error}") from error
        return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)

    @cached_property
    def labels(self) -> Tensor:
        """int64 [N]. Raises ValueError if the images have none."""
        return self.pictures.labels[self.rows]

    @property
    def classes(self) -> tuple[str, ...]:
        return self.pictures.classes

    def subset(self, index: Tensor) -> Stored:
        return replace(self, rows=self.rows[index])


def stored(name: str, source: Pictures, size: int, limits: Limits = pictures.DEFAULT) -> Stored:
    if size < 4:
        raise ValueError(f"data.size: got {size}, takes at least 4 pixels")
    return Stored(name, source, size, torch.arange(len(source)), limits)


class ImageFolder:
    """`root`/<class>/**; the classes, and the files of each, are in the order of their names.

    Raises ValueError if root is not a folder of at least two class folders with images, or if an
    image is not a regular file.
    """

    def __init__(self, root: str | Path) -> None:
        pictures.pillow()
        self.root = Path(root)
        if not self.root.is_dir():
            raise ValueError(
                f"{tar_index.WHERE}: got {str(root)!r}, takes a folder with one sub-folder per "
                "class"
            )
        files_of = self._listed()
        self.classes = tuple(name for name, files in files_of.items() if files)
        if len(self.classes) < 2:
            raise ValueError(
                f"{tar_index.WHERE}: got {str(root)!r} with {len(self.classes)} sub-folders that "
                "hold images, takes at least 2 (one per class; files ending in "
                f"{', '.join(SUFFIXES)})"
            )
        counts = torch.tensor([len(files_of[name]) for name in self.classes])
        self.labels = torch.arange(len(counts)).repeat_interleave(counts)
        # One array: workers would copy millions of small objects, each of them.
        self.files = np.array([os.fsencode(f) for name in self.classes for f in files_of[name]])

    def _listed(self) -> dict[str, list[str]]:
        """Each class's files, relative to its folder."""
        files_of, skipped, beside = {}, [], []
        for path in sorted(self.root.iterdir()):
            if listing.hidden(path.name):
                skipped += [path.name] if path.is_dir() or _is_image(path.name) else []
            elif path.is_dir():
                files_of[path.name], inside = listing.below(path, _is_image, "images")
                skipped += [os.path.join(path.name, name) for name in inside]
            elif _is_image(path.name):
                beside.append(path.name)
        listing.skip("images", self.root, skipped)
        are = (
            "picture beside the class folders is"
            if len(beside) == 1
            else ("pictures beside the class folders are")
        )
        listing.tell(f"images: {str(self.root)!r}: {len(beside)} {are} left out", beside)
        return files_of

    def __len__(self) -> int:
        return len(self.files)

    def _path(self, number: int) -> Path:
        name = os.fsdecode(bytes(self.files[number]))
        return self.root / self.classes[int(self.labels[number])] / name

    def picture(self, number: int) -> Any:
        return pictures.pillow().open(self._path(number))

    def where(self, number: int) -> str:
        return str(self._path(number))


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES


class ImageShards:
    """The images of WebDataset shards. Their classes are numbers in .cls, or in .json as `label` or
    `cls`.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, pattern: str | Path, limits: Limits = pictures.DEFAULT) -> None:
        pictures.pillow()
        shards = tar_index.paths(pattern)
        samples = tar_index.indices(shards)
        most = limits.max_bytes
        self.files = tar_index.Files(shards, samples, PICTURES, most)
        self.classed = tar_index.Files(shards, samples, ("cls", "json"), most, optional=True)

    def __len__(self) -> int:
        return len(self.files)

    def picture(self, number: int) -> Any:
        return pictures.pillow().open(io.BytesIO(self.files.read(number)[1]))

    def where(self, number: int) -> str:
        return self.files.where(number)

    @cached_property
    def labels(self) -> Tensor:
        return torch.tensor([self._label(number) for number in range(len(self))])

    def _label(self, number: int) -> int:
        suffix, content = self.classed.read(number)
        try:
            label = json.loads(content) if suffix == "json" else content.decode().strip()
            if isinstance(label, dict):
                label = label["label"] if "label" in label else label["cls"]
            return int(label)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{self.where(number)}: has no label, takes a number in .cls, or in .json as "
                f"'label' or 'cls' ({type(error).__name__}: {error})"
            ) from error


class TorchVision:
    """One of torchvision's datasets."""

    def __init__(self, name: str, dataset: Any) -> None:
        self.name, self.dataset = name, dataset
        self.classes = tuple(map(str, getattr(dataset, "classes", ())))

    def __len__(self) -> int:
        return len(self.dataset)

    def picture(self, number: int) -> Any:
        return self.dataset[number][0]

    def where(self, number: int) -> str:
        return f"torchvision's {self.name}, sample {number}"

    @cached_property
    def labels(self) -> Tensor:
        for name in ("targets", "labels"):
            if hasattr(self.dataset, name):
                return torch.as_tensor(getattr(self.dataset, name)).long()
        try:
            return torch.tensor([int(self.dataset[number][1]) for number in range(len(self))])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"data.name: the targets of {self.name} are not classes") from error


def torchvision(name: str, root: Path, size: int, download: bool) -> tuple[Stored, Stored]:
    """(training, test) of torchvision.datasets.`name`, whose constructor takes train= or split=.

    download: with torchrun the first process of each machine downloads, and the others wait for it.
    """
    try:
        sets = importlib.import_module("torchvision.datasets")
    except (ImportError, OSError, RuntimeError) as error:  # not there, or made for another torch
        raise ImportError(
            "data.kind: torchvision cannot be imported, pip install the torchvision that was made "
            f"for torch {torch.__version__} ({error})"
        ) from error
    kind = getattr(sets, name, None)
    words = inspect.signature(kind).parameters if inspect.isclass(kind) else {}
    takes = set(words)
    needed = {w.name for w in words.values() if w.default is w.empty and w.kind != w.VAR_KEYWORD}
    if needed != {"root"} or not takes & {"train", "split"}:
        raise ValueError(
            f"data.name: got {name!r}, takes a class of torchvision.datasets whose constructor "
            "needs root alone and takes train or split, such as 'CIFAR10'"
        )
    if download and not takes & {"download", "kwargs"}:
        raise ValueError(f"data.download: torchvision's {name} takes false, it has no download")
    alone = not (download and dist.is_initialized())
    first = alone or os.environ.get("LOCAL_RANK", "0") == "0"
    halves = []
    for training in (True, False):
        if not (alone or first):
            dist.barrier()
        options = {"download": True} if download and first else {}
        dataset = _of_split(name, kind, takes, root, training, options)
        if first and not alone:
            dist.barrier()
        halves.append(stored(name, TorchVision(name, dataset), size))
    return halves[0], halves[1]


def _of_split(
    name: str, kind: Any, takes: set[str], root: Path, training: bool, options: dict[str, bool]
) -> Any:
    """The training or the test split. If the files are missing, raises torchvision's own error with
    the name of the setting.
    """
    tries: list[dict[str, Any]] = [{"train": training}]
    if "train" not in takes:
        tries = [{"split": one} for one in (TRAINING if training else TEST)]
    errors = []
    for words in tries:
        try:
            return kind(root=str(root), **words, **options)
        except ValueError as error:  # a split of another name
            errors.append(f"{words}: {error}")
        except (RuntimeError, OSError) as error:
            raise ValueError(
                f"data.path: torchvision's {name} cannot be read from {str(root)!r}: {error} "
                "(here: data.download=true)"
            ) from error
    raise ValueError(f"data.name: torchvision's {name} {'; '.join(errors)}")
