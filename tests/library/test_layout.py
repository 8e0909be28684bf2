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
from tests import conftest
from tests.helpers import compilations, imports
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
LONGEST = 450  # lines of a file
WRITTEN = {".py", ".h", ".cuh", ".cu", ".cpp", ".js"}  # the kinds of files that people write


@cache
def graph() -> imports.Graph:
    return imports.modules(ROOT, "vicreg_kernels")


def room(module: str) -> str:
    """The first folder or file below the package."""
    return module.removeprefix("vicreg_kernels").lstrip(".").split(".")[0]


def trespasses(edges: imports.Graph) -> list[str]:
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


def test_the_longest_files_are_tests():
    """A file that has another name now would be begun late."""
    assert [name for name in conftest.LONGEST if not (ROOT / "tests" / name).exists()] == []


def test_nothing_imports_in_a_circle():
    """Neither modules nor the rooms that they are in; the package's own __init__ is above all."""
    assert len(graph()) > 100
    assert imports.cycles(graph()) == []
    rooms = imports.rooms(graph(), room)
    rooms.pop("")
    assert imports.cycles({name: others - {""} for name, others in rooms.items()}) == []


def test_no_op_imports_another_ops_insides():
    assert trespasses(graph()) == []


def test_the_rule_can_fail():
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
    """The folders, the registry, the benchmarks, the fuzzer and the C++ sources name the same ops:
    what is missing is listed as the file, and the op that lacks it.
    """
    listed = {
        "vicreg_kernels/<op>/contract.py": {p.parent.name for p in PACKAGE.glob("*/contract.py")},
        "an import of <op> in vicreg_kernels/__init__.py": set(registry.OPS),
        "bench/<op>.py": set(bench.OPS) - {"jepa_step"},
        "csrc/<op>/registration.cpp": {
            path.parent.name for path in (ROOT / "csrc").glob("*/registration.cpp")
        },
        "tests/fuzz/op_<op>.py": {
            path.stem.removeprefix("op_") for path in (ROOT / "tests" / "fuzz").glob("op_*.py")
        },
        "docs/<op>.md": {path.stem for path in (ROOT / "docs").glob("*.md")}
        & set(compilations.OPS),
    }
    every = set().union(*listed.values())
    missing = {file: sorted(every - ops) for file, ops in listed.items() if every - ops}
    assert missing == {}


# The files of tests/<op>/ that every op has.
TESTS = (
    "__init__", "test_reference", "test_cpu", "test_cpu_sanitized", "test_emulator", "test_triton",
    "test_audit_cuda", "test_audit_triton", "test_torch", "test_gpu",
)  # fmt: skip


@pytest.mark.parametrize("op", sorted(registry.OPS))
def test_every_op_has_tests_of_every_tier(op):
    folder = ROOT / "tests" / op
    assert [name for name in TESTS if not (folder / f"{name}.py").exists()] == []


def test_every_page_is_linked():
    """docs/<op>.md in the README, the home page and the navigation, which the home page holds."""
    for page, link in (
        ("README.md", "docs/{}.md"),
        ("docs/index.md", "({}.md)"),
        ("docs/index.md", "<{}>\n"),
    ):
        text = (ROOT / page).read_text()
        assert [op for op in sorted(registry.OPS) if link.format(op) not in text] == [], page


def test_what_profilers_watch_is_every_triton_kernel():
    """Every function called *_kernel that is under triton.jit, wherever it stands."""
    written = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("triton.jit" in ast.unparse(each) for each in node.decorator_list):
                written.append(node.name)
    watched = triton_kernels(ROOT)
    assert sorted(watched) == sorted(written)
    assert len(watched) >= 45
    for kernel in ("forward_kernel", "assemble_kernel", "update_kernel", "match_kernel"):
        assert kernel in watched


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


def test_no_file_is_long():
    folders = ("bench", "csrc", "docs", "python", "tests", "vicreg_kernels")
    files = [file for folder in folders for file in (ROOT / folder).rglob("*")]
    written = [file for file in [*files, ROOT / "setup.py"] if file.suffix in WRITTEN]
    assert len(written) > 500
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in written}
    assert {file: count for file, count in lines.items() if count > LONGEST} == {}
