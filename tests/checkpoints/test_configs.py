"""The small JSON files of a folder. Oracles: the reference classes with the same settings."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from miniflux.checkpoints.configs import SCHEDULER, read_schedule
from miniflux.flux import Schedule
from miniflux.sampling import schedule


def write(path: Path, **values) -> Path:
    path.write_text(json.dumps(values))
    return path


def diffusers_times(steps: int, tokens: int, **settings) -> list[float]:
    """The times of diffusers' pipeline and scheduler."""
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    keys = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    mu = calculate_shift(tokens, *(scheduler.config[key] for key in keys))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    return scheduler.sigmas.tolist()


DYNAMIC = {"use_dynamic_shifting": True}
SETTINGS = [
    {}, {"shift": 3.0}, DYNAMIC,
    DYNAMIC | {"max_shift": 2.0}, DYNAMIC | {"base_shift": 0.8}, DYNAMIC | {"base_shift": -0.25},
    DYNAMIC | {"base_image_seq_len": 64, "max_image_seq_len": 1024},
    DYNAMIC | {"time_shift_type": "linear"}, {"time_shift_type": "linear", "shift": 2.0},
    DYNAMIC | {"shift_terminal": 0.02}, {"shift_terminal": 0.1, "shift": 3.0},
    {"use_karras_sigmas": True}, DYNAMIC | {"use_karras_sigmas": True},
    DYNAMIC | {"use_exponential_sigmas": True}, DYNAMIC | {"use_beta_sigmas": True},
    DYNAMIC | {"use_beta_sigmas": True, "shift_terminal": 0.3, "max_shift": 1.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("steps", [1, 2, 7, 28])
def test_the_times_are_those_of_diffusers_for_every_setting(tmp_path, settings, steps):
    if "use_beta_sigmas" in settings:
        pytest.importorskip("scipy")
    if steps == 1 and "shift_terminal" in settings:
        pytest.skip("diffusers divides by zero")
    read = read_schedule(write(tmp_path / "scheduler_config.json", **settings))
    for tokens in (64, 256, 4096):
        expected = diffusers_times(steps, tokens, **settings)
        assert schedule(steps, tokens, read) == pytest.approx(expected, abs=2e-6)


def test_the_beta_spacing_is_made_of_the_quantiles_of_the_beta_distribution():
    """Oracle: the arcsine distribution, Beta(1/2, 1/2), whose quantiles are sin^2(pi p / 2)."""
    from miniflux.sampling import beta_quantile
    for p in (0, 1e-3, 0.2, 0.5, 0.77, 1):
        assert beta_quantile(p, 0.5) == pytest.approx(np.sin(np.pi * p / 2) ** 2, abs=1e-9)


def test_one_step_goes_from_noise_to_the_image_whatever_the_terminal():
    assert schedule(1, 64, Schedule(shift_terminal=0.1)) == [1.0, 0.0]


@pytest.mark.parametrize("values, message", [
    ({"_class_name": "FlowMatchHeunDiscreteScheduler"},
     "describes a 'FlowMatchHeunDiscreteScheduler', expected a FlowMatchEulerDiscreteScheduler"),
    ({"num_train_timesteps": 500}, "num_train_timesteps is 500, expected 1000"),
    ({"invert_sigmas": True}, "invert_sigmas is True, expected False"),
    ({"stochastic_sampling": True}, "stochastic_sampling is True, expected False"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas is True, expected False"),
    ({"sigma_min": 0.1}, "sigma_min is 0.1, expected None"),
    ({"time_shift_type": "cubic"}, "time_shift_type is 'cubic', expected 'exponential' or 'linear'"),
    ({"max_image_seq_len": 256}, "base_image_seq_len and max_image_seq_len are both 256"),
    ({"shift_terminal": 1.0}, "shift_terminal is 1.0, expected a time below 1"),
    ({"max_shift": "much"}, "max_shift is 'much', expected a number"),
    ({"use_karras_sigmas": True, "use_beta_sigmas": True}, "the spacings karras and beta, expected one"),
])
def test_a_scheduler_that_is_not_followed_is_refused_by_name(tmp_path, values, message):
    path = write(tmp_path / "scheduler_config.json", **values)
    with pytest.raises(ValueError, match=message) as caught:
        read_schedule(path)
    assert "\n" not in str(caught.value)


def check_keys(known, names: set[str]) -> None:
    """Every key has its place, in one of the three lists; no reason is left out."""
    listed = [*known.read, *known.fixed, *known.harmless]
    assert names - set(listed) == set()
    assert len(listed) == len(set(listed))
    assert all(known.harmless.values())


def test_every_key_of_the_scheduler_is_read_or_fixed_or_harmless():
    check_keys(SCHEDULER, set(inspect.signature(FlowMatchEulerDiscreteScheduler).parameters))
