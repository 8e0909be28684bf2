"""Put this library's classes and functions in place of another library's, and take them back."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType, TracebackType
from typing import Any

# Import name of each library of `vicreg_kernels.compat`.
PACKAGES = {
    "eb_jepa": "eb_jepa",
    "jepa_science": "jepa_science",
    "lightly": "lightly",
    "meta_jepa": "src",
    "pyjepa": "pyjepa",
    "pytorch_metric_learning": "pytorch_metric_learning",
    "solo_learn": "solo",
    "stable_pretraining": "stable_pretraining",
    "stable_worldmodel": "stable_worldmodel",
}


@dataclass
class _Active:
    """A name that is replaced now: the library's own object, ours, and how many patches want it."""

    original: Any
    ours: Any
    count: int = 0


_active: dict[tuple[str, str], _Active] = {}
_lock = threading.RLock()


@dataclass(frozen=True)
class Patch:
    """The replacements of one `patch`. As a context manager it undoes them at its end.

    Attributes:
        peer: the library.
        places: each replaced name, and the library's modules in which it is bound.
        missing: names that the installed version of the library does not have.
    """

    peer: str
    places: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{self.peer}: {len(self.places)} names are those of vicreg_kernels.compat"]
        lines += [f"  {name}: {', '.join(places)}" for name, places in self.places.items()]
        if self.missing:
            lines.append(f"  not in this version: {', '.join(self.missing)}")
        return "\n".join(lines)

    def __enter__(self) -> Patch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Undo what is still replaced. Raises ValueError where some of it is not, unless the body
        has raised an error, which goes on.
        """
        with _lock:
            here = [name for name in self.places if (self.peer, name) in _active]
            if here:
                unpatch(self.peer, *here)
        if error is None and len(here) < len(self.places):
            gone = ", ".join(name for name in self.places if name not in here)
            raise ValueError(f"names: got {gone} of {self.peer}, restored within the context")


def patch(peer: str, *names: str) -> Patch:
    """Replace another library's classes and functions by this library's, in every module of it.

        vk.patch("lightly")                      # from here on lightly.loss.VICRegLoss is ours
        with vk.patch("lightly", "SIGReg"): ...  # only this one, and only inside

    Every module of the library that holds the class or function, under any name, gets this
    library's in its place, also a module that is imported later. Other code that has already
    imported it by name (`from lightly.loss import VICRegLoss`), and existing instances, keep the
    library's; so patch before both. Patches are counted: the library's own is back after as many
    calls of `unpatch` as of `patch`. A patch holds for its process only.

    Args:
        peer: "lightly", "solo_learn", "stable_pretraining", "stable_worldmodel", "eb_jepa",
            "pytorch_metric_learning", "pyjepa", "jepa_science" or "meta_jepa".
        names: of `vicreg_kernels.compat.<peer>`; none: all that the installed version has.

    Returns: what was replaced where (`Patch`): print it, or use it as a context manager.

    Raises:
        ValueError: another peer or name, or none that the installed version has.
        ImportError: the peer is not installed or cannot be imported. Nothing is replaced then.
    """
    compat = _compat(peer)
    homes: dict[str, str] = compat.HOMES
    _check_names(peer, names, homes)
    with _lock:
        present: dict[str, Any] = {}
        for name in names or homes:
            module = _home(peer, homes[name])
            if module is not None and hasattr(module, name):
                present[name] = getattr(module, name)
            elif names:
                raise ValueError(f"names: got {name!r}, which this version of {peer} does not have")
        if not present:
            raise ValueError(f"peer: got {peer!r}, whose version here has none of {tuple(homes)}")
        for name, current in present.items():
            active = _active.get((peer, name))
            if active is None:
                active = _active[peer, name] = _Active(current, getattr(compat, name))
            active.count += 1
            _rebind(peer, active.original, active.ours)
        places = {name: tuple(_places(peer, _active[peer, name].ours)) for name in present}
    return Patch(peer, places, tuple(name for name in homes if name not in present and not names))


def unpatch(peer: str, *names: str) -> None:
    """Undo one `patch` of these names.

    Args:
        peer: as in `patch`.
        names: the names to restore; without names, all of this peer that are replaced now.

    Raises: ValueError naming the argument, also where nothing is replaced.
    """
    _check_names(peer, names, _compat(peer).HOMES)
    with _lock:
        replaced = [name for known, name in _active if known == peer]
        if not replaced:
            raise ValueError(f"peer: got {peer!r}, of which nothing is replaced")
        for name in names:
            if name not in replaced:
                raise ValueError(f"names: got {name!r} of {peer}, which is not replaced")
        for name in names or replaced:
            active = _active[peer, name]
            active.count -= 1
            if active.count == 0:
                del _active[peer, name]
                _rebind(peer, active.ours, active.original)


def _compat(peer: str) -> ModuleType:
    if peer not in tuple(PACKAGES):
        raise ValueError(f"peer: got {peer!r}, takes one of {tuple(PACKAGES)}")
    return importlib.import_module(f"vicreg_kernels.compat.{peer}")


def _check_names(peer: str, names: tuple[str, ...], homes: Mapping[str, str]) -> None:
    for name in names:
        if name not in tuple(homes):
            raise ValueError(f"names: got {name!r} of {peer}, takes some of {tuple(homes)}")
    if len(set(names)) < len(names):
        raise ValueError(f"names: got {names}, takes each once")


def _home(peer: str, home: str) -> ModuleType | None:
    """The peer's module called `home`, imported; None where its version has none."""
    package = PACKAGES[peer]
    try:
        importlib.import_module(package)
        return importlib.import_module(home)
    except ModuleNotFoundError as error:
        inside = error.name is not None and f"{home}.".startswith(f"{error.name}.")
        if inside and error.name != package:
            return None
        raise _cannot(peer, home, error) from error
    except Exception as error:  # whatever its import raises
        raise _cannot(peer, home, error) from error


def _cannot(peer: str, home: str, error: Exception) -> ImportError:
    reason = f"{home}: {type(error).__name__}: {error}"
    return ImportError(f"peer: got {peer!r}, which cannot be imported here ({reason})")


def _bindings(peer: str, value: Any) -> Iterator[tuple[str, ModuleType, str]]:
    """The loaded modules of the peer that have a name for `value`, and that name."""
    package = PACKAGES[peer]
    for module_name, module in list(sys.modules.items()):
        if module_name == package or module_name.startswith(f"{package}."):
            for name, bound in list(getattr(module, "__dict__", {}).items()):
                if bound is value:
                    yield module_name, module, name


def _rebind(peer: str, old: Any, new: Any) -> None:
    for _, module, name in list(_bindings(peer, old)):
        setattr(module, name, new)


def _places(peer: str, value: Any) -> list[str]:
    return sorted({module_name for module_name, _, _ in _bindings(peer, value)})
