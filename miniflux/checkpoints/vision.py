"""Files -> the networks beside FLUX.1: the depth estimator, the safety filters, the previews.

The first two come as folders of transformers: a config.json and `model*.safetensors`.
"""

import os
import re
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor

from ..files import read_json
from ..networks.depth_anything import DepthAnything, DepthAnythingConfig
from ..networks.pixtral import ACTIVATIONS, Pixtral, PixtralConfig, TransformerConfig
from ..networks.taef1 import TAEF1Decoder
from ..networks.vit_classifier import ViTClassifier, ViTConfig
from .building import State, build, check_class, pick
from .configs import check_fixed, tower_config
from .formats import read_safetensors, read_sharded
from .hub import find_or_download, is_repo

# Vision transformers' names -> CLIP's, which the layers have here: those of published checkpoints,
# and the newer transformers' own.
VIT_NAMES = (
    (r"^(vit|backbone)\.(encoder\.)?layers?\.", r"\1.encoder.layers."),
    (r"\.attention\.(attention\.query|q_proj)\.", ".self_attn.q_proj."),
    (r"\.attention\.(attention\.key|k_proj)\.", ".self_attn.k_proj."),
    (r"\.attention\.(attention\.value|v_proj)\.", ".self_attn.v_proj."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".self_attn.out_proj."),
    (r"\.(norm1|layernorm_before)\.", ".layer_norm1."),
    (r"\.(norm2|layernorm_after)\.", ".layer_norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
)


def find_folder(source: str | os.PathLike, example: str) -> Path:
    """The folder of a network: a path, or a Hub id."""
    if (folder := Path(source).expanduser()).is_dir():
        return folder
    if not is_repo(str(source)):
        raise FileNotFoundError(f"{str(source)!r} is neither a folder nor a Hub id: expected one "
                                f"such as {example}, with config.json and model.safetensors")
    wanted = ["config.json", "tokenizer.json", "model*.safetensors*"]
    return find_or_download(str(source), wanted, ["*.safetensors"])


def rename(state: State, table: tuple[tuple[str, str], ...]) -> State:
    """The tensors under other names: all rows (pattern, replacement) of the table in turn."""
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in table:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


# ------------------------------------------------------------------------------------------- depth

# Note: transformers leaves out of a config what is its default, which is the base model's, or the
# small one's.
DINOV2_DEFAULTS = {
    "model_type": "dinov2", "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "mlp_ratio": 4, "patch_size": 14, "image_size": 224,
    "layer_norm_eps": 1e-6}
DEPTH_DEFAULTS = {
    "neck_hidden_sizes": [48, 96, 192, 384], "fusion_hidden_size": 64, "head_hidden_size": 32,
    "depth_estimation_type": "relative", "patch_size": 14}
DINOV2_FIXED = {
    "model_type": "dinov2", "num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False,
    "apply_layernorm": True, "reshape_hidden_states": False}
DEPTH_FIXED = {"reassemble_factors": [4, 2, 1, 0.5], "head_in_index": -1}


def load_depth_anything(path: Path, device="cpu", dtype=None) -> DepthAnything:
    """Depth Anything, V1 or V2, from a folder."""
    config = depth_anything_config(read_json(path / "config.json"), path / "config.json")
    state = depth_anything_names(read_sharded(path, "model"))
    return build(DepthAnything, config, state, path, device, dtype)


def depth_anything_names(state: State) -> State:
    """The tensors under our names. The mask token served the training alone."""
    return {name: tensor for name, tensor in rename(state, VIT_NAMES).items()
            if not name.endswith(".mask_token")}


def depth_anything_config(values: dict, source: Path) -> DepthAnythingConfig:
    """Sizes from a `DepthAnythingForDepthEstimation` config and the backbone's within it."""
    check_class(values, ("DepthAnythingForDepthEstimation",), source)
    backbone = values.get("backbone_config")
    if not isinstance(backbone, dict):
        raise ValueError(f"{source} has no backbone_config: expected the sizes of a DINOv2")
    backbone, values = DINOV2_DEFAULTS | backbone, DEPTH_DEFAULTS | values
    width, ratio = backbone["hidden_size"], backbone["mlp_ratio"]
    kind = values["depth_estimation_type"]
    if type(width) is not int or type(ratio) is not int or kind not in ("relative", "metric"):
        raise ValueError(f"{source}: hidden_size {width!r:.30}, mlp_ratio {ratio!r:.30} and "
                         f"depth_estimation_type {kind!r:.30} are not two whole numbers and "
                         "'relative' or 'metric'")
    check_fixed(backbone, DINOV2_FIXED | {"patch_size": values["patch_size"]}, source)
    check_fixed(values, DEPTH_FIXED | {"reassemble_hidden_size": width}, source)
    own = ("neck_hidden_sizes", "fusion_hidden_size", "head_hidden_size")
    config = tower_config(DepthAnythingConfig, backbone | {
        "intermediate_size": width * ratio,
        "out_indices": out_indices(backbone, source),
        "metric": kind == "metric",
        "max_depth": values.get("max_depth") or 1.0,
        **{key: values[key] for key in own}}, source)
    too_small = config.fusion_hidden_size < 2 or config.image_size < config.patch_size
    if len(config.neck_hidden_sizes) != 4 or too_small:
        raise ValueError(f"{source}: neck {config.neck_hidden_sizes}, fusion "
                         f"{config.fusion_hidden_size}, pictures of {config.image_size} and "
                         f"patches of {config.patch_size} do not fit together")
    return config


def out_indices(backbone: dict, source: Path) -> list[int]:
    """The four layers that the neck reads, counted from 1.

    In the file they are numbers, which may count from the end, or names: "stage5", ..."""
    layers = backbone["num_hidden_layers"]
    given = backbone.get("out_indices")
    if not given:
        stages = [str(name) for name in backbone.get("out_features") or []]
        given = [int(name[5:]) for name in stages if re.fullmatch(r"stage\d{1,4}", name)]
    if isinstance(given, list) and type(layers) is int:
        if all(type(i) is int and 0 < abs(i) <= layers for i in given):
            given = sorted(i if i > 0 else layers + 1 + i for i in given)
            if len(set(given)) == 4:
                return given
    raise ValueError(f"{source}: out_indices are {given!r:.60}, "
                     f"expected four of the {layers!r:.30} layers")


# ----------------------------------------------------------------------------------------- filters


def load_vit_classifier(path: Path, device="cpu", dtype=None) -> ViTClassifier:
    """A classifier of images from a folder; its labels are those of the config."""
    source = path / "config.json"
    values = read_json(source)
    check_class(values, ("ViTForImageClassification",), source)
    check_fixed(values, {"num_channels": 3, "qkv_bias": True}, source)
    labels = values.get("id2label")
    numbers = sorted(labels) if isinstance(labels, dict) else []
    if not numbers or numbers != sorted(map(str, range(len(numbers)))):
        raise ValueError(f"{source}: id2label is {labels!r:.60}, "
                         "expected a label for each number from 0")
    config = tower_config(ViTConfig, values, source)
    config = replace(config, labels=tuple(str(labels[str(i)]) for i in range(len(labels))))
    state = rename(read_sharded(path, "model"), VIT_NAMES)
    return build(ViTClassifier, config, state, path, device, dtype)


# The published names, and those of newer transformers, -> the names here.
PIXTRAL_NAMES = (
    (r"^model\.", ""),
    (r"^language_model\.(lm_head\.)", r"\1"),
    (r"^language_model\.model\.", "language_model."),
    (r"\.attention_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.attention\.", ".self_attn."),
    (r"\.feed_forward\.", ".mlp."),
)


# Note: transformers leaves out of a config what is its default; Mistral's are the 7B model's.
PIXTRAL_VISION_DEFAULTS = {
    "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 24, "num_attention_heads": 16, "hidden_act": "gelu", "rope_theta": 1e4,
    "patch_size": 16}
MISTRAL_DEFAULTS = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_act": "silu", "rope_theta": 1e4, "rms_norm_eps": 1e-6, "vocab_size": 32000}
LLAVA_DEFAULTS = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
LLAVA_FIXED = {
    "projector_hidden_act": "gelu", "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full", "multimodal_projector_bias": True}


def load_pixtral(path: Path, device="cpu", dtype=None) -> Pixtral:
    """Pixtral from a folder."""
    config = pixtral_config(read_json(path / "config.json"), path / "config.json")
    state = rename(read_sharded(path, "model"), PIXTRAL_NAMES)
    return build(Pixtral, config, state, path, device, dtype)


def pixtral_config(values: dict, source: Path) -> PixtralConfig:
    """Sizes from a `LlavaForConditionalGeneration` config and the two within it."""
    check_class(values, ("LlavaForConditionalGeneration",), source)
    vision, text = values.get("vision_config"), values.get("text_config")
    if not isinstance(vision, dict) or not isinstance(text, dict):
        raise ValueError(f"{source} has no vision_config and text_config: expected a Pixtral's")
    vision, text = PIXTRAL_VISION_DEFAULTS | vision, MISTRAL_DEFAULTS | text
    check_fixed(vision, {"model_type": "pixtral", "num_channels": 3}, source)
    check_fixed(text, {"model_type": "mistral", "sliding_window": None}, source)
    check_fixed(LLAVA_DEFAULTS | values, LLAVA_FIXED, source)
    image_token = values.get("image_token_index", values.get("image_token_id", 10))
    sizes = {"patch_size": vision["patch_size"], "vocab_size": text["vocab_size"],
             "image_token": image_token}
    config = pick(PixtralConfig, sizes, {name: name for name in sizes}, source)
    vision |= {"num_key_value_heads": vision["num_attention_heads"], "rms_norm_eps": 1e-5}
    return replace(config, vision=transformer_config(vision, source),
                   text=transformer_config(text, source))


def transformer_config(values: dict, source: Path) -> TransformerConfig:
    """Sizes of one of Pixtral's two transformers."""
    width, heads = values["hidden_size"], values["num_attention_heads"]
    rope = values.get("rope_parameters")
    if isinstance(rope, dict):
        if (kind := rope.get("rope_type", "default")) not in ("default", "axial"):
            raise ValueError(f"{source}: rope_type is {kind!r:.60}, expected 'default', "
                             "or 'axial' for the vision tower")
        values = values | {"rope_theta": rope.get("rope_theta", values["rope_theta"])}
    if not values.get("head_dim") and type(width) is type(heads) is int and heads:
        values = values | {"head_dim": width // heads}
    names = {field.name: field.name for field in fields(TransformerConfig)
             if field.name != "hidden_act"}
    config = pick(TransformerConfig, values, names, source)
    if (activation := values["hidden_act"]) not in ACTIVATIONS:
        raise ValueError(f"{source}: hidden_act is {activation!r:.60}, "
                         f"expected one of {', '.join(ACTIVATIONS)}")
    if config.head_dim % 4 or config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(f"{source}: heads of {config.head_dim} channels and "
                         f"{config.num_attention_heads} heads that share "
                         f"{config.num_key_value_heads} do not fit together")
    return replace(config, hidden_act=activation)


# ---------------------------------------------------------------------------------------- previews


def read_preview(path: Path, device="cpu") -> Tensor | None:
    """The map (3, channels + 1) of a file of `miniflux preview`; None for another file."""
    if path.is_dir() or "preview" not in (state := read_safetensors(path)):
        return None
    table = state["preview"]
    is_map = table.ndim == 2 and len(table) == 3 and table.dtype == torch.float32
    if not is_map or not table.isfinite().all():
        raise ValueError(f"{path} holds a {table.dtype} of the shape {list(table.shape)}, "
                         "expected a map (3, 17)")
    return table.to(device)


def load_taef1(path: Path, device="cpu", dtype=None) -> TAEF1Decoder:
    """TAEF1's decoder from its folder or file in the diffusers layout, or from the original
    `taef1_decoder.safetensors`."""
    is_folder = path.is_dir()
    state = read_sharded(path, "diffusion_pytorch_model") if is_folder else read_safetensors(path)
    if any(name.startswith("decoder.layers.") for name in state):
        state = {name.removeprefix("decoder."): tensor for name, tensor in state.items()
                 if name.startswith("decoder.")}
    else:
        state = {taef1_name(name): tensor for name, tensor in state.items()}
    first = state.get("layers.0.weight")
    if first is None or first.ndim != 4 or 0 in first.shape:
        raise ValueError(f"{path} is neither a preview map nor TAEF1's decoder: "
                         "fit a map by miniflux preview")
    return build(TAEF1Decoder, len(first), state, path, device, dtype)


def taef1_name(name: str) -> str:
    """The original's name -> ours. Note: it counts the clamp at its beginning as a layer."""
    return re.sub(r"^\d+", lambda number: f"layers.{int(number[0]) - 1}", name)
