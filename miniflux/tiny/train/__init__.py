"""The training of the tiny FLUX, one stage a file: `python -m miniflux.tiny.train`."""
