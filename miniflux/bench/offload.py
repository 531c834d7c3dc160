"""The table `offload`: steps with weights outside of memory, beside diffusers' group offloading.

A transformer of 1.3 GB in bfloat16, with random weights. Each row is a process of its own; its peak
is that of all resident memory: libraries, weights and mapped pages.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.formats import read_safetensors
from ..checkpoints.saving import write_mmdit
from ..networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs
from .measuring import in_fresh_process, peak_resident, reset_peak

CONFIG = MMDiTConfig(context_in_dim=256, vec_in_dim=64, hidden_size=1536, num_heads=12, depth=4,
                     depth_single_blocks=8)
SIDE, L = 8, 64                        # of the image, in tokens; text tokens
STEPS = 4

Step = Callable[[Tensor, Tensor], Tensor]                   # (x, t) -> v, as tokens (1, N, 64)


def our_step(folder: Path, mode: str, txt: Tensor, pooled: Tensor, ids: Tensor,
             ts: Tensor) -> Step:
    """One step of our transformer; the modulation of all steps is computed within the first."""
    from ..checkpoints.layouts import load_mmdit
    from ..engine.offload import offload
    from ..flux import Flux, FluxConfig

    mmdit = load_mmdit(folder / "flux1.safetensors", "cpu", torch.bfloat16)
    flux = Flux(None, None, None, None, mmdit, None, FluxConfig())
    mmdit = offload(flux, "cpu", mode).mmdit if mode else mmdit
    prepared = mmdit.prepare(pooled, 3.5, ts.tolist())
    guidance = torch.full((1,), 3.5).bfloat16()
    txt_ids = torch.zeros(L, 3, dtype=torch.int64)
    return lambda x, t: mmdit(MMDiTInputs(
        x, txt, prepared, t[None].bfloat16(), guidance, ids.long(), txt_ids))


def their_step(folder: Path, mode: str, txt: Tensor, pooled: Tensor, ids: Tensor,
               ts: Tensor) -> Step:
    from diffusers import FluxTransformer2DModel
    from diffusers.hooks import apply_group_offloading

    net = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    if mode:
        cpu = torch.device("cpu")
        groups = str(folder / "groups") if mode == "disk" else None
        apply_group_offloading(net, cpu, cpu, "block_level", num_blocks_per_group=1,
                               offload_to_disk_path=groups)
    guidance = torch.full((1,), 3.5).bfloat16()
    txt_ids = torch.zeros(L, 3)
    return lambda x, t: net(x, txt, pooled, t[None].bfloat16(), ids, txt_ids, guidance,
                            return_dict=False)[0]


def four_steps(folder: str, who: str, mode: str, result: str) -> tuple[int, int, float]:
    """Bytes at the peak of loading, at that of the steps, and seconds of a step.

    The velocities are written to the file `result`."""
    from safetensors.torch import save_file

    ts = torch.linspace(1, 0, STEPS + 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, SIDE * SIDE, 64, generator=generator).bfloat16()
    txt = torch.randn(1, L, 256, generator=generator).bfloat16()
    pooled = torch.randn(1, 64, generator=generator).bfloat16()
    ids = torch.zeros(SIDE * SIDE, 3)
    ids[:, 1] = torch.arange(SIDE * SIDE) // SIDE
    ids[:, 2] = torch.arange(SIDE * SIDE) % SIDE
    make = {"miniflux": our_step, "diffusers": their_step}[who]
    with torch.no_grad():
        step = make(Path(folder), mode, txt, pooled, ids, ts)
        loading = peak_resident()
        reset_peak()
        began = time.perf_counter()
        velocities = [step(x, t) for t in ts[:-1]]
        seconds = (time.perf_counter() - began) / STEPS
        running = peak_resident()
    save_file({"v": torch.cat(velocities)}, result)
    return loading, running, seconds


def bench_offload(_source: str) -> None:
    """Four steps on the CPU. There, group offloading to memory has nowhere to go: no gain."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        net = MMDiT(CONFIG).bfloat16()
        write_mmdit(folder, net)
        save_file(net.state_dict(), folder / "flux1.safetensors")
        size = sum(p.nbytes for p in net.parameters())
        del net
        rows, expected = {}, None
        for mode in ("", "modulation", "block", "disk"):
            for who in ("miniflux", "diffusers"):
                if mode == "modulation" and who == "diffusers":
                    continue                                # it has no such mode
                result = folder / "v.safetensors"
                rows[mode, who] = in_fresh_process(four_steps, scratch, who, mode, str(result))
                v = read_safetensors(result)["v"].float()
                expected = v.clone() if expected is None else expected
                error = (v - expected).norm() / expected.norm()
                assert error < 2e-2, f"{who}, {mode or 'whole'}, differs by {error}"
    title = f"a transformer of {size / 1e9:.2f} GB"
    print(f"\n{title:30} {'':10} {'loading':>9} {'steps':>10} {'a step':>9}")
    for (mode, who), (loading, running, seconds) in rows.items():
        print(f"{mode or 'whole':30} {who:10} {loading / 1e9:6.2f} GB {running / 1e9:7.2f} GB "
              f"{seconds:7.1f} s")
