"""Quantised weights: how they are stored in files and in memory, and the numbers they stand for.

    fp8      w = scale · q           q in float8, one scale a row         (ComfyUI's files, quanto)
    int8     w = scale · q           q in int8, one scale a row           (LLM.int8(), 2208.07339)
    nf4      w = absmax · table[q]   two q a byte, an absmax for 64       (QLoRA, 2305.14314)
    Q4_K...  llama.cpp's blocks      see `blocks.py`                      (GGUF files)

A `QuantizedTensor` takes the place of a tensor in a state dict; in the network it becomes a
`QuantizedLinear`, which dequantizes its weight whenever it is used. All parts are stored row by
row, so weights are cut and concatenated along their rows without being dequantized. The numbers are
those of the papers on arXiv.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import BLOCKS
from .formats import cat

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0)
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5,
       0.1666666716337204, 0.25, 0.0, -0.0052083334885537624, -0.6666666865348816, -1.0,
       -0.3333333432674408, -0.5, -0.1666666716337204, -0.25)
TABLES = {"nf4": NF4, "fp4": FP4}
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
BLOCK = 64                 # elements that share an absmax
# What quantised files hold next to the weights: scales, and what no number depends on.
BESIDE = (".scale_input", ".input_scale", ".comfy_quant", ".weight_format", ".SCB",
          ".scale_weight", ".weight_scale")
BITSANDBYTES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map",
                ".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight (out, in) in fewer bits: `parts` by name, each with one row a row of the weight."""

    kind: str
    shape: torch.Size
    parts: dict[str, Tensor]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def is_floating_point(self) -> bool:
        return True

    def dequantize(self) -> Tensor:
        """The weight in float32."""
        return dequantize(self.kind, self.parts).view(self.shape)


State = dict[str, Tensor | QuantizedTensor]


def dequantized(weight: Tensor | QuantizedTensor) -> Tensor:
    """The weight as a plain tensor."""
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def dequantize(kind: str, parts: dict[str, Tensor]) -> Tensor:
    """The elements of a weight, or of some rows of one: (rows, in) float32."""
    q = parts["q"]                                                        # (rows, bytes a row)
    if kind in FLOAT8:
        # In place: memory for one copy, not for two.
        return q.view(FLOAT8[kind]).float().mul_(parts["scale"])
    if kind == "int8":
        return q.view(torch.int8).float().mul_(parts["scale"])
    if kind in TABLES:
        # Note: the high four bits come first.
        q = torch.stack([q >> 4, q & 15], dim=-1).flatten(1)                    # (rows, in)
        levels = torch.tensor(TABLES[kind], device=q.device)[q.int()]
        return levels.unflatten(-1, (-1, BLOCK)).mul_(parts["absmax"][..., None]).flatten(1)
    _, _, size, numbers = BLOCKS[kind]
    return numbers(q.reshape(-1, size)).reshape(len(q), -1)


def concat(weights: list[Tensor | QuantizedTensor]) -> Tensor | QuantizedTensor:
    """The rows of all weights; those that are not of one kind are dequantized first."""
    if len(weights) == 1:
        return weights[0]
    kinds = {weight.kind if isinstance(weight, QuantizedTensor) else None for weight in weights}
    if kinds == {None} or len(kinds) > 1:
        return cat([dequantized(weight) for weight in weights])
    first, rows = weights[0], sum(map(len, weights))
    parts = {name: cat([weight.parts[name] for weight in weights]) for name in first.parts}
    return QuantizedTensor(first.kind, torch.Size((rows, *first.shape[1:])), parts)


class QuantizedLinear(nn.Linear):
    """A linear layer that keeps its weight quantised and computes in `dtype`."""

    def __init__(self, weight: QuantizedTensor, dtype: torch.dtype, device: torch.device):
        nn.Module.__init__(self)                            # not Linear's own, which makes a weight
        self.kind, self.dtype = weight.kind, dtype
        self.out_features, self.in_features = weight.shape
        self.register_parameter("bias", None)
        for name, part in weight.parts.items():
            self.register_buffer(name, part.to(device))

    @property
    def quantized(self) -> QuantizedTensor:
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(self.kind, shape, dict(self.named_buffers()))

    @property
    def weight(self) -> Tensor:
        return self.quantized.dequantize().to(self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


# ------------------------------------------------------------------------------- safetensors files


def gather_quantized(state: dict[str, Tensor], source) -> State:
    """A safetensors file's tensors, with those that belong together as one `QuantizedTensor`.
    Empties `state`.

    Raises ValueError for a form that is not known, and for parts that are missing or do not fit."""
    result: State = {}
    own = [name for name in state if not name.endswith(BESIDE + BITSANDBYTES)
           and name.rpartition(".")[2] != "scaled_fp8"]
    for name in own:
        try:
            result[name] = gather(state, name)
        except (LookupError, RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]:.100}"
            raise ValueError(f"{source}: {name} is quantised in a form that is not read here "
                             f"({why})") from None
    owners = {owner for name in result for owner in (name, name.removesuffix(".weight"))}
    for name in state:
        for suffix in (*BITSANDBYTES, *BESIDE):
            if name.endswith(suffix) and name.removesuffix(suffix) not in owners:
                raise ValueError(f"{source}: {name} belongs to a weight that is not there")
    state.clear()
    return result


def gather(state: dict[str, Tensor], name: str) -> Tensor | QuantizedTensor:
    """One weight, from all of its parts."""
    tensor, module = state[name], name.removesuffix(".weight")
    if tensor.dtype in FLOAT8.values() and tensor.ndim == 2:
        return float8(state, name, module)
    if f"{module}.SCB" in state:
        return int8(tensor, state[f"{module}.SCB"])
    if any(f"{name}{suffix}" in state for suffix in BITSANDBYTES):
        return four_bits(state, name)
    return tensor


def read_form(tensor: Tensor) -> dict:
    """JSON that is kept as a tensor of bytes."""
    if tensor.numel() > 1 << 16 or tensor.dtype != torch.uint8:
        raise ValueError(f"a description of {tensor.numel():,} elements")
    return json.loads(bytes(tensor.flatten().tolist()))


def float8(state: dict[str, Tensor], name: str, module: str) -> QuantizedTensor:
    """ComfyUI's forms: one scale, one a row, or none."""
    q, form = state[name], state.get(f"{module}.comfy_quant")
    if form is not None and (form := read_form(form)["format"]) not in FLOAT8:
        raise ValueError(f"its format is {form!r:.40}")
    scale = state.get(f"{module}.weight_scale", torch.ones(()))
    scale = state.get(f"{module}.scale_weight", scale)
    if scale.numel() not in (1, len(q)):
        raise ValueError(f"{scale.numel()} scales for {len(q)} rows")
    kind = next(kind for kind, dtype in FLOAT8.items() if dtype == q.dtype)
    scale = scale.float().reshape(-1, 1).expand(len(q), 1)
    return QuantizedTensor(kind, q.shape, {"q": q.view(torch.uint8), "scale": scale})


def int8(q: Tensor, scb: Tensor) -> QuantizedTensor:
    """bitsandbytes keeps the largest value of each row, which stands for 127."""
    if q.dtype != torch.int8 or q.ndim != 2 or scb.shape != (len(q),):
        raise ValueError(f"{q.dtype} of the shape {list(q.shape)} with {list(scb.shape)} scales")
    scale = scb.float()[:, None] / 127
    return QuantizedTensor("int8", q.shape, {"q": q.view(torch.uint8), "scale": scale})


def four_bits(state: dict[str, Tensor], name: str) -> QuantizedTensor:
    """bitsandbytes' 4-bit weight: flat, two elements a byte, in blocks that share an absmax."""
    kind = "fp4" if f"{name}.quant_state.bitsandbytes__fp4" in state else "nf4"
    form = read_form(state[f"{name}.quant_state.bitsandbytes__{kind}"])
    (rows, columns), size = form["shape"], form["blocksize"]
    q, absmax = state[name], state[f"{name}.absmax"].flatten()
    table = state[f"{name}.quant_map"].float()
    are_sizes = all(type(number) is int for number in (rows, columns, size))
    if not are_sizes or size not in range(BLOCK, 4097, BLOCK):
        raise ValueError(f"the shape {form['shape']!r:.40} in blocks of {size!r:.20}")
    layout = f"{rows} rows of {columns} in blocks of {size}"
    is_flat = q.dtype == torch.uint8 and rows * columns == 2 * q.numel()
    if form["quant_type"] != kind or not is_flat or rows < 1 or columns % size:
        raise ValueError(f"{q.numel()} bytes for {layout}")
    if absmax.numel() * size != rows * columns:
        raise ValueError(f"{absmax.numel()} scales for {layout}")
    if table.shape != (16,) or not torch.allclose(table, torch.tensor(TABLES[kind]), atol=1e-6):
        raise ValueError("its table is not the usual one")
    if "nested_blocksize" in form:                          # the scales are quantised too
        blocks = torch.arange(absmax.numel()) // form["nested_blocksize"]
        levels = state[f"{name}.nested_quant_map"].float()[absmax.int()]
        absmax = levels * state[f"{name}.nested_absmax"].float()[blocks] + form["nested_offset"]
    absmax = absmax.float().view(rows, -1).repeat_interleave(size // BLOCK, dim=1)
    parts = {"q": q.reshape(rows, -1), "absmax": absmax}
    return QuantizedTensor(kind, torch.Size((rows, columns)), parts)
