"""What is remembered: rows of observations, their sizes, and the bytes that are stored of them."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]
Floats = NDArray[np.floating[Any]]
EMBEDDING, PLACE = np.dtype("<f4"), np.dtype("<f8")  # stored alike on every machine
LARGEST = 2**63 - 1


@dataclass(frozen=True)
class Format:
    """What the rows of a store are made of; it is fixed when the store is made.

    model: names the encoder, for example by its run and step. Embeddings of two encoders have
    nothing to do with each other, so a store takes those of one. embedding, place, action, outcome:
    the numbers D, P, A and O of their dimensions; place, action and outcome may be 0.

    Raises ValueError, which names the argument, if model is not a name or a number is too small.
    """

    model: str
    embedding: int
    place: int
    action: int
    outcome: int

    def __post_init__(self) -> None:
        name("model", self.model)
        for size in ("embedding", "place", "action", "outcome"):
            whole(size, getattr(self, size), least=int(size == "embedding"))

    def written(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @staticmethod
    def read(text: str) -> Format:
        """Raises ValueError or TypeError if it is no format."""
        return Format(**json.loads(text))


@dataclass(frozen=True)
class Rows:
    """N rows of a store.

    id: int64 [N], ascending in the order of writing and never used twice. world: the world of each,
    N names. session, episode: int64 [N]; a session is one opening of the store that wrote. time:
    int64 [N], the step of the episode. embedding: float32 [N, D], of what was seen. place: float64
    [N, P], where; NaN where it was not known. action: float32 [N, A], what was done then. outcome:
    float32 [N, O], what came of it. surprise: float64 [N], how far that was from what the model had
    predicted. uses: int64 [N], how often a row was reported as used.
    """

    id: Ids
    world: NDArray[np.object_]
    session: Ids
    episode: Ids
    time: Ids
    embedding: NDArray[np.float32]
    place: NDArray[np.float64]
    action: NDArray[np.float32]
    outcome: NDArray[np.float32]
    surprise: NDArray[np.float64]
    uses: Ids

    def __len__(self) -> int:
        return len(self.id)

    def take(self, which: NDArray[Any]) -> Rows:
        """The rows at `which`: numbers of rows, or a bool for each."""
        return Rows(*(getattr(self, field.name)[which] for field in fields(self)))


@dataclass(frozen=True)
class Found:
    """What a search found: rows, nearest first and of equal ones the oldest first, and their
    Euclidean distances to the query, float64 [N].
    """

    rows: Rows
    distance: NDArray[np.float64]


def packed(values: NDArray[Any], kind: np.dtype[Any]) -> list[bytes]:
    """The bytes of each row of [N, any]."""
    return [row.tobytes() for row in np.ascontiguousarray(values, dtype=kind)]


def unpacked(parts: Sequence[bytes | None], size: int, kind: np.dtype[Any]) -> NDArray[Any]:
    """[N, size] of the bytes of each row; None is a row of NaN."""
    missing = np.full(size, np.nan, kind).tobytes()
    joined = b"".join(missing if part is None else part for part in parts)
    return np.frombuffer(joined, kind).reshape(len(parts), size).astype(kind.newbyteorder("="))


def checksum(
    id: int,
    episode: int,
    session: int,
    world: str,
    time: int,
    surprise: float,
    place: bytes | None,
    action: bytes,
    outcome: bytes,
    embedding: bytes,
) -> int:
    """The CRC-32 of what never changes in a row. SQLite finds a page whose structure is damaged,
    but not one whose numbers are others.
    """
    head = struct.pack("<qqqqd?", id, episode, session, time, surprise, place is None)
    value = zlib.crc32(head)
    for part in (world.encode(), place or b"", action, outcome, embedding):
        value = zlib.crc32(part, value)
    return value


def whole(argument: str, value: Any, least: int, most: int = LARGEST) -> None:
    """Raises ValueError unless it is an integer from `least` to `most`."""
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or not least <= value <= most:
        takes = f"an integer of {least} or more" if most == LARGEST else f"{least} to {most}"
        raise ValueError(f"{argument}: got {value!r}, takes {takes}")


def name(argument: str, value: Any) -> None:
    """Raises ValueError unless it is text that can be stored, and not empty."""
    if not isinstance(value, str) or not value or "\0" in value or not _encodes(value):
        raise ValueError(f"{argument}: got {value!r}, takes a name: text, not empty")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def matrix(
    argument: str, value: Any, rows: int | None, size: int, kind: np.dtype[Any]
) -> NDArray[Any]:
    """Numbers [rows, size] of `kind`, of an array or a tensor of floats on any device; rows None:
    any number. Raises ValueError if it has another shape, or numbers that are not finite.
    """
    found = array(argument, value)
    if found.ndim != 2 or found.shape[1] != size or rows not in (None, len(found)):
        takes = f"[{'any' if rows is None else rows}, {size}]"
        raise ValueError(f"{argument}: got shape {list(found.shape)}, takes {takes}")
    if found.dtype.kind not in "fiu":
        raise ValueError(f"{argument}: got {found.dtype}, takes floats")
    with np.errstate(over="ignore"):
        numbers = found.astype(kind.newbyteorder("="))
    if not np.isfinite(numbers).all():
        raise ValueError(
            f"{argument}: got numbers that are not finite as {numbers.dtype}, takes finite ones"
        )
    return numbers


def integers(argument: str, value: Any, rows: int | None, least: int = 0) -> Ids:
    """int64 [rows], each at least `least`. Raises ValueError if it is not."""
    found = array(argument, value)
    if found.ndim != 1 or rows not in (None, len(found)):
        takes = f"[{'any' if rows is None else rows}]"
        raise ValueError(f"{argument}: got shape {list(found.shape)}, takes {takes}")
    if len(found) and found.dtype.kind not in "iu":
        raise ValueError(f"{argument}: got {found.dtype}, takes integers")
    if len(found) and (found.min() < least or found.max() > LARGEST):
        raise ValueError(
            f"{argument}: got {found.min()} to {found.max()}, takes {least} or more, in int64"
        )
    return found.astype(np.int64)


def array(argument: str, value: Any) -> NDArray[Any]:
    """An array of an array, a list or a tensor on any device. Raises ValueError if it is none."""
    try:
        if hasattr(value, "detach"):  # a tensor: numpy has no bfloat16
            value = value.detach().cpu().resolve_neg()
            value = value.float() if value.is_floating_point() and value.itemsize < 4 else value
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: of torch
        raise ValueError(f"{argument}: got {value!r}, takes an array or a tensor") from error
