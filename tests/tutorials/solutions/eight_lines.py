"""Answers to the exercises of chapter 0, right and wrong ones."""

import torch


def shapes(width, height, num_images):
    h, w = height // 8, width // 8
    tokens = (h // 2) * (w // 2)
    return {"latents": (num_images, 16, h, w), "tokens": (num_images, tokens, 64),
            "ids": (tokens, 3), "pixels": (num_images, 3, height, width)}


def count_passes(steps, true_cfg=1.0, negative_prompt=None):
    return 2 * steps if negative_prompt is not None and true_cfg > 1 else steps


def slerp(a, b, s):
    angle = torch.acos((a * b).sum() / (a.norm() * b.norm()))
    return (torch.sin((1 - s) * angle) * a + torch.sin(s * angle) * b) / torch.sin(angle)


def width_first(width, height, num_images):
    return shapes(height, width, num_images)


def one_token_per_latent_pixel(width, height, num_images):
    h, w = height // 8, width // 8
    return shapes(width, height, num_images) | {"tokens": (num_images, h * w, 16)}


def one_image_only(width, height, num_images):
    return shapes(width, height, 1)


def always_one(steps, true_cfg=1.0, negative_prompt=None):
    return steps


def doubled_by_any_negative_prompt(steps, true_cfg=1.0, negative_prompt=None):
    return 2 * steps if negative_prompt is not None else steps


def doubled_unless_the_negative_prompt_is_empty(steps, true_cfg=1.0, negative_prompt=None):
    return 2 * steps if negative_prompt and true_cfg > 1 else steps


def linear(a, b, s):
    return (1 - s) * a + s * b


def square_roots(a, b, s):
    return (1 - s) ** 0.5 * a + s**0.5 * b


def backwards(a, b, s):
    return slerp(b, a, s)


WRONG = {
    "shapes": {width_first: "have the shape", one_token_per_latent_pixel: "the tokens of",
               one_image_only: "of 3 images"},
    "count_passes": {always_one: "runs the transformer 6 times",
                     doubled_by_any_negative_prompt: "runs the transformer 3 times",
                     doubled_unless_the_negative_prompt_is_empty: "runs the transformer 6 times"},
    "slerp": {linear: "an average is too weak", square_roots: "you should have turned",
              backwards: "you should be at a"},
}
