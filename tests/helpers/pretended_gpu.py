"""A GPU that is not there: tensors that say "cuda", know their shape, strides and address, and hold
no large values; and as much of torch.cuda as the library and its tests call.

With it the tests marked `gpu` run up to their last launch on any machine, in seconds (see
compilations.py). What is computed is wrong, so nothing may be asserted about it.

A tensor on the pretended GPU is a `Pretended`, a wrapper around a tensor of the CPU: integers and
up to SMALL floating-point elements have values, because tests read indices and lengths, and the
others are meta tensors. To C++ it is a meta tensor, so that autograd needs no CUDA; to Python its
device is "cuda:0". Addresses are handed out as CUDA's allocator does: each allocation at a multiple
of 512 bytes.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers.pretended_cuda import STUBS

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
SMALL = 4096
_ALIGNMENT = 512
_aten = torch.ops.aten
# What takes tensors of the CPU and of the GPU together.
_BETWEEN_DEVICES = (
    _aten.copy_.default, _aten._to_copy.default, _aten._foreach_copy_.default,
    _aten.index.Tensor, _aten.index_put_.default, _aten.index_put.default,
    _aten._nested_view_from_jagged.default,  # its dummy lies on the CPU
)  # fmt: skip


class DevicesDiffer(RuntimeError):
    """What torch would raise on a GPU; the tests' assertions do not swallow it."""


def _each(function: Callable[[Any], Any], given: Any) -> Any:
    """Of nested lists, tuples and dicts; several times faster than torch's tree_map."""
    kind = type(given)
    if kind in (list, tuple):
        return kind([_each(function, x) for x in given])
    if kind is dict:
        return {name: _each(function, x) for name, x in given.items()}
    return function(given)


def _flat(given: Any) -> list[Any]:
    leaves: list[Any] = []
    _each(leaves.append, given)
    return leaves


class Memory:
    """Hands out addresses: of each storage its own."""

    def __init__(self) -> None:
        self.next = 1 << 32

    def allocate(self, tensor: torch.Tensor) -> int:
        base = self.next
        size = tensor.untyped_storage().nbytes()
        self.next += _ALIGNMENT * max(1, -(-size // _ALIGNMENT))
        return base


_memory = Memory()


class Pretended(torch.Tensor):
    """A tensor on the pretended GPU, or a large one on the CPU on its way there.

    inner: its values, or a meta tensor; base: its storage's address; place: where it says it is.
    """

    inner: torch.Tensor
    base: int
    place: torch.device

    @staticmethod
    def __new__(
        cls, inner: torch.Tensor, base: int | None = None, place: torch.device = CUDA
    ) -> Pretended:
        autocast = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)
        self = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, device="meta", _extra_dispatch_keys=autocast,
        )  # fmt: skip
        self.inner, self.place = inner, place
        self.base = _memory.allocate(inner) if base is None else base
        return self

    device = property(lambda self: self.place)  # type: ignore[assignment]
    is_cuda = property(lambda self: self.place == CUDA)  # type: ignore[assignment]
    is_cpu = property(lambda self: self.place == CPU)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    def _set_data(self, other: torch.Tensor) -> None:
        torch.Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner, self.base, self.place = other.inner, other.base, other.place

    data = property(torch.Tensor.data.__get__, _set_data)  # type: ignore[assignment, attr-defined]

    def get_device(self) -> int:
        return 0 if self.is_cuda else -1

    def data_ptr(self) -> int:
        return self.base + self.storage_offset() * self.element_size() if self.numel() else 0

    def untyped_storage(self) -> Any:
        size = self.inner.untyped_storage().nbytes()
        return types.SimpleNamespace(
            data_ptr=lambda: self.base, nbytes=lambda: size, size=lambda: size, _cdata=self.base
        )

    def record_stream(self, stream: Any) -> None: ...

    def tolist(self) -> Any:
        values = _filled(self.inner) if self.inner.is_meta else self.inner
        return values.tolist()

    def numpy(self, *args: Any, **keywords: Any) -> Any:
        if self.is_cuda:
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        return _filled(self.inner).numpy()

    def cpu(self, *args: Any, **keywords: Any) -> torch.Tensor:
        return self.to("cpu")

    def cuda(self, *args: Any, **keywords: Any) -> torch.Tensor:
        return self.to("cuda")

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied = torch.nn.Parameter(copied, self.requires_grad)
        memo[id(self)] = copied
        return copied

    def __repr__(self, **keywords: Any) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _mode.run(func, args, kwargs or {})


def _conversion(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """x.to(...) as x.to(device=, dtype=, ...), without the device where x is on it already."""
    x, *rest = args
    for given in rest:
        if isinstance(given, torch.dtype):
            kwargs["dtype"] = given
        elif isinstance(given, torch.Tensor):
            kwargs.setdefault("device", given.device)
            kwargs.setdefault("dtype", given.dtype)
        elif isinstance(given, (str, torch.device, int)) and not isinstance(given, bool):
            kwargs["device"] = given
        elif given is not None:
            kwargs["non_blocking"] = given
    other = kwargs.pop("other", None)
    if other is not None:
        kwargs.update(device=other.device, dtype=other.dtype)
    if kwargs.get("device", ...) is None:
        del kwargs["device"]
    if isinstance(x, Pretended) and "device" in kwargs and x.is_cuda == _is_gpu(kwargs["device"]):
        del kwargs["device"]
    kwargs.setdefault("dtype", x.dtype)
    return (x,), kwargs


class _Redirect(TorchFunctionMode):
    """What names the GPU names the meta device, of which C++ needs no driver; `Pretend` sees it."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to:
            args, kwargs = _conversion(args, kwargs)
            if isinstance(args[0], Pretended) and "device" in kwargs:
                kwargs.pop("copy", None)
                kwargs["device"] = torch.device("meta" if _is_gpu(kwargs["device"]) else "cpu")
                return _aten._to_copy.default(*args, **kwargs)
        elif func is torch.Tensor.cuda:
            func, args, kwargs = torch.Tensor.to, args[:1], {"device": CUDA}
            if isinstance(args[0], Pretended):
                return args[0] if args[0].is_cuda else args[0].to(CUDA)
        elif func is torch.Tensor.type_as:
            func, args = torch.Tensor.to, (args[0], args[1].dtype)
        if not _is_gpu(kwargs.get("device")):
            return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor):
            # they copy below where a mode sees it: to the CPU, then on
            wanted = kwargs.pop("requires_grad", False)
            made = func(*args, **{**kwargs, "device": "cpu"})
            return torch.Tensor.to(made, "meta").requires_grad_(wanted)
        kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)


def _is_gpu(device: Any) -> bool:
    """meta: what C++ takes for the device of a Pretended."""
    if device is None:
        return False
    return isinstance(device, int) or torch.device(device).type in ("cuda", "meta")


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Pretended) else x


def _as_meta(x: Any) -> Any:
    if not isinstance(x, torch.Tensor) or x.is_meta:
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def _filled(x: torch.Tensor) -> torch.Tensor:
    """Values for a meta tensor that hold memory for a single one: 1, and index 0."""
    one = x.dtype == torch.bool or x.dtype.is_floating_point
    return torch.full((), float(one), dtype=x.dtype).expand(x.shape)


def _many(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.dtype.is_floating_point and x.numel() > SMALL


class Pretend(TorchDispatchMode):
    """Runs every op on the values inside, or on meta tensors where an input has no values."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: dict[str, Callable[..., Any]] = {}  # the library's own ops, by name
        self.fakes: dict[str, Callable[..., Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func.namespace == "vicreg_kernels":
            with self:
                return self._own(func, args, kwargs)
        flat = _flat(args) + (_flat(kwargs) if kwargs else [])
        given = [x for x in flat if isinstance(x, Pretended)]
        if func not in _BETWEEN_DEVICES:
            _refuse_two_devices(func, flat)
        named = kwargs.get("device")
        on_gpu = _is_gpu(named) if named is not None else any(x.is_cuda for x in given)
        if not given and not on_gpu:
            known = any(isinstance(x, torch.Tensor) for x in flat)
            if known or not _many(self._on_meta(func, args, kwargs)):
                return func(*args, **kwargs)
        inner_args, inner_kwargs = _each(_inner, tuple(args)), _each(_inner, kwargs)
        tensors = [_inner(x) for x in flat if isinstance(x, torch.Tensor)]
        if named is not None:
            inner_kwargs["device"] = torch.device("cpu")
        if func is _aten._local_scalar_dense.default and tensors[0].is_meta:
            return func(_filled(tensors[0].new_empty((1,), device="meta")[0]))
        written = [
            flat_argument
            for argument, declared in zip(args, func._schema.arguments, strict=False)
            if declared.alias_info is not None and declared.alias_info.is_write
            for flat_argument in _flat(argument)
        ]
        written += [kwargs[a.name] for a in func._schema.arguments if a.is_out and a.name in kwargs]
        valued = not any(x.is_meta for x in tensors)
        if written and not valued:
            return self._returned(func, written)
        result = self._computed(func, inner_args, inner_kwargs, tensors, valued)
        same = {id(x.inner): x for x in given}
        bases = {x.inner.untyped_storage()._cdata: x.base for x in given}

        def wrapped(out: Any) -> Any:
            if not isinstance(out, torch.Tensor):
                return out
            if id(out) in same:
                return same[id(out)]
            base = bases.get(out.untyped_storage()._cdata)
            small = out.numel() <= SMALL
            if base is None and out.is_meta and small and not out.dtype.is_floating_point:
                out = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype).copy_(
                    _filled(out)
                )
            if not on_gpu and not out.is_meta:
                return out
            return Pretended(out, base, CUDA if on_gpu else CPU)

        return _each(wrapped, result)

    def _returned(self, func: Any, written: list[Any]) -> Any:
        """What an op that writes returns, when it does not run: what it would have written."""
        count = len(func._schema.returns)
        if count == 0:
            return None
        return written[0] if count == 1 else tuple(written)

    def _computed(
        self,
        func: Any,
        args: Any,
        kwargs: dict[str, Any],
        tensors: list[torch.Tensor],
        valued: bool,
    ) -> Any:
        if func in (_aten.equal.default, _aten.allclose.default) and not valued:
            return True
        if valued and any(_many(x) for x in tensors):
            valued = False
        if valued and not tensors:  # a factory
            valued = not _many(self._on_meta(func, args, kwargs))
        if valued:
            try:
                return func(*args, **kwargs)
            except (IndexError, RuntimeError):
                pass  # an index that a kernel should have written
        if func in (_aten.index.Tensor, _aten.index_put_.default):
            args = (args[0], [place for i in args[1] for place in _places(i)], *args[2:])
        return self._on_meta(func, args, kwargs)

    def _on_meta(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = _each(_as_meta, tuple(args)), _each(_as_meta, kwargs)
        creates = any(a.name == "device" for a in func._schema.arguments)
        if "device" in kwargs or (creates and not any(isinstance(x, torch.Tensor) for x in args)):
            kwargs["device"] = torch.device("meta")
        return func(*args, **kwargs)

    def _own(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One of the library's ops: its Python kernel; for the CUDA library only the shapes."""
        name = func._opname
        if "cuda" in args:
            return self.fakes[name](*args, **kwargs)
        return self.kernels[name](*args, **kwargs)


def _refuse_two_devices(func: Any, given: list[Any]) -> None:
    """As CUDA's kernels do: tensors of the CPU only with no dimension."""
    places = {x.device.type for x in given if isinstance(x, torch.Tensor) and x.dim() > 0}
    if len(places) > 1:
        raise DevicesDiffer(f"{func}: expected all tensors to be on the same device, got {places}")


def _compare_devices(actual: Any, expected: Any, **settings: Any) -> None:
    """Of torch.testing.assert_close: all that can be compared."""
    if settings.get("check_device", True):
        for a, b in zip(_flat(actual), _flat(expected), strict=True):
            if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.device != b.device:
                raise DevicesDiffer(f"assert_close: {a.device} and {b.device}")


def _places(index: torch.Tensor | None) -> list[torch.Tensor | None]:
    """A mask as the indices it selects, one a dimension; meta tensors cannot count them."""
    if index is None or index.dtype != torch.bool or index.is_meta:
        return [index]
    return list(index.nonzero().unbind(1))


_mode = Pretend()


def _compiled_as_it_is(model: Any = None, **settings: Any) -> Any:
    """torch.compile: the library's ops are opaque to it, so their launches stay the same."""
    return (lambda function: function) if model is None else model


def _called_once(op: Any, args: Any, kwargs: Any = None, **settings: Any) -> dict[str, str]:
    op(*args, **(kwargs or {}))
    return {}


def install() -> None:
    """Before vicreg_kernels is imported; for the rest of the process."""
    import torch._dynamo  # lists torch's functions when it loads: before they change
    import torch.utils.checkpoint

    for name, stub in STUBS.items():
        setattr(torch.cuda, name, stub)
    torch.compile = _compiled_as_it_is
    torch.library.opcheck = _called_once
    torch.testing.assert_close = _compare_devices

    implement, fake = torch.library.impl, torch.library.register_fake

    def impl(library: Any, name: Any, *rest: Any) -> Any:
        register = implement(library, name, *rest)

        def decorate(function: Any) -> Any:
            _mode.kernels[name] = function
            return register(function)

        return decorate

    def register_fake(name: str, *rest: Any, **keywords: Any) -> Any:
        register = fake(name, *rest, **keywords)

        def decorate(function: Any) -> Any:
            _mode.fakes[name.split("::")[1]] = function
            return register(function)

        return decorate

    torch.library.impl, torch.library.register_fake = impl, register_fake
    _mode.__enter__()
    _Redirect().__enter__()
