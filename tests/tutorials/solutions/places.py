"""Answers to the exercises of chapter 5, right and wrong ones."""

import torch

from miniflux.sampling import image_ids


def patchify_by(z, p):
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(b, h // p * (w // p), c * p * p)


def turn_pairs(x, position, theta=10000.0):
    D = x.shape[-1]
    angle = position[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    a, b = x[:, 0::2], x[:, 1::2]
    pairs = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
    return torch.stack(pairs, dim=-1).flatten(1)


def stretched_ids(h, w, trained=16):
    factor = min(1.0, (trained // 2 - 1) / (max(h, w) // 2 - 1))
    return image_ids(h, w).float() * factor


def channel_fastest(z, p):
    b, c, h, w = z.shape
    z = z.reshape(b, c, h // p, p, w // p, p).permute(0, 2, 4, 3, 5, 1)
    return z.reshape(b, h // p * (w // p), c * p * p)


def not_permuted(z, p):
    b, c, h, w = z.shape
    return z.reshape(b, h // p * (w // p), c * p * p)


def columns_first(z, p):
    return patchify_by(z.transpose(2, 3), p)


def half_a_head_apart(x, position, theta=10000.0):
    D = x.shape[-1]
    angle = position[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    a, b = x[:, :D // 2], x[:, D // 2:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 1)


def backwards(x, position, theta=10000.0):
    return turn_pairs(x, -position, theta)


def added(x, position, theta=10000.0):
    D = x.shape[-1]
    angle = position[:, None] * theta ** (-torch.arange(0, D, 2) / D)
    return x + torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)


def each_axis_by_itself(h, w, trained=16):
    limit = torch.tensor([1, h // 2 - 1, w // 2 - 1]).clamp(min=trained // 2 - 1)
    return image_ids(h, w).float() * (trained // 2 - 1) / limit


def by_the_sizes(h, w, trained=16):
    return image_ids(h, w).float() * min(1.0, trained / max(h, w))


def always_stretched(h, w, trained=16):
    return image_ids(h, w).float() * (trained // 2 - 1) / (min(h, w) // 2 - 1)


WRONG = {
    "patchify_by": {channel_fastest: "the channel slowest", not_permuted: "the channel slowest",
                    columns_first: "row 1, column 1"},
    "turn_pairs": {half_a_head_apart: "neighbouring channels", backwards: "the package's rotation",
                   added: "should turn nothing"},
    "stretched_ids": {each_axis_by_itself: "circles become ellipses", by_the_sizes: "at [0, 7, 7]",
                      always_stretched: "should stay as it is"},
}
