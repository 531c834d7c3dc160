"""The names in LoRA files -> which module of ours a tensor changes, and as which factor.

    key = prefix + module + suffix     "lora_unet_" + "double_blocks_0_img_attn_qkv" + ".alpha"

    prefix    names the tool, and sometimes the network
    module    in the original or the diffusers layout, with dots or underscores: one table holds all
    suffix    is the kind of factor; PEFT's suffixes may contain the name of an adapter

    diffusers, PEFT      transformer.<diffusers module>.lora_A.weight, .lora_B.weight
    ai-toolkit, fal      diffusion_model. or base_model.model.<original module>.lora_A.weight
    kohya                lora_unet_<original_module>.lora_down.weight, .lora_up.weight, .alpha
    ComfyUI's saver      diffusion_model.<original module>.lora_down.weight, .diff, .set_weight
    XLabs                double_blocks.N.processor.qkv_lora1.down.weight (1 is img, 2 is txt)
    BFL Control          <original module>.lora_A.weight, .lora_B.weight, .lora_B.bias; norm scales
    OneTrainer           lora_transformer_<diffusers_module>.lora_down.weight, .dora_scale
    OneTrainer (OMI)     transformer.<original module>, with the parts of a fused layer numbered
    LyCORIS              lora_unet_<any_module>.lokr_w1, .hada_w1_a, .w_norm, ...
    SimpleTuner          lycoris_<diffusers_module>.lokr_w1, ...
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from torch import nn

from ..checkpoints.names import SWAPPED_HALVES, mmdit_modules
from ..networks.clip import CLIPText
from ..networks.mmdit import MMDiT
from ..networks.t5 import T5

# Prefix -> the network it means; None where it may stand before any of them.
PREFIXES = {
    "base_model.model.": None, "_orig_mod.": None, "module.": None, "model.": None,
    "diffusion_model.": "mmdit", "transformer.": None, "unet.": "mmdit",
    "lora_unet_": "mmdit", "lora_transformer_": "mmdit", "lycoris_": None,
    "text_encoder.": "clip", "text_encoder_2.": "t5",
    "text_encoders.": None, "clip_l.": "clip", "t5xxl.": "t5", "t5.": "t5",
    "lora_te_": None, "lora_te1_": "clip", "lora_te2_": "t5", "lora_te3_": "t5",
}

ADAPTER = r"(?:\.(?P<adapter>[^.]+))?"                      # of PEFT: any characters but a dot
PART = r"(?:\.(?P<part>\d))?"                               # of a fused layer
SAVED = r"(?:set_weight|modules_to_save\.[^.]+)"
SUFFIXES = {
    "A": rf"(?:lora_A{ADAPTER}|lora_down{PART}|lora\.down|lora_linear_layer\.down|down)\.weight",
    "B": rf"(?:lora_B{ADAPTER}|lora_up{PART}|lora\.up|lora_linear_layer\.up|up)\.weight",
    "B_bias": rf"lora_B{ADAPTER}\.bias",
    "alpha": r"alpha",
    "dora": r"(?:dora_scale|magnitude|"
            r"lora_magnitude_vector(?:\.(?P<adapter>(?!weight$)[^.]+))?)(?:\.weight)?",
    **{f"lokr_{w}": rf"lokr_{w}{ADAPTER}"
       for w in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")},
    **{f"hada_{w}": rf"hada_{w}{ADAPTER}" for w in ("w1_a", "w1_b", "w2_a", "w2_b")},
    "diff": r"(?:(?:scale|weight)\.)?(?:diff|w_norm)",
    "diff_b": r"(?:diff_b|b_norm|bias\.diff)",
    "reshape": r"reshape_weight",                           # the shape that the weight is padded to
    # What is replaced. A plain weight or bias is so only where PEFT's settings name it.
    "saved_weight": r"(?:(?:scale|weight)\.set_weight|set_weight|"
                    r"modules_to_save\.(?P<adapter>[^.]+)\.(?:scale|weight))",
    "saved_bias": r"(?:bias\.set_weight|modules_to_save\.(?P<adapter>[^.]+)\.bias)",
    "weight": r"(?:scale|weight)",
    "bias": r"(?:base_layer\.)?bias",
}
PATTERNS = {kind: re.compile(rf"(?P<module>.+?)\.{suffix}") for kind, suffix in SUFFIXES.items()}

# What changes weights by other formulas: words in its tensors' names, or with "_" their beginnings.
OTHER_METHODS = {
    "AdaLoRA": ("lora_E",), "OFT": ("oft_", "rescale"), "BOFT": ("boft_",), "HRA": ("hra_",),
    "IA3": ("ia3_", "on_input"), "VeRA": ("vera_",),
    "GLoRA": ("glora_", "a1", "a2", "b1", "b2", "bm1"),
    "FourierFT": ("fourierft_",), "VB-LoRA": ("vblora_",), "RandLoRA": ("randlora_",),
    "LN tuning": ("ln_tuning_",), "a LoRA of an embedding": ("lora_embedding_",),
    "LoCon, LoHa or LoKr of a convolution": ("lora_mid", "hada_t1", "hada_t2", "lokr_t2"),
    **{name: (name.lower() + "_",) for name in (
        "BEFT", "Bone", "C3A", "DEFT", "DeLoRA", "FRoD", "GraLoRA", "HiRA", "Lily", "MiSS", "OSF",
        "PEANuT", "Poly", "PSOFT", "PVeRA", "RoAd", "SHiRA", "TinyLoRA", "UniLoRA", "WaveFT",
        "AdaMSS", "SuperTuning")},
}
OTHER_MODELS = {
    "Stable Diffusion": ("input_blocks", "output_blocks", "middle_block", "down_blocks",
                         "up_blocks", "mid_block"),
    "Stable Diffusion 3": ("joint_blocks",),
    "FLUX.2": ("double_stream_modulation", "to_qkv_mlp_proj"),
}


class Target(NamedTuple):
    """A module of ours, or some rows of its weight."""

    network: str                       # "mmdit", "clip", "t5"
    module: str
    rows: tuple[int, int] | None = None
    swapped: bool = False              # the file has the two halves of the rows in the other order


class Name(NamedTuple):
    """A tensor's name, understood."""

    spelled: str                       # prefix and module, as in the file
    module: str                        # the module alone: a key of the table
    kind: str                          # a key of SUFFIXES
    adapter: str


def split_name(key: str, table: dict[str, Target]) -> Name | None:
    """The parts of a tensor's name; None if it names no module of the table, or no kind."""
    rest, network = key, None
    while prefix := next((prefix for prefix in PREFIXES if rest.startswith(prefix)), None):
        rest, network = rest.removeprefix(prefix), PREFIXES[prefix] or network
    for kind, pattern in PATTERNS.items():
        if match := pattern.fullmatch(rest):
            groups = match.groupdict()
            module = match["module"]
            if part := groups.get("part"):
                module += ("." if "." in module else "_") + part
            if module in table and network in (None, table[module].network):
                spelled = key[:len(key) - len(rest)] + module
                return Name(spelled, module, kind, groups.get("adapter") or "")
    return None


def other_method(key: str) -> str | None:
    """The method that a tensor of this name belongs to, if it is one that is not read."""
    for word in key.split(".")[1:]:
        for method, marks in OTHER_METHODS.items():
            if any(word == mark or mark[-1] == "_" and word.startswith(mark) for mark in marks):
                return method
    return None


def other_model(keys: list[str]) -> str | None:
    """The model whose modules these names mention, if it is a known one."""
    for model, words in OTHER_MODELS.items():
        if any(word in key for word in words for key in keys):
            return model
    return None


def targets(mmdit: MMDiT, clip: CLIPText | None, t5: T5 | None) -> dict[str, Target]:
    """Every name that a file may call a module by -> what it is here."""
    table = dict(mmdit_targets(mmdit))
    for network, tower in (("clip", clip), ("t5", t5)):
        for name, module in tower.named_modules() if tower is not None else ():
            if isinstance(module, nn.Linear) or module._parameters.get("weight") is not None:
                table[name] = table[name.removeprefix("text_model.")] = Target(network, name)
    return table | {name.replace(".", "_"): target for name, target in table.items()}


def mmdit_targets(mmdit: MMDiT) -> Iterator[tuple[str, Target]]:
    """The names of the transformer's modules, in both layouts, with XLabs' and OneTrainer's own."""
    config = mmdit.config
    hidden = config.hidden_size
    for module, parts in mmdit_modules(config.depth, config.depth_single_blocks).items():
        if module.startswith("guidance_in") and not config.guidance_embed:
            continue
        yield module, Target("mmdit", module)
        if len(parts) == 1:
            yield parts[0], Target("mmdit", module, swapped=module == SWAPPED_HALVES)
            continue
        rows = mmdit.get_submodule(module).out_features
        # Note: q, k and v have `hidden` rows each; what is left belongs to the MLP.
        ends = [hidden, 2 * hidden, 3 * hidden, rows]
        for i, part in enumerate(parts):
            target = Target("mmdit", module, (i * hidden, ends[i]))
            yield part, target
            yield f"{module}.{i}", target
    yield "img_in.proj", Target("mmdit", "img_in")
    for i in range(config.depth):
        block = f"double_blocks.{i}"
        for number, stream, fused in ((1, "img", "to_qkv"), (2, "txt", "to_added_qkv")):
            qkv = Target("mmdit", f"{block}.{stream}_attn.qkv")
            yield f"{block}.processor.qkv_lora{number}", qkv
            proj = Target("mmdit", f"{block}.{stream}_attn.proj")
            yield f"{block}.processor.proj_lora{number}", proj
            yield f"transformer_blocks.{i}.attn.{fused}", qkv
    for i in range(config.depth_single_blocks):
        block = f"single_blocks.{i}"
        qkv = Target("mmdit", f"{block}.linear1", (0, 3 * hidden))
        yield f"{block}.processor.qkv_lora", qkv
        yield f"{block}.processor.proj_lora", Target("mmdit", f"{block}.linear2")
        yield f"single_transformer_blocks.{i}.attn.to_qkv", qkv


def dialect(keys: list[str]) -> str:
    """The name of the tool or layout, for people."""
    def any_has(*words: str) -> bool:
        return any(word in key for word in words for key in keys)

    marks = {
        "XLabs": (".processor.",), "OneTrainer": ("lora_transformer_",), "kohya": ("lora_unet_",),
        "SimpleTuner": ("lycoris_",), "BFL Control": ("query_norm.scale",),
        "BFL": ("double_blocks", "single_blocks"), "diffusers": ("",),
    }
    tool = next(tool for tool, words in marks.items() if any_has(*words))
    methods = {"LoKr": ("lokr_",), "LoHa": ("hada_",), "DoRA": ("dora_scale", "magnitude")}
    return tool + "".join(f" with {name}" for name, words in methods.items() if any_has(*words))
