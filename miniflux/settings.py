"""The keywords that all tasks share: what they mean, their defaults, their checks.

    @task
    def fill(flux, prompt, image, mask, *, paste_back=False, **settings: Unpack[Settings]):
        call = resolve("fill", flux, settings, like=size_of(images[0]))

The defaults are those of the reference implementations: diffusers' `__call__` of each pipeline.
"""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from typing import TypeVar, get_args

import torch
from typing_extensions import TypedDict

from .adapters.controlnet import Control, Controls, control_size, read_controls, residuals_of
from .adapters.ip_adapter import IPImage, IPImages, IPScale, image_keys_values, read_ip_images
from .checks import check_function, check_number, check_switch, quote
from .flux import Flux
from .imaging.images import OUTPUTS, check_side, natural_size, round_size
from .latents import check_autoencoder
from .prompt import Prompt, PromptLike, check_prompt
from .sampling import SAMPLERS, Conditions, OnFinish, OnStep, once_a_state


class Settings(TypedDict, total=False):
    """width, height: pixels, rounded down to multiples of 16; default: the model's size, or the
        shape of the given image at the model's number of pixels.
    steps: from noise to image, 1 to 1000; default: see DEFAULTS, 4 for a model without guidance
        embedding (schnell).
    guidance: strength of the distilled guidance, 0 to 1000; default: see DEFAULTS.
    seed: 0 to 2^64 - 1; image i of a call is sampled from seed + i; default 0.
    num_images: images of each prompt, side by side; default 1.
    negative_prompt: what not to paint; acts where true_cfg is above 1; default: none.
    true_cfg: scale of classifier-free guidance in two passes a step; default 1: off.
    sigmas: own falling times in (0, 1], before the shift, instead of `steps`; default: even.
    sampler: "euler" or "heun" (second order, two passes a step); default "euler".
    max_text_tokens: T5 tokens that the prompt is padded to; default: the model's.
    output: "pil" (a list), "tensor" (B, 3, H, W) in [0, 1] or "latents" (B, 16, H/8, W/8);
        default "pil".
    progress: whether to show a progress bar on stderr; default True.
    on_step: on_step(step, t, x) is called before each step with its number, its time and the
        latents (B, 16, H/8, W/8); default: none.
    on_finish: on_finish(images) is given the images (B, 3, H, W) in [0, 1] and returns those to
        return, such as `add_watermark`, or None to leave them; what it raises, such as
        `stop_flagged(filters)`, reaches the caller; default: none."""

    width: int | None
    height: int | None
    steps: int | None
    guidance: float | None
    seed: int
    num_images: int
    negative_prompt: PromptLike | None
    true_cfg: float
    sigmas: Sequence[float] | None
    sampler: str
    max_text_tokens: int | None
    output: str
    progress: bool
    on_step: OnStep | None
    on_finish: OnFinish | None


class IPSettings(Settings, total=False):
    """ip_image: an image to follow for each IP-Adapter of the model (`add_ip_adapter`): one, a
        list, or None; default: none.
    ip_scale: how strongly: a number, one for each adapter, or one for each double block; default 1.
    negative_ip_image: what to avoid in the second pass of true_cfg; default: black."""

    ip_image: IPImage | None
    ip_scale: IPScale
    negative_ip_image: IPImage | None


class AdapterSettings(IPSettings, total=False):
    """controlnet: (net, image, scale, start, end, mode), see `Control`, or a list of them; default:
        none."""

    controlnet: Controls | None


SHARED = {
    "width": None, "height": None, "steps": None, "guidance": None, "seed": 0, "num_images": 1,
    "negative_prompt": None, "true_cfg": 1.0, "sigmas": None, "sampler": "euler",
    "max_text_tokens": None, "output": "pil", "progress": True, "on_step": None, "on_finish": None,
    "ip_image": None, "ip_scale": 1.0, "negative_ip_image": None, "controlnet": None,
}
# Keywords of other libraries -> ours.
FOREIGN = {
    "num_inference_steps": "steps", "guidance_scale": "guidance", "true_cfg_scale": "true_cfg",
    "num_images_per_prompt": "num_images", "generator": "seed", "output_type": "output",
    "max_sequence_length": "max_text_tokens", "callback_on_step_end": "on_step",
    "mask_image": "mask", "ip_adapter_image": "ip_image", "control_mode": "controlnet",
    "controlnet_conditioning_scale": "controlnet", "padding_mask_crop": "mask_padding",
}


@dataclass(frozen=True)
class Defaults:
    """What a task's defaults are, and which models it is for."""

    steps: int
    guidance: float
    inputs: int = 1            # channels of an image token, in multiples of those of its latents
    models: str = "dev"


DEFAULTS = {
    "generate": Defaults(steps=28, guidance=3.5),
    "generate with a ControlNet": Defaults(steps=28, guidance=7.0),
    "image_to_image": Defaults(steps=28, guidance=7.0),
    "inpaint": Defaults(steps=28, guidance=7.0),
    "fill": Defaults(steps=50, guidance=30.0, inputs=6, models="fill"),
    "control": Defaults(steps=28, guidance=3.5, inputs=2, models="canny or depth"),
    "control of an image": Defaults(steps=28, guidance=7.0, inputs=2, models="canny or depth"),
    "redux": Defaults(steps=28, guidance=3.5),
    "kontext_edit": Defaults(steps=28, guidance=3.5, models="kontext"),
    "kontext_inpaint": Defaults(steps=28, guidance=3.5, models="kontext"),
}
DISTILLED_STEPS = 4        # of a model without guidance embedding (schnell)
MAX_STEPS = 1000
MAX_SEED = 2**64 - 1       # as far as PyTorch's generators go

Task = TypeVar("Task", bound=Callable)


def task(function: Task) -> Task:
    """Decorator of the tasks. The TypedDict in `**settings: Unpack[...]` names the shared keywords:
    they are listed in the task's signature and help, and any other is refused by name.

    A task runs without gradients."""
    own = inspect.signature(function)
    keywords, = get_args(own.parameters["settings"].annotation)
    parameters = [each for each in own.parameters.values() if each.name != "settings"]
    for name, kind in keywords.__annotations__.items():
        parameters.append(inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=SHARED[name], annotation=kind))
    names = {each.name for each in parameters}

    @wraps(function)
    @torch.no_grad()
    def checked(*inputs, **settings):
        for name in settings:
            if name not in names:
                near = FOREIGN.get(name) or next(iter(difflib.get_close_matches(name, names)), None)
                hint = f"did you mean {near!r}?" if near in names else "help() lists the keywords"
                raise TypeError(f"{function.__name__} has no keyword {name!r}: {hint}")
        return function(*inputs, **settings)

    checked.__signature__ = own.replace(parameters=parameters)
    checked.__doc__ = f"{inspect.cleandoc(function.__doc__)}\n\nShared keywords\n"
    for kind in (AdapterSettings, IPSettings, Settings):
        if set(kind.__annotations__) <= names:
            checked.__doc__ += f"\n{inspect.cleandoc(kind.__doc__)}"
    return checked


@dataclass(frozen=True)
class Call:
    """The settings of one call of a task, checked and completed."""

    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    num_images: int
    negative_prompt: PromptLike | None
    true_cfg: float
    sigmas: Sequence[float] | None
    sampler: str
    max_text_tokens: int | None
    output: str
    progress: bool
    on_step: OnStep | None
    on_finish: OnFinish | None
    strength: float
    controls: Sequence[Control]
    ip_images: IPImages | None

    @property
    def two_passes(self) -> bool:
        """Whether each step has a second, negative pass."""
        return self.true_cfg > 1 and self.negative_prompt is not None


def resolve(task: str, flux: Flux, settings: Settings, *, like: tuple[int, int] | None = None,
            strength: float = 1.0) -> Call:
    """Check the settings of a call and complete them.

    task: a key of DEFAULTS.
    settings: what the caller gave of Settings, IPSettings or AdapterSettings.
    like: (width, height) of an image whose shape the result has by default; without one it is a
        square of the model's size.
    strength: in (0, 1], the part of the steps that is run.

    Raises ValueError for a value out of range, and for a model that was not made for the task."""
    check_model(flux)
    given = SHARED | settings
    controls = read_controls(flux, given["controlnet"])
    if controls and task == "generate":
        task = "generate with a ControlNet"
        like = control_size(controls)
    check_channels(task, flux)
    check_output(flux, given["output"], given["on_finish"])
    check_function("on_step", given["on_step"])
    check_function("on_finish", given["on_finish"])
    if given["negative_prompt"] is not None:
        check_prompt("the negative prompt", given["negative_prompt"])
    if not isinstance(given["sampler"], str) or given["sampler"] not in SAMPLERS:
        names = ", ".join(SAMPLERS)
        raise ValueError(f"sampler is {quote(given['sampler'])}: expected one of {names}")
    sigmas = read_sigmas(given["sigmas"])
    guidance = DEFAULTS[task].guidance if given["guidance"] is None else given["guidance"]
    width, height = read_size(flux, given["width"], given["height"], like)
    return Call(
        width=width,
        height=height,
        steps=read_steps(task, flux, given["steps"], sigmas),
        guidance=check_number("guidance", guidance, 0, 1000),
        seed=check_number("seed", given["seed"], 0, MAX_SEED, whole=True),
        num_images=check_number("num_images", given["num_images"], 1, 1000, whole=True),
        negative_prompt=given["negative_prompt"],
        true_cfg=check_number("true_cfg", given["true_cfg"], 0, 1000),
        sigmas=sigmas,
        sampler=given["sampler"],
        max_text_tokens=given["max_text_tokens"],
        output=given["output"],
        progress=check_switch("progress", given["progress"]),
        on_step=given["on_step"],
        on_finish=given["on_finish"],
        strength=check_number("strength", strength, 0.001, 1),
        controls=controls,
        ip_images=read_ip_images(
            flux, given["ip_image"], given["ip_scale"], given["negative_ip_image"]),
    )


def check_model(flux: Flux) -> None:
    """Raises ValueError if the first argument of a task is no model."""
    if not isinstance(flux, Flux):
        raise ValueError(f"the first argument is a {type(flux).__name__}, {quote(flux)}: "
                         "expected a model, such as load() returns")


def check_channels(task: str, flux: Flux) -> None:
    """Raises ValueError if the transformer does not take what the task feeds it."""
    config = flux.mmdit.config
    need = DEFAULTS[task].inputs * config.out_channels
    if config.in_channels != need:
        raise ValueError(f"{task.split()[0]} needs a transformer with {need} input channels, as "
                         f"that of the model {DEFAULTS[task].models}; that of {flux.config.name} "
                         f"has {config.in_channels}")


def check_output(flux: Flux, output: str, on_finish: OnFinish | None) -> None:
    """Raises ValueError for an unknown output, and for images that no autoencoder could decode."""
    if not isinstance(output, str) or output not in OUTPUTS:
        raise ValueError(f"output is {quote(output)}: expected one of {', '.join(OUTPUTS)}")
    if output == "latents" and on_finish is not None:
        raise ValueError('on_finish is given images, and output="latents" asks for none: leave one '
                         "of them out")
    if output != "latents":
        # Note: before the first step, or the finished latents would be lost.
        check_autoencoder(flux)


def read_steps(task: str, flux: Flux, steps: int | None, sigmas: Sequence[float] | None) -> int:
    """The number of steps: as given, else that of the sigmas, else the task's default."""
    if sigmas is not None:
        if steps not in (None, len(sigmas)):
            raise ValueError(f"steps is {quote(steps)}, but there are {len(sigmas)} sigmas: give "
                             "one of them")
        return len(sigmas)
    if steps is None:
        guided = flux.mmdit.config.guidance_embed
        steps = DEFAULTS[task].steps if guided else DISTILLED_STEPS
    return check_number("steps", steps, 1, MAX_STEPS, whole=True)


def read_sigmas(sigmas: Sequence[float] | None) -> list[float] | None:
    """Falling times in (0, 1], from a list, an array or a tensor of them."""
    if sigmas is None:
        return None
    is_list = isinstance(sigmas, Sequence) and not isinstance(sigmas, (str, bytes))
    is_array = len(getattr(sigmas, "shape", ())) == 1
    if not (is_list or is_array) or not 1 <= len(sigmas) <= MAX_STEPS:
        raise ValueError(f"sigmas are {quote(sigmas)}: expected 1 to {MAX_STEPS} falling numbers "
                         "in (0, 1]")
    times = [check_number("each of the sigmas", sigma, 0, 1) for sigma in sigmas]
    if any(a <= b for a, b in zip(times, [*times[1:], 0])):
        raise ValueError(f"sigmas are {quote(sigmas)}: expected falling numbers in (0, 1]")
    return times


def read_size(flux: Flux, width: int | None, height: int | None,
              like: tuple[int, int] | None) -> tuple[int, int]:
    """The (width, height) of the result, rounded down to multiples of 16."""
    width = None if width is None else check_side("width", width)
    height = None if height is None else check_side("height", height)
    size = flux.config.size
    if like is not None:
        width, height = natural_size(like, size ** 2, width, height)
    return round_size(size if width is None else width, size if height is None else height)


def adapter_conditions(flux: Flux, call: Call, text: Prompt, ts: Sequence[float],
                       cond: Conditions) -> Conditions:
    """The conditions, with those that ControlNets and IP-Adapters of this call add."""
    if call.controls:
        residuals = residuals_of(
            flux, call.controls, text, ts, call.width, call.height, call.guidance)
        cond = replace(cond, residuals=once_a_state(residuals) if call.two_passes else residuals)
    ip = call.ip_images
    if ip is not None:
        cond = replace(cond, image_kv=image_keys_values(flux, ip.wanted, ip.scales))
        if call.two_passes:
            kv = image_keys_values(flux, ip.unwanted, ip.scales)
            cond = replace(cond, negative_image_kv=kv)
    return cond
