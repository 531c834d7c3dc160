"""Files and folders -> networks: which file holds what, in which layout, with which sizes.

    original layout     flux1-*.safetensors, ae.safetensors    (text encoders come from elsewhere)
    diffusers layout    model_index.json, transformer/, vae/, text_encoder/, text_encoder_2/,
                        tokenizer/, tokenizer_2/

Sizes come from a config.json where there is one, else from the shapes of the tensors, never from a
name.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..files import read_json
from ..networks.autoencoder import Autoencoder
from ..networks.clip import CLIPText, CLIPVision, CLIPVisionConfig
from ..networks.controlnet import ControlNet, ControlNetConfig
from ..networks.mmdit import MMDiT
from ..networks.siglip import ReduxConfig, ReduxEmbedder, SigLIP, SigLIPConfig
from ..networks.t5 import T5
from .building import build
from .configs import (
    autoencoder_config,
    check_t5,
    clip_config,
    controlnet_config,
    mmdit_config,
    vision_config,
)
from .formats import read_header, read_safetensors, read_sharded
from .gguf import gguf_names, read_gguf
from .hub import find_file
from .names import (
    autoencoder_from_diffusers,
    controlnet_from_any,
    is_joined,
    mmdit_from_diffusers,
    t5_from_gguf,
    without_prefix,
)
from .quantized import State, gather_quantized
from .sizes import (
    autoencoder_config_from_tensors,
    clip_config_from_tensors,
    mmdit_config_from_tensors,
    mmdit_sizes,
    t5_config,
)

CLIP_VISION = "openai/clip-vit-large-patch14"


def read_file(path: Path, part: str, apart: Callable[[str], bool] = lambda name: False) -> State:
    """The tensors of a part from a safetensors or GGUF file that holds it alone or among others.
    Quantised ones stay quantised."""
    if path.suffix == ".gguf":
        return without_prefix(read_gguf(path), part)
    return gather_quantized(without_prefix(read_safetensors(path, apart), part), path)


def read_folder(path: Path, part: str, stem: str,
                apart: Callable[[str], bool] = lambda name: False) -> State:
    """The tensors of a part from its folder. Quantised ones stay quantised."""
    return gather_quantized(without_prefix(read_sharded(path, stem, apart), part), path)


def tensor_names(path: Path) -> list[str]:
    """The names of a file's tensors, from its header."""
    return gguf_names(path) if path.suffix == ".gguf" else list(read_header(path)[0])


def load_mmdit(path: Path, device="cpu", dtype=None) -> MMDiT:
    """The transformer from a folder `transformer/` or from a single file: safetensors or GGUF,
    original or diffusers names, with or without a prefix."""
    if path.is_dir():
        config = mmdit_config(read_json(path / "config.json"), path / "config.json")
        state = read_folder(path, "transformer", "diffusion_pytorch_model", is_joined)
        return build(MMDiT, config, mmdit_from_diffusers(state), path, device, dtype)
    state = read_file(path, "transformer", is_joined)
    if "x_embedder.weight" in state:
        state = mmdit_from_diffusers(state)
    config = mmdit_config_from_tensors(state, path)
    return build(MMDiT, config, state, path, device, dtype)


def load_controlnet(path: Path, device="cpu", dtype=None) -> ControlNet:
    """A ControlNet from a folder with a config.json, or from a single file (InstantX's or XLabs'
    names)."""
    source = path / "config.json"
    if source.is_file():
        config = controlnet_config(read_json(source), source)
        state = read_folder(path, "controlnet", "diffusion_pytorch_model", is_joined)
        return build(ControlNet, config, controlnet_from_any(state), path, device, dtype)
    if path.is_dir():
        path = find_file(path, "ControlNet")
    state = controlnet_from_any(read_file(path, "controlnet", is_joined))
    if "controlnet_x_embedder.weight" not in state:
        raise ValueError(f"{path} is not a FLUX ControlNet: "
                         "it has neither controlnet_x_embedder nor pos_embed_input")
    modes = state.get("controlnet_mode_embedder.weight", ())
    config = ControlNetConfig(modes=len(modes), hint="input_hint_block.0.weight" in state,
                              **mmdit_sizes(state, path))
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
    config = autoencoder_config_from_tensors(state, path)
    return build(Autoencoder, config, state, path, device, dtype)


def load_clip(path: Path, device="cpu", dtype=None) -> CLIPText:
    """CLIP's text tower from a folder with a config.json, or from a single file such as
    `clip_l.safetensors`."""
    config = None
    if path.is_dir():
        config = clip_config(read_json(path / "config.json"), path / "config.json")
        state = read_folder(path, "text_encoder", "model")
    else:
        state = read_file(path, "text_encoder")
    state = text_tower(state)
    config = config or clip_config_from_tensors(state, path)
    return build(CLIPText, config, state, path, device, dtype)


def text_tower(state: State) -> State:
    """The tensors of CLIP's text tower, without the vision tower and the projections of a whole
    CLIP. Note: newer transformers leave the prefix out."""
    parts = ("embeddings.", "encoder.", "final_layer_norm.")
    names = {name: name.removeprefix("text_model.") for name in state}
    return {f"text_model.{own}": state[name] for name, own in names.items()
            if own.startswith(parts) and not own.endswith("position_ids")}


def load_t5(path: Path, device="cpu", dtype=None) -> T5:
    """The T5 encoder from a folder with a config.json, or from a single file such as
    `t5xxl_fp16.safetensors` or a GGUF file."""
    values = {}
    if path.is_dir():
        values = read_json(path / "config.json")
        check_t5(values, path / "config.json")
        state = read_folder(path, "text_encoder_2", "model")
    else:
        state = t5_from_gguf(read_file(path, "text_encoder_2"))
    # Note: some files hold the embedding under two names, or under the second.
    state = {name.replace("encoder.embed_tokens.", "shared."): tensor
             for name, tensor in state.items() if name.startswith(("shared.", "encoder."))}
    return build(T5, t5_config(values, state, path), state, path, device, dtype)


def vision_state(path: Path, drop: tuple[str, ...]) -> State:
    """The tensors of a vision tower. Note: newer transformers leave its prefix out."""
    result = {}
    for name, tensor in read_sharded(path, "model").items():
        if name.startswith(("text_model.", "logit_", *drop)) or name.endswith("position_ids"):
            continue
        has_prefix = name.startswith(("vision_model.", "visual_projection."))
        result[name if has_prefix else f"vision_model.{name}"] = tensor
    return result


def load_siglip(path: Path, device="cpu", dtype=None) -> SigLIP:
    """SigLIP's vision tower from a folder `image_encoder/` or that of a whole SigLIP."""
    config = vision_config(SigLIPConfig, ("SiglipVisionModel", "SiglipModel"), 16, path)
    # Note: the head pools the tokens, which Redux takes as they are.
    state = vision_state(path, ("head.", "vision_model.head."))
    return build(SigLIP, config, state, path, device, dtype)


def load_clip_vision(path: Path, device="cpu", dtype=None) -> CLIPVision:
    """CLIP's vision tower with its projection, from a folder `image_encoder/` or that of a whole
    CLIP."""
    classes = ("CLIPVisionModelWithProjection", "CLIPModel")
    config = vision_config(CLIPVisionConfig, classes, 32, path)
    state = vision_state(path, ("text_projection.",))
    projection = state.get("visual_projection.weight")
    if projection is None or projection.ndim != 2 or not len(projection):
        raise ValueError(f"{path} has no visual_projection: "
                         f"expected the image encoder of an IP-Adapter, {CLIP_VISION}")
    config = replace(config, projection_dim=len(projection))
    return build(CLIPVision, config, state, path, device, dtype)


def load_redux(path: Path, device="cpu", dtype=None) -> ReduxEmbedder:
    """Redux's embedder from a folder `image_embedder/` or from `flux1-redux-dev.safetensors`."""
    is_folder = path.is_dir()
    state = read_sharded(path, "diffusion_pytorch_model") if is_folder else read_safetensors(path)
    up, down = (state.get(f"redux_{name}.weight") for name in ("up", "down"))
    if up is None or down is None or up.ndim != 2 or down.ndim != 2 or 0 in up.shape:
        raise ValueError(f"{path} is not a Redux embedder: it lacks redux_up or redux_down")
    return build(ReduxEmbedder, ReduxConfig(up.shape[1], len(down)), state, path, device, dtype)
