"""Files and folders -> networks: which file holds what, in which layout, with which sizes.

    original layout     flux1-*.safetensors, ae.safetensors             (text encoders come from elsewhere)
    diffusers layout    model_index.json, transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/

Sizes come from a config.json where there is one, else from the shapes of the tensors, never from a name. Networks are
built on the meta device, which allocates nothing, and then take the tensors of the file as their own, strictly: a missing
or unexpected tensor, or a wrong shape, is an error.
"""

from dataclasses import fields
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..networks.autoencoder import Autoencoder, AutoencoderConfig
from ..networks.clip import CLIPConfig, CLIPText
from ..networks.mmdit import MMDiT, MMDiTConfig
from ..networks.t5 import T5, T5Config
from .formats import listing, read_json, read_safetensors, read_sharded
from .names import autoencoder_from_diffusers, autoencoder_levels, count, mmdit_from_diffusers

Network = TypeVar("Network", bound=nn.Module)
State = dict[str, Tensor]

COMFYUI_PREFIX = "model.diffusion_model."


def build(kind: type[Network], config, state: State, source: Path, device: torch.device | str, dtype: torch.dtype | None) -> Network:
    """kind(config) with the tensors of `state`, each converted and moved on its own (empties `state`)."""
    with torch.device("meta"):
        network = kind(config)
    expected = network.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    if missing or unexpected:
        raise ValueError(f"{source} is not a {kind.__name__} of these sizes: "
                         + "; ".join(f"{what} {listing(names)}" for what, names in
                                     (("missing", missing), ("unexpected", unexpected)) if names))
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise ValueError(f"{source}: {name} has the shape {list(state[name].shape)}, expected {list(tensor.shape)}")
    for name in expected:
        module, _, attribute = name.rpartition(".")
        tensor = state.pop(name).to(device=device, dtype=dtype)
        setattr(network.get_submodule(module), attribute, nn.Parameter(tensor, requires_grad=False))
    return network.eval()


def pick(kind: type, values: dict, names: dict[str, str], source: Path):
    """A config from JSON: names[our field] = their key; a key that is absent keeps our default."""
    known = {field.name: field.type for field in fields(kind)}
    chosen = {ours: values[theirs] for ours, theirs in names.items() if values.get(theirs) is not None}
    chosen = {k: tuple(v) if isinstance(v, list) else v for k, v in chosen.items()}
    try:
        if any(isinstance(v, (int, float)) and not isinstance(v, bool) and v <= 0 and k not in ("shift_factor",) for k, v in chosen.items()):
            raise ValueError("sizes must be positive")
        return kind(**{k: v for k, v in chosen.items() if k in known})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from None


def check_class(config: dict, expected: tuple[str, ...], source: Path) -> None:
    """Refuses the folder of another model by the class its config.json names."""
    found = config.get("_class_name") or next(iter(config.get("architectures") or []), None)
    if found is not None and found not in expected:
        raise ValueError(f"{source} describes a {found}, expected a {expected[0]}")


def load_mmdit(path: Path, device="cpu", dtype=None) -> MMDiT:
    """The transformer from a folder `transformer/` or from a single file (original or diffusers names, bare or with the
    ComfyUI prefix)."""
    if path.is_dir():
        values = read_json(path / "config.json")
        check_class(values, ("FluxTransformer2DModel",), path / "config.json")
        state = mmdit_from_diffusers(read_sharded(path, "diffusion_pytorch_model"))
        return build(MMDiT, mmdit_config(values, state, path), state, path, device, dtype)
    state = read_safetensors(path)
    if any(name.startswith(COMFYUI_PREFIX) for name in state):
        state = {k.removeprefix(COMFYUI_PREFIX): v for k, v in state.items() if k.startswith(COMFYUI_PREFIX)}
    if "x_embedder.weight" in state:
        state = mmdit_from_diffusers(state)
    return build(MMDiT, mmdit_config_from_tensors(state, path), state, path, device, dtype)


def mmdit_config(values: dict, state: State, source: Path) -> MMDiTConfig:
    """Sizes from a `FluxTransformer2DModel` config; what it leaves out has diffusers' defaults."""
    heads, head_dim = values.get("num_attention_heads", 24), values.get("attention_head_dim", 128)
    try:
        values = values | {"hidden_size": heads * head_dim,
                           "out_channels": values.get("out_channels") or values.get("in_channels", 64)}
    except TypeError:
        raise ValueError(f"{source}: the config's attention sizes are {heads!r} and {head_dim!r}, expected numbers") from None
    names = dict(in_channels="in_channels", out_channels="out_channels", vec_in_dim="pooled_projection_dim",
                 context_in_dim="joint_attention_dim", hidden_size="hidden_size", num_heads="num_attention_heads",
                 depth="num_layers", depth_single_blocks="num_single_layers", axes_dim="axes_dims_rope")
    # Note: diffusers' own default for the missing key guidance_embeds is false, ours (dev) is true.
    values["guidance"] = bool(values.get("guidance_embeds", False))
    return pick(MMDiTConfig, values, names | {"guidance_embed": "guidance"}, source)


def mmdit_config_from_tensors(state: State, source: Path) -> MMDiTConfig:
    """Sizes from the shapes of an original checkpoint's tensors."""
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight",
              "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_mlp.0.weight")
    if missing := [name for name in needed if name not in state or state[name].ndim == 0]:
        raise ValueError(f"{source} is not a FLUX transformer: it lacks {listing(missing)}")
    img_in, txt_in, vec_in, out, scale, mlp = (state[name] for name in needed)
    hidden, head_dim = img_in.shape[0], scale.shape[0]
    return MMDiTConfig(
        in_channels=img_in.shape[-1], out_channels=out.shape[0], vec_in_dim=vec_in.shape[-1], context_in_dim=txt_in.shape[-1],
        hidden_size=hidden, mlp_ratio=mlp.shape[0] / hidden, num_heads=hidden // max(head_dim, 1),
        depth=count(set(state), "double_blocks"), depth_single_blocks=count(set(state), "single_blocks"),
        axes_dim=(head_dim - 2 * (head_dim * 7 // 16), head_dim * 7 // 16, head_dim * 7 // 16),
        guidance_embed="guidance_in.in_layer.weight" in state)


def load_autoencoder(path: Path, device="cpu", dtype=None) -> Autoencoder:
    """The autoencoder from a folder `vae/` or from a single file such as `ae.safetensors`."""
    if path.is_dir():
        values = read_json(path / "config.json")
        check_class(values, ("AutoencoderKL",), path / "config.json")
        widths = values.get("block_out_channels") or [128, 256, 512, 512]
        if not all(isinstance(w, int) and w > 0 and w % widths[0] == 0 for w in widths):
            raise ValueError(f"{path}: block_out_channels are {widths}, expected multiples of the first")
        values |= {"ch": widths[0], "ch_mult": [w // widths[0] for w in widths]}
        names = dict(ch="ch", ch_mult="ch_mult", num_res_blocks="layers_per_block", z_channels="latent_channels",
                     num_groups="norm_num_groups", scale_factor="scaling_factor", shift_factor="shift_factor")
        config = pick(AutoencoderConfig, values, names, path)
        return build(Autoencoder, config, autoencoder_from_diffusers(read_sharded(path, "diffusion_pytorch_model")), path, device, dtype)
    state = read_safetensors(path)
    if "encoder.conv_norm_out.weight" in state:
        state = autoencoder_from_diffusers(state)
    levels, blocks = autoencoder_levels(set(state))
    try:
        ch = state["encoder.conv_in.weight"].shape[0]
        widths = [state[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)]
        config = AutoencoderConfig(ch=ch, ch_mult=tuple(w // ch for w in widths), num_res_blocks=blocks,
                                   z_channels=state["decoder.conv_in.weight"].shape[1])
    except (KeyError, IndexError, ZeroDivisionError) as error:
        raise ValueError(f"{path} is not a FLUX autoencoder: it lacks {error}") from None
    return build(Autoencoder, config, state, path, device, dtype)


def load_clip(path: Path, device="cpu", dtype=None) -> CLIPText:
    """CLIP's text tower from a folder with a config.json, or from a single file such as `clip_l.safetensors`."""
    values = read_json(path / "config.json") if path.is_dir() else {}
    check_class(values, ("CLIPTextModel", "CLIPModel", "CLIPTextModelWithProjection"), path / "config.json")
    state = read_sharded(path, "model") if path.is_dir() else read_safetensors(path)
    # Note: newer transformers leave the prefix out; whole CLIP files bring a vision tower and projections along.
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()
             if k.startswith(("text_model.", "embeddings.", "encoder.", "final_layer_norm.")) and not k.endswith("position_ids")}
    values = values | (values.get("text_config") or {})
    layers, width = count(set(state), "text_model.encoder.layers"), state.get("text_model.final_layer_norm.weight")
    if not layers or width is None:
        raise ValueError(f"{path} holds no CLIP text tower: it lacks text_model.final_layer_norm.weight")
    names = {field.name: field.name for field in fields(CLIPConfig)}
    if not values:                                          # a single file: official head width, sizes from the tensors
        shape = {name: tensor.shape[0] for name, tensor in state.items() if tensor.ndim}
        values = dict(hidden_size=len(width), num_attention_heads=max(len(width) // 64, 1), num_hidden_layers=layers,
                      intermediate_size=shape.get("text_model.encoder.layers.0.mlp.fc1.weight"),
                      vocab_size=shape.get("text_model.embeddings.token_embedding.weight"),
                      max_position_embeddings=shape.get("text_model.embeddings.position_embedding.weight"))
    return build(CLIPText, pick(CLIPConfig, values, names, path), state, path, device, dtype)


def load_t5(path: Path, device="cpu", dtype=None) -> T5:
    """The T5 encoder from a folder with a config.json, or from a single file such as `t5xxl_fp16.safetensors`."""
    values = read_json(path / "config.json") if path.is_dir() else {}
    check_class(values, ("T5EncoderModel", "T5ForConditionalGeneration"), path / "config.json")
    state = read_sharded(path, "model") if path.is_dir() else read_safetensors(path)
    state = {k: v for k, v in state.items() if k.startswith(("shared.", "encoder.")) and k != "encoder.embed_tokens.weight"}
    q, ff, shared = (state.get(k) for k in ("encoder.block.0.layer.0.SelfAttention.q.weight",
                                            "encoder.block.0.layer.1.DenseReluDense.wi_0.weight", "shared.weight"))
    bias = state.get("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
    if any(tensor is None or tensor.ndim != 2 for tensor in (q, ff, shared, bias)):
        raise ValueError(f"{path} is not a gated T5 encoder (v1.1): it lacks shared.weight or the first block's tensors")
    # Note: everything but the bias's reach is in the shapes, and the copies of this config in the wild disagree.
    config = T5Config(d_model=shared.shape[1], d_kv=q.shape[0] // bias.shape[1], d_ff=ff.shape[0], vocab_size=shared.shape[0],
                      num_layers=count(set(state), "encoder.block"), num_heads=bias.shape[1], num_buckets=bias.shape[0],
                      max_distance=values.get("relative_attention_max_distance") or 128)
    return build(T5, config, state, path, device, dtype)
