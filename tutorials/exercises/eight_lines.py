"""Exercises of chapter 0: an image in eight lines.

Replace each `raise NotImplementedError` with your own code. Then run

    python -m pytest tutorials/exercises/eight_lines.py
"""

from functools import lru_cache

import torch
from torch import Tensor

from miniflux import generate, load
from miniflux.sampling import image_ids, noise, patchify


@lru_cache
def model():
    return load("tiny", device="cpu")


# -------------------------------------------------------------------------- 1. ★ Shapes, 10 minutes


def shapes(width: int, height: int, num_images: int) -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors on the way to `num_images` images of width x height pixels.

    latents: one latent pixel for 8 x 8 pixels, 16 channels.
    tokens: what the transformer gets, (images, tokens, channels); a token is 2 x 2 latent pixels.
    ids: where each token lies, (tokens, 3).
    pixels: the finished images.

    Hint: rows come before columns, so the height comes before the width."""
    raise NotImplementedError


def test_the_shapes_are_those_of_a_square_image():
    check_shapes(128, 128, 1)


def test_the_height_comes_before_the_width():
    check_shapes(width=192, height=64, num_images=1)


def test_every_image_of_a_batch_has_its_own_latents():
    check_shapes(64, 96, num_images=3)


def check_shapes(width: int, height: int, num_images: int) -> None:
    mine = shapes(width, height, num_images)
    settings = dict(width=width, height=height, num_images=num_images, steps=1, progress=False)
    latents = noise(range(num_images), height // 8, width // 8)
    with torch.no_grad():
        pixels = generate(model(), "a fox", output="tensor", **settings)
    theirs = {"latents": latents, "tokens": patchify(latents),
              "ids": image_ids(height // 8, width // 8), "pixels": pixels}
    for name, tensor in theirs.items():
        assert tuple(mine[name]) == tuple(tensor.shape), (
            f"the {name} of {num_images} images of {width} x {height} pixels have the shape "
            f"{tuple(tensor.shape)}, yours is {tuple(mine[name])}")


# ---------------------------------------------------------------- 2. ★ Count the passes, 10 minutes


def count_passes(steps: int, true_cfg: float = 1.0, negative_prompt: str | None = None) -> int:
    """How often `generate` runs the transformer for one call with these settings.

    Hint: true classifier-free guidance needs a second velocity at each step, that of the negative
    prompt. It is only used if there is a negative prompt and true_cfg is greater than 1."""
    raise NotImplementedError


def test_each_step_is_one_pass():
    check_passes(steps=5)


def test_a_negative_prompt_doubles_the_passes():
    check_passes(steps=3, true_cfg=4.0, negative_prompt="")


def test_a_negative_prompt_without_true_cfg_costs_nothing():
    check_passes(steps=3, true_cfg=1.0, negative_prompt="a cat")


def test_true_cfg_without_a_negative_prompt_costs_nothing():
    check_passes(steps=3, true_cfg=4.0)


def check_passes(**settings) -> None:
    passes = []
    handle = model().mmdit.register_forward_hook(lambda *_: passes.append(1))
    try:
        generate(model(), "a fox", width=64, height=64, progress=False, **settings)
    finally:
        handle.remove()
    mine = count_passes(**settings)
    assert mine == len(passes), (
        f"generate with {settings} runs the transformer {len(passes)} times, you count {mine}")


# -------------------------------------------------------------- 3. ★★ From seed to seed, 20 minutes


def slerp(a: Tensor, b: Tensor, s: float) -> Tensor:
    """From the noise a (s = 0) to the noise b (s = 1) along an arc, so that it keeps its length.

    With the angle w between a and b, seen as two long vectors,

        sin((1 - s) w) / sin(w) * a  +  sin(s w) / sin(w) * b

    Hint: cos(w) = <a, b> / (|a| |b|). In 4096 dimensions two noises are nearly at right angles.
    When it works, look at generate's images on the way: sample from slerp(a, b, s) by `euler`."""
    raise NotImplementedError


def pair(angle: float) -> tuple[Tensor, Tensor]:
    """Two noises of equal length with this angle between them."""
    a, other = noise([1], 16, 16), noise([2], 16, 16)
    other = other - (a * other).sum() / (a * a).sum() * a
    other = other * a.norm() / other.norm()
    return a, torch.cos(torch.tensor(angle)) * a + torch.sin(torch.tensor(angle)) * other


def test_the_ends_are_the_two_noises():
    a, b = noise([1], 16, 16), noise([2], 16, 16)
    assert torch.allclose(slerp(a, b, 0.0), a, atol=1e-5), "at s = 0 you should be at a"
    assert torch.allclose(slerp(a, b, 1.0), b, atol=1e-5), "at s = 1 you should be at b"


def test_the_noise_keeps_its_strength_on_the_way():
    a, b = noise([1], 16, 16), noise([2], 16, 16)
    for s in (0.25, 0.5, 0.75):
        strength = slerp(a, b, s).std()
        assert abs(strength - 1) < 0.03, (
            f"the noise should keep the standard deviation 1 on the way, at s = {s} yours has "
            f"{strength:.2f}: an average is too weak")


def test_it_turns_with_even_speed():
    a, b = pair(angle=1.2)
    for s in (0.25, 0.5, 0.75):
        middle = slerp(a, b, s)
        angle = torch.acos((a * middle).sum() / (a.norm() * middle.norm()))
        assert abs(angle - 1.2 * s) < 1e-3, (
            f"of an angle of 1.2 you should have turned {1.2 * s:.2f} at s = {s}, "
            f"yours turned {angle:.2f}")
