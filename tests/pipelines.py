"""Compares a task with its diffusers pipeline: the same small random model, seed and images."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from miniflux import load
from miniflux.sampling import unpatchify

# Our keywords -> theirs.
NAMES = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "true_cfg": "true_cfg_scale",
    "mask": "mask_image",
    "num_images": "num_images_per_prompt",
    "mask_padding": "padding_mask_crop",
    "auto_resize": "_auto_resize",
    "reference": "image_reference",
}
OUTPUTS = {"tensor": "pt", "pil": "pil", "latents": "pil"}      # ours -> theirs


@pytest.fixture(scope="module", autouse=True)
def mean_of_the_posterior():
    """Diffusers then encodes an image to the mean of the posterior, not to a random sample.

    The control pipelines call `latent_dist.sample`; the others call `retrieve_latents`, and that
    calls it, too."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    def mean(self, generator=None):
        return self.mode()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", mean)
        yield


def smooth_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth coloured noise, so that resizing it matters but does not destroy it."""
    shape = (height // 8 + 1, width // 8 + 1, 3)
    coarse = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def difference(
    task,
    pipeline_class,
    folder,
    image_keywords,
    *,
    prompt="a red apple",
    seed=7,
    output="tensor",
    theirs=None,
    ours=None,
    adapt=lambda flux: flux,
    adapt_theirs=lambda pipeline: None,
    parts=None,
    **both,
) -> float:
    """The largest difference of the two results.

    Latents are compared relative to the largest of them.

    image_keywords:      keywords of both under our names; None is left out of theirs.
    ours, theirs:        keywords of one of them.
    adapt, adapt_theirs: change the model and the pipeline first.
    parts:               further components of the pipeline.
    both:                keywords of both under our names."""
    flux = adapt(load(folder, device="cpu"))
    a = task(flux, prompt, seed=seed, max_text_tokens=24, output=output, progress=False,
             **image_keywords, **both, **(ours or {}))

    components = FluxPipeline.from_pretrained(folder).components | (parts or {})
    names = [name for name in inspect.signature(pipeline_class).parameters if name in components]
    pipeline = pipeline_class(**{name: components[name] for name in names})
    pipeline.set_progress_bar_config(disable=True)
    adapt_theirs(pipeline)
    prompts = len(prompt) if isinstance(prompt, list) else 1
    generators = []
    for i in range(prompts * both.get("num_images", 1)):
        generators.append(torch.Generator("cpu").manual_seed(seed + i))
    keywords = {}
    for name, value in (both | image_keywords).items():
        if value is not None:
            keywords[NAMES.get(name, name)] = value
    states = []

    def record(pipeline, step, timestep, tensors):
        states.append(tensors["latents"])
        return {}

    b = pipeline(
        prompt=prompt,
        generator=generators if len(generators) > 1 else generators[0],
        max_sequence_length=24,
        output_type=OUTPUTS[output],
        callback_on_step_end=record,
        **keywords,
        **(theirs or {}),
    ).images
    if output == "pil":
        assert [image.size for image in a] == [image.size for image in b]
        return max(float(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in zip(a, b)) / 255
    if output == "latents":
        b = unpatchify(states[-1], *a.shape[2:])
    assert a.shape == b.shape
    assert b.std() > 0.01
    return float((a - b).abs().max() / max(1.0, b.abs().max()))
