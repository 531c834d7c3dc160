"""LoRA files -> changes of our weights, whatever the dialect of their names.

    key = prefix + module + suffix          "lora_unet_" + "double_blocks_0_img_attn_qkv" + ".lora_down.weight"

    prefix    says which tool wrote it, and is dropped
    module    in the original or the diffusers layout, with dots or underscores: one table holds them all
    suffix    says which factor of the change this is

    diffusers, PEFT, ai-toolkit    transformer.<diffusers module>.lora_A.weight, .lora_B.weight; alphas in the metadata
    kohya                          lora_unet_<original_module>.lora_down.weight, .lora_up.weight, .alpha
    XLabs                          double_blocks.N.processor.qkv_lora1.down.weight (1 is img, 2 is txt)
    BFL Control                    <original module>.lora_A.weight, .lora_B.weight, .lora_B.bias; norm scales as they are
    BFL                            diffusion_model. or base_model.model.<original module>.lora_A.weight, ...
    OneTrainer                     lora_transformer_<diffusers_module>.lora_down.weight, ...
    LyCORIS                        <any of these>.lokr_w1, .lokr_w2, or .lokr_w1_a, .lokr_w1_b, ...
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.formats import listing
from ..checkpoints.names import SWAPPED_HALVES, mmdit_modules, swap_halves
from ..networks.clip import CLIPText
from ..networks.mmdit import MMDiT
from ..networks.t5 import T5

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "lora_unet_", "lora_transformer_",
            "text_encoder.", "text_encoder_2.", "text_encoders.clip_l.transformer.", "text_encoders.t5xxl.transformer.",
            "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_")
SUFFIXES = {
    "A": r"\.(lora_A(\.\w+)?|lora_down|lora\.down|down|lora_linear_layer\.down)\.weight",
    "B": r"\.(lora_B(\.\w+)?|lora_up|lora\.up|up|lora_linear_layer\.up)\.weight",
    "bias": r"\.lora_B(\.\w+)?\.bias",
    "alpha": r"\.alpha",
    "dora": r"\.(dora_scale|lora_magnitude_vector(\.\w+)?)",
    "diff": r"\.diff",
    "diff_b": r"\.diff_b",
    **{kind: rf"\.lokr_{kind}" for kind in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b")},
    "value": r"\.(scale|weight)",                           # of a norm, which it replaces
}
ELSEWHERE = {"Stable Diffusion": ("input_blocks", "output_blocks", "middle_block", "down_blocks", "up_blocks", "mid_block")}


class Target(NamedTuple):
    """A linear layer or norm of ours, or some rows of one."""

    network: str                       # "mmdit", "clip", "t5"
    module: str
    rows: tuple[int, int] | None = None
    swapped: bool = False              # the dialect has the two halves of the rows in the other order


@dataclass(frozen=True)
class Delta:
    """What a file changes in the rows of one weight; `factors` by their kinds (the keys of SUFFIXES)."""

    target: Target
    factors: dict[str, Tensor]
    scale: float                       # alpha / rank

    @property
    def rank(self) -> int:
        return len(self.factors["A"]) if "A" in self.factors else 0

    def of_weight(self, weight: Tensor) -> Tensor:
        """The change of a weight (out, in) at a user's scale of one, float32; rows that it leaves alone are not in it.

            LoRA    alpha / rank · B A
            LoKr    alpha / rank · w1 ⊗ w2        (arXiv:2309.14859)
            DoRA    m · (W + Δ) / |W + Δ| - W      (arXiv:2402.09353), the norm over rows or columns as m has its shape
        """
        f = {kind: factor.to(weight.device, torch.float32) for kind, factor in self.factors.items()}
        if "A" in f:
            delta = self.scale * (f["B"] @ f["A"])
        elif "diff" in f:
            delta = f["diff"]
        elif self.is_lokr:
            w1, w2 = (f[w] if w in f else f[f"{w}_a"] @ f[f"{w}_b"] for w in ("w1", "w2"))
            delta = self.scale * torch.kron(w1, w2)
        else:
            delta = torch.zeros_like(self.own(weight))
        if delta.shape[1] < weight.shape[1]:                # made for a model without the further input channels
            delta = nn.functional.pad(delta, (0, weight.shape[1] - delta.shape[1]))
        if "dora" in f:
            changed = self.own(weight).float() + delta
            m, by_rows = f["dora"], f["dora"].ndim == 1 or f["dora"].shape[0] == len(changed) != 1
            delta = m.view(-1, 1) * changed / changed.norm(dim=1, keepdim=True) if by_rows else m * changed / changed.norm(dim=0)
            delta = delta - self.own(weight).float()
        return swap_halves(delta) if self.target.swapped else delta

    @property
    def is_low_rank(self) -> bool:
        """Whether it is B A and nothing else: most are."""
        return self.factors.keys() <= {"A", "B", "bias"} and "A" in self.factors

    def low_rank(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Of such a one: alpha / rank · B (out, rank) and A (rank, in) for the whole weight, float32, zeros where it changes nothing."""
        b, a = (self.factors[kind].to(weight.device, torch.float32) for kind in ("B", "A"))
        start, stop = self.target.rows or (0, len(weight))
        b = nn.functional.pad(self.scale * (swap_halves(b) if self.target.swapped else b), (0, 0, start, len(weight) - stop))
        return b, nn.functional.pad(a, (0, weight.shape[1] - a.shape[1]))

    def of_bias(self, like: Tensor) -> Tensor | None:
        """The change of a bias (out,), or None."""
        bias = self.scale * self.factors["bias"].float() if "bias" in self.factors else self.factors.get("diff_b")
        if bias is None:
            return None
        return (swap_halves(bias) if self.target.swapped else bias).to(like.device, torch.float32)

    def apply(self, x: Tensor, y: Tensor, layer: nn.Linear, scale: float) -> Tensor:
        """The layer's output y (..., out) for the input x (..., in) with this change added; for LoRA by two small products."""
        if "A" in self.factors and "dora" not in self.factors:
            a = self.factors["A"]
            change = nn.functional.linear(nn.functional.linear(x[..., :a.shape[1]], a), self.factors["B"]) * self.scale
            change = torch.cat(change.chunk(2, dim=-1)[::-1], dim=-1) if self.target.swapped else change
        else:
            change = nn.functional.linear(x, self.of_weight(layer.weight).to(x.dtype))
        if (bias := self.of_bias(y)) is not None:
            change = change + bias.to(x.dtype)
        start, stop = self.target.rows or (0, y.shape[-1])
        return torch.cat([y[..., :start], y[..., start:stop] + scale * change, y[..., stop:]], dim=-1)

    def to(self, like: Tensor) -> "Delta":
        """Its factors where the weight is, in the weight's dtype."""
        return replace(self, factors={kind: factor.to(like) for kind, factor in self.factors.items()})

    def own_rows(self, weight: Tensor) -> Tensor:
        """A view of the rows that it changes."""
        return weight[slice(*self.target.rows)] if self.target.rows else weight

    def own(self, weight: Tensor) -> Tensor:
        """The same in the dialect's order."""
        return swap_halves(weight) if self.target.swapped else self.own_rows(weight)

    @property
    def is_lokr(self) -> bool:
        return any(kind.startswith("w1") for kind in self.factors)

    @property
    def shape(self) -> tuple[int, int] | None:
        """(out, in) of its change; None if it changes no matrix."""
        def size(w: str, axis: int) -> int:
            return self.factors[w].shape[axis] if w in self.factors else self.factors[f"{w}_{'ab'[axis]}"].shape[axis]

        if "A" in self.factors:
            return len(self.factors["B"]), self.factors["A"].shape[1]
        if self.is_lokr:
            return size("w1", 0) * size("w2", 0), size("w1", 1) * size("w2", 1)
        return tuple(self.factors["diff"].shape) if "diff" in self.factors and self.factors["diff"].ndim == 2 else None


@dataclass(frozen=True)
class Parsed:
    """A file, understood."""

    deltas: list[Delta]
    dialect: str
    total: int
    unmatched: list[str]

    def __str__(self) -> str:
        ranks = sorted({delta.rank for delta in self.deltas if delta.rank})
        alphas = sorted({round(delta.scale * delta.rank, 4) for delta in self.deltas if delta.rank})
        parts = Counter(delta.target.network for delta in self.deltas)
        return (f"matched {self.total - len(self.unmatched)} of {self.total} tensors, dialect {self.dialect}, rank {few(ranks)}, alpha "
                f"{few(alphas)}, changes " + ", ".join(f"{count} modules of {part}" for part, count in parts.items()))


def few(values: list) -> str:
    return "none" if not values else f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"


def targets(mmdit: MMDiT, clip: CLIPText | None, t5: T5 | None) -> dict[str, Target]:
    """Every name that a dialect may call a module by -> what that is here."""
    config, table = mmdit.config, {}
    hidden = config.hidden_size
    for original, parts in mmdit_modules(config.depth, config.depth_single_blocks).items():
        table[original] = Target("mmdit", original)
        for i, part in enumerate(parts):
            last = len(parts) > 3 and i == 3                # of q, k, v, mlp: hidden rows each, and the rest
            rows = (i * hidden, len(mmdit.get_submodule(original).weight) if last else (i + 1) * hidden) if len(parts) > 1 else None
            table[part] = Target("mmdit", original, rows, swapped=original == SWAPPED_HALVES)
    for i in range(config.depth):
        for number, stream in ((1, "img"), (2, "txt")):
            for layer in ("qkv", "proj"):
                table[f"double_blocks.{i}.processor.{layer}_lora{number}"] = Target("mmdit", f"double_blocks.{i}.{stream}_attn.{layer}")
    for i in range(config.depth_single_blocks):
        table[f"single_blocks.{i}.processor.qkv_lora"] = Target("mmdit", f"single_blocks.{i}.linear1", (0, 3 * hidden))
        table[f"single_blocks.{i}.processor.proj_lora"] = Target("mmdit", f"single_blocks.{i}.linear2")
    for network, tower in (("clip", clip), ("t5", t5)):
        for name, module in tower.named_modules() if tower is not None else ():
            if isinstance(module, nn.Linear):
                table[name] = table[name.removeprefix("text_model.")] = Target(network, name)
    return table | {name.replace(".", "_"): target for name, target in table.items()}


def split_key(key: str, table: dict[str, Target]) -> tuple[str, str] | None:
    """(module, kind of factor) of a tensor's name, or None if that is of no module in the table."""
    for prefix in PREFIXES * 2:                             # they come in pairs, too
        key = key.removeprefix(prefix)
    for kind, pattern in SUFFIXES.items():
        if match := re.fullmatch(rf"(.+?){pattern}", key):
            module = match[1]
            if module in table and (kind != "value" or module.endswith(("_norm", "norm_q", "norm_k", "norm_added_q", "norm_added_k"))):
                return module, kind
    return None


def parse(state: dict[str, Tensor], metadata: dict[str, str], table: dict[str, Target], source) -> Parsed:
    """Sorts the tensors of a file into changes of modules. Raises ValueError for factors that do not belong together."""
    groups: dict[str, dict[str, Tensor]] = {}
    unmatched = []
    for key, tensor in state.items():
        if (found := split_key(key, table)) is None:
            unmatched.append(key)
        else:
            groups.setdefault(found[0], {})[found[1]] = tensor
    if not groups:
        other = next((model for model, words in ELSEWHERE.items() if any(word in key for word in words for key in unmatched)), None)
        raise ValueError(f"{source} is no LoRA of FLUX.1: " + ("it holds no tensors" if not state else
                         f"its names are those of {other}'s" if other else f"it holds {listing(unmatched)}"))
    pairs = [name for name, factors in groups.items() if "A" in factors and "B" in factors]
    without = [name for name in pairs if "alpha" not in groups[name]]
    if 0 < len(without) < len(pairs):
        raise ValueError(f"{source} has an alpha for some modules but not for {listing(without)}: it is incomplete, get it again")
    settings = read_settings(metadata)
    deltas = [make_delta(name, factors, table[name], settings, source) for name, factors in groups.items()]
    return Parsed(deltas, dialect(state), len(state), unmatched)


def make_delta(name: str, factors: dict[str, Tensor], target: Target, settings: dict[str, dict], source) -> Delta:
    def bad(why: str) -> ValueError:
        return ValueError(f"{source}: {name} {why}")

    for kind, factor in factors.items():
        if not factor.is_floating_point():
            raise bad(f"has a {kind} of {factor.dtype}, expected floating-point numbers")
        if not factor.is_meta and not torch.isfinite(factor.float()).all():
            raise bad(f"has a {kind} with NaN or infinity: the file is damaged, get it again")
    factors = {kind: f.flatten(1) if f.ndim == 4 and f.shape[2:] == (1, 1) else f for kind, f in factors.items()}  # 1x1 convolutions
    alpha, rank = factors.pop("alpha", None), None
    if ("A" in factors) != ("B" in factors):
        raise bad(f"has only one half of a LoRA, {'A' if 'A' in factors else 'B'}")
    if "A" in factors:
        a, b = factors["A"], factors["B"]
        if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
            raise bad(f"has factors of the shapes {list(a.shape)} and {list(b.shape)}, whose ranks disagree")
        rank = len(a)
    if any(kind.startswith("w") for kind in factors):
        for w in ("w1", "w2"):
            a, b = factors.get(f"{w}_a"), factors.get(f"{w}_b")
            if w not in factors and (a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b)):
                raise bad(f"lacks lokr_{w}, or its factors do not fit together")
            rank = rank if b is None else len(b)
    if alpha is not None:
        if alpha.numel() != 1:
            raise bad(f"has an alpha of the shape {list(alpha.shape)}, expected one number")
        # Note: a whole Kronecker factor has no rank, and its alpha then counts for nothing.
        scale = 1.0 if rank is None or alpha.is_meta else alpha.item() / rank
    else:
        scale = settings_scale(name, rank, settings[target.network]) if rank and target.network in settings else 1.0
    return Delta(target, factors, scale)


def read_settings(metadata: dict[str, str]) -> dict[str, dict]:
    """PEFT's settings of each network, from the metadata that diffusers writes ("transformer.r", "text_encoder.lora_alpha", ...)
    or from a PEFT folder's configuration ("r", "lora_alpha", ...)."""
    try:
        values = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError:
        values = {}
    networks: dict[str, dict] = {}
    for key, value in values.items() if isinstance(values, dict) else ():
        network, dot, name = key.partition(".")
        network = {"transformer": "mmdit", "text_encoder": "clip", "text_encoder_2": "t5"}.get(network, "mmdit")
        networks.setdefault(network, {})[name if dot else key] = value
    return networks


def settings_scale(name: str, rank: int, settings: dict) -> float:
    """lora_alpha / r, or / √r with rsLoRA; patterns of module names may give a module its own alpha."""
    alpha = settings.get("lora_alpha", rank)
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if name == pattern or name.endswith("." + pattern):
            alpha = value
    if not isinstance(alpha, (int, float)):
        return 1.0
    return alpha / (rank ** 0.5 if settings.get("use_rslora") is True else rank)


def dialect(state: dict[str, Tensor]) -> str:
    """The name of the dialect, for people."""
    keys = list(state)

    def any_has(*words: str) -> bool:
        return any(word in key for word in words for key in keys)

    what = ("XLabs" if any_has(".processor.") else "OneTrainer" if any_has("lora_transformer_") else "kohya" if any_has("lora_unet_")
            else "BFL Control" if any_has("query_norm.scale") else "BFL" if any_has("double_blocks", "single_blocks") else "diffusers")
    return what + (" with LoKr" if any_has("lokr_") else "") + (" with DoRA" if any_has("dora_scale", "magnitude") else "")
