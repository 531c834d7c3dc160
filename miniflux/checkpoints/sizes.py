"""The shapes of a file's tensors -> our configs, for files that come without a config.json."""

from pathlib import Path

from ..networks.autoencoder import AutoencoderConfig
from ..networks.clip import CLIPConfig
from ..networks.mmdit import MMDiTConfig
from ..networks.t5 import T5Config
from .building import pick
from .formats import listing
from .names import autoencoder_levels, count
from .quantized import State


def lacking(state: State, needed: list[str], ndim: int | None = None) -> list[str]:
    """Which of these tensors are missing or empty, or have another number of dimensions."""
    return [name for name in needed
            if name not in state or 0 in state[name].shape or state[name].ndim == 0
            or ndim not in (None, state[name].ndim)]


def mmdit_config_from_tensors(state: State, source: Path) -> MMDiTConfig:
    """Sizes from the shapes of an original checkpoint's tensors."""
    sizes = mmdit_sizes(state, source)
    if lacking(state, ["final_layer.linear.weight"]):
        raise ValueError(f"{source} is not a FLUX transformer: it lacks final_layer.linear.weight")
    return MMDiTConfig(out_channels=len(state["final_layer.linear.weight"]), **sizes)


def mmdit_sizes(state: State, source: Path) -> dict:
    """Sizes of a transformer, or of its copy in a ControlNet, from the shapes of its tensors under
    their original names."""
    needed = ["img_in.weight", "txt_in.weight", "vector_in.in_layer.weight",
              "double_blocks.0.img_attn.norm.query_norm.scale", "double_blocks.0.img_mlp.0.weight"]
    if missing := lacking(state, needed):
        raise ValueError(f"{source} is not a FLUX transformer: it lacks {listing(missing)}")
    img_in, txt_in, vec_in, scale, mlp = (state[name] for name in needed)
    hidden, head_dim = len(img_in), len(scale)
    if hidden % head_dim or head_dim % 2:
        raise ValueError(f"{source}: {hidden} channels cannot be heads of {head_dim} each, "
                         "expected an even divisor")
    # Note: how a head is shared among the axes is not in the shapes: as in all official models,
    # 1/8, 7/16, 7/16 of it.
    side = 2 * (head_dim * 7 // 32)
    return {
        "in_channels": img_in.shape[-1],
        "vec_in_dim": vec_in.shape[-1],
        "context_in_dim": txt_in.shape[-1],
        "hidden_size": hidden,
        "num_heads": hidden // head_dim,
        "mlp_ratio": len(mlp) / hidden,
        "depth": count(set(state), "double_blocks"),
        "depth_single_blocks": count(set(state), "single_blocks"),
        "axes_dim": (head_dim - 2 * side, side, side),
        "guidance_embed": "guidance_in.in_layer.weight" in state,
    }


def autoencoder_config_from_tensors(state: State, source: Path) -> AutoencoderConfig:
    """Sizes from the shapes of an original checkpoint's tensors.

    The number of GroupNorm groups and the latents' scale and shift are not in them; they are taken
    to be the official ones, and an autoencoder that cannot have 32 groups is refused."""
    levels, blocks = autoencoder_levels(set(state))
    needed = ["encoder.conv_in.weight", "decoder.conv_in.weight",
              *(f"encoder.down.{i}.block.0.conv1.weight" for i in range(max(levels, 1)))]
    if missing := lacking(state, needed, ndim=4):
        raise ValueError(f"{source} is not a FLUX autoencoder: it lacks {listing(missing)}")
    first, latent, *rest = (state[name] for name in needed)
    ch, groups = len(first), AutoencoderConfig.num_groups
    widths = [len(conv) for conv in rest]
    if any(width % ch or width % groups for width in widths):
        raise ValueError(f"{source} has the widths {widths}, expected multiples of the first and "
                         f"of {groups}, the official number of groups: give this autoencoder as a "
                         "folder vae/ with a config.json")
    return AutoencoderConfig(ch=ch, ch_mult=tuple(width // ch for width in widths),
                             num_res_blocks=blocks, z_channels=latent.shape[1])


def clip_config_from_tensors(state: State, source: Path) -> CLIPConfig:
    """Sizes from the shapes of a text tower's tensors; the heads are 64 wide, as all of CLIP's."""
    needed = ["text_model.embeddings.token_embedding.weight",
              "text_model.embeddings.position_embedding.weight",
              "text_model.encoder.layers.0.mlp.fc1.weight"]
    if missing := lacking(state, needed, ndim=2):
        raise ValueError(f"{source} holds no CLIP text tower: it lacks {listing(missing)}")
    tokens, positions, fc1 = (state[name] for name in needed)
    width = tokens.shape[1]
    if width % 64:
        raise ValueError(f"{source} is {width} wide, expected a multiple of 64, CLIP's head width: "
                         "give this text encoder as a folder with a config.json")
    return CLIPConfig(
        hidden_size=width, intermediate_size=len(fc1), num_attention_heads=width // 64,
        num_hidden_layers=count(set(state), "text_model.encoder.layers"),
        vocab_size=len(tokens), max_position_embeddings=len(positions))


def t5_config(values: dict, state: State, source: Path) -> T5Config:
    """Sizes from the shapes of the tensors.

    All but the bias's reach is in them, and the copies of T5's config in the wild disagree."""
    needed = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight",
              "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
              "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    if missing := lacking(state, needed, ndim=2):
        raise ValueError(f"{source} is not a gated T5 encoder (v1.1): it lacks {listing(missing)}")
    shared, q, wi, bias = (state[name] for name in needed)
    buckets, heads = bias.shape
    names = {"max_distance": "relative_attention_max_distance"}
    reach = pick(T5Config, values, names, source).max_distance
    if len(q) % heads or not 4 <= buckets < 4 * reach:
        raise ValueError(f"{source}: {len(q)} channels, {heads} heads and {buckets} buckets for "
                         f"distances up to {reach} do not fit together")
    return T5Config(
        d_model=shared.shape[1], d_kv=len(q) // heads, d_ff=len(wi), vocab_size=len(shared),
        num_heads=heads, num_layers=count(set(state), "encoder.block"), num_buckets=buckets,
        max_distance=reach)
