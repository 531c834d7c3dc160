"""The table `int8`: memory, time and error of a block in 8 bits, beside torchao's."""

import copy
import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.saving import write_mmdit
from ..engine.quantize import quantize
from ..flux import Flux, FluxConfig
from ..networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs

TORCHAO = {"int8": "Int8WeightOnlyConfig", "int8-dynamic": "Int8DynamicActivationInt8WeightConfig"}
ROUNDS = 6


def peer_of(net: MMDiT) -> nn.Module:
    """diffusers' transformer with the same weights, in float32."""
    from diffusers import FluxTransformer2DModel

    with tempfile.TemporaryDirectory() as scratch:
        write_mmdit(Path(scratch), net)
        return FluxTransformer2DModel.from_pretrained(Path(scratch) / "transformer",
                                                      torch_dtype=torch.float32)


def quantized_models(net: MMDiT, peer: nn.Module) -> dict[str, nn.Module]:
    flux = Flux(None, None, None, None, net, None, FluxConfig())
    models: dict[str, nn.Module] = {"float32": net, "float32, diffusers": peer}
    for form, config in TORCHAO.items():
        models[form] = quantize(flux, form).mmdit
        if find_spec("torchao"):
            from torchao import quantization

            packed = copy.deepcopy(peer)
            quantization.quantize_(packed.transformer_blocks, getattr(quantization, config)())
            models[f"{form}, torchao"] = packed
    return models


def bench_int8(_source: str) -> None:
    """One double block of FLUX.1's width and 512 tokens, beside diffusers' with the same weights.

    diffusers' int8 is torchao's."""
    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig(context_in_dim=256, depth=1, depth_single_blocks=0)).bfloat16().eval()
    peer = peer_of(net)
    models = quantized_models(net.float(), peer)
    x, txt = torch.randn(1, 256, 64), torch.randn(1, 256, 256)
    pooled, one = torch.randn(1, 768), torch.ones(1)
    img_ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0))
    txt_ids = torch.zeros(256, 3)
    inputs = MMDiTInputs(x, txt, pooled, one, 3.5 * one, img_ids.long(), txt_ids.long())

    def step(model: nn.Module) -> Tensor:
        if isinstance(model, MMDiT):
            return model(inputs)
        return model(x, txt, pooled, one, img_ids, txt_ids, 3.5 * one, return_dict=False)[0]

    times: dict[str, list[float]] = {name: [] for name in models}
    errors: dict[str, float] = {}
    with torch.no_grad():
        exact = step(models["float32"])
        for _ in range(ROUNDS):
            for name, model in models.items():
                began = time.perf_counter()
                v = step(model)
                times[name].append(time.perf_counter() - began)
                errors[name] = float((v - exact).norm() / exact.norm())
    assert errors["float32, diffusers"] < 1e-5, f"diffusers differs: {errors}"
    assert max(errors.values()) < 0.05, f"8 bits differ by too much: {errors}"
    print(f"\n{'a double block, 512 tokens':32} {'weights':>10} {'time':>10} {'error':>9}")
    for name, model in models.items():
        blocks = model.double_blocks if isinstance(model, MMDiT) else model.transformer_blocks
        ms = 1e3 * statistics.median(times[name][1:])
        print(f"{name:32} {nbytes(blocks) / 2**20:6.0f} MiB {ms:7.0f} ms {errors[name]:9.1e}")
    if not find_spec("torchao"):
        print("torchao, which diffusers quantizes with, is not installed: `pip install torchao`")


def nbytes(module: nn.Module) -> int:
    """Bytes of all tensors; of torchao's, of the tensors that they consist of."""
    total = 0
    for tensor in [*module.parameters(), *module.buffers()]:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            total += sum(getattr(tensor, name).nbytes for name in names)
        else:
            total += tensor.nbytes
    return total
