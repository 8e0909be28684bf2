"""An action-conditioned JEPA world model: each frame is encoded by itself, and a predictor predicts
the latents of later frames from those seen and from the actions (LeCun, 2022, "A path towards
autonomous machine intelligence", section 4). It has no teacher and no stop-gradient.

What keeps the latents from collapsing is one of two things, or both. VICReg's variance and
covariance (Bardes, Ponce and LeCun, 2022, arXiv:2105.04906), over the batch and over the frames of
a window, come with a similarity of consecutive latents and with inverse dynamics, as in PLDM (Sobal
et al., 2025, arXiv:2502.14819). SIGReg (Balestriero and LeCun, 2025, arXiv:2511.08544) needs
neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vicreg_jepa.methods.base import MethodKind, check_heads, register
from vicreg_jepa.models.dynamics import Dynamics, GRUDynamics, MLPDynamics
from vicreg_jepa.models.dynamics_transformer import TransformerDynamics
from vicreg_jepa.models.frames import ConvFrames, Frames, ViTFrames
from vicreg_jepa.models.perceptron import mlp
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


TIME_MARGIN = 0.3  # the deviation over the frames of a window that time_variance asks for
LEAST = 1e-4  # of the variances of the components to the largest, in `whiten`


@dataclass(frozen=True)
class Weights:
    """The weights of the loss's terms; a term of weight 0 is not computed."""

    prediction: float = 1.0
    one_step: float = 1.0
    variance: float = 25.0
    covariance: float = 1.0
    time_variance: float = 0.0
    time_covariance: float = 0.0
    similarity: float = 1.0
    inverse: float = 1.0
    sigreg: float = 0.0


class World(nn.Module):
    """encoder: frames float [N, C, H, W] in [0, 1] -> latents [N, D]. action_encoder: actions
    [..., A] -> [..., E]. predictor: of latents. inverse: [..., 2 D] of consecutive latents -> the
    action [..., A] between them; None without that term. unroll: the steps of an unrolled
    prediction. pairs: the pairs of consecutive frames of a window that are encoded; 0: all frames.
    slices: the random directions of SIGReg. actions: A.

    In training mode `step` counts the optimizer's steps; SIGReg's random directions depend on it.
    """

    step: Tensor

    def __init__(
        self,
        encoder: Frames,
        action_encoder: nn.Module,
        predictor: Dynamics,
        inverse: nn.Module | None,
        kernels: Kernels,
        *,
        actions: int,
        weights: Weights,
        unroll: int = 8,
        pairs: int = 0,
        slices: int = 1024,
    ) -> None:
        super().__init__()
        self.encoder, self.action_encoder, self.predictor = encoder, action_encoder, predictor
        self.inverse, self.kernels, self.actions = inverse, kernels, actions
        self.weights, self.steps, self.pairs, self.slices = weights, unroll, pairs, slices
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def prepare(self, frames: Tensor) -> None:
        """Set the mean and the deviation of each channel, and the last layer of the encoder so that
        the latents of these frames, uint8 [N, H, W, C], are white.

        The frames of a world are almost equal, so that latents of random weights are, too: the
        gradient of the variance term would be lost among the others'. (Initialisation from data as
        in Mishkin and Matas, 2016, arXiv:1511.06422.)
        """
        scaled = _scaled(frames)
        self.encoder.measure(scaled)
        whiten(self.encoder.head, self.encoder.features(scaled).double())

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, D] of frames uint8 [B, H, W, C]. Raises ValueError for another dtype."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames: got {frames.dtype}, takes torch.uint8, 0 to 255")
        return self.encoder(_scaled(frames))

    def rollout(self, start: Tensor, actions: Tensor) -> Tensor:
        """The predicted latents [B, K, H, D] after latents `start` [B, D], for K candidate
        sequences of H actions each, [B, K, H, A].
        """
        batch, candidates = actions.shape[:2]
        starts = start[:, None].expand(-1, candidates, -1).flatten(0, 1)
        embedded = self.action_encoder(actions.flatten(0, 1))
        return self.predictor.unroll(starts[:, None], embedded).unflatten(0, (batch, candidates))

    def forward(self, frames: Tensor, actions: Tensor, process_group: Any = None) -> Tensor:
        """The loss of windows of frames uint8 [B, T + 1, H, W, C] and actions float [B, T, A].

        Batch statistics are those of all ranks of process_group; the other terms are means over
        this rank's windows.
        """
        terms = self.terms(frames, actions, process_group)
        return sum(
            (getattr(self.weights, name) * term for name, term in terms.items()),
            start=frames.new_zeros((), dtype=torch.float32),
        )

    def terms(
        self, frames: Tensor, actions: Tensor, process_group: Any = None
    ) -> dict[str, Tensor]:
        """The terms whose weight is not 0, by the names of their weights, without the weights."""
        weights = self.weights
        times = self.times(actions.shape[1])
        chosen = frames[:, times] if self.pairs else frames
        z = self.encode(chosen.flatten(0, 1)).unflatten(0, chosen.shape[:2])  # [B, F, D]
        embedded = self.action_encoder(actions)
        terms = {}
        unrolled = self.predictor.unroll(z[:, :1], embedded[:, : self.steps]).float()
        if self.pairs:  # each pair by itself: [B * pairs, 1, ...]
            before, after = z.unflatten(1, (-1, 2)).flatten(0, 1).split(1, dim=1)
            acted, embedded = (x[:, times[::2]].flatten(0, 1)[:, None] for x in (actions, embedded))
        else:
            before, after, acted = z[:, :-1], z[:, 1:], actions
        reached = [(place, time) for place, time in enumerate(times) if 0 < time <= self.steps]
        places, steps = zip(*reached, strict=True)
        wanted = z[:, list(places)].float()
        terms["prediction"] = F.mse_loss(unrolled[:, [time - 1 for time in steps]], wanted)
        if weights.one_step:
            following = self.predictor.one_step(before, embedded).float()
            terms["one_step"] = F.mse_loss(following, after.float())
        if weights.similarity:
            terms["similarity"] = F.mse_loss(after.float(), before.float())
        if self.inverse is not None:
            action = self.inverse(torch.cat((before, after), dim=-1)).float()
            terms["inverse"] = F.mse_loss(action, acted)
        return terms | self._spread(z.float(), process_group)

    def times(self, actions: int) -> list[int]:
        """The numbers of the frames of a window that are encoded, from the first one on: all, or
        the first pair of consecutive frames and one pair from each of pairs - 1 equal parts of the
        rest, the same in the windows of a step and on all ranks.
        """
        if not self.pairs:
            return list(range(actions + 1))
        return pair_times(self.pairs, actions, torch.Generator().manual_seed(int(self.step)))

    def _spread(self, z: Tensor, process_group: Any) -> dict[str, Tensor]:
        """The terms against collapse of latents [B, F, D]."""
        weights = self.weights
        terms: dict[str, Tensor] = {}
        # The unbiased variance over the frames of a window is F / (F - 1) times the mean square.
        unbiased = (z.shape[1] / (z.shape[1] - 1)) ** 0.5
        moved = (z - z.mean(dim=1, keepdim=True)) * (unbiased / TIME_MARGIN)
        for prefix, rows in (("", z), ("time_", moved)):
            names = [f"{prefix}variance", f"{prefix}covariance"]
            if any(getattr(weights, name) for name in names):
                both = self.kernels.variance_covariance(rows.flatten(0, 1), process_group)
                terms |= {n: z for n, z in zip(names, both, strict=True) if getattr(weights, n)}
        if weights.sigreg:
            terms["sigreg"] = self.kernels.sigreg(
                z.transpose(0, 1), self.slices, int(self.step), process_group
            )
        return terms

    def after_step(self) -> None:
        self.step += 1

    def features(self, frames: Tensor) -> Tensor:
        """[B, D] of frames uint8 [B, H, W, C], the input of a probe."""
        return self.encode(frames)

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def pair_times(pairs: int, actions: int, generator: torch.Generator) -> list[int]:
    """The numbers of the frames of `pairs` pairs of consecutive frames of a window: the first two,
    and a pair at a random place in each of pairs - 1 equal parts of the rest.
    """
    edges = torch.linspace(1, actions, pairs)
    u = torch.rand(pairs - 1, generator=generator)
    firsts = (edges[:-1] + u * edges.diff()).long().clamp(max=actions - 1).tolist()
    return [time + next_one for time in (0, *firsts) for next_one in (0, 1)]


def _scaled(frames: Tensor) -> Tensor:
    """float32 [N, C, H, W] in [0, 1] of frames uint8 [N, H, W, C]."""
    return frames.movedim(-1, 1).float() / 255.0


@torch.no_grad()
def whiten(layer: nn.Linear, features: Tensor) -> None:
    """Set a linear layer so that its outputs for these features, [N, inputs], are the leading
    principal components, white and rotated at random. Components past the rank of the features
    are as weak as the weakest that is kept. Raises ValueError for more outputs than inputs, and for
    features that are all the same.
    """
    (rows, inputs), outputs = features.shape, layer.out_features
    if outputs > inputs:
        raise ValueError(
            f"model.latent: got {outputs}, takes at most the encoder's {inputs} features"
        )
    centred = features - features.mean(dim=0)
    if not bool(centred.any()):
        raise ValueError(f"frames: got {rows} whose features are the same, takes different ones")
    if inputs > rows >= outputs:  # the same components, from the smaller of the two products
        vectors, lengths, _ = torch.linalg.svd(centred.T, full_matrices=False)
        values, vectors = lengths.square().flip(0) / (rows - 1), vectors.flip(1)
    else:
        values, vectors = torch.linalg.eigh(torch.cov(features.T))
    values, vectors = values[-outputs:], vectors[:, -outputs:]
    rotation = torch.linalg.qr(torch.randn(outputs, outputs, dtype=torch.float64))[0]
    weight = rotation.to(vectors) @ (vectors / values.clamp(min=LEAST * values[-1]).sqrt()).T
    layer.weight.copy_(weight)
    layer.bias.copy_(-weight @ features.mean(dim=0))


def _encoder(config: Config, kernels: Kernels, channels: int) -> Frames:
    model, size = config.model, config.data.size
    if model.encoder == "conv":
        points = model.keypoints, model.sharpness, model.keypoint_map
        return ConvFrames(channels, size, model.dim, model.latent, *points)
    return ViTFrames(
        channels, size, model.dim, model.latent, depth=model.depth, heads=model.heads,
        patch=model.patch, attend=kernels.attend(None, None),
    )  # fmt: skip


def _predictor(config: Config, kernels: Kernels) -> Dynamics:
    model = config.model
    shape = (model.latent, model.action_dim, model.predictor_dim, model.predictor_depth)
    if model.predictor == "mlp":
        return MLPDynamics(*shape, model.waves, model.frequency)
    if model.predictor == "gru":
        return GRUDynamics(*shape)
    return TransformerDynamics(
        *shape, model.predictor_heads, kernels, tokens=model.latent_tokens, history=model.history
    )


def frozen(config: Config, kernels: Kernels, channels: int) -> World:
    """The networks that encode and predict, without a loss: for weights that are loaded."""
    model, data = config.model, config.data
    encoder = _encoder(config, kernels, channels)
    embed = mlp(data.actions, model.action_dim, model.action_dim)
    predictor = _predictor(config, kernels)
    return World(encoder, embed, predictor, None, kernels, actions=data.actions, weights=Weights())


def build(config: Config, kernels: Kernels, channels: int) -> World:
    model, data, loss = config.model, config.data, config.loss
    encoder = _encoder(config, kernels, channels)
    embed = mlp(data.actions, model.action_dim, model.action_dim)
    predictor = _predictor(config, kernels)
    inverse = None
    if loss.inverse:
        inverse = mlp(2 * model.latent, model.predictor_dim, data.actions)
    weights = Weights(**{name: getattr(loss, name) for name in Weights.__dataclass_fields__})
    return World(
        encoder, embed, predictor, inverse, kernels, actions=data.actions, weights=weights,
        unroll=loss.unroll, pairs=loss.pairs, slices=loss.slices,
    )  # fmt: skip


# The settings that only the transformer takes.
OF_TRANSFORMER = ("predictor_heads", "latent_tokens", "history")


def check(config: Config) -> None:
    """Check the settings that must fit together."""
    data, loss = config.data, config.loss
    if loss.prediction == 0:
        raise ValueError(
            "loss.prediction: got 0, world takes more: nothing else trains the predictor"
        )
    if loss.unroll > data.window:
        raise ValueError(
            f"loss.unroll: got {loss.unroll}, takes at most data.window, {data.window} actions"
        )
    if loss.pairs > data.window:
        raise ValueError(
            f"loss.pairs: got {loss.pairs}, takes 0 for all frames, or at most data.window, "
            f"{data.window}"
        )
    check_networks(config)


def check_networks(config: Config) -> None:
    """Check the settings of the encoder and the predictor."""
    model = config.model
    if model.encoder == "vit" and model.keypoints:
        raise ValueError(
            f"model.keypoints: got {model.keypoints}, but it is used by model.encoder 'conv', not "
            "by 'vit'"
        )
    needs = {"keypoint_map": "keypoints", "sharpness": "keypoints", "frequency": "waves"}
    for name, other in needs.items():
        value = getattr(model, name)
        if value != type(model).model_fields[name].default and not getattr(model, other):
            raise ValueError(
                f"model.{name}: got {value}, but it is that of model.{other}, which is 0"
            )
    if model.waves and model.predictor != "mlp":
        raise ValueError(
            f"model.waves: got {model.waves}, but it is used by model.predictor 'mlp', not by "
            f"{model.predictor!r}"
        )
    if model.predictor != "transformer":
        for name in OF_TRANSFORMER:
            value = getattr(model, name)
            if value != type(model).model_fields[name].default:
                raise ValueError(
                    f"model.{name}: got {value}, but it is used by model.predictor 'transformer', "
                    f"not by {model.predictor!r}"
                )
        return
    if model.latent % model.latent_tokens:
        raise ValueError(
            f"model.latent_tokens: got {model.latent_tokens}, takes a divisor of model.latent, "
            f"{model.latent}"
        )
    check_heads(model, "predictor_heads", "predictor_dim")


NETWORKS = (
    "model.latent",
    "model.keypoints",
    "model.sharpness",
    "model.keypoint_map",
    "model.waves",
    "model.frequency",
    "model.action_dim",
    "model.predictor",
    "model.predictor_dim",
    "model.predictor_depth",
    "model.predictor_heads",
    "model.latent_tokens",
    "model.history",
)
SETTINGS = (
    *(f"loss.{name}" for name in Weights.__dataclass_fields__),
    "loss.unroll",
    "loss.pairs",
    "loss.slices",
    *NETWORKS,
)
register(MethodKind("world", World, build, "trajectories", "trajectories", SETTINGS, check))
