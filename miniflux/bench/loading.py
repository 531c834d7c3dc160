"""The table `load`: peak memory of loading a transformer, as a multiple of its checkpoint."""

import tempfile
from pathlib import Path

import torch

from ..checkpoints.layouts import load_mmdit
from ..checkpoints.saving import write_mmdit
from ..networks.mmdit import MMDiT, MMDiTConfig
from .measuring import in_fresh_process, peak_resident, reset_peak, resident


def loading_peak(path: str) -> int:
    """Bytes that loading this transformer in bfloat16 adds at its peak."""
    before = resident()
    reset_peak()
    net = load_mmdit(Path(path), "cpu", torch.bfloat16)
    for p in net.parameters():
        p.sum()                                             # reads every page of a mapped file
    return peak_resident() - before


def bench_load(_source: str) -> None:
    """A transformer of about 0.5 GB in bfloat16, in both layouts."""
    from safetensors.torch import save_file

    print(f"\n{'loading a transformer':36} {'checkpoint':>12} {'peak':>12} {'ratio':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "folder", Path(scratch) / "flux1-bench.safetensors"
        torch.manual_seed(0)
        config = MMDiTConfig(hidden_size=1024, num_heads=8, depth=4, depth_single_blocks=8)
        net = MMDiT(config).bfloat16()
        write_mmdit(folder, net)
        save_file(net.state_dict(), file)
        size = file.stat().st_size
        layouts = {"original layout": file, "diffusers layout": folder / "transformer"}
        for name, path in layouts.items():
            peak = in_fresh_process(loading_peak, str(path))
            print(f"{name:36} {size / 2**20:8.1f} MiB {peak / 2**20:8.1f} MiB "
                  f"{peak / size:7.2f}x")
