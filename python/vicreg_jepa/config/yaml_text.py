"""A YAML reader that refuses repeated keys, deep nesting and keys that are not names."""

from __future__ import annotations

import reprlib
from typing import Any

import yaml

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 200
_SHORT.maxlevel = 2


# Levels of lists and mappings; a recipe has three.
DEEPEST = 64


class YamlError(ValueError):
    """Says in one line what is wrong, and in which line of the text."""


def shown(value: Any) -> str:
    """repr of bounded length: a short YAML text with aliases can expand to a huge value."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an int of more digits than Python writes
        return f"a number of {value.bit_length()} bits"


def parse(text: str) -> Any:
    """Like yaml.safe_load, but raises YamlError."""
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check(node, "", set())
        return loader.construct_document(node)
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        # safe_load raises all of these where a value is not what its tag says
        raise YamlError(f"is not YAML: {' '.join(str(error).split())[:400]}") from error
    finally:
        if loader is not None:
            loader.dispose()


class _Loader(yaml.SafeLoader):
    """SafeLoader, which calls itself for each level, up to a depth."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.depth == DEEPEST:
            raise YamlError("is nested too deeply")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


def _check(node: yaml.Node, where: str, seen: set[int]) -> None:
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _check(child, where, seen)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            kind = "list" if isinstance(key, yaml.SequenceNode) else "mapping"
            raise YamlError(f"line {line}: a key is a {kind}, takes a name")
        name = f"{where}.{key.value}" if where else key.value
        if key.value in lines:
            raise YamlError(f"{name}: given twice, in lines {lines[key.value]} and {line}")
        lines[key.value] = line
        _check(value, name, seen)
