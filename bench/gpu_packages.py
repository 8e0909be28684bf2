"""What the trainer imports and a GPU machine's image lacks, carried there as wheels.

    python3 -m bench.gpu_packages        (`make gpu-packages`, where there is a network)

downloads them into .gpu-packages/, for CPython 3.12 on x86-64 Linux unless told otherwise. That
folder is ignored by git: name it where the tree is copied to the machine. `bench.gpu` unpacks the
wheels into a scratch folder, which only the trainer's stages and tests have on their path.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".gpu-packages"
# What python/vicreg_jepa imports beside torch. The image has all but the first two.
IMPORTS = (
    "pydantic", "pymunk", "safetensors", "yaml", "rich", "sklearn", "scipy", "matplotlib", "tqdm",
    "numpy", "PIL",
)  # fmt: skip
CARRIED = ("pydantic>=2", "pymunk")
# In the order of preference; an older glibc's wheels run on a newer one.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def absent(folder: Path | None = None) -> list[str]:
    """Which of IMPORTS cannot be imported here, those in `folder` counted as there."""
    unpacked = {path.name.split(".")[0] for path in folder.iterdir()} if folder else set()
    return [name for name in IMPORTS if name not in unpacked and find_spec(name) is None]


def unpack(wheels: Path, target: Path) -> str | None:
    """Installs the wheels into `target`, offline; why that failed, or None."""
    packed = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if not packed:
        return f"no wheel in {wheels.name}: `make gpu-packages` downloads them"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
    command += ["--disable-pip-version-check", "--root-user-action", "ignore", "--upgrade"]
    command += ["--target", str(target), *map(str, packed)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"the wheels were not installed: {error}"
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["pip failed"]
        return f"the wheels were not installed: {lines[-1]}"
    return None


def prepare(wheels: Path, target: Path) -> tuple[Path | None, str | None]:
    """The folder for the trainer's path, None where nothing is lacking; and why the trainer cannot
    run, None when it can.
    """
    if not absent():
        return None, None
    why = unpack(wheels, target)
    if why is not None:
        return None, f"{', '.join(absent())} cannot be imported; {why}"
    lacking = absent(target)
    if lacking:
        return None, f"{', '.join(lacking)} cannot be imported, with {wheels.name} unpacked"
    return target, None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python3 -m bench.gpu_packages", description=__doc__)
    parser.add_argument("--python", default="3.12", help="of the machine (3.12)")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    for old in options.folder.glob("*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--implementation", "cp"]
    command += ["--python-version", options.python, "--dest", str(options.folder)]
    for abi in (f"cp{options.python.replace('.', '')}", "abi3", "none"):
        command += ["--abi", abi]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    code = subprocess.run([*command, *CARRIED]).returncode
    if code == 0:
        size = sum(path.stat().st_size for path in options.folder.glob("*.whl"))
        print(f"{len(list(options.folder.glob('*.whl')))} wheels, {size / 2**20:.1f} MiB")
    return code


if __name__ == "__main__":
    sys.exit(main())
