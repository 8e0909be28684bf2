"""Reads a recipe or a YAML file and applies `key=value` from the command line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vicreg_jepa.config import yaml_text
from vicreg_jepa.config.rules import KINDS, OF_LARS, OF_NATURAL, OF_VIT
from vicreg_jepa.config.settings import Augmentation, Config, Data, Model, Optimizer
from vicreg_jepa.methods.base import taken_by

RECIPES = Path(__file__).with_name("recipes")


class ConfigError(ValueError):
    """The message names every key that is wrong."""


def recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Load a recipe by name, or a YAML file, and apply `key=value` or `section.key=value`.

    If an override replaces data.kind, method, augment.name, model.encoder or optimizer.name, the
    file's settings that apply only to its own choice are dropped. Raises ConfigError naming the
    key, also if a key is given twice, as by a shell that expands braces.
    """
    values = _read(source)
    keys = [_key(word) for word in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key}: given {keys.count(key)} times, takes one (quote braces)")
    chosen: dict[str, Any] = {}
    for word in overrides:
        _put(chosen, word)
    _give_way(values, chosen)
    for word in overrides:
        _put(values, word)
    return parse(values)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(f"config: got {str(source)!r}, takes a YAML file or one of {recipes()}")
    try:
        values = yaml_text.parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not UTF-8 text ({error.reason})") from error
    except yaml_text.YamlError as error:
        raise ConfigError(f"config: {path} {_continued(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} holds a {type(values).__name__}, takes keys and values")
    return values


def _continued(error: Exception) -> str:
    text = str(error)
    return text if text.startswith("is ") else f"is refused: {text}"


def _give_way(values: dict[str, Any], chosen: dict[str, Any]) -> None:
    """Drop the file's values that apply only to a choice that `chosen` replaces."""

    def replaced(section: str | None, name: str, default: str | None) -> Any:
        old, new = ((v if section is None else v.get(section)) for v in (values, chosen))
        if not isinstance(old, dict) or not isinstance(new, dict) or name not in new:
            return None
        return new[name] if new[name] != old.get(name, default) else None

    def drop(section: str, names: Iterable[str]) -> None:
        for name in names:
            if isinstance(values.get(section), dict):
                values[section].pop(name, None)

    if replaced("data", "kind", Data().kind) is not None:
        drop("data", KINDS)
    method = replaced(None, "method", None)
    for key, methods in taken_by().items() if method is not None else ():
        if method not in methods:
            section, name = key.split(".")
            drop(section, [name])
    if replaced("augment", "name", Augmentation().name) == "digits":
        drop("augment", OF_NATURAL)
    if replaced("model", "encoder", Model().encoder) not in (None, "vit"):
        drop("model", OF_VIT)
    optimizer = replaced("optimizer", "name", Optimizer().name)
    if optimizer is not None:
        drop("optimizer", ["betas"] if optimizer == "lars" else OF_LARS)


def layered(words: Sequence[str], over: Sequence[str]) -> list[str]:
    """Merge overrides; for the same key `over` wins."""
    replaced = {_key(word) for word in over}
    return [*(word for word in words if _key(word) not in replaced), *over]


def _key(word: str) -> str:
    return word.partition("=")[0]


def parse(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_message(error)) from None


def _put(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: got {word!r}, takes key=value")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {section} is not a section")
    try:
        values[name] = yaml_text.parse(text) if text else None
    except yaml_text.YamlError as error:
        problem = str(error).replace("is not YAML", "is not a YAML value")
        if ": given twice" in problem:
            raise ConfigError(f"{key}.{problem}") from error
        raise ConfigError(f"{key}: got {yaml_text.shown(text)}, which {problem}") from error


def _message(error: ValidationError) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key")
        elif problem["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            text, given = problem["msg"].removeprefix("Value error, "), problem["input"]
            if not isinstance(given, dict):
                text = f": got {yaml_text.shown(given)}, {text}"
            elif problem["type"] == "value_error":  # of a section; it begins with the key
                text = f".{text}"
            else:
                text = f": {text}"
            lines.append(f"{where}{text}" if where else text[1:])
    return "; ".join(lines)


def describe(config: Config) -> dict[str, Any]:
    """The settings as JSON values; `parse` reads them back."""
    return config.model_dump(mode="json")
