"""Answers to the exercises of chapter 1, right and wrong ones."""

import torch


def examples(points, t, n, seed):
    generator = torch.Generator().manual_seed(seed)
    z = points[torch.randint(len(points), (n,), generator=generator)]
    eps = torch.randn(z.shape, generator=generator)
    return z, eps, (1 - t) * z + t * eps


def loss_floor(velocity, points, t, n=20_000, seed=0):
    z, eps, x = examples(points, t, n, seed)
    return (velocity(x, t) - (eps - z)).square().mean().item()


def gaussian_velocity(x, t, mean, std):
    covariance = t - (1 - t) * std**2
    variance = (1 - t) ** 2 * std**2 + t**2
    return -mean + covariance / variance * (x - (1 - t) * mean)


def heun(velocity, x, ts):
    for t, t_next in zip(ts, ts[1:]):
        v = velocity(x, t)
        if t_next > 0:
            v = (v + velocity(x + (t_next - t) * v, t_next)) / 2
        x = x + (t_next - t) * v
    return x


def against_the_other_sign(velocity, points, t, n=20_000, seed=0):
    z, eps, x = examples(points, t, n, seed)
    return (velocity(x, t) - (z - eps)).square().mean().item()


def time_reversed(velocity, points, t, n=20_000, seed=0):
    z, eps, x = examples(points, 1 - t, n, seed)
    return (velocity(x, t) - (eps - z)).square().mean().item()


def summed_over_the_axes(velocity, points, t, n=20_000, seed=0):
    return 2 * loss_floor(velocity, points, t, n, seed)


def variance_for_deviation(x, t, mean, std):
    return gaussian_velocity(x, t, mean, std**0.5)


def not_centred(x, t, mean, std):
    return gaussian_velocity(x + (1 - t) * mean, t, mean, std)


def towards_the_mean(x, t, mean, std):
    return (x - mean) / t


def plain_euler(velocity, x, ts):
    for t, t_next in zip(ts, ts[1:]):
        x = x + (t_next - t) * velocity(x, t)
    return x


def two_steps(velocity, x, ts):
    for t, t_next in zip(ts, ts[1:]):
        x = x + (t_next - t) / 2 * velocity(x, t)
        x = x + (t_next - t) / 2 * velocity(x, t_next)
    return x


def to_the_very_end(velocity, x, ts):
    for t, t_next in zip(ts, ts[1:]):
        v = velocity(x, t)
        x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
    return x


WRONG = {
    "loss_floor": {against_the_other_sign: "at t = 1", time_reversed: "a quarter of the noise",
                   summed_over_the_axes: "0.5 in the mean"},
    "gaussian_velocity": {variance_for_deviation: "deviation 2.00", not_centred: "the mean of eps",
                          towards_the_mean: "the mean of eps"},
    "heun": {plain_euler: "Euler's is 1", two_steps: "away from the package's heun",
             to_the_very_end: "none of them at t = 0"},
}
