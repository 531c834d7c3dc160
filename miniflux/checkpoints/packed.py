"""Weights in fewer bits: how they are stored in files and in memory, and the numbers that are meant.

    fp8      w = scale · q           q in float8, one scale a row                         (ComfyUI's files, quanto)
    int8     w = scale · q           q in int8, one scale a row                           (LLM.int8(), arXiv:2208.07339)
    nf4      w = absmax · table[q]   two q a byte, one absmax for 64 neighbours           (QLoRA, arXiv:2305.14314)
    Q4_K...  llama.cpp's blocks      see `blocks.py`                                      (GGUF files)

A `Packed` weight stands in a state dict where a tensor would; in the network it becomes a `PackedLinear`, which unpacks its weight
whenever it is used. All parts lie row by row, so weights are cut and joined along their rows without being unpacked.
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .blocks import BLOCKS
from .formats import cat

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25, 0.0,
       -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25)
TABLES = {"nf4": NF4, "fp4": FP4}
FLOAT8 = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
BLOCK = 64                 # numbers that share an absmax
# What quantised files hold beside the weights and their scales, and what is not needed for the numbers.
BESIDE = (".scale_input", ".input_scale", ".comfy_quant", ".weight_format", ".SCB", ".scale_weight", ".weight_scale")
BITSANDBYTES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".quant_state.bitsandbytes__nf4",
                ".quant_state.bitsandbytes__fp4")


@dataclass(frozen=True)
class Packed:
    """A weight (out, in) in fewer bits: `parts` by name, each with one row for a row of the weight."""

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

    def unpack(self) -> Tensor:
        return unpack(self.kind, self.parts).view(self.shape)


State = dict[str, Tensor | Packed]


def dense(weight: Tensor | Packed) -> Tensor:
    return weight.unpack() if isinstance(weight, Packed) else weight


def unpack(kind: str, parts: dict[str, Tensor]) -> Tensor:
    """The numbers of a weight, or of some rows of one: (rows, in) float32."""
    q = parts["q"]                                                              # (rows, bytes a row)
    if kind in FLOAT8:
        return q.view(FLOAT8[kind]).float().mul_(parts["scale"])                 # in place: memory for one copy, not two
    if kind == "int8":
        return q.view(torch.int8).float().mul_(parts["scale"])
    if kind in TABLES:
        # Note: the high four bits come first.
        table = torch.tensor(TABLES[kind], device=q.device)
        numbers = table[torch.stack([q >> 4, q & 15], dim=-1).flatten(1).int()]  # (rows, in)
        return numbers.unflatten(-1, (-1, BLOCK)).mul_(parts["absmax"][..., None]).flatten(1)
    _, _, size, numbers = BLOCKS[kind]
    return numbers(q.reshape(-1, size)).reshape(len(q), -1)


def join(weights: list[Tensor | Packed]) -> Tensor | Packed:
    """The weights one below the other; what is not of one kind is unpacked first."""
    kinds = {weight.kind if isinstance(weight, Packed) else None for weight in weights}
    if kinds == {None} or len(kinds) > 1:
        weights = [dense(weight) for weight in weights]
        return cat(weights) if len(weights) > 1 else weights[0]
    first, rows = weights[0], sum(map(len, weights))
    parts = {name: cat([weight.parts[name] for weight in weights]) for name in first.parts} if len(weights) > 1 else first.parts
    return Packed(first.kind, torch.Size((rows, *first.shape[1:])), parts)


class PackedLinear(nn.Linear):
    """A linear layer that keeps its weight packed and computes in `dtype`."""

    def __init__(self, packed: Packed, dtype: torch.dtype, device: torch.device):
        nn.Module.__init__(self)                            # Note: not Linear's own, which would make the weight
        self.kind, self.dtype, (self.out_features, self.in_features) = packed.kind, dtype, packed.shape
        self.register_parameter("bias", None)
        for name, part in packed.parts.items():
            self.register_buffer(name, part.to(device))

    @property
    def packed(self) -> Packed:
        return Packed(self.kind, torch.Size((self.out_features, self.in_features)), dict(self.named_buffers()))

    @property
    def weight(self) -> Tensor:
        return self.packed.unpack().to(self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


# ---------------------------------------------------------------------------------------------------- safetensors files


def pack_state(state: dict[str, Tensor], source) -> State:
    """A safetensors file's tensors with those that belong together as one `Packed` weight (empties `state`).

    Raises ValueError for a form that is not known, and for parts that are missing or do not fit."""
    result: State = {}
    markers = {name for name in state if name.rpartition(".")[2] == "scaled_fp8"}
    for name in [name for name in state if not name.endswith(BESIDE + BITSANDBYTES) and name not in markers]:
        tensor, module = state[name], name.removesuffix(".weight")
        try:
            if tensor.dtype in FLOAT8.values() and tensor.ndim == 2:
                result[name] = float8(state, name, module)
            elif f"{module}.SCB" in state:
                result[name] = int8(tensor, state[f"{module}.SCB"])
            elif any(f"{name}{suffix}" in state for suffix in BITSANDBYTES):
                result[name] = four_bits(state, name)
            else:
                result[name] = tensor
        except (KeyError, IndexError, RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(f"{source}: {name} is quantised in a form that is not read here ({type(error).__name__}: "
                             f"{str(error).partition(chr(10))[0]:.100})") from None
    owners = {owner for name in result for owner in (name, name.removesuffix(".weight"))}
    for name in state:
        suffix = next((suffix for suffix in (*BITSANDBYTES, *BESIDE) if name.endswith(suffix)), None)
        if suffix and name.removesuffix(suffix) not in owners:
            raise ValueError(f"{source}: {name} belongs to a weight that is not there")
    state.clear()
    return result


def read_form(tensor: Tensor) -> dict:
    """JSON that is kept as a tensor of bytes."""
    if tensor.numel() > 1 << 16 or tensor.dtype != torch.uint8:
        raise ValueError(f"a description of {tensor.numel():,} numbers")
    return json.loads(bytes(tensor.flatten().tolist()))


def float8(state: dict[str, Tensor], name: str, module: str) -> Packed:
    q, form = state[name], state.get(f"{module}.comfy_quant")
    if form is not None and (form := read_form(form)["format"]) not in FLOAT8:
        raise ValueError(f"its format is {form!r:.40}")
    scale = state.get(f"{module}.scale_weight", state.get(f"{module}.weight_scale", torch.ones(())))
    if scale.numel() not in (1, len(q)):
        raise ValueError(f"{scale.numel()} scales for {len(q)} rows")
    kind = next(kind for kind, dtype in FLOAT8.items() if dtype == q.dtype)
    return Packed(kind, q.shape, {"q": q.view(torch.uint8), "scale": scale.float().reshape(-1, 1).expand(len(q), 1)})


def int8(q: Tensor, scb: Tensor) -> Packed:
    """bitsandbytes keeps the largest value of each row, which stands for 127."""
    if q.dtype != torch.int8 or q.ndim != 2 or scb.shape != (len(q),):
        raise ValueError(f"{q.dtype} of the shape {list(q.shape)} with {list(scb.shape)} scales")
    return Packed("int8", q.shape, {"q": q.view(torch.uint8), "scale": scb.float()[:, None] / 127})


def four_bits(state: dict[str, Tensor], name: str) -> Packed:
    """bitsandbytes' 4-bit weight: flat, two numbers a byte, in blocks that share an absmax."""
    kind = "fp4" if f"{name}.quant_state.bitsandbytes__fp4" in state else "nf4"
    form = read_form(state[f"{name}.quant_state.bitsandbytes__{kind}"])
    (rows, columns), size = form["shape"], form["blocksize"]
    q, absmax, table = state[name], state[f"{name}.absmax"].flatten(), state[f"{name}.quant_map"].float()
    if type(rows) is not int or type(columns) is not int or type(size) is not int or size not in range(BLOCK, 4097, BLOCK):
        raise ValueError(f"the shape {form['shape']!r:.40} in blocks of {size!r:.20}")
    if form["quant_type"] != kind or q.dtype != torch.uint8 or rows * columns != 2 * q.numel() or rows < 1 or columns % size:
        raise ValueError(f"{q.numel()} bytes for {rows} rows of {columns} in blocks of {size}")
    if absmax.numel() * size != rows * columns:
        raise ValueError(f"{absmax.numel()} scales for {rows} rows of {columns} in blocks of {size}")
    if table.shape != (16,) or not torch.allclose(table, torch.tensor(TABLES[kind]), atol=1e-6):
        raise ValueError("its table is not the usual one")
    if "nested_blocksize" in form:                          # the scales are quantised too
        blocks = torch.arange(absmax.numel()) // form["nested_blocksize"]
        absmax = (state[f"{name}.nested_quant_map"].float()[absmax.int()] * state[f"{name}.nested_absmax"].float()[blocks]
                  + form["nested_offset"])
    absmax = absmax.float().view(rows, -1).repeat_interleave(size // BLOCK, dim=1)
    return Packed(kind, torch.Size((rows, columns)), {"q": q.reshape(rows, -1), "absmax": absmax})
