"""The code that the pages show: found, named by page and line, and told apart.

A block is fenced, or indented by four spaces after an empty line. Comments that no reader sees say
what a test needs to know:

    <!-- python            code that runs with the page's blocks, in its place among them
    x = torch.randn(4, 8)
    -->
    <!-- not run: why -->  the next block, of Python or of the shell, is not tested
    <!-- needs: module --> the next block runs only where the module is installed
    <!-- thorough: why --> the next block runs only in `make audit`
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("docs/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md")
)
MARKS = ("not run", "needs", "thorough")
COMMANDS = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?"
    r"(?:vicreg-jepa|vicreg-kernels|python3?|torchrun|pytest|pip|make|mkdir|tar)(?= |$)"
)
FENCE = re.compile(r"( *)(```+|~~~+)([\w+-]*)")
COMMENT = re.compile(r"<!-- ([\w ]+?)(?:: ([^\n]*?))?(?: -->|\n)")


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line
    kind: str  # "python", "shell" or "text"
    text: str
    mark: str = ""  # one of MARKS
    reason: str = ""
    hidden: bool = False

    @property
    def name(self) -> str:
        return f"{self.page}:{self.line}"


def kind_of(language: str, text: str) -> str:
    """What a block is; a block that does not say so is guessed."""
    if language == "python":
        return "python"
    if language in ("bash", "sh", "shell", "console"):
        return "shell"
    if language:
        return "text"
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if lines and all(COMMANDS.match(line) for line in lines):
        return "shell"
    try:
        parts = ast.parse(text).body
    except SyntaxError:
        return "text"
    does = (ast.Assign, ast.Import, ast.ImportFrom, ast.ClassDef, ast.FunctionDef, ast.Call)
    is_code = any(isinstance(node, does) for part in parts for node in ast.walk(part))
    return "python" if is_code else "text"


def blocks(page: str, text: str) -> list[Block]:
    """The blocks of a page, in order."""
    shown: list[Block] = []
    mark = reason = ""
    for line, language, body in _pieces(text):
        if language != "comment":
            shown.append(Block(page, line, kind_of(language, body), body, mark, reason))
            mark = reason = ""
            continue
        match = COMMENT.match(body)
        word = match[1] if match else ""
        if match and word == "python":
            code = body[match.end() :].removesuffix("-->")
            shown.append(Block(page, line + 1, "python", code, hidden=True))
        elif match and word in MARKS:
            mark, reason = word, match[2] or ""
            if not reason:
                raise ValueError(f"{page}:{line}: {word!r} without a reason")
        elif match and any(name in word for name in (*MARKS, "python", "skip", "run")):
            raise ValueError(f"{page}:{line}: {word!r}, takes python or one of {MARKS}")
    return shown


def _pieces(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, language, text) of comments, fenced and indented blocks; a comment's is "comment"."""
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        fence = FENCE.match(lines[i])
        begin = i
        if lines[i].lstrip().startswith("<!--"):
            while "-->" not in lines[i]:
                i += 1
            yield begin + 1, "comment", "\n".join(lines[begin : i + 1]).lstrip()
        elif fence:
            i += 1
            while lines[i].strip() != fence[2]:
                i += 1
            body = textwrap.dedent("\n".join(lines[begin + 1 : i]))
            yield begin + 2, fence[3] or ("text" if "{" in lines[begin] else ""), body
        elif lines[i].startswith("    ") and (
            i == 0 or lines[i - 1].strip() == "" or lines[i - 1].endswith("-->")
        ):
            while i + 1 < len(lines) and (lines[i + 1].startswith("    ") or not lines[i + 1]):
                i += 1
            yield begin + 1, "", textwrap.dedent("\n".join(lines[begin : i + 1])).rstrip()
        i += 1


def of(page: str) -> list[Block]:
    return blocks(page, (ROOT / page).read_text(encoding="utf-8"))
