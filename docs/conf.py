"""The user guide: pip install ".[docs]" && sphinx-build -W -b html docs build/docs."""

import normkit

project = "normkit"
author = "normkit developers"
copyright = author
release = version = normkit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "numpydoc"]
exclude_patterns = ["exactness_tables.md"]  # which exactness.md includes
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# Docstrings name functions and arguments in single backticks: a link where there is something to link to.
default_role = "py:obj"
numpydoc_show_class_members = False  # api.md says which
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more

html_theme = "furo"
html_title = f"normkit {release}"
