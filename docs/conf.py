"""Sphinx's settings of this site; `make docs` builds it (CONTRIBUTING.md says why with Sphinx)."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "python"), str(HERE / "extensions")]

from vicreg_kernels.version import __version__  # noqa: E402

project = "vicreg-kernels"
copyright = "the authors of vicreg-kernels"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "docstrings",
    "lines",
    "tables",
]
exclude_patterns = ["figures", "extensions", "static"]

# `page.md#a-heading` as GitHub writes it; a link to no page, heading or file is a warning.
myst_heading_anchors = 4
# Quotes in the text are often those of an argument's value.
smartquotes = False
highlight_language = "text"

autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 70

html_theme = "furo"
html_title = "vicreg-kernels"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "github-dark"
copybutton_exclude = ".linenos, .gp, .go"
