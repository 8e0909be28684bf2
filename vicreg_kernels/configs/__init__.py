"""What was measured on a GPU: launch configurations of the Triton kernels, and backend thresholds.

One file a device, `<device>.json`, named by `slug` of the GPU's name. `vicreg-kernels bench --tune`
writes it on that GPU; nothing is tuned while a model runs. A device without a file, or without a
row that fits, takes the general tables, which were chosen by counting (<op>/configs.json or
<op>/configs.py). Among rows that fit, the nearest shape wins.

    schema        "vicreg-kernels/configs/1"
    device        the GPU's name, as torch gives it
    measured      date, commit, command, versions: of the last run that wrote the file
    triton_from   op -> format -> the least min(N, D) from which `triton` is faster than `cuda` at
                  every shape measured; null: at none. Absent: not measured.
    sides         what triton_from was read off: op, format, shape [N, D], cuda_ms, triton_ms
    rows          op -> rows: `format`, the shape's fields, the fields of the op's Config, and the
                  times behind them: ms, of this row, and general_ms, of the general table's

format: "single" (float32 operands) or "half" (bfloat16 and float16). Times are milliseconds.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

SCHEMA = "vicreg-kernels/configs/1"
FOLDER = Path(__file__).parent
FORMATS = ("single", "half")
# Fields of a row that say how it was measured.
TIMES = ("ms", "general_ms")

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C")

_forgetters: list[Callable[[], None]] = []


def cached(function: F) -> F:
    """Cache a function whose results come from the files; `forget` empties the cache."""
    wrapped = lru_cache(maxsize=1024)(function)
    on_forget(wrapped.cache_clear)
    return wrapped  # type: ignore[return-value]


def on_forget(clear: Callable[[], None]) -> None:
    """Let `forget` call `clear` too."""
    _forgetters.append(clear)


def forget() -> None:
    """Empty the caches, because a file was written: the next use reads the files again."""
    for clear in _forgetters:
        clear()


def slug(name: str) -> str:
    """The name of a device's file or folder: "NVIDIA H200" -> nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", name.lower())).strip("-")


def path_of(device: str) -> Path:
    return FOLDER / f"{slug(device)}.json"


@dataclass(frozen=True)
class Row:
    """A configuration, and its key: the fields of its row that are not the Config's."""

    key: dict[str, Any]
    config: Any

    @property
    def format(self) -> str:
        return self.key["format"]


@cached
def load(device: str) -> dict[str, Any]:
    """Load the device's record, or an empty one without a file. ValueError for another form."""
    path = path_of(device)
    if not path.exists():
        return empty(device)
    return read(path)


def empty(device: str) -> dict[str, Any]:
    record: dict[str, Any] = {"schema": SCHEMA, "device": device, "measured": {}}
    return record | {"triton_from": {}, "sides": [], "rows": {}}


def read(path: Path) -> dict[str, Any]:
    """Read and check a file's record, except for the fields of its rows, which `rows` checks."""
    try:
        record = json.loads(path.read_text())
        _check(record)
    except ValueError as error:  # of json too
        raise ValueError(f"{path}: {error}; `vicreg-kernels bench --tune` writes it anew") from None
    return record


def _check(record: Any) -> None:
    _need(isinstance(record, dict), "record", record, "an object")
    _need(record.get("schema") == SCHEMA, "schema", record.get("schema"), repr(SCHEMA))
    for name, kind in (
        ("device", str),
        ("measured", dict),
        ("triton_from", dict),
        ("sides", list),
        ("rows", dict),
    ):
        _need(isinstance(record.get(name), kind), name, record.get(name), f"a {kind.__name__}")
    for op, by_format in record["triton_from"].items():
        _need(isinstance(by_format, dict), f"triton_from.{op}", by_format, "an object")
        for name, side in by_format.items():
            at = f"triton_from.{op}.{name}"
            _need(name in FORMATS, at, name, f"one of {FORMATS}")
            _need(side is None or _positive(side), at, side, "a positive integer or null")
    for op, rows_ in record["rows"].items():
        _need(isinstance(rows_, list), f"rows.{op}", rows_, "a list")
        for i, row in enumerate(rows_):
            _need(isinstance(row, dict), f"rows.{op}[{i}]", row, "an object")
            _need(row.get("format") in FORMATS, f"rows.{op}[{i}].format", row.get("format"),
                  f"one of {FORMATS}")  # fmt: skip


def _need(holds: bool, name: str, got: Any, takes: str) -> None:
    if not holds:
        raise ValueError(f"{name}: got {got!r}, takes {takes}")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def parse(raw: Mapping[str, Any], kind: type[C], keys: Mapping[str, Any], where: str) -> Row:
    """A row as its Config. keys: the fields that say what it is for, name -> type, as Config's.

    Raises ValueError naming `where` and the field that is absent, unknown or of another type.
    """
    hints = {**keys, **get_type_hints(kind)}
    needed = {*keys, *(f.name for f in fields(kind) if f.default is MISSING)}  # type: ignore[arg-type]
    unknown = raw.keys() - hints.keys() - {"format", *TIMES}
    if unknown:
        raise ValueError(f"{where}.{min(unknown)}: is no field of {kind.__module__}.Config")
    values = {}
    for name, hint in hints.items():
        if name not in raw:
            _need(name not in needed, f"{where}.{name}", None, str(hint))
            continue
        values[name] = _value(raw[name], hint, f"{where}.{name}")
    key = {"format": raw["format"], **{name: values.pop(name) for name in keys}}
    return Row(key, kind(**values))


def _value(raw: Any, hint: Any, where: str) -> Any:
    if type(None) in get_args(hint):
        if raw is None:
            return None
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    lengths = get_args(hint)
    if lengths:
        whole = isinstance(raw, list) and len(raw) == len(lengths)
        _need(whole and all(map(_integer, raw)), where, raw, f"{len(lengths)} integers")
        return tuple(raw)
    right = _integer(raw) if hint is int else isinstance(raw, hint)
    _need(right, where, raw, f"a value of {hint.__name__}")
    return raw


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def rows(device: str, op: str, kind: type[Any], keys: Mapping[str, Any]) -> tuple[Row, ...]:
    """The device's measured rows of an op, checked."""
    rows = load(device)["rows"].get(op, [])
    try:
        return tuple(parse(row, kind, keys, f"rows.{op}[{i}]") for i, row in enumerate(rows))
    except ValueError as error:
        raise ValueError(
            f"{path_of(device)}: {error}; `vicreg-kernels bench --tune` writes it anew"
        ) from None


def devices() -> list[str]:
    """The devices that have a file."""
    return [read(path)["device"] for path in sorted(FOLDER.glob("*.json"))]


def write(path: Path, record: dict[str, Any]) -> None:
    """Checked, and through a second file, so that a run that is killed leaves the last whole one.

    A row stands on one line.
    """
    _check(record)
    lines = []
    for name, value in record.items():
        if name == "rows":
            ops = [f'  "{op}": {_one_a_line(each, 4)}' for op, each in value.items()]
            text = "{\n" + ",\n".join(ops) + "\n }" if ops else "{}"
        elif name == "sides":
            text = _one_a_line(value, 3)
        else:
            text = json.dumps(value)
        lines.append(f' "{name}": {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(f".partial{os.getpid()}")
    partial_file.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial_file.replace(path)
    forget()


def _one_a_line(values: list[Any], indent: int) -> str:
    if not values:
        return "[]"
    room = " " * indent
    return "[\n" + ",\n".join(room + json.dumps(v) for v in values) + f"\n{room[:-1]}]"
