"""The bundle: everything a FLUX.1 model consists of, and `load`, which finds and assembles it."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from .checkpoints import layouts
from .checkpoints.formats import read_json
from .checkpoints.hub import OFFICIAL, cache_folder, find_in_cache, find_or_download
from .networks.autoencoder import Autoencoder
from .networks.clip import CLIPText
from .networks.mmdit import MMDiT
from .networks.t5 import T5
from .networks.tokenizers import CLIPTokenizer, T5Tokenizer

log = logging.getLogger("miniflux")

SHIPPED = Path(__file__).parent / "tiny" / "weights"
# Where the text encoders come from when a folder in the original layout brings none.
TEXT_ENCODERS = {"text_encoder": "openai/clip-vit-large-patch14", "text_encoder_2": "google/t5-v1_1-xxl"}


@dataclass(frozen=True)
class FluxConfig:
    """What is not in a network's weights. The defaults are FLUX.1-dev's."""

    name: str = "dev"
    size: int = 1024                 # default width and height in pixels
    max_text_tokens: int = 512       # T5 tokens a prompt is padded to
    dynamic_shift: bool = True       # whether the schedule depends on the picture's size
    shift: float = 1.0               # of the schedule where dynamic_shift is false; 1 changes nothing


@dataclass(frozen=True)
class Flux:
    """A model, ready to use. Parts that a folder does not bring are None."""

    clip_tokenizer: CLIPTokenizer | None
    t5_tokenizer: T5Tokenizer | None
    clip: CLIPText | None
    t5: T5 | None
    mmdit: MMDiT
    autoencoder: Autoencoder | None
    config: FluxConfig


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name; by default CUDA, then MPS, then the CPU. Raises ValueError for one that is not here."""
    if name is not None:
        try:
            torch.empty(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"the device {str(name)!r} cannot be used here: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def shipped_models() -> dict[str, Path]:
    """The models that come with the package: name -> folder."""
    return {folder.name: folder for folder in sorted(SHIPPED.glob("*/")) if (folder / "model_index.json").is_file()}


def find_source(source: str | Path) -> Path:
    """The folder or file that `source` names: a shipped model, a path, an official short name or a Hub id."""
    name = str(source)
    if name in (shipped := shipped_models()):
        return shipped[name]
    if (path := Path(source).expanduser()).exists():
        return path
    if name in OFFICIAL:
        return find_or_download(OFFICIAL[name])
    if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith(".safetensors"):
        return find_or_download(name)
    raise FileNotFoundError(f"{name!r} is neither a folder nor a known model: expected {', '.join([*shipped, *OFFICIAL])}, "
                            "a Hub id such as black-forest-labs/FLUX.1-dev, or the path of a checkpoint")


def load(source: str | Path = "tiny", *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
         transformer: str | Path | None = None) -> Flux:
    """Load a FLUX.1 model.

    source: a shipped name ("tiny"), an official short name ("schnell", "dev", "krea", "fill", "canny", "depth", "kontext"),
    a Hub id, or a folder in the diffusers or in the original layout. transformer: a single file or folder whose transformer
    replaces the source's. device: CUDA, then MPS, then CPU by default. dtype: bfloat16 on accelerators, float32 on the CPU
    by default.

    Raises FileNotFoundError for what is not there, ValueError for what is not a FLUX.1 model."""
    device = find_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    folder = find_source(source)
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file: load a folder, and give a single file as transformer=")
    if transformer is not None and not Path(transformer).expanduser().exists():
        raise FileNotFoundError(f"the transformer {transformer} does not exist")
    files = find_parts(folder)
    if transformer is not None:
        files["transformer"] = Path(transformer).expanduser()
    if "transformer" not in files:
        raise ValueError(f"{folder} holds no FLUX.1 model: expected transformer/ (diffusers layout) or flux1-*.safetensors")

    def part(name: str, loader):
        return loader(files[name], device, dtype) if name in files else None

    mmdit = part("transformer", layouts.load_mmdit)
    clip_tokenizer = CLIPTokenizer.from_folder(files["tokenizer"]) if "tokenizer" in files else None
    t5_tokenizer = T5Tokenizer.from_folder(files["tokenizer_2"]) if "tokenizer_2" in files else None
    flux = Flux(clip_tokenizer, t5_tokenizer, part("text_encoder", layouts.load_clip), part("text_encoder_2", layouts.load_t5),
                mmdit, part("vae", layouts.load_autoencoder), read_config(str(source), folder, mmdit, t5_tokenizer))
    check_fit(flux, folder)
    return flux


def find_parts(folder: Path) -> dict[str, Path]:
    """Where each part of a model lies: {part name of the diffusers layout: folder or file}."""
    if (folder / "model_index.json").is_file():
        names = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
        return {name: folder / name for name in names if (folder / name).is_dir()}
    files: dict[str, Path] = {}
    for name, patterns in dict(transformer=("flux1*.safetensors", "*transformer*.safetensors"), vae=("ae.safetensors", "vae"),
                               text_encoder=("text_encoder", "clip_l*.safetensors"), tokenizer=("tokenizer",),
                               text_encoder_2=("text_encoder_2", "t5xxl*.safetensors"), tokenizer_2=("tokenizer_2",)).items():
        if found := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            files[name] = found[0]
    if "transformer" in files:
        for name, repo in TEXT_ENCODERS.items():
            if name not in files and (snapshot := find_in_cache(repo)):
                files[name] = snapshot
            if name in files and files[name].is_dir():
                files.setdefault(name.replace("text_encoder", "tokenizer"), files[name])
    return files


def read_config(name: str, folder: Path, mmdit: MMDiT, t5_tokenizer: T5Tokenizer | None) -> FluxConfig:
    """The bundle's settings from the folder's small JSON files; without them, from whether there is a guidance embedding."""
    guided = mmdit.config.guidance_embed
    # Note: schnell was trained with 256 tokens, though its tokenizer would allow 512.
    tokens = min(512 if guided else 256, t5_tokenizer.max_length if t5_tokenizer else 512)
    config = FluxConfig(name=Path(name).name, max_text_tokens=tokens, dynamic_shift=guided)
    scheduler, vae = folder / "scheduler" / "scheduler_config.json", folder / "vae" / "config.json"
    if scheduler.is_file():
        values = read_json(scheduler)
        config = replace(config, dynamic_shift=bool(values.get("use_dynamic_shifting", False)), shift=float(values.get("shift", 1.0)))
    if vae.is_file():
        config = replace(config, size=int(read_json(vae).get("sample_size", 1024)))
    return config


def check_fit(flux: Flux, folder: Path) -> None:
    """Refuses parts whose widths do not agree."""
    sizes = flux.mmdit.config
    for what, have, need in (
            ("CLIP's width", flux.clip and flux.clip.config.hidden_size, sizes.vec_in_dim),
            ("T5's width", flux.t5 and flux.t5.config.d_model, sizes.context_in_dim),
            ("the autoencoder's latent channels x 4", flux.autoencoder and 4 * flux.autoencoder.config.z_channels, sizes.out_channels),
            ("the CLIP vocabulary", flux.clip_tokenizer and flux.clip and len(flux.clip_tokenizer.vocab), flux.clip and flux.clip.config.vocab_size)):
        if have is not None and need is not None and (have > need if "vocabulary" in what else have != need):
            raise ValueError(f"the parts of {folder} do not belong together: {what} is {have}, expected {need}")


def list_models() -> list[str]:
    """One line a model: what is shipped, and which official models are in the local cache."""
    lines = [f"{name:10} shipped" for name in shipped_models()]
    for name, repo in OFFICIAL.items():
        found = find_in_cache(repo)
        lines.append(f"{name:10} {repo}: " + (f"{found}" if found else f"not in {cache_folder()}"))
    return lines
