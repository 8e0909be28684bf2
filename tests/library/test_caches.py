"""Nothing that the package keeps between calls grows without bound or holds what a mode made."""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import pkgutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vicreg_kernels as vk
from vicreg_kernels.attention import rope
from vicreg_kernels.core.kept import Kept, lasts

PACKAGE = Path(vk.__file__).parent
# Of the package's own dicts and lists, those that functions write to, and what bounds them.
BOUNDED = {
    ("compat/patching.py", "_active"): "names of other libraries that are replaced",
    ("core/dispatch.py", "_thresholds"): "ops x devices x dtypes",
    ("core/registry.py", "OPS"): "ops, at import",
    ("distributed/collectives.py", "_roll_calls"): "process groups that failed",
    ("integrations/masks.py", "_kept"): "masks that live: a finalizer removes each",
    ("configs/__init__.py", "_forgetters"): "caches of files, at import",
}
WRITES = {"append", "add", "setdefault", "update", "extend", "insert", "appendleft", "__setitem__"}


def import_everything() -> None:
    for module in pkgutil.walk_packages(vk.__path__, "vicreg_kernels."):
        if "integrations" in module.name or module.name.endswith("._C"):
            continue
        importlib.import_module(module.name)


def remembered_functions() -> list:
    """Every lru_cache of the package, also those in closures."""
    functions = []
    for each in gc.get_objects():
        if type(each) is functools._lru_cache_wrapper:
            module = getattr(each, "__module__", None) or ""
            if module.split(".")[0] == "vicreg_kernels":
                functions.append(each)
    return functions


def kept_tensors() -> list[Kept]:
    return [each for each in gc.get_objects() if type(each) is Kept]


def tensors_in(value, depth: int = 4):
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, dict):
        for item in (*value.keys(), *value.values()):
            yield from tensors_in(item, depth - 1)
    elif depth and isinstance(value, (list, tuple, set, frozenset)):
        for item in value:
            yield from tensors_in(item, depth - 1)


def module_state() -> list:
    """The containers in the namespaces of the package's modules and of their classes."""
    import sys

    values = []
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "vicreg_kernels":
            continue
        for value in list(vars(module).values()):
            values.append(value)
            if isinstance(value, type) and value.__module__ == name:
                values.extend(vars(value).values())
    return [value for value in values if isinstance(value, (dict, list, set, tuple))]


def written_names(path: Path) -> set[str]:
    """Module-level names of dicts, lists and sets that the file's functions write to."""
    tree = ast.parse(path.read_text())
    made = {
        target.id
        for node in tree.body
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    written = set()
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.Lambda)):
            continue
        for node in ast.walk(function):
            target = None
            if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                target = node.value
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                target = node.func.value if node.func.attr in WRITES else None
            elif isinstance(node, ast.Global):
                written |= made.intersection(node.names)
            if isinstance(target, ast.Name) and target.id in made:
                written.add(target.id)
    return written


def test_every_remembered_function_has_a_bound():
    import_everything()
    functions = remembered_functions()
    assert len(functions) >= 10
    unbounded = [
        each.__qualname__ for each in functions if each.cache_parameters()["maxsize"] is None
    ]
    assert unbounded == []


def test_every_other_cache_is_a_bounded_one():
    caches = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in written_names(path)
    }
    assert caches == set(BOUNDED)


def test_the_search_sees_a_cache(tmp_path):
    """The two searches above can fail."""
    (tmp_path / "m.py").write_text("_T = {}\nU = []\ndef f(k):\n    _T[k] = U.append(k)\n")
    assert written_names(tmp_path / "m.py") == {"_T", "U"}

    def unbounded(): ...

    unbounded.__module__ = "vicreg_kernels.x"
    wrapped = functools.cache(unbounded)
    assert wrapped in remembered_functions()


def calls(theta: float, size: int = 12) -> None:
    """Every op once, with settings that no call before had."""
    heads = [torch.randn(2, 2, 6, 16, requires_grad=True) for _ in range(3)]
    turn = vk.Rope3d((2, 3), theta=theta)
    vk.masked_attention(*heads, mask=vk.KeyPadding([3, 6]), rope=turn)
    vk.apply_rope(heads[0], vk.Rope3d((6,), layout="axial", theta=theta))
    vk.vicreg_loss(torch.randn(size, 4), torch.randn(size, 4), margin=theta)
    vk.variance_covariance(torch.randn(size, 4), margin=theta)
    vk.barlow_twins_loss(torch.randn(size, 4), torch.randn(size, 4), lambd=theta)
    vk.sigreg_loss(torch.randn(size, 4), slices=3, knots=5, t_max=1 + 1 / theta)
    index = torch.arange(2)[None].repeat(size, 1)
    tokens = torch.randn(size, 5, 4)
    vk.gather_tokens(tokens, index)
    vk.prediction_loss(torch.randn(size, 2, 4), tokens, index, beta=theta)
    vk.ema_update_([torch.zeros(size)], [torch.ones(size)], 0.5)


def held_tensors() -> list[torch.Tensor]:
    tensors = list(tensors_in(module_state()))
    for each in kept_tensors():
        tensors += each.held.values()
    for function in remembered_functions():
        tensors += tensors_in(gc.get_referents(function), depth=6)
    return tensors


def under_fake():
    return FakeTensorMode(allow_non_fake_inputs=True)


@pytest.mark.parametrize("mode", [torch.inference_mode, under_fake, torch.no_grad])
def test_no_cache_holds_what_a_mode_made(mode):
    import_everything()
    theta = 100.0 + [torch.inference_mode, under_fake, torch.no_grad].index(mode)
    with mode():
        if mode is under_fake:
            vk.Rope3d((2, 3), theta=theta).table(16, torch.device("cpu"))
        else:
            calls(theta)
    for tensor in held_tensors():
        assert type(tensor) is torch.Tensor or isinstance(tensor, torch.nn.Parameter)
        assert not tensor.is_inference()
    calls(theta)
    heads = [torch.randn(2, 2, 6, 16, requires_grad=True) for _ in range(3)]
    vk.masked_attention(*heads, rope=vk.Rope3d((2, 3), theta=theta)).sum().backward()


def test_no_cache_holds_what_a_transform_made():
    theta = 90.0

    def table(x):
        return x * vk.Rope3d((2, 3), theta=theta).table(16, x.device).sum()

    torch.func.grad(lambda x: table(x).sum())(torch.ones(3))
    torch.vmap(table)(torch.ones(2, 3))
    assert all(key[3] != theta for key in rope._TABLES.held)


def test_rules_made_in_inference_mode_train():
    """A validation before the first step, as Lightning's sanity check."""
    keep = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    with torch.inference_mode():
        rules = [vk.KeyPadding([3, 6]), vk.KeyPadding(keep.clone()), vk.Blocks(2, [2, 2])]
        turn = vk.Rope3d((2, 3), torch.arange(6, dtype=torch.int32).clone())
    for rule in rules:
        heads = [torch.randn(2, 2, 6, 16, requires_grad=True) for _ in range(3)]
        vk.masked_attention(*heads, mask=rule, rope=turn).sum().backward()


def test_what_many_different_calls_leave():
    import_everything()
    calls(0.5, 7)
    before = {id(each): len(each) for each in module_state() if isinstance(each, (dict, list, set))}
    for i in range(40):
        calls(2.0 + i, 8 + i)
    thresholds = importlib.import_module("vicreg_kernels.core.dispatch")._thresholds
    grown = [
        each
        for each in module_state()
        if isinstance(each, (dict, list, set))
        and each is not thresholds
        and len(each) > before.get(id(each), len(each))
    ]
    assert grown == []


def test_kept_tensors_are_bounded_and_the_longest_unused_goes_first():
    kept = Kept(entries=3, nbytes=100)
    make = {key: torch.full((5,), float(key)) for key in range(9)}  # 20 bytes each
    for key in (0, 1, 2, 0, 3):
        assert kept.get(key, lambda key=key: make[key]) is make[key]
    assert list(kept.held) == [2, 0, 3]
    assert kept.get(4, lambda: torch.zeros(20)).shape == (20,)  # 80 bytes: two others leave
    assert list(kept.held) == [3, 4]
    kept.get(5, lambda: torch.zeros(26))  # 104 bytes: never kept
    assert list(kept.held) == [3, 4]
    assert kept.bytes == 100
    assert kept.get(4, lambda: pytest.fail("made again")).shape == (20,)


def test_rope_tables_of_many_grids_are_bounded():
    x = torch.randn(1, 1, 2, 128)
    for n in range(60):
        vk.apply_rope(x, vk.Rope3d((4000 + n,)))
    assert rope._TABLES.bytes <= 64 * 2**20
    assert sum(table.nbytes for table in rope._TABLES.held.values()) == rope._TABLES.bytes


def test_a_captured_graph_s_tensors_are_not_kept(monkeypatch):
    """Kernels of a CUDA graph have not run when it is being captured."""

    class OnDevice:
        def __call__(self) -> bool:
            return self.capturing

    capturing = OnDevice()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    capturing.capturing = True
    assert not lasts(torch.zeros(2))
    capturing.capturing = False
    assert lasts(torch.zeros(2))
