"""What tiles, caches and 8 bits gain, beside diffusers. `python -m miniflux.bench autoencoder caching int8` prints it."""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from .checkpoints.finding import find_source
from .checkpoints.layouts import load_autoencoder
from .engine.caching import cache
from .engine.quantize import quantize
from .engine.tiling import tile
from .flux import Flux, FluxConfig
from .generate import generate
from .latents import decode
from .loading import load
from .networks.mmdit import MMDiT, MMDiTConfig
from .prompt import encode_prompt
from .tiny.export import write_mmdit

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
with torch.no_grad():
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
        with torch.no_grad():
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


def cache_beside_diffusers(source: str, thresholds: tuple[float, ...] = (0.1, 0.2)) -> None:
    """The first-block cache of both, in turn; their pictures are equal, and so are their full steps."""
    from diffusers import FirstBlockCacheConfig, FluxPipeline

    from .tiny.evaluate import held_out_scenes

    flux, pipe = load(source, device="cpu"), FluxPipeline.from_pretrained(find_source(source), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    full: list[int] = []
    for layer in (flux.mmdit.single_blocks[-1].linear2, pipe.transformer.single_transformer_blocks[-1].proj_out):
        layer.register_forward_hook(lambda *_: full.append(1))
    prompt, size = held_out_scenes(1, 0, ("object",))[0].caption, flux.config.size

    def ours(flux: Flux, seed: int) -> Tensor:
        return generate(flux, prompt, seed=seed, steps=STEPS, output="tensor", progress=False)

    def theirs(seed: int) -> Tensor:
        return pipe(prompt, height=size, width=size, num_inference_steps=STEPS, max_sequence_length=flux.config.max_text_tokens,
                    generator=torch.Generator("cpu").manual_seed(seed), output_type="pt").images

    def timed(call, *inputs) -> tuple[float, int, Tensor]:
        full.clear()
        began = time.perf_counter()
        picture = call(*inputs)
        return time.perf_counter() - began, len(full), picture

    print(f"\n{f'first-block cache, {STEPS} steps':32} {'full steps':>10} {'miniflux':>12} {'diffusers':>12} {'ratio':>8}")
    for threshold in (0.0, *thresholds):
        model, runs = cache(flux, threshold=threshold), []
        if threshold:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold))
        for seed in range(9):
            a, b = timed(ours, model, seed), timed(theirs, seed)
            assert a[1] == b[1] and (a[2] - b[2]).abs().max() < 2e-3, f"the two differ at the threshold {threshold}"
            runs.append((a[0], b[0], a[1]))
        if threshold:
            pipe.transformer.disable_cache()
        a, b, steps = (statistics.median(values) for values in zip(*runs[1:]))
        print(f"{f'threshold {threshold}':32} {steps:10.0f} {1e3 * a:9.0f} ms {1e3 * b:9.0f} ms {b / a:7.2f}x", flush=True)


def bench_caching(source: str) -> None:
    """Held-out prompts, one picture at a time; each cache beside as many plain steps as its time would buy."""
    cache_beside_diffusers(source)
    from .tiny.evaluate import held_out_scenes, rates
    from .tiny.judge import judge

    flux, scenes = load(source, device="cpu"), held_out_scenes(PICTURES, 0, ("object",))
    encoded = [encode_prompt(flux, scene.caption) for scene in scenes]
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
        right = rates(judge([*map(torch.Tensor.numpy, (255 * pictures).round().byte().permute(0, 2, 3, 1))]), scenes)
        print(f"{what:32} {full:10.1f} {time:6.2f} {float((pictures - exact).abs().mean()):11.4f} {right.object:13.0%} {right.ground:7.0%}")

    for name in models:
        row(name, caches[name][1], share[name], caches[name][2])
        if name != "plain":
            times, full, pictures = plain[fewer[name]]
            row(f"   {fewer[name]} plain steps", full, statistics.median(a / b for a, b in zip(times, caches["plain"][0])), pictures)


def bench_int8(_: str) -> None:
    """One double block of FLUX.1's width, 512 tokens, beside diffusers' of the same weights, whose int8 is torchao's."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    net = MMDiT(MMDiTConfig(context_in_dim=256, depth=1, depth_single_blocks=0)).bfloat16().eval()
    with tempfile.TemporaryDirectory() as scratch:
        write_mmdit(Path(scratch), net)
        peer = FluxTransformer2DModel.from_pretrained(Path(scratch) / "transformer", torch_dtype=torch.float32)
    flux = Flux(None, None, None, None, net.float(), None, FluxConfig())
    models: dict[str, nn.Module] = {"float32": flux.mmdit, "float32, diffusers": peer}
    for form, config in (("int8", "Int8WeightOnlyConfig"), ("int8-dynamic", "Int8DynamicActivationInt8WeightConfig")):
        models[form] = quantize(flux, form).mmdit
        if find_spec("torchao"):
            from torchao import quantization

            models[f"{form}, torchao"] = copy.deepcopy(peer)
            quantization.quantize_(models[f"{form}, torchao"].transformer_blocks, getattr(quantization, config)())
    x, txt, vec, one = torch.randn(1, 256, 64), torch.randn(1, 256, 256), torch.randn(1, 768), torch.ones(1)
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(16.0), torch.arange(16.0)), torch.zeros(256, 3)

    def step(name: str) -> Tensor:
        if isinstance(models[name], MMDiT):
            return models[name](x, txt, vec, one, 3.5 * one, *(i.long() for i in ids))
        return models[name](x, txt, vec, one, *ids, 3.5 * one, return_dict=False)[0]

    times: dict[str, list[float]] = {name: [] for name in models}
    errors: dict[str, float] = {}
    with torch.no_grad():
        exact = step("float32")
        for _ in range(6):                                  # in turn, so that what slows the machine slows all
            for name in models:
                began = time.perf_counter()
                v = step(name)
                times[name].append(time.perf_counter() - began)
                errors[name] = float((v - exact).norm() / exact.norm())
    assert errors["float32, diffusers"] < 1e-5 and max(errors.values()) < 0.05, f"they compute something else: {errors}"
    print(f"\n{'a double block, 512 tokens':32} {'weights':>10} {'time':>10} {'error':>9}")
    for name, model in models.items():
        blocks = model.double_blocks if isinstance(model, MMDiT) else model.transformer_blocks
        print(f"{name:32} {nbytes(blocks) / 2**20:6.0f} MiB {1e3 * statistics.median(times[name][1:]):7.0f} ms {errors[name]:9.1e}")
    if not find_spec("torchao"):
        print("torchao, which diffusers quantises with, is not here to compare with: `pip install torchao`")


def nbytes(module: nn.Module) -> int:
    """Of all tensors, and of those that torchao's consist of."""
    tensors = [*module.parameters(), *module.buffers()]
    return sum(sum(getattr(t, name).nbytes for name in t.__tensor_flatten__()[0]) if hasattr(t, "__tensor_flatten__") else t.nbytes
               for t in tensors)
