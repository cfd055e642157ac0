"""The module that `import torch` runs, and the build backend that installs it beside the package, not in it.

An installation can lose the package and keep its metadata: a checkout that was moved after `pip install -e`, a folder
deleted by hand. torch then finds the entry point, cannot import it, and raises. So the entry point is
`hf_sparselr_autoload`, a module of its own next to the installed metadata. `build_backend` puts it there: setuptools
leaves the modules of an editable installation in the checkout, from where they can vanish.
"""
