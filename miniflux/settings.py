"""What a call leaves open, and what it may not ask for: the defaults of every task in one table, and the checks.

The numbers are those of the reference implementations: diffusers' `__call__` of each pipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from .flux import Flux
from .images import OUTPUTS, check_number, round_size, to_pil


@dataclass(frozen=True)
class Defaults:
    steps: int
    guidance: float


DEFAULTS = {
    "generate": Defaults(steps=28, guidance=3.5),
}
DISTILLED_STEPS = 4        # of a model without guidance embedding (schnell)
MAX_STEPS = 1000


def resolve(task: str, flux: Flux, width: int | None, height: int | None, steps: int | None, guidance: float | None, seed: int,
            num_images: int, true_cfg: float, sigmas: Sequence[float] | None, output: str) -> tuple[int, float | None, int, int]:
    """Checks the keywords that all tasks share and fills in what is None: (steps, guidance, width, height).

    Guidance is None for a model without guidance embedding. Raises ValueError for a value out of range."""
    guided, defaults = flux.mmdit.config.guidance_embed, DEFAULTS[task]
    if sigmas is not None:
        if not isinstance(sigmas, Sequence) or isinstance(sigmas, str) or not 1 <= len(sigmas) <= MAX_STEPS:
            raise ValueError(f"sigmas are {sigmas!r:.60}: expected 1 to {MAX_STEPS} falling numbers in (0, 1]")
        for sigma in sigmas:
            check_number("each of the sigmas", sigma, 0, 1)
        if any(a <= b for a, b in zip(sigmas, [*sigmas[1:], 0])):
            raise ValueError(f"sigmas are {list(sigmas)!r:.60}: expected falling numbers in (0, 1]")
        if steps not in (None, len(sigmas)):
            raise ValueError(f"steps is {steps!r}, but there are {len(sigmas)} sigmas: give one of them")
        steps = len(sigmas)
    if steps is None:
        steps = defaults.steps if guided else DISTILLED_STEPS
    check_number("steps", steps, 1, MAX_STEPS, whole=True)
    if guidance is None:
        guidance = defaults.guidance
    check_number("guidance", guidance, 0, 1000)
    check_number("num_images", num_images, 1, 1000, whole=True)
    check_number("seed", seed, 0, 2**63 - 1_000_000, whole=True)
    check_number("true_cfg", true_cfg, 0, 1000)
    if output not in OUTPUTS:
        raise ValueError(f"output is {output!r}: expected one of {', '.join(OUTPUTS)}")
    size = flux.config.size
    width, height = round_size(size if width is None else width, size if height is None else height)
    return steps, guidance if guided else None, width, height


def finish(flux: Flux, z: Tensor, output: str) -> list[Image.Image] | Tensor:
    """Latents (B, 16, h, w) -> what the caller asked for."""
    if output == "latents":
        return z
    if flux.autoencoder is None:
        raise ValueError('this model was loaded without an autoencoder: ask for output="latents", or add vae/ to its folder')
    pictures = flux.autoencoder.decode(z.to(next(flux.autoencoder.parameters()))).float()
    pictures = (pictures / 2 + 0.5).clamp(0, 1)                                 # (B, 3, H, W)
    return pictures if output == "tensor" else to_pil(pictures)
