"""Samplers against diffusers' schedulers, on a velocity that bends. Oracle: diffusers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from miniflux.sampling import euler, heun


def velocity(x, t):
    return torch.sin(3 * x) + t * x


def sample_with(scheduler, x):
    """Steps through diffusers' scheduler; it hands out the times, one for each pass."""
    scheduler.set_timesteps(6)
    for t in scheduler.timesteps:
        x = scheduler.step(velocity(x, float(t) / 1000), t, x).prev_sample
    return x


@pytest.mark.parametrize("ours, theirs", [
    (euler, FlowMatchEulerDiscreteScheduler), (heun, FlowMatchHeunDiscreteScheduler)])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_sampler_takes_the_steps_of_diffusers_scheduler(ours, theirs, shift):
    scheduler = theirs(shift=shift)
    x = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = sample_with(scheduler, x)
    ts = sorted({float(t) for t in scheduler.sigmas}, reverse=True)             # Heun's repeat
    assert torch.allclose(ours(velocity, x, ts), expected, atol=1e-5)
