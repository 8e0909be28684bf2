"""`vicreg-jepa probe` of a run on trajectories: the true state, read from latents of frames."""

from __future__ import annotations

from torch import Tensor, nn

from vicreg_jepa.config import Config
from vicreg_jepa.data import trajectories
from vicreg_jepa.evaluation import collapse, state_probe
from vicreg_jepa.evaluation.features import features
from vicreg_jepa.methods import build

FRAMES = 2500  # in all, a fifth of them for the test


def probed(settings: Config, method: nn.Module, step: int) -> str:
    """The table of the errors of both probes, for the trained encoder and its baselines.

    Raises ValueError if the trajectories have no true state that varies.
    """
    fit, test = trajectories.labelled(settings, FRAMES)
    names = state_probe.varying(fit.facts, test.facts)
    if not names:
        raise ValueError(f"data: the frames' states are {list(fit.facts)}, takes one that varies")
    facts, held_out = ({name: part.facts[name] for name in names} for part in (fit, test))
    untrained = build.method(settings, method.channels).eval()
    inputs = {
        f"{settings.method}, step {step}": [features(method, part.frames) for part in (fit, test)],
        "untrained encoder": [features(untrained, part.frames) for part in (fit, test)],
        "pixels": [_pixels(part.frames) for part in (fit, test)],
    }
    rows = {
        title: state_probe.errors(seen, unseen, facts, held_out, settings.seed)
        for title, (seen, unseen) in inputs.items()
    }
    means = {name: state_probe.constant(facts[name], held_out[name]) for name in names}
    rows["mean, or commonest class"] = {name: (error, error) for name, error in means.items()}
    lines = [f"{len(fit.frames)} frames to fit probes to, {len(test.frames)} of other episodes"]
    lines += _table(rows, held_out)
    spread = collapse.spread(features(method, test.frames))
    lines += [f"effective rank {spread.effective_rank:.1f} of {spread.dim}, std {spread.std:.3f}"]
    return "\n".join([*lines, *(f"warning: {warning}" for warning in spread.warnings())])


def _pixels(frames: Tensor) -> Tensor:
    return frames.flatten(1).float() / 255.0


def _table(rows: dict[str, dict[str, tuple[float, float]]], facts: dict[str, Tensor]) -> list[str]:
    """Errors of floats are root mean square distances in pixels, those of integers shares."""
    lines = ["error of (ridge regression, MLP): root mean square distance, or share that is wrong"]
    lines += [f"{'':26}" + "".join(f"{name:>20}" for name in facts)]
    for title, errors in rows.items():
        cells = []
        for name, fact in facts.items():
            form = ".2f" if fact.is_floating_point() else ".1%"
            cells.append(", ".join(f"{value:{form}}" for value in errors[name]))
        lines.append(f"{title:26}" + "".join(f"{cell:>20}" for cell in cells))
    return lines
