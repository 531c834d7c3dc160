"""Quantisation: a model whose weights take a quarter or an eighth of float32's memory, at a small
price in exactness.

    int8            w ≈ scale · q, q in -127..127, one scale a row     dequantised before a product
    fp8             the same with q in float8 (e4m3, up to 448)        (22 GB of FLUX.1 become 11)
    nf4             w ≈ absmax · table[q], 4 bits, an absmax for 64    (6 GB; arXiv:2305.14314)
    int8-dynamic    as int8, and the activations too, a scale a token  y = s_x · s_w · (q_x q_wᵀ)
    fp8-dynamic     as fp8, likewise                                   the product itself in 8 bits

    flux = quantize(load("dev"), "int8")

Only the weights are approximated; the dynamic formats also round activations, which is faster
(measured in `bench quantize`). The linear layers within the blocks are quantised; embeddings,
the first and the last layers are few and sensitive, and stay. Seam: model -> model. Files that are
quantised already need none of this: `load` keeps them as they are.
"""

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..adapters.lora import LoRAs, with_loras
from ..checkpoints.quantized import BLOCK, FLOAT8, NF4, QuantizedLinear, QuantizedTensor
from ..flux import Flux
from .features import check_order

BLOCKS = {
    "mmdit": ("double_blocks.", "single_blocks."),
    "t5": ("encoder.block.",),
    "clip": ("text_model.encoder.",),
}
FEW = 16                   # rows below which the products in 8 bits do not pay, and CUDA's refuse


def pack_int8(weight: Tensor) -> QuantizedTensor:
    """One scale a row: its largest value stands for 127."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 127       # (out, 1)
    q = (weight / scale).round().to(torch.int8)                                 # (out, in)
    return QuantizedTensor("int8", weight.shape, {"q": q.view(torch.uint8), "scale": scale})


def pack_fp8(weight: Tensor) -> QuantizedTensor:
    """One scale a row: its largest value becomes 448, the largest of the format."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / 448       # (out, 1)
    q = (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8)              # (out, in)
    return QuantizedTensor("float8_e4m3fn", weight.shape, {"q": q, "scale": scale})


def pack_nf4(weight: Tensor) -> QuantizedTensor:
    """Each block of 64 neighbours is divided by its largest value; each number becomes the nearest
    of sixteen."""
    blocks = weight.unflatten(1, (-1, BLOCK))                                   # (out, in / 64, 64)
    absmax = blocks.abs().amax(dim=2).clamp_min(1e-30)                          # (out, in / 64)
    table = torch.tensor(NF4, device=weight.device)
    between = (table[1:] + table[:-1]) / 2  # where the nearest changes
    q = torch.bucketize((blocks / absmax[..., None]).contiguous(), between)     # (out, in / 64, 64)
    q = q.to(torch.uint8).flatten(1)                                            # (out, in)
    pairs = q[:, ::2] << 4 | q[:, 1::2]                                         # (out, in / 2)
    return QuantizedTensor("nf4", weight.shape, {"q": pairs, "absmax": absmax})


class DynamicLinear(QuantizedLinear):
    """Multiplies in 8 bits: the activations are quantised token by token, the products summed in
    integers or float32."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)                                                 # (tokens, in)
        if len(rows) <= FEW:
            return QuantizedLinear.forward(self, x)
        largest = 127 if self.kind == "int8" else 448
        # (tokens, 1)
        scale = rows.abs().amax(dim=1, keepdim=True).float().clamp_min(1e-30) / largest
        if self.kind == "int8":
            q = (rows / scale).round().to(torch.int8)
            # (tokens, out)
            y = torch._int_mm(q, self.q.view(torch.int8).t()) * scale * self.scale.t()
        else:
            q, w = (rows / scale).to(FLOAT8[self.kind]), self.q.view(FLOAT8[self.kind])
            y = torch._scaled_mm(q, w.t(), scale_a=scale, scale_b=self.scale.t(),
                                 out_dtype=torch.bfloat16)                      # (tokens, out)
        y = y.to(x.dtype) if self.bias is None else y.to(x.dtype) + self.bias
        return y.unflatten(0, x.shape[:-1])


# Name -> (how a weight is packed, what its columns must be a multiple of, the layer that computes
# with it).
FORMATS = {
    "int8": (pack_int8, 1, QuantizedLinear),
    "fp8": (pack_fp8, 1, QuantizedLinear),
    "nf4": (pack_nf4, BLOCK, QuantizedLinear),
    "int8-dynamic": (pack_int8, 8, DynamicLinear),
    "fp8-dynamic": (pack_fp8, 16, DynamicLinear),
}


def quantize(flux: Flux, form: str, parts: tuple[str, ...] = ("mmdit", "t5")) -> Flux:
    """The model with the linear layers of these parts quantised; what is quantised already stays,
    and so does the given model.

    form: one of FORMATS. parts: of "mmdit", "t5" and "clip". LoRAs that were added stay beside the
        quantised weights. Raises ValueError for another format or part, and for fp8-dynamic on a
        CUDA device before compute capability 8.9."""
    if form not in FORMATS:
        raise ValueError(f"the format is {form!r}: expected one of {', '.join(FORMATS)}")
    if isinstance(parts, str) or not set(parts) <= set(BLOCKS):
        raise ValueError(f"parts are {parts!r:.60}: expected some of {', '.join(BLOCKS)}")
    check_order(flux, "quantized")
    device = flux.mmdit.img_in.weight.device
    if form == "fp8-dynamic" and device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 9):
            name = torch.cuda.get_device_name(device)
            raise ValueError(f"{name} cannot multiply float8 numbers: "
                             "use fp8, int8 or int8-dynamic")
    base = flux.loras.base if flux.loras else {part: getattr(flux, part) for part in BLOCKS}
    for part in parts:
        if base[part] is not None:
            base = base | {part: quantized(base[part], BLOCKS[part], form)}
    return with_loras(flux, LoRAs(base, flux.loras.added)) if flux.loras else replace(flux, **base)


@torch.no_grad()
def quantized(network: nn.Module, blocks: tuple[str, ...], form: str) -> nn.Module:
    """A copy of a network that shares all its weights but those within the blocks."""
    pack, multiple, kind = FORMATS[form]
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    network = copy.deepcopy(network, memo=shared)
    for name, layer in list(network.named_modules()):
        if not isinstance(layer, nn.Linear) or isinstance(layer, QuantizedLinear):
            continue
        fits = layer.in_features % multiple == 0
        if kind is DynamicLinear:
            fits = fits and layer.out_features % multiple == 0
        if name.startswith(blocks) and fits:
            weight = layer.weight
            replacement = kind(pack(weight.float()), weight.dtype, weight.device)
            replacement.bias = layer.bias
            network.set_submodule(name, replacement.train(layer.training))
    return network
