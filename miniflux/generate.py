"""Text to image, and the algorithm that all tasks share.

    python -m miniflux.generate "a fox next to a red apple" --seed 7 --output fox.png

`sample` below is the whole algorithm of FLUX.1. Every other task calls it too, and differs from
`generate` in one of three ways: in what enters the transformer, in where the state starts, or in
what becomes of the velocity.
"""

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack

from .command import command
from .flux import Flux
from .imaging.images import Images, log, to_pil
from .latents import decode
from .prompt import Prompt, PromptLike, encode_prompt, repeat_negative, repeat_prompt
from .sampling import (
    SAMPLERS,
    Conditions,
    OnFinish,
    Velocity,
    classifier_free,
    flow,
    interpolate,
    keep_known,
    noise,
    repeat_to_batch,
    schedule,
    seeds_from,
)
from .settings import AdapterSettings, Call, adapter_conditions, resolve, task


@task
def generate(flux: Flux, prompt: PromptLike, **settings: Unpack[AdapterSettings]) -> Images:
    """Paint images from text.

    flux: the model, from `load`.
    prompt: a string, a list of strings or an encoded `Prompt`; `num_images` images of each.

    With a ControlNet, guidance is 7 by default, and the image has the shape of the control image.

    Returns a list of PIL images, or what `output` asks for.
    Raises ValueError for a value out of range, TypeError for an unknown keyword.
    Paper: Esser et al. 2024 (arXiv:2403.03206).
    Reference: diffusers' `FluxPipeline` and `FluxControlNetPipeline`."""
    return sample(flux, prompt, resolve("generate", flux, settings))


def sample(flux: Flux, prompt: PromptLike, call: Call, cond: Conditions = Conditions(), *,
           start: Tensor | None = None, mask: Tensor | None = None,
           composite: Callable[[Tensor], Tensor] | None = None) -> Images:
    """From noise to images.

    call: the settings, from `resolve`.
    cond: what enters the transformer besides the prompt and the state (fill, control, kontext).
    start: latents (n, 16, h, w) of images to begin from, noised to the time at which the last
        `call.strength` of the steps begin (image to image); default: begin from pure noise.
    mask: (n, 1, h, w), true where `start` is repainted (inpainting); default: everywhere.
    composite: takes the decoded images (B, 3, H, W) in [0, 1] and pastes them back where they
        belong; default: they stay as they are.

    n is 1 or divides the number of images B."""
    text = repeat_prompt(encode_prompt(flux, prompt, call.max_text_tokens), call.num_images)
    h, w = call.height // 8, call.width // 8
    channels = flux.mmdit.config.out_channels // 4
    seeds = seeds_from(call.seed, len(text))
    eps = noise(seeds, h, w, channels, text.txt.dtype).to(text.txt.device)      # (B, 16, h, w)
    ts = schedule(call.steps, h * w // 4, flux.config.schedule, sigmas=call.sigmas,
                  strength=call.strength)
    start, mask = repeat_to_batch(start, eps), repeat_to_batch(mask, eps)
    cond = adapter_conditions(flux, call, text, ts, cond.repeat_to_batch(eps))

    def velocity_for(text: Prompt, cond: Conditions) -> Velocity:
        pooled = flux.mmdit.prepare(text.pooled, call.guidance, ts)
        return flow(flux.mmdit, text.txt, pooled, call.guidance, h, w, cond)

    velocity = velocity_for(text, cond)
    if call.two_passes:
        negative = encode_prompt(flux, call.negative_prompt, call.max_text_tokens)
        negative = repeat_negative(negative, len(text))
        velocity = classifier_free(velocity, velocity_for(negative, cond.negative()), call.true_cfg)
    if mask is not None:
        velocity = keep_known(velocity, mask, eps - start)
    x = eps if start is None else interpolate(start, eps.float(), ts[0])
    z = SAMPLERS[call.sampler](velocity, x, ts, call.on_step, call.progress)    # (B, 16, h, w)
    if call.output == "latents":
        return z
    images = decode(flux, z)                                                    # (B, 3, H, W)
    return postprocess(flux, composite(images) if composite else images, call)


def postprocess(flux: Flux, images: Tensor, call: Call) -> Images:
    """Images (B, 3, H, W) in [0, 1] as a tensor, or as PIL images whose `info` has the settings."""
    if call.on_finish:
        images = finish(call.on_finish, images)
    if call.output == "tensor":
        return images
    guidance = call.guidance if flux.mmdit.config.guidance_embed else None
    finished = to_pil(images)
    for image, seed in zip(finished, seeds_from(call.seed, len(finished))):
        image.info = {"seed": seed, "steps": call.steps, "guidance": guidance}
    return finished


def finish(on_finish: OnFinish, images: Tensor) -> Tensor:
    """What `on_finish` returns for the images, or the images themselves where it returns none.

    An error that it raises reaches the caller, and no image does: so filters work."""
    finished = on_finish(images)
    if finished is None:                                    # it only read or changed them in place
        return images
    is_images = isinstance(finished, Tensor) and finished.ndim == 4 and finished.shape[1] == 3
    if not is_images or not finished.is_floating_point():
        shape = getattr(finished, "shape", None)
        of_shape = "" if shape is None else f" of the shape {list(shape)}"
        log.warning("on_finish returned a %s%s, expected images (B, 3, H, W) or None: the images "
                    "are returned as they were", type(finished).__name__, of_shape)
        return images
    return finished


@command
def main() -> None:
    from . import cli, flags

    parser = flags.parser("generate", "Paint an image from text.")
    flags.add_controls(parser)
    flags.add_ip_images(parser)
    cli.run(parser, generate)


if __name__ == "__main__":
    main()
