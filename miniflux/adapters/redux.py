"""Redux: images that the model reads as it reads text."""

from dataclasses import replace
from pathlib import Path

from ..checkpoints import layouts
from ..checkpoints.finding import find_part, find_source
from ..checkpoints.hub import cache_folder, find_in_cache
from ..flux import Flux

# Where Redux's folder brings no image encoder.
IMAGE_ENCODER = "google/siglip-so400m-patch14-384"


def add_redux(flux: Flux, source: str | Path, image_encoder: str | Path | None = None) -> Flux:
    """The model with Redux: it then reads images as it reads text (`redux`, `redux_prompt`).
    Seam: model -> model.

    source: "redux", a Hub id, Redux's folder, or its file `flux1-redux-dev.safetensors`.
    image_encoder: a folder with SigLIP's vision tower; by default the one in the source, else
        google/siglip-so400m-patch14-384 from the local cache.

    Raises FileNotFoundError for what is not there, ValueError for what is not Redux or does not fit
    this model."""
    path = find_source(source)
    embedder = [path] if path.is_file() else find_part(path, "image_embedder")
    if not embedder:
        raise ValueError(f"{path} holds no Redux: it has no folder image_embedder/ "
                         "and no file flux1-redux-dev.safetensors")
    folder = path if path.is_dir() else path.parent
    encoder = find_image_encoder(folder / "image_encoder", image_encoder)
    weight = flux.mmdit.img_in.weight
    siglip = layouts.load_siglip(encoder, weight.device, weight.dtype)
    redux = layouts.load_redux(embedder[0], weight.device, weight.dtype)
    have = siglip.config.hidden_size, redux.config.txt_in_features
    need = redux.config.redux_dim, flux.mmdit.config.context_in_dim
    if have != need:
        raise ValueError(f"{embedder[0]} does not fit: SigLIP's tokens and Redux's are {have[0]} "
                         f"and {have[1]} wide, expected {need[0]} and {need[1]}")
    return replace(flux, siglip=siglip, redux=redux)


def find_image_encoder(own: Path, given: str | Path | None) -> Path:
    """The folder of SigLIP: the given one, the source's own, or the one in the cache."""
    if given is not None:
        encoder = Path(given).expanduser()
    else:
        encoder = own if own.is_dir() else find_in_cache(IMAGE_ENCODER)
    if encoder is None or not encoder.is_dir():
        raise FileNotFoundError(f"Redux reads images through SigLIP, which is neither in {own} nor "
                                f"in {cache_folder()}: give the folder of {IMAGE_ENCODER} as "
                                "image_encoder=")
    return encoder
