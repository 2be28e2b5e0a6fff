"""Sphinx configuration: `make docs`."""

import pyro_vi_ext

project = "pyro_vi_ext"
author = "the pyro_vi_ext developers"
release = pyro_vi_ext.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
autodoc_member_order = "bysource"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "pyro_vi_ext"
