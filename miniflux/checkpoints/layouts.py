"""Files and folders -> networks: which file holds what, in which layout, with which sizes.

    original layout     flux1-*.safetensors, ae.safetensors             (text encoders come from elsewhere)
    diffusers layout    model_index.json, transformer/, vae/, text_encoder/, text_encoder_2/, tokenizer/, tokenizer_2/

Sizes come from a config.json where there is one, else from the shapes of the tensors, never from a name.
"""

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

from ..networks.autoencoder import Autoencoder, AutoencoderConfig
from ..networks.clip import CLIPConfig, CLIPText, CLIPVision, CLIPVisionConfig
from ..networks.controlnet import ControlNet, ControlNetConfig
from ..networks.mmdit import MMDiT, MMDiTConfig
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..networks.t5 import T5, T5Config
from .building import build, check_class, pick
from .formats import listing, read_header, read_json, read_safetensors, read_sharded
from .gguf import gguf_names, read_gguf
from .hub import find_file
from .names import (
    autoencoder_from_diffusers,
    autoencoder_levels,
    controlnet_from_any,
    count,
    is_joined,
    mmdit_from_diffusers,
    t5_from_gguf,
    without_prefix,
)
from .packed import State, pack_state

CLIP_VISION = "openai/clip-vit-large-patch14"


def read_file(path: Path, part: str, apart: Callable[[str], bool] = lambda name: False) -> State:
    """The tensors of a part from a safetensors or GGUF file that holds it alone or among others.
    Quantised ones are packed."""
    if path.suffix == ".gguf":
        return without_prefix(read_gguf(path), part)
    return pack_state(without_prefix(read_safetensors(path, apart), part), path)


def read_folder(path: Path, part: str, stem: str,
                apart: Callable[[str], bool] = lambda name: False) -> State:
    """The tensors of a part from its folder. Quantised ones are packed."""
    return pack_state(without_prefix(read_sharded(path, stem, apart), part), path)


def tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors, from its header."""
    return gguf_names(path) if path.suffix == ".gguf" else list(read_header(path)[0])


def load_mmdit(path: Path, device="cpu", dtype=None) -> MMDiT:
    """The transformer from a folder `transformer/` or from a single file (safetensors or GGUF, original or diffusers names, bare or
    with ComfyUI's prefix)."""
    if path.is_dir():
        config = mmdit_config(read_json(path / "config.json"), path / "config.json")
        state = mmdit_from_diffusers(read_folder(path, "transformer", "diffusion_pytorch_model", is_joined))
        return build(MMDiT, config, state, path, device, dtype)
    state = read_file(path, "transformer", is_joined)
    if "x_embedder.weight" in state:
        state = mmdit_from_diffusers(state)
    return build(MMDiT, mmdit_config_from_tensors(state, path), state, path, device, dtype)


MMDIT_FIELDS = {"in_channels": "in_channels", "out_channels": "out_channels", "vec_in_dim": "pooled_projection_dim",
                "context_in_dim": "joint_attention_dim", "hidden_size": "hidden_size", "num_heads": "num_attention_heads",
                "depth": "num_layers", "depth_single_blocks": "num_single_layers", "axes_dim": "axes_dims_rope",
                "guidance_embed": "guidance_embeds"}


def mmdit_config(values: dict, source: Path) -> MMDiTConfig:
    """Sizes from a `FluxTransformer2DModel` config; what it leaves out has diffusers' defaults, which are dev's."""
    check_class(values, ("FluxTransformer2DModel",), source)
    return pick(MMDiTConfig, mmdit_values(values, source), MMDIT_FIELDS, source)


def mmdit_values(values: dict, source: Path) -> dict:
    """The config with what diffusers derives from it."""
    heads, head_dim = values.get("num_attention_heads", 24), values.get("attention_head_dim", 128)
    if type(heads) is not int or type(head_dim) is not int:
        raise ValueError(f"{source}: the attention's sizes are {heads!r:.30} and {head_dim!r:.30}, expected whole numbers")
    # Note: two defaults that are not dev's: no guidance_embeds means false, no out_channels as many as in_channels.
    return {"guidance_embeds": False} | values | {
        "hidden_size": heads * head_dim, "out_channels": values.get("out_channels") or values.get("in_channels", 64)}


def mmdit_config_from_tensors(state: State, source: Path) -> MMDiTConfig:
    """Sizes from the shapes of an original checkpoint's tensors."""
    sizes, out = mmdit_sizes(state, source), state.get("final_layer.linear.weight")
    if out is None or out.ndim == 0 or 0 in out.shape:
        raise ValueError(f"{source} is not a FLUX transformer: it lacks final_layer.linear.weight")
    return MMDiTConfig(out_channels=len(out), **sizes)


def mmdit_sizes(state: State, source: Path) -> dict:
    """Sizes of a transformer, or of its copy in a ControlNet, from the shapes of its tensors under their original names."""
    needed = ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight",
              "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_mlp.0.weight")
    if missing := [name for name in needed if name not in state or 0 in state[name].shape or state[name].ndim == 0]:
        raise ValueError(f"{source} is not a FLUX transformer: it lacks {listing(missing)}")
    img_in, txt_in, vec_in, scale, mlp = (state[name] for name in needed)
    hidden, head_dim = len(img_in), len(scale)
    if hidden % head_dim or head_dim % 2:
        raise ValueError(f"{source}: {hidden} channels cannot be heads of {head_dim} each, expected an even divisor")
    # Note: how a head is shared among the axes is not in the shapes: as in all official models, 1/8, 7/16, 7/16 of it.
    side = 2 * (head_dim * 7 // 32)
    return {"in_channels": img_in.shape[-1], "vec_in_dim": vec_in.shape[-1], "context_in_dim": txt_in.shape[-1],
            "hidden_size": hidden, "num_heads": hidden // head_dim, "mlp_ratio": len(mlp) / hidden,
            "depth": count(set(state), "double_blocks"), "depth_single_blocks": count(set(state), "single_blocks"),
            "axes_dim": (head_dim - 2 * side, side, side), "guidance_embed": "guidance_in.in_layer.weight" in state}


def load_controlnet(path: Path, device="cpu", dtype=None) -> ControlNet:
    """A ControlNet from a folder with a config.json, or from a single file (InstantX's or XLabs' names)."""
    if (source := path / "config.json").is_file():
        values = read_json(source)
        check_class(values, ("FluxControlNetModel",), source)
        # Note: diffusers' defaults are a whole copy of the transformer, and no modes.
        values = {"num_layers": 19, "num_single_layers": 38} | mmdit_values(values, source) | {
            "num_mode": values.get("num_mode") or 0, "hint": values.get("conditioning_embedding_channels") is not None}
        config = pick(ControlNetConfig, values, MMDIT_FIELDS | {"modes": "num_mode", "hint": "hint"}, source)
        state = controlnet_from_any(
            read_folder(path, "controlnet", "diffusion_pytorch_model", is_joined))
        return build(ControlNet, config, state, path, device, dtype)
    if path.is_dir():
        path = find_file(path, "ControlNet")
    state = controlnet_from_any(read_file(path, "controlnet", is_joined))
    if "controlnet_x_embedder.weight" not in state:
        raise ValueError(f"{path} is not a FLUX ControlNet: it has neither controlnet_x_embedder nor pos_embed_input")
    modes = state.get("controlnet_mode_embedder.weight", ())
    config = ControlNetConfig(modes=len(modes), hint="input_hint_block.0.weight" in state, **mmdit_sizes(state, path))
    return build(ControlNet, config, state, path, device, dtype)


def load_autoencoder(path: Path, device="cpu", dtype=None) -> Autoencoder:
    """The autoencoder from a folder `vae/` or from a single file such as `ae.safetensors`."""
    if path.is_dir():
        config = autoencoder_config(read_json(path / "config.json"), path / "config.json")
        state = autoencoder_from_diffusers(read_folder(path, "vae", "diffusion_pytorch_model"))
        return build(Autoencoder, config, state, path, device, dtype)
    state = read_file(path, "vae")
    if "encoder.conv_norm_out.weight" in state:
        state = autoencoder_from_diffusers(state)
    return build(Autoencoder, autoencoder_config_from_tensors(state, path), state, path, device, dtype)


def autoencoder_config(values: dict, source: Path) -> AutoencoderConfig:
    """Sizes from an `AutoencoderKL` config."""
    check_class(values, ("AutoencoderKL",), source)
    widths = values.get("block_out_channels", [128, 256, 512, 512])
    if not isinstance(widths, list) or not all(type(w) is int and w > 0 and w % widths[0] == 0 for w in widths) or not widths:
        raise ValueError(f"{source}: block_out_channels is {widths!r:.60}, expected a list of multiples of its first")
    names = dict(ch="ch", ch_mult="ch_mult", num_res_blocks="layers_per_block", z_channels="latent_channels",
                 num_groups="norm_num_groups", scale_factor="scaling_factor", shift_factor="shift_factor")
    return pick(AutoencoderConfig, values | {"ch": widths[0], "ch_mult": [w // widths[0] for w in widths]}, names, source)


def autoencoder_config_from_tensors(state: State, source: Path) -> AutoencoderConfig:
    """Sizes from the shapes of an original checkpoint's tensors.

    The number of GroupNorm groups and the latents' scale and shift are not in them; they are taken to be the official
    ones, and an autoencoder that cannot have 32 groups is refused."""
    levels, blocks = autoencoder_levels(set(state))
    needed = ["encoder.conv_in.weight", "decoder.conv_in.weight",
              *(f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1)))]
    if missing := [name for name in needed if name not in state or state[name].ndim != 4 or 0 in state[name].shape]:
        raise ValueError(f"{source} is not a FLUX autoencoder: it lacks {listing(missing)}")
    first, latent, *rest = (state[name] for name in needed)
    ch, widths, groups = len(first), [len(conv) for conv in rest], AutoencoderConfig.num_groups
    if any(width % ch or width % groups for width in widths):
        raise ValueError(f"{source} has the widths {widths}, expected multiples of the first and of {groups}, the official "
                         "number of groups: give this autoencoder as a folder vae/ with a config.json")
    return AutoencoderConfig(ch=ch, ch_mult=tuple(width // ch for width in widths), num_res_blocks=blocks,
                             z_channels=latent.shape[1])


def load_clip(path: Path, device="cpu", dtype=None) -> CLIPText:
    """CLIP's text tower from a folder with a config.json, or from a single file such as `clip_l.safetensors`."""
    config = clip_config(read_json(path / "config.json"), path / "config.json") if path.is_dir() else None
    state = read_folder(path, "text_encoder", "model") if path.is_dir() else read_file(path, "text_encoder")
    # Note: newer transformers leave the prefix out; whole CLIP files bring a vision tower and projections along.
    state = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()
             if k.startswith(("text_model.", "embeddings.", "encoder.", "final_layer_norm.")) and not k.endswith("position_ids")}
    return build(CLIPText, config or clip_config_from_tensors(state, path), state, path, device, dtype)


def clip_config(values: dict, source: Path) -> CLIPConfig:
    """Sizes from the config of a text tower or of a whole CLIP."""
    check_class(values, ("CLIPTextModel", "CLIPModel", "CLIPTextModelWithProjection"), source)
    text = values.get("text_config")
    values = values | text if isinstance(text, dict) else values
    return tower_config(CLIPConfig, values, source)


def tower_config(kind: type, values: dict, source: Path):
    """Sizes of one of CLIP's or SigLIP's transformers, whose config has the names that its fields have here."""
    config = pick(kind, values, {field.name: field.name for field in fields(kind) if field.name != "hidden_act"}, source)
    if (activation := values.get("hidden_act", kind.hidden_act)) != kind.hidden_act:
        raise ValueError(f"{source}: hidden_act is {activation!r:.60}, expected {kind.hidden_act!r}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{source}: {config.hidden_size} channels cannot be shared by {config.num_attention_heads} heads")
    return config


def clip_config_from_tensors(state: State, source: Path) -> CLIPConfig:
    """Sizes from the shapes of a text tower's tensors; the heads are 64 wide, as all of CLIP's."""
    needed = ["text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight",
              "text_model.encoder.layers.0.mlp.fc1.weight"]
    if missing := [name for name in needed if name not in state or state[name].ndim != 2]:
        raise ValueError(f"{source} holds no CLIP text tower: it lacks {listing(missing)}")
    tokens, positions, fc1 = (state[name] for name in needed)
    width = tokens.shape[1]
    if width % 64 or not width:
        raise ValueError(f"{source} is {width} wide, expected a multiple of 64, CLIP's head width: "
                         "give this text encoder as a folder with a config.json")
    return CLIPConfig(hidden_size=width, intermediate_size=len(fc1), num_attention_heads=width // 64, vocab_size=len(tokens),
                      num_hidden_layers=count(set(state), "text_model.encoder.layers"), max_position_embeddings=len(positions))


def load_t5(path: Path, device="cpu", dtype=None) -> T5:
    """The T5 encoder from a folder with a config.json, or from a single file such as `t5xxl_fp16.safetensors` or a GGUF file."""
    values = read_json(path / "config.json") if path.is_dir() else {}
    check_class(values, ("T5EncoderModel", "T5ForConditionalGeneration"), path / "config.json")
    state = read_folder(path, "text_encoder_2", "model") if path.is_dir() else t5_from_gguf(read_file(path, "text_encoder_2"))
    # Note: some files hold the embedding under two names, or under the second.
    state = {k.replace("encoder.embed_tokens.", "shared."): v for k, v in state.items() if k.startswith(("shared.", "encoder."))}
    return build(T5, t5_config(values, state, path), state, path, device, dtype)


def t5_config(values: dict, state: State, source: Path) -> T5Config:
    """Sizes from the shapes of the tensors: all but the bias's reach is in them, and the copies of T5's config in the wild
    disagree."""
    needed = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
              "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    if missing := [name for name in needed if name not in state or state[name].ndim != 2 or 0 in state[name].shape]:
        raise ValueError(f"{source} is not a gated T5 encoder (v1.1): it lacks {listing(missing)}")
    shared, q, wi, (buckets, heads) = *(state[name] for name in needed[:3]), state[needed[3]].shape
    reach = pick(T5Config, values, {"max_distance": "relative_attention_max_distance"}, source).max_distance
    if len(q) % heads or not 4 <= buckets < 4 * reach:
        raise ValueError(f"{source}: {len(q)} channels, {heads} heads and {buckets} buckets for distances up to {reach} "
                         "do not fit together")
    return T5Config(d_model=shared.shape[1], d_kv=len(q) // heads, d_ff=len(wi), vocab_size=len(shared), num_heads=heads,
                    num_layers=count(set(state), "encoder.block"), num_buckets=buckets, max_distance=reach)


# Note: transformers leaves out of a vision config what is its default, which is the base model's and not ours.
VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}


def vision_config(kind: type, classes: tuple[str, ...], patch_size: int, path: Path):
    """Sizes of a vision tower from the config of its folder, or of a folder with a text tower too."""
    source = path / "config.json"
    values = read_json(source)
    check_class(values, classes, source)
    own = values.get("vision_config")
    config = tower_config(kind, VISION_DEFAULTS | {"patch_size": patch_size} | values | (own if isinstance(own, dict) else {}), source)
    if config.image_size < config.patch_size:
        raise ValueError(f"{source}: patches of {config.patch_size} do not fit into pictures of {config.image_size} pixels")
    return config


def vision_state(path: Path, drop: tuple[str, ...]) -> State:
    """The tensors of a vision tower. Note: newer transformers leave its prefix out."""
    state = {name: tensor for name, tensor in read_sharded(path, "model").items()
             if not name.startswith(("text_model.", "logit_", *drop)) and not name.endswith("position_ids")}
    return {name if name.startswith(("vision_model.", "visual_projection.")) else f"vision_model.{name}": state[name] for name in state}


def load_siglip(path: Path, device="cpu", dtype=None) -> SigLIP:
    """SigLIP's vision tower from a folder `image_encoder/` or that of a whole SigLIP."""
    config = vision_config(SigLIPConfig, ("SiglipVisionModel", "SiglipModel"), 16, path)
    # Note: the head pools the tokens, which Redux takes as they are.
    return build(SigLIP, config, vision_state(path, ("head.", "vision_model.head.")), path, device, dtype)


def load_clip_vision(path: Path, device="cpu", dtype=None) -> CLIPVision:
    """CLIP's vision tower with its projection, from a folder `image_encoder/` or that of a whole CLIP."""
    config = vision_config(CLIPVisionConfig, ("CLIPVisionModelWithProjection", "CLIPModel"), 32, path)
    state = vision_state(path, ("text_projection.",))
    projection = state.get("visual_projection.weight")
    if projection is None or projection.ndim != 2 or not len(projection):
        raise ValueError(f"{path} has no visual_projection: expected the image encoder of an IP-Adapter, {CLIP_VISION}")
    return build(CLIPVision, replace(config, projection_dim=len(projection)), state, path, device, dtype)


def load_redux(path: Path, device="cpu", dtype=None) -> ReduxEmbedder:
    """Redux's embedder from a folder `image_embedder/` or from the file `flux1-redux-dev.safetensors`."""
    state = read_sharded(path, "diffusion_pytorch_model") if path.is_dir() else read_safetensors(path)
    up, down = (state.get(f"redux_{name}.weight") for name in ("up", "down"))
    if up is None or down is None or up.ndim != 2 or down.ndim != 2 or 0 in up.shape:
        raise ValueError(f"{path} is not a Redux embedder: it lacks redux_up or redux_down")
    return build(ReduxEmbedder, ReduxConfig(up.shape[1], len(down)), state, path, device, dtype)
