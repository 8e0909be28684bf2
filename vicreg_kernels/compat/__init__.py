"""Other libraries' classes and functions, by their own names and arguments, on this library's ops.

    from vicreg_kernels.compat.lightly import VICRegLoss  # was: from lightly.loss import VICRegLoss

One module a library: `lightly`, `solo_learn`, `stable_pretraining`, `stable_worldmodel`,
`eb_jepa`, `pytorch_metric_learning`, `pyjepa`, `jepa_science`, `meta_jepa`. None of them needs the
library whose names it has. `vicreg_kernels.patch` puts them in place of that library's own
(docs/drop_in.md).
"""

from vicreg_kernels.compat import (
    eb_jepa,
    jepa_science,
    lightly,
    meta_jepa,
    pyjepa,
    pytorch_metric_learning,
    solo_learn,
    stable_pretraining,
    stable_worldmodel,
)

__all__ = [
    "eb_jepa",
    "jepa_science",
    "lightly",
    "meta_jepa",
    "pyjepa",
    "pytorch_metric_learning",
    "solo_learn",
    "stable_pretraining",
    "stable_worldmodel",
]
