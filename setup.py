"""Everything is in pyproject.toml; the optional C++/CUDA extension will be described here."""

from setuptools import setup

setup()
