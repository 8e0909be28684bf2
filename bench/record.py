"""A run's entry in the record of an op, written whenever it grows, and what earlier runs hold."""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench import accuracy, groups, report
from bench.case import Case, Plan

# A case and a dtype.
Key = tuple[str, str]


def key_of(entry: dict[str, Any]) -> Key:
    return entry["case"], entry["dtype"]


def read(path: Path | None) -> list[dict[str, Any]]:
    """The runs of a record; none where there is no file."""
    if path is None or not path.exists():
        return []
    return report.load([path])[0]["runs"]


def write(path: Path, record: dict[str, Any]) -> None:
    """Through a second file, so that a run that is killed leaves the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_suffix(".partial")
    partial_file.write_text(json.dumps(record, indent=1) + "\n")
    partial_file.replace(path)


def selected(
    planned: dict[str, Any], case: Case, device: str, options: argparse.Namespace
) -> list[str]:
    """The contenders of a plan, as `planned` lists them, that the options select."""
    if options.contenders:
        return [name for name in planned["contenders"] if name in options.contenders]
    left_out: set[str] = set()
    if options.lean and case.name not in options.first:
        left_out = {*planned["compiled"], *planned["peers"]}
        left_out -= case.targets.get(device, {}).keys()
    if options.without_compiled:
        left_out |= {*planned["compiled"]}
    return [name for name in planned["contenders"] if name not in left_out]


class Earlier:
    """What the runs of a record hold: a row of a contender, or why it has none."""

    def __init__(self, runs: list[dict[str, Any]]) -> None:
        self.planned = {key_of(p): p for run in runs for p in run.get("planned", ())}
        self.held: dict[Key, set[str]] = {}
        self.failed: set[tuple[Key, str]] = set()
        for run in runs:
            for entry in (*run["rows"], *run["skipped"]):
                self.held.setdefault(key_of(entry), set()).add(entry["contender"])
            self.failed |= {(key_of(s), s["contender"]) for s in run["skipped"]}

    def lacks(self, key: Key, names: list[str]) -> list[str]:
        """The contenders that no run holds, and ours before them for the ratio."""
        lacking = [name for name in names if name not in self.held.get(key, ())]
        beside = (
            ["ours"] if lacking and "ours" in names and (key, "ours") not in self.failed else []
        )
        return list(dict.fromkeys([*beside, *lacking]))

    def complete(self, case: Case, dtype: str, device: str, options: argparse.Namespace) -> bool:
        """Whether the record is known to hold all that the options select of the case."""
        key = (case.name, dtype)
        if key not in self.planned:
            return False
        return not self.lacks(key, selected(self.planned[key], case, device, options))


def prepare(case: Case, dtype: str, device: torch.device, options: argparse.Namespace) -> Plan:
    """The case's plan, with ours on each backend that the options select."""
    torch.manual_seed(0)
    plan = case.build(device, getattr(torch, dtype), options.backend)
    others = groups.every_backend(device) if case.each_backend and not options.backend else []
    if options.contenders:
        others = [name for name in options.contenders if name in groups.OURS]
    plan = groups.with_backends(case, plan, others, device, getattr(torch, dtype))
    unknown = (plan.steps.keys() | plan.skipped.keys()) - options.known.keys()
    if unknown:
        raise ValueError(f"{case.name}: {', '.join(sorted(unknown))} not in CONTENDERS")
    return plan


class Run:
    """One op's run. failed: whether ours did, on any backend; late: what there was no time for."""

    def __init__(
        self,
        module: Any,
        op: str,
        about: dict[str, Any],
        earlier: list[dict[str, Any]],
        path: Path | None,
        device: torch.device,
        options: argparse.Namespace,
    ) -> None:
        """about: where and with what. path: of the record; None: it is not written."""
        self.path, self.device, self.options = path, device, options
        self.earlier = Earlier(earlier)
        self.entry: dict[str, Any] = {**about, "ceilings": {}}
        self.entry |= {"planned": [], "rows": [], "skipped": []}
        by_default = [*groups.every_backend(device), *module.CONTENDERS]
        self.columns = [
            name
            for name in (*groups.OURS, *module.CONTENDERS)
            if name in (options.contenders or by_default)
        ]
        shown = {n: text for n, text in groups.OURS.items() if n in self.columns}
        self.record = {"schema": report.SCHEMA, "op": op, "title": module.TITLE}
        self.record |= {"contenders": shown | module.CONTENDERS, "runs": [*earlier, self.entry]}
        self.begun = time.perf_counter()
        self.failed = False
        self.late: list[str] = []

    def measure(
        self, case: Case, dtype: str, limits: dict[str, float], deadline: float | None
    ) -> groups.Rows:
        """The case's rows, each in the record as soon as it is timed. A case that fails is said
        and stops nothing. Raises groups.Poisoned, with all of it in the record.
        """
        key = (case.name, dtype)
        planned: dict[str, Any] = {"case": case.name, "dtype": dtype}
        self.entry["planned"].append(planned)
        try:
            plan = prepare(case, dtype, self.device, self.options)
        except Exception as error:
            traceback.print_exc()
            self.failed = True
            planned |= {"contenders": ["ours"], "compiled": [], "peers": []}
            self._keep(key, [], {"ours": groups.reason_of(error)})
            groups.check_alive(self.device, error)
            return []
        names = [*plan.steps]
        planned |= {"contenders": names, "compiled": [n for n in plan.compiled if n in names]}
        planned["peers"] = [n for n in plan.peers if n in names]
        wanted = selected(planned, case, self.device.type, self.options)
        reasons = plan.skipped
        if self.options.contenders:
            reasons = {n: why for n, why in reasons.items() if n in self.options.contenders}
        if self.options.missing:
            wanted = self.earlier.lacks(key, wanted)
            failed = self.earlier.failed
            reasons = {n: why for n, why in reasons.items() if (key, n) not in failed}
        work = groups.Measurement(case, plan, self.device, dtype, limits)
        try:
            for _ in work.run(wanted, self.options.budget, deadline):
                self._keep(key, work.rows, work.reasons | reasons)
        finally:  # also where the device is lost
            self.failed |= any(map(groups.is_ours, work.reasons))
            self._keep(key, work.rows, work.reasons | reasons)
        if self.options.accuracy:
            self._add_errors(case, work)
            self._keep(key, work.rows, work.reasons | reasons)
        if work.late:
            self.late.append(f"{case.name} {dtype} ({', '.join(work.late)})")
        if plan.compiled:
            torch.compiler.reset()
        return work.rows

    def _add_errors(self, case: Case, work: groups.Measurement) -> None:
        """To the rows of ours; where it cannot be told, standard error says why."""
        for row in work.rows:
            if not groups.is_ours(row["contender"]):
                continue
            try:
                row["error"] = accuracy.error(case, row["backend"], self.device, row["dtype"])
            except Exception as error:
                where = f"{case.name} {row['dtype']} {row['contender']}"
                print(f"no accuracy of {where}: {groups.reason_of(error)}", file=sys.stderr)
                groups.check_alive(self.device, error)

    def _keep(self, key: Key, rows: groups.Rows, reasons: dict[str, str]) -> None:
        """What is known of a case by now, in the place of what was; written."""
        case, dtype = key
        why = [
            {"case": case, "dtype": dtype, "contender": name, "reason": reason}
            for name, reason in reasons.items()
        ]
        for name, entries in (("rows", rows), ("skipped", why)):
            others = [entry for entry in self.entry[name] if key_of(entry) != key]
            self.entry[name] = [*others, *entries]
        self.entry["seconds"] = round(time.perf_counter() - self.begun, 1)
        if self.path is not None:
            write(self.path, self.record)
