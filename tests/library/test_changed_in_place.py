"""A tensor that is changed in place between forward and backward is an error of autograd, or the
gradient is right because the backward does not read the tensor; it is never silently wrong.
"""

from __future__ import annotations

import pytest
import torch

import vicreg_kernels as vk
from vicreg_kernels.core import library

BACKENDS = [
    pytest.param(
        "cpu", marks=pytest.mark.skipif(library.CPU_MISSING is not None, reason="not compiled")
    ),
    "reference",
]


def floats(*shape: int, grad: bool = True) -> torch.Tensor:
    return torch.randn(shape).requires_grad_(grad)


def ints(*values, wide: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64 if wide else torch.int32)


def heads(packed: bool = False) -> dict[str, torch.Tensor]:
    return {name: floats(*((6, 2, 16) if packed else (2, 2, 6, 16))) for name in "qkv"}


def attention(rule):
    """A call of masked_attention whose mask or rope is made of the tensor `rule`."""

    def call(backend, q, k, v, rule_tensor):
        return vk.masked_attention(q, k, v, backend=backend, **rule(rule_tensor))

    return call


KEEP = ([1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 0])
PLACES = (0, 1, 2, 3, 4, 5)


def of_attention(tensor, other, rule, packed=False):
    def make():
        return heads(packed) | {"rule_tensor": tensor.clone()}, {"rule_tensor": other}

    return make, attention(rule)


def gather(backend, x, index, offsets=None):
    return vk.gather_tokens(x, index, offsets=offsets, backend=backend)


def assemble(backend, context, context_index, mask_token, target_index, positions):
    made = vk.assemble_tokens(
        context, context_index, mask_token, target_index, positions=positions, backend=backend
    )
    return made.tokens


def loss(function):
    return lambda backend, **tensors: function(*tensors.values(), backend=backend)


def sigreg(backend, z, **given):
    slices = None if "directions" in given else 4
    return vk.sigreg_loss(z, slices=slices, knots=5, backend=backend, **given)


def vicregl(backend, a, b, map_a, map_b, grid_a, grid_b):
    views = ((a, b), (map_a, map_b), (grid_a, grid_b))
    return vk.vicregl_loss(*views, num_matches=(2, 2), backend=backend)


def rope(backend, x, index=None, offsets=None):
    return vk.apply_rope(x, vk.Rope3d((4, 4, 4), index), offsets=offsets, backend=backend)


two_rows = ints([0, 1], [2, 3])
# name -> (a function that makes the tensors by name, and other values for the integers; the call).
CASES = {
    "bool mask": of_attention(
        torch.tensor(KEEP).bool(), torch.tensor(KEEP).bool().flip(1), lambda m: {"mask": m}
    ),
    "KeyPadding(bool)": of_attention(
        torch.tensor(KEEP).bool(),
        torch.tensor(KEEP).bool().flip(1),
        lambda m: {"mask": vk.KeyPadding(m)},
    ),
    "KeyPadding": of_attention(ints(3, 5), ints(6, 2), lambda m: {"mask": vk.KeyPadding(m)}),
    "KeyPadding(int64)": of_attention(
        ints(3, 5, wide=True), ints(6, 2), lambda m: {"mask": vk.KeyPadding(m)}
    ),
    "Ragged": of_attention(
        ints(0, 2, 6), ints(0, 5, 6), lambda m: {"mask": vk.Ragged(m)}, packed=True
    ),
    "Ragged, keys": of_attention(
        ints(0, 2, 6), ints(0, 5, 6), lambda m: {"mask": vk.Ragged([0, 3, 6], m)}, packed=True
    ),
    "Blocks, context": of_attention(
        ints(2, 3), ints(1, 1), lambda m: {"mask": vk.Blocks(m, [1, 2])}
    ),
    "Blocks, sizes": of_attention(ints(1, 2), ints(3, 0), lambda m: {"mask": vk.Blocks(2, m)}),
    "Rope3d, index": of_attention(
        ints(*PLACES), ints(*PLACES).flip(0) * 9, lambda m: {"rope": vk.Rope3d((4, 4, 4), m)}
    ),
    "Rope3d, key_index": of_attention(
        ints(*PLACES),
        ints(*PLACES).flip(0) * 9,
        lambda m: {"rope": vk.Rope3d((4, 4, 4), None, m)},
    ),
    "apply_rope": (
        lambda: ({"x": floats(2, 2, 6, 16), "index": ints(*PLACES)}, {"index": ints(*PLACES) * 7}),
        rope,
    ),
    "apply_rope, offsets": (
        lambda: (
            {"x": floats(6, 2, 16), "offsets": ints(0, 2, 6)},
            {"offsets": ints(0, 5, 6)},
        ),
        rope,
    ),
    "gather_tokens": (
        lambda: ({"x": floats(2, 5, 3), "index": two_rows.clone()}, {"index": two_rows.flip(1)}),
        gather,
    ),
    "gather_tokens, packed": (
        lambda: (
            {"x": floats(2, 5, 3), "index": ints(0, 1, 2), "offsets": ints(0, 1, 3, wide=True)},
            {"index": ints(3, 4, 0), "offsets": ints(0, 3, 3)},
        ),
        gather,
    ),
    "scatter_tokens": (
        lambda: (
            {"tokens": floats(2, 2, 3), "index": two_rows.clone()},
            {"index": two_rows.flip(1)},
        ),
        lambda backend, tokens, index: vk.scatter_tokens(tokens, index, 5, backend=backend),
    ),
    "assemble_tokens": (
        lambda: (
            {
                "context": floats(2, 2, 3),
                "context_index": two_rows.clone(),
                "mask_token": floats(3),
                "target_index": ints([4, 5], [4, 5]),
                "positions": floats(9, 3),
            },
            {"context_index": two_rows + 5, "target_index": two_rows * 2},
        ),
        assemble,
    ),
    "prediction_loss": (
        lambda: (
            {
                "pred": floats(2, 2, 3),
                "teacher": floats(2, 5, 3, grad=False),
                "index": two_rows.clone(),
            },
            {"index": two_rows.flip(1)},
        ),
        loss(vk.prediction_loss),
    ),
    "modulated_layer_norm": (
        lambda: ({"x": floats(2, 5, 4), "shift": floats(2, 4), "scale": floats(2, 4)}, {}),
        loss(vk.modulated_layer_norm),
    ),
    "gated_residual": (
        lambda: ({"x": floats(2, 5, 4), "y": floats(2, 5, 4), "gate": floats(2, 4)}, {}),
        loss(vk.gated_residual),
    ),
    "vicreg_loss": (lambda: ({"x": floats(9, 4), "y": floats(9, 4)}, {}), loss(vk.vicreg_loss)),
    "vicreg_loss, N < D": (
        lambda: ({"x": floats(4, 9), "y": floats(4, 9)}, {}),
        loss(vk.vicreg_loss),
    ),
    "variance_covariance": (
        lambda: ({"z": floats(9, 4)}, {}),
        lambda backend, z: sum(vk.variance_covariance(z, backend=backend)),
    ),
    "barlow_twins_loss": (
        lambda: ({"x": floats(9, 4), "y": floats(9, 4)}, {}),
        loss(vk.barlow_twins_loss),
    ),
    "sigreg_loss, step": (
        lambda: ({"z": floats(8, 4), "step": torch.tensor(3)}, {"step": torch.tensor(9)}),
        sigreg,
    ),
    "sigreg_loss, directions": (
        lambda: ({"z": floats(8, 4), "directions": floats(4, 3, grad=False)}, {}),
        sigreg,
    ),
    "vicregl_loss": (
        lambda: (
            {
                "a": floats(4, 6),
                "b": floats(4, 6),
                "map_a": floats(4, 2, 2, 6),
                "map_b": floats(4, 2, 2, 6),
                "grid_a": floats(4, 2, 2, 2, grad=False),
                "grid_b": floats(4, 2, 2, 2, grad=False),
            },
            {},
        ),
        vicregl,
    ),
}
EACH = [
    pytest.param(name, tensor, id=f"{name}: {tensor}")
    for name, (make, _) in CASES.items()
    for tensor in make()[0]
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "changed"), EACH)
def test_no_silently_wrong_gradient(name, changed, backend):
    torch.manual_seed(0)
    make, call = CASES[name]
    tensors, others = make()
    leaves = [z for z in tensors.values() if z.requires_grad]
    out = call(backend, **tensors)
    weight = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, weight, retain_graph=True)
    tensor = tensors[changed]
    with torch.no_grad():
        tensor.copy_(others[changed] if changed in others else tensor.flip(0) * 3 + 1)
    try:
        gradients = torch.autograd.grad(out, leaves, weight)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    for mine, right in zip(gradients, expected, strict=True):
        assert torch.equal(mine, right)


def test_every_op_with_a_gradient_is_here():
    """A new public function has to come into CASES too."""
    named = " ".join(CASES) + " bool mask masked_attention vicreg_terms vicregl_terms"
    functions = [
        name
        for name in vk.__all__
        if callable(getattr(vk, name)) and not isinstance(getattr(vk, name), type)
    ]
    without = {"accumulate", "ema_update_", "patch", "sigreg_directions", "unpatch"}
    missing = {name for name in functions if name not in named} - without
    assert sorted(missing) == []
