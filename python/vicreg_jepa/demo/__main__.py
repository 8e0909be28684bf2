"""Train on digits with the fused kernels and with plain PyTorch, on physics videos, and on a world.

    python -m vicreg_jepa.demo --output runs/demo

Prints a table of the speed, memory and parity of the fused kernels; then trains a V-JEPA on
simulated videos and draws its surprise at an impossible one; then trains a world model and plans
with it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vicreg_jepa.cli_options import reported

PARTS = ("digits", "physics", "world")


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m vicreg_jepa.demo",
        description="VICReg on digits, fused against plain PyTorch; a V-JEPA's surprise at "
        "impossible physics; a world model that plans.",
    )
    add = options.add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="a folder; %(default)s")
    add("--only", choices=PARTS, help="one of the three parts")
    add("overrides", nargs="*", metavar="key=value", help="with --only: its recipe's settings")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parser()
    chosen = options.parse_args(argv)
    if chosen.overrides and chosen.only is None:
        options.error(f"{chosen.overrides[0]}: takes --only, which says to which part it belongs")
    if chosen.output.exists() and not chosen.output.is_dir():
        options.error(f"--output: got {str(chosen.output)!r}, a file; takes a folder")
    return reported("vicreg_jepa.demo", lambda: _run(chosen))


def _run(chosen: argparse.Namespace) -> int:
    from vicreg_jepa.demo import digits, physics, world

    for name, part in (("digits", digits), ("physics", physics), ("world", world)):
        if chosen.only in (None, name):
            part.run(part.settings(chosen.output, chosen.overrides), chosen.output)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
