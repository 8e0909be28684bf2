"""Which exchanges the windows of a model span at all: a limit of what its surprise can tell, which
no training moves.

A window that ends before the first difference of an exchanged video shows what the possible video
of the same past shows, and one that begins after the last difference of the pasts what the one of
the same future shows. If every window is one of these, both pairs of a quadruplet consist of the
same windows, and any surprise that is a mean over windows is the same for both.
"""

from __future__ import annotations

from torch import Tensor

from vicreg_jepa.physics import PROPERTIES
from vicreg_jepa.surprise import physics_test


def spanned(four: Tensor, frames: int, stride: int) -> bool:
    """Whether a window of so many frames, `stride` apart in the video, tells both pairs of a
    quadruplet uint8 [4, F, H, W, 3] apart: the impossible two show there what the possible two do
    not. Raises ValueError for a window that is longer than the videos.
    """
    span = (frames - 1) * stride + 1
    if not 1 <= span <= four.shape[1]:
        raise ValueError(
            f"window: got {frames} frames, {stride} apart, takes up to {four.shape[1]} of a video"
        )
    first, second, exchanged, back = (_numbered(four)[i] for i in range(4))
    for start in range(four.shape[1] - span + 1):
        seen = slice(start, start + span, stride)
        possible = sorted((first[seen], second[seen]))
        if possible != sorted((exchanged[seen], back[seen])):
            return True
    return False


def _numbered(four: Tensor) -> list[list[int]]:
    """A number for each frame of each video, the same for the same picture at the same time."""
    columns = []
    for at in four.unbind(dim=1):
        pictures: list[Tensor] = []
        column = []
        for picture in at:
            same = [i for i, other in enumerate(pictures) if bool((picture == other).all())]
            column.append(same[0] if same else len(pictures))
            if not same:
                pictures.append(picture)
        columns.append(column)
    return [list(row) for row in zip(*columns, strict=True)]


def hidden_spanned(frames: int, stride: int, count: int, first_seed: int = 0) -> dict[str, int]:
    """For each property but the control, how many of `count` quadruplets whose exchange is hidden a
    window of so many frames spans.
    """
    result = {}
    for property in PROPERTIES:
        if property != "control":
            clips = physics_test.quadruplets(property, count, first_seed, True)
            result[property] = sum(spanned(four, frames, stride) for four in clips)
    return result


def line(frames: int, stride: int, count: int) -> str:
    """What `vicreg-jepa surprise` prints of it; the ties are counted as half."""
    spans = hidden_spanned(frames, stride, count)
    inside, total = sum(spans.values()), count * len(spans)
    most = 100 * (inside + total) / (2 * total)
    return (
        f"windows of {frames} frames, {stride} apart, span {inside} of {total} exchanges behind a "
        f"panel; the mean ties in the others, so it can tell at most {most:.1f} % apart there"
    )
