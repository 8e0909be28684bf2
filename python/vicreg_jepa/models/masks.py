"""The tokens that a JEPA sees and those that it predicts: I-JEPA's blocks and V-JEPA's tubes.

Every sample has its own masks and lengths: nothing is cut to the shortest of a batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vicreg_jepa.models.vit import Grid

# [B]: each sample's places in the flattened grid, ascending, int64.
Places = list[Tensor]


@dataclass(frozen=True)
class Masks:
    """context: the visible tokens; targets: M lists of tokens, each predicted separately from the
    context.
    """

    context: Places
    targets: list[Places]

    def part(self, begin: int, end: int) -> Masks:
        """The masks of samples begin to end."""
        return Masks(self.context[begin:end], [places[begin:end] for places in self.targets])

    def tokens(self) -> int:
        """The number of predicted tokens."""
        return sum(place.numel() for places in self.targets for place in places)


@dataclass(frozen=True)
class Blocks:
    """The number of random rectangles, and the ranges of their share of the grid's area (scale) and
    of their height over width (aspect).
    """

    count: int
    scale: tuple[float, float]
    aspect: tuple[float, float] = (1.0, 1.0)

    def size(self, grid: Grid, generator: torch.Generator) -> tuple[int, int]:
        share, ratio = torch.rand(2, generator=generator).tolist()
        area = grid.height * grid.width * (self.scale[0] + share * (self.scale[1] - self.scale[0]))
        aspect = self.aspect[0] + ratio * (self.aspect[1] - self.aspect[0])
        height = min(max(1, round(math.sqrt(area * aspect))), grid.height)
        width = min(max(1, round(math.sqrt(area / aspect))), grid.width)
        return height, width

    def draw(self, grid: Grid, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """bool [height, width]: one rectangle of this size at a random place."""
        inside = torch.zeros(grid.height, grid.width, dtype=torch.bool)
        top = int(torch.randint(grid.height - size[0] + 1, (), generator=generator))
        left = int(torch.randint(grid.width - size[1] + 1, (), generator=generator))
        inside[top : top + size[0], left : left + size[1]] = True
        return inside


def multi_block(
    grid: Grid,
    batch: int,
    generator: torch.Generator,
    context: Blocks = Blocks(1, (0.85, 1.0)),  # noqa: B008 - frozen
    target: Blocks = Blocks(4, (0.15, 0.2), (0.75, 1.5)),  # noqa: B008 - frozen
) -> Masks:
    """I-JEPA's masks: `target.count` blocks as targets, and a large block without them as context.
    A batch has one size of each.

    A sample whose targets leave its context empty is drawn again.
    """
    target_size, context_size = target.size(grid, generator), context.size(grid, generator)
    contexts: Places = []
    targets: list[Places] = [[] for _ in range(target.count)]
    for _ in range(batch):
        for _ in range(100):
            blocks = [target.draw(grid, target_size, generator) for _ in targets]
            seen = context.draw(grid, context_size, generator)
            for block in blocks:
                seen = seen & ~block
            if seen.any():
                break
        else:
            raise ValueError(
                f"masks: no context is left beside {target.count} targets of {target_size} on a "
                f"grid of {grid.height} x {grid.width}"
            )
        contexts.append(seen.flatten().nonzero().flatten())
        for places, block in zip(targets, blocks, strict=True):
            places.append(block.flatten().nonzero().flatten())
    return Masks(contexts, targets)


def tubes(grid: Grid, batch: int, generator: torch.Generator, blocks: Blocks) -> Masks:
    """V-JEPA's masks: rectangles that are hidden in every frame; the target is all hidden
    tokens.
    """
    contexts: Places = []
    targets: Places = []
    for _ in range(batch):
        for _ in range(100):
            hidden = torch.zeros(grid.height, grid.width, dtype=torch.bool)
            for _ in range(blocks.count):
                hidden |= blocks.draw(grid, blocks.size(grid, generator), generator)
            if not hidden.all():
                break
        else:
            raise ValueError(f"masks: {blocks} hides every place of {grid.height} x {grid.width}")
        flat = hidden.expand(grid.frames, -1, -1).flatten()
        contexts.append((~flat).nonzero().flatten())
        targets.append(flat.nonzero().flatten())
    return Masks(contexts, [targets])


@dataclass(frozen=True)
class VideoMasks:
    """How V-JEPA hides parts of a clip.

    blocks: the settings of tube masks, of which each step draws one (published: 8 short-range
    blocks of 15 % and 2 long-range ones of 70 %). future: the chance that a step instead hides the
    future, that is all tokens after a number of token frames in `frames_seen`; surprise is measured
    on this task.
    """

    blocks: tuple[Blocks, ...] = (
        Blocks(8, (0.15, 0.15), (0.75, 1.5)),
        Blocks(2, (0.7, 0.7), (0.75, 1.5)),
    )
    future: float = 0.0
    frames_seen: tuple[int, int] = (1, 5)

    def __call__(self, grid: Grid, batch: int, generator: torch.Generator) -> Masks:
        if self.future > 0 and float(torch.rand((), generator=generator)) < self.future:
            least, most = self.frames_seen
            return future(grid, batch, int(torch.randint(least, most + 1, (), generator=generator)))
        which = int(torch.randint(len(self.blocks), (), generator=generator))
        return tubes(grid, batch, generator, self.blocks[which])


def following(grid: Grid, batch: int, generator: torch.Generator) -> Masks:
    """The context is every token frame but the last, the target every one but the first."""
    del generator  # nothing is drawn
    every, plane = torch.arange(grid.tokens), grid.frame.tokens
    return Masks([every[:-plane]] * batch, [[every[plane:]] * batch])


# A share of the range of pixels: smaller changes count as noise.
CHANGE = 0.15


def changing(patches: Tensor, grid: Grid) -> Tensor:
    """bool [B, T]: the tokens of clips [B, T, pixels] in [0, 1] of which a pixel differs by more
    than CHANGE from the clip's median at its place, or from the token frame before or after.
    """
    frames = patches.unflatten(1, (grid.frames, -1))
    change = (frames - frames.median(dim=1, keepdim=True).values).abs().amax(dim=-1) > CHANGE
    between = (frames[:, 1:] - frames[:, :-1]).abs().amax(dim=-1) > CHANGE
    change[:, 1:] |= between
    change[:, :-1] |= between
    return change.flatten(1)


def chosen(drawn: Masks, keep: Tensor) -> Masks:
    """Keep only the targets where `keep` [B, T] is True; a sample with none keeps all of them."""
    targets = []
    for one in drawn.targets:
        some = [places[row[places]] for places, row in zip(one, keep, strict=True)]
        targets.append([s if s.numel() else p for s, p in zip(some, one, strict=True)])
    return Masks(drawn.context, targets)


def future(grid: Grid, batch: int, frames_seen: int) -> Masks:
    """The first `frames_seen` token frames are the context, all others the target."""
    every = torch.arange(grid.tokens)
    cut = frames_seen * grid.height * grid.width
    return Masks([every[:cut]] * batch, [[every[cut:]] * batch])
