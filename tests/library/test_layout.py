"""How the package is put together: what imports what, one list of ops, and what stands twice."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import bench
import vicreg_kernels as vk
from bench.gpu_stages import triton_kernels
from tests.helpers import compilations
from vicreg_kernels.attention.contract import Settings as AttentionSettings
from vicreg_kernels.core import registry, schema
from vicreg_kernels.ema import checks as ema_checks
from vicreg_kernels.sigreg import checks as sigreg_checks
from vicreg_kernels.tokens import contract as tokens
from vicreg_kernels.vicreg import contract as vicreg
from vicreg_kernels.vicregl import contract as vicregl

PACKAGE = Path(vk.__file__).parent
ROOT = PACKAGE.parent
# Rooms below the ops: they import no op.
BELOW = ("core", "configs", "distributed", "version")
# What an op that is composed of others may import of them: public functions, what backends take,
# and the specification, of which its own is composed.
PUBLIC = ("", "contract", "reference")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def imports() -> dict[str, set[str]]:
    """module -> the package's modules that it imports when it is imported, or in a function."""
    modules = {module_of(path) for path in PACKAGE.rglob("*.py")}
    edges: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                inside = [name for name in whole if name in modules]
                names = inside + [node.module] * (len(inside) < len(whole))
            targets.update(name for name in names if name in modules)
        edges[module_of(path)] = targets - {module_of(path)}
    return edges


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """One cycle among the modules, or nothing."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges[module]):
            found = visit(target, [*path, module])
            if found:
                return found
        done.add(module)
        return []

    return next(filter(None, (visit(module, []) for module in sorted(edges))), [])


def room(module: str) -> str:
    """The first folder or file below the package."""
    return module.removeprefix("vicreg_kernels").lstrip(".").split(".")[0]


def trespasses(edges: dict[str, set[str]]) -> list[str]:
    """Imports of an op from below the ops, or of another op's insides."""
    ops, wrong = registry.OPS, []
    for module, targets in sorted(edges.items()):
        here = room(module)
        for target in sorted(targets):
            there = room(target)
            if there not in ops or there == here or here not in (*ops, *BELOW):
                continue
            inside = target.removeprefix(f"vicreg_kernels.{there}").lstrip(".")
            if here in BELOW or here != "vicregl" or inside not in PUBLIC:
                wrong.append(f"{module} -> {target}")
    return wrong


def test_no_cycle():
    assert len(imports()) > 100
    assert cycle(imports()) == []


def test_no_op_imports_another_ops_insides():
    assert trespasses(imports()) == []


def test_the_rules_can_fail():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"b"}}
    assert cycle(edges) == ["b", "c", "b"]
    for module, target in (
        ("vicreg_kernels.core.checks", "vicreg_kernels.vicreg"),
        ("vicreg_kernels.barlow.api", "vicreg_kernels.vicreg.contract"),
        ("vicreg_kernels.vicregl.compose", "vicreg_kernels.vicreg.checks"),
    ):
        assert trespasses({module: {target}}) == [f"{module} -> {target}"]
    assert trespasses({"vicreg_kernels.vicregl.compose": {"vicreg_kernels.vicreg"}}) == []


ROOMS = ("__init__", "contract", "reference", "module", "triton/__init__", "triton/launch")


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_every_op_has_the_same_rooms(op):
    missing = [name for name in ROOMS if not (PACKAGE / op / f"{name}.py").exists()]
    assert missing == []
    if op != "tokens":  # three ops in one folder, each with its public functions beside it
        assert (PACKAGE / op / "op.py").exists()
        assert (PACKAGE / op / "api.py").exists()


def test_one_list_of_ops():
    """The folders, the registry, the benchmarks and the C++ sources name the same ops."""
    folders = {path.parent.name for path in PACKAGE.glob("*/contract.py")}
    assert folders == set(registry.OPS) == set(compilations.OPS)
    assert folders == set(bench.OPS) - {"jepa_step"}
    assert folders == {path.parent.name for path in (ROOT / "csrc").glob("*/registration.cpp")}


def test_what_profilers_watch_is_every_triton_kernel():
    """Every function called *_kernel that is under triton.jit, wherever it stands."""
    written = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("triton.jit" in ast.unparse(each) for each in node.decorator_list):
                written.append(node.name)
    found = triton_kernels(ROOT)
    assert sorted(found) == sorted(written)
    assert len(found) >= 45
    for kernel in ("forward_kernel", "assemble_kernel", "update_kernel", "match_kernel"):
        assert kernel in found


def constant(path: str, name: str) -> int:
    """An integer constant of a C++ header."""
    text = (ROOT / "csrc" / path).read_text()
    (value,) = re.findall(rf"constexpr \w+ {name} = ([^;]+);", text)
    return eval(value.replace("int64_t{1}", "1"), {"__builtins__": {}})


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        ("vicreg/formula.h", "kDeflatedColumns", vicreg.DEFLATED_COLUMNS),
        ("vicregl/formula.h", "kMostCounts", vicregl.MOST_COUNTS),
        ("sigreg/formula.h", "kMostKnots", sigreg_checks.MOST_KNOTS),
        ("ema/checks.h", "kMostSteps", ema_checks.MOST_STEPS),
    ],
)
def test_constants_that_stand_in_both_languages(path, name, value):
    assert constant(path, name) == value


def test_the_kinds_of_the_prediction_loss():
    text = (ROOT / "csrc" / "tokens" / "formula.h").read_text()
    (kinds,) = re.findall(r"enum Kind : int \{ ([^}]+) \};", text)
    numbers = {}
    for kind in kinds.split(","):
        name, number = kind.split("=")
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip().removeprefix("k")).lower()
        numbers[words] = int(number)
    assert numbers == {kind: place for place, kind in enumerate(tokens.KINDS)}
    (cosine, others) = re.findall(r"kind == kCosine \? (\d) : (\d)", text)[0]
    assert [tokens.saved_floats(kind) for kind in range(4)] == [int(others)] * 3 + [int(cosine)]


def test_constants_that_triton_kernels_repeat():
    pytest.importorskip("triton")
    from vicreg_kernels.sigreg.triton import launch, maths

    assert maths.MOST_KNOTS.value == sigreg_checks.MOST_KNOTS
    assert maths.MOST_CHUNKS.value == launch.MOST_CHUNKS
    assert 2 * launch.MOST_PAIRS * launch.MOST_CHUNKS == sigreg_checks.MOST_KNOTS
    # vicreg/triton/forward.py writes the four largest columns out by hand.
    assert vicreg.DEFLATED_COLUMNS == 4
    assert vicregl.MOST_COUNTS == 4  # as the arguments c0 to c3 of vicregl/triton/pairs.py


def test_schemas_are_written_from_settings():
    import torch

    ops = torch.ops.vicreg_kernels
    for op, settings in (
        (ops.vicreg_forward, vicreg.Settings._fields),
        (ops.vicreg_backward, vicreg.Settings._fields),
        (ops.tokens_loss_forward, tokens.Settings._fields),
    ):
        names = [argument.name for argument in op.default._schema.arguments]
        assert names[-len(settings) :] == list(settings)
        assert names[-len(settings) - 1] == "backend"
    words = schema.arguments(vicreg.Settings)
    assert words.startswith("float margin, float eps, bool unbiased, float[] scales")
    rules = AttentionSettings.__annotations__
    assert list(rules) == ["rules", "rope", "scale"]
    with pytest.raises(AssertionError):
        schema.arguments(vicreg.Settings, no_such_field="SymInt")
