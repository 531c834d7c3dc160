"""PEFT's settings: what a LoRA's numbers mean beyond its tensors.

    LoRA          scale = lora_alpha / r          rsLoRA      scale = lora_alpha / √r
    LoKr, LoHa    scale = alpha / r

They stand in an `adapter_config.json` beside the file (PEFT), or in the file's own metadata
(diffusers: "transformer.r", "text_encoder.lora_alpha", ...). `alpha_pattern` and `rank_pattern`
give single modules another alpha or r: their keys are regular expressions; the first that fits
counts.
"""

import json
import re
from pathlib import Path

from ..checkpoints.formats import SAFETENSORS, read_json

Settings = dict[str, object]

METADATA = "lora_adapter_metadata"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
NETWORKS = {"transformer": "mmdit", "text_encoder": "clip", "text_encoder_2": "t5"}
KINDS = ("LORA", "LOKR", "LOHA")
DEFAULT = 8                            # of r and of every alpha
# These initialisations take a part out of the model's weights, which the file does not hold.
RESIDUAL = ("pissa", "olora", "corda", "loftq", "lora_ga")
# These settings make another formula of it.
OTHER_FORMULAS = ("use_qalora", "alora_invocation_tokens", "use_bdlora", "arrow_config",
                  "kasa_config", "monteclora_config", "velora_config", "layer_replication",
                  "target_parameters", "trainable_token_indices")


def read_settings(path: Path, metadata: dict[str, str]) -> dict[str, Settings]:
    """The settings of each network ("mmdit", "clip", "t5") that a file has any for.

    path: the safetensors file. metadata: its own texts.
    Raises ValueError for settings that are damaged, or that mean what is not read here."""
    if METADATA in metadata:
        try:
            values = json.loads(metadata[METADATA])
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: its {METADATA} is not valid JSON ({error})") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: its {METADATA} is a {type(values).__name__}, "
                             "expected an object")
    elif (config := config_of(path)) is not None:
        values = read_json(config)
    else:
        return {}
    settings: dict[str, Settings] = {}
    for key, value in values.items():
        network, dot, name = key.partition(".")
        if dot and network in NETWORKS:
            settings.setdefault(NETWORKS[network], {})[name] = value
        else:
            for network in NETWORKS.values():
                settings.setdefault(network, {})[key] = value
    for values in settings.values():
        check_settings(values, path)
    return settings


def config_of(path: Path) -> Path | None:
    """The `adapter_config.json` beside a file that it belongs to, if there is one.

    Note: a folder may hold LoRAs of other tools too, which PEFT's settings do not concern."""
    config, weights = path.with_name(CONFIG), path.with_name(WEIGHTS)
    if not config.is_file():
        return None
    if path.name == WEIGHTS:
        return config
    files = [file for file in path.parent.iterdir() if file.suffix in SAFETENSORS]
    alone = not weights.exists() and len(files) == 1
    return config if alone else None


def check_settings(settings: Settings, source: Path) -> None:
    """Refuses by name what would change the model in a way that is not read here."""
    kind = settings.get("peft_type") or "LORA"
    if kind not in KINDS:
        raise ValueError(f"{source} is a PEFT adapter of the kind {kind!r:.40}: "
                         f"expected one of {', '.join(KINDS)}")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(RESIDUAL):
        raise ValueError(f"{source} was initialised with {start[:40]}, which changed the model's "
                         "own weights: save it as a plain LoRA, with PEFT's save_pretrained(..., "
                         "path_initial_model_for_weight_conversion=...)")
    if others := [name for name in OTHER_FORMULAS if settings.get(name)]:
        raise ValueError(f"{source} has the PEFT settings {', '.join(others)}: "
                         "such LoRAs are not read here")


def pattern_value(settings: Settings, pattern: str, default: str, name: str, source: Path) -> float:
    """What a pattern gives to a module, or else the default setting (PEFT's `get_pattern_key`)."""
    key, value = default, settings.get(default, DEFAULT)
    patterns = settings.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{source}: its {pattern} is {patterns!r:.60}, expected an object")
    for key_pattern, candidate in patterns.items():
        try:
            fits = re.match(rf"(.*\.)?({key_pattern})$", name)
        except re.error as error:
            raise ValueError(f"{source}: its {pattern} has the key {key_pattern!r:.60}, "
                             f"which is no regular expression ({error})") from None
        if fits:
            key, value = f"{pattern} for {key_pattern!r:.60}", candidate
            break
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e9:
        raise ValueError(f"{source}: its {key} is {value!r:.60}, expected a number")
    return float(value)


def scale_of(settings: Settings, name: str, rank: int | None, source: Path) -> float:
    """alpha / r of a module.

    name: the module's, as in the file, without prefix.
    rank: that of its factors; None for whole ones.
    Raises ValueError where the settings are those of factors of another rank."""
    is_lora = (settings.get("peft_type") or "LORA") == "LORA"
    default = "lora_alpha" if is_lora else "alpha"
    alpha = pattern_value(settings, "alpha_pattern", default, name, source)
    r = pattern_value(settings, "rank_pattern", "r", name, source)
    if "r" not in settings and rank:
        r = rank
    if r <= 0 or rank and r != rank:
        raise ValueError(f"{source}: {name} has the rank {rank}, its settings say {r:g}: "
                         "they belong to another file")
    return alpha / (r ** 0.5 if is_lora and settings.get("use_rslora") else r)


def saves_weight(settings: Settings, name: str) -> bool:
    """Whether PEFT trained and saved this module as a whole."""
    modules = settings.get("modules_to_save")
    return isinstance(modules, (list, tuple)) and name.endswith(tuple(map(str, modules)))


def saves_bias(settings: Settings, name: str) -> bool:
    """Whether PEFT trained and saved this module's bias."""
    return settings.get("bias", "none") != "none" or saves_weight(settings, name)
