"""Masks as rules: which keys a query sees, in a few integers a token instead of a T x T matrix.

Every rule, and every combination of them, leaves a query at most two intervals of keys: those of
its context and those of its own block. `formula.h` and the Triton kernels turn a query's position
into these intervals; `reference.visible` writes the rules out as a boolean matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vicreg_kernels.core import dispatch, integers, kept
from vicreg_kernels.core.integers import FEW, Integers, readable


class Rule:
    """One rule, or several combined by `&`: a query sees the keys that all of them let it see.

    A rule on the CPU has its own copy of lengths, offsets and sizes. Tensors on a device, and
    boolean ones, are not copied. Autograd raises an error if one of them is changed in place
    between a forward and its backward.
    """

    kind = "rules"

    def __and__(self, other: Rule) -> Rules:
        return Rules([*_parts(self), *_parts(other)])


def _parts(rule: Any) -> list[Rule]:
    if isinstance(rule, Rules):
        return rule.rules
    if not isinstance(rule, Rule):
        raise TypeError(f"mask: got {type(rule).__name__} beside &, takes another rule")
    return [rule]


class Rules(Rule):
    """The result of `rule & rule`."""

    def __init__(self, rules: list[Rule]) -> None:
        kinds = [rule.kind for rule in rules]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise ValueError(f"mask: got two rules of the kind {kind}, takes one of each")
        if "KeyPadding" in kinds and "Ragged" in kinds:
            raise ValueError("mask: got KeyPadding & Ragged, takes one: offsets already end a row")
        self.rules = rules

    def __repr__(self) -> str:
        return " & ".join(map(repr, self.rules))


def _integers(name: str, values: Integers, dims: tuple[int, ...]) -> Tensor:
    """A tensor of integers; `dims`: the numbers of dimensions it may have."""
    values = integers.tensor(name, values)
    if values.dim() not in dims:
        wanted = " or ".join(str(d) for d in dims)
        raise ValueError(f"{name}: got {values.dim()} dimensions, takes {wanted}")
    return values


class _Tensors:
    """A rule's tensors by device, so that a captured CUDA graph copies nothing from the host."""

    def __init__(self, **tensors: Tensor | None) -> None:
        self.own = tensors
        self.copies: dict[tuple[str, torch.device], Tensor] = {}

    def on(self, name: str, device: torch.device) -> Tensor | None:
        tensor = self.own[name]
        if tensor is None or tensor.device == device:
            return tensor
        argument = "lengths" if name == "keep" else name  # as KeyPadding's caller calls it
        if torch.compiler.is_compiling():
            return integers.onto(argument, tensor, device)
        if (name, device) in self.copies:
            return self.copies[name, device]
        with torch.inference_mode(False):
            copy = integers.onto(argument, tensor, device)
        if not kept.inside_a_mode() and kept.lasts(copy):
            self.copies[name, device] = copy
        return copy


class KeyPadding(Rule):
    """A query of sample b sees its first lengths[b] keys, or those where a boolean mask is True.

    Args:
        lengths: int [B] (a tensor or a list), 0 <= lengths[b] <= Tk; or bool [B, Tk], True for a
            key that is seen, in any pattern.
    """

    kind = "KeyPadding"

    def __init__(self, lengths: Tensor | Sequence[int]) -> None:
        keep = None
        if isinstance(lengths, Tensor) and lengths.dtype == torch.bool:
            if lengths.dim() != 2:
                raise ValueError(f"mask: got shape {tuple(lengths.shape)}, takes bool [B, Tk]")
            keep = integers.lasting(lengths.detach().contiguous())
            self.tensors = _Tensors(lengths=None, keep=keep)
        else:
            own = integers.narrowed("lengths", _integers("lengths", lengths, (1,)), 0)
            self.tensors = _Tensors(lengths=own, keep=None)

    def __repr__(self) -> str:
        return "KeyPadding()"


class Ragged(Rule):
    """Samples of different lengths are packed: b has tokens offsets[b] to offsets[b + 1] - 1.

    Args:
        offsets: int [B + 1] (a tensor or a list), from 0, not decreasing, to the number of tokens.
            Empty samples are fine.
        key_offsets: the offsets of the keys, if they differ from the queries'.
        max_length, max_key_length: the longest sample, or a bound on it. They are useful only with
            offsets on a device, which are then not read, and neither are checked. Without them, or
            with VICREG_KERNELS_DEBUG=1, offsets on a device are read and checked once, here.
    """

    kind = "Ragged"

    def __init__(
        self,
        offsets: Integers,
        key_offsets: Integers | None = None,
        *,
        max_length: int | None = None,
        max_key_length: int | None = None,
    ) -> None:
        own, self.max_length, self.total = _offsets("offsets", offsets, max_length)
        keys = own
        self.max_key_length, self.key_total = self.max_length, self.total
        if key_offsets is not None:
            keys, self.max_key_length, self.key_total = _offsets(
                "key_offsets", key_offsets, max_key_length
            )
            if keys.shape != own.shape:
                raise ValueError(
                    f"key_offsets: got {keys.shape[0]} offsets, takes as many as offsets has, "
                    f"{own.shape[0]}"
                )
        self.same = key_offsets is None
        self.tensors = _Tensors(offsets=own, key_offsets=keys)

    def __repr__(self) -> str:
        return f"Ragged(max_length={self.max_length})"


def _offsets(name: str, values: Integers, longest: int | None) -> tuple[Tensor, Any, Any]:
    """(int32 offsets, the longest sample, the number of tokens or None where it was not read)."""
    offsets = _integers(name, values, (1,))
    if offsets.shape[0] < 2:
        raise ValueError(f"{name}: got {offsets.shape[0]} offsets, takes at least 2 (one sample)")
    trusted = offsets.device.type != "cpu" and longest is not None and not dispatch.DEBUG
    if torch.compiler.is_compiling() or trusted:
        if longest is None:
            raise ValueError(f"{name}: inside torch.compile max_length must be given")
        return integers.cut(offsets), longest, None
    if offsets.device.type == "cpu" and offsets.shape[0] <= FEW:
        values = offsets.tolist()
        steps = list(map(int.__sub__, values[1:], values))
        first, last, least, most = values[0], values[-1], min(steps), max(steps)
    elif offsets.is_meta:
        raise ValueError(f"{name}: got a meta tensor, takes one with values")
    else:
        ends = (offsets[0], offsets[-1], *offsets.diff().aminmax())
        first, last, least, most = torch.stack(ends).tolist()
    if first != 0:
        raise ValueError(f"{name}: got offsets from {first}, takes offsets from 0")
    if least < 0:
        raise ValueError(f"{name}: got offsets that decrease, takes offsets that never decrease")
    if last > integers.MOST:
        raise ValueError(f"{name}: got offsets up to {last}, takes at most {integers.MOST}")
    if longest is not None and most > longest:
        raise ValueError(f"max_length: got {longest}, takes at least the longest sample, {most}")
    return integers.cut(offsets), most if longest is None else longest, last


class FrameCausal(Rule):
    """A token sees its own and earlier frames: frame = position // tokens_per_frame.

    Args:
        tokens_per_frame: at least 1.
        window: how many frames it sees, its own included; None: all earlier ones.
    """

    kind = "FrameCausal"

    def __init__(self, tokens_per_frame: int, window: int | None = None) -> None:
        for name, value in (("tokens_per_frame", tokens_per_frame), ("window", window)):
            if value is None and name == "window":
                continue
            if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
                raise TypeError(f"{name}: got {type(value).__name__}, takes an int")
            if value < 1:
                raise ValueError(f"{name}: got {value}, takes an int >= 1")
        self.tokens_per_frame = tokens_per_frame
        self.window = window

    def __repr__(self) -> str:
        return f"FrameCausal({self.tokens_per_frame}, window={self.window})"


class Blocks(Rule):
    """A context is followed by blocks; each block sees the context and itself, but no other block.

    The context sees only itself, so it is encoded once for all blocks. (An I-JEPA predictor that
    runs block by block encodes it again for each block, and lets it see that block's mask tokens.)

    Args:
        context: tokens of the context, an int or int [B].
        sizes: tokens of each block, M ints or int [B, M]; positions continue from the context.
            Tokens past the last block see the context, and no token sees them.
    """

    kind = "Blocks"

    def __init__(self, context: int | Integers, sizes: Integers) -> None:
        first = torch.tensor([context]) if isinstance(context, int) else context
        first = _integers("context", first, (1,))
        blocks = _integers("sizes", sizes, (1, 2))
        if blocks.dim() == 1:
            blocks = blocks.unsqueeze(0)
        if first.device != blocks.device:
            raise ValueError(f"sizes: got device {blocks.device}, takes context's {first.device}")
        rows = max(first.shape[0], blocks.shape[0])
        for name, tensor in (("context", first), ("sizes", blocks)):
            if tensor.shape[0] not in (1, rows):
                raise ValueError(f"{name}: got {tensor.shape[0]} samples, takes 1 or {rows}")
        first = integers.narrowed("context", first, 0).unsqueeze(1).expand(rows, 1)
        blocks = integers.narrowed("sizes", blocks, 0)
        parts = torch.cat((first, blocks.expand(rows, -1)), dim=1)
        ends = parts.cumsum(dim=1)  # int64, [B or 1, M + 1]
        self.tensors = _Tensors(bounds=integers.narrowed("sizes", ends))

    def __repr__(self) -> str:
        return "Blocks()"


class MaskArguments(NamedTuple):
    """What the ops take: tensors int32 (keep: bool) on the device, None or 0 where there is none.

    q_offsets, k_offsets [B + 1]; lengths [B]; keep [B, Tk]; bounds [B or 1, M + 1]: the end of the
    context, then of each block; max_q, max_k: the longest sample of queries and of keys.
    """

    q_offsets: Tensor | None
    k_offsets: Tensor | None
    lengths: Tensor | None
    keep: Tensor | None
    bounds: Tensor | None
    max_q: int
    max_k: int
    tokens_per_frame: int
    window: int


def rows_and_tokens(x: Tensor) -> tuple[int, int]:
    """(B, T) of [B, H, T, d]; (1, total) of packed [total, H, d]."""
    shape = x.shape
    return (1, shape[0]) if len(shape) == 3 else (shape[0], shape[2])


def resolve(mask: Rule | Tensor | None, q: Tensor, k: Tensor) -> MaskArguments:
    """The arguments of a mask for q: [B, H, Tq, d] and k: [B, H, Tk, d], or packed [total, H, d].

    Raises ValueError or TypeError where the mask does not fit them.
    """
    (samples, tokens), keys = rows_and_tokens(q), rows_and_tokens(k)[1]
    if mask is None:
        return MaskArguments(None, None, None, None, None, tokens, keys, 0, 0)
    if isinstance(mask, Tensor):
        mask = KeyPadding(mask)
    if not isinstance(mask, Rule):
        raise TypeError(f"mask: got {type(mask).__name__}, takes a rule, bool [B, Tk] or None")
    rules = {rule.kind: rule for rule in _parts(mask)}
    device = q.device
    q_offsets = k_offsets = lengths = keep = bounds = None
    max_q, max_k = tokens, keys
    ragged = rules.get("Ragged")
    if isinstance(ragged, Ragged):
        q_offsets = ragged.tensors.on("offsets", device)
        k_offsets = ragged.tensors.on("key_offsets", device)
        max_q, max_k = ragged.max_length, ragged.max_key_length
        name = "offsets" if ragged.same else "key_offsets"
        for what, total, there in (
            ("offsets", ragged.total, tokens),
            (name, ragged.key_total, keys),
        ):
            if total is not None and total != there:
                raise ValueError(f"{what}: got offsets up to {total}, takes {there}, the tokens")
        samples = ragged.tensors.own["offsets"].shape[0] - 1  # type: ignore[union-attr]
    padding = rules.get("KeyPadding")
    if isinstance(padding, KeyPadding):
        lengths = padding.tensors.on("lengths", device)
        keep = padding.tensors.on("keep", device)
        if lengths is not None:
            _check_samples("lengths", lengths.shape[0], samples)
            if readable(lengths) and (most := max(lengths.tolist(), default=0)) > keys:
                raise ValueError(f"lengths: got {most}, takes at most {keys} (Tk)")
        if keep is not None and keep.shape != (samples, keys):
            raise ValueError(f"mask: got shape {tuple(keep.shape)}, takes [B, Tk], {samples, keys}")
    frames = rules.get("FrameCausal")
    tokens_per_frame = window = 0
    if isinstance(frames, FrameCausal):
        tokens_per_frame, window = frames.tokens_per_frame, frames.window or 0
    blocks = rules.get("Blocks")
    if isinstance(blocks, Blocks):
        bounds = blocks.tensors.on("bounds", device)
        assert bounds is not None
        if bounds.shape[0] != 1:
            _check_samples("context", bounds.shape[0], samples)
        if tokens != keys or (isinstance(ragged, Ragged) and not ragged.same):
            raise ValueError(f"mask: got Blocks with {tokens} queries and {keys} keys, takes equal")
        if readable(bounds) and (end := max(bounds[:, -1].tolist(), default=0)) > max_q:
            raise ValueError(f"sizes: got blocks up to token {end}, takes at most {max_q}")
    return MaskArguments(
        q_offsets, k_offsets, lengths, keep, bounds, max_q, max_k, tokens_per_frame, window
    )


def _check_samples(name: str, got: int, samples: int) -> None:
    if got != samples:
        raise ValueError(f"{name}: got {got} samples, takes the batch's {samples}")
