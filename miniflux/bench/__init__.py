"""Measures miniflux beside diffusers: same weights, same machine, same run; equality comes first.

`python -m miniflux.bench` prints all tables; `__main__.py` lists them.
"""
