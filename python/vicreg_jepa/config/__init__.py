"""What a run is made of: the settings, the recipes, and how both are read.

settings.py has the settings and their ranges, rules.py says which go together, load.py reads
recipes/*.yaml and the command line's key=value, yaml_text.py refuses what PyYAML lets pass.
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
    Config,
    Data,
    Loss,
    Model,
    Optimizer,
    Training,
)

__all__ = [
    "Config",
    "ConfigError",
    "Data",
    "Loss",
    "Model",
    "Optimizer",
    "Training",
    "describe",
    "layered",
    "load",
    "parse",
    "recipes",
]
