"""The program behind `make gpu`, `make gpu-bench` and `make gpu-check`: what needs an NVIDIA GPU.

For a bare machine: its own python3 with torch, triton and pytest, nvcc, no network, no virtual
environment, perhaps no git. Each of the three commands is over within ten minutes and useful alone:

    python3 -m bench.gpu          build, every gpu test, the first figures of every op
    python3 -m bench.gpu bench    all figures on every backend, the trainer, torch.compile's last
    python3 -m bench.gpu check    CUDA graphs, compute-sanitizer, ncu

results.tar.gz (logs, records, junit files) and summary.md go to $OUT, by default runs/gpu/STAGE.
They are written again after every stage; the summary is the last thing that is printed. --rehearse
runs a command on the CPU under the limits of such a machine (bench/gpu_rehearse.py).

Exit status: 0 all stages passed; 1 one failed, was skipped or was not reached; 2 no GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gpu_packages, gpu_parity, gpu_stages, gpu_summary  # noqa: E402
from bench.stages import Result, Stage, run_stages  # noqa: E402


def find_gpu() -> tuple[str, str, int]:
    """The GPU's name, its architecture as "90" and its bytes; ValueError where there is none."""
    try:
        import torch
    except ImportError as error:
        raise ValueError(f"torch cannot be imported ({error})") from error
    if not torch.cuda.is_available():
        raise ValueError(f"torch {torch.__version__} sees no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    free, _ = torch.cuda.mem_get_info()
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}", f"{major}{minor}", free


def say(line: str) -> None:
    print(line, flush=True)


def make_setting(
    options: argparse.Namespace, capability: str, memory: int | None
) -> gpu_stages.Setting:
    """Unpacks the trainer's wheels as well. Kernels that were compiled once are kept for the later
    stages and commands.
    """
    caches = ROOT / ".cache" / "gpu-kernels"
    os.environ.setdefault("TRITON_CACHE_DIR", str(caches / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "inductor"))
    work = ROOT / ".cache" / "gpu" / options.stage
    packages, trainer_missing = None, None
    if not options.dry_run:
        shutil.rmtree(work, ignore_errors=True)
        target = ROOT / ".cache" / "gpu-packages"
        shutil.rmtree(target, ignore_errors=True)
        packages, trainer_missing = gpu_packages.prepare(gpu_packages.FOLDER, target)
    return gpu_stages.Setting(
        ROOT,
        work,
        options.device,
        capability,
        options.build,
        options.budget,
        options.ops,
        options.tests,
        options.test_seconds,
        gpu_parity.count_workers(memory),
        packages,
        trainer_missing,
        say,
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", nargs="?", choices=gpu_stages.NAMES, default="gpu")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds for all (570)")
    parser.add_argument("--build", choices=("auto", "always", "never"), default="auto")
    parser.add_argument("--ops", help=f"of {','.join(gpu_stages.OPS)}; default: all")
    parser.add_argument("--tests", nargs="+", default=["tests"], help="files of tests")
    parser.add_argument(
        "--test-seconds", type=float, default=gpu_parity.TEST_SECONDS, help="limit of a test (60)"
    )
    parser.add_argument("--dry-run", action="store_true", help="list the stages, run nothing")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, in a scratch copy")
    parser.add_argument(
        "--inject",
        action="append",
        default=[],
        choices=("build", "hang", "crash", "parity"),
        help="with --rehearse: let this fail",
    )
    parser.add_argument("--carry", nargs="*", default=[], help="with --rehearse: ignored paths")
    options = parser.parse_args(argv)
    if not options.rehearse and (options.inject or options.carry):
        parser.error("--inject and --carry are of --rehearse")
    if options.stage == "bench" and set(options.inject) - {"build"}:
        parser.error("--inject: bench runs no tests, it takes build")
    names = options.ops.split(",") if options.ops else list(gpu_stages.OPS)
    unknown = [name for name in names if name not in gpu_stages.OPS]
    if unknown:
        parser.error(f"--ops: {', '.join(unknown)} not in {', '.join(gpu_stages.OPS)}")
    options.ops = names
    return options


def list_stages(stages: Sequence[Stage]) -> None:
    for stage in stages:
        print(f"{stage.name}: at most {stage.seconds:.0f} s, {stage.log}")
        if stage.missing:
            print(f"  skipped: {stage.missing}")
        for command in stage.commands:
            print(f"  {shlex.join(command)}")


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    options = parse(argv)
    if options.rehearse:
        from bench import gpu_rehearse

        return gpu_rehearse.rehearse(options, ROOT)
    device, capability, memory = "the CPU, in place of a GPU", "", None
    if options.device == "cuda":
        try:
            device, capability, memory = find_gpu()
        except ValueError as error:
            if not options.dry_run:
                print(f"bench.gpu: no NVIDIA GPU to run on: {error}", file=sys.stderr)
                return 2
            device = "no GPU"
    setting = make_setting(options, capability, memory)
    stages = gpu_stages.plan(setting, options.stage)
    if options.dry_run:
        list_stages(stages)
        return 0
    out = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu" / options.stage).resolve()
    title = f"bench.gpu {options.stage} on {device}"
    text = ""

    def report(results: list[Result]) -> None:
        nonlocal text
        seconds = time.monotonic() - begun
        text = gpu_summary.write(title, results, stages, setting.work, out, seconds)

    report([])
    budget = options.budget - (time.monotonic() - begun)
    results = run_stages(stages, setting.work / "logs", budget, ROOT, report, say)
    print(f"\n{text}", flush=True)
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main())
