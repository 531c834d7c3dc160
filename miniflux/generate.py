"""Text to image, and the algorithm that all tasks share.

    python -m miniflux.generate "a fox next to a red apple" --seed 7 --output fox.png

`paint` below is FLUX.1's whole algorithm. Every other task calls it too, and differs from `generate` in what enters the
transformer, or in what becomes of the velocity it returns.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .adapters.ip_adapter import IPImage, IPImages, IPScale, image_keys_values, read_ip_images
from .controlnet import Control, Controls, like, read_controls, residuals_of
from .engine.modulation import modulations
from .flux import Flux
from .images import Pictures, Pixels, log, to_pil
from .latents import decode, spread
from .prompt import Prompt, Text, encode_prompt, match, repeat
from .sampling import OnFinish, OnStep, Velocity, classifier_free, euler, flow, keep, noise, schedule, seeds_from, steer
from .settings import Call, resolve


@torch.no_grad()
def generate(flux: Flux, prompt: Text, *, width: int | None = None, height: int | None = None, steps: int | None = None,
             guidance: float | None = None, seed: int = 0, num_images: int = 1, negative_prompt: Text | None = None,
             true_cfg: float = 1.0, sigmas: Sequence[float] | None = None, max_text_tokens: int | None = None,
             controlnet: Controls | None = None, ip_image: IPImage | None = None, ip_scale: IPScale = 1.0,
             negative_ip_image: IPImage | None = None, output: str = "pil", progress: bool = True, on_step: OnStep | None = None,
             on_finish: OnFinish | None = None) -> Pictures:
    """Paint pictures from text.

    prompt: a string, a list of strings or an encoded `Prompt`; `num_images` pictures of each, side by side.
    width, height: pixels, rounded down to multiples of 16 (default: the model's). steps: default 28, or 4 for a model
    without guidance (schnell). guidance: default 3.5, with a ControlNet 7. seed: picture i of the call is painted from seed + i.
    negative_prompt, true_cfg: with both, two passes a step and v_neg + true_cfg · (v - v_neg). sigmas: own falling times in
    (0, 1], before the shift; their number is the number of steps. max_text_tokens: T5 tokens (default: the model's).
    controlnet: (net, image, scale, start, end, mode), see `controlnet.Control`, or a list of them; width and height are then by
    default those of the first control picture's shape. ip_image: a picture to follow, for each IP-Adapter of the model
    (`add_ip_adapter`) one, several or none; ip_scale: a number, one for each adapter, or one for each double block;
    negative_ip_image: what to avoid in the second pass (default: black).
    output: "pil" (a list), "tensor" (B, 3, H, W) in [0, 1], or "latents" (B, 16, H/8, W/8).
    on_step(step, t, x): called before each step with its number, its time and the latents (B, 16, H/8, W/8) at that time.
    on_finish(pictures): makes of the finished pictures (B, 3, H, W) in [0, 1] what is returned, such as `add_watermark`; returns
    None to leave them as they are; or raises an error, such as `stop_flagged(filters)`, and then none is returned.

    Raises ValueError for a value out of range. Papers: arXiv:2403.03206. Reference: diffusers' `FluxPipeline` and
    `FluxControlNetPipeline`."""
    controls = read_controls(flux, controlnet)
    call = resolve("generate with a ControlNet" if controls else "generate", flux, width, height, steps, guidance, seed, num_images,
                   negative_prompt, true_cfg, sigmas, max_text_tokens, output, progress, on_step, on_finish, like=like(controls))
    return paint(flux, prompt, call, controls=controls, ip=read_ip_images(flux, ip_image, ip_scale, negative_ip_image))


def paint(flux: Flux, prompt: Text, call: Call, *, start: Tensor | None = None, mask: Tensor | None = None,
          beside: Tensor | None = None, after: tuple[Tensor, Tensor] | None = None,
          controls: Sequence[Control] = (), ip: IPImages | None = None,
          put_back: Callable[[Tensor], Tensor] | None = None) -> Pictures:
    """From noise to pictures; the keywords are the seams where the other tasks enter.

    start: latents (n, 16, h, w) of the pictures to begin from, noised as far as call.strength reaches (image to image).
    mask: (n, 1, h, w), false where the latents of `start` are kept (inpainting). beside: further channels (n, N, ·) of each
    image token (fill, control). after: further image tokens (n, M, 64) and their positions (M, 3) (kontext). n is 1 or
    divides the number of pictures. controls, ip: the ControlNets and the IP-Adapters' pictures. put_back: what becomes of the
    decoded pictures (B, 3, H, W) in [0, 1]."""
    text = repeat(encode_prompt(flux, prompt, call.max_text_tokens), call.num_images)
    count, h, w, channels = len(text), call.height // 8, call.width // 8, flux.mmdit.config.out_channels // 4
    x = eps = noise(seeds_from(call.seed, count), h, w, channels, text.txt.dtype).to(text.txt.device)  # (B, 16, h, w)
    ts = schedule(call.steps, h * w // 4, flux.config.schedule, sigmas=call.sigmas, strength=call.strength)
    start, mask, beside = (spread(given, x) for given in (start, mask, beside))
    after = after and (spread(after[0], x), after[1])

    def velocity_of(text: Prompt, pictures: list[list[Pixels]] | None) -> Velocity:
        image_kv = pictures and image_keys_values(flux, pictures, ip.scales)
        vec = modulations(flux.mmdit, text.vec, call.guidance, ts)
        return flow(flux.mmdit, text.txt, vec, call.guidance, h, w, beside, after, image_kv)

    velocity = velocity_of(text, ip and ip.wanted)
    if call.true_cfg > 1 and call.negative_prompt is not None:
        unwanted = match(encode_prompt(flux, call.negative_prompt, call.max_text_tokens), count)
        velocity = classifier_free(velocity, velocity_of(unwanted, ip and ip.unwanted), call.true_cfg)
    if controls:
        velocity = steer(velocity, residuals_of(flux, controls, text, call, ts))
    if start is not None:
        x = ts[0] * eps.float() + (1 - ts[0]) * start
    if mask is not None:
        velocity = keep(velocity, mask, eps - start)
    z = euler(velocity, x, ts, call.on_step, call.progress)
    if call.output == "latents":
        return z
    pictures = decode(flux, z)                                                  # (B, 3, H, W)
    return deliver(flux, put_back(pictures) if put_back else pictures, call)


def deliver(flux: Flux, pictures: Tensor, call: Call) -> Pictures:
    """(B, 3, H, W) in [0, 1] as it is, or as PIL pictures whose `info` says how they were made."""
    pictures = finish(call.on_finish, pictures) if call.on_finish else pictures
    if call.output == "tensor":
        return pictures
    painted, guidance = to_pil(pictures), call.guidance if flux.mmdit.config.guidance_embed else None
    for picture, seed in zip(painted, seeds_from(call.seed, len(painted))):
        picture.info = {"seed": seed, "steps": call.steps, "guidance": guidance}
    return painted


def finish(on_finish: OnFinish, pictures: Tensor) -> Tensor:
    """What on_finish makes of the pictures. An error that it raises goes to the caller, and no picture does: so filters work."""
    finished = on_finish(pictures)
    if finished is None:                                    # it has only looked at them, or changed them in place
        return pictures
    if not isinstance(finished, Tensor) or finished.ndim != 4 or finished.shape[1] != 3 or not finished.is_floating_point():
        shape = list(getattr(finished, "shape", []))
        log.warning("on_finish returned a %s%s, expected pictures (B, 3, H, W) or None: the pictures are returned as they were",
                    type(finished).__name__, f" of the shape {shape}" if shape else "")
        return pictures
    return finished


def main() -> None:
    from . import cli

    parser = cli.parser("generate", "Paint a picture from text.")
    cli.add_controls(parser)
    cli.add_ip_images(parser)
    cli.run(parser, generate)


if __name__ == "__main__":
    main()
