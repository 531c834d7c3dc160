"""Steps whose weights are read from disk: how much memory they take. `python -m miniflux.bench offload disk` prints it.

    offload     a transformer of 1.3 GB beside diffusers' group offloading of the same one
    disk        one as large as FLUX.1-dev's; writes 33 GB

Checkpoints of random weights are written and deleted afterwards. Each row is a process of its own, whose peak of resident memory the
system counts: libraries, weights, mapped pages and all."""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints.building import WithoutInitialisation
from .checkpoints.formats import read_safetensors
from .networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs
from .networks.t5 import T5
from .tiny.export import write_mmdit

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
with torch.no_grad():
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


# ------------------------------------------------------------------------------------------------------------ beside diffusers

STEPS = """
import json, re, sys, time, torch
from pathlib import Path
from safetensors.torch import save_file
from miniflux.bench_disk import ours, theirs

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, who, mode, result = Path(sys.argv[1]), *sys.argv[2:]
ts = torch.linspace(1, 0, 5)
generator = torch.Generator().manual_seed(0)
x, txt, vec = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((1, 64, 64), (1, 64, 256), (1, 64)))
ids = torch.zeros(64, 3)
ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
with torch.no_grad():
    step = {"miniflux": ours, "diffusers": theirs}[who](folder, mode, txt, vec, ids, ts)
    loading = kib("VmHWM")
    Path("/proc/self/clear_refs").write_text("5")           # the peak is counted anew
    began, steps = time.perf_counter(), [step(x, t) for t in ts[:-1]]
    print(json.dumps([1024 * loading, 1024 * kib("VmHWM"), (time.perf_counter() - began) / len(steps)]))
save_file({"v": torch.cat(steps)}, result)
"""


def ours(folder: Path, mode: str, txt: Tensor, vec: Tensor, ids: Tensor, ts: Tensor):
    """A function of x (1, N, 64) and a time; the modulation of all steps is within the first."""
    from .checkpoints.layouts import load_mmdit
    from .engine.modulation import modulations
    from .engine.offload import offload
    from .flux import Flux, FluxConfig

    flux = Flux(None, None, None, None, load_mmdit(folder / "flux1.safetensors", "cpu", torch.bfloat16), None, FluxConfig())
    mmdit = offload(flux, "cpu", mode).mmdit if mode else flux.mmdit
    said, guidance = modulations(mmdit, vec, 3.5, ts.tolist()), torch.full((1,), 3.5).bfloat16()
    return lambda x, t: mmdit(MMDiTInputs(x, txt, said, t[None].bfloat16(), guidance, ids.long(),
                                           torch.zeros(txt.shape[1], 3).long()))


def theirs(folder: Path, mode: str, txt: Tensor, vec: Tensor, ids: Tensor, ts: Tensor):
    from diffusers import FluxTransformer2DModel
    from diffusers.hooks import apply_group_offloading

    net, cpu = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16), torch.device("cpu")
    if mode:
        apply_group_offloading(net, cpu, cpu, "block_level", num_blocks_per_group=1,
                               offload_to_disk_path=str(folder / "groups") if mode == "disk" else None)
    guidance = torch.full((1,), 3.5).bfloat16()
    return lambda x, t: net(x, txt, vec, t[None].bfloat16(), ids, torch.zeros(txt.shape[1], 3), guidance, return_dict=False)[0]


def bench_offload(_: str) -> None:
    """Four steps of 64 image tokens on the CPU, in bfloat16. There group offloading to memory has nowhere to go, and gains nothing."""
    torch.manual_seed(0)
    config = MMDiTConfig(context_in_dim=256, vec_in_dim=64, hidden_size=1536, num_heads=12, depth=4, depth_single_blocks=8)
    with tempfile.TemporaryDirectory() as scratch:
        from safetensors.torch import save_file

        folder, net = Path(scratch), MMDiT(config).bfloat16()
        write_mmdit(folder, net)
        save_file(net.state_dict(), folder / "flux1.safetensors")
        size = sum(p.nbytes for p in net.parameters())
        del net
        rows, expected = {}, None
        for mode in ("", "modulation", "block", "disk"):
            for who in ("miniflux", "diffusers") if mode != "modulation" else ("miniflux",):
                run = subprocess.run([sys.executable, "-c", STEPS, scratch, who, mode, str(folder / "v.safetensors")], capture_output=True,
                                     text=True)
                assert not run.returncode, run.stderr
                rows[mode, who] = json.loads(run.stdout)
                v = read_safetensors(folder / "v.safetensors")["v"].float()
                expected = v.clone() if expected is None else expected
                assert (v - expected).norm() < 2e-2 * expected.norm(), f"{who}, {mode or 'whole'}, computes something else"
    print(f"\n{f'a transformer of {size / 1e9:.2f} GB':30} {'':10} {'loading':>9} {'steps':>10} {'a step':>9}")
    for (mode, who), (loading, peak, seconds) in rows.items():
        print(f"{mode or 'whole':30} {who:10} {loading / 1e9:6.2f} GB {peak / 1e9:7.2f} GB {seconds:7.1f} s")
