"""Small files that change a model: a `Flux` in, another `Flux` out."""
