"""IP-Adapter: an image as a second prompt, in the form that XLabs gave it for FLUX.1.

    tokens = LayerNorm(P · CLIP(image))                            (T, context_in_dim)
    img    = img + scale · softmax(q (K tokens)ᵀ / √D) (V tokens)  in each double block

T is 4 in v1 and 16 in v2; q are the queries of the image that is being generated.

    flux = add_ip_adapter(load("dev"), "ip_adapter.safetensors", "openai/clip-vit-large-patch14")
    generate(flux, "a fox", ip_image="style.png", ip_scale=0.7)

The keys and values are the same at every step, so they are computed once a call. They enter the
transformer as its input `image_kv`.

Paper: Ye et al. 2023, arXiv:2308.06721.
Reference: diffusers' `FluxIPAdapterAttnProcessor`; XLabs-AI's x-flux.
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
from ..imaging.images import BICUBIC, CLIP_COLOURS, as_pil, preprocess, standardise
from ..imaging.reading import ImageLike, RGBImage, read_each
from ..networks.mmdit import KeysValues

# Names in XLabs' files, and the other names that diffusers reads -> ours.
NAMES = {
    r"^(ip_adapter_proj_model|image_proj)\.": "projection.",
    r"^ip_adapter\.": "double_blocks.",
    r"\.processor\.": ".",
    r"ip_adapter_double_stream_([kv])_proj": r"\1_proj",
    r"to_([kv])_ip": r"\1_proj",
}

# One image; or for each adapter one image, several or none.
IPImage = ImageLike | Sequence[ImageLike | list[ImageLike] | None]
# One number; or for each adapter one number, or one for each double block.
IPScale = float | Sequence[float | Sequence[float]]


@dataclass(frozen=True)
class IPAdapterConfig:
    """Sizes of an IP-Adapter; the defaults are those of XLabs' v1 (490,874,880 parameters)."""

    projection_dim: int = 768          # width of CLIP's vectors
    tokens: int = 4                    # tokens for each image; 16 in v2
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
    """CLIP's vectors (n, projection_dim) of n images -> keys and values (1, n·T, hidden_size).

    There is one pair of them for each double block."""

    def __init__(self, config: IPAdapterConfig = IPAdapterConfig()):
        super().__init__()
        self.config = config
        self.projection = Projection(config)
        self.double_blocks = nn.ModuleList()
        for _ in range(config.depth):
            self.double_blocks.append(nn.ModuleDict({
                "k_proj": nn.Linear(config.context_in_dim, config.hidden_size),
                "v_proj": nn.Linear(config.context_in_dim, config.hidden_size),
            }))

    def forward(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        tokens = self.projection(x).flatten(0, 1)[None]                   # (1, n·T, context_in_dim)
        return [(block["k_proj"](tokens), block["v_proj"](tokens)) for block in self.double_blocks]


@dataclass(frozen=True)
class IPImages:
    """The images of a call, read.

    wanted:   for each adapter the images to follow.
    unwanted: for each adapter the images to avoid.
    scales:   for each adapter its scale in each double block."""

    wanted: list[list[RGBImage]]
    unwanted: list[list[RGBImage]]
    scales: list[list[float]]


# ------------------------------------------------------------------------------------------ loading


def add_ip_adapter(flux: Flux, path: str | Path, image_encoder: str | Path | None = None) -> Flux:
    """A copy of the model with one more IP-Adapter; its tasks then take `ip_image=`.

    flux:          a model; it stays as it is.
    path:          XLabs' safetensors file, a folder with one, a Hub id or a shipped name.
    image_encoder: the folder or Hub id of CLIP's vision tower; by default the model's own if it has
                   one, else image_encoder/ next to the file, else openai/clip-vit-large-patch14.

    Raises FileNotFoundError if a file is missing, ValueError if the file is not an IP-Adapter or
    was made for another model."""
    path = find_file(find_network(path, "IP-Adapter"), "IP-Adapter")
    weight = flux.mmdit.img_in.weight
    state = {rename(name): tensor for name, tensor in read_safetensors(path).items()}
    config = config_from_tensors(state, path)
    adapter = build(IPAdapter, config, state, path, weight.device, weight.dtype)
    for field in ("depth", "hidden_size", "context_in_dim"):
        have = getattr(adapter.config, field)
        need = getattr(flux.mmdit.config, field)
        if have != need:
            raise ValueError(f"{path} was made for another model: its {field} is {have}, "
                             f"that of {flux.config.name} is {need}")
    encoder = flux.image_encoder
    if encoder is None or image_encoder is not None:
        folder = find_encoder(image_encoder, path)
        encoder = load_clip_vision(folder, weight.device, weight.dtype)
    for other in (*flux.ip_adapters, adapter):
        have = other.config.projection_dim
        need = encoder.config.projection_dim
        if have != need:
            raise ValueError(f"{path} and the image encoder do not fit: the vectors are {have} and "
                             f"{need} wide; the adapters of a model share one encoder")
    return replace(flux, image_encoder=encoder, ip_adapters=(*flux.ip_adapters, adapter))


def find_encoder(given: str | Path | None, path: Path) -> Path:
    sibling = path.parent / "image_encoder"
    return find_network(given or (sibling if sibling.is_dir() else CLIP_VISION), "image encoder")


def rename(name: str) -> str:
    for pattern, ours in NAMES.items():
        name = re.sub(pattern, ours, name)
    return name


def config_from_tensors(state: State, path: Path) -> IPAdapterConfig:
    """Sizes from the shapes."""
    proj = state.get("projection.proj.weight")
    norm = state.get("projection.norm.weight")
    keys = state.get("double_blocks.0.k_proj.weight")
    absent = proj is None or norm is None or keys is None
    if absent or proj.ndim != 2 or 0 in (*proj.shape, *norm.shape, *keys.shape):
        raise ValueError(f"{path} is no IP-Adapter for FLUX.1 in XLabs' form: it has no "
                         "ip_adapter_proj_model, or no ip_adapter_double_stream_k_proj")
    return IPAdapterConfig(
        projection_dim=proj.shape[1],
        tokens=len(proj) // len(norm),      # Note: the projection has T · context_in_dim rows
        context_in_dim=len(norm),
        hidden_size=len(keys),
        depth=count(set(state), "double_blocks"),
    )


# -------------------------------------------------------------------------------------------- using


def read_ip_images(
    flux: Flux, image: IPImage | None, scale: IPScale, negative: IPImage | None
) -> IPImages | None:
    """Read the images of a call and check them against the model.

    Where only one of the two is given, black images take the place of the other."""
    if image is None and negative is None:
        return None
    if not flux.ip_adapters:
        raise ValueError(f"there is an ip_image, but the model {flux.config.name} has no "
                         "IP-Adapter: add_ip_adapter(flux, path) first")
    size = flux.image_encoder.config.image_size
    black = Image.new("RGB", (size, size))
    if image is None:
        image = [black] * len(flux.ip_adapters)
    wanted = read_images(flux, image, "ip_image")
    if negative is None:
        unwanted = [[black] if images else [] for images in wanted]
    else:
        unwanted = read_images(flux, negative, "negative_ip_image")
    return IPImages(wanted, unwanted, read_scales(flux, scale))


def read_images(flux: Flux, given: IPImage, what: str) -> list[list[RGBImage]]:
    """The images of each adapter; an empty list for an adapter that is to do nothing."""
    given = list(given) if isinstance(given, (list, tuple)) else [given]
    need = len(flux.ip_adapters)
    if len(given) != need:
        raise ValueError(f"there are {len(given)} {what}s for {need} IP-Adapters: give one for "
                         "each; for several images of one adapter give a list within the list")
    return [[] if one is None else read_each(one, what) for one in given]


def read_scales(flux: Flux, scale: IPScale) -> list[list[float]]:
    """For each adapter its scale in each double block."""
    adapters = len(flux.ip_adapters)
    depth = flux.mmdit.config.depth
    if hasattr(scale, "tolist"):                            # numbers of NumPy or PyTorch
        scale = scale.tolist()
    if to_number(scale) is not None:
        scale = [scale] * adapters
    elif adapters == 1 and is_list_of_numbers(scale, depth):
        scale = [scale]
    if not isinstance(scale, (list, tuple)) or len(scale) != adapters:
        raise ValueError(f"ip_scale is {quote(scale)}: expected a number, one for each of "
                         f"{adapters} IP-Adapters, or for each of them a list of one for each of "
                         f"{depth} double blocks")
    return [read_scale(one, depth) for one in scale]


def read_scale(one: float | Sequence[float], depth: int) -> list[float]:
    """The scale of one adapter in each double block."""
    factors = [one] * depth if to_number(one) is not None else one
    if not hasattr(factors, "__len__") or isinstance(factors, str):
        raise ValueError(f"ip_scale has {quote(one)} for an IP-Adapter: expected a number, or a "
                         f"list of one for each of {depth} double blocks")
    if len(factors) != depth:
        raise ValueError(f"ip_scale has {len(factors)} numbers for an IP-Adapter, this model has "
                         f"{depth} double blocks: give one for each")
    return [check_number("ip_scale", factor, -100, 100) for factor in factors]


def is_list_of_numbers(x: object, length: int) -> bool:
    if not isinstance(x, (list, tuple)) or len(x) != length:
        return False
    return all(to_number(element) is not None for element in x)


def image_keys_values(
    flux: Flux, images: list[list[RGBImage]], scales: list[list[float]]
) -> list[KeysValues]:
    """For each double block, the keys and values (1, H, T, D) that each adapter adds.

    The values are already multiplied by the scale."""
    blocks = [[] for _ in scales[0]]
    for adapter, its_images, factors in zip(flux.ip_adapters, images, scales):
        if not its_images:
            continue
        keys_values = adapter(clip_vectors(flux, its_images))
        for block, (k, v), scale in zip(blocks, keys_values, factors):
            if scale:
                heads = flux.mmdit.config.num_heads
                block.append((split_heads(k, heads), split_heads(scale * v, heads)))
    return blocks


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(1, T, H·D) -> (1, H, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def clip_vectors(flux: Flux, images: list[RGBImage]) -> Tensor:
    """CLIP's vectors (n, projection_dim) of n images."""
    size = flux.image_encoder.config.image_size
    weight = next(flux.image_encoder.parameters())
    squares = [middle_square(image, size) for image in images]
    pixels = preprocess(squares, size, size) / 2 + 0.5                 # (n, 3, S, S) in [0, 1]
    return flux.image_encoder(standardise(pixels, CLIP_COLOURS).to(weight))


def middle_square(image: RGBImage, size: int) -> Image.Image:
    """The middle of the image, its shorter side resized to `size`: as CLIP was trained."""
    image = as_pil(image)
    shorter = min(image.size)
    width, height = (max(size, int(size * side / shorter)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), BICUBIC)
    return resized.crop((left, top, left + size, top + size))
