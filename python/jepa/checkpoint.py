"""Checkpoints: tensors as safetensors, everything else as JSON; nothing is unpickled.

A checkpoint is a folder `step_<n>` with tensors.safetensors and state.json, which names the other's
size and SHA-256. It is written beside its place, flushed to the disk and renamed: a process killed
at any moment leaves the ones before it whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

FORMAT = "jepa-checkpoint/1"
TENSORS, STATE = "tensors.safetensors", "state.json"


class CheckpointError(ValueError):
    """Says which file is not a checkpoint that this run can go on from, and why."""


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> Path:
    """Writes folder/step_<n>; state: what JSON holds."""
    target = folder / f"step_{step:08d}"
    partial = folder / f".{target.name}.{os.getpid()}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    whole = {name: z.detach().cpu().contiguous() for name, z in tensors.items()}
    save_file(whole, partial / TENSORS)
    written = {
        "format": FORMAT,
        "step": step,
        "bytes": (partial / TENSORS).stat().st_size,
        "sha256": _digest(partial / TENSORS),
        "state": state,
    }
    (partial / STATE).write_text(json.dumps(written, indent=1))
    for name in (TENSORS, STATE):
        _flush(partial / name)
    if target.exists():  # a resumed run that comes to the same step again
        shutil.rmtree(target)
    partial.rename(target)
    _flush(folder)
    return target


def load(path: Path) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
    """(tensors, step, state) of a checkpoint folder.

    Raises CheckpointError for what is missing, truncated, altered or of another format.
    """
    try:
        written = json.loads((path / STATE).read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path}: is not a checkpoint: it has no {STATE}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path / STATE}: is truncated or not JSON ({error})") from None
    if not isinstance(written, dict) or written.get("format") != FORMAT:
        found = written.get("format") if isinstance(written, dict) else type(written).__name__
        raise CheckpointError(f"{path / STATE}: has format {found!r}, takes {FORMAT!r}")
    tensors = path / TENSORS
    if not tensors.is_file():
        raise CheckpointError(f"{path}: {TENSORS} is missing")
    size = tensors.stat().st_size
    if size != written["bytes"]:
        raise CheckpointError(
            f"{tensors}: has {size} bytes, {written['bytes']} were written: it is truncated"
        )
    if _digest(tensors) != written["sha256"]:
        raise CheckpointError(f"{tensors}: its contents are not those that were written")
    try:
        return load_file(tensors), int(written["step"]), written["state"]
    except SafetensorError as error:
        raise CheckpointError(f"{tensors}: is not a safetensors file ({error})") from None


def newest(folder: Path) -> Path | None:
    """The checkpoint of most steps; what was being written when a run was killed does not count."""
    found = existing(folder)
    return found[-1] if found else None


def existing(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if re.fullmatch(r"step_\d{8}", p.name))


def prune(folder: Path, keep: int) -> None:
    """Leaves the newest `keep`, and nothing half written."""
    for path in existing(folder)[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def flatten(prefix: str, state: Any, tensors: dict[str, Tensor]) -> Any:
    """A state_dict as JSON, its tensors moved to `tensors` under names that say where they were."""
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


def unflatten(found: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `flatten` was given."""
    if "tensor" in found:
        return tensors[found["tensor"]]
    if "items" in found:
        return {k: unflatten(v, tensors) for k, v in found["items"]}
    if "list" in found:
        return [unflatten(v, tensors) for v in found["list"]]
    return found["value"]


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()


def _flush(path: Path) -> None:
    """To the disk; a folder's entries too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
