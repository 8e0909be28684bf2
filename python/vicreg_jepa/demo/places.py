"""python -m vicreg_jepa.demo.places --output FOLDER: several places beside synchronous training.

Four processes on this machine, of one thread each, train a small `vicreg_digits` in five ways:

    synchronous  four ranks, one batch over all of them in every step
    places       four places with a quarter of the images and of the batch each
    killed       the same; the last is killed after a third of the rounds and comes back after two
    once         the same with one meeting, the mean of the weights at the end
    alone        one place with its quarter

The table has the loss on images that none of them sees, and the bytes that went over the loopback
device by the kernel's count (`unshare -rn` gives a loopback device that nothing else uses).
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vicreg_jepa import config
from vicreg_jepa.cli_options import integer, reported
from vicreg_jepa.config import Config
from vicreg_jepa.data import image_sets
from vicreg_jepa.data.batches import ImageSource
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.files import output
from vicreg_jepa.methods import build
from vicreg_jepa.places.place import NAME, Place
from vicreg_jepa.training.run import restore
from vicreg_jepa.training.trainer import Trainer

RECIPE = "vicreg_digits"
SMALL = ["model.dim=16", "model.expander=[64,16]", "training.batch=128"]
PLACES = 4
DRAWS = 5  # of views, for the loss on held-out images
HEARTBEAT = 3000  # milliseconds until the lighthouse misses a killed place
Process = Any  # of the context `fork`
FORK = multiprocessing.get_context("fork")  # the imports take longer than the training


class Measured(NamedTuple):
    """loss: on the held-out images. megabytes: over the loopback device."""

    loss: float
    megabytes: float
    seconds: float


class Experiment:
    """The runs of one seed, in `folder`."""

    def __init__(self, folder: Path, seed: int, steps: int, every: int, words: list[str]) -> None:
        self.folder, self.seed, self.steps, self.every = folder, seed, steps, every
        self.words = config.layered([*SMALL, f"training.steps={steps}"], words)
        self.train, self.test = image_sets.split(image_sets.digits(), 0)
        self.order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(0))

    def run(self, arm: str) -> Measured:
        before, begun = loopback(), time.perf_counter()
        run = getattr(self, f"_{arm}")()
        megabytes = (loopback() - before) / 1e6
        return Measured(self.held_out(run), megabytes, time.perf_counter() - begun)

    def held_out(self, run: Path) -> float:
        """The loss of the trained method in evaluation mode, a mean over DRAWS of views."""
        settings, method, step = restore(run)
        if step != settings.training.steps:
            raise RuntimeError(f"{run}: is at step {step}, takes a finished run")
        total = 0.0
        with torch.no_grad():
            for draw in range(DRAWS):
                views = method.views(self.test.images, torch.Generator().manual_seed(draw))
                total += float(method.loss(*map(method, views), process_group=None))
        return total / DRAWS

    # ------------------------------------------------------------------------------- the five ways

    def _synchronous(self) -> Path:
        port, folder = free_port(), self.folder / "synchronous"
        ranks = [self._start(self._rank, rank, port, folder) for rank in range(PLACES)]
        _finish(ranks)
        return folder

    def _rank(self, rank: int, port: int, folder: Path) -> None:
        dist.init_process_group(
            "gloo", init_method=f"tcp://localhost:{port}", rank=rank, world_size=PLACES
        )
        settings = config.load(RECIPE, [*self.words, f"seed={self.seed}"])
        _fit(settings, self.train, folder, Ranks(rank, PLACES))
        dist.destroy_process_group()

    def _alone(self) -> Path:
        _finish([self._start(self._place, "alone", 0, [])])
        return self.folder / "alone_0"

    def _places(self) -> Path:
        return self._together("places", [f"places.every={self.every}"])

    def _once(self) -> Path:
        words = [f"places.every={self.steps}", "places.rate=1", "places.momentum=0"]
        return self._together("once", words)

    def _killed(self) -> Path:
        rounds = -(-self.steps // self.every)

        def kill(runs: list[Process], words: list[str]) -> None:
            self._wait_for_round(rounds // 3, runs)
            runs[-1].kill()
            runs[-1].join()
            self._wait_for_round(2 * rounds // 3, runs[:-1])
            runs[-1] = self._start(self._place, "killed", PLACES - 1, words)

        return self._together("killed", [f"places.every={self.every}"], kill)

    def _together(self, arm: str, words: list[str], meanwhile: Callable | None = None) -> Path:
        port = free_port()
        lighthouse = self._start(_lighthouse, port)
        _wait_for(port)
        meeting = [f"places.meeting=localhost:{port}", "places.host=localhost"]
        words = [*meeting, f"places.start={PLACES}", *words]
        runs = [self._start(self._place, arm, place, words) for place in range(PLACES)]
        if meanwhile is not None:
            meanwhile(runs, words)
        _finish(runs)
        lighthouse.kill()
        lighthouse.join()
        return self.folder / f"{arm}_0"

    def _place(self, arm: str, place: int, words: list[str]) -> None:
        batch = config.load(RECIPE, self.words).training.batch // PLACES
        seed = PLACES * self.seed + place
        mine = [f"training.batch={batch}", f"seed={seed}", *words]
        settings = config.load(RECIPE, config.layered(self.words, mine))
        quarter = self.train.subset(self.order[place::PLACES])
        _fit(settings, quarter, self.folder / f"{arm}_{place}", Ranks())

    def _wait_for_round(self, round: int, runs: list[Process]) -> None:
        path = self.folder / "killed_0" / NAME
        while f'{{"round": {round},' not in (path.read_text() if path.exists() else ""):
            if any(run.exitcode is not None for run in runs):
                raise RuntimeError(f"a place has ended before round {round}: see {self.folder}")
            time.sleep(0.05)

    def _start(self, target: Callable[..., None], *arguments: Any) -> Process:
        process = FORK.Process(target=self._logged, args=(target, arguments), daemon=True)
        process.start()
        return process

    def _logged(self, target: Callable[..., None], arguments: tuple) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        log = os.open(self.folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        target(*arguments)


def _fit(settings: Config, images: image_sets.Images, folder: Path, ranks: Ranks) -> None:
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    method = build.method(settings, images.channels).train()
    place = Place(settings, method, folder) if settings.places.meeting else None
    trainer = Trainer(settings, method, ranks, folder, place)
    trainer.resume()
    source = ImageSource(images, settings.training.batch, settings.seed)
    trainer.fit(source, lambda *_: None)


def _import_all() -> None:
    """Import once, before the processes are forked, what a place imports in its first step: for one
    that comes back this would take longer than the others' remaining rounds.
    """
    for name in ("torchft.coordination", "torchft.process_group", "safetensors.torch"):
        importlib.import_module(name)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()


def _lighthouse(port: int) -> None:
    """What the command torchft_lighthouse runs."""
    from torchft.coordination import LighthouseServer

    server = LighthouseServer(
        bind=f"[::]:{port}", min_replicas=1, join_timeout_ms=3600000, heartbeat_timeout_ms=HEARTBEAT
    )
    print(f"a lighthouse at {server.address()}", flush=True)
    time.sleep(86400)


def loopback() -> int:
    """The bytes that the loopback device has carried."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    raise OSError("/proc/net/dev: names no loopback device")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def _wait_for(port: int) -> None:
    until = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("localhost", port), 1).close()
            return
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.1)


def _finish(runs: list[Process]) -> None:
    for run in runs:
        run.join()
        if run.exitcode != 0:
            raise RuntimeError(f"a process ended with {run.exitcode}: see log.txt of its seed")


ARMS = ("synchronous", "places", "killed", "once", "alone")


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m vicreg_jepa.demo.places",
        description="several places beside synchronous training",
    )
    options.add_argument("words", nargs="*", metavar="key=value", help=f"settings of {RECIPE}")
    options.add_argument("--output", type=Path, required=True, help="a new folder")
    options.add_argument("--steps", type=integer(6), default=600)
    options.add_argument("--every", type=integer(1), default=25, help="local steps of a round")
    options.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2])
    options.add_argument("--ways", choices=ARMS, nargs="+", default=list(ARMS))
    chosen = options.parse_args(arguments)
    torch.set_num_threads(1)
    _import_all()
    rows = {}
    for seed in chosen.seeds:
        folder = chosen.output / f"seed_{seed}"
        experiment = Experiment(folder, seed, chosen.steps, chosen.every, chosen.words)
        for arm in chosen.ways:
            measured = experiment.run(arm)
            rows[f"{arm} {seed}"] = measured._asdict()
            print(
                f"seed {seed}  {arm:12} loss {measured.loss:8.4f}  {measured.megabytes:8.2f} MB  "
                f"{measured.seconds:5.0f} s",
                flush=True,
            )
    output.replace(chosen.output / "places.json", json.dumps(rows, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(reported("python -m vicreg_jepa.demo.places", main))
