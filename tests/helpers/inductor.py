"""torch's default compiler, as the tests of the ops use it."""

from __future__ import annotations

from typing import Any

import torch


def anew() -> Any:
    """A context in which inductor compiles anew, and on a CPU little beside the graph it is given.

    Its cache on disk knows a graph, not the shapes that this version's fake op gives. The C++ that
    it writes around an op is scalar, and no header is compiled for later runs: to probe this
    machine's vectors and to compile that header takes three times what the graph takes.
    """
    return torch._inductor.config.patch(
        {
            "force_disable_caches": True,
            "cpp.vec_isa_ok": False,
            "cpp_cache_precompile_headers": False,
        }
    )
