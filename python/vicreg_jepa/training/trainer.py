"""The training loop for any method, in one process or many; a killed run can be resumed."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import vicreg_kernels as vk
from vicreg_jepa.config import Config, describe, parse
from vicreg_jepa.data.batches import Stream, seed_for
from vicreg_jepa.distributed import sharding
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.files import output
from vicreg_jepa.methods import METHODS
from vicreg_jepa.models.masks import Masks
from vicreg_jepa.training import checkpoint, schedule
from vicreg_jepa.training.compilation import compile_method
from vicreg_jepa.training.optimizers import build as build_optimizer
from vicreg_jepa.training.stopping import Stop, Stopped

if TYPE_CHECKING:
    from vicreg_jepa.places.place import Place

# Settings that change how data are read but not the data: a resumed run may change them.
READING = ("workers", "download", "max_pixels", "max_bytes")
# Of several places, those that say how they reach each other, which may also change.
CONNECTING = ("meeting", "host", "start", "patience")
# The settings that a resumed run may not change otherwise.
RESUMED = ("method", "data", "augment", "model", "loss", "optimizer", "places", "seed")


class Diverged(FloatingPointError):
    """The loss is not finite; its batch is saved for replay."""


def device_of(config: Config) -> torch.device:
    """Raises ValueError for a name that is not a CPU or GPU, and for a GPU that does not exist."""
    name, gpus = config.training.device, torch.cuda.device_count()
    kind, _, index = name.partition(":")
    if name != "cpu" and (kind != "cuda" or not (index.isdigit() or name == "cuda")):
        raise ValueError(f"training.device: got {name!r}, takes cpu, cuda or cuda:<n>")
    if kind == "cuda" and int(index or 0) >= gpus:
        raise ValueError(f"training.device: got {name!r}, but torch sees {gpus} GPUs")
    return torch.device(name)


def bfloat16_is_slow(device: str) -> bool:
    """Whether torch is many times slower in bfloat16 than in float32 on this device: on a CPU
    without AVX-512 or similar instructions torch has no bfloat16 kernels for products and
    convolutions.
    """
    return device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Trainer:
    """A method, its optimizer, and the number of steps that they have taken.

    place: this one of several places that train together.
    """

    def __init__(
        self,
        config: Config,
        method: nn.Module,
        ranks: Ranks,
        folder: Path,
        place: Place | None = None,
    ) -> None:
        self.config, self.method, self.ranks, self.folder = config, method, ranks, folder
        if config.training.batch % (ranks.ranks * config.training.accumulate):
            raise ValueError(
                f"training.batch: got {config.training.batch}, takes a multiple of ranks x "
                f"accumulate = {ranks.ranks} x {config.training.accumulate}"
            )
        if config.training.compile == "reduce-overhead" and ranks.ranks > 1:
            raise ValueError(
                "training.compile: got 'reduce-overhead', takes one process, not "
                f"{ranks.ranks} ranks"
            )
        self.device, self.learns = device_of(config), METHODS[config.method].learns
        self.method.to(self.device)
        if config.training.compile:
            graphs = config.training.compile == "reduce-overhead"
            compile_method(method, whole=self.learns == "views", cuda_graphs=graphs)
        self.model = sharding.distribute(method, config.training, ranks.ranks)
        self.optimizer = build_optimizer(config.optimizer, method)
        self.place = place
        self.step, self.saved = 0, -1  # saved: the step of the newest checkpoint
        self.stop, self.agreed_to_stop = Stop(), False

    # --------------------------------------------------------------------------------- a step

    def take(self, batch: Any) -> Tensor:
        """Take one optimizer step; return the loss before the step, averaged over ranks.

        batch: images or clips; for a method of trajectories this rank's (frames, actions).
        """
        settings, steps = self.config.optimizer, self.config.training.steps
        for group in self.optimizer.param_groups:
            group["lr"] = schedule.rate(settings, self.step, steps)
            if group["weight_decay"] != 0:
                group["weight_decay"] = schedule.weight_decay(settings, self.step, steps)
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.training.compile == "reduce-overhead":
            # Nothing reads the memory of the previous step's graph any more: its gradients are
            # freed above.
            torch.compiler.cudagraph_mark_step_begin()
        seed = self.config.seed
        torch.manual_seed(seed_for(Stream.MODEL, seed, self.step, self.ranks.rank))
        # Views are drawn on the device, masks on the host.
        where = self.device if self.learns == "views" else "cpu"
        generator = torch.Generator(where).manual_seed(seed_for(Stream.METHOD, seed, self.step))
        with self._precision():
            loss = self._differentiate(batch, generator)
        if not math.isfinite(float(loss)):
            raise Diverged(self._saved_for_replay(batch, float(loss)))
        if settings.clip > 0:
            nn.utils.clip_grad_norm_(self.method.parameters(), settings.clip)
        self.optimizer.step()
        self.method.after_step()
        self.step += 1
        if self.place is not None:
            self.place.taken += 1
        return loss

    def _differentiate(self, batch: Any, generator: torch.Generator) -> Tensor:
        """Compute the gradient of the whole batch's loss in the parameters; return that loss."""
        if self.learns == "views":
            loss = self._of_statistics(batch, generator)
        elif self.learns == "trajectories":
            loss = self._of_trajectories(*batch)
        else:
            loss = self._of_tokens(batch, generator)
        if self.ranks.ranks > 1:
            # All ranks must stop after the same step, so a request to stop is reduced with the
            # loss.
            told = loss.new_tensor(0.0 if self.stop.told is None else 1.0)
            total = torch.stack((loss, told))
            dist.all_reduce(total)
            loss, self.agreed_to_stop = total[0] / self.ranks.ranks, bool(total[1] > 0)
        return loss

    def _of_statistics(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        pieces, share = self.config.training.accumulate, self.ranks.share
        views = self.method.views(batch.to(self.device), generator)
        loss = partial(self.method.loss, process_group=self.ranks.group)
        # Each micro-batch is split among the ranks, so batch norm sees the same ones as one
        # process.
        micro = zip(*([share.of(v) for v in view.chunk(pieces)] for view in views), strict=True)
        if pieces > 1:
            return vk.accumulate(loss, self.model, list(micro))
        value = loss(*(self.model(view) for view in next(micro)))
        value.backward()
        return value.detach()

    def _of_tokens(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """The mean over the predicted tokens of all ranks; each micro-batch is weighted by its
        tokens.
        """
        whole, pieces = self.config.training.batch, self.config.training.accumulate
        share = whole // self.ranks.ranks
        if len(batch) == whole:
            batch = self.ranks.share.of(batch)
        batch = batch.to(self.device)
        drawn, tokens = self._masks(batch, generator)
        size = share // pieces
        total = torch.zeros((), device=self.device)
        for piece in range(pieces):
            begin = piece * size
            part = drawn.part(begin, begin + size)
            weight = part.tokens() * self.ranks.ranks / tokens
            last = piece == pieces - 1
            with self._one_reduction(last):
                some = batch[begin : begin + size]
                value = self.model(some, part, weight, self.ranks.group)
                value.backward()
            total += value.detach()
        return total

    def _of_trajectories(self, frames: Tensor, actions: Tensor) -> Tensor:
        """The loss of this rank's windows, whose batch statistics are those of all ranks."""
        frames, actions = frames.to(self.device), actions.to(self.device)
        value = self.model(frames, actions, self.ranks.group)
        value.backward()
        return value.detach()

    def _masks(self, batch: Tensor, generator: torch.Generator) -> tuple[Masks, int]:
        """The masks of this rank's samples, and the number of tokens that all ranks predict."""
        first = len(batch) * self.ranks.rank
        masks = self.method.draw(batch, first, self.config.training.batch, generator)
        tokens = masks.tokens()
        if self.ranks.ranks > 1:
            count = torch.tensor(tokens, device=self.device)
            dist.all_reduce(count)
            tokens = int(count)
        return masks, tokens

    def _one_reduction(self, last: bool) -> Any:
        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return contextlib.nullcontext()
        return self.model.no_sync()

    def _precision(self) -> Any:
        if self.config.training.precision == "float32":
            return contextlib.nullcontext()
        # The cache of autocast would hold a copy of every gathered shard.
        cached = self.config.training.parallel != "fsdp"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=cached)

    # ------------------------------------------------------------------- what a run leaves behind

    def _saved_for_replay(self, batch: Any, loss: float) -> str:
        from safetensors.torch import save_file

        path = self.folder / f"diverged_step_{self.step:08d}_rank_{self.ranks.rank}.safetensors"
        weights = sharding.whole(self._weights(), keep=self.ranks.rank == 0)
        parts = {"batch": batch}
        if self.learns == "trajectories":
            parts = dict(zip(("frames", "actions"), batch, strict=True))
        tensors = {**parts, **weights}
        with output.writing(path):
            save_file({name: z.contiguous() for name, z in tensors.items()}, path)
        held = "the batch and the weights are" if weights else "this rank's batch is"
        return f"the loss of step {self.step} is {loss}: {held} in {path}"

    def _weights(self) -> dict[str, Tensor]:
        return {f"method.{k}": v for k, v in self.method.state_dict().items()}

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def save(self) -> Path | None:
        """Save a checkpoint; called on every rank. Rank 0 writes it and returns its path."""
        tensors = self._weights()
        optimizer = checkpoint.flatten("optimizer", self.optimizer.state_dict(), tensors)
        if self.place is not None:
            tensors |= self.place.tensors()
        tensors = sharding.whole(tensors, keep=self.ranks.rank == 0)
        if self.ranks.rank != 0:
            return None
        state = {
            "config": describe(self.config),
            "channels": getattr(self.method, "channels", None),  # of those that build.py made
            "optimizer": optimizer,
        }
        if self.place is not None:
            state["places"] = self.place.state()
        path = checkpoint.save(self.checkpoints, self.step, tensors, state)
        checkpoint.prune(self.checkpoints, self.config.training.keep)
        self.saved = self.step
        return path

    def resume(self) -> int:
        """Load the newest intact checkpoint, if there is one; return the step."""
        newest = checkpoint.newest_whole(self.checkpoints)
        if newest is not None:
            self._take_up(*newest)
        if self.ranks.ranks > 1:
            steps = torch.zeros(self.ranks.ranks, dtype=torch.int64)
            steps[self.ranks.rank] = self.step
            dist.all_reduce(steps)
            if len(steps.unique()) > 1:
                raise checkpoint.CheckpointError(
                    f"{self.checkpoints}: the ranks found checkpoints of steps {steps.tolist()}: "
                    "the run's folder must be the same one for all"
                )
        if newest is not None and self.ranks.rank == 0:
            checkpoint.set_aside(self.checkpoints, self.step)
        self.saved = self.step
        return self.step

    def _take_up(self, path: Path, held: tuple[dict[str, Tensor], int, dict[str, Any]]) -> None:
        tensors, step, state = held
        mine = describe(self.config)
        theirs = describe(parse(state["config"]))  # newer settings have their defaults
        for name in READING:
            theirs["data"][name] = mine["data"][name]
        if (mine["places"]["meeting"] is None) == (theirs["places"]["meeting"] is None):
            for name in CONNECTING:
                theirs["places"][name] = mine["places"][name]
        for section in RESUMED:
            if mine[section] != theirs.get(section):
                raise checkpoint.CheckpointError(
                    f"{path}: was written with {section} {theirs.get(section)}, this run has "
                    f"{mine[section]}: give another output folder"
                )
        begin = [each["training"]["begin"] for each in (mine, theirs)]
        if begin[0] != begin[1]:
            raise checkpoint.CheckpointError(
                f"{path}: was written with training.begin {begin[1]}, this run has {begin[0]}: "
                "give another output folder"
            )
        prefix = "method."
        weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        sharding.load(self.method, weights)
        optimizer = checkpoint.unflatten(state["optimizer"], tensors)
        sharding.load_optimizer(self.optimizer, optimizer)
        if self.place is not None:
            self.place.restore(tensors, state["places"])
        self.step = step

    # --------------------------------------------------------------------------------- the loop

    def fit(self, source: Any, log: Any, stop: Stop | None = None) -> None:
        """Train from the current step to the last one; call log(step, loss, seconds) after each.

        If any rank is told to stop, all ranks finish and save the current step and raise Stopped.
        """
        settings, self.stop = self.config.training, stop or Stop()
        batches, follows = None, -1  # follows: the step of the next batch
        try:
            if self.place is not None and not self.place.finished:
                self._meet()
            while self.step < settings.steps:
                start = time.perf_counter()
                if batches is None or follows != self.step:
                    batches = source.batches(self.step, self.ranks.share)
                batch = next(batches)
                with self.stop.deferred():
                    loss = self.take(batch)
                    log(self.step, float(loss), time.perf_counter() - start)
                    follows = self.step
                    self._save_if_due()
                if self.place is not None and self.place.due(self.step):
                    self._meet()
                if self.agreed_to_stop:
                    raise Stopped(self.stop.told or signal.SIGTERM)
        except Stopped:
            if self.step not in (0, self.saved):
                self.save()
            raise
        finally:
            if self.place is not None:
                self.place.close()

    def _save_if_due(self) -> None:
        settings = self.config.training
        if self.place is not None and self.place.due(self.step):
            return  # the meeting comes first
        last = self.step == settings.steps
        if (last or self.step % settings.save_every == 0) and self.step not in (0, self.saved):
            self.save()

    def _meet(self) -> None:
        """Meet the other places, and go on from their step if they are ahead."""
        assert self.place is not None
        result = self.place.hold(self.step)
        with self.stop.deferred():
            self.step = self.place.take(result, self.step)
            self.saved = -1  # a meeting changes what there is to save at this step
            self._save_if_due()
