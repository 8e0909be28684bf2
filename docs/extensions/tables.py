"""Makes tables legible on a narrow screen: site.css shows each row there as a card of its own.

For that every cell of a table of two or more columns begins with its column's heading, which
wide screens hide. The class "many" tells tables of many columns, "short" those whose cells may
stand side by side on a card.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.transforms.post_transforms import SphinxPostTransform


class Cards(SphinxPostTransform):
    default_priority = 900
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        for table in list(self.document.findall(nodes.table)):
            heads = [row for head in table.findall(nodes.thead) for row in head.findall(nodes.row)]
            if len(heads) != 1 or len(heads[0]) < 2:
                continue
            titles = [entry.astext() for entry in heads[0]]
            table["classes"].append("cards")
            if len(titles) > 7:
                table["classes"].append("many")
            cells = [
                entry for body in table.findall(nodes.tbody) for row in body for entry in row[1:]
            ]
            if all(len(entry.astext()) < 16 for entry in cells):
                table["classes"].append("short")
            for body in table.findall(nodes.tbody):
                for row in body.findall(nodes.row):
                    for title, entry in zip(titles[1:], row[1:], strict=False):
                        self.label(entry, title)

    def label(self, entry: Any, title: str) -> None:
        if not entry.astext().strip():
            entry["classes"].append("empty")
            return
        if title.strip():
            label = nodes.inline("", title + " ", classes=["column"])
            entry[0].insert(0, label)


def setup(app: Any) -> dict[str, Any]:
    app.add_post_transform(Cards)
    return {"parallel_read_safe": True}
