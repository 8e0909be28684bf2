"""python -m vicreg_jepa.places --output FOLDER: several places against synchronous training.

Four processes on this machine, one thread each, train `ijepa_digits` in five ways: synchronously,
as four places with a quarter of the images each, the same while one place is killed and comes back,
as one place alone with its quarter, and with one mean of the weights at the end. The table has the
loss on images that none of them sees and the bytes that went over the loopback device, by the
kernel's count; `unshare -rn` gives a loopback device that nothing else uses.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vicreg_jepa import config
from vicreg_jepa.cli_options import integer, reported
from vicreg_jepa.data import image_sets
from vicreg_jepa.files import output
from vicreg_jepa.places.place import NAME
from vicreg_jepa.training.run import restore

RECIPE = "ijepa_digits"
PLACES = 4
ARMS = ("synchronous", "places", "killed", "alone", "once")
DRAWS = 20  # of masks, for the loss on held-out images
HEARTBEAT = 3000  # milliseconds until the lighthouse misses a killed place


def write_images(folder: Path) -> None:
    """Write scikit-learn's digits: folder/test (a fifth), folder/all, folder/0 to folder/3."""
    train, test = image_sets.split(image_sets.digits(), 0)
    _write(train, folder / "all", range(len(train)))
    _write(test, folder / "test", range(len(test)))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    for place in range(PLACES):
        _write(train, folder / str(place), order[place::PLACES])


def _write(images: image_sets.Labelled, folder: Path, rows: object) -> None:
    for row in rows:  # type: ignore[attr-defined]
        pixels = (images[[row]][0, 0] * 255).round().to(torch.uint8).numpy()
        to = folder / str(int(images.labels[row])) / f"{row:04d}.png"
        to.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(pixels)).save(to)


@dataclass(frozen=True)
class Measured:
    loss: float
    megabytes: float
    seconds: float


def loopback() -> int:
    """Bytes that the loopback device has carried since it exists."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    raise OSError("/proc/net/dev: has no loopback device")


class Experiment:
    """The runs of one seed, in `folder`; images: what write_images wrote."""

    def __init__(
        self, folder: Path, images: Path, seed: int, steps: int, every: int, words: list[str]
    ) -> None:
        self.folder, self.images, self.seed, self.steps = folder, images, seed, steps
        self.every, self.words = every, words
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def _train(self, arm: str, place: int | None, *words: str) -> list[str]:
        """place: which quarter of the images; None: all of them, by four ranks."""
        batch = config.load(RECIPE, self.words).training.batch
        data = "all" if place is None else str(place)
        name = arm if place is None else f"{arm}_{place}"
        seed = self.seed if place is None else PLACES * self.seed + place
        return [
            *("-m", "vicreg_jepa", "train", RECIPE, "data.kind=images", "data.size=8"),
            *(f"data.path={self.images / data}", f"data.test={self.images / 'test'}"),
            *(f"training.batch={batch if place is None else batch // PLACES}", f"seed={seed}"),
            *(f"training.steps={self.steps}", f"training.save_every={self.steps}"),
            *("training.log_every=1000000000", *self.words, *words),
            *("--output", str(self.folder / name)),
        ]

    def _start(self, words: list[str], log: str) -> subprocess.Popen:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{log}.log").open("a") as file:
            return subprocess.Popen(
                [sys.executable, *words], env=self.environment, stdout=file, stderr=file
            )

    def run(self, arm: str) -> Measured:
        begun, before = time.perf_counter(), loopback()
        last = {
            "synchronous": self._synchronous, "alone": self._alone, "killed": self._killed,
            "places": self._places, "once": self._once,
        }[arm]()  # fmt: skip
        sent, seconds = loopback() - before, time.perf_counter() - begun
        return Measured(held_out(last), sent / 1e6, seconds)

    def _synchronous(self) -> Path:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PLACES)]
        _finish(self._start([*launch, *self._train("synchronous", None)], "synchronous"))
        return self.folder / "synchronous"

    def _alone(self) -> Path:
        _finish(self._start(self._train("alone", 0), "alone"))
        return self.folder / "alone_0"

    def _meeting(self, arm: str, *words: str) -> tuple[subprocess.Popen, list[list[str]]]:
        port = _free_port()
        lighthouse = self._start(
            ["-c", LIGHTHOUSE, f"[::]:{port}", str(HEARTBEAT)], f"{arm}_lighthouse"
        )
        _wait_for(port)
        words = (f"places.meeting=localhost:{port}", "places.host=localhost", *words)
        return lighthouse, [self._train(arm, k, *words) for k in range(PLACES)]

    def _places(self) -> Path:
        return self._together("places", f"places.every={self.every}")

    def _once(self) -> Path:
        return self._together(
            "once", f"places.every={self.steps}", "places.rate=1", "places.momentum=0"
        )

    def _together(self, arm: str, *words: str) -> Path:
        lighthouse, commands = self._meeting(arm, f"places.start={PLACES}", *words)
        runs = [self._start(words, f"{arm}_{k}") for k, words in enumerate(commands)]
        for run in runs:
            _finish(run)
        _end(lighthouse)
        return self.folder / f"{arm}_0"

    def _killed(self) -> Path:
        """Place 3 is killed after a third of the rounds and comes back after two thirds."""
        lighthouse, commands = self._meeting(
            "killed", f"places.every={self.every}", f"places.start={PLACES}"
        )
        runs = [self._start(words, f"killed_{k}") for k, words in enumerate(commands)]
        rounds = -(-self.steps // self.every)
        self._until(rounds // 3, runs)
        time.sleep(0.3)  # into its local steps
        runs[-1].send_signal(signal.SIGKILL)
        runs[-1].wait()
        self._until(2 * rounds // 3, runs[:-1])
        runs[-1] = self._start(commands[-1], "killed_3")
        for run in runs:
            _finish(run)
        _end(lighthouse)
        return self.folder / "killed_0"

    def _until(self, round: int, runs: list[subprocess.Popen]) -> None:
        while all(row["round"] < round for row in meetings(self.folder / "killed_0")):
            if any(run.poll() is not None for run in runs):
                raise RuntimeError(f"a place has ended before round {round}: see {self.folder}")
            time.sleep(0.05)


# What the command torchft_lighthouse does, without a search for it.
LIGHTHOUSE = """
import sys, time
from torchft.coordination import LighthouseServer
server = LighthouseServer(
    bind=sys.argv[1], min_replicas=1, join_timeout_ms=3600000, heartbeat_timeout_ms=int(sys.argv[2])
)
time.sleep(86400)
"""


def meetings(run: Path) -> list[dict]:
    """The rows of a run's places.jsonl."""
    path = run / NAME
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def held_out(run: Path) -> float:
    """The loss of the trained method on the held-out images, a mean over DRAWS of masks."""
    settings, method, step = restore(run)
    if step != settings.training.steps:
        raise ValueError(f"{run}: is at step {step}, takes a finished run")
    from vicreg_jepa.data import sources

    images = sources.images(settings)[1]
    x = images[list(range(len(images)))]
    total = 0.0
    with torch.no_grad():
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            masks = method.draw(x, 0, len(x), generator)
            total += float(method(x, masks, 1.0, None))
    return total / DRAWS


def _free_port() -> int:
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


def _finish(run: subprocess.Popen) -> None:
    if run.wait() != 0:
        raise RuntimeError(f"{' '.join(map(str, run.args))} ended with {run.returncode}")


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    process.wait()


def main(arguments: list[str] | None = None) -> int:
    options = argparse.ArgumentParser(
        prog="python -m vicreg_jepa.places", description=(__doc__ or "").partition("\n")[0]
    )
    options.add_argument("words", nargs="*", metavar="key=value", help="settings of the recipe")
    options.add_argument("--output", type=Path, required=True, help="a folder")
    options.add_argument("--steps", type=integer(1), default=2000)
    options.add_argument("--every", type=integer(1), default=100)
    options.add_argument("--seeds", type=integer(0), nargs="+", default=[0, 1, 2])
    options.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    chosen = options.parse_args(arguments)
    images = chosen.output / "images"
    with output.writing(images):
        if not (images / "test").exists():
            write_images(images)
    rows = {}
    for seed in chosen.seeds:
        one = Experiment(
            chosen.output / f"seed_{seed}", images, seed, chosen.steps, chosen.every, chosen.words
        )
        for arm in chosen.arms:
            measured = one.run(arm)
            rows[f"{arm}, seed {seed}"] = vars(measured)
            print(
                f"{arm:12} seed {seed}  held-out loss {measured.loss:.5f}  "
                f"{measured.megabytes:10.2f} MB  {measured.seconds:5.0f} s",
                flush=True,
            )
    output.replace(chosen.output / "places.json", json.dumps(rows, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(reported("python -m vicreg_jepa.places", lambda: main()))
