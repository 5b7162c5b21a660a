"""How the documentation is built: `pip install '.[docs]'`, then `python -m sphinx -W --keep-going docs build/site`."""

import sys
from importlib.metadata import version as installed
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "wherefrom"
author = "the wherefrom developers"
release = version = installed("wherefrom")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "plain_docstrings"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}  # the second for what autosummary generates
exclude_patterns = ["_extensions", "_templates"]
templates_path = ["_templates"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_default_options = {"members": True, "member-order": "bysource", "special-members": "__call__"}
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
maximum_signature_line_length = 96
smartquotes = False  # quotation marks are code's, as a rule
default_role = "py:obj"  # what stands in backticks is a name of ours, or else just code

html_theme = "furo"
html_title = f"wherefrom {release}"
html_static_path = ["_static"]
html_css_files = ["wherefrom.css"]
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
pygments_style = "friendly"
