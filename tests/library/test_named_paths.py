"""A file that documentation or a comment names by its path is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATHS = re.compile(
    r"(?<![\w/.<-])((?:csrc|vicreg_kernels|vicreg_jepa|python|tests|bench|docs)/[\w/.-]+"
    r"\.(?:py|h|cuh|cu|cpp|md|json|yaml|svg))\b"
)
NAMING = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in (
        "*.md",
        "docs/*.md",
        "Makefile",
        "csrc/**/*",
        "vicreg_kernels/**/*.py",
        "python/**/*.py",
        "bench/*.py",
        "tests/helpers/*.py",
    )
    for path in ROOT.glob(pattern)
    if path.suffix in (".md", ".py", ".h", ".cuh", ".cu", ".cpp", "")
    if path.is_file()
)
# Written by the rehearsal into its copy of the tree.
MADE = {"tests/test_rehearsed.py"}


def missing(text: str) -> list[str]:
    roots = (ROOT, ROOT / "python")
    return [
        path
        for path in PATHS.findall(text)
        if path not in MADE and not any((root / path).exists() for root in roots)
    ]


@pytest.mark.parametrize("name", NAMING)
def test_named_paths_exist(name):
    assert missing((ROOT / name).read_text(encoding="utf-8")) == []


def test_a_path_that_is_gone_is_found():
    text = "see `vicreg_kernels/nowhere.py` and `tests/conftest.py`, <torch/csrc/stable/tensor.h>"
    assert missing(text) == ["vicreg_kernels/nowhere.py"]
