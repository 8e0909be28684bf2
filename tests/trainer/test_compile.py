"""training.compile trains as eager does and compiles once a kind of call, not once a batch; what a
CUDA graph cannot do is refused.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters
from vicreg_jepa import config
from vicreg_jepa.distributed.ranks import Ranks
from vicreg_jepa.methods import build
from vicreg_jepa.training import compilation
from vicreg_jepa.training.trainer import Trainer

from tests.trainer.test_trainer import samples, settings


def steps(made: config.Config, folder) -> tuple[list[float], list[int]]:
    """Each step's loss, and the graphs that were compiled by its end."""
    torch.manual_seed(7)
    source = samples(made)
    trainer = Trainer(made, build.method(made, source.channels).train(), Ranks(), folder)
    batches = source.batches(0, Ranks().share)
    losses, graphs = [], []
    for _ in range(made.training.steps):
        losses.append(float(trainer.take(next(batches))))
        graphs.append(counters["stats"]["unique_graphs"])
    return losses, graphs


@pytest.mark.parametrize("method", ["lejepa", "vjepa"])
def test_compiled_and_eager_train_alike(method, tmp_path, monkeypatch):
    """The graphs that inductor would be given, differentiated and run: it is torch's own."""
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    counters.clear()
    eager, none = steps(settings(method), tmp_path)
    assert none[-1] == 0
    whole, graphs = steps(settings(method, compile=True), tmp_path)
    torch.testing.assert_close(whole, eager, rtol=1e-5, atol=0)
    # lejepa's one graph; the teacher's, the encoder's and the predictor's blocks
    assert graphs == [1 if method == "lejepa" else 3] * len(graphs)
    assert not counters["graph_break"]


@pytest.mark.parametrize(
    ("method", "training", "message"),
    [
        ("vicreg", {}, "on 'cpu', takes a CUDA device"),
        ("ijepa", {"device": "cuda"}, "ijepa's batches change their shape: takes true"),
        ("vjepa", {"device": "cuda"}, "vjepa's batches change their shape"),
        ("lejepa", {"device": "cuda", "accumulate": 2}, "with accumulate 2, takes accumulate 1"),
    ],
)
def test_what_a_cuda_graph_cannot_do_is_refused(method, training, message):
    with pytest.raises(config.ConfigError, match=f"training.compile: got 'reduce-over.*{message}"):
        settings(method, compile="reduce-overhead", **training)


def test_a_cuda_graph_of_several_ranks_is_refused(tmp_path):
    made = settings("vicreg", compile="reduce-overhead", device="cuda")
    with pytest.raises(ValueError, match=r"training\.compile: .* takes one process, not 2 ranks"):
        Trainer(made, build.method(made, 1), Ranks(0, 2), tmp_path)


def test_other_words_are_refused():
    with pytest.raises(config.ConfigError, match=r"training\.compile"):
        settings("vicreg", compile="max-autotune")


def test_torch_knows_what_cuda_graphs_are_asked_for():
    """It refuses an option that it does not know; nothing is run here."""
    compilation.compile_method(build.method(settings("vicreg"), 1), whole=True, cuda_graphs=True)
