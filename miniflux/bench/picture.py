"""The tables `picture` and `cold`: one image, everything loaded, and from a fresh process."""

import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor

from ..checkpoints.finding import find_source
from ..generate import generate
from ..loading import load
from .measuring import PROMPT, STEPS, medians, table

COLD_PEER = """
import sys, torch
from diffusers import FluxPipeline
pipe = FluxPipeline.from_pretrained(sys.argv[1], torch_dtype=torch.float32)
pipe.set_progress_bar_config(disable=True)
pipe(sys.argv[3], height=128, width=128, num_inference_steps=28, guidance_scale=3.5,
     max_sequence_length=32,
     generator=torch.Generator("cpu").manual_seed(0)).images[0].save(sys.argv[2])
"""


def bench_picture(source: str) -> None:
    from diffusers import FluxPipeline

    folder = find_source(source)
    flux = load(folder, device="cpu")
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)

    def ours(steps: int = STEPS) -> Tensor:
        return generate(flux, PROMPT, steps=steps, output="tensor")

    def theirs(steps: int = STEPS) -> Tensor:
        return pipe(PROMPT, height=128, width=128, num_inference_steps=steps,
                    max_sequence_length=flux.config.max_text_tokens,
                    generator=torch.Generator("cpu").manual_seed(0), output_type="pt").images

    difference = float((ours() - theirs()).abs().max())
    assert difference < 2e-3, f"the images differ by {difference}"
    ours_all, theirs_all, ours_one, theirs_one = medians(
        ours, theirs, lambda: ours(1), lambda: theirs(1))
    ours_step = (ours_all - ours_one) / (STEPS - 1)
    theirs_step = (theirs_all - theirs_one) / (STEPS - 1)
    rows = [("whole picture", 1e3 * ours_all, 1e3 * theirs_all),
            ("a step", 1e3 * ours_step, 1e3 * theirs_step)]
    table(f"one picture, {STEPS} steps", rows, "ms")
    print(f"largest difference of the two pictures {difference:.1e}")


def bench_cold(source: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        def command(*arguments: str) -> Callable[[], object]:
            return lambda: subprocess.run([sys.executable, *arguments], check=True, cwd=scratch,
                                          capture_output=True)

        ours = command("-m", "miniflux.generate", PROMPT, "--model", source)
        theirs = command("-c", COLD_PEER, str(find_source(source)), "peer.png", PROMPT)
        seconds = medians(ours, theirs, runs=3)
    table("cold start", [("command to file", *seconds)], "s")
