"""What tiles and caches gain. `python -m miniflux.bench autoencoder caching` prints it."""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from .checkpoints.layouts import load_autoencoder
from .engine.caching import cache
from .engine.tiling import tile
from .flux import Flux, find_source, load
from .generate import generate
from .latents import decode
from .prompt import encode_prompt
from .tiny.scenes import held_out_prompts

PICTURES, STEPS = 40, 28

WORK = """
import json, re, sys, time, torch
from pathlib import Path
from miniflux.bench_engine import ours, theirs

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder, who, work, side, size = Path(sys.argv[1]), *sys.argv[2:4], *map(int, sys.argv[4:])
call = {"miniflux": ours, "diffusers": theirs}[who](folder, work, size)
x = torch.randn(1, 16, side // 8, side // 8) if work == "decode" else torch.rand(1, 3, side, side) * 2 - 1
with torch.inference_mode():
    call(x[:, :, :64, :64])
    before, began = kib("VmRSS"), time.perf_counter()
    call(x)
    print(json.dumps([(kib("VmHWM") - before) * 1024, time.perf_counter() - began]))
"""


def ours(folder: Path, work: str, size: int):
    """Our autoencoder's `work`; in tiles of `size` pixels, if that is not 0."""
    flux = replace(load(device="cpu"), autoencoder=load_autoencoder(folder, torch.device("cpu"), torch.float32))
    return getattr((tile(flux, size) if size else flux).autoencoder, work)


def theirs(folder: Path, work: str, size: int):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    if size:
        vae.tile_sample_min_size, vae.tile_latent_min_size = size, size // 8
        vae.enable_tiling()
    return {"encode": lambda picture: (vae.encode(picture).latent_dist.mean - shift) * scale,
            "decode": lambda z: vae.decode(z / scale + shift).sample}[work]


def bench_autoencoder(source: str) -> None:
    """The model's own autoencoder in float32, each row a process of its own."""
    folder = find_source(source) / "vae"
    for work, x in (("encode", torch.rand(1, 3, 96, 136)), ("decode", torch.randn(1, 16, 12, 17))):
        with torch.inference_mode():
            a, b = (side(folder, work, 64)(x) for side in (ours, theirs))
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), f"the two do not {work} alike in tiles"
    print(f"\n{'peak memory of the autoencoder':36} {'miniflux':>19} {'diffusers':>19} {'ratio':>8}")
    for work, side in (("encode", 1024), ("decode", 1024), ("decode", 2048)):
        for size in (0, 512):
            runs = [json.loads(subprocess.run([sys.executable, "-c", WORK, str(folder), who, work, str(side), str(size)], check=True,
                                              capture_output=True, text=True).stdout) for who in ("miniflux", "diffusers")]
            what = f"{work} {side} x {side}" + (f", tiles of {size}" if size else "")
            print(f"{what:36} " + " ".join(f"{peak / 2**20:8.0f} MiB {seconds:4.0f} s" for peak, seconds in runs)
                  + f" {runs[1][0] / runs[0][0]:7.2f}x", flush=True)


def bench_caching(source: str) -> None:
    """Held-out prompts, one picture at a time; each cache beside as many plain steps as its time would buy."""
    from .tiny.evaluate import judge, rates

    flux, prompts = load(source, device="cpu"), held_out_prompts(PICTURES, 0)
    encoded = [encode_prompt(flux, prompt) for prompt, _, _ in prompts]
    truth = [(name, ground) for _, name, ground in prompts]
    counted: list[int] = []
    flux.mmdit.single_blocks[-1].linear2.register_forward_hook(lambda *_: counted.append(1))

    def paint(models: dict[str, tuple[Flux, int]]) -> dict[str, tuple]:
        """Name -> (seconds of each picture, mean number of full steps, pictures); in turn, so that what slows the machine slows all."""
        seen = {name: ([], [], []) for name in models}
        for seed, prompt in enumerate(encoded):
            for name, (model, steps) in models.items():
                counted.clear()
                began = time.perf_counter()
                z = generate(model, prompt, seed=seed, steps=steps, output="latents", progress=False)
                seen[name][0].append(time.perf_counter() - began)
                seen[name][1].append(len(counted))
                seen[name][2].append(z)
        return {name: (times, statistics.mean(full), decode(flux, torch.cat(z))) for name, (times, full, z) in seen.items()}

    models = {"plain": (flux, STEPS)}
    models |= {f"first_block, threshold {x}": (cache(flux, threshold=x), STEPS) for x in (0.05, 0.1, 0.15, 0.2, 0.3)}
    models |= {f"taylor, interval {n}": (cache(flux, "taylor", interval=n), STEPS) for n in (2, 3, 5)}
    caches = paint(models)
    share = {name: statistics.median(a / b for a, b in zip(times, caches["plain"][0])) for name, (times, _, _) in caches.items()}
    fewer = {name: max(1, round(STEPS * share[name])) for name in models}
    plain = paint({n: (flux, n) for n in sorted(set(fewer.values()))})
    exact = caches["plain"][2]
    print(f"\n{f'{PICTURES} pictures of {STEPS} steps':32} {'full steps':>10} {'time':>6} {'difference':>11} {'object right':>13} {'ground':>7}")

    def row(what: str, full: float, time: float, pictures: torch.Tensor) -> None:
        right = rates(judge([*map(torch.Tensor.numpy, (255 * pictures).round().byte().permute(0, 2, 3, 1))]), truth)
        print(f"{what:32} {full:10.1f} {time:6.2f} {float((pictures - exact).abs().mean()):11.4f} {right.object:13.0%} {right.ground:7.0%}")

    for name in models:
        row(name, caches[name][1], share[name], caches[name][2])
        if name != "plain":
            times, full, pictures = plain[fewer[name]]
            row(f"   {fewer[name]} plain steps", full, statistics.median(a / b for a, b in zip(times, caches["plain"][0])), pictures)
