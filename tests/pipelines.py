"""A task of miniflux beside its diffusers pipeline: the same small random model, seed and pictures."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image

from miniflux import load
from miniflux.sampling import unpatchify

NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "true_cfg": "true_cfg_scale", "mask": "mask_image",
         "num_images": "num_images_per_prompt", "mask_padding": "padding_mask_crop", "auto_resize": "_auto_resize",
         "reference": "image_reference"}


@pytest.fixture(scope="module", autouse=True)
def mean_of_the_posterior():
    """`latent_dist.sample` is what the control pipelines call, `retrieve_latents(sample)` what the others do."""
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
        yield


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth coloured noise, so that resizing it matters but does not destroy it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def box_mask(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


def difference(task, pipeline_class, folder, image_keywords, *, prompt="a red apple", seed=7, output="tensor", theirs=None, ours=None,
               adapt=lambda flux: flux, adapt_theirs=lambda pipeline: None, parts=None, **both) -> float:
    """Largest difference of the two results (of latents, relative to the largest of them); `both` are keywords of either, under our
    names. adapt, adapt_theirs: what happens to the models first; parts: further components of the pipeline."""
    flux = adapt(load(folder, device="cpu"))
    parts = FluxPipeline.from_pretrained(folder).components | (parts or {})
    pipeline = pipeline_class(**{name: parts[name] for name in inspect.signature(pipeline_class).parameters if name in parts})
    pipeline.set_progress_bar_config(disable=True)
    adapt_theirs(pipeline)
    count = (len(prompt) if isinstance(prompt, list) else 1) * both.get("num_images", 1)
    generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
    a = task(flux, prompt, **image_keywords, seed=seed, max_text_tokens=24, output=output, progress=False, **both, **(ours or {}))
    keywords = {NAMES.get(k, k): v for k, v in (both | image_keywords).items() if v is not None}
    states = []
    b = pipeline(prompt=prompt, generator=generators if count > 1 else generators[0], max_sequence_length=24,
                 output_type={"tensor": "pt"}.get(output, "pil"), callback_on_step_end=lambda *args: states.append(args[3]["latents"]) or {},
                 **keywords, **(theirs or {})).images
    if output == "latents":
        b = unpatchify(states[-1], *a.shape[2:])
    if output == "pil":
        assert [p.size for p in a] == [p.size for p in b]
        return max(float(np.abs(np.int16(x) - np.int16(y)).max()) for x, y in zip(a, b)) / 255
    assert a.shape == b.shape and b.std() > 0.01
    return float((a - b).abs().max() / max(1.0, b.abs().max()))
