"""Checkpoints: tensors as safetensors, everything else as JSON; nothing is unpickled.

A checkpoint is a folder `step_<n>` with tensors.safetensors and state.json, which holds the step,
the size and SHA-256 of the tensors' file, and its own SHA-256. It is written under another name,
flushed to disk and renamed, so a process that is killed at any moment leaves the earlier
checkpoints intact.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vicreg_jepa.files import output

FORMAT = "vicreg-jepa-checkpoint/1"
# Formats of unreleased versions, with other names of settings; the first had no checksum.
OLDER = ("jepa-checkpoint/1", "jepa-checkpoint/2")
TENSORS, STATE = "tensors.safetensors", "state.json"


class CheckpointError(ValueError):
    """The message says which file is not a checkpoint that this run can resume from, and why."""


class Damaged(CheckpointError):
    """A checkpoint's contents are not those that were written; an earlier one may be intact."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    """Write folder/step_<n>; state: JSON values. Raises OutputError; then nothing is written."""
    target = folder / f"step_{step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    whole = {name: z.detach().cpu().contiguous() for name, z in tensors.items()}
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with output.writing(target):
            partial.mkdir(parents=True)
            _write(partial, step, whole, state)
            if target.exists():  # a resumed run that comes to the same step again
                shutil.rmtree(target)
            partial.rename(target)
            _flush(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _write(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    save_file(tensors, folder / TENSORS)
    written = {
        "format": FORMAT,
        "step": step,
        "bytes": (folder / TENSORS).stat().st_size,
        "sha256": _digest(folder / TENSORS),
        "state": state,
    }
    (folder / STATE).write_text(json.dumps(sealed(written), indent=1))
    for name in (TENSORS, STATE):
        _flush(folder / name)


def sealed(written: dict[str, Any]) -> dict[str, Any]:
    """Add a checksum of all values, which does not depend on the layout of the JSON text."""
    held = json.loads(json.dumps({k: v for k, v in written.items() if k != "checksum"}))
    text = json.dumps(held, sort_keys=True, separators=(",", ":"))
    return {**held, "checksum": hashlib.sha256(text.encode()).hexdigest()}


def load(path: Path) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """Load (tensors, step, state) from a checkpoint folder.

    Raises Damaged if a part is missing, truncated or altered, and CheckpointError for another
    format.
    """
    written = _state(path)
    tensors = path / TENSORS
    if not tensors.is_file():
        raise Damaged(f"{path}: {TENSORS} is missing")
    size = tensors.stat().st_size
    if size != written["bytes"]:
        raise Damaged(
            f"{tensors}: has {size} bytes, {written['bytes']} were written: it is truncated"
        )
    if _digest(tensors) != written["sha256"]:
        raise Damaged(f"{tensors}: its contents are not those that were written")
    try:
        return load_file(tensors), written["step"], written["state"]
    except SafetensorError as error:
        raise Damaged(f"{tensors}: is not a safetensors file ({error})") from None


def _state(path: Path) -> dict[str, Any]:
    state = path / STATE
    if not state.is_file():
        raise Damaged(f"{path}: is not a checkpoint: it has no {STATE}")
    try:
        written = json.loads(state.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{state}: is truncated or not JSON ({error})") from None
    version = written.get("format") if isinstance(written, dict) else type(written).__name__
    whole = isinstance(written, dict) and sealed(written) == written
    if version != FORMAT:
        kind = CheckpointError if whole or version in OLDER else Damaged
        raise kind(f"{state}: has format {version!r}, takes {FORMAT!r}")
    if not whole:
        raise Damaged(f"{state}: its contents are not those that were written")
    if path.name != f"step_{written['step']:08d}":
        named = path.name.removeprefix("step_").lstrip("0")
        raise Damaged(f"{path}: is of step {written['step']}, its folder's name says {named}")
    return written


def newest_whole(folder: Path) -> tuple[Path, tuple[dict[str, Tensor], int, dict[str, Any]]] | None:
    """Return the newest checkpoint that is not damaged, with the result of `load`; name damaged
    ones on stderr. None if there is no checkpoint. Raises Damaged if all are damaged.
    """
    problems: list[Damaged] = []
    for path in reversed(existing(folder)):
        try:
            loaded = load(path)
        except Damaged as error:
            problems.append(error)
            continue
        for problem in problems if os.environ.get("RANK", "0") == "0" else ():
            print(f"{problem}; taking {path.name} instead", file=sys.stderr)
        return path, loaded
    if problems:
        raise problems[0]
    return None


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after `step`: they are damaged and must not count as the newest."""
    for path in existing(folder):
        if path.name > f"step_{step:08d}":
            aside = path.with_name(f"{path.name}.damaged")
            with output.writing(aside):
                if aside.is_dir():
                    shutil.rmtree(aside)
                path.rename(aside)


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step, without one that was incomplete when a run was killed."""
    steps = existing(folder)
    return steps[-1] if steps else None


def existing(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"step_\d{8}", p.name))


def prune(folder: Path, keep: int) -> None:
    """Keep the newest `keep` checkpoints; delete the others and incomplete ones."""
    for path in existing(folder)[:-keep]:
        with output.writing(path):
            shutil.rmtree(path)
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def flatten(prefix: str, state: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn a state_dict into JSON values; its tensors go to `tensors`, named by their place."""
    if isinstance(state, Tensor):
        tensors[prefix] = state
        return {"tensor": prefix}
    if isinstance(state, Mapping):
        items = [[k, flatten(f"{prefix}.{k}", v, tensors)] for k, v in state.items()]
        return {"items": items}
    if isinstance(state, (list, tuple)):
        return {"list": [flatten(f"{prefix}.{i}", v, tensors) for i, v in enumerate(state)]}
    if state is None or isinstance(state, (bool, int, float, str)):
        return {"value": state}
    raise TypeError(f"{prefix}: got {type(state).__name__}, which a checkpoint does not hold")


def unflatten(flat: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if "tensor" in flat:
        return tensors[flat["tensor"]]
    if "items" in flat:
        return {k: unflatten(v, tensors) for k, v in flat["items"]}
    if "list" in flat:
        return [unflatten(v, tensors) for v in flat["list"]]
    return flat["value"]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
