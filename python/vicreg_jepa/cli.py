"""The commands of `vicreg-jepa`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from vicreg_jepa.cli_options import reported
from vicreg_jepa.cli_parser import parser


def main(argv: list[str] | None = None) -> int:
    return reported("vicreg-jepa", lambda: _run(argv))


def _run(argv: list[str] | None) -> int:
    options = parser().parse_args(argv)
    return COMMANDS[options.command](options)


# The functions import their packages, so that without the extra `trainer` there is an error that
# says what to install.
def _train(options: argparse.Namespace) -> int:
    from vicreg_jepa import config
    from vicreg_jepa.training.run import train

    settings = config.load(options.config, options.overrides)
    steps = train(settings, options.output)
    if os.environ.get("RANK", "0") == "0":
        print(f"{steps} steps; the run is in {options.output}")
    return 0


def _probe(options: argparse.Namespace) -> int:
    import torch

    from vicreg_jepa import config
    from vicreg_jepa.data import batches, sources
    from vicreg_jepa.evaluation import collapse, probe
    from vicreg_jepa.evaluation.features import features
    from vicreg_jepa.training.run import restore

    settings, method, step = restore(options.run)
    if settings.is_video:
        from vicreg_jepa.evaluation import video_report

        print(video_report.probed(settings, method, step, options.label, options.videos))
        return 0
    if options.label is not None:
        raise config.ConfigError(
            f"--label: got {options.label!r}, but {settings.method} is no method on videos"
        )
    if settings.is_of_trajectories:
        from vicreg_jepa.evaluation import world_report

        print(world_report.probed(settings, method, step))
        return 0
    workers = settings.data.workers
    train, test = sources.images(settings)
    seen, held_out = (
        torch.cat([features(method, batch) for batch in batches.in_order(part, 256, workers)])
        for part in (train, test)
    )
    score = probe.probe(seen, held_out, train, test, seed=settings.seed)
    spread = collapse.spread(seen)
    print(
        f"{settings.method}, step {step}: linear probe {100 * score.all_labels:.2f} %, all labels"
    )
    print(f"{100 * score.few_labels:.2f} % with ten labels per class (mean of ten draws)")
    print(f"effective rank {spread.effective_rank:.1f} of {spread.dim}, std {spread.std:.3f}")
    for warning in spread.warnings():
        print(f"warning: {warning}")
    return 0


def _surprise(options: argparse.Namespace) -> int:
    from vicreg_jepa.config import ConfigError
    from vicreg_jepa.methods import build
    from vicreg_jepa.physics import PROPERTIES
    from vicreg_jepa.surprise import calibration, controls, physics_test, reach, report

    if options.video is not None and (options.beside or options.quadruplets is not None):
        raise ConfigError("--video: takes no --beside and no --quadruplets, which are of the test")
    if options.video is None and options.false_alarms is not None:
        raise ConfigError("--false-alarms: takes --video, whose verdict it is of")
    false_alarms = options.false_alarms or 0.05
    calibration.check(false_alarms, calibration.COUNT)
    (run,) = _runs("surprise", [options.run] if options.run else [], options.pretrained)
    name, settings, method = _video_run(run)
    stride = settings.data.stride
    output = options.output or _beside(run, "surprise")
    _make(output)
    kept = calibration.beside(run) if run.is_file() else output / "calibration.safetensors"
    if options.video is not None:
        video = report.read_video(method, options.video, settings.data.size, stride)
        calibrated = calibration.calibrated(method, settings, kept)
        report.draw_video(
            method,
            video,
            options.video,
            output,
            stride=stride,
            calibrated=calibrated,
            false_alarms=false_alarms,
        )
        return 0
    untrained = build.method(settings, method.channels).eval()
    others = {"untrained": physics_test.of_method(untrained, stride)}
    for beside in options.beside:
        other, its, trained = _video_run(beside)
        if other in (name, *others):
            raise ConfigError(f"--beside: {beside} has the name of another run, {other!r}")
        others[other] = physics_test.of_method(trained, its.data.stride)
    expected = calibration.calibrated(method, settings, kept).expected
    models = {name: physics_test.of_method(method, stride, expected), **others}
    count = options.quadruplets or 25
    scores = report.test(models, count, output, settings.data.noise)
    print(report.table(scores, count, ("untrained", *controls.CONTROLS)))
    print(reach.line(settings.data.frames, stride, count))
    for property in PROPERTIES:
        report.draw_quadruplet(method, property, output, stride=stride)
    print(f"pictures of every property: {output}")
    return 0


def _runs(command: str, given: list[Path], pretrained: bool) -> list[Path]:
    """The runs of a command: those given, or the model of the package."""
    from vicreg_jepa import pretrained as package
    from vicreg_jepa.config import ConfigError

    if pretrained == bool(given):
        got = "both" if pretrained else "neither"
        raise ConfigError(f"run: got {got}, takes a run or --pretrained")
    return [package.path(command)] if pretrained else given


def _beside(run: Path, name: str) -> Path:
    """The folder of a command's pictures: in a run, or, of a file, in the current folder."""
    return Path(name) if run.is_file() else run / name


def _video_run(run: Path) -> tuple[str, Any, Any]:
    """(its name in the table, its configuration, its method)."""
    from vicreg_jepa import config
    from vicreg_jepa.methods import METHODS
    from vicreg_jepa.training.run import restore

    settings, method, step = restore(run)
    if not settings.is_video:
        takes = " or ".join(name for name, kind in METHODS.items() if kind.data == "videos")
        raise config.ConfigError(f"run: {run} trained {settings.method}, surprise takes {takes}")
    return _row_name(run, step), settings, method


def _compare(options: argparse.Namespace) -> int:
    from vicreg_jepa import config
    from vicreg_jepa.compare import compare

    overrides = [word for word in options.configs if "=" in word]
    names = [word for word in options.configs if "=" not in word]
    comparisons = [compare.compare(config.load(name, overrides), options.rounds) for name in names]
    print(compare.table(comparisons))
    return 0


def _export(options: argparse.Namespace) -> int:
    from vicreg_jepa.training import export
    from vicreg_jepa.training.run import restore

    print(export.write(*restore(options.run), options.file, options.format))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from vicreg_jepa.planning import report
    from vicreg_jepa.planning.hierarchy import trained
    from vicreg_jepa.training.run import restore
    from vicreg_jepa.worlds.collect import parsed

    planner = report.planner(parsed(options.planner))
    runs = _runs("plan", options.runs, options.pretrained)
    restored = [(run, *restore(run)) for run in runs]
    output = options.output or _beside(runs[0], "plan")
    levels = any(trained.has_levels(method) for _, _, method, _ in restored)
    low = trained.low_planner(parsed(options.planner)) if levels else None
    simulated = restored[0][1].data.kind == "world"
    rows = (_plan_world if simulated else _plan_adapted)(options, restored, planner, low, output)
    report.write(rows, output)
    print(report.table(rows))
    print(f"pictures of episodes: {output}")
    return _verdict(report.verdict(rows))


def _verdict(failed: list[str]) -> int:
    """The exit code, after the words of what failed."""
    for words in failed:
        print(f"failed: {words}")
    return 1 if failed else 0


def _make(folder: Path) -> None:
    from vicreg_jepa.files.output import writing

    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _row_name(run: Path, step: int) -> str:
    """The name of a run in the tables of `surprise`, `plan` and `drift`."""
    return f"{run.stem if run.is_file() else run.resolve().name}, step {step}"


def _plan_world(
    options: argparse.Namespace, restored: Any, planner: Any, low: Any, output: Path
) -> Any:
    from vicreg_jepa import config
    from vicreg_jepa.data.trajectories import world_of
    from vicreg_jepa.files.output import writing
    from vicreg_jepa.planning import figure, report
    from vicreg_jepa.worlds.world import STEPS

    runs, worlds = [], []
    for run, settings, method, step in restored:
        worlds.append(world_of(settings))
        runs.append((_row_name(run, step), method))
        if worlds[-1] != worlds[0]:
            raise config.ConfigError(f"run: {run} has {worlds[-1]}, takes that of the first run")
    _make(output)
    rows, first = report.measured(
        runs, worlds[0], planner, options.episodes, options.full, options.steps or STEPS, low
    )
    seeds, interval = report.seeds_of(options.episodes), planner.interval
    method, longest = runs[0][1], figure.chosen(first)[-1]
    picture, film = output / "episodes.png", output / "episode.gif"
    with writing(picture):
        figure.draw(method, worlds[0], seeds, first, interval, picture)
    with writing(film):
        figure.animate(method, worlds[0], seeds, first, longest, interval, film)
    return rows


def _plan_adapted(
    options: argparse.Namespace, restored: Any, planner: Any, low: Any, output: Path
) -> Any:
    from vicreg_jepa import config
    from vicreg_jepa.data.trajectories import collected
    from vicreg_jepa.files.output import writing
    from vicreg_jepa.planning import adapted_report

    if options.full:
        raise config.ConfigError("--full: takes runs with data.kind 'world'")
    if options.steps is not None:
        raise config.ConfigError("--steps: takes runs with data.kind 'world'")
    runs, described = [], []
    for run, settings, method, step in restored:
        described.append(collected(settings))
        runs.append((_row_name(run, step), method))
        if described[-1] != described[0]:
            raise config.ConfigError(f"run: {run} has another environment than the first run")
    _make(output)
    make = adapted_report.maker(described[0])
    rows, first = adapted_report.measured(runs, make, planner, options.episodes, low)
    picture, film = output / "episodes.png", output / "episode.gif"
    with writing(picture):
        adapted_report.draw(first, described[0]["history"], picture)
    with writing(film):
        adapted_report.animate(first, described[0]["history"], film)
    return rows


def _drift(options: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vicreg_jepa import config
    from vicreg_jepa.data.trajectories import world_of
    from vicreg_jepa.evaluation import drift
    from vicreg_jepa.files import output
    from vicreg_jepa.training.run import restore

    folders = [options.run, *options.beside]
    runs = [restore(run) for run in folders]
    world = world_of(runs[0][0])
    for run, (settings, _, _) in zip(folders[1:], runs[1:], strict=True):
        if world_of(settings) != world:
            raise config.ConfigError(f"--beside: {run} has another world than {options.run}")
    folder = options.output or _beside(options.run, "drift")
    _make(folder)
    drifts = [
        drift.measured(_row_name(run, step), settings, method, world, options.walks)
        for run, (settings, method, step) in zip(folders, runs, strict=True)
    ]
    drifts.append(drift.still(world, options.walks))
    output.replace_json(folder / "drift.json", [asdict(one) for one in drifts])
    print(drift.table(drifts))
    with output.writing(folder / "drift.png"):
        drift.draw(drifts, folder / "drift.png")
    print(f"the picture: {folder / 'drift.png'}")
    return 0


def _collect(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    from vicreg_jepa.worlds.collect import collect, parsed

    with tqdm(total=options.episodes, desc="playing", unit="episode", ncols=100) as bar:
        shards = collect(
            options.world,
            options.output,
            options.episodes,
            options.length,
            options.seed,
            options.policy,
            parsed(options.settings),
            bar.update,
            options.history,
            options.repeat,
        )
    size = sum(path.stat().st_size for path in shards)
    print(
        f"{options.episodes} episodes in {len(shards)} shards of {options.output}, "
        f"{size / options.episodes / 1024:.1f} KiB each"
    )
    return 0


def _memory(options: argparse.Namespace) -> int:
    from vicreg_jepa.memory import report

    if options.migrate:
        before, after = report.migrated(options.store)
        print(f"{options.store}: from version {before} to {after}")
    found = report.problems(options.store)
    if not found:
        print(report.written(options.store))
        print("every page and every row is sound")
    for problem in found[: report.SHOWN]:
        print(f"damaged: {problem}")
    return 1 if found else 0


def _maze_window(command: str, options: argparse.Namespace) -> tuple[Path, Any, Any]:
    """A run, (its settings, its method, its step), and its MazeWindow."""
    from vicreg_jepa import config
    from vicreg_jepa.data.trajectories import world_of
    from vicreg_jepa.training.run import restore
    from vicreg_jepa.worlds.window import MazeWindow

    (run,) = _runs(command, [options.run] if options.run else [], options.pretrained)
    restored = restore(run)
    world = world_of(restored[0])
    if not isinstance(world, MazeWindow):
        raise config.ConfigError(f"run: {run} has {world}, takes a run on MazeWindow")
    return run, restored, world


def _recall(options: argparse.Namespace) -> int:
    from vicreg_jepa.files.output import writing
    from vicreg_jepa.recall import figure, report

    run, (settings, method, step), world = _maze_window("recall", options)
    folder = options.output or _beside(run, "recall")
    _make(folder)
    learned = report.learned(settings, method, world, _row_name(run, step), options.true)
    found = report.measured(learned, world, options.episodes, folder)
    report.write(found, folder)
    print(report.table(found))
    picture = folder / "episode.png"
    with writing(picture):
        back, alone = found.found[report.WITH], found.found[report.ALONE]
        figure.draw(world, found.starts, found.explored, back, alone, picture)
    print(f"the picture of an episode: {picture}")
    return _verdict(report.verdict(found))


def _act(options: argparse.Namespace) -> int:
    from vicreg_jepa.act import figure, report
    from vicreg_jepa.files.output import writing
    from vicreg_jepa.recall.report import learned

    run, (settings, method, step), world = _maze_window("act", options)
    folder = options.output or _beside(run, "act")
    _make(folder)
    models = learned(settings, method, world, _row_name(run, step), true=False)
    found = report.measured(models, world, options.episodes, folder)
    report.write(found, folder)
    print(report.table(found))
    film = folder / "episode.gif"
    with writing(film):
        figure.animate(world, found.scene, found.led, found.runs[report.WHOLE], film)
    print(f"the film of an episode: {film}")
    return _verdict(report.verdict(found))


COMMANDS = {
    "train": _train,
    "probe": _probe,
    "surprise": _surprise,
    "compare": _compare,
    "export": _export,
    "collect": _collect,
    "plan": _plan,
    "drift": _drift,
    "memory": _memory,
    "recall": _recall,
    "act": _act,
}
