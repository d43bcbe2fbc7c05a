"""The site: sphinx-build docs site."""

from stepjax import __version__

project = "stepjax"
copyright = "the stepjax authors"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
exclude_patterns = ["README.md"]

myst_heading_anchors = 3
default_role = "code"  # docstrings write `name`

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
python_use_unqualified_type_names = True
