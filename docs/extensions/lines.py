"""Puts every line of highlighted code in a span, so that site.css can indent where it goes on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pygments.formatters import HtmlFormatter
from sphinx.highlighting import PygmentsBridge


class Lines(HtmlFormatter):
    def wrap(self, source: Any) -> Any:
        return super().wrap(self._spans(source))

    def _spans(self, source: Any) -> Iterator[tuple[int, str]]:
        for is_line, text in source:
            if is_line:
                text = '<span class="line">' + text.removesuffix("\n") + "</span>\n"
            yield is_line, text


def setup(app: Any) -> dict[str, Any]:
    PygmentsBridge.html_formatter = Lines
    return {"parallel_read_safe": True}
