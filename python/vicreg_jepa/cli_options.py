"""Shared by all command lines: types of options, and errors without a traceback."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path


def integer(least: int, most: int = 2**31 - 1) -> Callable[[str], int]:
    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"got {text!r}, takes an integer from {least} to {most}"
            )
        return value

    return parse


def share(text: str) -> float:
    """A number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, takes a number between 0 and 1")
    return value


def draw_sheets(
    module: str,
    description: str,
    folder: str,
    draw: Callable[[int, Path], list[str]],
    arguments: list[str] | None,
) -> None:
    """The command line of a contact sheet, `python -m module --output FOLDER --seed SEED`.

    folder: the default of --output. draw: writes the pictures of a seed into a folder and returns
    their names.
    """
    options = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    options.add_argument("--output", type=Path, default=Path(folder), help="a folder")
    options.add_argument("--seed", type=integer(0), default=0)
    chosen = options.parse_args(arguments)
    if chosen.output.exists() and not chosen.output.is_dir():
        options.error(f"--output: got {str(chosen.output)!r}, a file; takes a folder")
    chosen.output.mkdir(parents=True, exist_ok=True)
    names = draw(chosen.seed, chosen.output)
    print(f"{', '.join(names)} written to {chosen.output}")


def reported(program: str, run: Callable[[], int]) -> int:
    """Return run()'s exit code. An error that the user can correct is one line on stderr and code
    2; a stop by a signal is one line and 128 plus the signal's number.
    """
    code = 2
    try:
        return run()
    except ModuleNotFoundError as error:
        text = f"{error}: pip install 'vicreg-kernels[trainer]'"
    except (ImportError, ValueError, FloatingPointError) as error:
        text = str(error)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":
            raise
        line = str(error).partition("\n")[0] or "out of memory"
        text = f"{line}: take a smaller training.batch, or larger training.accumulate"
    except KeyboardInterrupt as error:
        text = str(error) or "stopped by SIGINT (Ctrl-C)"
        code = getattr(error, "code", 128 + signal.SIGINT)
    print(f"{program}: {text}", file=sys.stderr)
    return code
