"""Records the calls of the library's ops: with what, and whether at all."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class RecordedOps(TorchDispatchMode):
    """`calls` lists (name, args) of every vicreg_kernels op that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace.startswith("vicreg_kernels"):
            self.calls.append((func._opname, args))
        return func(*args, **(kwargs or {}))


def words(args: tuple[Any, ...]) -> list[str]:
    """The strings among an op's arguments: the backend that runs is one of them."""
    return [each for each in args if isinstance(each, str)]
