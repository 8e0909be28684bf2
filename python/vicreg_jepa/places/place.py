"""A place's side of the training: when it meets the others, what it keeps, what it writes down."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vicreg_jepa.config import Config
from vicreg_jepa.files import output
from vicreg_jepa.places.agenda import NEW, Standing
from vicreg_jepa.places.meetings import Meetings, Result
from vicreg_jepa.places.outer import Outer

NAME = "places.jsonl"
SECTIONS = ("method", "model", "loss", "augment", "optimizer")  # the same in every place
OUTER = ("every", "rate", "momentum")  # of `places`, also the same


class Place:
    """One place of a training in many. folder: the run's.

    meetings: the connection to the others; made from the settings if it is None.
    """

    def __init__(
        self, config: Config, method: nn.Module, folder: Path, meetings: Any = None
    ) -> None:
        self.config, self.settings, self.folder = config, config.places, folder
        self.outer = Outer(method, self.settings.rate, self.settings.momentum)
        self.round, self.history, self.taken = NEW, "", 0
        self.meetings = meetings or Meetings(self.settings, folder.resolve().name, _say)
        self.together = 0  # places at the last meeting
        self.begun = 0.0  # when the last meeting began, in seconds
        self.warned = False

    # ------------------------------------------------------------------------------------- when

    @property
    def rounds(self) -> int:
        """The outer steps of a whole run; the last round may be shorter."""
        return -(-self.config.training.steps // self.settings.every)

    @property
    def finished(self) -> bool:
        return self.round >= self.rounds

    def end(self, round: int) -> int:
        """The step at which this round, counted from 0, ends."""
        return min((round + 1) * self.settings.every, self.config.training.steps)

    def due(self, step: int) -> bool:
        """Whether a meeting is due after so many steps; a new place first joins."""
        if self.round == NEW:
            return True
        return not self.finished and step >= self.end(self.round)

    # ----------------------------------------------------------------------------------- meeting

    def hold(self, step: int) -> Result:
        """Meet the other places; nothing of this place changes, so a signal may end the waiting."""
        self.begun = time.perf_counter()
        due = self.round != NEW and self.due(step)
        standing = Standing(
            self.round, self.history, self.taken, due, self._shared_settings(), self._data()
        )
        return self.meetings.hold(standing, self.outer.shared, self.outer.contribution)

    def take(self, result: Result, step: int) -> int:
        """Take what a meeting has given; return the step from which to go on. It must not be
        interrupted: weights, round and history belong together.
        """
        if result.shared is not None:
            self.outer.adopt(result.shared)
        if result.mean is not None:
            self.outer.step(result.mean)
        if result.shared is not None or result.mean is not None:
            self.taken = 0
        self.round, self.history = result.agenda.round, result.history
        after = max(step, self.end(self.round - 1)) if self.round > 0 else step
        self._write_down(result, after, time.perf_counter() - self.begun)
        return after

    def _shared_settings(self) -> dict[str, Any]:
        described = self.config.model_dump(mode="json")
        shared = {name: described[name] for name in SECTIONS}
        shared |= {f"places.{name}": described["places"][name] for name in OUTER}
        shared["training.steps"] = self.config.training.steps
        shared["weights"] = self.outer.anchor.numel()
        return {name: json.dumps(value) for name, value in shared.items()}

    def _data(self) -> str:
        described = [self.config.data.model_dump(mode="json"), self.config.seed]
        return hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]

    def _write_down(self, result: Result, step: int, seconds: float) -> None:
        agenda, name = result.agenda, self.meetings.name
        if len(agenda.members) != self.together:
            self.together = len(agenda.members)
            _say(f"step {step}: {self.together} at the meeting of round {self.round}")
        if result.shared is not None and agenda.source.standing.round != NEW:
            _say(f"took the weights of {agenda.source.name} and goes on from step {step}")
        twins = agenda.same_data(name)
        if twins and not self.warned:
            self.warned = True
            _say(
                f"{', '.join(twins)} has the same data and seed, so it learns from the same "
                "batches: give each place data or a seed of its own"
            )
        row = {
            "round": self.round,
            "step": step,
            "places": len(agenda.members),
            "joined": result.shared is not None,
            "contributed": len(agenda.contributing),
            "bytes_sent": result.sent,
            "bytes_received": result.received,
            "seconds": seconds,
        }
        path = self.folder / NAME
        with output.writing(path), path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        self.meetings.close()

    # -------------------------------------------------------------------------------- checkpoint

    def tensors(self) -> dict[str, Tensor]:
        return {"places.anchor": self.outer.anchor, "places.velocity": self.outer.velocity}

    def state(self) -> dict[str, Any]:
        return {"round": self.round, "history": self.history, "taken": self.taken}

    def restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.outer.restore(tensors["places.anchor"], tensors["places.velocity"])
        self.round, self.history = state["round"], state["history"]
        self.taken = state["taken"]


def _say(text: str) -> None:
    print(f"places: {text}", file=sys.stderr, flush=True)
