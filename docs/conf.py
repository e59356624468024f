"""Sphinx: `sphinx-build -W docs site-docs`; notebooks are run while the documentation is built."""

from importlib.metadata import version as installed_version

project = "robbench"
author = "The robbench authors"
release = version = installed_version("robbench")
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"robbench {release}"
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

autodoc_typehints = "description"
autodoc_member_order = "bysource"
# Classes of other packages in signatures: their documentation is not reachable while this one is built.
nitpick_ignore_regex = [("py:.*", ".*")]
