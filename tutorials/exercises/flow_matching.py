"""Exercises of chapter 1: flow matching in the plane.

Replace each `raise NotImplementedError` with your own code. Then run

    python -m pytest tutorials/exercises/flow_matching.py
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from miniflux.sampling import heun as package_heun
from miniflux.sampling import interpolate

# ----------------------------------------------------------------------- 1. ★ The floor, 15 minutes


def loss_floor(velocity: Callable, points: Tensor, t: float, n: int = 20_000, seed: int = 0
               ) -> float:
    """The flow matching loss of this velocity at the time t, estimated from n random examples.

    velocity: (x, t) -> (B, 2). points: the data, (m, 2); each is drawn equally often.
    With the exact velocity of the points, this is the smallest loss that any network can have.

    Hint: draw n data points and n noises, and take the mean over everything of the squared error.
    Try it at many times: where is it largest?"""
    raise NotImplementedError


def two_points(x: Tensor, t: float) -> Tensor:
    """The exact velocity for the data (1, 0) and (-1, 0)."""
    guess = torch.tanh((1 - t) * x[:, :1] / t**2)                               # in the first axis
    return (x - torch.cat([guess, 0 * guess], dim=1)) / t


PAIR = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])


def test_at_the_end_of_pure_noise_only_the_data_are_unknown():
    floor = loss_floor(two_points, PAIR, 1.0)
    assert abs(floor - 0.5) < 0.02, (
        "at t = 1 the noise is known, so the loss is the variance of the data, which is 1 in the "
        f"first axis and 0 in the second, 0.5 in the mean; yours is {floor:.3f}")


def test_between_two_points_most_is_known_when_little_noise_is_left():
    floor = loss_floor(two_points, PAIR, 0.1)
    assert floor < 0.02, (
        "at t = 0.1 it is clear which of the two points x belongs to, so the velocity is known; "
        f"your loss is {floor:.3f}")


def test_a_velocity_of_zero_has_the_loss_of_the_whole_spread():
    zero = loss_floor(lambda x, t: torch.zeros_like(x), PAIR, 0.5)
    assert abs(zero - 1.5) < 0.03, (
        "the mean square of eps - z is 1 + 0.5 = 1.5 here, the mean over both axes; yours is "
        f"{zero:.3f}")


def test_the_velocity_is_asked_where_the_examples_are():
    seen = []
    loss_floor(lambda x, t: seen.append(x) or 0 * x, PAIR, 0.25)
    spread = torch.cat(seen)[:, 1].std()
    assert abs(spread - 0.25) < 0.01, (
        "at t = 0.25 a quarter of the noise is left: in the second axis x = (1 - t) z + t eps "
        f"should have the standard deviation 0.25, yours has {spread:.2f}")


# ------------------------------------------------------ 2. ★★ From Gaussian to Gaussian, 20 minutes


def gaussian_velocity(x: Tensor, t: float, mean: float, std: float) -> Tensor:
    """The exact velocity E[eps - z | x] if the data are normal: z = mean + std · (normal number).

    Hint: x = (1 - t) z + t eps is normal too. If two numbers a and x are jointly normal, then
    E[a | x] = E[a] + cov(a, x) / var(x) · (x - E[x]). Here a = eps - z."""
    raise NotImplementedError


def test_it_is_the_mean_of_many_examples():
    """Least squares through 200,000 examples."""
    generator = torch.Generator().manual_seed(0)
    z = 2 + 0.5 * torch.randn(200_000, 1, generator=generator)
    eps = torch.randn(200_000, 1, generator=generator)
    for t in (0.2, 0.5, 0.9):
        x = interpolate(z, eps, t)
        slope, offset = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x)], 1), eps - z).solution
        at = torch.tensor([[0.0], [1.0], [2.0]])
        mine, theirs = gaussian_velocity(at, t, 2.0, 0.5), slope * at + offset
        assert (mine - theirs).abs().max() < 0.02, (
            f"at t = {t} the mean of eps - z near x = 0, 1, 2 is "
            f"{theirs.flatten().tolist()}, yours is {mine.flatten().tolist()}")


def test_it_carries_noise_to_the_data():
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1))
    times = [1 - i / 200 for i in range(201)]
    for t, t_next in zip(times, times[1:]):
        x = x + (t_next - t) * gaussian_velocity(x, t, -1.0, 2.0)
    assert abs(x.mean() + 1) < 0.05 and abs(x.std() - 2) < 0.05, (
        "noise that flows along your velocity should arrive with the mean -1.00 and the standard "
        f"deviation 2.00, it has {x.mean():.2f} and {x.std():.2f}")


def test_data_that_are_a_single_point_are_reached_on_straight_lines():
    x = torch.tensor([[0.5], [-1.0]])
    mine = gaussian_velocity(x, 0.5, mean=3.0, std=0.0)
    assert torch.allclose(mine, (x - 3) / 0.5), (
        "with std = 0 every path is the line to the mean: (x - mean) / t, yours is "
        f"{mine.tolist()}")


# --------------------------------------------------------------------------- 3. ★★ Heun, 25 minutes


def heun(velocity: Callable, x: Tensor, ts: list[float]) -> Tensor:
    """Integrate dx/dt = velocity(x, t) along the times ts, with two velocities per step.

    Take an Euler step. Ask for the velocity where it ends. Go back, and make the step again with
    the mean of the two velocities. In a step that ends at t = 0 use Euler's alone: there, a network
    has nothing left to predict.

    Hint: how many passes do Euler and Heun need for the same error?"""
    raise NotImplementedError


def rotation(x: Tensor, t: float) -> Tensor:
    """Points that circle around the origin, faster and faster."""
    return 4 * t * torch.stack([-x[:, 1], x[:, 0]], dim=1)


def error(steps: int) -> float:
    ts = [1.0 - 0.9 * i / steps for i in range(steps + 1)]                      # 1 -> 0.1
    angle = 2 * (0.1**2 - 1.0**2)                                               # of all 4 t dt
    exact = torch.tensor([[math.cos(angle), math.sin(angle)]])
    return (heun(rotation, torch.tensor([[1.0, 0.0]]), ts) - exact).norm().item()


def test_it_is_the_sampler_of_the_package():
    ts, x = [1.0, 0.7, 0.3, 0.0], torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    mine, theirs = heun(rotation, x, ts), package_heun(rotation, x, ts)
    assert torch.allclose(mine, theirs, atol=1e-6), (
        f"you end up {(mine - theirs).abs().max():.3f} away from the package's heun")


def test_half_the_step_is_a_quarter_of_the_error():
    order = math.log2(error(20) / error(40))
    assert order > 1.7, (
        "with twice as many steps the error should be a quarter (order 2), yours has the order "
        f"{order:.2f}; Euler's is 1")


def test_two_passes_for_each_step_but_the_last():
    passes = []
    heun(lambda x, t: passes.append(t) or 0 * x, torch.zeros(1, 2), [1.0, 0.5, 0.2, 0.0])
    assert len(passes) == 5 and min(passes) > 0, (
        "three steps that end at t = 0 need 5 velocities, none of them at t = 0; you asked at "
        f"{passes}")
