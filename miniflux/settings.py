"""What a call leaves open, and what it may not ask for: the defaults of every task in one table, and the checks.

The numbers are those of the reference implementations: diffusers' `__call__` of each pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .checks import check_function, check_number, check_switch, quote
from .flux import Flux
from .images import OUTPUTS, check_side, natural_size, round_size
from .latents import check_autoencoder
from .prompt import Text, check_prompt
from .sampling import OnFinish, OnStep


@dataclass(frozen=True)
class Defaults:
    steps: int
    guidance: float
    inputs: int = 1            # what a token of the task's transformer carries, in multiples of a token of latents
    models: str = "dev"


DEFAULTS = {
    "generate": Defaults(steps=28, guidance=3.5),
    "generate with a ControlNet": Defaults(steps=28, guidance=7.0),
    "image_to_image": Defaults(steps=28, guidance=7.0),
    "inpaint": Defaults(steps=28, guidance=7.0),
    "fill": Defaults(steps=50, guidance=30.0, inputs=6, models="fill"),
    "control": Defaults(steps=28, guidance=3.5, inputs=2, models="canny or depth"),
    "control of a picture": Defaults(steps=28, guidance=7.0, inputs=2, models="canny or depth"),
    "redux": Defaults(steps=28, guidance=3.5),
    "kontext_edit": Defaults(steps=28, guidance=3.5, models="kontext"),
    "kontext_inpaint": Defaults(steps=28, guidance=3.5, models="kontext"),
}
DISTILLED_STEPS = 4        # of a model that was distilled to need few (schnell)
MAX_STEPS = 1000
MAX_SEED = 2**64 - 1       # as far as PyTorch's generators go


@dataclass(frozen=True)
class Call:
    """The keywords that all tasks share, checked and completed."""

    width: int
    height: int
    steps: int
    guidance: float
    seed: int
    num_images: int
    negative_prompt: Text | None
    true_cfg: float
    sigmas: Sequence[float] | None
    max_text_tokens: int | None
    output: str
    progress: bool
    on_step: OnStep | None
    on_finish: OnFinish | None
    strength: float = 1.0


def resolve(task: str, flux: Flux, width: int | None, height: int | None, steps: int | None, guidance: float | None, seed: int,
            num_images: int, negative_prompt: Text | None, true_cfg: float, sigmas: Sequence[float] | None,
            max_text_tokens: int | None, output: str, progress: bool, on_step: OnStep | None, on_finish: OnFinish | None, *,
            like: tuple[int, int] | None = None, strength: float = 1.0) -> Call:
    """Checks the keywords that all tasks share and fills in what is None.

    like: the (width, height) of a picture whose shape the result has by default; without, it is a square of the model's size.
    Raises ValueError for a value out of range, and for a model that is not made for the task."""
    check_model(flux)
    config, defaults = flux.mmdit.config, DEFAULTS[task]
    if config.in_channels != defaults.inputs * config.out_channels:
        need = defaults.inputs * config.out_channels
        raise ValueError(f"{task.split()[0]} needs a transformer with {need} input channels, as that of the model {defaults.models}; "
                         f"that of {flux.config.name} has {config.in_channels}")
    if sigmas is not None:
        sigmas = read_sigmas(sigmas)
        if steps not in (None, len(sigmas)):
            raise ValueError(f"steps is {quote(steps)}, but there are {len(sigmas)} sigmas: give one of them")
        steps = len(sigmas)
    if steps is None:
        steps = DISTILLED_STEPS if flux.config.few_steps else defaults.steps
    steps = check_number("steps", steps, 1, MAX_STEPS, whole=True)
    guidance = check_number("guidance", defaults.guidance if guidance is None else guidance, 0, 1000)
    num_images = check_number("num_images", num_images, 1, 1000, whole=True)
    seed = check_number("seed", seed, 0, MAX_SEED, whole=True)
    true_cfg = check_number("true_cfg", true_cfg, 0, 1000)
    strength = check_number("strength", strength, 0.001, 1)
    progress = check_switch("progress", progress)
    check_function("on_step", on_step)
    check_function("on_finish", on_finish)
    if negative_prompt is not None:
        check_prompt("the negative prompt", negative_prompt)
    if not isinstance(output, str) or output not in OUTPUTS:
        raise ValueError(f"output is {quote(output)}: expected one of {', '.join(OUTPUTS)}")
    if output == "latents" and on_finish is not None:
        raise ValueError('on_finish looks at pictures, and output="latents" asks for none: leave one of them out')
    if output != "latents":
        # Note: checked before the first step, or the finished latents would be thrown away.
        check_autoencoder(flux)
    width = None if width is None else check_side("width", width)
    height = None if height is None else check_side("height", height)
    size = flux.config.size
    if like is not None:
        width, height = natural_size(like, size ** 2, width, height)
    width, height = round_size(size if width is None else width, size if height is None else height)
    return Call(width, height, steps, guidance, seed, num_images, negative_prompt, true_cfg,
                sigmas, max_text_tokens, output, progress, on_step, on_finish, strength)


def read_sigmas(sigmas: Sequence[float]) -> list[float]:
    """Falling times in (0, 1], from a list, an array or a tensor of them."""
    is_array = len(getattr(sigmas, "shape", ())) == 1
    if not (is_array or isinstance(sigmas, Sequence) and not isinstance(sigmas, (str, bytes))) or not 1 <= len(sigmas) <= MAX_STEPS:
        raise ValueError(f"sigmas are {quote(sigmas)}: expected 1 to {MAX_STEPS} falling numbers in (0, 1]")
    times = [check_number("each of the sigmas", sigma, 0, 1) for sigma in sigmas]
    if any(a <= b for a, b in zip(times, [*times[1:], 0])):
        raise ValueError(f"sigmas are {quote(sigmas)}: expected falling numbers in (0, 1]")
    return times


def check_model(flux: Flux) -> None:
    """Raises ValueError if the first argument of a task is no model."""
    if not isinstance(flux, Flux):
        raise ValueError(f"the first argument is a {type(flux).__name__}, {quote(flux)}: expected a model, such as load() returns")
