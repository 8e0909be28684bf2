"""How far each published loss, and this library's in its place, is from float64, by precision.

python3 -m bench.parity                          # writes bench/results/<device>/parity.json
python3 -m bench.parity --ops VICReg --shapes 64x256    # prints only

Embeddings of the precision are given to the loss as a training step does: half ones inside
autocast, the last column through torch's GradScaler at the scale with which it begins. The truth is
the same loss of the same embeddings in float64. A library that cannot be imported is noted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vicreg_kernels as vk
from bench import environment, parity_table, peers, record
from bench.peers import Get
from bench.vicreg_baselines import eager
from vicreg_kernels.compat import patching
from vicreg_kernels.core import dispatch

Loss = Callable[[Tensor, Tensor], Tensor]

TITLE = "Relative error of losses and of their gradients against float64, by precision"
# N x D: the Gram side, the covariance side, and a width at which a sum of squares leaves float16.
SHAPES = ("64x256", "160x96", "16x1024")
SEED = 3


@dataclass(frozen=True)
class Published:
    """A published loss. peer: whose, as in vicreg_kernels.compat, or "" where no library is called.
    make(get) -> the loss of two views [N, D], made of what `get` gives for a name. theirs and ours:
    in place of make with the peer's names, and with those of vicreg_kernels.compat.
    """

    op: str
    peer: str
    make: Callable[[Get], Loss] | None = None
    theirs: Callable[[], Loss] | None = None
    ours: Callable[[], Loss] | None = None


def _stacked(name: str, **settings: Any) -> Callable[[Get], Loss]:
    """A loss of [2, N, D]."""

    def make(get: Get) -> Loss:
        module = get(name)(**settings)
        return lambda x, y: module(torch.stack((x, y)))

    return make


def _joined(name: str, **settings: Any) -> Callable[[Get], Loss]:
    """A loss of the rows of both views, [2 N, D]."""

    def make(get: Get) -> Loss:
        module = get(name)(**settings)
        return lambda x, y: module(torch.cat((x, y)))

    return make


def _in_dict(name: str, *settings: Any) -> Callable[[Get], Loss]:
    """A loss that is the entry "loss" of a dict."""

    def make(get: Get) -> Loss:
        module = get(name)(*settings)
        return lambda x, y: module(x, y)["loss"]

    return make


def _metric_learning(get: Get) -> Loss:
    module = get("VICRegLoss")()
    return lambda x, y: module(x, ref_emb=y)


LOSSES = {
    "facebookresearch/vicreg's formula": Published(
        "VICReg", "", theirs=lambda: eager, ours=lambda: vk.VICRegLoss()
    ),
    "lightly VICRegLoss": Published("VICReg", "lightly", lambda get: get("VICRegLoss")()),
    "solo-learn vicreg_loss_func": Published(
        "VICReg", "solo_learn", lambda get: get("vicreg_loss_func")
    ),
    "stable-pretraining VICRegLoss": Published(
        "VICReg", "stable_pretraining", lambda get: get("VICRegLoss")()
    ),
    "eb_jepa VICRegLoss": Published("VICReg", "eb_jepa", _in_dict("VICRegLoss", 1.0, 80.0)),
    "pytorch-metric-learning VICRegLoss": Published(
        "VICReg",
        "pytorch_metric_learning",
        _metric_learning,
        ours=lambda: vk.VICRegLoss(convention="pytorch_metric_learning"),
    ),
    "pyjepa VICRegLoss": Published("VICReg", "pyjepa", _in_dict("VICRegLoss")),
    "lightly BarlowTwinsLoss": Published(
        "Barlow Twins", "lightly", lambda get: get("BarlowTwinsLoss")()
    ),
    "solo-learn barlow_loss_func": Published(
        "Barlow Twins", "solo_learn", lambda get: get("barlow_loss_func")
    ),
    "stable-pretraining BarlowTwinsLoss": Published(
        "Barlow Twins", "stable_pretraining", lambda get: get("BarlowTwinsLoss")()
    ),
    "lightly SIGReg": Published("SIGReg", "lightly", _stacked("SIGReg")),
    "stable-pretraining SlicedEppsPulley": Published(
        "SIGReg", "stable_pretraining", _joined("SlicedEppsPulley")
    ),
    "stable-worldmodel SIGReg": Published("SIGReg", "stable_worldmodel", _stacked("SIGReg")),
    "eb_jepa BCS": Published("SIGReg", "eb_jepa", _in_dict("BCS", 1024)),
    "pyjepa SIGReg": Published("SIGReg", "pyjepa", _stacked("SIGReg")),
    "jepa-science sigreg_loss": Published(
        "SIGReg",
        "jepa_science",
        lambda get: lambda x, y: get("sigreg_loss")(torch.cat((x, y)), 1024),
    ),
}
# What a library calls itself, where that is not its name here with hyphens.
NAMES = {"eb_jepa": "eb_jepa"}
OPS = tuple(dict.fromkeys(loss.op for loss in LOSSES.values()))


@dataclass(frozen=True)
class Precision:
    """dtype: of the embeddings. scaled: whether GradScaler scales the loss."""

    dtype: torch.dtype
    scaled: bool = False


PRECISIONS = {
    "float32": Precision(torch.float32),
    "bfloat16": Precision(torch.bfloat16),
    "float16": Precision(torch.float16),
    parity_table.SCALED: Precision(torch.float16, scaled=True),
}


def embeddings(rows: int, dim: int, device: torch.device) -> list[Tensor]:
    """Two views [N, D] in float64, correlated; the hinge cuts some columns and others not."""
    generator = torch.Generator().manual_seed(5)
    base, *own = torch.randn(3, rows, dim, generator=generator, dtype=torch.float64)
    scale = torch.linspace(0.4, 1.8, dim, dtype=torch.float64)
    return [((0.8 * base + 0.5 * z) * scale + 0.3).to(device) for z in own]


@contextlib.contextmanager
def drawn_alike() -> Iterator[None]:
    """torch.randn draws in float32 and rounds: random directions are the same in every dtype."""
    randn = torch.randn

    def draw(*size: Any, dtype: torch.dtype | None = None, **settings: Any) -> Tensor:
        return randn(*size, dtype=torch.float32, **settings).to(dtype or torch.float32)

    torch.manual_seed(SEED)
    torch.randn = draw
    try:
        yield
    finally:
        torch.randn = randn


def _evaluated(make: Callable[[], Loss], leaves: list[Tensor], autocast: bool) -> Tensor:
    """The loss. It is made anew, since some losses count their calls."""
    device, dtype = leaves[0].device.type, leaves[0].dtype
    with drawn_alike():
        loss = make()
        if isinstance(loss, torch.nn.Module):
            loss = loss.to(leaves[0].device)
        with torch.autocast(device, dtype if autocast else None, enabled=autocast):
            return loss(*leaves)


def _kind(values: Iterable[Tensor]) -> str:
    flat = torch.cat([value.detach().flatten() for value in values])
    return "nan" if flat.isnan().any() else "inf" if flat.isinf().any() else "finite"


def _error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """Relative, in the 2-norm."""
    a, b = (torch.cat([t.detach().double().flatten() for t in z]) for z in (actual, truth))
    return float(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b))


def _gradients(value: Tensor, leaves: list[Tensor], scale: float | None) -> list[Tensor]:
    """As GradScaler leaves them on the embeddings, not yet divided by the scale."""
    if scale is not None:
        value = torch.amp.GradScaler(value.device.type, init_scale=scale).scale(value)
    return list(torch.autograd.grad(value, leaves, retain_graph=True))


def _settled(value: Tensor, leaves: list[Tensor], scale: float) -> float | None:
    """The scale to which GradScaler comes down, a half in each step that it skips; None: even a
    scale of 1 gives a gradient that is not finite.
    """
    while scale >= 1.0:
        if _kind(_gradients(value, leaves, scale)) == "finite":
            return scale
        scale /= 2
    return None


@dataclass(frozen=True)
class Truth:
    """Of embeddings that a precision has rounded: the loss and its gradients in float64."""

    embeddings: list[Tensor]
    value: Tensor
    gradients: list[Tensor]

    @classmethod
    def of(cls, make: Callable[[], Loss], views: list[Tensor], dtype: torch.dtype) -> Truth:
        rounded = [z.to(dtype) for z in views]
        leaves = [z.double().requires_grad_() for z in rounded]
        value = _evaluated(make, leaves, autocast=False)
        return cls(rounded, value, list(torch.autograd.grad(value, leaves)))


def measure(make: Callable[[], Loss], truth: Truth, scaled: bool) -> dict[str, Any]:
    """A row's figures: errors are null where what they are of is not finite."""
    leaves = [z.clone().requires_grad_() for z in truth.embeddings]
    device, dtype = leaves[0].device.type, leaves[0].dtype
    scale = torch.amp.GradScaler(device).get_scale() if scaled else None
    value = _evaluated(make, leaves, autocast=dtype != torch.float32)
    row = {"loss": _kind([value]), "scale": scale}
    row["loss_error"] = _error([value], [truth.value]) if row["loss"] == "finite" else None
    if scale is not None:
        row["settled_scale"] = _settled(value, leaves, scale)
    found = _gradients(value, leaves, scale)
    row["gradient"] = _kind(found)
    found = [z.double() / (scale or 1.0) for z in found]
    finite = row["gradient"] == "finite"
    row["gradient_error"] = _error(found, truth.gradients) if finite else None
    return row


def _contenders(published: Published) -> dict[str, Callable[[], Callable[[], Loss]]]:
    """What finds each, within `peers.importable`; it raises what an import or the peer raises."""
    found: dict[str, Callable[[], Callable[[], Loss]]] = {}
    make, theirs, ours = published.make, published.theirs, published.ours

    def of(make: Callable[[Get], Loss], get: Callable[[str], Get]) -> Callable[[], Loss]:
        names = get(published.peer)
        return lambda: make(names)

    if make is not None:
        found["theirs"] = lambda: of(make, peers.theirs)
        found["drop_in"] = lambda: of(make, peers.ours)
    if theirs is not None:
        found["theirs"] = lambda: theirs
    if ours is not None:
        found["ours"] = lambda: ours
    return found


def _why(error: Exception) -> str:
    if isinstance(error, ImportError):
        return f"cannot be imported: {error}"
    return f"{type(error).__name__}: {error}".partition("\n")[0]


class Run:
    """The rows, and what there is none of: failed is whether that was of this library."""

    def __init__(self, about: dict[str, Any], device: torch.device) -> None:
        self.device = device
        self.entry: dict[str, Any] = {**about, "rows": [], "skipped": []}
        self.failed = False

    def add(self, name: str, shapes: list[str]) -> None:
        """All rows of a loss."""
        published = LOSSES[name]
        about = {"op": published.op, "name": name}
        with peers.importable(published.peer) if published.peer else contextlib.nullcontext():
            contenders = {}
            for contender, find in _contenders(published).items():
                try:
                    contenders[contender] = find()
                    contenders[contender]()
                except Exception as error:
                    self._skip({**about, "contender": contender}, error)
                    return
            exact = contenders.get("drop_in") or contenders["ours"]
            for shape in shapes:
                rows, dim = map(int, shape.split("x"))
                views = embeddings(rows, dim, self.device)
                try:
                    truths = {
                        dtype: Truth.of(exact, views, dtype)
                        for dtype in dict.fromkeys(p.dtype for p in PRECISIONS.values())
                    }
                except Exception as error:
                    mine = "drop_in" if "drop_in" in contenders else "ours"
                    self._skip({**about, "contender": mine, "shape": shape}, error)
                    continue
                for precision, kind in PRECISIONS.items():
                    for contender, make in contenders.items():
                        row = {**about, "contender": contender}
                        row |= {"shape": shape, "precision": precision}
                        self._row(row, make, truths[kind.dtype], kind.scaled)

    def _row(
        self, about: dict[str, Any], make: Callable[[], Loss], truth: Truth, scaled: bool
    ) -> None:
        try:
            self.entry["rows"].append({**about, **measure(make, truth, scaled)})
        except Exception as error:  # whatever another library raises: the others go on
            self._skip(about, error)

    def _skip(self, about: dict[str, Any], error: Exception) -> None:
        self.entry["skipped"].append({**about, "why": _why(error)})
        self.failed |= about["contender"] != "theirs"


def _versions() -> dict[str, str]:
    """Of the libraries that are here: the version of the installed package, or the commit of the
    checkout that its modules come from.
    """
    found = {}
    for peer in dict.fromkeys(loss.peer for loss in LOSSES.values() if loss.peer):
        package = patching.PACKAGES[peer]
        try:
            spec = importlib.util.find_spec(package)
        except (ImportError, ValueError):
            spec = None
        if spec is None:
            continue
        name = NAMES.get(peer, peer.replace("_", "-"))
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            folder = Path(next(iter(spec.submodule_search_locations or ["."]))).resolve()
            own = environment.ROOT in folder.parents  # then the commit is that of this checkout
            found[name] = f"commit {(None if own else environment.commit(folder)) or 'unknown'}"
    return found


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m bench.parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ops", help=f"of {','.join(OPS)}; default: all")
    parser.add_argument("--shapes", help=f"N x D; default: {','.join(SHAPES)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path, help="the folder for parity.json")
    options = parser.parse_args(argv)
    options.selected = bool(options.ops or options.shapes)
    options.ops = options.ops.split(",") if options.ops else [*OPS]
    options.shapes = options.shapes.split(",") if options.shapes else [*SHAPES]
    for op in options.ops:
        if op not in OPS:
            parser.error(f"argument --ops: {op!r} is not one of {', '.join(OPS)}")
    for shape in options.shapes:
        sizes = shape.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 1 for size in sizes):
            parser.error(f"argument --shapes: got {shape!r}, takes N x D such as 64x256, above 1")
    return options


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("bench.parity: no CUDA device here", file=sys.stderr)
        return 2
    reason = dispatch.missing("cpu", "cpu", torch.float32) if device.type == "cpu" else None
    if reason is not None:
        print(f"bench.parity: the CPU library is not built: {reason}", file=sys.stderr)
        return 2
    begun = time.perf_counter()
    about: dict[str, Any] = {"command": shlex.join(["python3", "-m", "bench.parity", *argv])}
    about |= environment.describe(device)
    about["versions"] = {**about["versions"], "peers": _versions()}
    run = Run(about, device)
    for name, published in LOSSES.items():
        if published.op in options.ops:
            run.add(name, options.shapes)
    run.entry["seconds"] = round(time.perf_counter() - begun, 1)
    results = {"schema": parity_table.SCHEMA, "op": "parity", "title": TITLE, "runs": [run.entry]}
    print(parity_table.text(results, run.entry))
    folder = options.output or (None if options.selected else environment.default_folder(device))
    if folder is not None:
        record.write(folder / "parity.json", results)
        print(f"wrote {folder / 'parity.json'}")
    return 1 if run.failed else 0


if __name__ == "__main__":
    sys.exit(main())
