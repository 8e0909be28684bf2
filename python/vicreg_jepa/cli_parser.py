"""The options of the commands of `vicreg-jepa`."""

from __future__ import annotations

import argparse
from pathlib import Path

from vicreg_jepa.cli_options import integer, share


def parser() -> argparse.ArgumentParser:
    from vicreg_jepa import config

    parser = argparse.ArgumentParser(
        prog="vicreg-jepa",
        description="Train joint-embedding models and world models, test and plan.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("train", help="train a recipe, or resume a run")
    one.add_argument("config", help=f"a YAML file or a recipe: {', '.join(config.recipes())}")
    one.add_argument("overrides", nargs="*", metavar="key=value", help="training.steps=500 ...")
    one.add_argument("--output", type=Path, required=True, help="the run's folder")
    two = commands.add_parser("probe", help="probes of a run's frozen features")
    two.add_argument("run", type=Path)
    two.add_argument("--label", help="videos only: the key of their records that is the label")
    two.add_argument("--videos", type=integer(10), default=1000, help="most videos to use")
    three = commands.add_parser("surprise", help="test surprise at impossible physics")
    three.add_argument("run", type=Path, nargs="?", help="or a file of export --format whole")
    three.add_argument("--pretrained", action="store_true", help="the model of the package instead")
    three.add_argument(
        "--output", type=Path, help="folder of the pictures; default RUN/surprise, or surprise"
    )
    three.add_argument("--video", type=Path, help="draw the surprise at this video instead")
    three.add_argument(
        "--false-alarms",
        type=share,
        help="of --video: the share of possible videos that may be called impossible; default 0.05",
    )
    three.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="RUN", help="runs to compare with"
    )
    three.add_argument(
        "--quadruplets",
        type=integer(1),
        help="per property and place of the exchange, in view and behind a panel; default 25",
    )
    four = commands.add_parser(
        "compare", help="fused kernels against the reference: steps/s, memory"
    )
    four.add_argument("configs", nargs="+", help="recipes, YAML files, and key=value pairs")
    four.add_argument("--rounds", type=integer(1), default=9, help="timed steps of each")
    five = commands.add_parser("export", help="write a run's encoder or method as safetensors")
    five.add_argument("run", type=Path)
    five.add_argument("file", type=Path)
    five.add_argument(
        "--format",
        choices=("own", "timm", "whole"),
        default="own",
        help="own: the encoder for vicreg_jepa.load_encoder; timm: for its VisionTransformer, from "
        "a ViT; whole: the method in float16, for the commands that take a run",
    )
    seven = commands.add_parser("plan", help="plan with runs of a world model, beside controls")
    seven.add_argument(
        "runs",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="runs on the same world, or files of export --format whole",
    )
    seven.add_argument("--pretrained", action="store_true", help="the model of the package instead")
    seven.add_argument(
        "--output", type=Path, help="folder of the pictures; default RUN/plan, or plan"
    )
    seven.add_argument("--episodes", type=integer(4), default=50)
    seven.add_argument(
        "--steps", type=integer(1), help="of an episode, on a simulated world; default 200"
    )
    seven.add_argument("--full", action="store_true", help="also the first with its whole budget")
    seven.add_argument(
        "--planner", nargs="+", default=[], metavar="key=value", help="horizon=12 repeat=5 ..."
    )
    eight = commands.add_parser("drift", help="the error of a world model over its rollouts")
    eight.add_argument("run", type=Path)
    eight.add_argument("--output", type=Path, help="folder of the picture; default RUN/drift")
    eight.add_argument(
        "--beside", type=Path, nargs="+", default=[], metavar="RUN", help="runs to compare with"
    )
    eight.add_argument("--walks", type=integer(1), default=200)
    six = commands.add_parser("collect", help="play a world and write its trajectories")
    six.add_argument("world", help="TwoRooms, Maze, or the name of gymnasium's environment")
    six.add_argument("settings", nargs="*", metavar="key=value", help="wall=random noise=0.1 ...")
    six.add_argument("--output", type=Path, required=True, help="a new folder")
    six.add_argument("--episodes", type=integer(1), default=1000)
    six.add_argument("--length", type=integer(1), default=90, help="actions of an episode")
    six.add_argument("--seed", type=integer(0), default=0, help="decides every episode")
    six.add_argument("--policy", default="walk", help="walk, uniform, still, expert or straight")
    six.add_argument("--history", type=integer(1), default=1, help="frames that are stacked")
    six.add_argument("--repeat", type=integer(1), default=1, help="steps that hold an action")
    nine = commands.add_parser(
        "memory", help="what a memory's store holds, and whether it is sound"
    )
    nine.add_argument("store", type=Path, help="its file")
    nine.add_argument("--migrate", action="store_true", help="first bring it to this version")
    ten = commands.add_parser("recall", help="find remembered goals in mazes, beside controls")
    ten.add_argument("run", type=Path, nargs="?", help="a run of world_maze_window, or its file")
    ten.add_argument("--pretrained", action="store_true", help="the model of the package instead")
    ten.add_argument(
        "--output", type=Path, help="folder of the store and the picture; default RUN/recall, or "
        "recall",
    )  # fmt: skip
    ten.add_argument("--episodes", type=integer(2), default=50)
    ten.add_argument(
        "--true", action="store_true", help="the planner has the true dynamics, not the model's"
    )
    eleven = commands.add_parser(
        "act", help="act with all parts in mazes, and without each of them"
    )
    eleven.add_argument("run", type=Path, nargs="?", help="a run of world_maze_window, or its file")
    eleven.add_argument(
        "--pretrained", action="store_true", help="the model of the package instead"
    )
    eleven.add_argument(
        "--output", type=Path, help="folder of the store and the film; default RUN/act, or act"
    )
    eleven.add_argument("--episodes", type=integer(2), default=50)
    return parser
