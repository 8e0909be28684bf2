"""What a run is made of: typed, one YAML file a recipe, `key=value` on the command line.

Unknown keys, wrong types and values out of range are refused by name (pydantic).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jepa import yamls
from jepa.pictures import DEFAULT, Limits

RECIPES = Path(__file__).with_name("recipes")

# Methods with a loss of batch statistics; those that predict tokens; of these, those of videos (the
# others are of images), and those that foresee frame by frame.
STATISTICAL = ("vicreg", "vicreg_jepa", "lejepa")
ON_VIDEO = ("vjepa", "vjepa_causal", "pixels")
PREDICTIVE = ("ijepa", *ON_VIDEO)
CAUSAL = ("vjepa_causal", "pixels")

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]


# The settings that only some kinds of data take.
KINDS = {
    "path": ("images", "torchvision", "videos", "webdataset", "physics"),
    "test": ("images", "webdataset"),
    "name": ("torchvision",),
    "download": ("torchvision",),
    "decoder": ("videos", "webdataset"),
    "videos": ("physics",),
    "white": ("images", "webdataset"),
    "max_pixels": ("images", "videos", "webdataset"),
    "max_bytes": ("webdataset", "physics"),
}

OF_VIT = ("depth", "heads", "patch")

# The settings that only some methods take.
TAKEN_BY = {
    **dict.fromkeys(("data.test", "data.white"), (*STATISTICAL, "ijepa")),
    **dict.fromkeys(("data.frames", "data.stride", "data.decoder"), ON_VIDEO),
    **dict.fromkeys(("model.tubelet", "model.sees", "loss.still", "loss.spread"), ON_VIDEO),
    **dict.fromkeys(("model.expander", "model.activation"), STATISTICAL),
    "model.predictor_dim": ("vicreg_jepa", *PREDICTIVE),
    **dict.fromkeys(("model.predictor_depth", "model.predictor_heads"), PREDICTIVE),
    **dict.fromkeys(
        ("loss.invariance", "loss.variance", "loss.covariance"), ("vicreg", "vicreg_jepa")
    ),
    **dict.fromkeys(("loss.sigreg", "loss.slices", "loss.views"), ("lejepa",)),
    **dict.fromkeys(("loss.future", "loss.frames_seen"), ("vjepa",)),
    "optimizer.momentum": ("ijepa", "vjepa", "vjepa_causal"),
    "training.checkpointing": PREDICTIVE,
}


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Data(Settings):
    """What is trained on.

    kind: digits (scikit-learn's), images (a folder of class folders), torchvision (its set `name`),
    videos (a folder of clips), webdataset (tars of images or clips, whichever the method takes),
    physics (simulated: `videos` of them). path: a folder; of tars also {000..127}, {a,b} and *.
    test: the held-out images as path gives the others; without it, a fifth of them. size: edge in
    pixels that images and frames are resized to; frames, stride: of a clip and between its frames;
    decoder: of video files, auto is torchcodec where it can be loaded; workers: processes that
    read. white: the value that is white in pictures of more than 8 bits; without it, all bits of
    16-bit ones and 1 of floats. What is larger is refused: max_pixels of a picture or a frame,
    max_bytes of a file in a shard, and of its array when it is unpacked.
    """

    kind: Literal["digits", "images", "torchvision", "videos", "webdataset", "physics"] = "digits"
    path: Path | None = None
    test: Path | None = None
    name: str | None = None
    download: bool = False
    decoder: Literal["auto", "pyav", "torchcodec"] = "auto"
    size: Positive = 32
    frames: Positive = 1
    stride: Positive = 1
    videos: Positive = 2000
    workers: Annotated[int, Field(ge=0)] = 0
    white: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    max_pixels: Positive = DEFAULT.max_pixels
    max_bytes: Positive = DEFAULT.max_bytes

    @property
    def limits(self) -> Limits:
        return Limits(self.white, self.max_pixels, self.max_bytes)

    @model_validator(mode="after")
    def _of_its_kind(self) -> Data:
        if self.path is None and self.kind in KINDS["path"] and self.kind != "physics":
            raise ValueError(f"path: missing, takes a folder with kind={self.kind!r}")
        if self.name is None and self.kind == "torchvision":
            raise ValueError("name: missing, takes a set of torchvision's, such as CIFAR10")
        for key, kinds in KINDS.items():
            given = getattr(self, key)
            if self.kind not in kinds and given != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: got {str(given)!r}, but it is of kind {' and '.join(kinds)}, not of "
                    f"{self.kind!r}"
                )
        return self


class Model(Settings):
    """The networks. patch, tubelet: pixels and frames of a token; sees: whether a video encoder's
    tokens attend to the whole clip or to their own token frame; expander: inner and outer width
    of the embedding that a loss of batch statistics sees; activation: of it and of a conv encoder.
    """

    encoder: Literal["conv", "vit"] = "vit"
    dim: Positive = 128
    depth: Positive = 4
    heads: Positive = 4
    patch: Positive = 4
    tubelet: Positive = 1
    sees: Literal["clip", "frame"] = "clip"
    predictor_dim: Positive = 96
    predictor_depth: Positive = 2
    predictor_heads: Positive = 3
    expander: tuple[Positive, Positive] = (512, 2048)
    activation: Literal["relu", "gelu"] = "gelu"


class Loss(Settings):
    """variance, covariance, invariance: VICReg's weights; sigreg: lambda of LeJEPA; slices: its
    random directions; future: share of V-JEPA's steps that hide the future, after a number of
    token frames in frames_seen; still: share of the unchanging tokens that are predicted, beside
    all that change; spread: weight of variance and covariance of the context's tokens, which keeps
    V-JEPA's from low rank.
    """

    invariance: NonNegative = 25.0
    variance: NonNegative = 25.0
    covariance: NonNegative = 1.0
    sigreg: Fraction = 0.05
    slices: Positive = 1024
    views: Annotated[int, Field(ge=2)] = 2
    future: Fraction = 0.0
    frames_seen: tuple[Positive, Positive] = (1, 5)
    still: Fraction = 1.0
    spread: NonNegative = 0.0


class Optimizer(Settings):
    """Per step: the learning rate rises linearly for `warmup` of all steps and falls as a cosine to
    final_rate; weight decay goes as a cosine to final_weight_decay; the teacher's momentum linearly
    to 1.
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


class Training(Settings):
    """batch: samples of a step over all ranks; accumulate: micro-batches of a rank's share, exact
    for every loss (batch norm sees a micro-batch at a time, of all ranks); parallel: what many
    ranks hold, a copy of the model each (ddp) or shards of it (fsdp); checkpointing: recompute a
    transformer's blocks in the backward; keep: checkpoints kept; compile: true for torch.compile,
    "reduce-overhead" for CUDA graphs as well.
    """

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


class Config(Settings):
    """kernels: "fused" (vicreg_kernels) or "reference" (plain PyTorch as published)."""

    method: Literal["vicreg", "vicreg_jepa", "ijepa", "vjepa", "lejepa", "vjepa_causal", "pixels"]
    kernels: Literal["fused", "reference"] = "fused"
    backend: Literal["reference", "cpu", "triton", "cuda"] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: Data = Data()
    model: Model = Model()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    training: Training = Training()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        kinds = ("videos", "webdataset", "physics")
        if not self.is_video:
            kinds = ("digits", "images", "torchvision", "webdataset")
        if self.data.kind not in kinds:
            takes = f"{'videos' if self.is_video else 'images'}: {', '.join(kinds)}"
            raise ValueError(f"data.kind: got {self.data.kind!r}, {self.method} takes {takes}")
        if self.method in PREDICTIVE and self.model.encoder != "vit":
            raise ValueError(f"model.encoder: got 'conv', {self.method} takes 'vit'")
        self._taken()
        if self.kernels == "reference" and self.backend is not None:
            raise ValueError("backend: names the fused kernels', takes none with 'reference'")
        return self

    @property
    def is_video(self) -> bool:
        return self.method in ON_VIDEO

    def _taken(self) -> None:
        """No setting is ignored in silence."""
        for key, methods in TAKEN_BY.items():
            if self.method not in methods:
                self._untouched(key, f"it is of {', '.join(methods)}, not of {self.method}")
        if self.model.encoder == "conv":
            for name in OF_VIT:
                self._untouched(f"model.{name}", "it is of model.encoder 'vit', not of 'conv'")
        if self.optimizer.name == "lars":
            self._untouched("optimizer.betas", "it is of optimizer.name 'adamw', not of 'lars'")
        if self.method in CAUSAL and self.model.sees != "frame":
            raise ValueError(f"model.sees: got 'clip', {self.method} takes 'frame'")
        frames, (least, most) = self.data.frames // self.model.tubelet, self.loss.frames_seen
        if self.method in CAUSAL and frames < 2:
            raise ValueError(
                f"data.frames: got {self.data.frames}, {self.method} takes at least two token "
                f"frames of {self.model.tubelet}"
            )
        if self.loss.future and not least <= most < frames:
            raise ValueError(
                f"loss.frames_seen: got {(least, most)}, takes least and most below the clip's "
                f"{frames} token frames"
            )
        if self.loss.spread and self.training.accumulate > 1:
            raise ValueError("training.accumulate: takes 1 with loss.spread, which is of the batch")
        if self.training.compile == "reduce-overhead":
            self._captured()
        if self.training.parallel == "fsdp":
            self._shardable()

    def _untouched(self, key: str, why: str) -> None:
        section, name = key.split(".")
        settings = getattr(self, section)
        given = getattr(settings, name)
        if given != type(settings).model_fields[name].default:
            raise ValueError(f"{key}: got {given!r}, but {why}")

    def _shardable(self) -> None:
        got = "training.parallel: got 'fsdp'"
        if self.model.encoder != "vit":
            raise ValueError(f"{got}, which shards transformers; model.encoder 'conv' takes 'ddp'")
        if self.optimizer.name == "lars":
            raise ValueError(f"{got}; optimizer.name 'lars', of whole tensors' norms, takes 'ddp'")
        if self.training.compile:
            raise ValueError(f"{got}; training.compile takes 'ddp'")

    def _captured(self) -> None:
        """What a CUDA graph would compute wrongly or not at all."""
        key, training = "training.compile: got 'reduce-overhead'", self.training
        if not training.device.startswith("cuda"):
            raise ValueError(f"{key} on {training.device!r}, takes a CUDA device")
        if self.method in PREDICTIVE:
            raise ValueError(f"{key}, {self.method}'s batches change their shape: takes true")
        if training.accumulate > 1:
            raise ValueError(f"{key} with accumulate {training.accumulate}, takes accumulate 1")


class ConfigError(ValueError):
    """Names every key that is wrong."""


def recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A recipe's name or a YAML file, with `key=value` or `section.key=value` put over it.

    Where that replaces data.kind, method, model.encoder or optimizer.name, the file's settings that
    only its own one takes give way. Raises ConfigError naming the key; also where it is given
    twice, as a shell does that expands braces.
    """
    values = _read(source)
    keys = [_key(word) for word in overrides]
    for key in keys:
        if keys.count(key) > 1:
            raise ConfigError(f"{key}: given {keys.count(key)} times, takes one (quote braces)")
    given: dict[str, Any] = {}
    for word in overrides:
        _put(given, word)
    _give_way(values, given)
    for word in overrides:
        _put(values, word)
    return parse(values)


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{source}.yaml"
    if not path.is_file():
        raise ConfigError(f"config: got {str(source)!r}, takes a YAML file or one of {recipes()}")
    try:
        values = yamls.parse(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"config: {path} is not UTF-8 text ({error.reason})") from error
    except yamls.YamlError as error:
        raise ConfigError(f"config: {path} {_continued(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"config: {path} holds a {type(values).__name__}, takes keys and values")
    return values


def _continued(error: Exception) -> str:
    text = str(error)
    return text if text.startswith("is ") else f"is refused: {text}"


def _give_way(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Takes from a file's values what is only of the choices that `given` replaces."""

    def replaced(section: str | None, name: str, default: str | None) -> Any:
        old, new = ((v if section is None else v.get(section)) for v in (values, given))
        if not isinstance(old, dict) or not isinstance(new, dict) or name not in new:
            return None
        return new[name] if new[name] != old.get(name, default) else None

    def drop(section: str, names: Iterable[str]) -> None:
        for name in names:
            if isinstance(values.get(section), dict):
                values[section].pop(name, None)

    if replaced("data", "kind", Data().kind) is not None:
        drop("data", KINDS)
    method = replaced(None, "method", None)
    for key, methods in TAKEN_BY.items() if method is not None else ():
        if method not in methods:
            section, name = key.split(".")
            drop(section, [name])
    if replaced("model", "encoder", Model().encoder) == "conv":
        drop("model", OF_VIT)
    if replaced("optimizer", "name", Optimizer().name) == "lars":
        drop("optimizer", ["betas"])


def layered(words: Sequence[str], over: Sequence[str]) -> list[str]:
    """Overrides, those of `over` in place of `words`' of the same key."""
    given = {_key(word) for word in over}
    return [*(word for word in words if _key(word) not in given), *over]


def _key(word: str) -> str:
    return word.partition("=")[0]


def parse(values: dict[str, Any]) -> Config:
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_message(error)) from None


def _put(values: dict[str, Any], word: str) -> None:
    key, equals, text = word.partition("=")
    if not equals or not key:
        raise ConfigError(f"override: got {word!r}, takes key=value")
    *sections, name = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{key}: {section} is not a section")
    try:
        values[name] = yamls.parse(text) if text else None
    except yamls.YamlError as error:
        problem = str(error).replace("is not YAML", "is not a YAML value")
        if ": given twice" in problem:
            raise ConfigError(f"{key}.{problem}") from error
        raise ConfigError(f"{key}: got {yamls.shown(text)}, which {problem}") from error


def _message(error: ValidationError) -> str:
    lines = []
    for found in error.errors():
        where = ".".join(map(str, found["loc"]))
        if found["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key")
        elif found["type"] == "missing":
            lines.append(f"{where}: missing")
        else:
            text = found["msg"].removeprefix("Value error, ")
            given = (
                "" if isinstance(found["input"], dict) else f"got {yamls.shown(found['input'])}, "
            )
            lines.append(f"{where}: {given}{text}" if where else text)
    return "; ".join(lines)


def describe(config: Config) -> dict[str, Any]:
    """As JSON holds it; `parse` reads it back."""
    return config.model_dump(mode="json")
