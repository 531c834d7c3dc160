"""The velocities that training compares, all of them `sampling.flow` on latents (B, 16, 16, 16).

    velocity              of a transformer, for encoded prompts
    without_guidance      of a variant, less what guidance changes in the base model
    noise_and_times       a random point of the flow for each image
    draw_guidance         a random guidance for each image
"""

import torch
from torch import Tensor

from ...networks.mmdit import MMDiT
from ...sampling import Conditions, Velocity, flow, logit_normal_times
from ..world.grounds import IMAGE_SIZE

LATENT_SIZE = IMAGE_SIZE // 8            # width and height of the latents
MAX_GUIDANCE = 8.0


def velocity(mmdit: MMDiT, txt: Tensor, pooled: Tensor, guidance: float | Tensor,
             cond: Conditions = Conditions()) -> Velocity:
    """The transformer's velocity for txt (B, L, ·) and pooled (B, ·)."""
    # Note: float32, or `flow` would round the times to bfloat16 under autocast.
    return flow(mmdit, txt.float(), pooled.float(), guidance, LATENT_SIZE, LATENT_SIZE, cond)


def without_guidance(variant: Velocity, base: MMDiT, txt: Tensor, pooled: Tensor, guidance: Tensor
                     ) -> Velocity:
    """v - (v_base(w) - v_base(1)): the velocity of a variant that is given guidance w, less what w
    changes in the base model for the same prompt.

    Learnt from true images, a velocity has guidance 1. So this difference is what they teach, and
    the variant keeps the base model's guidance."""
    guided, plain = (velocity(base, txt, pooled, w) for w in (guidance, torch.ones_like(guidance)))

    def difference(x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            change = guided(x, t).float() - plain(x, t).float()
        return variant(x, t).float() - change                                   # (B, 16, h, w)

    return difference


def noise_and_times(z: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise (B, 16, h, w) and times (B,) for latents z."""
    eps = torch.randn(z.shape, generator=generator).to(z.device)
    return eps, logit_normal_times(len(z), generator).to(z.device)


def draw_guidance(n: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """n numbers, uniform in [1, MAX_GUIDANCE]: (n,)."""
    return (1 + (MAX_GUIDANCE - 1) * torch.rand(n, generator=generator)).to(device)
