"""The stages of the three commands of bench.gpu, and how their seconds are shared out.

gpu     build, info, the parity tests, the first figures of every op
bench   build, info, all figures without torch.compile, the trainer, torch.compile's
check   build, info, CUDA graphs, compute-sanitizer tool by tool, ncu
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import ALL, gpu_parity, gpu_summary, stages
from bench.stages import FAIL, PASS, Stage, Verdict

NAMES = ("gpu", "bench", "check")
# `ranks` is measured on a CPU only.
OPS = tuple(op for op in ALL if op != "ranks")
LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")
# What the build was made of, so that a copy of the tree with new times is not built again.
STAMP = Path("build") / "gpu_sources.json"
BUILD_SECONDS, INFO_SECONDS = 150.0, 25.0
# Of the whole, for collecting what is brought home.
RESERVE = 6.0
# Shares of the seconds that build and info leave; an op that is not named has 1.
WEIGHTS = {"vicreg": 1.6, "attention": 1.6}
# Of a benchmark's seconds for ending it, for its imports, and for the case that is under way when
# no further one is started.
LAST_CASE = 9.0
# Names of tests that capture CUDA graphs or replay them on poisoned memory.
GRAPHS = "test_graph_|a_graph|cuda_graph|captur"
# What the trainer gains, compiled against compiled: V-JEPA at its published size, then the others.
COMPARED = (
    ("vjepa_large_videos",),
    ("vicreg_digits", "vicreg_jepa_digits", "lejepa_digits", "training.device=cuda"),
    ("ijepa_digits", "vjepa_physics", "training.device=cuda", "training.compile=true"),
)
REHEARSED = (("vicreg_digits", "training.device=cpu", "training.batch=16"),)


@dataclass(frozen=True)
class Setting:
    """Where and with what the stages run. device: cpu where a run is rehearsed. capability: the
    GPU's as "90". build: auto, always or never. packages: the trainer's folder, and
    trainer_missing why there is none.
    """

    root: Path
    work: Path
    device: str = "cuda"
    capability: str = ""
    build: str = "auto"
    budget: float = 570.0
    ops: Sequence[str] = OPS
    tests: Sequence[str] = ("tests",)
    test_seconds: float = gpu_parity.TEST_SECONDS
    workers: int = 1
    packages: Path | None = None
    trainer_missing: str | None = None
    say: Callable[[str], Any] = print

    @property
    def records(self) -> Path:
        return self.work / "records"

    @property
    def compiled_backend(self) -> str:
        """The backend of the compiled library."""
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def libraries(self) -> Sequence[str]:
        return LIBRARIES if self.device == "cuda" else LIBRARIES[:1]

    @property
    def triton(self) -> dict[str, str]:
        """On the CPU, Triton's interpreter stands in for a GPU."""
        return {} if self.device == "cuda" else {"TRITON_INTERPRET": "1"}


def tool(name: str) -> str | None:
    """A CUDA tool on the PATH or in the usual place."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def sources(root: Path) -> list[Path]:
    kinds = (".cpp", ".cu", ".cuh", ".h")
    sources = [path for path in (root / "csrc").rglob("*") if path.suffix in kinds]
    return [root / "setup.py", *sorted(sources)]


def fingerprint(setting: Setting) -> str:
    """Of the sources and of what they are compiled for."""
    digest = hashlib.sha256(f"{setting.device} {setting.capability}".encode())
    for path in sources(setting.root):
        digest.update(path.relative_to(setting.root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def stale(setting: Setting) -> str | None:
    """Why the compiled libraries must be built; None when those here are up to date."""
    paths = [setting.root / "vicreg_kernels" / name for name in setting.libraries]
    for path in paths:
        if not path.exists():
            return f"{path.name} is absent"
    try:
        stamp = json.loads((setting.root / STAMP).read_text())
        if stamp["libraries"] == [path.stat().st_mtime_ns for path in paths]:
            built = stamp["sources"] == fingerprint(setting)
            return None if built else "the sources are not those that the libraries were built from"
    except (OSError, ValueError, KeyError):
        pass
    newest = max(path.stat().st_mtime for path in sources(setting.root))
    for path in paths:
        if path.stat().st_mtime < newest:
            return f"{path.name} is older than its sources"
    return None


def build_stage(setting: Setting) -> Stage:
    """Builds what is stale. The stage is good only where the libraries are there in the end."""
    why = "told to" if setting.build == "always" else stale(setting)

    def build(log: Path, seconds: float) -> Verdict:
        if why is None:
            return Verdict(PASS, "the libraries here are those of these sources")
        if setting.build == "never":
            return Verdict(FAIL, f"told not to build, but {why}")
        setting.say(f"  {why}")
        environment = {"VICREG_KERNELS_ARCHS": setting.capability} if setting.capability else {}
        if setting.device == "cpu":
            environment["VICREG_KERNELS_BUILD"] = "cpu"
        command = [sys.executable, "setup.py", "build_ext", "--force", "--inplace"]
        for name in setting.libraries:  # a failed build must not leave the last one behind
            (setting.root / "vicreg_kernels" / name).unlink(missing_ok=True)
        stage = Stage("build", [command], seconds, environment=environment)
        verdict = stages.run_commands(stage, log, seconds, setting.root)
        absent = [
            name
            for name in setting.libraries
            if not (setting.root / "vicreg_kernels" / name).exists()
        ]
        if absent:
            lines = [x for x in verdict.output.splitlines() if re.search(r"\berror\b", x, re.I)]
            reason = [verdict.reason, f"{', '.join(absent)} was not built", *lines[:1]]
            return replace(verdict, status=FAIL, reason="; ".join(filter(None, reason)))
        if verdict.status == PASS:
            files = [setting.root / "vicreg_kernels" / name for name in setting.libraries]
            times = [path.stat().st_mtime_ns for path in files]
            stamp = setting.root / STAMP
            stamp.parent.mkdir(exist_ok=True)
            content = {"sources": fingerprint(setting), "libraries": times}
            stamp.write_text(json.dumps(content))
        return verdict

    # with nothing to build its seconds go to the other stages
    return Stage("build", seconds=BUILD_SECONDS if why else 1.0, action=build)


def info_stage(setting: Setting) -> Stage:
    command = [sys.executable, "-m", "vicreg_kernels.cli", "info"]
    return Stage("info", [command], INFO_SECONDS)


def parity_stage(setting: Setting, name: str, word: str = "") -> Stage:
    plan = gpu_parity.Plan(
        setting.root,
        setting.work / "tests" / name.replace(" ", "-"),
        setting.device,
        word,
        setting.packages,
        setting.workers,
        setting.test_seconds,
        setting.tests,
        setting.triton,
    )
    return Stage(name, action=lambda log, s: gpu_parity.run(plan, log, s, setting.say))


def count_rows(records: Path, ops: Sequence[str], ours: bool) -> dict[str, int]:
    """How many rows the records of the ops hold, or of ours alone."""
    counts = dict.fromkeys(ops, 0)
    for record in gpu_summary.read_records(records):
        if record["op"] in counts:
            rows = gpu_summary.rows_of(record)
            counts[record["op"]] = sum(
                row["contender"].startswith("ours" if ours else "") for row in rows
            )
    return counts


def figures_stage(
    setting: Setting, name: str, ops: Sequence[str], words: Sequence[str], ours: bool = True
) -> Stage:
    """bench.run on some ops, told to end in time. A stage that adds no row has failed: with ours,
    no row of ours to the record of each op, else no row at all.
    """
    command = [sys.executable, "-m", "bench.run", "--device", setting.device]
    command += ["--output", str(setting.records), "--op", ",".join(ops), *words]
    if setting.device == "cpu":
        command.append("--quick")

    def measure(log: Path, seconds: float) -> Verdict:
        before = count_rows(setting.records, ops, ours)

        def check(output: str) -> str | None:
            after = count_rows(setting.records, ops, ours)
            bare = [op for op in ops if after[op] == before[op]]
            if not bare or (not ours and len(bare) < len(ops)):
                return None
            return f"no figure{' of ours' * ours} was written for {', '.join(bare)}"

        limited = [*command, "--seconds", f"{max(seconds - LAST_CASE, 1.0):.0f}"]
        notes = r"no time left for: .*|left out: ours.*"
        stage = Stage(name, [limited], check=check, notes=notes)
        return stages.run_commands(stage, log, seconds, setting.root)

    return Stage(name, [command], action=measure)


def trainer_stage(setting: Setting) -> Stage:
    recipes = COMPARED if setting.device == "cuda" else REHEARSED
    rounds = "5" if setting.device == "cuda" else "1"
    compare = [sys.executable, "-m", "vicreg_jepa", "compare", "--rounds", rounds]
    commands = [[*compare, *words] for words in recipes]
    count = sum("=" not in word for words in recipes for word in words)

    def check(output: str) -> str | None:
        rows = len(re.findall(r"^\w+ +[\d.]+/s +[\d.]+/s +[\d.]+x", output, re.MULTILINE))
        return None if rows >= count else f"{rows} of {count} recipes were compared"

    path = [str(setting.root / "python"), os.environ.get("PYTHONPATH", "")]
    path.append(str(setting.packages or ""))
    return Stage(
        "trainer",
        commands,
        missing=setting.trainer_missing,
        every=True,
        environment={"PYTHONPATH": os.pathsep.join(filter(None, path)), **setting.triton},
        check=check,
        notes=r"^\w+ +[\d.]+/s +[\d.]+/s +[\d.]+x.*",
    )


def triton_kernels(root: Path) -> list[str]:
    """Names of the Triton kernels: the functions under @triton.jit whose name ends so, which stand
    in the folders called triton.
    """
    names: list[str] = []
    for path in sorted((root / "vicreg_kernels").rglob("triton/*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                names.append(node.name)
    return names


def exercised(setting: Setting) -> list[str]:
    """The ops that have kernels of their own to watch: those whose file has an exercise."""
    return [
        op
        for op in setting.ops
        if "\ndef exercise(" in (setting.root / "bench" / f"{op}.py").read_text()
    ]


def exercise(setting: Setting, op: str, backend: str, *words: str) -> list[str]:
    command = [sys.executable, "-m", "bench.exercise", "--device", setting.device]
    return [*command, "--backend", backend, "--op", op, *words]


def sanitizer_stage(setting: Setting, name: str, backend: str, *words: str) -> Stage:
    """One of compute-sanitizer's tools over the exercises of all ops, a process an op.

    memcheck watches every kernel; the others this project's own, since vendor kernels are slow
    under them and initcheck finds padding that those read and never use. A CUDA kernel is known by
    its op's namespace, as mangled and demangled names hold it.
    """
    sanitizer, ops = tool("compute-sanitizer"), exercised(setting)
    head = [sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--tool", name.split()[0]]
    if not name.startswith("memcheck"):
        for op in ops:
            for kernel in (f"{len(op)}{op}", f"{op}::"):
                head += ["--kernel-regex", f"kns={kernel}"]

    def check(output: str) -> str | None:
        said = len(re.findall(r"(ERROR|RACECHECK) SUMMARY: ", output))
        silent = [op for op in ops if not re.search(rf"^{op} {backend}: \d+ ", output, re.M)]
        if silent:
            return f"nothing was exercised of {', '.join(silent)}"
        return None if said >= len(ops) else f"{said} of {len(ops)} processes have a verdict"

    return Stage(
        name,
        [[*head, *exercise(setting, op, backend, *words)] for op in ops],
        missing=None if sanitizer else "compute-sanitizer is not installed",
        every=True,
        workers=min(setting.workers, 4),
        check=check,
        # Each tensor is an allocation of its own, so that an access past its end is seen.
        environment={
            "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
            **(setting.triton if backend == "triton" else {}),
        },
    )


def ncu_stage(setting: Setting) -> Stage:
    """What bounds our kernels at the first case of every op, one process at a time."""
    ncu = tool("ncu")
    profile = [ncu or "ncu", "--clock-control", "none", "--section", "SpeedOfLight"]
    profile += ["--section", "LaunchStats", "--launch-count", "16"]
    profile += ["--kernel-name-base", "demangled", "--kernel-name"]
    spaces = [f"{op}::" for op in setting.ops]
    profile.append(f"regex:{'|'.join([*spaces, *triton_kernels(setting.root)])}")
    size = "--first-case" if setting.device == "cuda" else "--smallest"
    ops = exercised(setting)
    commands = [[*profile, *exercise(setting, op, setting.compiled_backend, size)] for op in ops]

    def check(output: str) -> str | None:
        profiled = len(re.findall(r"==PROF== Profiling ", output))
        return (
            None if profiled >= len(ops) else f"{profiled} kernels were profiled, of {len(ops)} ops"
        )

    missing = None if ncu else "ncu is not installed"
    return Stage("ncu", commands, missing=missing, every=True, check=check)


def weighted(setting: Setting, name: str) -> list[tuple[float, Stage]]:
    """What follows build and info, each with its share of the seconds that are left."""
    lean = ["--lean", "--without-compiled", "--budget", "1"]
    every = ["--without-compiled", "--budget", "1.5"]
    compiled = ["--lean", "--missing", "--budget", "1.5"]
    ops = setting.ops
    if name == "gpu":
        first = [(1.0, figures_stage(setting, f"figures of {op}", [op], lean)) for op in ops]
        return [(1.4 * len(ops), parity_stage(setting, "parity")), *first]
    if name == "bench":
        return [
            *(
                (WEIGHTS.get(op, 1.0), figures_stage(setting, f"figures of {op}", [op], every))
                for op in ops
            ),
            (0.25 * len(ops), trainer_stage(setting)),
            (
                0.5 * len(ops),
                figures_stage(setting, "compiled figures", ops, compiled, ours=False),
            ),
        ]
    backend = setting.compiled_backend
    return [
        (50, parity_stage(setting, "graphs", GRAPHS)),
        (85, sanitizer_stage(setting, "memcheck", backend)),
        (65, sanitizer_stage(setting, "racecheck", backend)),
        (45, sanitizer_stage(setting, "initcheck", backend)),
        (40, sanitizer_stage(setting, "synccheck", backend)),
        (50, sanitizer_stage(setting, "memcheck of Triton", "triton", "--smallest")),
        (70, ncu_stage(setting)),
    ]


def plan(setting: Setting, name: str) -> list[Stage]:
    """All stages of a command, most important first; their seconds add up to the budget at most."""
    head = [build_stage(setting), info_stage(setting)]
    pairs = weighted(setting, name)
    left = setting.budget - RESERVE - sum(stage.seconds for stage in head)
    total = sum(weight for weight, stage in pairs if stage.missing is None) or 1.0
    body = []
    for weight, stage in pairs:
        seconds = max(left, 0.0) * weight / total if stage.missing is None else 0.0
        body.append(replace(stage, seconds=seconds, stretch=True))
    return [*head, *body]
