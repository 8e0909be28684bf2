"""Runs README.md's blocks of Python, and the comments before them that make their tensors.

    python bench/release/quickstart.py README.md

needs the installed package alone, and prints where it was imported from and how many lines ran.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch


def main(readme: Path) -> None:
    blocks = re.findall(
        r"^(?:<!-- |```)python\n(.*?)^(?:-->|```)$", readme.read_text(), re.MULTILINE | re.DOTALL
    )
    known: dict[str, Any] = {"torch": torch}
    for block in blocks:
        exec(block, known)
    lines = sum(bool(line.strip()) for block in blocks for line in block.splitlines())
    print(f"{known['vk'].__file__}: {lines} lines of {readme.name} ran")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
