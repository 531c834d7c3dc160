"""The algorithm of FLUX.1: from noise to latents, along a straight flow.

    x(1) = eps (noise),     dx/dt = v(x, t),     x(0) = z (the image's latents)

    noise                   the start of an image, from its seed
    schedule                the times from 1 to 0
    patchify, image_ids     latents -> tokens with positions, and back
    flow                    the velocity of a model for a prompt and its conditions
    classifier_free, ...    velocity -> velocity
    euler, heun             the samplers: x = x + (t_next - t) · v(x, t)
    flow_matching_loss      what a model is trained with: the same velocity

The state x is an image's latents (B, 16, h, w); tokens exist only inside a velocity. A variant of
FLUX is another velocity or another start, never another loop. Rectified flow: Liu et al. 2022
(arXiv:2209.03003), Esser et al. 2024 (arXiv:2403.03206). Reference: `src/flux/sampling.py` of the
original repository.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index

import torch
from torch import Tensor
from tqdm import tqdm

from .flux import Schedule
from .networks.mmdit import CallMemory, KeysValues, MMDiT, MMDiTInputs
from .spacing import respaced

Velocity = Callable[[Tensor, float], Tensor]         # (x, t) -> dx/dt, both (B, 16, h, w)
Residuals = Callable[[Tensor, float], Sequence[Tensor | None]]  # (x, t) -> one a block
OnStep = Callable[[int, float, Tensor], None]        # (step, t, x)
OnFinish = Callable[[Tensor], Tensor | None]         # images (B, 3, H, W) in [0, 1] -> images


def noise(seeds: Iterable[int], h: int, w: int, channels: int = 16,
          dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal noise, one latent image a seed: (B, channels, h, w).

    Drawn on the CPU, one generator an image, so that a seed gives the same image on every device
    and in every batch."""
    shape = (1, channels, h, w)
    generators = [torch.Generator("cpu").manual_seed(index(seed)) for seed in seeds]
    return torch.cat([torch.randn(shape, generator=each, dtype=dtype) for each in generators])


def seeds_from(seed: int, count: int) -> list[int]:
    """The seeds of `count` images: seed, seed + 1, ...; after 2^64 - 1, PyTorch's last, comes 0."""
    return [(seed + i) % 2**64 for i in range(count)]


# --------------------------------------------------------------------------------------- tokens


def patchify(z: Tensor) -> Tensor:
    """Pattern "B C (h 2) (w 2) -> B (h w) (C 2 2)": each 2x2 patch of latents becomes one token.

    Note: the channel varies slowest within a token, then the row, then the column."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2)                               # (B, C, h/2, 2, w/2, 2)
    z = z.permute(0, 2, 4, 1, 3, 5)                                         # (B, h/2, w/2, C, 2, 2)
    return z.reshape(b, h // 2 * (w // 2), 4 * c)                           # (B, N, 4·C)


def unpatchify(tokens: Tensor, h: int, w: int) -> Tensor:
    """The inverse of `patchify`: (B, N, 4·C) -> (B, C, h, w)."""
    b, _, c = tokens.shape
    z = tokens.reshape(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, c // 4, h, w)                                           # (B, C, h, w)


def image_ids(h: int, w: int, index: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Positions (index, row, column) of the tokens of h x w latent pixels: (N, 3) integers."""
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    ids = torch.stack([torch.full_like(rows, index), rows, columns], dim=-1)    # (h/2, w/2, 3)
    return ids.reshape(-1, 3).to(device)


def text_ids(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Text tokens have no position: (L, 3) zeros."""
    return torch.zeros(length, 3, dtype=torch.int64, device=device)


# ----------------------------------------------------------------------------------------- time


def schedule(steps: int, tokens: int, settings: Schedule = Schedule(), *,
             sigmas: Sequence[float] | None = None, strength: float = 1.0) -> list[float]:
    """The times 1 = t_0 > t_1 > ... > t_steps = 0.

    steps: how many.
    tokens: image tokens N, on which the shift may depend.
    settings: how the times are spaced; default: as those of FLUX.1-dev.
    sigmas: times before the shift, in place of the even ones; as many as steps.
    strength: in (0, 1], the part of the steps that is kept, the last ones, to start from an image
        and not from noise (Meng et al. 2021, arXiv:2108.01073).

    >>> schedule(4, 4096, Schedule(use_dynamic_shifting=False))
    [1.0, 0.75, 0.5, 0.25, 0.0]
    >>> [round(t, 6) for t in schedule(4, 4096)]
    [1.0, 0.904531, 0.759511, 0.512844, 0.0]
    >>> schedule(4, 4096, Schedule(use_dynamic_shifting=False), strength=0.5)
    [0.5, 0.25, 0.0]
    """
    ts = [1 - i / steps for i in range(steps)] if sigmas is None else [float(s) for s in sigmas]
    s = shift_of(tokens, settings)
    ts = [s * t / (1 + (s - 1) * t) for t in ts]
    if settings.shift_terminal and ts[-1] < 1:
        stretch = (1 - settings.shift_terminal) / (1 - ts[-1])
        ts = [1 - (1 - t) * stretch for t in ts]
    if settings.spacing != "even":
        ts = respaced(ts, settings.spacing)
    # Note: a begun step counts: 0.6 of 28 steps are 17. In this order, as the references round.
    return [*ts, 0.0][int(len(ts) - len(ts) * strength):]


def shift_of(tokens: int, settings: Schedule) -> float:
    """The factor by which the odds t / (1 - t) of every time are multiplied.

    Larger images need more of their time at high noise: with a dynamic shift it is e^mu, where mu
    rises linearly with the image tokens, from base_shift to max_shift (dev: 0.5 at 256, 1.15 at
    4096)."""
    if not settings.use_dynamic_shifting:
        return settings.shift
    span = settings.max_image_seq_len - settings.base_image_seq_len
    slope = (settings.max_shift - settings.base_shift) / span
    mu = settings.base_shift + slope * (tokens - settings.base_image_seq_len)
    return math.exp(mu) if settings.time_shift_type == "exponential" else mu


# ------------------------------------------------------------------------------------ velocities


def repeat_to_batch(given: Tensor | None, x: Tensor) -> Tensor | None:
    """Repeat n inputs to the batch size, a, b -> a, a, b, b, on the device of x; n divides it."""
    if given is None:
        return None
    if len(x) % len(given):
        raise ValueError(f"{len(given)} images are given for {len(x)} to paint: give one, or one "
                         "for each prompt")
    return given.to(x.device).repeat_interleave(len(x) // len(given), dim=0)


@dataclass(frozen=True)
class Conditions:
    """What enters the transformer besides the prompt and the state; by default nothing.

    img_cond: (n, N, C), further channels of each image token (fill, control).
    img_cond_seq: (n, M, 64), further image tokens, which are attended to but not painted (kontext).
    img_cond_seq_ids: (M, 3), their positions.
    residuals: (x, t) -> what is added to the image tokens after each block (ControlNet).
    image_kv: for each double block, keys and values that its image tokens attend to as well
        (IP-Adapter).
    negative_image_kv: the same for the negative pass of true classifier-free guidance.

    n is 1 or divides the batch size B."""

    img_cond: Tensor | None = None
    img_cond_seq: Tensor | None = None
    img_cond_seq_ids: Tensor | None = None
    residuals: Residuals | None = None
    image_kv: Sequence[KeysValues] | None = None
    negative_image_kv: Sequence[KeysValues] | None = None

    def repeat_to_batch(self, x: Tensor) -> "Conditions":
        return replace(self, img_cond=repeat_to_batch(self.img_cond, x),
                       img_cond_seq=repeat_to_batch(self.img_cond_seq, x))

    def negative(self) -> "Conditions":
        return replace(self, image_kv=self.negative_image_kv)


def flow(mmdit: MMDiT, txt: Tensor, pooled: Tensor, guidance: float | Tensor, h: int, w: int,
         cond: Conditions = Conditions()) -> Velocity:
    """The velocity of a model for encoded prompts.

    txt: (B, L, context_in_dim), from T5. pooled: (B, vec_in_dim), from CLIP, or what
        `mmdit.prepare` makes of it.
    guidance: a number or (B,); acts where the model has an embedding for it.
    h, w: size of the latents.
    cond: what else enters the transformer.

    Returns velocity(x, t) -> (B, 16, h, w), for x (B, 16, h, w) and t a number or (B,)."""
    batch = len(txt)
    txt_ids = text_ids(txt.shape[1], txt.device)                                # (L, 3)
    img_ids = image_ids(h, w, device=txt.device)                                # (N, 3)
    N = len(img_ids)
    if cond.img_cond_seq is not None:
        img_ids = torch.cat([img_ids, cond.img_cond_seq_ids.to(img_ids)])       # (N+M, 3)

    def to_batch(value: float | Tensor) -> Tensor:
        # Note: time and guidance are rounded to the model's dtype, as in the original.
        if isinstance(value, Tensor):
            return value.to(txt).expand(batch)                                  # (B,)
        return torch.full((batch,), value, dtype=txt.dtype, device=txt.device)  # (B,)

    guidance_vec = to_batch(guidance) if mmdit.config.guidance_embed else None  # (B,)
    memory = CallMemory()

    def velocity(x: Tensor, t: float | Tensor) -> Tensor:
        img = patchify(x.to(txt.dtype))                                         # (B, N, 64)
        if cond.img_cond is not None:
            img = torch.cat([img, cond.img_cond.to(img)], dim=-1)           # (B, N, in_channels)
        if cond.img_cond_seq is not None:
            img = torch.cat([img, cond.img_cond_seq.to(img)], dim=1)            # (B, N+M, 64)
        residuals = None if cond.residuals is None else cond.residuals(x, t)
        v = mmdit(MMDiTInputs(
            img, txt, pooled, to_batch(t), guidance_vec, img_ids, txt_ids, residuals, cond.image_kv,
            time=None if isinstance(t, Tensor) else t, memory=memory))
        return unpatchify(v[:, :N], h, w)                                       # (B, 16, h, w)

    return velocity


def once_a_state(residuals: Residuals) -> Residuals:
    """The same, computed once where both passes of classifier-free guidance ask for one state."""
    last = None

    def remembered(x: Tensor, t: float) -> Sequence[Tensor | None]:
        nonlocal last
        if last is None or last[0] is not x or last[1] != t:
            last = x, t, residuals(x, t)
        return last[2]

    return remembered


def classifier_free(velocity: Velocity, negative: Velocity, scale: float | Tensor) -> Velocity:
    """True classifier-free guidance, two passes a step: v_neg + scale · (v - v_neg).

    scale: a number, or one for each image (B,). Ho & Salimans 2022 (arXiv:2207.12598)."""
    def guided(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t)
        v_neg = negative(x, t)
        return v_neg + per_image(scale, v) * (v - v_neg)

    return guided


def keep_known(velocity: Velocity, mask: Tensor, line: Tensor) -> Velocity:
    """Inpainting: where the mask is false, x follows the straight line that ends at z.

    mask: (1 or B, 1, h, w). line: eps - z (B, 16, h, w), the velocity of that line.

    On it x(t) = t · eps + (1 - t) · z at every t: the same as writing the noised image over x after
    each step, as RePaint does (Lugmayr et al. 2022, arXiv:2201.09865)."""
    return lambda x, t: torch.where(mask, velocity(x, t), line)


# -------------------------------------------------------------------------------------- samplers


def euler(velocity: Velocity, x: Tensor, ts: Sequence[float], on_step: OnStep | None = None,
          progress: bool = False) -> Tensor:
    """Integrate dx/dt = velocity(x, t) along the times `ts`: one pass a step, first order.

    x: (B, 16, h, w), kept in float32, whatever the velocity's dtype.
    on_step: on_step(step, t, x) is called before each step, with its number from 0.
    progress: show a bar on stderr, if that is a terminal."""
    x = x.float()
    for step, (t, t_next) in enumerate(bar(list(zip(ts, ts[1:])), progress)):
        if on_step is not None:
            on_step(step, t, x)
        x = x + (t_next - t) * velocity(x, t).float()
    return x


def heun(velocity: Velocity, x: Tensor, ts: Sequence[float], on_step: OnStep | None = None,
         progress: bool = False) -> Tensor:
    """Heun's method: each step takes the mean of the velocities at its two ends, second order.

    Two passes a step, but for the last: at t = 0 there is nothing left to predict. Parameters as in
    `euler`. Reference: diffusers' `FlowMatchHeunDiscreteScheduler`."""
    x = x.float()
    for step, (t, t_next) in enumerate(bar(list(zip(ts, ts[1:])), progress)):
        if on_step is not None:
            on_step(step, t, x)
        v = velocity(x, t).float()
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next).float()) / 2
        x = x + (t_next - t) * v
    return x


SAMPLERS = {"euler": euler, "heun": heun}


def bar(steps: list, progress: bool) -> Iterable:
    """The steps, with a progress bar where it is wanted and stderr can show one."""
    return tqdm(steps, disable=not (progress and is_terminal(sys.stderr)), leave=False)


def is_terminal(stream) -> bool:
    """Whether a bar can be shown there.

    Note: windowed programs have no stderr (None), and others close it."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


# -------------------------------------------------------------------------------------- training


def per_image(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is; one for each image (B,) as (B, 1, 1, 1), with as many axes as x."""
    return value.to(x.device).view(-1, *(x.ndim - 1) * [1]) if isinstance(value, Tensor) else value


def interpolate(z: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """x(t) = (1 - t) · z + t · eps, on the straight line from latents to noise.

    z, eps: (B, 16, h, w), or any other shape that begins with B. t: in [0, 1], a number or one for
    each image (B,)."""
    t = per_image(t, z)
    return (1 - t) * z + t * eps


def logit_normal_times(n: int, generator: torch.Generator) -> Tensor:
    """n times in (0, 1): the sigmoid of a standard normal number, so that the middle of the flow,
    where the velocity is hardest to predict, comes most often (arXiv:2403.03206, section 3.1)."""
    return torch.sigmoid(torch.randn(n, generator=generator))


def flow_matching_loss(velocity: Velocity, z: Tensor, eps: Tensor, t: Tensor,
                       weight: Tensor | None = None) -> Tensor:
    """mean (v(x_t, t) - (eps - z))², as dx/dt = eps - z on the line (arXiv:2210.02747).

    z, eps: (B, 16, h, w). t: (B,). weight: of each latent pixel (B, 1, h, w), 1 on average."""
    v = velocity(interpolate(z, eps, t), t)                                     # (B, 16, h, w)
    error = (v.float() - (eps - z)).square()
    return (error if weight is None else weight * error).mean()


def distillation_loss(student: Velocity, teacher: Velocity, z: Tensor, eps: Tensor, t: Tensor
                      ) -> Tensor:
    """mean (v_student(x_t, t) - v_teacher(x_t, t))²; the teacher does not learn.

    With the teacher `classifier_free(velocity, negative, w)`, and a student that is given w as its
    guidance, one pass learns to do what took two: guidance distillation (Meng et al. 2022,
    arXiv:2210.03142), which makes a FLUX "dev"."""
    x = interpolate(z, eps, t)
    with torch.no_grad():
        target = teacher(x, t).float()                                          # (B, 16, h, w)
    return (student(x, t).float() - target).square().mean()
