"""Measures miniflux beside diffusers: the same weights, the same machine, the same run. Equality is asserted first.

    python -m miniflux.bench                    all tables but disk
    python -m miniflux.bench step cold          some of them

    picture       one picture of the tiny model, everything loaded, and its share per step
    cold          a fresh process: from the command to the file on disk
    attention     norm, rotation and attention of a block by every backend
    load          peak memory of loading, as a multiple of the checkpoint
    tasks         a step of each task beside one of generate
    lora          merging a LoRA into a block of FLUX.1's size, beside reading its file and copying the weights
    quantize      memory, a step and what the judge of the tiny world says, for each format
    int8          memory, time and error of a block of FLUX.1's width in int8, beside torchao's
    offload       memory and time of steps from disk, beside diffusers' group offloading
    autoencoder   peak memory of reading and painting large pictures, as a whole and in tiles
    caching       time and pictures of caches, beside as many plain steps as their time would buy, and beside diffusers' cache
    tokenizers    a prompt of 512 tokens
    disk          peak memory of a step of FLUX.1's size from disk; writes 33 GB, and only when it is named

The peer needs `pip install diffusers transformers`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .adapters.lora import add_lora
from .bench_attention import bench_attention
from .bench_disk import bench_disk, bench_offload
from .bench_engine import bench_autoencoder, bench_caching, bench_int8
from .checkpoints.finding import find_source
from .checkpoints.formats import read_safetensors
from .cli import Parser
from .command import command
from .control import control
from .engine.quantize import FORMATS, quantize
from .fill import fill
from .flux import Flux, FluxConfig
from .generate import generate
from .image_to_image import image_to_image
from .inpaint import inpaint
from .kontext_edit import kontext_edit
from .loading import load
from .networks.mmdit import MMDiT, MMDiTConfig
from .tiny.export import write_mmdit

PROMPT, STEPS = "a red apple on a blue background", 28

COLD_PEER = """
import sys, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe(sys.argv[3], height=128, width=128, num_inference_steps=28, guidance_scale=3.5, max_sequence_length=32,
     generator=torch.Generator("cpu").manual_seed(0)).images[0].save(sys.argv[2])
"""

LOAD = """
import json, re, sys, torch
from pathlib import Path
from miniflux.checkpoints.layouts import load_mmdit

def kib(field):                          # of this process; Linux counts them
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kib("VmRSS")
net = load_mmdit(Path(sys.argv[1]), "cpu", getattr(torch, sys.argv[2]))
total = sum(float(p.sum()) for p in net.parameters())             # every page is touched
print(json.dumps((kib("VmHWM") - before) * 1024))
"""

MERGE = """
import json, re, sys, torch
from pathlib import Path
from miniflux import add_lora
from miniflux.bench import flux_sized_block

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

flux = flux_sized_block()
before = kib("VmRSS")
merged = add_lora(flux, sys.argv[1])
print(json.dumps((kib("VmHWM") - before) * 1024))
"""


def medians(*calls: Callable[[], object], runs: int = 15) -> list[float]:
    """Median seconds of each call, after one that does not count; run in turn, so that what slows the machine slows all."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(runs + 1):
        for call, seen in zip(calls, times):
            began = time.perf_counter()
            call()
            seen.append(time.perf_counter() - began)
    return [statistics.median(seen[1:]) for seen in times]


def table(title: str, rows: list[tuple[str, float, float]], unit: str) -> None:
    """Rows (what, ours, the peer's) with their ratio."""
    print(f"\n{title:36} {'miniflux':>12} {'diffusers':>12} {'ratio':>8}")
    for what, ours, theirs in rows:
        print(f"{what:36} {ours:9.1f} {unit:2} {theirs:9.1f} {unit:2} {theirs / ours:7.2f}x")


def bench_picture(source: str) -> None:
    from diffusers import FluxPipeline

    folder = find_source(source)
    flux, pipe = load(folder, device="cpu"), FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def ours(steps: int = STEPS):
        return generate(flux, PROMPT, steps=steps, output="tensor")

    def theirs(steps: int = STEPS):
        return pipe(PROMPT, height=128, width=128, num_inference_steps=steps, max_sequence_length=flux.config.max_text_tokens,
                    generator=torch.Generator("cpu").manual_seed(0), output_type="pt").images

    difference = float((ours() - theirs()).abs().max())
    assert difference < 2e-3, f"the pictures differ by {difference}"
    a, c, b, d = medians(ours, theirs, lambda: ours(1), lambda: theirs(1))
    table(f"one picture, {STEPS} steps", [("whole picture", 1e3 * a, 1e3 * c),
                                          ("a step", 1e3 * (a - b) / (STEPS - 1), 1e3 * (c - d) / (STEPS - 1))], "ms")
    print(f"largest difference of the two pictures {difference:.1e}")


def bench_cold(source: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        def command(*arguments: str) -> Callable[[], object]:
            return lambda: subprocess.run([sys.executable, *arguments], check=True, cwd=scratch, capture_output=True)

        ours, theirs = medians(command("-m", "miniflux.generate", PROMPT, "--model", source),
                               command("-c", COLD_PEER, str(find_source(source)), "peer.png", PROMPT), runs=3)
    table("cold start", [("command to file", ours, theirs)], "s")


def bench_load(_: str) -> None:
    """A transformer of about 0.5 GB in bfloat16, in both layouts."""
    print(f"\n{'loading a transformer':36} {'checkpoint':>12} {'peak':>12} {'ratio':>8}")
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "folder", Path(scratch) / "flux1-bench.safetensors"
        torch.manual_seed(0)
        net = MMDiT(MMDiTConfig(hidden_size=1024, num_heads=8, depth=4, depth_single_blocks=8)).bfloat16()
        write_mmdit(folder, net)
        from safetensors.torch import save_file
        save_file(net.state_dict(), file)
        size = file.stat().st_size
        for what, path, dtype in (("original layout", file, "bfloat16"), ("diffusers layout", folder / "transformer", "bfloat16")):
            result = subprocess.run([sys.executable, "-c", LOAD, str(path), dtype], check=True, capture_output=True, text=True)
            peak = json.loads(result.stdout)
            print(f"{what:36} {size / 2**20:8.1f} MiB {peak / 2**20:8.1f} MiB {peak / size:7.2f}x")


def bench_tasks(source: str) -> None:
    """Each task on the model's architecture (random weights where its own has other input channels), at the model's size."""
    flux = load(source, device="cpu")
    size = flux.config.size
    picture, mask = Image.effect_noise((size, size), 80).convert("RGB"), Image.new("L", (size, size), 255)

    def widened(times: int) -> Flux:
        torch.manual_seed(0)
        config = flux.mmdit.config
        mmdit = MMDiT(replace(config, in_channels=times * config.out_channels)).eval()
        for p in mmdit.parameters():                        # stored by columns, as loading does
            p.data = p.data.t().contiguous().t() if p.ndim == 2 else p.data
        return replace(flux, mmdit=mmdit)

    control_flux, fill_flux = widened(2), widened(6)
    tasks: dict[str, Callable] = {
        "generate": lambda **k: generate(flux, PROMPT, **k),
        "image_to_image": lambda **k: image_to_image(flux, PROMPT, picture, strength=1.0, **k),
        "inpaint": lambda **k: inpaint(flux, PROMPT, picture, mask, strength=1.0, **k),
        "control (twice the channels)": lambda **k: control(control_flux, PROMPT, picture, **k),
        "fill (six times the channels)": lambda **k: fill(fill_flux, PROMPT, picture, mask, **k),
        "kontext_edit (twice the tokens)": lambda **k: kontext_edit(flux, PROMPT, picture, **k),
    }
    calls = [partial(task, steps=steps, output="latents", progress=False) for task in tasks.values() for steps in (1, 15)]
    times = medians(*calls, runs=9)
    steps = [1e3 * (long - short) / 14 for short, long in zip(times[::2], times[1::2])]
    print(f"\n{'a step':36} {'miniflux':>12} {'/ generate':>12}")
    for name, ms in zip(tasks, steps):
        print(f"{name:36} {ms:9.1f} ms {ms / steps[0]:11.2f}x")


def flux_sized_block() -> Flux:
    """A transformer of one double block as wide as FLUX.1's, in bfloat16, and nothing else."""
    torch.manual_seed(0)
    return Flux(None, None, None, None, MMDiT(MMDiTConfig(depth=1, depth_single_blocks=0)).bfloat16().eval(), None, FluxConfig())


def bench_lora(_: str) -> None:
    """Rank 16 over all linear layers of the block; the peer is the least there is to do."""
    flux, factors = flux_sized_block(), {}
    layers = {name: layer for name, layer in flux.mmdit.double_blocks.named_modules() if isinstance(layer, nn.Linear)}
    for name, layer in layers.items():
        factors[f"diffusion_model.double_blocks.{name}.lora_A.weight"] = torch.randn(16, layer.in_features).bfloat16()
        factors[f"diffusion_model.double_blocks.{name}.lora_B.weight"] = torch.randn(layer.out_features, 16).bfloat16()
    with tempfile.TemporaryDirectory() as scratch:
        from safetensors.torch import save_file
        path = Path(scratch) / "lora.safetensors"
        save_file(factors, path)

        def least() -> list[Tensor]:
            return [tensor.clone() for tensor in (*read_safetensors(path).values(), *(layer.weight for layer in layers.values()))]

        merged = add_lora(flux, path).mmdit.double_blocks
        for name, layer in layers.items():
            a, b = (factors[f"diffusion_model.double_blocks.{name}.lora_{kind}.weight"].float() for kind in "AB")
            error = merged.get_submodule(name).weight - (layer.weight + b @ a)
            assert error.abs().max() < 2**-7 * (b @ a).abs().max(), f"{name} is not W + B A"
        del merged, error
        ours, theirs = medians(lambda: add_lora(flux, path), least, runs=9)
        peak = json.loads(subprocess.run([sys.executable, "-c", MERGE, str(path)], check=True, capture_output=True, text=True).stdout)
    size = sum(2 * layer.weight.numel() for layer in layers.values())
    print(f"\n{'a LoRA of rank 16, one double block':36} {'miniflux':>12} {'read, copy':>12} {'ratio':>8}")
    print(f"{'merging':36} {1e3 * ours:9.0f} ms {1e3 * theirs:9.0f} ms {ours / theirs:7.2f}x")
    print(f"{'peak memory, touched weights':36} {peak / 2**20:8.0f} MiB {size / 2**20:8.0f} MiB {peak / size:7.2f}x")


def bench_quantize(source: str) -> None:
    """The model's own step and pictures, and a product at FLUX.1's width, 3072 x 12288, for 1,024 tokens."""
    from .tiny.evaluate import evaluate, held_out_scenes

    flux, scenes = load(source, device="cpu"), held_out_scenes(50, 0, ("object",))
    torch.manual_seed(0)
    x, weight = torch.randn(1024, 3072), torch.randn(12288, 3072) / 55
    forms: dict[str, tuple[Flux, Callable]] = {"float32": (flux, lambda: nn.functional.linear(x, weight))}
    for form, (pack, _, kind) in FORMATS.items():
        layer = kind(pack(weight), torch.float32, weight.device)
        error = (layer(x) - x @ weight.t()).norm() / (x @ weight.t()).norm()
        assert error < 0.12, f"{form} is off by {error}"
        forms[form] = quantize(flux, form), partial(layer, x)
    exact = generate(flux, PROMPT, output="tensor", progress=False)
    times = medians(*(product for _, product in forms.values()), runs=5)
    steps = medians(*(partial(generate, model, PROMPT, steps=n, output="latents", progress=False) for model, _ in forms.values()
                      for n in (1, 15)), runs=7)
    print(f"\n{'format':14} {'transformer':>12} {'a step':>9} {'3072 -> 12288':>15} {'difference':>11} {'object right':>13} {'ground':>8}")
    for i, (form, (model, _)) in enumerate(forms.items()):
        size = sum(t.numel() * t.dtype.itemsize for t in (*model.mmdit.parameters(), *model.mmdit.buffers()))
        off = (generate(model, PROMPT, output="tensor", progress=False) - exact).abs().mean()
        rates = evaluate(model, scenes).painted
        print(f"{form:14} {size / 2**20:8.1f} MiB {1e3 * (steps[2 * i + 1] - steps[2 * i]) / 14:6.1f} ms {1e3 * times[i]:12.0f} ms {off:11.4f} "
              f"{rates.object:13.0%} {rates.ground:8.0%}")


def bench_tokenizers(source: str) -> None:
    flux = load(source, device="cpu")
    print(f"\n{'a prompt of 512 tokens':36} {'miniflux':>12}")
    for name, tokenizer in (("CLIP", flux.clip_tokenizer), ("T5", flux.t5_tokenizer)):
        texts = [" ".join(f"{word}{i}" for i, word in enumerate(PROMPT.split() * 40))[: 1500 + i] for i in range(64)]
        fresh = iter(texts)                        # Note: a new text each time, since words are remembered
        print(f"{name:36} {1e3 * medians(lambda: tokenizer([next(fresh)], 512), runs=20)[0]:9.2f} ms")


BENCHES = {"picture": bench_picture, "cold": bench_cold, "attention": bench_attention, "load": bench_load, "tasks": bench_tasks,
           "lora": bench_lora, "quantize": bench_quantize, "int8": bench_int8, "offload": bench_offload,
           "autoencoder": bench_autoencoder, "caching": bench_caching, "tokenizers": bench_tokenizers, "disk": bench_disk}
PEERS = ("picture", "cold", "attention", "int8", "offload", "autoencoder", "caching")  # those that diffusers is measured in, too


@command
def main() -> None:
    parser = Parser(prog="python -m miniflux.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", help=f"of {', '.join(BENCHES)} (default: all but disk)")
    parser.add_argument("--model", default="tiny", help="the model to measure (default tiny)")
    args = parser.parse_args()
    if unknown := [name for name in args.tables if name not in BENCHES]:
        parser.error(f"there is no table {unknown[0]!r}: expected some of {', '.join(BENCHES)}")
    names = args.tables or [name for name in BENCHES if name != "disk"]
    peers = [name for name in names if name in PEERS]
    if peers and not all(map(find_spec, ("diffusers", "transformers"))):
        parser.error(f"{', '.join(peers)} compare with diffusers: `pip install diffusers transformers`, or name other tables")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    machine = platform.processor() or platform.machine()
    print(f"{machine}, {torch.get_num_threads()} threads, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for name in names:
        BENCHES[name](args.model)


if __name__ == "__main__":
    main()
