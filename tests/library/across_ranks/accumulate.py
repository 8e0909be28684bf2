"""Cases of test_across_ranks.py: gradient caching on ranks with different micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from tests.library.test_across_ranks import Case, encoder, views
from vicreg_kernels import accumulate, barlow_twins_loss, sigreg_loss, vicreg_loss


def in_pieces(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Micro-batches of at most two rows, as many as a rank's rows need; one process has six."""

    def run(model: nn.Module, batch: tuple[Tensor, ...], process_group: Any) -> Tensor:
        micro_batches = list(zip(*(view.split(2) for view in batch), strict=True))
        return accumulate(partial(loss, process_group=process_group), model, micro_batches)

    return run


def sigreg_of_views(x: Tensor, y: Tensor, *, process_group: Any) -> Tensor:
    return sigreg_loss(x, slices=32, process_group=process_group) + sigreg_loss(
        y, slices=32, process_group=process_group
    )


# Of Barlow Twins one process's own float32 gradient is 0.7e-6 to 1.2e-6 from the float64 one.
CASES = {
    name: Case(
        in_pieces(loss),
        views(),
        encoder(dim),
        relative=2e-6 if name == "barlow" else 1e-6,
        differentiated=True,
    )
    for name, loss, dim in (
        ("vicreg, N < D", vicreg_loss, 24),
        ("vicreg, N > D", vicreg_loss, 5),
        ("barlow", barlow_twins_loss, 24),
        ("sigreg", sigreg_of_views, 6),
    )
}
