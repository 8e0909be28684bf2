"""The tokens ops against what is published and against the advanced indexing.

Every case is one whole step, forward and backward, on the same masks: sorted, without repeats, as
the mask collators draw them. Contenders:

    published  as the I-JEPA and V-JEPA training code: a layer norm of every teacher token, gathers
               through an index expanded to int64 [B, K, D], argsort and gathers to assemble
    plain      what one could write: advanced indexing, a layer norm of the gathered rows alone
    compiled   torch.compile of published
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from bench.case import Case, Plan
from vicreg_kernels.core import dispatch
from vicreg_kernels.tokens import (
    assemble_tokens,
    gather_tokens,
    prediction_loss,
    scatter_tokens,
)

Step = Callable[[], Any]

TITLE = "Token ops, forward and backward, by teacher and kept tokens"
CONTENDERS = {
    "published": "published code, eager",
    "compiled": "published code, torch.compile",
    "plain": "advanced indexing",
    "index_select": "index_select of flat rows",
}


def masks(batch: int, tokens: int, kept: int, device: torch.device) -> Tensor:
    drawn = [torch.randperm(tokens)[:kept].sort().values for _ in range(batch)]
    return torch.stack(drawn).to(device)


def expanded_gather(x: Tensor, index: Tensor) -> Tensor:
    return torch.gather(x, 1, index.unsqueeze(-1).repeat(1, 1, x.shape[-1]))


def indexed_gather(x: Tensor, index: Tensor) -> Tensor:
    return x[torch.arange(x.shape[0], device=x.device)[:, None], index]


def selected_gather(x: Tensor, index: Tensor) -> Tensor:
    """index_select of rows of the flattened batch; x must be contiguous."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    rows = x.flatten(0, 1).index_select(0, (first + index).flatten())
    return rows.unflatten(0, index.shape)


def backward_of(function: Callable[..., Tensor], *leaves: Tensor) -> Step:
    return lambda: torch.autograd.grad(function(*leaves), leaves)


def with_gradient(function: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> Step:
    """The same for a function whose result is a tensor of grad's shape."""
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


# --------------------------------------------------------------------------------- prediction loss


def published_loss(teacher: Tensor, index: list[Tensor], kind: str) -> Callable[..., Tensor]:
    """I-JEPA: the mean over mask-major predictions. V-JEPA: the mean of each mask, then of all."""

    def smooth_l1(pred: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.layer_norm(teacher, (teacher.shape[-1],))
            target = torch.cat([expanded_gather(target, one) for one in index])
        return F.smooth_l1_loss(pred, target)

    def l1(*preds: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.layer_norm(teacher, (teacher.shape[-1],))
            targets = [expanded_gather(target, one) for one in index]
        parts = [torch.mean(torch.abs(p - t)) for p, t in zip(preds, targets, strict=True)]
        return sum(parts) / len(parts)

    return smooth_l1 if kind == "smooth_l1" else l1


def plain_loss(teacher: Tensor, index: list[Tensor], kind: str) -> Callable[..., Tensor]:
    loss = F.smooth_l1_loss if kind == "smooth_l1" else F.l1_loss
    stacked = [torch.cat(index)] if kind == "smooth_l1" else index

    def function(*preds: Tensor) -> Tensor:
        parts = []
        for pred, one in zip(preds, stacked, strict=True):
            batch = torch.arange(one.shape[0], device=one.device)[:, None] % teacher.shape[0]
            with torch.no_grad():
                target = F.layer_norm(teacher[batch, one], (teacher.shape[-1],))
            parts.append(loss(pred, target))
        return sum(parts) / len(parts)

    return function


def _loss(kind: str, batch: int, tokens: int, dim: int, kept: tuple[int, ...]) -> Case:
    def build(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
        teacher = torch.randn(batch, tokens, dim, device=device).to(dtype)
        index = [masks(batch, tokens, k, device) for k in kept]
        if kind == "smooth_l1":
            shapes = [(len(kept) * batch, kept[0], dim)]
        else:
            shapes = [(batch, k, dim) for k in kept]
        preds = [torch.randn(s, device=device).to(dtype).requires_grad_() for s in shapes]

        def ours(*preds: Tensor) -> Tensor:
            pred = preds[0] if kind == "smooth_l1" else list(preds)
            return prediction_loss(pred, teacher, index, kind=kind, backend=backend)

        published = published_loss(teacher, index, kind)
        elements = batch * sum(kept) * dim
        return Plan(
            steps={
                "ours": backward_of(ours, *preds),
                "published": backward_of(published, *preds),
                "plain": backward_of(plain_loss(teacher, index, kind), *preds),
                "compiled": backward_of(measure.compiled(published), *preds),
            },
            backend=dispatch.choose("tokens", backend, device.type, dtype),
            least_bytes=5 * elements * teacher.element_size(),
            least_operations=12 * elements,
            compiled=("compiled",),
        )

    name = {"smooth_l1": "ijepa", "l1": "vjepa"}[kind]
    shape = f"{batch}x{tokens}x{dim}"
    return Case(
        f"loss_{name}_{shape}",
        build,
        targets={"cpu": {"published": 3.0}, "cuda": {}},
        quick=True,
    )


# -------------------------------------------------------------------------------- gather, assembly


def _gather(batch: int, tokens: int, dim: int, kept: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
        x = torch.randn(batch, tokens, dim, device=device).to(dtype).requires_grad_()
        index = masks(batch, tokens, kept, device)
        grad = torch.randn(batch, kept, dim, device=device).to(dtype)
        functions = {
            "ours": lambda x: gather_tokens(x, index, backend=backend),
            "published": lambda x: expanded_gather(x, index),
            "plain": lambda x: indexed_gather(x, index),
            "index_select": lambda x: selected_gather(x, index),
        }
        return Plan(
            steps={name: with_gradient(f, grad, x) for name, f in functions.items()},
            backend=dispatch.choose("tokens", backend, device.type, dtype),
            least_bytes=(3 * kept + tokens) * batch * dim * x.element_size(),
            least_operations=0,
        )

    return Case(
        f"gather_{batch}x{tokens}x{dim}_{kept}",
        build,
        targets={},
    )


def published_assembly(
    context: Tensor, context_index: Tensor, mask_token: Tensor, target_index: Tensor
) -> Tensor:
    count, wanted = target_index.shape
    tokens = torch.cat([context, mask_token.expand(count, wanted, -1)], dim=1)
    order = torch.argsort(torch.cat([context_index, target_index], dim=1), dim=1)
    return torch.stack([tokens[b, order[b]] for b in range(count)])


def plain_assembly(
    context: Tensor, context_index: Tensor, mask_token: Tensor, target_index: Tensor
) -> Tensor:
    count, wanted = target_index.shape
    tokens = torch.cat([context, mask_token.expand(count, wanted, -1)], dim=1)
    order = torch.argsort(torch.cat([context_index, target_index], dim=1), dim=1)
    return indexed_gather(tokens, order)


def _assembly(batch: int, tokens: int, dim: int, kept: int, wanted: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype, backend: str | None) -> Plan:
        both = masks(batch, tokens, kept + wanted, device)
        chosen = torch.stack([torch.randperm(kept + wanted, device=device) for _ in range(batch)])
        context_index = both.gather(1, chosen[:, :kept]).sort(dim=1).values
        target_index = both.gather(1, chosen[:, kept:]).sort(dim=1).values
        context = torch.randn(batch, kept, dim, device=device).to(dtype).requires_grad_()
        mask_token = torch.randn(dim, device=device).to(dtype).requires_grad_()
        grad = torch.randn(batch, kept + wanted, dim, device=device).to(dtype)

        def ours(context: Tensor, mask_token: Tensor) -> Tensor:
            assembled = assemble_tokens(
                context, context_index, mask_token, target_index, backend=backend
            )
            return assembled.tokens

        functions: dict[str, Callable[..., Tensor]] = {
            "ours": ours,
            "published": lambda c, m: published_assembly(c, context_index, m, target_index),
            "plain": lambda c, m: plain_assembly(c, context_index, m, target_index),
        }
        rows = 2 * (2 * kept + wanted)
        return Plan(
            steps={n: with_gradient(f, grad, context, mask_token) for n, f in functions.items()},
            backend=dispatch.choose("tokens", backend, device.type, dtype),
            least_bytes=rows * batch * dim * context.element_size(),
            least_operations=0,
        )

    return Case(
        f"assemble_{batch}x{kept}+{wanted}x{dim}",
        build,
        targets={},
    )


# Batches small enough for a CPU; the tokens, masks and widths are the published ones.
CASES = {
    case.name: case
    for case in (
        _loss("smooth_l1", 16, 256, 1280, (44, 44, 44, 44)),
        _loss("l1", 2, 1568, 1024, (729, 1095)),
        _gather(16, 256, 1280, 69),
        _gather(2, 1568, 1024, 729),
        _assembly(2, 1568, 384, 382, 729),
        _assembly(16, 256, 384, 69, 44),
    )
}


def exercise(backend: str, device: str) -> int:
    """Rows, losses of every kind and assembly, dense and packed, with widths of both alignments."""
    bad = 0
    where = torch.device(device)
    offsets = torch.tensor([0, 4, 4, 9])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for dim in (24, 37):
            x = torch.randn(3, 11, dim, device=where).to(dtype).requires_grad_()
            pred = torch.randn(3, 5, dim, device=where).to(dtype).requires_grad_()
            index, packed = masks(3, 11, 5, where), torch.randint(0, 11, (9,), device=where)
            results = [gather_tokens(x, index, backend=backend)]
            results += [gather_tokens(x, packed, offsets=offsets, backend=backend)]
            results += [scatter_tokens(pred, index, 11, backend=backend)]
            for kind in ("smooth_l1", "l1", "mse", "cosine"):
                teacher = x.detach()
                results += [prediction_loss(pred, teacher, index, kind=kind, backend=backend)]
            mask_token = torch.randn(dim, device=where).to(dtype).requires_grad_()
            other = torch.arange(4, device=where).expand(3, 4)
            assembled = assemble_tokens(pred, index, mask_token, other, backend=backend)
            results += [assembled.tokens]
            total = sum(result.float().square().sum() for result in results)
            results += torch.autograd.grad(total, (x, pred, mask_token))
            bad += sum(not result.isfinite().all().item() for result in results)
    return bad
