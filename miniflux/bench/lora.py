"""The table `lora`: merging a LoRA of rank 16 into one double block of FLUX.1's size."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from ..adapters.lora import add_lora
from ..checkpoints.formats import read_safetensors
from ..flux import Flux, FluxConfig
from ..networks.mmdit import MMDiT, MMDiTConfig
from .measuring import in_fresh_process, medians, peak_resident, reset_peak, resident

RANK = 16


def flux_sized_block() -> Flux:
    """A transformer of one double block as wide as FLUX.1's, in bfloat16, and nothing else."""
    torch.manual_seed(0)
    mmdit = MMDiT(MMDiTConfig(depth=1, depth_single_blocks=0)).bfloat16().eval()
    return Flux(None, None, None, None, mmdit, None, FluxConfig())


def linear_layers(flux: Flux) -> dict[str, nn.Linear]:
    modules = flux.mmdit.double_blocks.named_modules()
    return {name: layer for name, layer in modules if isinstance(layer, nn.Linear)}


def merging_peak(path: str) -> int:
    """Bytes that merging adds at its peak."""
    flux = flux_sized_block()
    before = resident()
    reset_peak()
    merged = add_lora(flux, path)
    peak = peak_resident() - before
    del merged
    return peak


def bench_lora(_source: str) -> None:
    """A LoRA of all linear layers; beside it the least work: to read its file, copy the weights."""
    from safetensors.torch import save_file

    flux = flux_sized_block()
    layers = linear_layers(flux)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        a = torch.randn(RANK, layer.in_features).bfloat16()
        b = torch.randn(layer.out_features, RANK).bfloat16()
        factors[name] = a.float(), b.float()
        tensors[f"diffusion_model.double_blocks.{name}.lora_A.weight"] = a
        tensors[f"diffusion_model.double_blocks.{name}.lora_B.weight"] = b

    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "lora.safetensors"
        save_file(tensors, path)

        def least() -> list[Tensor]:
            weights = [layer.weight for layer in layers.values()]
            return [tensor.clone() for tensor in (*read_safetensors(path).values(), *weights)]

        merged = add_lora(flux, path).mmdit.double_blocks
        for name, layer in layers.items():
            a, b = factors[name]
            error = merged.get_submodule(name).weight - (layer.weight + b @ a)
            assert error.abs().max() < 2**-7 * (b @ a).abs().max(), f"{name} is not W + B A"
        del merged, error
        ours, theirs = medians(lambda: add_lora(flux, path), least, runs=9)
        peak = in_fresh_process(merging_peak, str(path))
    size = sum(2 * layer.weight.numel() for layer in layers.values())
    title = f"a LoRA of rank {RANK}, one double block"
    print(f"\n{title:36} {'miniflux':>12} {'read, copy':>12} {'ratio':>8}")
    print(f"{'merging':36} {1e3 * ours:9.0f} ms {1e3 * theirs:9.0f} ms {ours / theirs:7.2f}x")
    print(f"{'peak memory, touched weights':36} {peak / 2**20:8.0f} MiB {size / 2**20:8.0f} MiB "
          f"{peak / size:7.2f}x")
