"""The settings of a run, the recipes, and the code that reads both.

settings.py has the settings and their ranges, rules.py checks their combinations, load.py reads
recipes/*.yaml and the command line's key=value, and yaml_text.py refuses text that PyYAML accepts
but that is probably a mistake.
"""

from vicreg_jepa.config.load import (
    ConfigError,
    describe,
    layered,
    load,
    parse,
    recipes,
)
from vicreg_jepa.config.settings import (
    Augmentation,
    Config,
    Data,
    Loss,
    Model,
    Optimizer,
    Places,
    Training,
)

__all__ = [
    "Augmentation",
    "Config",
    "ConfigError",
    "Data",
    "Loss",
    "Model",
    "Optimizer",
    "Places",
    "Training",
    "describe",
    "layered",
    "load",
    "parse",
    "recipes",
]
