"""The program behind `make gpu`: everything that needs an NVIDIA GPU, in one unattended command.

For a bare machine: its own python3 with torch, triton and pytest, nvcc, no network, no virtual
environment, perhaps no git. In order of importance: build (or load what is carried), parity tests,
each op's benchmark as far as its seconds go, compute-sanitizer, the trainer fused against plain,
the cases that are left, ncu. Logs,
JSON and summary.md go to $OUT, by default bench/results/<device>/; the summary is printed last.

Exit status: 0 all well, 1 something failed or did not fit the budget, 2 no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import OPS, report  # noqa: E402
from bench.stages import Result, Stage, run_stages  # noqa: E402

LIBRARIES = ("_C.abi3.so", "_C_cuda.abi3.so")
PYTEST = ("-m", "gpu", "-rfEs", "--tb=short", "--continue-on-collection-errors")
# Of each op's benchmark; its cases are in order of importance, and what is left comes later.
SECONDS = {
    "sigreg": 28, "barlow": 26, "vicregl": 24, "attention": 45, "ema": 24, "tokens": 26,
    "jepa_step": 30, "vicreg": 35,
}  # fmt: skip
# What `jepa compare` imports beside torch.
TRAINER = ("pydantic", "safetensors", "yaml")
# What the trainer gains, compiled against compiled: V-JEPA at its published size, then the others.
COMPARED = (
    ("vjepa_large_videos",),
    ("vicreg_digits", "vicreg_jepa_digits", "lejepa_digits", "training.device=cuda"),
    ("ijepa_digits", "vjepa_physics", "training.device=cuda", "training.compile=true"),
)
# Of these for the imports and the case that is under way when no further one is started.
LAST_CASE = 14


def stale() -> str | None:
    """Why the compiled libraries must be built; None when those here are up to date."""
    sources = [ROOT / "setup.py"]
    sources += [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".cu", ".cuh", ".h")]
    newest = max(path.stat().st_mtime for path in sources if path.exists())
    for name in LIBRARIES:
        library = ROOT / "vicreg_kernels" / name
        if not library.exists():
            return f"{name} is absent"
        if library.stat().st_mtime < newest:
            return f"{name} is older than its sources"
    return None


def triton_kernels() -> list[str]:
    """Names of the Triton kernels: the functions under @triton.jit whose name ends so."""
    names: list[str] = []
    for path in sorted((ROOT / "vicreg_kernels").rglob("triton*.py")):
        names += re.findall(
            r"^@triton\.jit.*\n(?:@.*\n)*def (\w+_kernel)\b", path.read_text(), re.MULTILINE
        )
    return names


def tool(name: str) -> str | None:
    """A CUDA tool on the PATH or in the usual place."""
    usual = Path("/usr/local/cuda/bin") / name
    return shutil.which(name) or (str(usual) if usual.exists() else None)


def make_stages(out: Path, capability: str, build: str) -> list[Stage]:
    """All stages, most important first. build: auto, always or never."""
    python = sys.executable
    bench = [python, "-m", "bench.run", "--device", "cuda", "--lean", "--budget", "1.5"]
    bench += ["--output", str(out)]
    reason = None
    if build == "never":
        reason = "told not to build"
    elif build == "auto" and stale() is None:
        reason = "the libraries here are newer than their sources"
    sanitizer, ncu = tool("compute-sanitizer"), tool("ncu")
    exercise = [python, "-m", "bench.exercise"]
    # memcheck watches every kernel; the others this project's own, since vendor kernels are slow
    # under them and initcheck finds padding that those read and never use. A CUDA kernel is known
    # by its op's namespace, as mangled and demangled names hold it.
    spaces = [f"{op}::" for op in OPS]
    names = [*(f"{len(op)}{op}" for op in OPS), *spaces, *triton_kernels()]
    own = [word for name in names for word in ("--kernel-regex", f"kns={name}")]
    check = [sanitizer or "compute-sanitizer", "--error-exitcode", "9", "--tool"]
    sanitized = [[*check, "memcheck", *exercise]]
    sanitized += [
        [*check, name, *own, *exercise] for name in ("racecheck", "initcheck", "synccheck")
    ]
    profile = [ncu or "ncu", "--clock-control", "none", "--section", "SpeedOfLight"]
    profile += ["--section", "LaunchStats", "--launch-count", "16"]
    profile += ["--kernel-name-base", "demangled", "--kernel-name"]
    profile += [f"regex:{'|'.join([*spaces, *triton_kernels()])}"]
    trainer = None
    if not all(map(find_spec, TRAINER)):
        trainer = f"{', '.join(TRAINER)}: not all are installed"
    return [
        Stage(
            "build",
            [[python, "setup.py", "-q", "build_ext", "--inplace"]],
            150,
            "build.log",
            missing=reason,
            environment={"VICREG_KERNELS_ARCHS": capability} if capability else {},
        ),
        Stage("info", [[python, "-m", "vicreg_kernels.cli", "info"]], 30, "build.log"),
        Stage("tests", [[python, "-m", "pytest", *PYTEST, "tests"]], 150, "tests.log"),
        *(
            Stage(
                f"benchmark of {op}",
                [[*bench, "--op", op, "--seconds", str(SECONDS[op] - LAST_CASE)]],
                SECONDS[op],
                "bench.log",
            )
            for op in OPS
        ),
        Stage(
            "compute-sanitizer",
            sanitized,
            150,
            "sanitizer.log",
            missing=None if sanitizer else "compute-sanitizer is not installed",
            every=True,
            # Each tensor its own allocation, so that an access past its end is seen.
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        ),
        Stage(
            "trainer",
            [[python, "-m", "jepa", "compare", "--rounds", "5", *words] for words in COMPARED],
            150,
            "trainer.log",
            every=True,
            missing=trainer,
            environment={"PYTHONPATH": str(ROOT / "python")},
        ),
        Stage(
            "the other cases",
            [[*bench, "--op", op, "--missing"] for op in OPS],
            120,
            "bench.log",
            every=True,
        ),
        Stage(
            "ncu",
            [[*profile, *exercise, "--first-case", "--op", op] for op in OPS],
            90,
            "ncu.log",
            missing=None if ncu else "ncu is not installed",
            every=True,
        ),
    ]


def tail(text: str, lines: int) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


def summarise(results: list[Result], stages: list[Stage], device: str, out: Path) -> str:
    """summary.md: the stages, what failed and its last lines, the tests' verdict, the tables."""
    done = {result.stage.name: result for result in results}
    lines = [f"# {device}", "", "| stage | status | seconds | |", "| --- | --- | --- | --- |"]
    for stage in stages:
        result = done.get(stage.name)
        if result is None:
            lines.append(f"| {stage.name} | not reached | | |")
            continue
        note = result.reason
        if stage.name == "tests" and result.output:
            note = "; ".join(filter(None, (note, tail(result.output, 1))))
        lines.append(f"| {stage.name} | {result.status} | {result.seconds:.1f} | {note} |")
    for result in results:
        if result.status in ("failed", "timed out"):
            body = tail(result.output, 25)
            lines += ["", f"## {result.stage.name}: {result.status}", "", "```", body, "```"]
    records = report.load([path for op in OPS if (path := out / f"{op}.json").exists()])
    if records:
        lines += ["", "## Speed"]
    for record in records:
        tables = "\n\n".join(report.table(record, run) for run in record["runs"])
        lines += ["", f"### {record['op']}", "", "```", tables, "```"]
    return "\n".join(lines) + "\n"


def find_gpu() -> tuple[str, str]:
    """The GPU's name and its architecture as "90"; ValueError where there is none."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"torch cannot be imported ({error})") from error
    if not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}{minor}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 bench/gpu.py", description=__doc__)
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all (570)")
    parser.add_argument("--build", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--dry-run", action="store_true", help="list the stages, run nothing")
    options = parser.parse_args(argv)
    try:
        device, capability = find_gpu()
    except ValueError as error:
        if not options.dry_run:
            print(f"make gpu: no NVIDIA GPU to run on: {error}", file=sys.stderr)
            return 2
        device, capability = "no GPU", ""
    folder = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results" / folder).resolve()
    stages = make_stages(out, capability, options.build)
    if options.dry_run:
        for stage in stages:
            print(f"{stage.name}: at most {stage.seconds:.0f} s, {out / stage.log}")
            if stage.missing:
                print(f"  skipped: {stage.missing}")
            for command in stage.commands:
                print(f"  {shlex.join(command)}")
        return 0
    for op in OPS:  # runs are appended to what is there
        (out / f"{op}.json").unlink(missing_ok=True)

    def write(results: list[Result]) -> None:
        (out / "summary.md").write_text(summarise(results, stages, device, out))

    results = run_stages(
        stages, out, options.budget, ROOT, write, say=lambda line: print(line, flush=True)
    )
    print("\n" + (out / "summary.md").read_text())
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
