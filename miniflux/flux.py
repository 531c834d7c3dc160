"""The bundle: everything a FLUX.1 model consists of, and `load`, which finds and assembles it."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .checkpoints import layouts
from .checkpoints.building import pick
from .checkpoints.formats import PICKLES, listing, read_header, read_json
from .checkpoints.hub import OFFICIAL, SHIPPED, cache_folder, find_in_cache, find_or_download, is_repo, shipped_adapters
from .images import check_number
from .networks.autoencoder import Autoencoder
from .networks.clip import CLIPText, CLIPVision
from .networks.mmdit import MMDiT, timestep_embedding
from .networks.siglip import ReduxEmbedder, SigLIP
from .networks.t5 import T5
from .networks.tokenizers import CLIPTokenizer, T5Tokenizer

# Where each part may lie in a folder, the best place first: the diffusers layout, then the original one.
PARTS = {
    "transformer": ("transformer/*.safetensors", "flux1*.safetensors", "flux1*.gguf", "transformer"),
    "vae": ("vae/*.safetensors", "ae.safetensors", "vae"),
    "text_encoder": ("text_encoder/*.safetensors", "clip_l*.safetensors", "text_encoder"),
    "text_encoder_2": ("text_encoder_2/*.safetensors", "t5xxl*.safetensors", "t5*.gguf", "text_encoder_2"),
    "tokenizer": ("tokenizer",),
    "tokenizer_2": ("tokenizer_2",),
    "image_embedder": ("image_embedder", "flux1-redux*.safetensors"),
}
# Where the text encoders come from when a folder in the original layout brings none.
TEXT_ENCODERS = {"": "openai/clip-vit-large-patch14", "_2": "google/t5-v1_1-xxl"}
VARIANT = "variant.json"                                    # of a folder with what turns a shipped model into another: a LoRA, or Redux
IMAGE_ENCODER = "google/siglip-so400m-patch14-384"         # and Redux's, where its folder brings none


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
    siglip: SigLIP | None = None
    redux: ReduxEmbedder | None = None
    image_encoder: CLIPVision | None = None
    ip_adapters: tuple[nn.Module, ...] = ()
    loras: object = None               # what `adapters/lora.py` needs to change or undo itself


def find_device(name: torch.device | str | None = None) -> torch.device:
    """The device of that name; by default CUDA, then MPS, then the CPU. Raises ValueError for one that is not here."""
    if name is not None:
        try:
            torch.empty(0, device=name)
            return torch.device(name)
        except (RuntimeError, AssertionError, TypeError) as error:
            raise ValueError(f"the device {str(name)!r} cannot be used here: {str(error).partition(chr(10))[0]}") from None
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """What is computed in where nothing else is asked for."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def shipped_models() -> dict[str, Path]:
    """The models that come with the package: name -> folder."""
    return {folder.name: folder for folder in sorted(SHIPPED.glob("*/"))
            if (folder / "model_index.json").is_file() or (folder / VARIANT).is_file()}


def whole_models() -> list[str]:
    """Those of them that are no variant of another."""
    return [name for name, folder in shipped_models().items() if not (folder / VARIANT).is_file()]


def find_source(source: str | Path) -> Path:
    """The folder or file that `source` names: a shipped model, a path, an official short name or a Hub id."""
    name, shipped = str(source), shipped_models()
    # Note: names come before paths, or a folder that happens to be called "dev" would hide the model: that one is "./dev".
    if name in shipped and isinstance(source, str):
        return shipped[name]
    if name in OFFICIAL and isinstance(source, str):
        return find_or_download(OFFICIAL[name])
    if (path := Path(source).expanduser()).exists():
        return path
    if is_repo(name):
        return find_or_download(name)
    raise FileNotFoundError(f"{name!r} is neither a folder nor a known model: expected {', '.join([*shipped, *OFFICIAL])}, "
                            "a Hub id such as black-forest-labs/FLUX.1-dev, or the path of a checkpoint")


def load(source: str | Path = "tiny", *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
         transformer: str | Path | None = None, fit: bool = False) -> Flux:
    """Load a FLUX.1 model.

    source: a shipped name ("tiny"), an official short name ("schnell", "dev", "krea", "fill", "canny", "depth", "kontext"; "redux"
    is dev with `add_redux`), a Hub id, a folder in the diffusers or in the original layout, or a safetensors file with a whole
    model (ComfyUI's). transformer: a single file (safetensors or GGUF) or folder whose transformer replaces the source's. What is
    quantised stays so in memory. device: CUDA, then MPS, then CPU by default. dtype: bfloat16 on accelerators, float32 on the
    CPU by default; what quantised weights are computed in. fit: whether to look first how much memory is free, and offload the model
    where it would not fit as a whole (`plan.py`).

    Raises FileNotFoundError for what is not there, ValueError for what is not a FLUX.1 model."""
    device = find_device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r:.60}, expected torch.float32, torch.bfloat16 or torch.float16")
    if fit:
        from .plan import load_fitting
        return load_fitting(source, device, dtype, transformer)
    return assemble(source, device, dtype, transformer)


def assemble(source: str | Path, device: torch.device, dtype: torch.dtype | None, transformer: str | Path | None = None) -> Flux:
    """The model of `load`, from its files; with the dtype None, as they hold it."""
    folder = find_source(source)
    if (folder / VARIANT).is_file():
        return assemble_variant(folder, device, dtype, transformer)
    if find_part(folder, "image_embedder") and not find_part(folder, "transformer"):
        return add_redux(assemble("dev", device, dtype, transformer), folder)
    override = None if transformer is None else Path(transformer).expanduser()
    if override and not override.exists():
        raise FileNotFoundError(f"the transformer {transformer} does not exist: expected a file or a folder")
    files = (find_parts if folder.is_dir() else find_parts_in_file)(folder, override)

    def part(name: str, loader):
        return loader(files[name], device, dtype) if name in files else None

    clip_tokenizer = CLIPTokenizer.from_folder(files["tokenizer"]) if "tokenizer" in files else None
    t5_tokenizer = T5Tokenizer.from_folder(files["tokenizer_2"]) if "tokenizer_2" in files else None
    mmdit = part("transformer", layouts.load_mmdit)
    flux = Flux(clip_tokenizer, t5_tokenizer, part("text_encoder", layouts.load_clip), part("text_encoder_2", layouts.load_t5),
                mmdit, part("vae", layouts.load_autoencoder),
                read_config(str(source), folder, mmdit, t5_tokenizer, own_schedule=override is None))
    check_fit(flux, folder)
    return add_redux(flux, folder) if "image_embedder" in files else flux


def assemble_variant(folder: Path, device: torch.device, dtype: torch.dtype | None, transformer: str | Path | None) -> Flux:
    """A shipped model with Redux, where this folder holds that; else with the folder's LoRA merged into it for good: it may widen the
    first layer, or, where `variant.json` says with which guidance it was made to need few steps, take the guidance embedding away."""
    from .adapters.lora import merged_for_good

    described = read_json(folder / VARIANT)
    base, guidance = described.get("base"), described.get("guidance")
    if base not in whole_models():
        raise ValueError(f"{folder / VARIANT} names the base {base!r:.60}: expected a shipped model such as tiny")
    flux = assemble(base, device, dtype, transformer)
    flux = add_redux(flux, folder) if find_part(folder, "image_embedder") else merged_for_good(flux, folder / "lora.safetensors")
    config = replace(flux.config, name=folder.name)
    if guidance is None:
        return replace(flux, config=config)
    check_number(f"the guidance in {folder / VARIANT}", guidance, 0, 1000)
    return replace(flux, mmdit=without_guidance(flux.mmdit, guidance), config=replace(config, dynamic_shift=False, shift=1.0))


@torch.no_grad()
def without_guidance(mmdit: MMDiT, guidance: float) -> MMDiT:
    """The transformer that computes for ever what this one computes with that guidance: the constant part of
    time_in(t) + guidance_in(g) + vector_in(p) moves into the last bias."""
    with torch.device("meta"):
        fixed = MMDiT(replace(mmdit.config, guidance_embed=False))
    bias = mmdit.vector_in.out_layer.bias
    constant = mmdit.guidance_in(timestep_embedding(bias.new_tensor([guidance])))[0]
    state = {name: value for name, value in mmdit.state_dict().items() if not name.startswith("guidance_in.")}
    fixed.load_state_dict(state | {"vector_in.out_layer.bias": bias + constant}, assign=True)
    return fixed.eval().requires_grad_(False)


def add_redux(flux: Flux, source: str | Path, image_encoder: str | Path | None = None) -> Flux:
    """The model with Redux: it then reads pictures as it reads text (`redux`, `redux_prompt`). Seam: model -> model.

    source: "redux", a Hub id, Redux's folder, or its file `flux1-redux-dev.safetensors`. image_encoder: a folder with SigLIP's
    vision tower; by default the one in the source, else google/siglip-so400m-patch14-384 from the local cache.

    Raises FileNotFoundError for what is not there, ValueError for what is not Redux or does not fit this model."""
    path = find_source(source)
    embedder, = [path] if path.is_file() else find_part(path, "image_embedder")[:1] or [None]
    if embedder is None:
        raise ValueError(f"{path} holds no Redux: it has no folder image_embedder/ and no file flux1-redux-dev.safetensors")
    beside = path / "image_encoder" if path.is_dir() else path.parent / "image_encoder"
    encoder = Path(image_encoder).expanduser() if image_encoder else beside if beside.is_dir() else find_in_cache(IMAGE_ENCODER)
    if encoder is None or not encoder.is_dir():
        raise FileNotFoundError(f"Redux reads pictures through SigLIP, which is neither in {beside} nor in {cache_folder()}: give "
                                f"the folder of {IMAGE_ENCODER} as image_encoder=")
    weight = flux.mmdit.img_in.weight
    siglip = layouts.load_siglip(encoder, weight.device, weight.dtype)
    redux = layouts.load_redux(embedder, weight.device, weight.dtype)
    have = siglip.config.hidden_size, redux.config.txt_in_features
    if have != (need := (redux.config.redux_dim, flux.mmdit.config.context_in_dim)):
        raise ValueError(f"{embedder} does not fit: SigLIP's tokens and Redux's are {have[0]} and {have[1]} wide, expected "
                         f"{need[0]} and {need[1]}")
    return replace(flux, siglip=siglip, redux=redux)


def find_part(folder: Path, part: str) -> list[Path]:
    """The files, or the folder, of a part; none if it is not there."""
    for pattern in PARTS[part]:
        found = sorted(folder.glob(pattern))
        if part == "transformer":                           # Redux's file has the name of one
            found = [path for path in found if not path.name.startswith("flux1-redux")]
        if found:
            return found
    return []


def find_parts(folder: Path, transformer: Path | None = None) -> dict[str, Path]:
    """Where each part of a model lies: {part name of the diffusers layout: folder or file}; `transformer` replaces one."""
    index = folder / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    if name is not None and not str(name).startswith("Flux"):
        raise ValueError(f"{index} describes a {name!r:.60}, expected a FluxPipeline")
    files = {}
    for part in PARTS:
        found = find_part(folder, part)
        if found:
            files[part] = found[0] if found[0].parent == folder else found[0].parent
        if part == "transformer" and len(found) > 1 and found[0].parent == folder and transformer is None:
            raise ValueError(f"{folder} has the transformers {listing([path.name for path in found])}: choose with transformer=")
    if transformer is not None:
        files["transformer"] = transformer
    if "transformer" not in files:
        what = "is incomplete: it has a model_index.json, but not the" if index.is_file() else "holds no FLUX.1 model: it has no"
        raise ValueError(f"{folder} {what} folder transformer/ (diffusers layout) or file flux1-*.safetensors (original layout)")
    return with_cached_encoders(files)


def find_parts_in_file(path: Path, transformer: Path | None = None) -> dict[str, Path]:
    """The same for a single file that holds a whole model, as ComfyUI's do."""
    names = read_header(path)[0] if path.suffix == ".safetensors" else ()
    files = {part: path for part, prefix in layouts.PREFIXES.items() if any(name.startswith(prefix) for name in names)}
    if not {"transformer", "vae"} <= set(files):
        raise ValueError(f"{path} is a file without a whole model: load a folder, and give a single file as transformer=")
    return with_cached_encoders(files | ({"transformer": transformer} if transformer else {}))


def with_cached_encoders(files: dict[str, Path]) -> dict[str, Path]:
    """What an original layout lacks, from the cache: tokenizers, and text encoders."""
    if files["transformer"].is_file():
        for suffix, repo in TEXT_ENCODERS.items():
            if snapshot := find_in_cache(repo):
                files.setdefault("tokenizer" + suffix, snapshot)
                if any(path.suffix in (".safetensors", *PICKLES) for path in snapshot.iterdir()):
                    files.setdefault("text_encoder" + suffix, snapshot)
    return files


def read_config(name: str, folder: Path, mmdit: MMDiT, t5_tokenizer: T5Tokenizer | None, own_schedule: bool) -> FluxConfig:
    """The bundle's settings from the folder's small JSON files; without them, from whether there is a guidance embedding.
    own_schedule: whether the transformer is the one that the folder's schedule was made for."""
    guided = mmdit.config.guidance_embed
    # Note: schnell was trained with 256 tokens, though its tokenizer would allow 512.
    tokens = min(512 if guided else 256, t5_tokenizer.max_length if t5_tokenizer else 512)
    config = FluxConfig(name=Path(name).name, max_text_tokens=tokens, dynamic_shift=guided)
    scheduler, vae = folder / "scheduler" / "scheduler_config.json", folder / "vae" / "config.json"
    if scheduler.is_file() and own_schedule:
        values = {"use_dynamic_shifting": False} | read_json(scheduler)
        read = pick(FluxConfig, values, dict(dynamic_shift="use_dynamic_shifting", shift="shift"), scheduler)
        config = replace(config, dynamic_shift=read.dynamic_shift, shift=read.shift)
    if vae.is_file():
        config = replace(config, size=pick(FluxConfig, read_json(vae), dict(size="sample_size"), vae).size)
    return config


def check_fit(flux: Flux, folder: Path) -> None:
    """Refuses parts that do not belong together: widths that differ, tokens that a text encoder does not know."""
    sizes, clip, t5, vae = flux.mmdit.config, flux.clip and flux.clip.config, flux.t5 and flux.t5.config, flux.autoencoder
    facts = []
    if clip:
        facts.append(("CLIP's width", clip.hidden_size, [sizes.vec_in_dim]))
    if t5:
        facts.append(("T5's width", t5.d_model, [sizes.context_in_dim]))
    if vae:
        facts.append(("the autoencoder's latent channels x 4", 4 * vae.config.z_channels, [sizes.out_channels]))
    if clip and flux.clip_tokenizer:
        facts.append(("CLIP's largest token", max(flux.clip_tokenizer.vocab.values()), range(clip.vocab_size)))
        facts.append(("CLIP's number of tokens", flux.clip_tokenizer.max_length, range(clip.max_position_embeddings + 1)))
    if t5 and flux.t5_tokenizer:
        largest = max([len(flux.t5_tokenizer.pieces) - 1, *flux.t5_tokenizer.special.values()])
        facts.append(("T5's largest token", largest, range(t5.vocab_size)))
    for what, have, allowed in facts:
        if have not in allowed:
            raise ValueError(f"the parts of {folder} do not belong together: {what} is {have}, expected "
                             + ("at most " if len(allowed) > 1 else "") + str(allowed[-1]))


def list_models() -> list[str]:
    """One line a model: what is shipped, with the adapters, and which official models are in the local cache."""
    lines = [f"{name:15} shipped" for name in shipped_models()]
    lines += [f"{name:15} shipped, a {what}" for name, what in shipped_adapters().items()]
    for name, repo in OFFICIAL.items():
        found = find_in_cache(repo)
        lines.append(f"{name:15} {repo}: " + (f"{found}" if found else f"not in {cache_folder()}"))
    return lines
