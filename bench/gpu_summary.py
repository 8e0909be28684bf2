"""What `make gpu` brings home: summary.md, of under 8,000 characters, and results.tar.gz.

Both are written again after every stage, each through a second file that takes the place of the
first, so that a run that is killed leaves the last complete state. Standard library only.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.stages import FAIL, NOT_REACHED, PASS, SKIPPED, Result, Stage

SUMMARY, ARCHIVE = "summary.md", "results.tar.gz"
LIMIT = 7900
# Shares of the room that is left below the verdicts.
FAILED_TESTS, NOTES, TAILS = 0.4, 0.15, 0.35
# A machine brings back files of at most 16 MiB.
ARCHIVE_BYTES = 15 << 20
# Logs are cut to so many bytes each when the archive is too large with whole ones.
CUTS = (None, 1 << 20, 1 << 16, 1 << 12)


def overall(results: Sequence[Result], stages: Sequence[Stage]) -> str:
    """One verdict of all stages: a stage that is missing or was skipped proves nothing."""
    statuses = [result.verdict.status for result in results]
    if FAIL in statuses:
        return FAIL
    if len(results) < len(stages) or NOT_REACHED in statuses:
        return NOT_REACHED
    return SKIPPED if SKIPPED in statuses else PASS


def clip(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: max(length - 4, 0)] + " ..."


def fill(lines: Sequence[str], room: int, what: str) -> list[str]:
    """As many whole lines as there is room for, and how many there are besides."""
    taken: list[str] = []
    for number, line in enumerate(lines):
        more = f"... and {len(lines) - number} more {what}"
        if len(line) + 1 + len(more) + 1 > room:
            return [*taken, more] if len(more) < room else taken
        taken.append(line)
        room -= len(line) + 1
    return taken


def tail(output: str, lines: int) -> list[str]:
    return [clip(line, 160) for line in output.rstrip().splitlines()[-lines:]]


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The benchmark's records, those half written left out; the newest run of each last."""
    records = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            records.append(json.loads(path.read_text()))
        except ValueError:
            continue
    return records


def rows_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [row for run in record.get("runs", []) for row in run.get("rows", [])]


def _milliseconds(row: dict[str, Any]) -> str:
    text = f"{row['ms']['p50']:.3g} ms"
    if row.get("graph_ms"):
        text += f" (graph {row['graph_ms']['p50']:.3g})"
    return text


def figures(records: Sequence[dict[str, Any]]) -> list[str]:
    """One line a case and dtype: ours by backend, and the others' time as a multiple of ours. The
    first case of every op comes first.
    """
    first: list[str] = []
    later: list[str] = []
    for record in records:
        cases: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
        for row in rows_of(record):
            cases.setdefault((row["case"], row["dtype"]), {})[row["contender"]] = row
        for number, ((case, dtype), by_name) in enumerate(cases.items()):
            parts = []
            for name, row in by_name.items():
                if name.startswith("ours"):
                    backend = row.get("backend") or name.partition("_")[2]
                    parts.append(f"{backend} {_milliseconds(row)}")
            if (percent := by_name.get("ours", {}).get("percent_of_floor")) is not None:
                parts[0] += f" {percent:.0f}% of floor"
            parts += [
                f"{name} {row['ratio']:.3g}x"
                for name, row in by_name.items()
                if not name.startswith("ours") and row.get("ratio") is not None
            ]
            line = f"- {record['op']} {case} {dtype.replace('float', 'f')}: {', '.join(parts)}"
            (later if number else first).append(clip(line, 260))
    return [*first, *later]


def summarise(
    title: str, results: Sequence[Result], stages: Sequence[Stage], records: Path, seconds: float
) -> str:
    """The verdicts, the tests that failed, the figures, and the last lines of what failed."""
    lines = [f"# {overall(results, stages)}: {clip(title, 200)}, {seconds:.0f} s", ""]
    for stage, result in zip(stages, [*results, *[None] * len(stages)], strict=False):
        if result is None:
            lines.append(f"- {NOT_REACHED} {stage.name}")
            continue
        verdict = result.verdict
        detail = f": {clip(verdict.reason, 140)}" if verdict.reason else ""
        lines.append(f"- {verdict.status} {stage.name}, {result.seconds:.0f} s{detail}")
    room = LIMIT - sum(len(line) + 1 for line in lines) - 200
    failures = [
        f"- {test}: {clip(reason, 160)}"
        for result in results
        for test, reason in result.verdict.failures.items()
    ]
    notes = [
        f"- {result.stage.name}: {clip(note, 200)}"
        for result in results
        for note in result.verdict.notes
    ]
    tails = []
    for result in results:
        verdict = result.verdict
        if verdict.status == FAIL and verdict.output and not verdict.failures:
            tails += [f"{result.stage.name} ({result.stage.log}):", *tail(verdict.output, 12)]
    numbers = figures(read_records(records))
    # what a part does not use goes to those after it
    for heading, body, share, what in (
        ("## Failed tests", failures, FAILED_TESTS if numbers or tails else 0.8, "failed tests"),
        ("## Last lines of what failed", tails, TAILS if numbers else 0.7, "lines"),
        ("## Notes", notes, NOTES if numbers else 1.0, "notes"),
        ("## Figures", numbers, 1.0, "cases"),
    ):
        taken = fill(body, int(room * share), what)
        if taken:
            fence = ["```"] if body is tails else []
            block = ["", heading, "", *fence, *taken, *fence]
            lines += block
            room -= sum(len(line) + 1 for line in block)
    text = "\n".join(lines) + "\n"
    return text if len(text) < 8000 else text[:LIMIT] + "\n"


def replace(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def cut(content: bytes, limit: int | None) -> bytes:
    """The beginning and the end of a log."""
    if limit is None or len(content) <= limit:
        return content
    head = limit // 4
    left_out = len(content) - limit
    note = f"\n[{left_out} bytes were left out]\n".encode()
    return content[:head] + note + content[len(content) - (limit - head) :]


def pack(work: Path, limit: int | None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=6) as archive:
        for path in sorted(work.rglob("*")):
            if not path.is_file() or path.name.endswith(".partial"):
                continue
            try:
                content = path.read_bytes()
            except OSError:  # a process still at work took it away
                continue
            if path.suffix != ".json":
                content = cut(content, limit)
            member = tarfile.TarInfo(path.relative_to(work).as_posix())
            member.size, member.mtime = len(content), int(path.stat().st_mtime)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def write_archive(work: Path, out: Path, most: int = ARCHIVE_BYTES) -> None:
    """Everything under `work` as one archive of at most `most` bytes."""
    for limit in CUTS:
        content = pack(work, limit)
        if len(content) <= most:
            break
    replace(out / ARCHIVE, content)


def write(
    title: str,
    results: Sequence[Result],
    stages: Sequence[Stage],
    work: Path,
    out: Path,
    seconds: float,
) -> str:
    """Writes the summary, then the archive, which holds the summary too."""
    text = summarise(title, results, stages, work / "records", seconds)
    out.mkdir(parents=True, exist_ok=True)
    replace(out / SUMMARY, text.encode())
    work.mkdir(parents=True, exist_ok=True)
    replace(work / SUMMARY, text.encode())
    write_archive(work, out)
    return text
