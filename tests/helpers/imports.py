"""What imports what, read from the source of a package without importing it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

Graph = dict[str, set[str]]


def modules(root: Path, package: str) -> Graph:
    """Each module of `package`, a folder of `root`, and the modules of it that it imports: at the
    top of the file or inside a function; not those for type checkers alone.
    """
    files = {_name(path.relative_to(root)): path for path in sorted((root / package).rglob("*.py"))}
    return {
        name: {other for other in _imported(name, path, files) if other != name}
        for name, path in files.items()
    }


def _name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imported(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    parent = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _known(alias.name, files)
        else:
            base = node.module or ""
            if node.level:
                above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield from _known(inner if inner in files else base, files)


def _known(name: str, files: Mapping[str, Path]) -> Iterator[str]:
    if name in files:
        yield name


def _statements(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            yield from _statements(node)


def rooms(graph: Graph, room: Callable[[str], str]) -> Graph:
    """The graph of what `room` calls the modules."""
    room_graph: Graph = {room(name): set() for name in graph}
    for name, imported in graph.items():
        room_graph[room(name)] |= {room(other) for other in imported} - {room(name)}
    return room_graph


def cycles(graph: Graph) -> list[set[str]]:
    """Sets of nodes that reach each other."""
    reach = {name: _reached(graph, name) for name in graph}
    circles: list[set[str]] = []
    for name in graph:
        circle = {other for other in reach[name] if name in reach[other]}
        if circle and not any(name in known for known in circles):
            circles.append(circle)
    return circles


def _reached(graph: Graph, name: str) -> set[str]:
    seen: set[str] = set()
    left = list(graph[name])
    while left:
        node = left.pop()
        if node not in seen:
            seen.add(node)
            left += graph[node]
    return seen


def floors(graph: Graph) -> dict[str, int]:
    """0 for what imports nothing, else one above the highest that it imports; no cycles."""
    levels: dict[str, int] = {}

    def floor(name: str) -> int:
        if name not in levels:
            levels[name] = max((floor(other) + 1 for other in graph[name]), default=0)
        return levels[name]

    for name in graph:
        floor(name)
    return levels


def without_shortcuts(graph: Graph) -> Graph:
    """Without the arrows that a path of several others replaces; no cycles."""
    return {
        name: {
            other
            for other in imported
            if not any(other in _reached(graph, between) for between in imported - {other})
        }
        for name, imported in graph.items()
    }
