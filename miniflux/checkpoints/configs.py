"""The small JSON files of a model's folder -> our configs.

Every key that changes a number in the reference libraries is either read, or *fixed*: a file with
another value is refused by name. The rest is listed as harmless, with the reason; a test walks the
keys of the reference classes, so that a new one is noticed.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path

from ..files import read_json
from ..flux import Schedule
from ..networks.autoencoder import AutoencoderConfig
from ..networks.clip import ACTIVATIONS, CLIPConfig
from ..networks.controlnet import ControlNetConfig
from ..networks.mmdit import MMDiTConfig
from .building import check_class, pick


@dataclass(frozen=True)
class Keys:
    """What becomes of the keys of a reference class's config."""

    read: tuple[str, ...]                # taken over
    fixed: dict[str, object]             # refused with any other value
    harmless: dict[str, str]             # key -> why no number here depends on it


def check_fixed(values: dict, fixed: dict, source: Path) -> None:
    """Refuses a config whose value of a fixed key is another one; a key may be absent."""
    for key, expected in fixed.items():
        if (found := values.get(key, expected)) != expected:
            raise ValueError(f"{source}: {key} is {found!r:.60}, expected {expected!r}")


# ----------------------------------------------------------------------------------- the scheduler

SPACINGS = {"use_karras_sigmas": "karras", "use_exponential_sigmas": "exponential",
            "use_beta_sigmas": "beta"}
SCHEDULER = Keys(
    read=("use_dynamic_shifting", "shift", "base_shift", "max_shift", "base_image_seq_len",
          "max_image_seq_len", "time_shift_type", "shift_terminal", *SPACINGS),
    # The last three are no arguments of the class, but the pipelines and the spacings read them.
    fixed={"num_train_timesteps": 1000, "invert_sigmas": False, "stochastic_sampling": False,
           "use_flow_sigmas": False, "sigma_min": None, "sigma_max": None},
    harmless={})
SCHEDULER_CLASS = "FlowMatchEulerDiscreteScheduler"


def read_folder_schedule(folder: Path) -> Schedule | None:
    """The schedule of a model's folder; None if it brings none.

    Note: diffusers builds the class that model_index.json names, whatever the scheduler's own file
    names."""
    index = folder / "model_index.json"
    entry = read_json(index).get("scheduler") if index.is_file() else None
    named = entry[-1] if isinstance(entry, list) and entry else None
    if named not in (None, SCHEDULER_CLASS):
        raise ValueError(f"{index} names the scheduler {named!r:.60}, expected {SCHEDULER_CLASS}: "
                         'schedule="dev" or "schnell" asks for one of those')
    path = folder / "scheduler" / "scheduler_config.json"
    return read_schedule(path) if path.is_file() else None


def read_schedule(path: Path) -> Schedule:
    """The schedule of a scheduler_config.json."""
    values = read_json(path)
    check_class(values, (SCHEDULER_CLASS,), path)
    check_fixed(values, SCHEDULER.fixed, path)
    # Note: the class's own default is a fixed shift.
    values = {"use_dynamic_shifting": False} | values
    names = {key: key for key in SCHEDULER.read if key not in SPACINGS}
    kind = values.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"{path}: time_shift_type is {kind!r:.60}, "
                         "expected 'exponential' or 'linear'")
    settings = pick(Schedule, values, names, path)
    if settings.base_image_seq_len == settings.max_image_seq_len:
        raise ValueError(f"{path}: base_image_seq_len and max_image_seq_len are both "
                         f"{settings.max_image_seq_len}, expected two sizes")
    terminal = settings.shift_terminal
    if terminal is not None and terminal >= 1:
        raise ValueError(f"{path}: shift_terminal is {terminal}, expected a time below 1")
    spacings = [spacing for key, spacing in SPACINGS.items() if values.get(key)]
    if len(spacings) > 1:
        raise ValueError(f"{path} asks for the spacings {' and '.join(spacings)}, expected one")
    return replace(settings, spacing=spacings[0]) if spacings else settings


# --------------------------------------------------------------------- transformer and ControlNets

# Our field -> their key.
MMDIT_FIELDS = {
    "in_channels": "in_channels", "out_channels": "out_channels",
    "vec_in_dim": "pooled_projection_dim", "context_in_dim": "joint_attention_dim",
    "hidden_size": "hidden_size", "num_heads": "num_attention_heads", "depth": "num_layers",
    "depth_single_blocks": "num_single_layers", "axes_dim": "axes_dims_rope",
    "guidance_embed": "guidance_embeds",
}
TRANSFORMER = Keys(
    read=("in_channels", "out_channels", "num_layers", "num_single_layers", "attention_head_dim",
          "num_attention_heads", "joint_attention_dim", "pooled_projection_dim", "guidance_embeds",
          "axes_dims_rope"),
    fixed={"patch_size": 1},
    harmless={})
CONTROLNET = replace(TRANSFORMER, read=(*TRANSFORMER.read, "num_mode",
                                        "conditioning_embedding_channels"))


def mmdit_config(values: dict, source: Path) -> MMDiTConfig:
    """Sizes from a `FluxTransformer2DModel` config; what it leaves out has diffusers' defaults."""
    check_class(values, ("FluxTransformer2DModel",), source)
    check_fixed(values, TRANSFORMER.fixed, source)
    return pick(MMDiTConfig, mmdit_values(values, source), MMDIT_FIELDS, source)


def controlnet_config(values: dict, source: Path) -> ControlNetConfig:
    """Sizes from a `FluxControlNetModel` config."""
    check_class(values, ("FluxControlNetModel",), source)
    # Note: XLabs' hint is cut into patches of 2x2; the latents of the others are patches already.
    hint = values.get("conditioning_embedding_channels") is not None
    check_fixed(values, CONTROLNET.fixed | {"patch_size": 2 if hint else 1}, source)
    # Note: diffusers' defaults are a whole copy of the transformer, and no modes.
    values = {"num_layers": 19, "num_single_layers": 38} | mmdit_values(values, source) | {
        "num_mode": values.get("num_mode") or 0, "hint": hint}
    names = MMDIT_FIELDS | {"modes": "num_mode", "hint": "hint"}
    return pick(ControlNetConfig, values, names, source)


def mmdit_values(values: dict, source: Path) -> dict:
    """The config with what diffusers derives from it."""
    heads, head_dim = values.get("num_attention_heads", 24), values.get("attention_head_dim", 128)
    if type(heads) is not int or type(head_dim) is not int:
        raise ValueError(f"{source}: the attention's sizes are {heads!r:.30} and {head_dim!r:.30}, "
                         "expected whole numbers")
    # Note: two defaults that are not dev's: without guidance_embeds there is none, without
    # out_channels there are as many as in_channels.
    return {"guidance_embeds": False} | values | {
        "hidden_size": heads * head_dim,
        "out_channels": values.get("out_channels") or values.get("in_channels", 64)}


# --------------------------------------------------------------------------------- the autoencoder

AUTOENCODER = Keys(
    read=("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups",
          "sample_size", "scaling_factor", "shift_factor", "down_block_types", "up_block_types"),
    fixed={"in_channels": 3, "out_channels": 3, "act_fn": "silu", "mid_block_add_attention": True,
           "use_quant_conv": False, "use_post_quant_conv": False},
    harmless={"force_upcast": "the dtype is the caller's",
              "latents_mean": "no pipeline of FLUX.1 uses it",
              "latents_std": "no pipeline of FLUX.1 uses it"})
BLOCK_TYPES = {"down_block_types": "DownEncoderBlock2D", "up_block_types": "UpDecoderBlock2D"}


def autoencoder_config(values: dict, source: Path) -> AutoencoderConfig:
    """Sizes from an `AutoencoderKL` config; what it leaves out has diffusers' defaults."""
    check_class(values, ("AutoencoderKL",), source)
    check_fixed(values, AUTOENCODER.fixed, source)
    values = {"block_out_channels": [64], "layers_per_block": 1, "latent_channels": 4,
              "norm_num_groups": 32, "scaling_factor": 0.18215, "shift_factor": None} | values
    widths = values["block_out_channels"]
    is_list = isinstance(widths, list) and bool(widths)
    if not is_list or not all(type(w) is int and w > 0 and w % widths[0] == 0 for w in widths):
        raise ValueError(f"{source}: block_out_channels is {widths!r:.60}, "
                         "expected a list of multiples of its first")
    for key, kind in BLOCK_TYPES.items():
        if (found := values.get(key, [kind])) not in ([kind], [kind] * len(widths)):
            raise ValueError(f"{source}: {key} is {found!r:.90}, "
                             f"expected {len(widths)} of {kind!r}")
    names = {"ch": "ch", "ch_mult": "ch_mult", "num_res_blocks": "layers_per_block",
             "z_channels": "latent_channels", "num_groups": "norm_num_groups",
             "scale_factor": "scaling_factor", "shift_factor": "shift_factor"}
    values |= {"ch": widths[0], "ch_mult": [width // widths[0] for width in widths]}
    return pick(AutoencoderConfig, values, names, source)


# ---------------------------------------------------------------- CLIP, SigLIP and other encoders

CLIP_TEXT = Keys(
    read=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "vocab_size", "max_position_embeddings", "layer_norm_eps", "hidden_act", "eos_token_id"),
    fixed={},
    harmless={"projection_dim": "of the projection that FLUX.1 leaves out",
              "attention_dropout": "acts in training", "initializer_range": "acts in training",
              "initializer_factor": "acts in training",
              "pad_token_id": "the tokenizer pads",
              "bos_token_id": "the tokenizer puts it in front"})
# Note: the base model's, not those of FLUX.1's L/14; the end token is that of the vocabulary, while
# the official file has the 2 of older versions, which makes transformers pool at the largest id.
CLIP_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                 "eos_token_id": 49407}
# Note: transformers leaves out of a vision config what is its default, which is the base model's.
VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
                   "num_attention_heads": 12, "image_size": 224}
VISION = Keys(
    read=("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "image_size", "patch_size", "layer_norm_eps", "hidden_act"),
    fixed={"num_channels": 3},
    harmless={"projection_dim": "read from the projection's shape",
              "attention_dropout": "acts in training", "initializer_range": "acts in training",
              "initializer_factor": "acts in training",
              "vision_use_head": "the head is left out: Redux takes the tokens"})


def clip_config(values: dict, source: Path) -> CLIPConfig:
    """Sizes from the config of a text tower or of a whole CLIP.

    What it leaves out has transformers' defaults."""
    check_class(values, ("CLIPTextModel", "CLIPModel", "CLIPTextModelWithProjection"), source)
    text = values.get("text_config")
    values = CLIP_DEFAULTS | values | (text if isinstance(text, dict) else {})
    return tower_config(CLIPConfig, values, source)


def tower_config(kind: type, values: dict, source: Path):
    """Sizes of one of CLIP's or SigLIP's transformers, whose config has our fields' names."""
    names = {field.name: field.name for field in fields(kind) if field.name != "hidden_act"}
    config = pick(kind, values, names, source)
    activation = values.get("hidden_act", kind.hidden_act)
    if activation not in ACTIVATIONS:
        raise ValueError(f"{source}: hidden_act is {activation!r:.60}, "
                         f"expected one of {', '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(f"{source}: {config.hidden_size} channels cannot be shared by "
                         f"{config.num_attention_heads} heads")
    return replace(config, hidden_act=activation)


def vision_config(kind: type, classes: tuple[str, ...], patch_size: int, path: Path):
    """Sizes of a vision tower from its folder's config, or from that of a whole CLIP or SigLIP."""
    source = path / "config.json"
    values = read_json(source)
    check_class(values, classes, source)
    own = values.get("vision_config")
    values = VISION_DEFAULTS | {"patch_size": patch_size} | values
    values |= own if isinstance(own, dict) else {}
    check_fixed(values, VISION.fixed, source)
    config = tower_config(kind, values, source)
    if config.image_size < config.patch_size:
        raise ValueError(f"{source}: patches of {config.patch_size} do not fit into images of "
                         f"{config.image_size} pixels")
    return config


# ----------------------------------------------------------------------------------------------- T5

T5_ENCODER = Keys(
    read=("relative_attention_max_distance", "feed_forward_proj", "dense_act_fn"),
    fixed={"layer_norm_epsilon": 1e-6},
    harmless={
        **{key: "read from the tensors' shapes" for key in
           ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads",
            "relative_attention_num_buckets", "is_gated_act")},
        **{key: "of the decoder, which is left out" for key in
           ("num_decoder_layers", "use_cache", "is_decoder", "scale_decoder_outputs",
            "tie_word_embeddings")},
        **{key: "acts in training" for key in
           ("dropout_rate", "classifier_dropout", "initializer_factor")},
        "pad_token_id": "the tokenizer pads", "eos_token_id": "the tokenizer puts it at the end"})


def check_t5(values: dict, source: Path) -> None:
    """Refuses the config of an encoder that computes otherwise than T5 v1.1's."""
    check_class(values, ("T5EncoderModel", "T5ForConditionalGeneration"), source)
    check_fixed(values, T5_ENCODER.fixed, source)
    projection = values.get("feed_forward_proj", "gated-gelu")
    # Note: "gated-gelu" means the approximation by tanh; other names mean what they say.
    activation = "gelu_new" if projection == "gated-gelu" else str(projection).rpartition("-")[2]
    activation = values.get("dense_act_fn", activation)
    if activation not in ("gelu_new", "gelu_pytorch_tanh"):
        raise ValueError(f"{source}: the activation is {activation!r:.60}, "
                         "expected 'gelu_new', that of feed_forward_proj 'gated-gelu'")


# -------------------------------------------------------------------------------------- the words

WORD_LIST = "words.json"                 # all words that a small model was taught


def read_words(folder: Path) -> frozenset[str] | None:
    """The words in a model's folder, or None where it has no list."""
    file = folder / WORD_LIST
    if not file.is_file():
        return None
    words = read_json(file).get("words")
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{file} holds no list of words: expected {{\"words\": [\"a\", ...]}}")
    return frozenset(words)
