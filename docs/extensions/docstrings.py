"""Turns the docstrings of this library into reStructuredText for Sphinx's autodoc.

A docstring has paragraphs; indented formulas; lists of `name: text`; and the sections Args,
Returns, Raises, Shapes and Source, in any order, with their text below them or on the same line.
Names in backticks become links where the reference has them, and `docs/<page>.md` a link to that
page. All else is text: a star or an underscore in a formula means nothing to Sphinx.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import vicreg_kernels

TITLES = {
    "Args": "Arguments",
    "Returns": "Returns",
    "Raises": "Raises",
    "Shapes": "Shapes",
    "Source": "Source",
}
SECTION = re.compile(rf"({'|'.join(TITLES)}):(?:\s+(.*))?$")
# `x, y: what they are`; not a sentence that goes on after a colon.
ENTRY = re.compile(r"(\w+(?:, \w+)*):(?: (.*))?$")
# In running text: code, and the name of a page.
SPECIAL = re.compile(r"`([^`]+)`|\(?\bdocs/(\w+)\.md\b")


def plain(text: str) -> str:
    return re.sub(r"([\\*_|`<>])", r"\\\1", text)


def code(text: str) -> str:
    if text in vicreg_kernels.__all__:
        return f":py:obj:`{text} <vicreg_kernels.{text}>`"
    return f"``{text}``"


def inline(text: str) -> str:
    """Running text, with its code and pages."""
    parts, end = [], 0
    for match in SPECIAL.finditer(text):
        opening = "(" if match[0].startswith("(") else ""
        parts.append(plain(text[end : match.start()]) + opening)
        parts.append(code(match[1]) if match[1] else f":doc:`/{match[2]}`")
        end = match.end()
    return "".join(parts) + plain(text[end:])


def apart(text: str) -> tuple[str, list[tuple[str, str]], str]:
    """A paragraph whose sentences begin with `names:`: what stands before, (names, text), and the
    sentences after the last one's first.
    """
    parts = re.split(r"(?:^|(?<=[.;]) )(?=[a-z_]\w*(?:, [a-z_]\w*)*: )", text)
    head = parts.pop(0) if not ENTRY.match(parts[0]) else ""
    found = entries([part for part in parts if part]) or []
    found = [(names, text.removesuffix(";")) for names, text in found]
    if len(found) < 2:
        return text, [], ""
    names, last = found.pop()
    last, *tail = re.split(r"(?<=\.) (?=[A-Z])", last, maxsplit=1)
    return head, [*found, (names, last)], "".join(tail)


def blocks(lines: list[str]) -> Iterator[list[str]]:
    """Runs of lines without an empty one between them."""
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def entries(lines: list[str]) -> list[tuple[str, str]] | None:
    """(names, text) of lines that begin with `names:`, whose others are indented; else None."""
    found: list[tuple[str, str]] = []
    for line in lines:
        match = ENTRY.match(line)
        if match:
            found.append((match[1], match[2] or ""))
        elif found and line.startswith(" "):
            names, text = found[-1]
            found[-1] = (names, f"{text} {line.strip()}".strip())
        else:
            return None
    return found


def definitions(found: list[tuple[str, str]]) -> list[str]:
    lines = []
    for names, text in found:
        lines.append(", ".join(f"``{name}``" for name in names.split(", ")))
        lines += [f"    {inline(text)}", ""]
    return lines


def paragraphs(lines: list[str]) -> list[str]:
    """Paragraphs, formulas and lists."""
    out: list[str] = []
    for block in blocks(lines):
        found = entries(block)
        if block[0].startswith("    "):
            out += [
                "::",
                "",
                *(f"    {line}" for line in textwrap.dedent("\n".join(block)).split("\n")),
            ]
        elif found is not None and (len(found) > 1 or len(lines) == len(block)):
            out += definitions(found)
        else:
            head, some, tail = apart(" ".join(line.strip() for line in block))
            out += [inline(head), "", *definitions(some), inline(tail)]
        out.append("")
    return out


def sections(lines: list[str]) -> Iterator[tuple[str, list[str]]]:
    """(title, lines), the title "" for what stands before and between the sections."""
    title, body = "", []
    for line in lines:
        match = SECTION.match(line)
        inside = title and (line.startswith(" ") or not line)
        if match:
            yield title, body
            title, body = match[1], [match[2]] if match[2] else []
        elif title and not inside and not (body and body[-1]):
            yield title, body
            title, body = "", [line]
        else:
            body.append(line)
    yield title, body


def section(title: str, body: list[str]) -> list[str]:
    first = body[:1] if body and not body[0].startswith(" ") else []
    rest = textwrap.dedent("\n".join(body[len(first) :])).strip("\n").split("\n")
    if first:  # `Returns: text`, which goes on at the margin or below it
        body = [" ".join(line.strip() for line in [*first, *rest])]
        content = [inline(body[0])]
    else:
        content = paragraphs(rest)
    return [f":{TITLES[title]}:", *(f"    {line}".rstrip() for line in content), ""]


def rendered(lines: list[str]) -> list[str]:
    out: list[str] = []
    for title, body in sections(lines):
        out += section(title, body) if title else paragraphs(body)
    return out


def process(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    lines[:] = rendered([line.rstrip() for line in lines])


def shorten(
    app: Any, what: str, name: str, thing: Any, options: Any, signature: Any, returns: Any
) -> Any:
    """A default that has no text of its own as dots, or Sphinx reads no signature from it."""
    return (signature or "").replace("<factory>", "...") or None, returns


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", process)
    app.connect("autodoc-process-signature", shorten)
    return {"parallel_read_safe": True}
