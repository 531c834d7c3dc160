"""IP-Adapter: a picture as a second prompt (Ye et al. 2023, arXiv:2308.06721), in the form XLabs gave it for FLUX.1.

    tokens = LayerNorm(P · CLIP(picture))                              (T, context_in_dim); v1 makes 4 tokens, v2 makes 16
    img    = img + scale · softmax(q (K tokens)ᵀ / √D) (V tokens)      in each double block, q the image's own queries

    flux = add_ip_adapter(load("dev"), "ip_adapter.safetensors", "openai/clip-vit-large-patch14")
    generate(flux, "a fox", ip_image="style.png", ip_scale=0.7)

The keys and values are the same at every step, so they are made once a call. Seam: model -> model, and within the transformer its
input `image_kv`. Reference: diffusers' `FluxIPAdapterAttnProcessor`; XLabs-AI's x-flux.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image
from torch import Tensor, nn

from ..checkpoints.building import State, build
from ..checkpoints.formats import read_safetensors
from ..checkpoints.hub import find_file, find_network
from ..checkpoints.layouts import CLIP_VISION, load_clip_vision
from ..checkpoints.names import count
from ..checks import check_number, quote, to_number
from ..flux import Flux
from ..imaging.images import (
    BICUBIC,
    CLIP_COLOURS,
    ImageLike,
    RGBImage,
    as_pil,
    preprocess,
    read_each,
    standardise,
)
from ..networks.mmdit import KeysValues

# Names in XLabs' files and in those that diffusers reads besides -> ours.
NAMES = {r"^(ip_adapter_proj_model|image_proj)\.": "projection.", r"^ip_adapter\.": "double_blocks.", r"\.processor\.": ".",
         r"ip_adapter_double_stream_([kv])_proj": r"\1_proj", r"to_([kv])_ip": r"\1_proj"}

IPImage = ImageLike | Sequence[ImageLike | list[ImageLike] | None]   # one picture, or for each adapter one, several or none
IPScale = float | Sequence[float | Sequence[float]]            # one number; for each adapter one, or one for each double block


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter; the defaults are those of XLabs' v1 (490,874,880 parameters)."""

    projection_dim: int = 768          # width of CLIP's vectors
    tokens: int = 4                    # tokens that a picture becomes; 16 in v2
    context_in_dim: int = 4096
    hidden_size: int = 3072
    depth: int = 19


class Projection(nn.Module):
    """CLIP's vectors (n, projection_dim) -> tokens (n, T, context_in_dim)."""

    def __init__(self, config: IPAdapterConfig):
        super().__init__()
        self.proj = nn.Linear(config.projection_dim, config.tokens * config.context_in_dim)
        self.norm = nn.LayerNorm(config.context_in_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).unflatten(-1, (-1, *self.norm.normalized_shape)))


class IPAdapter(nn.Module):
    """CLIP's vectors of n pictures (n, projection_dim) -> for each double block keys and values (1, n·T, hidden)."""

    def __init__(self, config: IPAdapterConfig = IPAdapterConfig()):
        super().__init__()
        self.config = config
        self.projection = Projection(config)
        self.double_blocks = nn.ModuleList(nn.ModuleDict({
            name: nn.Linear(config.context_in_dim, config.hidden_size) for name in ("k_proj", "v_proj")}) for _ in range(config.depth))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        tokens = self.projection(x).flatten(0, 1)[None]                         # (1, n·T, context_in_dim)
        return [(block["k_proj"](tokens), block["v_proj"](tokens)) for block in self.double_blocks]


@dataclass(frozen=True)
class IPImages:
    """The pictures of a call, read: for each adapter those to follow, those to avoid, and its scale in each double block."""

    wanted: list[list[RGBImage]]
    unwanted: list[list[RGBImage]]
    scales: list[list[float]]


# -------------------------------------------------------------------------------------------------------------- loading


def add_ip_adapter(flux: Flux, path: str | Path, image_encoder: str | Path | None = None) -> Flux:
    """The model with an IP-Adapter more: its tasks then take `ip_image=`.

    path: XLabs' safetensors file, a folder with one, a Hub id or a shipped name. image_encoder: the folder or Hub id of CLIP's vision
    tower; by default the one that the model has already, else image_encoder/ beside the file, else openai/clip-vit-large-patch14.

    Raises FileNotFoundError for what is not there, ValueError for what is no IP-Adapter or was made for another model. The given
    model stays as it is."""
    path, weight = find_file(find_network(path, "IP-Adapter"), "IP-Adapter"), flux.mmdit.img_in.weight
    state = {rename(name): tensor for name, tensor in read_safetensors(path).items()}
    adapter = build(IPAdapter, config_from_tensors(state, path), state, path, weight.device, weight.dtype)
    for field in ("depth", "hidden_size", "context_in_dim"):
        if (have := getattr(adapter.config, field)) != (need := getattr(flux.mmdit.config, field)):
            raise ValueError(f"{path} was made for another model: its {field} is {have}, that of {flux.config.name} is {need}")
    encoder = flux.image_encoder
    if encoder is None or image_encoder is not None:
        encoder = load_clip_vision(find_encoder(image_encoder, path), weight.device, weight.dtype)
    for other in (*flux.ip_adapters, adapter):
        if other.config.projection_dim != encoder.config.projection_dim:
            raise ValueError(f"{path} and the image encoder do not fit: the vectors are {other.config.projection_dim} and "
                             f"{encoder.config.projection_dim} wide; the adapters of a model share one encoder")
    return replace(flux, image_encoder=encoder, ip_adapters=(*flux.ip_adapters, adapter))


def find_encoder(given: str | Path | None, path: Path) -> Path:
    beside = path.parent / "image_encoder"
    return find_network(given or (beside if beside.is_dir() else CLIP_VISION), "image encoder")


def rename(name: str) -> str:
    for pattern, ours in NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def config_from_tensors(state: State, path: Path) -> IPAdapterConfig:
    """Sizes from the shapes. Note: the number of tokens is that of the projection's rows, in widths of its norm."""
    names = "projection.proj.weight", "projection.norm.weight", "double_blocks.0.k_proj.weight"
    proj, norm, keys = (state.get(name) for name in names)
    if proj is None or norm is None or keys is None or proj.ndim != 2 or 0 in (*proj.shape, *norm.shape, *keys.shape):
        raise ValueError(f"{path} is no IP-Adapter for FLUX.1 in XLabs' form: it has no ip_adapter_proj_model, or no "
                         "ip_adapter_double_stream_k_proj")
    return IPAdapterConfig(projection_dim=proj.shape[1], tokens=len(proj) // len(norm), context_in_dim=len(norm),
                           hidden_size=len(keys), depth=count(set(state), "double_blocks"))


# ---------------------------------------------------------------------------------------------------------------- using


def read_ip_images(flux: Flux, image: IPImage | None, scale: IPScale, negative: IPImage | None) -> IPImages | None:
    """The pictures of a call, checked against the model; black ones where there are only those to follow, or only those to avoid."""
    if image is None and negative is None:
        return None
    if not flux.ip_adapters:
        raise ValueError(f"there is an ip_image, but the model {flux.config.name} has no IP-Adapter: add_ip_adapter(flux, path) first")
    black = Image.new("RGB", (flux.image_encoder.config.image_size,) * 2)
    wanted = read_images(flux, [black] * len(flux.ip_adapters) if image is None else image, "ip_image")
    unwanted = [[black] if mine else [] for mine in wanted] if negative is None else read_images(flux, negative, "negative_ip_image")
    return IPImages(wanted, unwanted, read_scales(flux, scale))


def read_images(flux: Flux, given: IPImage, what: str) -> list[list[RGBImage]]:
    """For each adapter its pictures, none where it is to do nothing."""
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    if len(given) != (need := len(flux.ip_adapters)):
        raise ValueError(f"there are {len(given)} {what}s for {need} IP-Adapters: give one for each; for several pictures of one "
                         "adapter give a list within the list")
    return [[] if one is None else read_each(one, what) for one in given]


def read_scales(flux: Flux, scale: IPScale) -> list[list[float]]:
    """For each adapter its scale in each double block."""
    adapters, depth = len(flux.ip_adapters), flux.mmdit.config.depth
    if hasattr(scale, "tolist"):                            # numbers of NumPy or PyTorch
        scale = scale.tolist()
    if to_number(scale) is not None:
        scale = [scale] * adapters
    elif adapters == 1 and isinstance(scale, (list, tuple)) and len(scale) == depth and all(to_number(s) is not None for s in scale):
        scale = [scale]
    if not isinstance(scale, (list, tuple)) or len(scale) != adapters:
        raise ValueError(f"ip_scale is {quote(scale)}: expected a number, one for each of {adapters} IP-Adapters, or for each of them "
                         f"a list of one for each of {depth} double blocks")
    scales = []
    for one in scale:
        factors = [one] * depth if to_number(one) is not None else one
        if not hasattr(factors, "__len__") or isinstance(factors, str):
            raise ValueError(f"ip_scale has {quote(one)} for an IP-Adapter: expected a number, or a list of one for each of {depth} "
                             "double blocks")
        if len(factors) != depth:
            raise ValueError(f"ip_scale has {len(factors)} numbers for an IP-Adapter, this model has {depth} double blocks: give one for "
                             "each")
        scales.append([check_number("ip_scale", factor, -100, 100) for factor in factors])
    return scales


def image_keys_values(flux: Flux, pictures: list[list[RGBImage]], scales: list[list[float]]) -> list[KeysValues]:
    """For each double block, the keys and values (1, H, T, D) that each adapter adds; the scale is in the values."""
    heads, blocks = flux.mmdit.config.num_heads, [[] for _ in scales[0]]
    for adapter, mine, factors in zip(flux.ip_adapters, pictures, scales):
        if not mine:
            continue
        for block, (k, v), scale in zip(blocks, adapter(clip_vectors(flux, mine)), factors):
            if scale:
                block.append(tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (k, scale * v)))
    return blocks


def clip_vectors(flux: Flux, pictures: list[RGBImage]) -> Tensor:
    """(n, projection_dim)."""
    size, weight = flux.image_encoder.config.image_size, next(flux.image_encoder.parameters())
    pixels = preprocess([middle_square(picture, size) for picture in pictures], size, size) / 2 + 0.5  # (n, 3, S, S) in [0, 1]
    return flux.image_encoder(standardise(pixels, CLIP_COLOURS).to(weight))


def middle_square(picture: RGBImage, size: int) -> Image.Image:
    """The shorter side is resized to `size`, the longer one cut: as CLIP was trained."""
    picture = as_pil(picture)
    width, height = (max(size, int(size * side / min(picture.size))) for side in picture.size)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.resize((width, height), BICUBIC).crop((left, top, left + size, top + size))
