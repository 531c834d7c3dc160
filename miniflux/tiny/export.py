"""Trained networks -> the diffusers folder layout, with official class names and configs, in bfloat16.

    python -m miniflux.tiny.export tiny-fill --output tiny-fill          a variant as a whole model: its LoRA merged, all parts beside

What is written here, diffusers and transformers load too.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..adapters.ip_adapter import IPAdapter
from ..checkpoints.finding import shipped_models
from ..checkpoints.hub import SHIPPED
from ..checkpoints.names import autoencoder_to_diffusers, mmdit_to_diffusers
from ..cli import Parser
from ..command import command
from ..flux import Flux
from ..loading import load
from ..networks.autoencoder import Autoencoder, AutoencoderConfig
from ..networks.clip import CLIPConfig, CLIPText, CLIPVision, CLIPVisionConfig
from ..networks.controlnet import ControlNet
from ..networks.mmdit import MMDiT, MMDiTConfig
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..networks.t5 import T5, T5Config
from .vocabulary import write_json

PARTS = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"), "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"), "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"), "vae": ("diffusers", "AutoencoderKL"),
}
PIPELINES = {"fill": "FluxFillPipeline", "canny": "FluxControlPipeline", "depth": "FluxControlPipeline", "kontext": "FluxKontextPipeline"}


def mmdit_json(c: MMDiTConfig) -> dict:
    return {"_class_name": "FluxTransformer2DModel", "patch_size": 1, "in_channels": c.in_channels, "out_channels": c.out_channels,
            "num_layers": c.depth, "num_single_layers": c.depth_single_blocks, "attention_head_dim": c.hidden_size // c.num_heads,
            "num_attention_heads": c.num_heads, "joint_attention_dim": c.context_in_dim, "pooled_projection_dim": c.vec_in_dim,
            "guidance_embeds": c.guidance_embed, "axes_dims_rope": list(c.axes_dim)}


def autoencoder_json(c: AutoencoderConfig, sample_size: int) -> dict:
    return {"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [c.ch * m for m in c.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * len(c.ch_mult), "up_block_types": ["UpDecoderBlock2D"] * len(c.ch_mult),
            "in_channels": 3, "out_channels": 3, "latent_channels": c.z_channels, "layers_per_block": c.num_res_blocks,
            "mid_block_add_attention": True, "norm_num_groups": c.num_groups, "sample_size": sample_size, "force_upcast": False,
            "scaling_factor": c.scale_factor, "shift_factor": c.shift_factor, "use_quant_conv": False, "use_post_quant_conv": False}


def clip_json(c: CLIPConfig) -> dict:
    # Note: eos_token_id 2 as in the official file makes transformers pool at the largest id, as FLUX does.
    return {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_act": "quick_gelu", "hidden_size": c.hidden_size,
            "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers, "layer_norm_eps": c.layer_norm_eps,
            "num_attention_heads": c.num_attention_heads, "max_position_embeddings": c.max_position_embeddings,
            "vocab_size": c.vocab_size, "projection_dim": c.hidden_size, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}


def t5_json(c: T5Config) -> dict:
    return {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu", "d_model": c.d_model,
            "d_kv": c.d_kv, "d_ff": c.d_ff, "num_layers": c.num_layers, "num_decoder_layers": c.num_layers, "num_heads": c.num_heads,
            "relative_attention_num_buckets": c.num_buckets, "relative_attention_max_distance": c.max_distance,
            "layer_norm_epsilon": 1e-6, "vocab_size": c.vocab_size, "is_encoder_decoder": False, "dropout_rate": 0.0,
            "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "tie_word_embeddings": False}


def siglip_json(c: SigLIPConfig) -> dict:
    # Note: no head: it would pool the tokens, which Redux takes as they are.
    return {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "hidden_act": c.hidden_act,
            "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads, "num_channels": 3, "image_size": c.image_size, "patch_size": c.patch_size,
            "layer_norm_eps": c.layer_norm_eps, "attention_dropout": 0.0, "vision_use_head": False}


def clip_vision_json(c: CLIPVisionConfig) -> dict:
    return {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model", "hidden_act": c.hidden_act,
            "hidden_size": c.hidden_size, "intermediate_size": c.intermediate_size, "num_hidden_layers": c.num_hidden_layers,
            "num_attention_heads": c.num_attention_heads, "num_channels": 3, "image_size": c.image_size, "patch_size": c.patch_size,
            "projection_dim": c.projection_dim, "layer_norm_eps": c.layer_norm_eps, "attention_dropout": 0.0}


def redux_json(c: ReduxConfig) -> dict:
    return {"_class_name": "ReduxImageEncoder", "redux_dim": c.redux_dim, "txt_in_features": c.txt_in_features}


def write_part(folder: Path, config: dict, stem: str, state: dict[str, Tensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config)
    write_tensors(folder / f"{stem}.safetensors", state)


def write_tensors(path: Path, state: dict[str, Tensor]) -> None:
    partial = path.with_suffix(".part")
    save_file({k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in state.items()}, partial, {"format": "pt"})
    os.replace(partial, path)


def write_autoencoder(folder: Path, network: Autoencoder, sample_size: int = 128) -> None:
    """`vae/`."""
    write_part(folder / "vae", autoencoder_json(network.config, sample_size), "diffusion_pytorch_model",
               autoencoder_to_diffusers(network.state_dict()))


def write_mmdit(folder: Path, network: MMDiT, pipeline: str = "FluxPipeline") -> None:
    """`transformer/`, and the files that make the folder a whole: `scheduler/` and `model_index.json`."""
    write_part(folder / "transformer", mmdit_json(network.config), "diffusion_pytorch_model",
               mmdit_to_diffusers(network.state_dict()))
    guided = network.config.guidance_embed
    (folder / "scheduler").mkdir(exist_ok=True)
    write_json(folder / "scheduler" / "scheduler_config.json",
               {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0 if guided else 1.0,
                "use_dynamic_shifting": guided, "base_shift": 0.5, "max_shift": 1.15,
                "base_image_seq_len": 256, "max_image_seq_len": 4096})
    write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.30.0"} | PARTS)


def write_controlnet(folder: Path, network: ControlNet) -> None:
    """The folder of a `FluxControlNetModel`."""
    config = mmdit_json(network.config) | {"_class_name": "FluxControlNetModel", "num_mode": network.config.modes}
    state = network.state_dict()
    own = {name: value for name, value in state.items() if name.startswith("controlnet_")}
    write_part(folder, {key: value for key, value in config.items() if key != "out_channels"}, "diffusion_pytorch_model",
               mmdit_to_diffusers(state) | own)


def write_text_encoders(folder: Path, clip: CLIPText, t5: T5) -> None:
    """`text_encoder/` and `text_encoder_2/`."""
    write_part(folder / "text_encoder", clip_json(clip.config), "model", clip.state_dict())
    write_part(folder / "text_encoder_2", t5_json(t5.config), "model", t5.state_dict())


def write_redux(folder: Path, siglip: SigLIP, redux: ReduxEmbedder) -> None:
    """`image_encoder/` and `image_embedder/`."""
    write_part(folder / "image_encoder", siglip_json(siglip.config), "model", siglip.state_dict())
    write_part(folder / "image_embedder", redux_json(redux.config), "diffusion_pytorch_model", redux.state_dict())


def write_ip_adapter(folder: Path, clip: CLIPVision, adapter: IPAdapter) -> None:
    """`image_encoder/`, and beside it `ip_adapter.safetensors` with XLabs' names."""
    write_part(folder / "image_encoder", clip_vision_json(clip.config), "model", clip.state_dict())
    state = {f"ip_adapter_proj_model.{name}": value for name, value in adapter.projection.state_dict().items()}
    for name, value in adapter.double_blocks.state_dict().items():               # 0.k_proj.weight
        block, layer, kind = name.split(".")
        state[f"double_blocks.{block}.processor.ip_adapter_double_stream_{layer}.{kind}"] = value
    write_tensors(folder / "ip_adapter.safetensors", state)


def write_model(folder: Path, flux: Flux) -> None:
    """All parts of a shipped model, or of a variant of it, as `load` made it."""
    write_mmdit(folder, flux.mmdit, PIPELINES.get(flux.config.name.rpartition("-")[2], "FluxPipeline"))
    write_autoencoder(folder, flux.autoencoder, flux.config.size)
    write_text_encoders(folder, flux.clip, flux.t5)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(SHIPPED / "tiny" / name, folder / name, dirs_exist_ok=True)   # all have its vocabularies
    if flux.redux:
        write_redux(folder, flux.siglip, flux.redux)


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.export", description="Write a shipped model as a whole folder in the diffusers layout.")
    parser.add_argument("model", choices=list(shipped_models()), help="a shipped name")
    parser.add_argument("--output", type=Path, required=True, help="the folder to write, which must not exist yet (required)")
    args = parser.parse_args(argv)
    try:
        if args.output.exists():
            raise ValueError(f"{args.output} exists already: give another folder")
        write_model(args.output, load(args.model, device="cpu"))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(args.output)


if __name__ == "__main__":
    main()
