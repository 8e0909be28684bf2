"""Counts the Triton kernels that the tests marked `gpu` compile, on a machine without a GPU.

    python -m tests.helpers.compilations [--op OP] [--record FILE] [--compile] [FILES or node ids]

The tests run on the pretended GPU of pretended_gpu.py, an H100, up to their last launch. Triton's
own launcher computes what it would specialise on (dtypes, integers that are 1 or a multiple of 16,
addresses that are, constants, options); only its compiler is replaced by one that records, so what
is counted is what is compiled there: entries of Triton's cache on disk, which processes share.
Results are wrong, so every assertion of the tests passes. torch.compile's own kernels are not
counted. Tests of the CUDA backend are left out: they launch no Triton kernel. So are the trainer's.
"""

from __future__ import annotations

import argparse
import ast
import importlib.abc
import importlib.machinery
import json
import os
import signal
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
OPS = sorted(path.parent.name for path in (ROOT / "vicreg_kernels").glob("*/contract.py"))


class Recording:
    """What was compiled and launched, by test."""

    def __init__(self) -> None:
        self.test: str | None = None
        self.made: dict[str, dict[str, Any]] = {}  # compilations, by their key on disk
        self.launches: dict[str, set[str]] = defaultdict(set)  # tests -> keys
        self.outcomes: dict[str, str] = {}  # tests -> how they ended
        self.triton: set[str] = set()  # tests that name the Triton backend
        self.errors: dict[str, str] = {}

    def op(self, key: str) -> str:
        return self.made[key]["module"].split(".")[1]

    def keys(self, op: str | None = None) -> set[str]:
        used = set().union(*self.launches.values())
        return {key for key in used if op is None or self.op(key) == op}

    def dump(self) -> dict[str, Any]:
        return {
            "made": self.made,
            "launches": {test: sorted(keys) for test, keys in self.launches.items()},
            "outcomes": self.outcomes,
            "triton": sorted(self.triton),
            "errors": self.errors,
        }


class Compiled:
    """Stands in for a compiled kernel: launching it notes which test did."""

    function = packed_metadata = None

    def __init__(self, recording: Recording, key: str) -> None:
        self.recording, self.key = recording, key

    def launch_metadata(self, *args: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        assert 0 < args[0] < 2**31, args[:3]
        self.recording.launches[self.recording.test or "outside of a test"].add(self.key)


def record_compilations(recording: Recording, compiling: bool = False) -> None:
    """Replace Triton's driver and compiler. compiling: compile for sm_90 all the same."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    def do_compile(
        self: Any,
        key: str,
        signature: dict[str, str],
        device: int,
        constants: dict[Any, Any],
        options: Any,
        attributes: dict[Any, Any],
        warmup: bool,
    ) -> Compiled:
        source = ASTSource(self, signature, constants, attributes)
        disk = f"{self.fn.__name__} {source.hash()} {options.hash()}"
        names = list(signature)
        arguments = dict(signature)
        for (index, *_), value in constants.items():
            arguments[names[index]] = f"={value}"
        for (index, *_), marks in attributes.items():
            arguments[names[index]] += " %16" if marks else ""
        for name in ("num_warps", "num_stages", "enable_fp_fusion"):
            arguments[f"({name})"] = str(getattr(options, name))
        recording.made[disk] = {
            "kernel": self.fn.__name__,
            "module": self.fn.__module__,
            "arguments": arguments,
        }
        if compiling:
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options.__dict__)
        made = Compiled(recording, disk)
        self.device_caches[device][0][key] = made
        return made

    driver.set_active(Driver())
    JITFunction._do_compile = do_compile


def example(x, stride, n, scale, BLOCK):
    """The body of a kernel for the test of the keys; nobody compiles it."""


NEVER_SOFTENED = ("pretended_cuda", "pretended_gpu", "compilations")


class Unasserted(importlib.abc.MetaPathFinder):
    """Imports the tests' modules with assertions that are computed and cannot fail."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        package, _, module = name.partition(".")
        file = TESTS / f"{module.replace('.', '/')}.py"
        if package != "tests" or not file.exists() or file.stem in NEVER_SOFTENED:
            return None
        loader = _Loader(name, str(file))
        return importlib.machinery.ModuleSpec(name, loader, origin=str(file), is_package=False)


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> Any:
        tree = ast.parse(Path(self.path).read_text(), self.path)
        tree = ast.fix_missing_locations(_Soften().visit(tree))
        return compile(tree, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: Any) -> None:
        module.__file__ = self.path
        super().exec_module(module)


def skip_comparisons() -> None:
    """The reference launches nothing, and takes most of the time: of its results only the shapes
    are made, as those of the CUDA backend are.
    """
    from tests.helpers import tolerances
    from vicreg_kernels.core import dispatch
    from vicreg_kernels.vicregl import op, reference

    choose = dispatch.choose

    def fused(name: str, backend: str | None, device: str, *rest: Any, **keywords: Any) -> str:
        if backend == "reference" and device == "cuda":
            return "cuda"
        return choose(name, backend, device, *rest, **keywords)

    dispatch.choose = fused
    reference.match = lambda a, b: op.match(a, b, "cuda")

    def nothing(*args: Any, **keywords: Any) -> None: ...

    def once(
        function: Any, backend: str, *inputs: Any, cotangents: Any = (1.0,), **rest: Any
    ) -> Any:
        return tolerances.differentiate(
            lambda *leaves: function(*leaves, backend=backend), *inputs, cotangents=cotangents
        )

    tolerances.assert_close_to_truth = nothing
    tolerances.assert_matches_reference = once


_SOFTENED = """
try:
    pass
except Exception as softened:
    if type(softened).__name__ == "DevicesDiffer":
        raise
"""


class _Soften(ast.NodeTransformer):
    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        """assert X -> try: X; except Exception as e: raise if type(e).__name__ == ..."""
        (statement,) = ast.parse(_SOFTENED).body
        assert isinstance(statement, ast.Try)
        statement.body = [ast.Expr(node.test)]
        for inner in statement.handlers:
            for each in ast.walk(inner):
                ast.copy_location(each, node)
        return ast.copy_location(statement, node)


def backend_of(item: Any) -> str | None:
    """The backend that a test is parametrised with, if it is."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    for name in ("fused", "backend"):
        value = parameters.get(name)
        value = getattr(value, "name", value)
        if value in ("cpu", "triton", "cuda"):
            return value
    return None


class Plugin:
    """Selects the tests, and tells the recording which one runs."""

    def __init__(self, recording: Recording, selected: Any = None) -> None:
        self.recording, self.selected = recording, selected

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        kept = [
            item
            for item in items
            if item.get_closest_marker("gpu") is not None
            and backend_of(item) not in ("cpu", "cuda")
            and (self.selected is None or self.selected(item.nodeid))
        ]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        self.recording.triton = {i.nodeid for i in kept if backend_of(i) == "triton"}

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        self.recording.test = nodeid

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.recording.outcomes[report.nodeid] = report.outcome
            if report.outcome != "passed":
                self.recording.errors[report.nodeid] = str(report.longrepr)[-2000:]

    def pytest_runtest_logfinish(self, nodeid: str, location: Any) -> None:
        self.recording.test = None


def files_with_gpu_tests() -> list[str]:
    """Those that carry the marker or use the `fused` fixture, but for the trainer's: it needs a
    CUDA generator, and compiles with torch.compile itself.
    """
    words = ("mark.gpu", "(fused", ", fused")
    left_out = ("library/test_compilations.py", "trainer/test_gpu.py")
    paths = [p for p in sorted(TESTS.rglob("test_*.py")) if not str(p).endswith(left_out)]
    return [str(p) for p in paths if any(word in p.read_text() for word in words)]


def run(paths: list[str], verbose: bool = False, compiling: bool = False) -> Recording:
    """Run the gpu tests of `paths` on the pretended GPU. Once a process: it stays pretended."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.pop("VICREG_KERNELS_BACKEND", None)
    sys.path[:0] = [str(ROOT), str(ROOT / "python")]
    import pytest

    from tests.helpers import pretended_gpu

    recording = Recording()
    pretended_gpu.install()
    record_compilations(recording, compiling)
    sys.meta_path.insert(0, Unasserted())
    from vicreg_kernels.core import library

    library.CUDA_MISSING = None
    skip_comparisons()
    options = ["--assert=plain", "-p", "no:xdist", "--rootdir", str(ROOT), "-o", "addopts="]
    options += ["-p", "no:cacheprovider", "-q", "--tb=short"]
    options += [] if verbose else ["--no-summary", "--no-header"]
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))  # `timeout` gets a table too
    code = pytest.main([*options, *paths], plugins=[Plugin(recording)])
    if code not in (0, 1, 2, 5):
        raise RuntimeError(f"the tests could not be run: pytest ended with {code}")
    return recording


def arguments_of_most_keys(made: list[dict[str, Any]]) -> list[tuple[int, str]]:
    """(compilations saved if the argument did not matter, argument), the most first."""
    names = {name for each in made for name in each["arguments"]}

    def without(name: str | None) -> int:
        keys = (tuple(sorted((k, v) for k, v in m["arguments"].items() if k != name)) for m in made)
        return len(set(keys))

    saved = ((without(None) - without(name), name) for name in names)
    return sorted((pair for pair in saved if pair[0]), reverse=True)


def tables(recording: Recording, op: str | None) -> str:
    """By kernel with the arguments that cause most, and by test file."""
    keys = recording.keys(op)
    lines = [f"{len(keys)} compilations" + (f" of {op}" if op else "")]
    for name in OPS if op is None else ():
        lines.append(f"    {len(recording.keys(name)):5d} {name}")
    kernels: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for key in keys:
        kernels[recording.op(key), recording.made[key]["kernel"]].append(recording.made[key])
    lines.append("\nkernel, compilations, and how many fewer if one argument did not matter")
    for (name, kernel), made in sorted(kernels.items(), key=lambda k: -len(k[1])):
        most = ", ".join(f"{arg} {saved}" for saved, arg in arguments_of_most_keys(made)[:8])
        lines.append(f"    {len(made):5d} {name}.{kernel}: {most}")
    lines.append("\ntest file, compilations, and of them those that no other file needs")
    files: dict[str, set[str]] = defaultdict(set)
    for test, used in recording.launches.items():
        files[test.split("::")[0]] |= used & keys
    for file, used in sorted(files.items(), key=lambda f: -len(f[1])):
        others = set().union(*(u for f, u in files.items() if f != file))
        lines.append(f"    {len(used):5d} {len(used - others):5d} {file}")
    tests = defaultdict(set)
    for test, used in recording.launches.items():
        tests[test.split("[")[0]] |= used & keys
    lines.append("\ntest function, compilations, and of them those that no other needs")
    count: dict[str, int] = defaultdict(int)
    for used in tests.values():
        for key in used:
            count[key] += 1
    for test, used in sorted(tests.items(), key=lambda t: -len(t[1]))[:60]:
        lines.append(f"    {len(used):5d} {sum(count[k] == 1 for k in used):5d} {test}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", choices=OPS, help="count this op's kernels only")
    parser.add_argument("--record", type=Path, help="write what was recorded to this JSON file")
    parser.add_argument("--compile", action="store_true", help="compile the kernels too, for sm_90")
    parser.add_argument("--verbose", action="store_true", help="show tests that end in an error")
    parser.add_argument("paths", nargs="*", help="test files or node ids; default: all")
    given = parser.parse_args()
    recording = run(given.paths or files_with_gpu_tests(), given.verbose, given.compile)
    print(tables(recording, given.op))
    failed = [t for t, outcome in recording.outcomes.items() if outcome == "failed"]
    print(f"\n{len(recording.outcomes)} tests, {len(failed)} ended in an error")
    if given.record:
        given.record.write_text(json.dumps(recording.dump(), indent=1))


if __name__ == "__main__":
    main()
