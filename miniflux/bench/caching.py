"""The table `caching`: what caches save, beside as many plain steps as take the same time.

A second table compares the first-block cache with diffusers': same images, same full steps.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..checkpoints.finding import find_source
from ..engine.caching import cache
from ..flux import Flux
from ..generate import generate
from ..latents import decode
from ..loading import load
from ..prompt import Prompt, encode_prompt
from .measuring import STEPS

IMAGES = 40
SEEDS = 9
THRESHOLDS = (0.05, 0.1, 0.15, 0.2, 0.3)
INTERVALS = (2, 3, 5)


@dataclass
class Run:
    """What one model did, image by image."""

    seconds: list[float] = field(default_factory=list)
    full_steps: list[int] = field(default_factory=list)     # steps that ran the last block
    outputs: list[Tensor] = field(default_factory=list)


def count_full_steps(layer: nn.Module) -> list[int]:
    """A list that grows by one whenever this layer of the last block is called."""
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    return calls


def add_image(run: Run, calls: list[int], make: Callable[[], Tensor]) -> None:
    calls.clear()
    began = time.perf_counter()
    output = make()
    run.seconds.append(time.perf_counter() - began)
    run.full_steps.append(len(calls))
    run.outputs.append(output)


# -------------------------------------------------------------------------------- beside diffusers


def cache_beside_diffusers(source: str, thresholds: tuple[float, ...] = (0.1, 0.2)) -> None:
    """The first-block cache of both, in turn; the images are equal, and so are the full steps."""
    from diffusers import FirstBlockCacheConfig, FluxPipeline

    from ..tiny.measure.evaluate import held_out_scenes

    flux = load(source, device="cpu")
    pipe = FluxPipeline.from_pretrained(find_source(source), torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    our_calls = count_full_steps(flux.mmdit.single_blocks[-1].linear2)
    their_calls = count_full_steps(pipe.transformer.single_transformer_blocks[-1].proj_out)
    prompt, size = held_out_scenes(1, 0, ("object",))[0].caption, flux.config.size

    def ours(flux: Flux, seed: int) -> Tensor:
        return generate(flux, prompt, seed=seed, steps=STEPS, output="tensor", progress=False)

    def theirs(seed: int) -> Tensor:
        return pipe(prompt, height=size, width=size, num_inference_steps=STEPS,
                    max_sequence_length=flux.config.max_text_tokens,
                    generator=torch.Generator("cpu").manual_seed(seed), output_type="pt").images

    print(f"\n{f'first-block cache, {STEPS} steps':32} {'full steps':>10} {'miniflux':>12} "
          f"{'diffusers':>12} {'ratio':>8}")
    for threshold in (0.0, *thresholds):
        model, a, b = cache(flux, threshold=threshold), Run(), Run()
        if threshold:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold))
        for seed in range(SEEDS):
            add_image(a, our_calls, lambda model=model, seed=seed: ours(model, seed))
            add_image(b, their_calls, lambda seed=seed: theirs(seed))
            difference = (a.outputs[-1] - b.outputs[-1]).abs().max()
            equal = a.full_steps == b.full_steps and difference < 2e-3
            assert equal, f"the two differ at the threshold {threshold}"
        if threshold:
            pipe.transformer.disable_cache()
        our_time, their_time = (statistics.median(run.seconds[1:]) for run in (a, b))
        full = statistics.median(a.full_steps[1:])
        print(f"{f'threshold {threshold}':32} {full:10.0f} {1e3 * our_time:9.0f} ms "
              f"{1e3 * their_time:9.0f} ms {their_time / our_time:7.2f}x", flush=True)


# ------------------------------------------------------------------------------ beside plain steps


def generate_in_turn(models: dict[str, tuple[Flux, int]], prompts: list[Prompt],
                     calls: list[int]) -> dict[str, Run]:
    """Runs each (model, steps) on each prompt, prompt by prompt."""
    runs = {name: Run() for name in models}
    for seed, prompt in enumerate(prompts):
        for name, (model, steps) in models.items():
            add_image(runs[name], calls, lambda model=model, seed=seed, prompt=prompt, steps=steps:
                      generate(model, prompt, seed=seed, steps=steps, output="latents",
                               progress=False))
    return runs


def bench_caching(source: str) -> None:
    """Held-out prompts, one image at a time."""
    cache_beside_diffusers(source)
    from ..tiny.measure.evaluate import held_out_scenes, rates
    from ..tiny.measure.judge import judge

    flux = load(source, device="cpu")
    scenes = held_out_scenes(IMAGES, 0, ("object",))
    prompts = [encode_prompt(flux, scene.caption) for scene in scenes]
    calls = count_full_steps(flux.mmdit.single_blocks[-1].linear2)

    models = {"plain": (flux, STEPS)}
    for threshold in THRESHOLDS:
        models[f"first_block, threshold {threshold}"] = cache(flux, threshold=threshold), STEPS
    for interval in INTERVALS:
        models[f"taylor, interval {interval}"] = cache(flux, "taylor", interval=interval), STEPS
    runs = generate_in_turn(models, prompts, calls)
    all_steps = runs["plain"]
    exact = decode(flux, torch.cat(all_steps.outputs))

    def share(run: Run) -> float:
        """Its time as a share of that of all steps."""
        return statistics.median(a / b for a, b in zip(run.seconds, all_steps.seconds))

    fewer = {name: max(1, round(STEPS * share(run))) for name, run in runs.items()}
    plain_models = {f"{n}": (flux, n) for n in sorted(set(fewer.values()))}
    plain = generate_in_turn(plain_models, prompts, calls)

    def row(title: str, run: Run) -> None:
        images = decode(flux, torch.cat(run.outputs))                           # (B, 3, H, W)
        pixels = (255 * images).round().byte().permute(0, 2, 3, 1)              # (B, H, W, 3)
        right = rates(judge([image.numpy() for image in pixels]), scenes)
        difference = float((images - exact).abs().mean())
        print(f"{title:32} {statistics.mean(run.full_steps):10.1f} {share(run):6.2f} "
              f"{difference:11.4f} {right.object:13.0%} {right.ground:7.0%}")

    print(f"\n{f'{IMAGES} pictures of {STEPS} steps':32} {'full steps':>10} {'time':>6} "
          f"{'difference':>11} {'object right':>13} {'ground':>7}")
    for name, run in runs.items():
        row(name, run)
        if name != "plain":
            row(f"   {fewer[name]} plain steps", plain[f"{fewer[name]}"])
