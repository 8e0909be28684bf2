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

from vicreg_jepa.methods.base import MethodKind, register
from vicreg_jepa.models.dynamics import Dynamics, GRUDynamics, MLPDynamics
from vicreg_jepa.models.dynamics_transformer import TransformerDynamics
from vicreg_jepa.models.frames import ConvFrames, ViTFrames
from vicreg_jepa.models.perceptron import mlp
from vicreg_jepa.ops.choose import Kernels

if TYPE_CHECKING:
    from vicreg_jepa.config.settings import Config


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
    prediction. slices: the random directions of SIGReg. actions: A.

    In training mode `step` counts the optimizer's steps; SIGReg's random directions depend on it.
    """

    step: Tensor

    def __init__(
        self,
        encoder: nn.Module,
        action_encoder: nn.Module,
        predictor: Dynamics,
        inverse: nn.Module | None,
        kernels: Kernels,
        *,
        actions: int,
        weights: Weights,
        unroll: int = 8,
        slices: int = 1024,
    ) -> None:
        super().__init__()
        self.encoder, self.action_encoder, self.predictor = encoder, action_encoder, predictor
        self.inverse, self.kernels, self.actions = inverse, kernels, actions
        self.weights, self.steps, self.slices = weights, unroll, slices
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))

    def encode(self, frames: Tensor) -> Tensor:
        """Latents [B, D] of frames uint8 [B, H, W, C]. Raises ValueError for another dtype."""
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames: got {frames.dtype}, takes torch.uint8, 0 to 255")
        return self.encoder(frames.movedim(-1, 1).float() / 255.0)

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
        z = self.encode(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])  # [B, T + 1, D]
        embedded = self.action_encoder(actions)
        terms = {}
        unrolled = self.predictor.unroll(z[:, :1], embedded[:, : self.steps])
        z = z.float()
        terms["prediction"] = F.mse_loss(unrolled.float(), z[:, 1 : self.steps + 1])
        if weights.one_step:
            following = self.predictor.one_step(z[:, :-1], embedded)
            terms["one_step"] = F.mse_loss(following.float(), z[:, 1:])
        if weights.similarity:
            terms["similarity"] = F.mse_loss(z[:, 1:], z[:, :-1])
        if self.inverse is not None:
            pairs = torch.cat((z[:, :-1], z[:, 1:]), dim=-1)
            terms["inverse"] = F.mse_loss(self.inverse(pairs).float(), actions)
        return terms | self._spread(z, process_group)

    def _spread(self, z: Tensor, process_group: Any) -> dict[str, Tensor]:
        """The terms against collapse of latents [B, T + 1, D]."""
        weights = self.weights
        terms: dict[str, Tensor] = {}
        by_time = z.transpose(0, 1)  # the batch's rows at each time
        # The rows of a window are on one rank.
        for prefix, rows, group in (("", by_time, process_group), ("time_", z, None)):
            names = [f"{prefix}variance", f"{prefix}covariance"]
            if any(getattr(weights, name) for name in names):
                both = self.kernels.variance_covariance(rows, group)
                terms |= {n: z for n, z in zip(names, both, strict=True) if getattr(weights, n)}
        if weights.sigreg:
            terms["sigreg"] = self.kernels.sigreg(
                by_time, self.slices, int(self.step), process_group
            )
        return terms

    def after_step(self) -> None:
        self.step += 1

    def features(self, frames: Tensor) -> Tensor:
        """[B, D] of frames uint8 [B, H, W, C], the input of a probe."""
        return self.encode(frames)

    def exported(self) -> tuple[str, nn.Module]:
        return "encoder", self.encoder


def _encoder(config: Config, kernels: Kernels, channels: int) -> nn.Module:
    model, size = config.model, config.data.size
    if model.encoder == "conv":
        return ConvFrames(channels, size, model.dim, model.latent, model.keypoints)
    return ViTFrames(
        channels, size, model.dim, model.latent, depth=model.depth, heads=model.heads,
        patch=model.patch, attend=kernels.attend(None, None),
    )  # fmt: skip


def _predictor(config: Config, kernels: Kernels) -> Dynamics:
    model = config.model
    shape = (model.latent, model.action_dim, model.predictor_dim, model.predictor_depth)
    if model.predictor == "mlp":
        return MLPDynamics(*shape)
    if model.predictor == "gru":
        return GRUDynamics(*shape)
    return TransformerDynamics(
        *shape, model.predictor_heads, kernels, tokens=model.latent_tokens, history=model.history
    )


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
        unroll=loss.unroll, slices=loss.slices,
    )  # fmt: skip


# The settings that only the transformer takes.
OF_TRANSFORMER = ("predictor_heads", "latent_tokens", "history")
LEAST_HEAD, MOST_HEAD, HEAD_STEP = 16, 128, 8  # masked_attention's head dims


def check(config: Config) -> None:
    """Check the settings that must fit together."""
    model, data, loss = config.model, config.data, config.loss
    if loss.prediction == 0:
        raise ValueError(
            "loss.prediction: got 0, world takes more: nothing else trains the predictor"
        )
    if loss.unroll > data.window:
        raise ValueError(
            f"loss.unroll: got {loss.unroll}, takes at most data.window, {data.window} actions"
        )
    if model.encoder == "vit" and model.keypoints:
        raise ValueError(
            f"model.keypoints: got {model.keypoints}, but it is used by model.encoder 'conv', not "
            "by 'vit'"
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
    head, rest = divmod(model.predictor_dim, model.predictor_heads)
    if rest or head % HEAD_STEP or not LEAST_HEAD <= head <= MOST_HEAD:
        raise ValueError(
            f"model.predictor_heads: got {model.predictor_heads} for predictor_dim "
            f"{model.predictor_dim}, takes heads of a multiple of {HEAD_STEP} from {LEAST_HEAD} to "
            f"{MOST_HEAD}"
        )


SETTINGS = (
    *(f"loss.{name}" for name in Weights.__dataclass_fields__),
    "loss.unroll",
    "loss.slices",
    "model.latent",
    "model.keypoints",
    "model.action_dim",
    "model.predictor",
    "model.predictor_dim",
    "model.predictor_depth",
    "model.predictor_heads",
    "model.latent_tokens",
    "model.history",
)
register(MethodKind("world", World, build, "trajectories", "trajectories", SETTINGS, check))
