"""`load`: finds a FLUX.1 model and assembles it."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch

from .adapters.redux import add_redux
from .checkpoints import layouts
from .checkpoints.building import WithoutInitialisation, pick
from .checkpoints.configs import read_folder_schedule, read_words
from .checkpoints.finding import (
    VARIANT,
    find_part,
    find_parts,
    find_parts_in_file,
    find_source,
    find_transformer,
    shipped_models,
    whole_models,
)
from .checkpoints.formats import concat_on_disk, meta_tensors
from .checkpoints.hub import OFFICIAL, find_in_cache
from .checks import check_number
from .devices import default_dtype, find_device
from .engine.offload import change_networks, offload
from .engine.plan import GIB, first_that_fits
from .files import read_json
from .flux import SCHEDULES, Flux, FluxConfig, Schedule
from .imaging.images import log
from .networks.autoencoder import Autoencoder
from .networks.clip import CLIPText
from .networks.mmdit import MMDiT, MMDiTConfig, timestep_embedding
from .networks.siglip import ReduxEmbedder, SigLIP
from .networks.t5 import T5
from .tokenizers import CLIPTokenizer, T5Tokenizer

# How the official transformers differ from dev's.
CONFIGS = {
    "schnell": dict(guidance_embed=False),
    "fill": dict(in_channels=384),
    "canny": dict(in_channels=128),
    "depth": dict(in_channels=128),
}


def load(source: str | Path = "tiny", *, device: torch.device | str | None = None,
         dtype: torch.dtype | None = None, transformer: str | Path | None = None,
         schedule: str | Schedule | None = None, fit: bool = False) -> Flux:
    """Load a FLUX.1 model.

    source: a shipped name ("tiny"), an official short name ("schnell", "dev", "krea", "fill",
        "canny", "depth", "kontext"; "redux" is dev with `add_redux`), a Hub id, a folder in the
        diffusers or in the original layout, or a single file with a whole model (ComfyUI's).
    device: by default CUDA, then MPS, then the CPU.
    dtype: what is computed in, by default bfloat16 on accelerators, float32 on the CPU. Quantised
        weights stay quantised in memory.
    transformer: a single file (safetensors or GGUF) or a folder, whose transformer replaces the
        source's.
    schedule: "dev", "schnell" or a `Schedule`: how the times are spaced. By default as the source's
        folder asks for, with any transformer; where it asks for nothing, as schnell's for a
        transformer without guidance embedding, else as dev's.
    fit: whether to find out first how much memory is free, and offload the model where it would not
        fit as a whole (`engine/plan.py`).

    Raises FileNotFoundError for what is not there, ValueError for what is not a FLUX.1 model."""
    device = find_device(device)
    dtype = dtype or default_dtype(device)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype is {dtype!r:.60}, "
                         "expected torch.float32, torch.bfloat16 or torch.float16")
    if fit:
        flux = load_fitting(source, device, dtype, transformer)
    else:
        flux = assemble(source, device, dtype, transformer, own_schedule=schedule is None)
    return flux if schedule is None else with_schedule(flux, schedule)


def load_fitting(source: str | Path, device: torch.device, dtype: torch.dtype,
                 transformer: str | Path | None) -> Flux:
    """The model in the first way that fits an image of its size; all give the same image."""
    way = first_that_fits(assemble_meta(source, dtype, transformer), device)
    log.info("%s: %s, about %.1f GiB", source, way.mode, way.device / GIB)
    if way.mode == "whole":
        return assemble(source, device, dtype, transformer)
    # Note: in the files' own dtype, so that the weights stay mapped; a part is converted when it
    # comes to the device.
    with concat_on_disk() if way.mode == "disk" else nullcontext():
        flux = assemble(source, torch.device("cpu"), None, transformer)
    return offload(flux, device, way.mode, dtype=dtype)


def assemble_meta(source: str | Path, dtype: torch.dtype,
                  transformer: str | Path | None = None) -> Flux:
    """The model on the meta device, where its tensors have shapes but no elements.

    An official model that is not on this machine gets its official sizes."""
    missing = (source in OFFICIAL and source not in shipped_models()
               and find_in_cache(OFFICIAL[source]) is None)
    if not missing or transformer is not None:
        with meta_tensors():
            return assemble(source, torch.device("meta"), dtype, transformer)
    with torch.device("meta"), WithoutInitialisation():
        mmdit = MMDiT(MMDiTConfig(**CONFIGS.get(source, {})))
        parts = [CLIPText(), T5(), mmdit, Autoencoder()]
        more = {"siglip": SigLIP(), "redux": ReduxEmbedder()} if source == "redux" else {}
    flux = Flux(None, None, *parts, FluxConfig(name=source), **more)
    return change_networks(flux, lambda network: network.to(dtype))


def with_schedule(flux: Flux, schedule: str | Schedule) -> Flux:
    """The model with another schedule; with schnell's, also with schnell's few steps and tokens."""
    settings = SCHEDULES.get(schedule) if isinstance(schedule, str) else schedule
    if not isinstance(settings, Schedule):
        raise ValueError(f"schedule is {schedule!r:.60}, "
                         f"expected {', '.join(map(repr, SCHEDULES))} or a Schedule")
    guided = flux.mmdit.config.guidance_embed
    few_steps = not guided and not settings.use_dynamic_shifting
    tokens = text_tokens(few_steps, flux.t5_tokenizer)
    return replace(flux, config=replace(flux.config, schedule=settings, few_steps=few_steps,
                                        max_text_tokens=tokens))


def assemble(source: str | Path, device: torch.device, dtype: torch.dtype | None,
             transformer: str | Path | None = None, own_schedule: bool = True) -> Flux:
    """The model of `load`, from its files; with the dtype None, as they hold it.

    own_schedule: whether the folder's schedule is read, and refused if it is not built here."""
    folder = find_source(source)
    if (folder / VARIANT).is_file():
        return assemble_variant(folder, device, dtype, transformer)
    if find_part(folder, "image_embedder") and not find_part(folder, "transformer"):
        return add_redux(assemble("dev", device, dtype, transformer, own_schedule), folder)
    override = None if transformer is None else find_transformer(transformer)
    files = (find_parts if folder.is_dir() else find_parts_in_file)(folder, override)

    def part(name: str, loader):
        return loader(files[name], device, dtype) if name in files else None

    def tokenizer(name: str, kind: type):
        return kind.from_folder(files[name]) if name in files else None

    flux = Flux(
        clip_tokenizer=tokenizer("tokenizer", CLIPTokenizer),
        t5_tokenizer=tokenizer("tokenizer_2", T5Tokenizer),
        clip=part("text_encoder", layouts.load_clip),
        t5=part("text_encoder_2", layouts.load_t5),
        mmdit=part("transformer", layouts.load_mmdit),
        autoencoder=part("vae", layouts.load_autoencoder),
        config=FluxConfig(name=Path(source).name))
    flux = replace(flux, config=read_config(flux, folder, override is not None, own_schedule))
    check_fit(flux, folder)
    return add_redux(flux, folder) if "image_embedder" in files else flux


def assemble_variant(folder: Path, device: torch.device, dtype: torch.dtype | None,
                     transformer: str | Path | None) -> Flux:
    """A shipped model with Redux, where this folder holds that; else with the folder's LoRA fused.

    The LoRA may widen the first layer. Where `variant.json` gives the guidance with which the model
    was distilled to need few steps, the guidance embedding is taken away."""
    from .adapters.lora import fuse_lora

    described = read_json(folder / VARIANT)
    base, guidance = described.get("base"), described.get("guidance")
    if base not in whole_models():
        raise ValueError(f"{folder / VARIANT} names the base {base!r:.60}: "
                         "expected a shipped model such as tiny")
    flux = assemble(base, device, dtype, transformer)
    if find_part(folder, "image_embedder"):
        flux = add_redux(flux, folder)
    else:
        flux = fuse_lora(flux, folder / "lora.safetensors")
    config = replace(flux.config, name=folder.name)
    if guidance is None:
        return replace(flux, config=config)
    check_number(f"the guidance in {folder / VARIANT}", guidance, 0, 1000)
    config = replace(config, schedule=SCHEDULES["schnell"], few_steps=True)
    return replace(flux, mmdit=without_guidance(flux.mmdit, guidance), config=config)


@torch.no_grad()
def without_guidance(mmdit: MMDiT, guidance: float) -> MMDiT:
    """The transformer that always computes what this one computes with that guidance: the constant
    part of time_in(t) + guidance_in(g) + vector_in(p) moves into the last bias."""
    with torch.device("meta"):
        fixed = MMDiT(replace(mmdit.config, guidance_embed=False))
    bias = mmdit.vector_in.out_layer.bias
    constant = mmdit.guidance_in(timestep_embedding(bias.new_tensor([guidance])))[0]
    state = {name: value for name, value in mmdit.state_dict().items()
             if not name.startswith("guidance_in.")}
    fixed.load_state_dict(state | {"vector_in.out_layer.bias": bias + constant}, assign=True)
    return fixed.eval().requires_grad_(False)


def read_config(flux: Flux, folder: Path, replaced: bool, own_schedule: bool) -> FluxConfig:
    """The bundle's settings from the folder's small JSON files.

    replaced: whether the transformer is another one than the folder's. It keeps the folder's
        schedule all the same, as in diffusers: one without guidance embedding may be a de-distilled
        dev. Only a transformer with guidance embedding does not take schnell's schedule.
    own_schedule: whether the folder's schedule is read."""
    guided = flux.mmdit.config.guidance_embed
    settings = SCHEDULES["dev" if guided else "schnell"]
    own = read_folder_schedule(folder) if own_schedule else None
    if own is not None:
        if own.use_dynamic_shifting or not (replaced and guided):
            settings = own
        if replaced and not guided and own.use_dynamic_shifting:
            log.info("a transformer without guidance embedding with the schedule of %s: "
                     'if it is a schnell, load it with schedule="schnell"', folder.name)
    few_steps = not guided and not settings.use_dynamic_shifting
    config = replace(flux.config, schedule=settings, few_steps=few_steps,
                     max_text_tokens=text_tokens(few_steps, flux.t5_tokenizer))
    vae = folder / "vae" / "config.json"
    if vae.is_file():
        size = pick(FluxConfig, read_json(vae), {"size": "sample_size"}, vae).size
        config = replace(config, size=size)
    return replace(config, words=read_words(folder))


def text_tokens(few_steps: bool, tokenizer: T5Tokenizer | None) -> int:
    """How many T5 tokens the model was trained with."""
    # Note: schnell was trained with 256 tokens, though its tokenizer would allow 512.
    return min(256 if few_steps else 512, tokenizer.max_length if tokenizer else 512)


def check_fit(flux: Flux, folder: Path) -> None:
    """Refuses parts that do not belong together: widths that differ, tokens that a text encoder
    lacks."""
    sizes = flux.mmdit.config
    facts = []                                              # (what, its value, the allowed ones)
    if flux.clip:
        clip = flux.clip.config
        facts.append(("CLIP's width", clip.hidden_size, [sizes.vec_in_dim]))
        if flux.clip_tokenizer:
            largest = max(flux.clip_tokenizer.vocab.values())
            facts.append(("CLIP's largest token", largest, range(clip.vocab_size)))
            facts.append(("CLIP's number of tokens", flux.clip_tokenizer.max_length,
                          range(clip.max_position_embeddings + 1)))
    if flux.t5:
        t5 = flux.t5.config
        facts.append(("T5's width", t5.d_model, [sizes.context_in_dim]))
        if flux.t5_tokenizer:
            special = flux.t5_tokenizer.special.values()
            largest = max([len(flux.t5_tokenizer.pieces) - 1, *special])
            facts.append(("T5's largest token", largest, range(t5.vocab_size)))
    if flux.autoencoder:
        channels = 4 * flux.autoencoder.config.z_channels
        facts.append(("the autoencoder's latent channels x 4", channels, [sizes.out_channels]))
    for what, have, allowed in facts:
        if have not in allowed:
            at_most = "at most " if len(allowed) > 1 else ""
            raise ValueError(f"the parts of {folder} do not belong together: {what} is {have}, "
                             f"expected {at_most}{allowed[-1]}")
