"""The names of tensors: tables from the original names (ours) to those of the diffusers layout.

A row means: this module of the original checkpoint is this module, or the row-wise concatenation of
these modules, of the diffusers layout. Two facts do not fit in a row: the halves of the last
modulation are swapped (shift, scale | scale, shift), and the autoencoder's 1x1 convolutions are
linear layers there.
"""

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from .quantized import QuantizedTensor, State, concat, dequantized

MMDIT = {
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "final_layer.adaLN_modulation.1": ["norm_out.linear"],
    "final_layer.linear": ["proj_out"],
}
DOUBLE_BLOCK = {
    "img_mod.lin": ["norm1.linear"],
    "txt_mod.lin": ["norm1_context.linear"],
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.norm.query_norm": ["attn.norm_q"],
    "img_attn.norm.key_norm": ["attn.norm_k"],
    "txt_attn.norm.query_norm": ["attn.norm_added_q"],
    "txt_attn.norm.key_norm": ["attn.norm_added_k"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
    "img_mlp.0": ["ff.net.0.proj"],
    "img_mlp.2": ["ff.net.2"],
    "txt_mlp.0": ["ff_context.net.0.proj"],
    "txt_mlp.2": ["ff_context.net.2"],
}
SINGLE_BLOCK = {
    "modulation.lin": ["norm.linear"],
    "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"],
    "norm.query_norm": ["attn.norm_q"],
    "norm.key_norm": ["attn.norm_k"],
    "linear2": ["proj_out"],
}
SWAPPED_HALVES = "final_layer.adaLN_modulation.1"

# What else a ControlNet has under other names than ours: XLabs' embedding, and the convolutions as
# diffusers calls them.
CONTROLNET = {
    "pos_embed_input": "controlnet_x_embedder",
    "input_hint_block.conv_in": "input_hint_block.0",
    **{f"input_hint_block.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)},
    "input_hint_block.conv_out": "input_hint_block.14",
}

AUTOENCODER = {
    "conv_in": ["conv_in"],
    "conv_out": ["conv_out"],
    "norm_out": ["conv_norm_out"],
    "mid.block_1": ["mid_block.resnets.0"],
    "mid.block_2": ["mid_block.resnets.1"],
    "mid.attn_1.norm": ["mid_block.attentions.0.group_norm"],
    "mid.attn_1.q": ["mid_block.attentions.0.to_q"],
    "mid.attn_1.k": ["mid_block.attentions.0.to_k"],
    "mid.attn_1.v": ["mid_block.attentions.0.to_v"],
    "mid.attn_1.proj_out": ["mid_block.attentions.0.to_out.0"],
}
RESNET_BLOCK = {
    "norm1": ["norm1"], "conv1": ["conv1"], "norm2": ["norm2"], "conv2": ["conv2"],
    "nin_shortcut": ["conv_shortcut"],
}

# T5's tensors in GGUF files. Note: the gate is wi_0, the branch with the GELU.
T5_GGUF = {
    "token_embd": "shared",
    "enc.output_norm": "encoder.final_layer_norm",
    "enc.blk": "encoder.block",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1", "ffn_down": "layer.1.DenseReluDense.wo",
}

Table = dict[str, list[str]]
# The last words of the diffusers modules that are parts of one of ours.
JOINED = {part.split(".")[-1] for parts in (DOUBLE_BLOCK | SINGLE_BLOCK).values()
          if len(parts) > 1 for part in parts}


def prefixed(table: Table, original: str, diffusers: str) -> Table:
    """The table one level deeper in both trees."""
    return {f"{original}.{k}": [f"{diffusers}.{v}" for v in values] for k, values in table.items()}


def mmdit_modules(depth: int, depth_single_blocks: int) -> Table:
    """All modules of a transformer with so many blocks."""
    table = dict(MMDIT)
    for i in range(depth):
        table |= prefixed(DOUBLE_BLOCK, f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(depth_single_blocks):
        table |= prefixed(SINGLE_BLOCK, f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    return table


def autoencoder_modules(levels: int, blocks: int) -> Table:
    """All modules of an autoencoder.

    levels: how many. blocks: residual blocks in a level of the encoder."""
    table: Table = {}
    for half in ("encoder", "decoder"):
        for original, (diffusers,) in AUTOENCODER.items():
            part = RESNET_BLOCK if original.startswith("mid.block") else {"": [""]}
            for ours, (theirs,) in part.items():
                name = f"{half}.{original}.{ours}".rstrip(".")
                table[name] = [f"{half}.{diffusers}.{theirs}".rstrip(".")]
    for i in range(levels):
        down, down_blocks = f"encoder.down.{i}", f"encoder.down_blocks.{i}"
        # Note: the decoder's levels are numbered from the image in the original, from the latents
        # in diffusers.
        up, up_blocks = f"decoder.up.{i}", f"decoder.up_blocks.{levels - 1 - i}"
        for j in range(blocks):
            table |= prefixed(RESNET_BLOCK, f"{down}.block.{j}", f"{down_blocks}.resnets.{j}")
        for j in range(blocks + 1):
            table |= prefixed(RESNET_BLOCK, f"{up}.block.{j}", f"{up_blocks}.resnets.{j}")
        table[f"{down}.downsample.conv"] = [f"{down_blocks}.downsamplers.0.conv"]
        table[f"{up}.upsample.conv"] = [f"{up_blocks}.upsamplers.0.conv"]
    return table


def tensor_names(modules: Table, names: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Rows (original tensor, its diffusers tensors) of the modules that have a diffusers tensor
    among `names`."""
    for original, parts in modules.items():
        for suffix in ("weight", "bias"):
            ours = "scale" if original.endswith(("query_norm", "key_norm")) else suffix
            sources = [f"{part}.{suffix}" for part in parts]
            if any(source in names for source in sources):
                yield f"{original}.{ours}", sources


def swap_halves(x: Tensor | QuantizedTensor) -> Tensor:
    """(2·d, ...) -> the second d rows, then the first."""
    return torch.cat(dequantized(x).chunk(2)[::-1])


def count(names: set[str], prefix: str) -> int:
    """How many blocks `prefix`.0, `prefix`.1, ... are named, at most as many as there are names."""
    block = re.compile(re.escape(prefix) + r"\.([0-9]{1,6})\.")
    indices = {int(match[1]) for match in map(block.match, names) if match}
    return min(max(indices, default=-1) + 1, len(names))


def from_diffusers(state: State, modules: Table) -> State:
    """Renames and concatenates a diffusers state dict, taking tensors *out of it* as it goes so
    that no second copy stays in memory.

    Names that are in no row, and those that lack a sibling of their kind, are passed on
    unchanged for the strict loader to report."""
    result, place = {}, {name: i for i, name in enumerate(state)}
    # Note: in the order of the file, so that what has been joined can leave memory piece by piece.
    rows = sorted(tensor_names(modules, set(state)), key=lambda row: place.get(row[1][0], -1))
    for original, sources in rows:
        parts = [state[source] for source in sources if source in state and state[source].ndim]
        # Note: torch joins float32 and bfloat16, but not one-byte types with others.
        kinds = {(part.shape[1:], torch.is_tensor(part) and part.dtype.itemsize == 1)
                 for part in parts}
        if len(parts) == len(sources) and len(kinds) == 1:
            result[original] = concat([state.pop(source) for source in sources])
    return result | state


def is_joined(name: str) -> bool:
    """Whether this diffusers tensor becomes a part of one of ours."""
    return not JOINED.isdisjoint(name.split("."))


def mmdit_from_diffusers(state: State) -> State:
    """`FluxTransformer2DModel` names -> original names (empties `state`)."""
    names = set(state)
    modules = mmdit_modules(count(names, "transformer_blocks"),
                            count(names, "single_transformer_blocks"))
    state = from_diffusers(state, modules)
    return {k: swap_halves(v) if k.startswith(SWAPPED_HALVES) else v for k, v in state.items()}


def controlnet_from_any(state: State) -> State:
    """Names of diffusers' `FluxControlNetModel` or of XLabs' files -> ours (empties `state`)."""
    state = mmdit_from_diffusers(state)
    modules = {name: name.rpartition(".")[0] for name in state}
    return {CONTROLNET.get(module, module) + name.removeprefix(module): state[name]
            for name, module in modules.items()}


def mmdit_to_diffusers(state: State) -> State:
    """Original names -> `FluxTransformer2DModel` names."""
    names, result = set(state), {}
    hidden = state["img_in.weight"].shape[0]
    modules = mmdit_modules(count(names, "double_blocks"), count(names, "single_blocks"))
    for original, parts in modules.items():
        for ours, theirs in (("weight", "weight"), ("bias", "bias"), ("scale", "weight")):
            if f"{original}.{ours}" in names:
                tensor = state[f"{original}.{ours}"]
                tensor = swap_halves(tensor) if original == SWAPPED_HALVES else tensor
                # q, k, v with `hidden` rows each, and what remains: the MLP.
                pieces = tensor.tensor_split([hidden * i for i in range(1, len(parts))])
                result |= {f"{part}.{theirs}": piece for part, piece in zip(parts, pieces)}
    return result


# A tensor that every file of a part has, as the layouts call it: what precedes it is a prefix.
ANCHORS = {
    "transformer": ("img_in.weight", "x_embedder.weight"),
    "controlnet": ("controlnet_x_embedder.weight", "pos_embed_input.weight"),
    "vae": ("encoder.conv_in.weight",),
    "text_encoder": ("text_model.embeddings.token_embedding.weight",
                     "embeddings.token_embedding.weight"),
    "text_encoder_2": ("shared.weight", "encoder.embed_tokens.weight", "token_embd.weight"),
}
# The prefixes of a part in files that hold a whole model (ComfyUI's, stable-diffusion.cpp's).
WHOLE_MODEL = {
    "transformer": ("model.diffusion_model.",),
    "vae": ("vae.", "first_stage_model."),
    "text_encoder": ("text_encoders.clip_l.transformer.",),
    "text_encoder_2": ("text_encoders.t5xxl.transformer.",),
}
# What torch.compile, FSDP and activation checkpointing put into names, at any place.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")


def find_prefix(names: Iterable[str], part: str) -> str | None:
    """What the names of a part begin with ("model.", ...); None if the part is not among them."""
    prefixes = {name.removesuffix(anchor) for name in names for anchor in ANCHORS[part]
                if name == anchor or name.endswith(f".{anchor}")}
    whole = [prefix for prefix in WHOLE_MODEL.get(part, ()) if prefix in prefixes]
    # Note: of CLIP's two anchors one ends with the other.
    return (whole or sorted(prefixes, key=len) or [None])[0]


def without_prefix(state: dict, part: str) -> dict:
    """The tensors of a part under their own names. Of a whole model the other parts are left out;
    otherwise names without the prefix are passed on for the strict loader to report."""
    state = {WRAPPERS.sub("", name): tensor for name, tensor in state.items()}
    prefix = find_prefix(state, part) or ""
    if prefix in WHOLE_MODEL.get(part, ()):
        state = {name: tensor for name, tensor in state.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def t5_from_gguf(state: State) -> State:
    """T5's names in GGUF files -> those of transformers; others stay as they are."""
    if "token_embd.weight" not in state:
        return state
    pattern = re.compile(r"(?:^|(?<=\.))(" + "|".join(map(re.escape, T5_GGUF)) + r")(?=\.)")
    return {pattern.sub(lambda match: T5_GGUF[match[1]], name): tensor
            for name, tensor in state.items()}


def autoencoder_levels(names: set[str]) -> tuple[int, int]:
    """(levels, residual blocks a level of the encoder), from the names of either layout."""
    for level, block in (("encoder.down", "block"), ("encoder.down_blocks", "resnets")):
        if levels := count(names, level):
            return levels, count(names, f"{level}.0.{block}")
    return 0, 0


def autoencoder_from_diffusers(state: State) -> State:
    """`AutoencoderKL` names -> original names (empties `state`)."""
    state = from_diffusers(state, autoencoder_modules(*autoencoder_levels(set(state))))
    # Note: what diffusers keeps as linear layers are 1x1 convolutions in the original.
    return {name: tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor
            for name, tensor in state.items()}


def autoencoder_to_diffusers(state: State) -> State:
    """Original names -> `AutoencoderKL` names."""
    modules = autoencoder_modules(*autoencoder_levels(set(state)))
    result = {}
    for name, tensor in state.items():
        module, _, suffix = name.rpartition(".")
        is_1x1 = ".attn_1." in name and tensor.ndim == 4
        result[f"{modules[module][0]}.{suffix}"] = tensor[:, :, 0, 0] if is_1x1 else tensor
    return result
