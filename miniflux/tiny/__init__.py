"""The small FLUX that ships with the package: its world, its training and its weights."""
