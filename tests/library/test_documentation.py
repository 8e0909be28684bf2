"""What the pages show holds: their Python runs, their commands parse, the reference has every name,
the results are those of the records, and the site builds without a warning.

`tests/helpers/documentation.py` says how a page marks a block that cannot run here. `pytest -rs`
on this file lists those blocks with their reasons.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import vicreg_kernels as vk
from bench import page
from tests.helpers import documentation
from tests.helpers.documentation import PAGES, ROOT, Block

BLOCKS = [block for name in PAGES for block in documentation.of(name)]
MARKED = [block for block in BLOCKS if block.mark]


def has_code(name: str, mark: str) -> bool:
    shown = (block for block in BLOCKS if block.page == name and not block.hidden)
    return any(block.kind == "python" and block.mark == mark for block in shown)


def missing(block: Block) -> list[str]:
    """The modules that a block needs and that are not installed."""
    names = block.reason.split(", ") if block.mark == "needs" else []
    return [name for name in names if importlib.util.find_spec(name) is None]


@pytest.fixture
def apart(tmp_path, monkeypatch):
    """A folder of its own, and what a page may change put back."""
    monkeypatch.chdir(tmp_path)
    level = logging.getLogger("vicreg_kernels").level
    torch.manual_seed(0)
    yield
    logging.getLogger("vicreg_kernels").setLevel(level)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run(name: str, thorough: bool) -> None:
    """The Python of a page, in order, in one namespace."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in documentation.of(name):
        if block.kind != "python" or block.mark == "not run" or missing(block):
            continue
        if block.mark == "thorough" and not thorough:
            continue
        # Lines are those of the page, in a traceback too.
        code = compile("\n" * (block.line - 1) + block.text, str(ROOT / name), "exec")
        exec(code, namespace)


@pytest.mark.parametrize("name", [name for name in PAGES if has_code(name, "")])
def test_the_code_of_a_page_runs(name, apart):
    run(name, thorough=False)


@pytest.mark.thorough
@pytest.mark.parametrize("name", [n for n in PAGES if has_code(n, "thorough")])
def test_all_code_of_a_page_runs(name, apart):
    run(name, thorough=True)


@pytest.mark.parametrize("block", MARKED, ids=lambda block: block.name)
def test_what_does_not_run_here(block):
    """Lists the blocks that the tests above leave out, with the reason."""
    if block.mark == "needs":
        if missing(block):
            pytest.skip(f"needs {', '.join(missing(block))}")
    elif block.mark == "thorough":
        pytest.skip(f"`make audit` runs it: {block.reason}")
    else:
        pytest.skip(block.reason)


def test_blocks_say_what_they_are():
    """A fence without a language, or an indented block, that looks like code and is taken for text
    is not tested.
    """
    looks = re.compile(
        r"^(import |from \w[\w.]* import |\w+ = vk\.|vicreg-(jepa|kernels) [a-z])", re.M
    )
    assert [b.name for b in BLOCKS if b.kind == "text" and looks.search(b.text)] == []


class Parsed(Exception):
    """A parser took its arguments."""


class Refused(Exception):
    """It did not."""


@pytest.fixture
def parsers(monkeypatch):
    """Parsers that parse and then stop, in place of what the command would do."""
    parse = argparse.ArgumentParser.parse_args
    intermixed = argparse.ArgumentParser.parse_intermixed_args

    def parse_args(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
        raise Parsed(parse(self, *args))

    def error(self: argparse.ArgumentParser, message: str) -> NoReturn:
        raise Refused(message)

    def in_checkout(needs: str, command: list[str], folder: Path | None = None) -> int:
        call_module(command[1], command[2:])
        return 0

    def parse_intermixed_args(self: argparse.ArgumentParser, *args: Any) -> NoReturn:
        raise Parsed(intermixed(self, *args))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_intermixed_args", parse_intermixed_args)
    monkeypatch.setattr(argparse.ArgumentParser, "error", error)
    monkeypatch.setattr("vicreg_kernels.cli._in_checkout", in_checkout)
    argv = sys.argv
    yield
    sys.argv = argv


def call_module(name: str, arguments: list[str]) -> None:
    """`python -m name arguments`, up to the parser's end."""
    if name == "pytest":
        check_paths([word for word in arguments if word.startswith("tests/")])
        return
    if name == "vicreg_jepa":
        name = "vicreg_jepa.cli"
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"no module {name}"
    module = importlib.import_module(
        f"{name}.__main__" if spec.submodule_search_locations else name
    )
    if not hasattr(module, "main"):
        return
    sys.argv = [name, *arguments]
    try:
        module.main()
    except Parsed as parsed:
        check_settings(name, parsed.args[0])


def check_settings(name: str, options: argparse.Namespace) -> None:
    """The settings of a recipe, which are checked after the parser."""
    from vicreg_jepa import config

    command = getattr(options, "command", "")
    if name == "vicreg_jepa.cli" and command == "train":
        config.load(options.config, options.overrides)
    elif name == "vicreg_jepa.cli" and command == "compare":
        words = [word for word in options.configs if "=" in word]
        for recipe in set(options.configs) - set(words):
            config.load(recipe, words)
    elif name == "vicreg_jepa.demo" and options.only == "digits":
        config.load("vicreg_digits", options.overrides)


def check_paths(words: list[str]) -> None:
    gone = [word for word in words if not (ROOT / word.split("::")[0]).exists()]
    assert gone == []


def check_command(line: str) -> None:
    """One command line: its program, and the program's own parser."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        del words[0]
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "vicreg-jepa":
        call_module("vicreg_jepa.cli", rest)
    elif program == "vicreg-kernels":
        call_module("vicreg_kernels.cli", rest)
    elif program in ("python", "python3", "torchrun"):
        if "-m" in rest:
            place = rest.index("-m")
            call_module(rest[place + 1], rest[place + 2 :])
        else:
            check_paths([word for word in rest if word.endswith(".py")])
    elif program == "pytest":
        call_module("pytest", rest)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert [word for word in rest if "=" not in word and word not in targets] == []
    elif program == "pip":
        text = (ROOT / "pyproject.toml").read_text()
        extras = [name for word in rest for name in re.findall(r"\[([\w,]+)\]", word)]
        for name in ",".join(extras).split(",") if extras else []:
            assert re.search(rf"^{name} = \[", text, re.M), f"no extra {name}"
    else:
        assert program in ("mkdir", "tar"), f"{program}: what is it?"


def commands_of(block: Block) -> list[str]:
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line.replace("<op>", "adaln") for line in lines if shlex.split(line, comments=True)]


@pytest.mark.parametrize(
    "block",
    [block for block in BLOCKS if block.kind == "shell" and block.mark != "not run"],
    ids=lambda block: block.name,
)
def test_commands_parse(block, parsers):
    for line in commands_of(block):
        try:
            check_command(line)
        except (Refused, AssertionError, ValueError) as error:
            pytest.fail(f"{line}: {error}")


@pytest.mark.parametrize("name", PAGES)
def test_commands_in_the_text_parse(name, parsers):
    """A command that is only named may leave out what it requires."""
    text = re.sub(
        r"^```.*?^```|^    .*?$|<!--.*?-->", "", (ROOT / name).read_text(), flags=re.M | re.S
    )
    for code in re.findall(r"`([^`\n]+)`", text):
        line = code.replace("RECIPE", "vicreg_digits").replace("<op>", "adaln")
        if not documentation.COMMANDS.match(line) or " " not in line:
            continue
        try:
            check_command(line)
        except Refused as refused:
            if "the following arguments are required" not in str(refused):
                pytest.fail(f"{line}: {refused}")


def test_a_wrong_command_is_found(parsers):
    for line in (
        "vicreg-jepa train vicreg_digits --no-such-option 1 --output runs/a",
        "vicreg-jepa train vicreg_digits training.no_such=1 --output runs/a",
        "vicreg-jepa nothing runs/a",
        "vicreg-kernels bench --tune --no-such-option",
        "python -m vicreg_jepa.demo --only nothing",
        "make nothing",
        "pip install '.[nothing]'",
        "python docs/nothing.py",
    ):
        with pytest.raises((Refused, AssertionError, ValueError)):
            check_command(line)


def test_blocks_are_told_apart():
    text = """\
<!-- python
x = 1
-->
```python
assert x == 1
```

    y = x + 1   # indented

    a ← Σ b

<!-- not run: needs two machines -->
    vicreg-jepa probe runs/a

- item

  ```bash
  make test
  ```
"""
    blocks = documentation.blocks("page.md", text)
    kinds = [(block.line, block.kind, block.mark) for block in blocks]
    assert kinds[:2] == [(2, "python", ""), (5, "python", "")]
    assert (blocks[-1].kind, blocks[-1].text) == ("shell", "make test")
    assert blocks[-2].reason == "needs two machines"
    assert documentation.kind_of("", "r = Σ_j d_j² / N") == "text"
    with pytest.raises(ValueError, match="without a reason"):
        documentation.blocks("page.md", "<!-- not run -->\n")
    with pytest.raises(ValueError, match="takes python or one of"):
        documentation.blocks("page.md", "<!-- skip: why -->\n")


def test_the_reference_has_every_public_name():
    text = (ROOT / "docs" / "reference.md").read_text()
    entries = re.findall(r"^\.\. auto(?:function|class):: vicreg_kernels\.(\w+)$", text, re.M)
    assert sorted(entries) == sorted(set(vk.__all__) - {"__version__"})
    assert "`vicreg_kernels.__version__`" in text


def test_docstrings_keep_their_structure():
    """What the site's extension makes of the parts of a docstring."""
    path = ROOT / "docs" / "extensions" / "docstrings.py"
    spec = importlib.util.spec_from_file_location("docstrings", path)
    assert spec is not None
    assert spec.loader is not None
    docstrings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(docstrings)
    text = """\
The loss `vicreg_loss` of x_i * y (docs/vicreg.md has the table),

    loss = |x - y|_1

Args:
    x, y: [N, D]; the
        views.
    eps: added.

Returns: x's shape. Raises: as `vicreg_terms`."""
    assert [line for line in docstrings.rendered(text.split("\n")) if line] == [
        r"The loss :py:obj:`vicreg_loss <vicreg_kernels.vicreg_loss>` of x\_i \* y "
        "(:doc:`/vicreg` has the table),",
        "::",
        "    loss = |x - y|_1",
        ":Arguments:",
        "    ``x``, ``y``",
        "        [N, D]; the views.",
        "    ``eps``",
        "        added.",
        ":Returns:",
        "    x's shape. Raises: as :py:obj:`vicreg_terms <vicreg_kernels.vicreg_terms>`.",
    ]
    head, terms, tail = docstrings.apart("The state. a, b: float32. c: places; d: one. It moves.")
    assert (head, tail) == ("The state.", "It moves.")
    assert terms == [("a, b", "float32."), ("c", "places"), ("d", "one.")]


def test_the_results_are_those_of_the_records():
    text = page.PAGE.read_text(encoding="utf-8")
    assert page.written(text) == text, "run `python3 -m bench.page`"
    shown = {name for _, name, _ in page.SHOWN.findall(text)}
    # Of accuracy and shares, which `vicreg-kernels report` shows; the page says what they hold.
    apart = "bench/results/cpu-amd-epyc-1-thread"
    assert f"`{apart}`" in text
    others = {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("bench/results/*/*.json")
        if str(path.parent.relative_to(ROOT)) != apart
    }
    assert others - shown <= {
        "bench/results/cpu-amd-epyc-2-cores/host.json"  # docs/backends.md and docs/ema.md have it
    }


LINKS = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(?:#[\w-]+)?\)")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_to_files(name):
    """Those of the README too, which the site does not hold."""
    links = LINKS.findall((ROOT / name).read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / name).parent.joinpath(link).exists()] == []


@pytest.mark.thorough
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "site")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    pages = {path.stem for path in Path(ROOT / "docs").glob("*.md")}
    assert pages <= {path.stem for path in (tmp_path / "site").glob("*.html")}
    outside = re.compile(r"<(?:script|link|img)[^>]+(?:src|href)=\"https?://")
    for path in (tmp_path / "site").glob("*.html"):
        assert not outside.search(path.read_text()), f"{path.name} loads something from elsewhere"
