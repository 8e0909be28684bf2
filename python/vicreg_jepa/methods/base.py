"""The interface of a training method, and the registry of methods.

A method is a torch module that has the functions of one of the three protocols. Its file ends with
`register(MethodKind(...))`, which tells the rest of the trainer the settings that the method takes,
whether it trains on images, videos or trajectories, and how to build it. docs/trainer.md has the
steps for a new method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from vicreg_jepa.models.masks import Masks
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config, Model


class Method(Protocol):
    """The functions that every method has."""

    def after_step(self) -> None:
        """Called after each optimizer step, to update a teacher or a counter."""

    def features(self, x: Tensor) -> Tensor:
        """Features [B, D] of images or clips, for probes and for detecting collapse."""

    def exported(self) -> tuple[str, nn.Module]:
        """Return (a word for it, the network that `vicreg-jepa export` writes)."""


class ViewMethod(Method, Protocol):
    """A method whose loss is a function of batch statistics. The trainer can encode a batch in
    micro-batches, and on many ranks, without changing the loss.
    """

    def views(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Draw the views of a whole batch; generator: on the device."""

    def forward(self, view: Tensor) -> Tensor:
        """A view's embeddings, [N, ...]."""

    def loss(self, *views: Tensor, process_group: Any = None) -> Tensor:
        """The loss of the whole batch's embeddings, over all ranks of process_group."""


class TokenMethod(Method, Protocol):
    """A method that predicts tokens. Its loss is a mean over them, so the trainer weights a
    micro-batch by its number of predicted tokens.
    """

    def draw(self, x: Tensor, first: int, batch: int, generator: torch.Generator) -> Masks:
        """Draw the masks of x, the samples from `first` on of a step's whole batch.

        generator: on the CPU and the same on all ranks, so it must draw for the whole batch.
        """

    def forward(self, x: Tensor, drawn: Masks, weight: float, process_group: Any) -> Tensor:
        """Return weight times the mean loss over the predicted tokens, plus the terms that do not
        depend on single tokens.
        """


class VideoMethod(TokenMethod, Protocol):
    """A method on videos, with the functions that `probe` and `surprise` need."""

    contexts: tuple[int, ...]  # numbers of frames that are seen before the rest is predicted

    def tokens(self, x: Tensor) -> Tensor:
        """[B, T, D] of clips, the input of the video probes."""

    def foreseen(self, x: Tensor, seen: Sequence[int]) -> list[Tensor]:
        """Predict what follows each number of token frames seen: [B, T', D] each."""

    def targets(self, x: Tensor) -> Tensor:
        """[B, T, D]: the targets of the prediction, without a gradient."""


class TrajectoryMethod(Method, Protocol):
    """A method on windows of trajectories: frames and the actions between them. Its loss may hold
    statistics of the batch, so a step takes the whole batch at once. `encode` and `rollout` are
    what planning needs.
    """

    actions: int  # the elements of an action, A

    def forward(self, frames: Tensor, actions: Tensor, process_group: Any = None) -> Tensor:
        """The loss of frames uint8 [B, T + 1, H, W, C] and actions float32 [B, T, A], this rank's
        windows; its mean over ranks is the loss of the whole batch.
        """

    def prepare(self, frames: Tensor) -> None:
        """Initialise from frames uint8 [N, H, W, C], which are the same on all ranks, before the
        first step.
        """

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, D] of frames uint8 [B, H, W, C]."""

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """Predicted latents [B, K, H, D] after latents [B, D], for K candidate sequences of H
        actions, [B, K, H, A].
        """


COMMON = ("forward", "after_step", "features", "exported")
PARTS = {
    "views": (*COMMON, "views", "loss"),
    "tokens": (*COMMON, "draw"),
    "trajectories": (*COMMON, "prepare", "encode", "rollout"),
}
VIDEO_PARTS = ("contexts", "tokens", "foreseen", "targets")

# The settings that only some methods take: those of their kind of data, and those that a method
# lists in `takes`.
DATA_SETTINGS = {
    "images": ("data.test", "data.white"),
    "videos": ("data.frames", "data.stride", "data.decoder", "model.tubelet"),
    "trajectories": ("data.window", "data.actions"),
}
METHOD_SETTINGS = (
    "model.sees",
    "model.blur",
    "model.expander",
    "model.activation",
    "model.predictor_dim",
    "model.predictor_depth",
    "model.predictor_heads",
    "model.predictor",
    "model.latent",
    "model.keypoints",
    "model.sharpness",
    "model.keypoint_map",
    "model.waves",
    "model.frequency",
    "model.action_dim",
    "model.latent_tokens",
    "model.history",
    "model.macros",
    "model.macro_dim",
    "model.landmarks",
    "model.spacing",
    "loss.invariance",
    "loss.variance",
    "loss.covariance",
    "loss.sigreg",
    "loss.slices",
    "loss.views",
    "loss.future",
    "loss.frames_seen",
    "loss.static_token_share",
    "loss.vc_weight",
    "loss.prediction",
    "loss.one_step",
    "loss.time_variance",
    "loss.time_covariance",
    "loss.similarity",
    "loss.inverse",
    "loss.unroll",
    "loss.pairs",
    "optimizer.momentum",
    "training.begin",
    "training.checkpointing",
    "augment.name",
    "augment.crop",
    "augment.flip",
    "augment.jitter",
    "augment.jitter_probability",
    "augment.grayscale",
    "augment.blur",
    "augment.solarize",
)


@dataclass(frozen=True)
class MethodKind:
    """An entry of the registry.

    name: the value of the setting `method`; outside of the package "<its module>.<a word>", so that
    the trainer can import the module. build: makes the method from a configuration, kernels and
    channels. learns: which of the protocols it has. data: the kind of data that it trains on.
    takes: the METHOD_SETTINGS that it reads. check: raises ValueError, naming the setting, for
    values that do not fit together.
    """

    name: str
    method: type[nn.Module]
    build: Callable[[Config, Kernels, int], nn.Module]
    learns: Literal["views", "tokens", "trajectories"]
    data: Literal["images", "videos", "trajectories"]
    takes: tuple[str, ...] = ()
    check: Callable[[Config], None] | None = None

    @property
    def settings(self) -> tuple[str, ...]:
        """The DATA_SETTINGS and METHOD_SETTINGS that the method takes."""
        return (*DATA_SETTINGS[self.data], *self.takes)


METHODS: dict[str, MethodKind] = {}


def register(kind: MethodKind) -> None:
    """Add a method. Raises ValueError for a name that is already registered, for a missing function
    of its protocol and for a setting that no method can take.
    """
    if kind.name in METHODS:
        there = METHODS[kind.name].method
        raise ValueError(
            f"name: got {kind.name!r}, takes one that is free: it is {there.__module__}."
            f"{there.__qualname__}'s"
        )
    for field, choices in (("learns", tuple(PARTS)), ("data", tuple(DATA_SETTINGS))):
        value = getattr(kind, field)
        if value not in choices:
            raise ValueError(f"{field}: got {value!r}, takes {' or '.join(map(repr, choices))}")
    if kind.data == "videos" and kind.learns != "tokens":
        raise ValueError(f"data: got 'videos' with learns={kind.learns!r}, takes learns='tokens'")
    if (kind.data == "trajectories") != (kind.learns == "trajectories"):
        raise ValueError(
            f"data: got {kind.data!r} with learns={kind.learns!r}, takes 'trajectories' for both"
        )
    parts = (*PARTS[kind.learns], *(VIDEO_PARTS if kind.data == "videos" else ()))
    missing = [part for part in parts if not _has(kind.method, part)]
    if missing:
        raise ValueError(
            f"method: {kind.method.__qualname__} lacks {', '.join(missing)}; with "
            f"learns={kind.learns!r} and data={kind.data!r} it takes {', '.join(parts)}"
        )
    unknown = [key for key in kind.takes if key not in METHOD_SETTINGS]
    if unknown:
        raise ValueError(f"takes: got {unknown}, takes some of {', '.join(METHOD_SETTINGS)}")
    METHODS[kind.name] = kind


def find(name: str) -> MethodKind:
    """Return the entry of this name. A dotted name names the module that registers a method from
    outside of the package: for "my_methods.whitened" the module my_methods is imported first.

    Raises ValueError for an unknown name and for a module that cannot be imported.
    """
    module = name.rpartition(".")[0]
    if name not in METHODS and module:
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ValueError(f"its module cannot be imported: {error}") from error
            raise ValueError(
                f"takes a module that Python finds, installed or in a folder of PYTHONPATH: {error}"
            ) from error
        except Exception as error:
            kind = type(error).__name__
            raise ValueError(f"its module cannot be imported: {kind}: {error}") from error
    if name not in METHODS:
        there = [known for known in METHODS if not module or known.startswith(f"{module}.")]
        raise ValueError(f"takes {', '.join(there) or f'what {module} registers: nothing'}")
    return METHODS[name]


def _has(method: type[nn.Module], part: str) -> bool:
    # torch gives every module a `forward` that raises.
    return getattr(method, part, None) not in (None, getattr(nn.Module, part, None))


LEAST_HEAD, MOST_HEAD, HEAD_STEP = 16, 128, 8  # masked_attention's head dims


def check_heads(model: Model, heads: str, dim: str) -> None:
    """Raises ValueError that names the setting if the heads of a transformer, of these two
    settings, have a dim that masked_attention does not take.
    """
    number, width = getattr(model, heads), getattr(model, dim)
    head, rest = divmod(width, number)
    if rest or head % HEAD_STEP or not LEAST_HEAD <= head <= MOST_HEAD:
        raise ValueError(
            f"model.{heads}: got {number} for model.{dim} {width}, takes a divisor that leaves "
            f"heads of a multiple of {HEAD_STEP} from {LEAST_HEAD} to {MOST_HEAD}"
        )


# Of conv encoders: the first map has a quarter of model.dim; frames are halved four times.
LEAST_CHANNELS, LEAST_FRAME = 4, 16
RESNETS = ("resnet18", "resnet18_small")
RESNET_STEP = 8  # of model.dim: the last map is eight times as wide as the first


def check_encoder(config: Config) -> None:
    """Raises ValueError that names the setting if the encoder cannot be built for the data."""
    model, data = config.model, config.data
    frames = METHODS[config.method].data == "trajectories"
    if model.encoder == "conv":
        least = "takes at least {} with model.encoder 'conv'"
        if model.dim < LEAST_CHANNELS:
            raise ValueError(f"model.dim: got {model.dim}, {least.format(LEAST_CHANNELS)}")
        if frames and data.size < LEAST_FRAME:
            raise ValueError(f"data.size: got {data.size}, {least.format(LEAST_FRAME)}")
        return
    if model.encoder in RESNETS:
        if frames:
            raise ValueError(
                f"model.encoder: got {model.encoder!r}, {config.method} takes 'conv' or 'vit'"
            )
        if model.dim % RESNET_STEP:
            raise ValueError(
                f"model.dim: got {model.dim}, takes a multiple of {RESNET_STEP} with model.encoder "
                f"{model.encoder!r}"
            )
        return
    check_heads(model, "heads", "dim")
    if frames:
        return  # the encoder enlarges frames to a multiple of the patch
    if data.size % model.patch:
        raise ValueError(
            f"model.patch: got {model.patch}, takes a divisor of data.size, {data.size}"
        )
    if data.frames % model.tubelet:
        raise ValueError(
            f"model.tubelet: got {model.tubelet}, takes a divisor of data.frames, {data.frames}"
        )


def taken_by() -> dict[str, tuple[str, ...]]:
    """Map each setting that only some methods take to the names of those methods."""
    of_data = (key for settings in DATA_SETTINGS.values() for key in settings)
    keys = (*of_data, *METHOD_SETTINGS)
    return {
        key: tuple(name for name, kind in METHODS.items() if key in kind.settings) for key in keys
    }
