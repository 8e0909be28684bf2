"""The typed settings of a run: one YAML file per recipe, `key=value` on the command line.

Unknown keys, wrong types and values out of range are errors that name the key (pydantic).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vicreg_jepa.config import rules
from vicreg_jepa.files.pictures import DEFAULT, Limits
from vicreg_jepa.methods import METHODS
from vicreg_jepa.methods.base import find

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
AboveZero = Annotated[float, Field(gt=0.0, le=1.0)]
Half = Annotated[float, Field(ge=0.0, le=0.5)]
NonNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Data(Settings):
    """The training data.

    kind: digits (scikit-learn's), images (a folder of class folders), torchvision (its set `name`),
    videos (a folder of clips), webdataset (tars of images or clips, as the method needs), physics
    (`videos` simulated ones; noise: the strength of what cannot be predicted in them), world
    (trajectories that are simulated for every step), trajectories (a folder that `vicreg-jepa
    collect` wrote). path: a folder; for tars also a pattern with {000..127}, {a,b} and *. test: the
    path of the held-out images; without it a fifth of the images is held out. size: the edge in
    pixels to which images and frames are resized; the frames of trajectories must have it. frames:
    the frames of a clip; stride: the distance between them in the video. decoder: of video files;
    auto is torchcodec if it can be loaded, else PyAV. workers: the processes that read. white: the
    value of white in images of more than 8 bits; the default is all bits for 16-bit images and 1
    for floats. max_pixels: the largest image or frame. max_bytes: the largest file in a shard, and
    the largest array when it is unpacked. window: the actions of a window of a trajectory, which
    has a frame more; actions: the elements of an action. world, settings, policy, length: the
    simulated world, its settings, the policy that acts, and the actions of an episode, in which a
    window begins at any step.
    """

    kind: Literal[
        "digits",
        "images",
        "torchvision",
        "videos",
        "webdataset",
        "physics",
        "world",
        "trajectories",
    ] = "digits"
    path: Path | None = None
    test: Path | None = None
    name: str | None = None
    download: bool = False
    decoder: Literal["auto", "pyav", "torchcodec"] = "auto"
    size: Positive = 32
    frames: Positive = 1
    stride: Positive = 1
    videos: Positive = 2000
    noise: Fraction = 0.0
    world: str = "TwoRooms"
    settings: dict[str, bool | int | float | str] = {}
    policy: str = "walk"
    length: Positive = 90
    window: Positive = 16
    actions: Positive = 2
    workers: Annotated[int, Field(ge=0)] = 0
    white: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_pixels: Positive = DEFAULT.max_pixels
    max_bytes: Positive = DEFAULT.max_bytes

    @property
    def limits(self) -> Limits:
        return Limits(self.white, self.max_pixels, self.max_bytes)

    @model_validator(mode="after")
    def _of_its_kind(self) -> Data:
        if self.kind == "world" and self.length < self.window:
            raise ValueError(
                f"length: got {self.length}, takes at least data.window, {self.window}"
            )
        if self.path is None and self.kind in rules.KINDS["path"] and self.kind != "physics":
            raise ValueError(f"path: missing, takes a folder with data.kind {self.kind!r}")
        if self.name is None and self.kind == "torchvision":
            raise ValueError("name: missing, takes a set of torchvision's, such as CIFAR10")
        for key, kinds in rules.KINDS.items():
            value = getattr(self, key)
            if self.kind not in kinds and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: got {str(value)!r}, but it is used by data.kind {', '.join(kinds)}, "
                    f"not by {self.kind!r}"
                )
        return self


class Model(Settings):
    """The networks. encoder: resnet18 and, for images of about 32 pixels, resnet18_small are for
    methods that compare views, and have their published width at dim 512. patch, tubelet: pixels
    and frames of a token; sees: whether a video encoder's tokens attend to the whole clip or only
    to their own token frame; blur: the standard deviation, in pixels, of a Gaussian filter before a
    method of pixels; expander: inner and output width of the network before a loss of batch
    statistics; activation: of the expander and of an encoder that is not a vit. Of world models:
    latent: the elements of a frame's latent; keypoints: the points whose places a conv encoder also
    reads; keypoint_map: after how many convolutions; sharpness: of the points at the beginning;
    action_dim: the width of embedded actions; predictor, and for the mlp waves, the random
    directions along which it sees sine and cosine, and their frequency, in radians per unit of a
    latent; for the transformer latent_tokens, the tokens of a frame, and history, the number of
    frames that a frame sees, itself included. Of a hierarchy: macros: for each level above the
    world model the most actions of a chunk; macro_dim: the elements of a chunk's code; landmarks:
    the most that are counted; spacing: the distance between them, in mean distances of consecutive
    latents.
    """

    encoder: Literal["conv", "vit", "resnet18", "resnet18_small"] = "vit"
    dim: Positive = 128
    depth: Positive = 4
    heads: Positive = 4
    patch: Positive = 4
    tubelet: Positive = 1
    sees: Literal["clip", "frame"] = "clip"
    predictor_dim: Positive = 96
    predictor_depth: Positive = 2
    predictor_heads: Positive = 3
    waves: Annotated[int, Field(ge=0)] = 0
    frequency: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 5.0
    expander: tuple[Positive, Positive] = (512, 2048)
    activation: Literal["relu", "gelu"] = "gelu"
    blur: NonNegative = 0.0
    latent: Positive = 128
    keypoints: Annotated[int, Field(ge=0)] = 0
    keypoint_map: Annotated[int, Field(ge=1, le=4)] = 2
    sharpness: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 3.0
    action_dim: Positive = 32
    predictor: Literal["mlp", "gru", "transformer"] = "mlp"
    latent_tokens: Positive = 1
    history: Positive = 4
    macros: Annotated[tuple[Positive, ...], Field(min_length=1)] = (12,)
    macro_dim: Positive = 4
    landmarks: Annotated[int, Field(ge=1, le=8192)] = 2048
    spacing: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0


class Loss(Settings):
    """variance, covariance, invariance: VICReg's weights; sigreg: lambda of LeJEPA; slices: the
    number of its random directions; future: share of V-JEPA's steps that hide the future, after a
    number of token frames in the range frames_seen; static_token_share: share of the static tokens
    that are predicted, in addition to all changing ones; vc_weight: weight of the variance and
    covariance of the context's tokens, which keeps V-JEPA's tokens from collapsing to a low rank.

    The loss of world models is the sum of its terms by weight: prediction (squared, of the latents
    of `unroll` steps that are predicted from the first frame of a window), one_step (of each
    frame's next latent from the true ones), variance and covariance over the batch and all encoded
    frames, time_variance and time_covariance of the deviations from each window's mean, similarity
    (the squared difference of consecutive latents), inverse (the squared error of the action that
    is predicted from two consecutive latents), sigreg. pairs: encode so many pairs of consecutive
    frames of each window instead of all its frames, the first pair and others at random.
    """

    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0
    sigreg: Fraction = 0.05
    slices: Positive = 1024
    views: Annotated[int, Field(ge=2)] = 2
    future: Fraction = 0.0
    frames_seen: tuple[Positive, Positive] = (1, 5)
    static_token_share: Fraction = 1.0
    vc_weight: NonNegative = 0.0
    prediction: NonNegative = 1.0
    one_step: NonNegative = 1.0
    time_variance: NonNegative = 0.0
    time_covariance: NonNegative = 0.0
    similarity: NonNegative = 1.0
    inverse: NonNegative = 1.0
    unroll: Positive = 8
    pairs: Annotated[int, Field(ge=0)] = 0


class Augmentation(Settings):
    """What draws the views of methods that compare views.

    name: digits (small affine maps, contrast, noise, an erased rectangle; no flip and no colour) or
    natural, for photographs, which needs kornia. Of natural: crop: the smallest and the largest
    area of a crop, as fractions of the image's; jitter: the largest changes of brightness, contrast
    and saturation (relative) and of hue (as a fraction of a turn); flip, jitter_probability,
    grayscale: probabilities; blur, solarize: the probabilities for the first view and for the
    others. The defaults are VICReg's.
    """

    name: Literal["digits", "natural"] = "digits"
    crop: tuple[AboveZero, AboveZero] = (0.08, 1.0)
    flip: Fraction = 0.5
    jitter: tuple[Fraction, Fraction, Fraction, Half] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: Fraction = 0.8
    grayscale: Fraction = 0.2
    blur: tuple[Fraction, Fraction] = (1.0, 0.1)
    solarize: tuple[Fraction, Fraction] = (0.0, 0.2)

    @model_validator(mode="after")
    def _crop_is_ordered(self) -> Augmentation:
        if self.crop[0] > self.crop[1]:
            raise ValueError(f"crop: got {self.crop}, takes the smallest area first")
        return self


class Optimizer(Settings):
    """The learning rate rises linearly over the share `warmup` of all steps and falls as a cosine
    to final_rate; the weight decay moves as a cosine to final_weight_decay; the teacher's momentum
    rises linearly to 1. Of lars: trust: its coefficient; cap_trust: divide a tensor's own rate by
    the learning rate and cap the quotient at 1, as solo-learn does, so that no tensor moves faster
    than by the learning rate.
    """

    name: Literal["adamw", "lars"] = "adamw"
    rate: Annotated[float, Field(gt=0.0)] = 1e-3
    final_rate: NonNegative = 0.0
    warmup: Fraction = 0.1
    weight_decay: NonNegative = 0.05
    final_weight_decay: NonNegative | None = None
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    clip: NonNegative = 0.0
    momentum: Fraction = 0.996
    trust: Annotated[float, Field(gt=0.0)] = 0.001
    cap_trust: bool = False


class Training(Settings):
    """begin: the folder of the run that a hierarchy's world model is taken from;
    batch: samples of a step over all ranks; accumulate: micro-batches of a rank's share, exact
    for every loss (batch norm sees one micro-batch of all ranks at a time); parallel: with several
    ranks each holds a copy of the model (ddp) or a shard of it (fsdp); checkpointing: recompute a
    transformer's blocks in the backward; keep: the number of checkpoints kept; compile: true for
    torch.compile, "reduce-overhead" also for CUDA graphs.
    """

    begin: Path | None = None
    steps: Positive = 1000
    batch: Annotated[int, Field(ge=2)] = 128
    accumulate: Positive = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    compile: bool | Literal["reduce-overhead"] = False
    checkpointing: bool = False
    save_every: Positive = 200
    keep: Positive = 2
    log_every: Positive = 10


class Places(Settings):
    """Training in several places that exchange weights rarely (DiLoCo, arXiv:2311.08105).

    meeting: host:port of torchft's lighthouse, where the places meet; without it there is one
    place. host: the name or address under which the other places reach this one; the default is the
    name of the host. start: the number of places that a new run waits for. every: local steps
    between two meetings. rate, momentum: of the outer optimizer, SGD with Nesterov's momentum.
    patience: the seconds that an exchange, or a lighthouse that does not answer, is waited for.
    """

    meeting: str | None = None
    host: str | None = None
    start: Positive = 1
    every: Positive = 50
    rate: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.7
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    patience: Annotated[float, Field(gt=0.0, le=86400.0)] = 60.0

    @model_validator(mode="after")
    def _met(self) -> Places:
        if self.meeting is None:
            for key, field in type(self).model_fields.items():
                value = getattr(self, key)
                if value != field.default:
                    raise ValueError(f"{key}: got {value!r}, but it is used with places.meeting")
            return self
        host, _, port = self.meeting.rpartition(":")
        if not (host and "/" not in host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"meeting: got {self.meeting!r}, takes host:port, of the lighthouse")
        return self


class Config(Settings):
    """kernels: "fused" (vicreg_kernels) or "reference" (plain PyTorch as published)."""

    method: str
    kernels: Literal["fused", "reference"] = "fused"
    backend: Literal["reference", "cpu", "triton", "cuda"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: Data = Data()
    augment: Augmentation = Augmentation()
    model: Model = Model()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()
    places: Places = Places()

    @field_validator("method")
    @classmethod
    def _registered(cls, name: str) -> str:
        find(name)
        return name

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        rules.check(self)
        return self

    @property
    def is_video(self) -> bool:
        return METHODS[self.method].data == "videos"

    @property
    def is_of_trajectories(self) -> bool:
        return METHODS[self.method].data == "trajectories"
