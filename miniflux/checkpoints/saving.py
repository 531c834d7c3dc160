"""Networks -> the folder of a pipeline in the diffusers layout, which diffusers and transformers
load too.

    save(load("dev", transformer="mine.safetensors"), "mine")
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import atomic_write
from ..flux import SCHEDULES, Flux, Schedule
from ..networks.autoencoder import Autoencoder, AutoencoderConfig
from ..networks.clip import CLIPConfig, CLIPText
from ..networks.controlnet import ControlNet
from ..networks.mmdit import MMDiT, MMDiTConfig
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..networks.t5 import T5, T5Config
from ..tokenizers.saving import write_clip_tokenizer, write_t5_tokenizer
from .building import WithoutInitialisation
from .configs import SCHEDULER_CLASS, SPACINGS, WORD_LIST
from .formats import listing
from .names import autoencoder_to_diffusers, mmdit_to_diffusers

# Part of a pipeline -> the library and the class that read it.
PARTS = {
    "scheduler": ("diffusers", SCHEDULER_CLASS),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}
PIPELINES = {"fill": "FluxFillPipeline", "canny": "FluxControlPipeline",
             "depth": "FluxControlPipeline", "kontext": "FluxKontextPipeline"}


def save(flux: Flux, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write a model as a folder that `load` and diffusers read.

    folder: made where it is not there; files of the same names are replaced, each at once.
    dtype: of the weights in the files; by default that of the weights in memory.

    Parts that the model lacks are left out; LoRAs are written as they are merged. Raises ValueError
    for a network that has been changed otherwise (quantised, with unmerged LoRAs, ...)."""
    folder = Path(folder)
    networks = [flux.mmdit, flux.autoencoder, flux.clip, flux.t5, flux.siglip, flux.redux]
    for network in networks:
        if network is not None:
            check_plain(network)
    write_mmdit(folder, flux.mmdit, pipeline_of(flux), flux.config.schedule, dtype)
    if flux.autoencoder is not None:
        write_autoencoder(folder, flux.autoencoder, flux.config.size, dtype)
    if flux.clip is not None and flux.t5 is not None:
        write_text_encoders(folder, flux.clip, flux.t5, dtype)
    if flux.clip_tokenizer is not None:
        write_clip_tokenizer(folder / "tokenizer", flux.clip_tokenizer)
    if flux.t5_tokenizer is not None:
        write_t5_tokenizer(folder / "tokenizer_2", flux.t5_tokenizer)
    if flux.redux is not None and flux.siglip is not None:
        write_redux(folder, flux.siglip, flux.redux, dtype)
    if flux.config.words is not None:
        write_json(folder / WORD_LIST, {"words": sorted(flux.config.words)})
    present = {part: kind if (folder / part).is_dir() else (None, None)
               for part, kind in PARTS.items()}
    write_json(folder / "model_index.json", model_index(pipeline_of(flux), present))


def model_index(pipeline: str, parts: dict) -> dict:
    return {"_class_name": pipeline, "_diffusers_version": "0.30.0"} | parts


def pipeline_of(flux: Flux) -> str:
    """The diffusers class for a model.

    Note: Kontext's transformer has dev's shape; only the model's name tells them apart."""
    return PIPELINES.get(flux.config.name.rpartition("-")[2], "FluxPipeline")


def check_plain(network: nn.Module) -> None:
    """Refuses a network whose weights are not those that its class has."""
    with torch.device("meta"), WithoutInitialisation():
        expected = type(network)(network.config).state_dict().keys()
    if changed := sorted(network.state_dict().keys() ^ expected):
        raise ValueError(f"the {type(network).__name__} has been changed ({listing(changed)}): "
                         "save the model as it was before quantize() or unmerged LoRAs")


# --------------------------------------------------------------------------------------- the parts


def write_json(path: Path, content: dict) -> None:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def write_tensors(path: Path, state: dict[str, Tensor], dtype: torch.dtype | None = None) -> None:
    """A safetensors file, in this dtype or as the tensors are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in state.items()}
    with atomic_write(path) as partial:
        save_file(tensors, partial, {"format": "pt"})


def write_part(folder: Path, config: dict, stem: str, state: dict[str, Tensor],
               dtype: torch.dtype | None = None) -> None:
    """A folder with a config.json and the weights."""
    write_json(folder / "config.json", config)
    write_tensors(folder / f"{stem}.safetensors", state, dtype)


def write_mmdit(folder: Path, network: MMDiT, pipeline: str = "FluxPipeline",
                schedule: Schedule | None = None, dtype: torch.dtype | None = None) -> None:
    """`transformer/`, and what makes the folder a whole: `scheduler/` and `model_index.json`."""
    write_part(folder / "transformer", mmdit_json(network.config), "diffusion_pytorch_model",
               mmdit_to_diffusers(network.state_dict()), dtype)
    schedule = schedule or SCHEDULES["dev" if network.config.guidance_embed else "schnell"]
    write_json(folder / "scheduler" / "scheduler_config.json", schedule_json(schedule))
    write_json(folder / "model_index.json", model_index(pipeline, PARTS))


def write_autoencoder(folder: Path, network: Autoencoder, sample_size: int = 128,
                      dtype: torch.dtype | None = None) -> None:
    """`vae/`."""
    write_part(folder / "vae", autoencoder_json(network.config, sample_size),
               "diffusion_pytorch_model", autoencoder_to_diffusers(network.state_dict()), dtype)


def write_controlnet(folder: Path, network: ControlNet, dtype: torch.dtype | None = None) -> None:
    """The folder of a `FluxControlNetModel`."""
    config = mmdit_json(network.config)
    config |= {"_class_name": "FluxControlNetModel", "num_mode": network.config.modes}
    del config["out_channels"]
    state = network.state_dict()
    own = {name: value for name, value in state.items() if name.startswith("controlnet_")}
    write_part(folder, config, "diffusion_pytorch_model", mmdit_to_diffusers(state) | own, dtype)


def write_text_encoders(folder: Path, clip: CLIPText, t5: T5,
                        dtype: torch.dtype | None = None) -> None:
    """`text_encoder/` and `text_encoder_2/`."""
    write_part(folder / "text_encoder", clip_json(clip.config), "model", clip.state_dict(), dtype)
    write_part(folder / "text_encoder_2", t5_json(t5.config), "model", t5.state_dict(), dtype)


def write_redux(folder: Path, siglip: SigLIP, redux: ReduxEmbedder,
                dtype: torch.dtype | None = None) -> None:
    """`image_encoder/` and `image_embedder/`."""
    write_part(folder / "image_encoder", siglip_json(siglip.config), "model",
               siglip.state_dict(), dtype)
    write_part(folder / "image_embedder", redux_json(redux.config), "diffusion_pytorch_model",
               redux.state_dict(), dtype)


# ------------------------------------------------------------------------------------- the configs


def schedule_json(schedule: Schedule) -> dict:
    values = asdict(schedule)
    spacing = values.pop("spacing")
    flags = {key: True for key, name in SPACINGS.items() if name == spacing}
    return {"_class_name": SCHEDULER_CLASS, "num_train_timesteps": 1000} | values | flags


def mmdit_json(c: MMDiTConfig) -> dict:
    return {"_class_name": "FluxTransformer2DModel", "patch_size": 1,
            "in_channels": c.in_channels, "out_channels": c.out_channels,
            "num_layers": c.depth, "num_single_layers": c.depth_single_blocks,
            "attention_head_dim": c.hidden_size // c.num_heads,
            "num_attention_heads": c.num_heads, "joint_attention_dim": c.context_in_dim,
            "pooled_projection_dim": c.vec_in_dim, "guidance_embeds": c.guidance_embed,
            "axes_dims_rope": list(c.axes_dim)}


def autoencoder_json(c: AutoencoderConfig, sample_size: int) -> dict:
    levels = len(c.ch_mult)
    return {"_class_name": "AutoencoderKL", "act_fn": "silu",
            "block_out_channels": [c.ch * multiple for multiple in c.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "in_channels": 3, "out_channels": 3, "latent_channels": c.z_channels,
            "layers_per_block": c.num_res_blocks, "mid_block_add_attention": True,
            "norm_num_groups": c.num_groups, "sample_size": sample_size, "force_upcast": False,
            "scaling_factor": c.scale_factor, "shift_factor": c.shift_factor,
            "use_quant_conv": False, "use_post_quant_conv": False}


def clip_json(c: CLIPConfig) -> dict:
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model",
            "projection_dim": c.hidden_size, "bos_token_id": 0, "pad_token_id": 1} | asdict(c)


def t5_json(c: T5Config) -> dict:
    return {"architectures": ["T5EncoderModel"], "model_type": "t5",
            "feed_forward_proj": "gated-gelu", "d_model": c.d_model, "d_kv": c.d_kv,
            "d_ff": c.d_ff, "num_layers": c.num_layers, "num_decoder_layers": c.num_layers,
            "num_heads": c.num_heads, "relative_attention_num_buckets": c.num_buckets,
            "relative_attention_max_distance": c.max_distance, "layer_norm_epsilon": 1e-6,
            "vocab_size": c.vocab_size, "is_encoder_decoder": False, "dropout_rate": 0.0,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0,
            "tie_word_embeddings": False}


def siglip_json(c: SigLIPConfig) -> dict:
    # Note: no head: it would pool the tokens, which Redux takes as they are.
    return {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
            "num_channels": 3, "attention_dropout": 0.0, "vision_use_head": False} | asdict(c)


def redux_json(c: ReduxConfig) -> dict:
    return {"_class_name": "ReduxImageEncoder", "redux_dim": c.redux_dim,
            "txt_in_features": c.txt_in_features}
