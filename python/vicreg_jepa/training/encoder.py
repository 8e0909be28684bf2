"""A trained encoder from the file that `vicreg-jepa export` wrote."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from vicreg_jepa import config
from vicreg_jepa.models.conv import ConvEncoder
from vicreg_jepa.models.resnet import ResNet18
from vicreg_jepa.training import exported


class Encoder(nn.Module):
    """A trained encoder. forward: images [B, C, H, W] or clips [B, C, F, H, W], floats in [0, 1],
    or a world model's frames, uint8 [B, H, W, C] -> features [B, D], as probes see them.

    network: the exported part of the method, with its weights; settings: the run's configuration;
    step: the step of the training.
    """

    def __init__(self, method: nn.Module, settings: config.Config, step: int) -> None:
        super().__init__()
        self.network = method.exported()[1]
        self.settings, self.step = settings, step
        # Not registered: the rest of the method, such as the expander, was not exported.
        self.methods = (method,)

    def forward(self, samples: Tensor) -> Tensor:
        """Raises ValueError for samples of another shape than those of the training."""
        self._check(samples)
        return self.methods[0].features(samples)

    def _check(self, samples: Tensor) -> None:
        data, channels = self.settings.data, self.methods[0].channels
        edge: int | None = data.size
        if isinstance(self.network, (ConvEncoder, ResNet18)):  # it takes images of any size
            edge = None
        takes: tuple[int | None, ...] = (None, channels, edge, edge)
        if self.settings.is_video:
            takes = (None, channels, None, edge, edge)
        if self.settings.is_of_trajectories:
            takes = (None, edge, edge, channels)
        fits = samples.dim() == len(takes) and all(
            size in (None, its) for size, its in zip(takes, samples.shape, strict=True)
        )
        if not fits:
            words = ", ".join("any" if size is None else str(size) for size in takes)
            raise ValueError(f"samples: got shape {list(samples.shape)}, takes [{words}]")


def load_encoder(file: str | Path) -> Encoder:
    """Load what `vicreg-jepa export RUN FILE` wrote, on the CPU and in evaluation mode. Raises
    ValueError if the file is another one, or damaged.
    """
    settings, method, step, tensors = exported.built(file, exported.ENCODER)
    encoder = Encoder(method, settings, step)
    exported.fill(encoder.network, tensors, file)
    method.eval()
    return encoder.eval()
