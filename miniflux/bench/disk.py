"""The table `disk`: the memory of a step of FLUX.1's size whose weights are read from disk.

Checkpoints of random weights, 33 GB, are written and deleted afterwards. Each row is a process of
its own. Its peak is that of all resident memory: libraries, weights and mapped pages.
"""

import json
import shutil
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoints.building import WithoutInitialisation
from ..networks.mmdit import MMDiT
from ..networks.t5 import T5
from .measuring import in_fresh_process, peak_resident


def step_from_disk(folder: str, with_t5: bool, dtype: str) -> tuple[int, float]:
    """Peak memory in bytes and seconds of one step at 256 x 256, weights read from disk."""
    from ..checkpoints.layouts import load_mmdit, load_t5
    from ..engine.offload import offload
    from ..flux import Flux, FluxConfig
    from ..generate import generate
    from ..prompt import Prompt

    t5 = None
    if with_t5:
        t5 = load_t5(Path(folder) / "t5.safetensors", "cpu", torch.bfloat16)
    mmdit = load_mmdit(Path(folder) / "flux1.safetensors", "cpu", torch.bfloat16)
    flux = Flux(None, None, None, t5, mmdit, None, FluxConfig())
    flux = offload(flux, "cpu", "disk", dtype=getattr(torch, dtype))
    began = time.perf_counter()
    with torch.no_grad():
        txt = flux.t5(torch.arange(512)[None]) if with_t5 else torch.randn(1, 512, 4096)
        z = generate(flux, Prompt(txt, torch.randn(1, 768)), width=256, height=256, steps=1,
                     output="latents", progress=False)
    assert z.isfinite().all()
    return peak_resident(), time.perf_counter() - began


def write_random(path: Path, network: nn.Module) -> None:
    """Writes a safetensors file with the network's tensors in bfloat16.

    The same 64 MiB of normal numbers are repeated, as only their amount matters."""
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        shape = list(tensor.shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    values: Tensor = (0.02 * torch.randn(1 << 25)).bfloat16()
    data = memoryview(values.view(torch.uint8).numpy())
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(data)):
            file.write(data[:end - begin])


def bench_disk(_source: str) -> None:
    with torch.device("meta"), WithoutInitialisation():
        networks = {"flux1": MMDiT(), "t5": T5()}
    sizes = {name: sum(2 * p.numel() for p in network.parameters())
             for name, network in networks.items()}
    folder = Path(tempfile.gettempdir())
    free, needed = shutil.disk_usage(folder).free, sum(sizes.values())
    if free < needed + 2**30:
        raise SystemExit(f"the table disk writes {needed / 1e9:.0f} GB, and {folder} has "
                         f"{free / 1e9:.0f} GB free: set TMPDIR to a folder with more")
    rows = [("in bfloat16", False, "bfloat16"), ("in float32", False, "float32"),
            ("after encoding 512 tokens, bfloat16", True, "bfloat16")]
    print(f"\n{'a step at 256 x 256 from disk':36} {'weights':>12} {'peak memory':>12} {'time':>9}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, network in networks.items():
            write_random(Path(scratch) / f"{name}.safetensors", network)
        for title, with_t5, dtype in rows:
            peak, seconds = in_fresh_process(step_from_disk, scratch, with_t5, dtype)
            weights = needed if with_t5 else sizes["flux1"]
            print(f"{title:36} {weights / 1e9:9.2f} GB {peak / 1e9:9.2f} GB {seconds:7.0f} s",
                  flush=True)
