"""The training loop: any method, one process or many; a killed run goes on where it was."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vicreg_kernels as vk
from jepa import checkpoint, schedule
from jepa.config import Config, describe, parse
from jepa.optimizers import build as build_optimizer
from jepa.source import Share, mixed


class Diverged(FloatingPointError):
    """The loss is not finite; its batch is saved for replay."""


@dataclass(frozen=True)
class Ranks:
    """This process among those of torchrun; alone without it."""

    rank: int = 0
    ranks: int = 1

    @property
    def share(self) -> Share:
        return Share(self.rank, self.ranks)

    @property
    def group(self) -> Any:
        return True if self.ranks > 1 else None


class Trainer:
    """config's method, its optimizer, and how many steps they have taken."""

    def __init__(self, config: Config, method: nn.Module, ranks: Ranks, folder: Path) -> None:
        self.config, self.method, self.ranks, self.folder = config, method, ranks, folder
        if config.training.batch % (ranks.ranks * config.training.accumulate):
            raise ValueError(
                f"training.batch: got {config.training.batch}, takes a multiple of ranks x "
                f"accumulate = {ranks.ranks} x {config.training.accumulate}"
            )
        self.device = torch.device(config.training.device)
        self.method.to(self.device)
        self.optimizer = build_optimizer(config.optimizer, method)
        self.step = 0
        self.model = self._parallel(method)
        if config.training.compile:
            self.model.compile(dynamic=True)

    def _parallel(self, method: nn.Module) -> nn.Module:
        if self.ranks.ranks == 1:
            return method
        return nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)

    # --------------------------------------------------------------------------------- a step

    def take(self, batch: Tensor) -> Tensor:
        """One step on this batch; the loss before it, of all ranks together."""
        settings, steps = self.config.optimizer, self.config.training.steps
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(settings, self.step, steps)
            if group["weight_decay"] != 0:
                group["weight_decay"] = schedule.weight_decay(settings, self.step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        torch.manual_seed(mixed(self.config.seed, 3, self.step, self.ranks.rank) % 2**63)
        generator = torch.Generator().manual_seed(mixed(self.config.seed, 4, self.step))
        with self._precision():
            loss = self._differentiate(batch, generator)
        if not math.isfinite(float(loss)):
            raise Diverged(self._saved_for_replay(batch, float(loss)))
        if settings.clip > 0:
            nn.utils.clip_grad_norm_(self.method.parameters(), settings.clip)
        self.optimizer.step()
        self.method.after_step()
        self.step += 1
        return loss

    def _differentiate(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Puts the gradient of the whole batch's loss into the parameters; returns that loss."""
        if hasattr(self.method, "views"):
            loss = self._of_statistics(batch, generator)
        else:
            loss = self._of_tokens(batch, generator)
        if self.ranks.ranks > 1:
            dist.all_reduce(loss)
            loss /= self.ranks.ranks
        return loss

    def _of_statistics(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        pieces, share = self.config.training.accumulate, self.ranks.share
        views = [share.of(v) for v in self.method.views(batch.to(self.device), generator)]
        loss = partial(self.method.loss, process_group=self.ranks.group)
        if pieces > 1:
            micro = list(zip(*(view.chunk(pieces) for view in views), strict=True))
            return vk.accumulate(loss, self.model, micro)
        value = loss(*(self.model(view) for view in views))
        value.backward()
        return value.detach()

    def _of_tokens(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The mean over all ranks' predicted tokens: a piece counts by how many it has."""
        whole, pieces = self.config.training.batch, self.config.training.accumulate
        drawn = self.method.draw(whole, generator)
        own = whole // self.ranks.ranks
        if len(batch) == whole:
            batch = self.ranks.share.of(batch)
        size, first = own // pieces, own * self.ranks.rank
        total = torch.zeros((), device=self.device)
        for piece in range(pieces):
            begin = piece * size
            part = drawn.part(first + begin, first + begin + size)
            weight = part.tokens() * self.ranks.ranks / drawn.tokens()
            last = piece == pieces - 1
            with self._one_reduction(last):
                value = weight * self.model(batch[begin : begin + size].to(self.device), part)
                value.backward()
            total += value.detach()
        return total

    def _one_reduction(self, last: bool) -> Any:
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _precision(self) -> Any:
        if self.config.training.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    # ------------------------------------------------------------------- what a run leaves behind

    def _saved_for_replay(self, batch: Tensor, loss: float) -> str:
        from safetensors.torch import save_file

        path = self.folder / f"diverged_step_{self.step:08d}_rank_{self.ranks.rank}.safetensors"
        weights = {f"method.{k}": v.contiguous() for k, v in self.method.state_dict().items()}
        save_file({"batch": batch.contiguous(), **weights}, path)
        return f"the loss of step {self.step} is {loss}: the batch and the weights are in {path}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(self) -> Path | None:
        if self.ranks.rank != 0:
            return None
        tensors = {f"method.{k}": v for k, v in self.method.state_dict().items()}
        optimizer = checkpoint.flatten("optimizer", self.optimizer.state_dict(), tensors)
        state = {
            "config": describe(self.config),
            "channels": self.method.channels,
            "optimizer": optimizer,
        }
        path = checkpoint.save(self.checkpoints, self.step, tensors, state)
        checkpoint.prune(self.checkpoints, self.config.training.keep)
        return path

    def resume(self) -> int:
        """Goes on from the newest checkpoint, if there is one; returns the step."""
        path = checkpoint.newest(self.checkpoints)
        if path is None:
            return 0
        tensors, step, state = checkpoint.load(path)
        mine = describe(self.config)
        theirs = describe(parse(state["config"]))  # settings that came later have their defaults
        for section in ("method", "data", "model", "loss", "optimizer", "seed"):
            if mine[section] != theirs.get(section):
                raise checkpoint.CheckpointError(
                    f"{path}: was written with {section} {theirs.get(section)}, this run has "
                    f"{mine[section]}: give another output folder"
                )
        own = {k.removeprefix("method."): v for k, v in tensors.items() if k.startswith("method.")}
        self.method.load_state_dict(own)
        self.optimizer.load_state_dict(checkpoint.unflatten(state["optimizer"], tensors))
        self.step = step
        return step

    def release(self) -> None:
        """Lets go of DistributedDataParallel: one that outlives its process group can hang."""
        self.model = self.method
        gc.collect()

    # --------------------------------------------------------------------------------- the loop

    def fit(self, source: Any, log: Any) -> None:
        """From where it stands to the last step. log(step, loss, seconds) after each."""
        settings = self.config.training
        batches = source.batches(self.step, self.ranks.share)
        while self.step < settings.steps:
            start = time.perf_counter()
            loss = self.take(next(batches))
            log(self.step, float(loss), time.perf_counter() - start)
            if self.step % settings.save_every == 0 or self.step == settings.steps:
                self.save()
