"""What ranks exchange.

A loss with a `process_group` is the loss of the batch that all its ranks hold together, the same
number on every rank. Its gradient is that batch's gradient times the number of ranks, each rank
holding its own rows': DistributedDataParallel averages over ranks, and the mean is then exactly the
gradient of one process with the whole batch (docs/distributed.md).

Every such call begins with a small message from each rank to all: what it is about to compute, on
how many rows, or why it cannot. Where one differs or has failed, all of them raise.
"""

from vicreg_kernels.distributed.agreement import (
    MESSAGE_BYTES,
    agree,
    check_on_all_ranks,
    check_same,
    tell_other_ranks_of_errors,
)
from vicreg_kernels.distributed.collectives import (
    Pending,
    gather_differentiable,
    gather_rows,
    start_gather_rows,
    start_sum_ranks_,
    sum_ranks_,
)
from vicreg_kernels.distributed.groups import by_name, choose_backend, group_name, resolve
from vicreg_kernels.distributed.means import mean_over_ranks

__all__ = [
    "MESSAGE_BYTES",
    "Pending",
    "agree",
    "by_name",
    "check_on_all_ranks",
    "check_same",
    "choose_backend",
    "gather_differentiable",
    "gather_rows",
    "group_name",
    "mean_over_ranks",
    "resolve",
    "start_gather_rows",
    "start_sum_ranks_",
    "sum_ranks_",
    "tell_other_ranks_of_errors",
]
