"""`patch` and `unpatch`: what is replaced, where, how often, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import sys
import textwrap
import types
from pathlib import Path

import pytest
import torch

import vicreg_kernels as vk
from bench import peers
from vicreg_kernels.compat import lightly as ours
from vicreg_kernels.compat import patching


@pytest.fixture
def lightly():
    """lightly's modules; nothing of it is patched before or after."""
    with peers.importable("lightly"):
        try:
            peers.theirs("lightly")
        except ImportError as error:
            pytest.skip(f"lightly cannot be imported: {error}")
        yield importlib.import_module("lightly")
        assert patching._active == {}


def test_every_module_of_the_library(lightly):
    """Where a name is defined, given out, and used by another loss; and back again."""
    from lightly import loss
    from lightly.loss import lejepa_loss, lewm_loss, vicreg_loss, vicregl_loss
    from lightly.models import utils

    theirs = loss.VICRegLoss, loss.SIGReg, utils.update_momentum
    before = vicreg_loss.VICRegLoss()
    report = vk.patch("lightly")
    for module in (loss, vicreg_loss, vicregl_loss):
        assert module.VICRegLoss is ours.VICRegLoss
    for module in (loss, lejepa_loss, lewm_loss):
        assert module.SIGReg is ours.SIGReg
    assert utils.update_momentum is ours.update_momentum
    assert isinstance(loss.LeWMLoss(sigreg_num_vectors=4).sigreg, ours.SIGReg)
    assert type(before) is theirs[0]
    with pytest.raises(pickle.PicklingError, match="not the same object"):
        pickle.dumps(before)
    after = loss.VICRegLoss()
    assert type(after) is ours.VICRegLoss

    assert set(report.places) == set(ours.__all__)
    assert report.places["SIGReg"] == (
        "lightly.loss",
        "lightly.loss.lejepa_loss",
        "lightly.loss.lewm_loss",
    )
    assert report.missing == ()
    text = str(report)
    assert text.startswith("lightly: 6 names are those of vicreg_kernels.compat\n")
    assert "\n  update_momentum: lightly.models.utils" in text

    vk.unpatch("lightly")
    assert (loss.VICRegLoss, loss.SIGReg, utils.update_momentum) == theirs
    assert vicregl_loss.VICRegLoss is theirs[0]
    x, y = torch.randn(2, 8, 5)
    torch.testing.assert_close(before(x, y), after(x, y))
    assert type(pickle.loads(pickle.dumps(after))) is ours.VICRegLoss
    assert type(pickle.loads(pickle.dumps(before))) is theirs[0]


def test_counted(lightly):
    from lightly import loss

    vicreg, barlow = loss.VICRegLoss, loss.BarlowTwinsLoss
    vk.patch("lightly", "VICRegLoss")
    assert loss.BarlowTwinsLoss is barlow
    vk.patch("lightly")
    with vk.patch("lightly", "VICRegLoss") as report:
        assert list(report.places) == ["VICRegLoss"]
    assert loss.VICRegLoss is ours.VICRegLoss
    vk.unpatch("lightly")
    assert loss.VICRegLoss is ours.VICRegLoss
    assert loss.BarlowTwinsLoss is barlow
    vk.unpatch("lightly")
    assert loss.VICRegLoss is vicreg
    with pytest.raises(ValueError, match="peer: got 'lightly', of which nothing is replaced"):
        vk.unpatch("lightly")


def test_context(lightly):
    """It ends with an error too; contexts nest, in any order."""
    from lightly import loss

    theirs = loss.SIGReg
    seen = []

    def fail():
        with vk.patch("lightly", "SIGReg"), vk.patch("lightly"):
            seen.append(loss.SIGReg)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert seen == [ours.SIGReg]
    assert loss.SIGReg is theirs
    one, two = vk.patch("lightly", "SIGReg"), vk.patch("lightly", "SIGReg", "VICRegLoss")
    one.__exit__(None, None, None)
    assert loss.SIGReg is ours.SIGReg
    two.__exit__(None, None, None)
    assert loss.SIGReg is theirs


def test_a_context_whose_names_are_restored_inside(lightly):
    """The rest is restored too; the body's own error is the one that is seen."""
    from lightly import loss

    theirs = loss.SIGReg, loss.VICRegLoss

    def restore_one(*error):
        with vk.patch("lightly"):
            vk.unpatch("lightly", "SIGReg")
            for each in error:
                raise each

    with pytest.raises(KeyError, match="of the body"):
        restore_one(KeyError("of the body"))
    assert (loss.SIGReg, loss.VICRegLoss) == theirs
    with pytest.raises(ValueError, match="names: got SIGReg of lightly, restored within"):
        restore_one()
    assert (loss.SIGReg, loss.VICRegLoss) == theirs


def test_the_page_has_every_library():
    """Its code is run with that of the other pages."""
    text = (Path(__file__).parents[2] / "docs" / "drop_in.md").read_text()
    for peer in patching.PACKAGES:
        assert f"\nfrom vicreg_kernels.compat.{peer} import" in text, peer
        assert f'vk.unpatch("{peer}")' in text, peer


def test_metric_learning():
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    with vk.patch("pytorch_metric_learning") as report:
        assert losses.VICRegLoss.__module__ == "vicreg_kernels.compat.pytorch_metric_learning"
        assert report.places["VICRegLoss"][0] == "pytorch_metric_learning.losses"
    assert losses.VICRegLoss.__module__.startswith("pytorch_metric_learning")


SOURCE = {
    "__init__": "from . import sigreg\n\nRegularizer = sigreg.SIGReg\n",
    "sigreg": "class SIGReg:\n    pass\n",
    "late": "from . import Regularizer, sigreg\n\nSIGReg = sigreg.SIGReg\n",
}


@pytest.fixture
def older(tmp_path, monkeypatch):
    """A jepa_science without its function, and with a module that is imported late."""
    saved = {name: sys.modules.pop(name) for name in [*sys.modules] if name[:12] == "jepa_science"}
    folder = tmp_path / "jepa_science"
    folder.mkdir()
    for name, text in SOURCE.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [*sys.modules]:
        if name[:12] == "jepa_science":
            del sys.modules[name]
    sys.modules.update(saved)


def test_a_version_without_a_name(older):
    report = vk.patch("jepa_science")
    assert report.missing == ("sigreg_loss",)
    assert str(report).endswith("\n  not in this version: sigreg_loss")
    with pytest.raises(ValueError, match="names: got 'sigreg_loss', which this version"):
        vk.patch("jepa_science", "sigreg_loss")
    vk.unpatch("jepa_science")
    assert patching._active == {}


def test_other_names_and_modules_imported_later(older):
    import jepa_science

    theirs = jepa_science.Regularizer
    report = vk.patch("jepa_science")
    assert report.places["SIGReg"] == ("jepa_science", "jepa_science.sigreg")
    late = importlib.import_module("jepa_science.late")
    assert late.SIGReg is late.Regularizer is vk.compat.jepa_science.SIGReg
    vk.unpatch("jepa_science", "SIGReg")
    assert late.SIGReg is late.Regularizer is jepa_science.Regularizer is theirs


def test_a_module_that_is_not_there(older):
    """The library is there, its file is not."""
    (older / "sigreg.py").rename(older / "moved.py")
    (older / "__init__.py").write_text("")
    with pytest.raises(ValueError, match="peer: got 'jepa_science', whose version here has none"):
        vk.patch("jepa_science")


@pytest.mark.parametrize("text", ["import no_such_module", "1 / 0", "from . import nowhere"])
def test_a_library_that_cannot_be_imported(older, text):
    (older / "sigreg.py").write_text(textwrap.dedent(text))
    (older / "__init__.py").write_text("")
    with pytest.raises(ImportError, match="peer: got 'jepa_science', which cannot be imported"):
        vk.patch("jepa_science")
    assert patching._active == {}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vk.patch("lightning"), r"peer: got 'lightning', takes one of \('eb_jepa', "),
        (lambda: vk.patch(["lightly"]), r"peer: got \['lightly'\], takes one of"),
        (lambda: vk.unpatch("lightning"), "peer: got 'lightning', takes one of"),
        (lambda: vk.patch("lightly", "VICReg"), "names: got 'VICReg' of lightly, takes some of"),
        (lambda: vk.patch("lightly", "SIGReg", "SIGReg"), "takes each once"),
        (lambda: vk.unpatch("lightly", "VICReg"), "names: got 'VICReg' of lightly, takes some"),
        (lambda: vk.unpatch("lightly", "SIGReg"), "peer: got 'lightly', of which nothing is"),
    ],
)
def test_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_name_that_is_not_replaced(older):
    with (
        vk.patch("jepa_science"),
        pytest.raises(ValueError, match="names: got 'sigreg_loss' of jepa_science, which is not"),
    ):
        vk.unpatch("jepa_science", "sigreg_loss")


def test_a_library_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(patching.PACKAGES, "eb_jepa", "no_such_module")
    with pytest.raises(ImportError, match="peer: got 'eb_jepa', which cannot be imported here"):
        vk.patch("eb_jepa")


@pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed"
)
def test_the_stand_in_is_gone_afterwards(tmp_path, monkeypatch):
    """With the modules that were imported beside it, and no others; nested too."""
    (tmp_path / "lightly").mkdir()
    text = "import torchvision.ops as ops\nfrom torchvision.transforms import Mode\n"
    text += "class Layer(ops.Conv2dNormActivation):\n    pass\nnames = {Mode.NEAREST: 1}\n"
    (tmp_path / "lightly" / "__init__.py").write_text(text)
    for name in [n for n in sys.modules if n.split(".")[0] in ("lightly", "timm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(tmp_path)
    before, finders = dict(sys.modules), list(sys.meta_path)
    with peers.importable("lightly"):
        lightly = importlib.import_module("lightly")
        assert issubclass(lightly.Layer, torch.nn.Module)
        with pytest.raises(ModuleNotFoundError, match="timm is hidden"):
            importlib.import_module("timm")
        with pytest.raises(ImportError):
            importlib.import_module("torchvision.models.vision_transformer")
        with peers.without_torchvision("timm"):
            pass
        assert sys.modules["lightly"] is lightly
    assert sys.modules == before
    assert sys.meta_path == finders
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("torchvision")

    def fail():
        with peers.importable("lightly"):
            importlib.import_module("lightly")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert sys.modules == before


def test_a_stand_in_finds_what_is_left_of_another(monkeypatch):
    """Of torchvision some parts may be in sys.modules, and their parent not."""
    left = types.ModuleType("torchvision.left")
    monkeypatch.setitem(sys.modules, left.__name__, left)
    assert peers._Empty("torchvision").left is left
    assert issubclass(peers._Empty("torchvision").other, torch.nn.Module)
