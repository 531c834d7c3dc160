"""A step of a transformer as large as FLUX.1-dev's, from disk: how much memory it takes. `python -m miniflux.bench disk` prints it.

Checkpoints of random weights are written (33 GB, deleted afterwards), and each row is a process of its own, whose peak of resident
memory the system counts: libraries, weights, mapped pages and all."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints.building import WithoutInitialisation
from .networks.mmdit import MMDiT
from .networks.t5 import T5

STEP = """
import json, re, sys, time, torch
from pathlib import Path
from miniflux import Prompt, generate
from miniflux.checkpoints.layouts import load_mmdit, load_t5
from miniflux.engine.offload import offload
from miniflux.flux import Flux, FluxConfig

folder, text, dtype = Path(sys.argv[1]), sys.argv[2] == "T5", getattr(torch, sys.argv[3])
t5 = load_t5(folder / "t5.safetensors", "cpu", torch.bfloat16) if text else None
mmdit = load_mmdit(folder / "flux1.safetensors", "cpu", torch.bfloat16)
flux = offload(Flux(None, None, None, t5, mmdit, None, FluxConfig()), "cpu", "disk", dtype=dtype)
began = time.perf_counter()
with torch.inference_mode():
    txt = flux.t5(torch.arange(512)[None]) if text else torch.randn(1, 512, 4096)
    z = generate(flux, Prompt(txt, torch.randn(1, 768)), width=256, height=256, steps=1, output="latents", progress=False)
assert z.isfinite().all()
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
print(json.dumps([peak, time.perf_counter() - began]))
"""


def write_random(path: Path, network: nn.Module) -> None:
    """A safetensors file with the network's tensors in bfloat16: the same normal numbers again and again, as only their amount counts."""
    header, end = {}, 0
    for name, tensor in network.state_dict().items():
        begin, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    numbers: Tensor = (0.02 * torch.randn(1 << 25)).bfloat16()                  # 64 MiB
    data = memoryview(numbers.view(torch.uint8).numpy())
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, len(data)):
            file.write(data[:end - begin])


def bench_disk(_: str) -> None:
    with torch.device("meta"), WithoutInitialisation():
        networks = {"flux1": MMDiT(), "t5": T5()}
    size = sum(2 * p.numel() for network in networks.values() for p in network.parameters())
    folder = Path(tempfile.gettempdir())
    if (free := shutil.disk_usage(folder).free) < size + 2**30:
        raise SystemExit(f"the table disk writes {size / 1e9:.0f} GB, and {folder} has {free / 1e9:.0f} GB free: "
                         "set TMPDIR to a folder with more")
    print(f"\n{'a step at 256 x 256 from disk':36} {'weights':>12} {'peak memory':>12} {'time':>9}")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for name, network in networks.items():
            write_random(Path(scratch) / f"{name}.safetensors", network)
        for what, text, dtype in (("in bfloat16", "", "bfloat16"), ("in float32", "", "float32"),
                                  ("after encoding 512 tokens, bfloat16", "T5", "bfloat16")):
            run = subprocess.run([sys.executable, "-c", STEP, scratch, text, dtype], check=True, capture_output=True, text=True)
            peak, seconds = json.loads(run.stdout)
            weights = sum(path.stat().st_size for path in Path(scratch).iterdir() if text or path.stem == "flux1")
            print(f"{what:36} {weights / 1e9:9.2f} GB {peak / 1e9:9.2f} GB {seconds:7.0f} s", flush=True)
