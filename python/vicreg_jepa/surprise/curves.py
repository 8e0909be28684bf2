"""Surprise: the error of a V-JEPA's prediction of a video.

It is computed as published (Garrido et al., 2025, arXiv:2502.11831): a window slides over the
video; its first frames are the context, the rest is predicted from them; the surprise of a window
is the L1 distance between the predictions and the layer-normed teacher tokens of the whole window.
A video's score is the mean or the maximum over windows and context lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vicreg_jepa.surprise.expectation import Expectation, evidence, span_of, targets_of


@dataclass(frozen=True)
class Curve:
    """The surprise at each frame of a video.

    values: [contexts, frames]; row c is for windows that see contexts[c] frames. A frame's value is
    the mean, over the windows that predict it, of the error of its token frame; NaN if no window
    predicts it.

    local: [frames], of the worst token instead of all tokens: its error, or with an expectation
    (expectation.py) how far it is from what is expected; the mean over all windows that predict the
    frame; NaN before every one of the interleaved clips that a model with a stride takes predicts.
    An impossible thing is a few tokens of a frame, and each of these clips meets it; an accident of
    one clip does not recur in the next.
    """

    contexts: tuple[int, ...]
    values: Tensor
    local: Tensor

    @property
    def over_time(self) -> Tensor:
        """[frames]: the mean over context lengths."""
        return self.values.nanmean(dim=0)

    @property
    def mean(self) -> float:
        return float(self.over_time.nanmean())

    @property
    def maximum(self) -> float:
        return float(self.over_time.nan_to_num(-1.0).max())

    @property
    def peak(self) -> float:
        """The highest of `local`: the surprise of a single video, for one threshold."""
        return float(self.local.nan_to_num(-torch.inf).max())


@torch.no_grad()
def window_errors(
    method: Any, clips: Tensor, seen: Sequence[int], expected: Expectation | None = None
) -> list[Tensor]:
    """clips [B, C, F, H, W] -> for each number of token frames seen, the L1 error of each predicted
    token frame, its mean over tokens and that of the worst token: [2, B, predicted token frames].
    expected: the second is then how far the worst token is from what is expected.
    """
    plane = method.encoder.grid.frame.tokens
    targets = targets_of(method, clips)
    if expected is None:
        predictions = method.foreseen(clips, seen)
    else:
        known = method.known(clips, seen)
        predictions = [predicted for _, predicted in known]
    errors = []
    for frames, predicted in zip(seen, predictions, strict=True):
        first = frames * plane
        apart = predicted - targets[:, first : first + predicted.shape[1]]
        each = apart.abs().mean(dim=-1).unflatten(1, (-1, plane))
        errors.append(torch.stack((each.mean(dim=-1), each.amax(dim=-1))))
    if expected is not None:
        found = evidence(method, clips, targets, known, seen)
        for rows, one in zip(errors, found, strict=True):
            rows[1] = expected.surprise(one)[:, None]
    return errors


def check_length(method: Any, length: int, stride: int) -> None:
    """Raises ValueError if videos of so many frames are shorter than a clip of the model."""
    span = span_of(method, stride)
    if length < span:
        raise ValueError(f"videos: got {length} frames, takes at least the model's {span}")


@torch.no_grad()
def curves(
    method: Any,
    videos: Tensor,
    contexts: Sequence[int] | None = None,
    *,
    expected: Expectation | None = None,
    stride: int = 1,
    step: int = 1,
    batch: int = 16,
) -> list[Curve]:
    """The curves of videos, uint8 [N, F, H, W, C], with F at least the length of the model's clip.

    contexts: numbers of the model's frames; by default the method's. expected: of a model that
    predicts frame by frame, for `Curve.local`. stride: the distance of the model's frames in the
    video, as in training; step: the distance of windows in the video.
    """
    tubelet = method.encoder.patch_embed.size[0]
    frames, span = method.encoder.grid.frames * tubelet, span_of(method, stride)
    contexts = method.contexts if contexts is None else contexts
    count, length = videos.shape[:2]
    check_length(method, length, stride)
    if not contexts:
        raise ValueError(f"contexts: a clip of {frames} frames is too short for any")
    for context in contexts:
        if context % tubelet or not 0 < context < frames:
            raise ValueError(
                f"contexts: got {context}, takes multiples of {tubelet} below {frames} frames"
            )
    starts = range(0, length - span + 1, step)
    places = [(v, s) for v in range(count) for s in starts]
    total = torch.zeros(2, len(contexts), count, length)
    seen_by = torch.zeros(len(contexts), count, length)
    device = next(method.parameters()).device
    for at in range(0, len(places), batch):
        part = places[at : at + batch]
        clips = torch.stack([videos[v, s : s + span : stride] for v, s in part])
        clips = clips.to(device).permute(0, 4, 1, 2, 3).float() / 255.0
        seen = [context // tubelet for context in contexts]
        errors = window_errors(method, clips, seen, expected)
        for i, (context, rows) in enumerate(zip(contexts, errors, strict=True)):
            for (v, s), row in zip(part, rows.cpu().unbind(dim=1), strict=True):
                # The value of a token frame holds for all frames of the video up to the next token
                # frame.
                wide = row.repeat_interleave(tubelet * stride, dim=1)
                wide = wide[:, : length - s - context * stride]
                first = s + context * stride
                end = first + wide.shape[1]
                total[:, i, v, first:end] += wide
                seen_by[i, v, first:end] += 1
    values = total[0] / seen_by  # NaN where nothing was predicted
    windows = seen_by.sum(dim=0)
    local = total[1].sum(dim=0) / windows
    local[windows < -(-tubelet * stride // step)] = torch.nan
    return [Curve(tuple(contexts), values[:, v], local[v]) for v in range(count)]
