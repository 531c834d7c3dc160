"""The algorithm of FLUX.1: from noise to latents, along a straight flow.

    x(1) = noise,     dx/dt = v(x, t),     x(0) = the picture's latents

    noise         starts a picture from its seed            schedule    the times from 1 to 0
    patchify      latents -> tokens, and back               euler       the one loop: x = x + (t_next - t) · v(x, t)
    image_ids     where each token lies                     flow        the velocity of a model for a prompt

The state x is a picture's latents (B, 16, h, w); tokens exist only inside a velocity. A variant of FLUX is another velocity or
another start, never another loop. Rectified flow: Liu et al. 2022
(arXiv:2209.03003), Esser et al. 2024 (arXiv:2403.03206). Reference: `src/flux/sampling.py` of the original repository.
"""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from operator import index

import torch
from torch import Tensor
from tqdm import tqdm

from .flux import Schedule
from .networks.mmdit import KeysValues, MMDiT

Velocity = Callable[..., Tensor]                     # (x, t) -> dx/dt, as latents (B, 16, h, w)
OnStep = Callable[[int, float, Tensor], None]        # (step, t, x)
OnFinish = Callable[[Tensor], Tensor]                # pictures (B, 3, H, W) in [0, 1] -> what is returned of them


def noise(seeds: Iterable[int], height: int, width: int, channels: int = 16, dtype: torch.dtype = torch.float32) -> Tensor:
    """One latent picture of standard normal noise a seed: (B, channels, height, width), sizes in latent pixels.

    Drawn on the CPU, one generator a picture, so that a seed gives the same picture on every device and in every batch."""
    shape = (1, channels, height, width)
    generators = [torch.Generator("cpu").manual_seed(index(seed)) for seed in seeds]
    return torch.cat([torch.randn(shape, generator=generator, dtype=dtype) for generator in generators])


def seeds_from(seed: int, count: int) -> list[int]:
    """The seed of each of `count` pictures: seed, seed + 1, ...; after 2^64 - 1, the last that PyTorch takes, comes 0."""
    return [(seed + i) % 2**64 for i in range(count)]


def patchify(z: Tensor) -> Tensor:
    """Pattern "B C (h 2) (w 2) -> B (h w) (C 2 2)": each 2x2 patch of latents becomes one token.

    Note: the channel varies slowest within a token, then the row, then the column."""
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)         # (B, h/2, w/2, C, 2, 2)
    return z.reshape(b, h // 2 * (w // 2), 4 * c)                               # (B, N, 4·C)


def unpatchify(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `patchify`: (B, N, 4·C) -> (B, C, height, width) in latent pixels."""
    b, _, c = tokens.shape
    z = tokens.reshape(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(b, c // 4, height, width)                                  # (B, C, height, width)


def image_ids(height: int, width: int, index: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Positions (index, row, column) of the tokens of a picture of height x width latent pixels: (N, 3) integers."""
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    return torch.stack([torch.full_like(rows, index), rows, columns], dim=-1).reshape(-1, 3).to(device)


def text_ids(length: int, device: torch.device | str = "cpu") -> Tensor:
    """Text tokens have no position: (L, 3) zeros."""
    return torch.zeros(length, 3, dtype=torch.int64, device=device)


def schedule(steps: int, tokens: int, settings: Schedule = Schedule(), *,
             sigmas: Sequence[float] | None = None, strength: float = 1.0) -> list[float]:
    """The times 1 = t_0 > t_1 > ... > t_steps = 0.

    steps: how many. tokens: image tokens (N), where the shift depends on them.
    settings: how the times are spaced, by default as FLUX.1-dev's.
    sigmas: times before the shift, in the place of the even ones; as many as steps.
    strength: only the last so large part of the steps is kept, to start from an image and not from
    noise (Meng et al. 2021, arXiv:2108.01073).

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


def respaced(ts: list[float], spacing: str) -> list[float]:
    """As many times, with the first and the last of these, spaced in another way.

    karras: evenly in t^(1/7) (Karras et al. 2022, arXiv:2206.00364). exponential: evenly in log t.
    beta: at the quantiles of a Beta(0.6, 0.6) distribution (Lee et al. 2024, arXiv:2407.12173)."""
    first, last = ts[0], ts[-1]
    ramp = [i / max(len(ts) - 1, 1) for i in range(len(ts))]
    if spacing == "karras":
        a, b = first ** (1 / 7), last ** (1 / 7)
        return [(a + (b - a) * u) ** 7 for u in ramp]
    if spacing == "exponential":
        return [first * (last / first) ** u for u in ramp]
    return [last + beta_quantile(1 - u) * (first - last) for u in ramp]


def beta_quantile(p: float, a: float = 0.6) -> float:
    """The x that a Beta(a, a) variable stays below with probability p, by bisection."""
    if p > 0.5:
        return 1 - beta_quantile(1 - p, a)                                      # it is symmetric

    def area(x: float) -> float:
        """The integral of (u - u^2)^(a - 1) from 0 to x <= 1/2, by its power series."""
        total, term = 0.0, x ** a
        for n in range(60):
            total += term / (a + n)
            term *= (n + 1 - a) / (n + 1) * x
        return total

    low, high, goal = 0.0, 0.5, 2 * p * area(0.5)
    for _ in range(60):
        middle = (low + high) / 2
        if area(middle) < goal:
            low = middle
        else:
            high = middle
    return low


def flow(mmdit: MMDiT, txt: Tensor, vec: Tensor, guidance: float | Tensor, height: int, width: int, beside: Tensor | None = None,
         after: tuple[Tensor, Tensor] | None = None, image_kv: Sequence[KeysValues] | None = None) -> Velocity:
    """The model's velocity for encoded prompts txt (B, L, ·), vec (B, ·) and latents of height x width latent pixels; the guidance
    counts where the model has an embedding for it. It takes residuals as a third argument, which are handed to the model.

    beside: further channels of each image token, (B, N, ·): what a model is told about every place (fill, control).
    after: further tokens (B, M, ·) with their positions (M, 3), which are seen but not painted (kontext).
    image_kv: keys and values of pictures that the image tokens look at in each double block (IP-Adapter)."""
    def per_picture(value: float | Tensor) -> Tensor:
        # Note: time and guidance are rounded to the model's dtype, as in the original.
        return torch.as_tensor(value, dtype=txt.dtype, device=txt.device).expand(len(vec))

    txt_ids, img_ids = text_ids(txt.shape[1], txt.device), image_ids(height, width, device=txt.device)
    strictness, count = per_picture(guidance) if mmdit.config.guidance_embed else None, len(img_ids)
    if after is not None:
        img_ids = torch.cat([img_ids, after[1].to(img_ids)])                    # (N+M, 3)

    def velocity(x: Tensor, t: float | Tensor, residuals: Sequence[Tensor | None] | None = None) -> Tensor:
        img = patchify(x.to(txt.dtype))                                         # (B, N, 64)
        if beside is not None:
            img = torch.cat([img, beside.to(img)], dim=-1)                      # (B, N, in_channels)
        if after is not None:
            img = torch.cat([img, after[0].to(img)], dim=1)                     # (B, N+M, 64)
        v = mmdit(img, txt, vec, per_picture(t), strictness, img_ids, txt_ids, residuals, image_kv)
        return unpatchify(v[:, :count], height, width)                          # (B, 16, height, width)

    return velocity


def classifier_free(velocity: Velocity, unwanted: Velocity, scale: float | Tensor) -> Velocity:
    """True classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598): away from `unwanted`, two passes a step.

    scale: a number, or one for each picture (B,)."""
    def guided(x: Tensor, t: float, *residuals) -> Tensor:
        v = velocity(x, t, *residuals)
        v_unwanted = unwanted(x, t, *residuals)
        return v_unwanted + per_image(scale, v) * (v - v_unwanted)

    return guided


def steer(velocity: Velocity, residuals: Callable[[Tensor, float], Sequence[Tensor | None]]) -> Velocity:
    """ControlNet: what is to be added within the model is found once a step, and given to each of its passes."""
    return lambda x, t: velocity(x, t, residuals(x, t))


def keep(velocity: Velocity, mask: Tensor, line: Tensor) -> Velocity:
    """Inpainting: where the mask (1 or B, 1, h, w) is false, x runs straight along `line` = noise - z, and so arrives at z.

    On that line x(t) = t · noise + (1 - t) · z at every t: the same as painting over x with the noised picture after each
    step, as RePaint does (Lugmayr et al. 2022, arXiv:2201.09865)."""
    return lambda x, t: torch.where(mask, velocity(x, t), line)


def euler(velocity: Velocity, x: Tensor, ts: Sequence[float], on_step: OnStep | None = None,
          progress: bool = False) -> Tensor:
    """Integrates dx/dt = velocity(x, t) along the times `ts`; x in float32, whatever the velocity's dtype.

    `on_step(step, t, x)` is called before each step with its number (from 0), its time and the state at that time.
    `progress` shows a bar on stderr, if that is a terminal."""
    x = x.float()
    steps = list(zip(ts, ts[1:]))
    for step, (t, t_next) in enumerate(tqdm(steps, disable=not (progress and is_terminal(sys.stderr)), leave=False)):
        if on_step is not None:
            on_step(step, t, x)
        x = x + (t_next - t) * velocity(x, t).float()
    return x


def is_terminal(stream) -> bool:
    """Whether a bar can be shown there.

    Note: windowed programs have no stderr (None), and others close it."""
    try:
        return stream.isatty()
    except (AttributeError, ValueError):
        return False


# ------------------------------------------------------------------------------------ training


def per_image(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is; one for each image (B,) as (B, 1, 1, 1), on the device of x (B, 16, h, w)."""
    return value.to(x.device)[:, None, None, None] if isinstance(value, Tensor) else value


def interpolate(z: Tensor, eps: Tensor, t: float | Tensor) -> Tensor:
    """x(t) = (1 - t) z + t eps, on the straight line from latents to noise.

    z, eps: (B, 16, h, w). t: in [0, 1], a number or one for each image (B,)."""
    t = per_image(t, z)
    return (1 - t) * z + t * eps


def logit_normal_times(n: int, generator: torch.Generator) -> Tensor:
    """n times in (0, 1): the sigmoid of a standard normal number, so that the middle of the flow,
    where the velocity is hardest to predict, comes most often (arXiv:2403.03206, section 3.1)."""
    return torch.sigmoid(torch.randn(n, generator=generator))


def flow_matching_loss(velocity: Velocity, z: Tensor, eps: Tensor, t: Tensor,
                       weight: Tensor | None = None) -> Tensor:
    """mean (v(x_t, t) - (eps - z))^2: along the line the velocity is dx/dt = eps - z (arXiv:2210.02747).

    z, eps: (B, 16, h, w). t: (B,). weight: of each latent pixel (B, 1, h, w), 1 on average."""
    v = velocity(interpolate(z, eps, t), t)                                     # (B, 16, h, w)
    error = (v.float() - (eps - z)).square()
    return (error if weight is None else weight * error).mean()


def distillation_loss(student: Velocity, teacher: Velocity, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """mean (v_student(x_t, t) - v_teacher(x_t, t))^2; the teacher does not learn.

    With the teacher `classifier_free(velocity, unwanted, w)`, and a student that is given w as its
    guidance, one pass learns to do what took two: guidance distillation (Meng et al. 2022,
    arXiv:2210.03142), which makes a FLUX "dev"."""
    x = interpolate(z, eps, t)
    with torch.no_grad():
        target = teacher(x, t).float()                                          # (B, 16, h, w)
    return (student(x, t).float() - target).square().mean()
