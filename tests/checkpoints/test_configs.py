"""The small JSON files of a folder. Oracles: the reference classes with the same settings."""

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxTransformer2DModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    PreTrainedConfig,
    SiglipVisionConfig,
    T5Config,
)

from miniflux.checkpoints.configs import (
    AUTOENCODER,
    CLIP_TEXT,
    CONTROLNET,
    SCHEDULER,
    T5_ENCODER,
    TRANSFORMER,
    VISION,
    check_t5,
    clip_config,
    read_schedule,
)
from miniflux.checkpoints.layouts import load_clip
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
    if steps == 1 and "shift_terminal" in settings:
        pytest.skip("diffusers divides by zero")
    read = read_schedule(write(tmp_path / "scheduler_config.json", **settings))
    for tokens in (64, 256, 4096):
        expected = diffusers_times(steps, tokens, **settings)
        assert schedule(steps, tokens, read) == pytest.approx(expected, abs=2e-6)


def test_the_beta_spacing_is_made_of_the_quantiles_of_the_beta_distribution():
    """Oracle: the arcsine distribution, Beta(1/2, 1/2), whose quantiles are sin^2(pi p / 2)."""
    from miniflux.spacing import beta_quantile
    for p in (0, 1e-3, 0.2, 0.5, 0.77, 1):
        assert beta_quantile(p, 0.5) == pytest.approx(np.sin(np.pi * p / 2) ** 2, abs=1e-9)


def test_one_step_goes_from_noise_to_the_image_whatever_the_terminal():
    assert schedule(1, 64, Schedule(shift_terminal=0.1)) == [1.0, 0.0]


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"_class_name": "FlowMatchHeunDiscreteScheduler"},
            "describes a 'FlowMatchHeunDiscreteScheduler', expected a FlowMatchEuler",
        ),
        ({"num_train_timesteps": 500}, "num_train_timesteps is 500, expected 1000"),
        ({"invert_sigmas": True}, "invert_sigmas is True, expected False"),
        ({"stochastic_sampling": True}, "stochastic_sampling is True, expected False"),
        ({"use_flow_sigmas": True}, "use_flow_sigmas is True, expected False"),
        ({"sigma_min": 0.1}, "sigma_min is 0.1, expected None"),
        (
            {"time_shift_type": "cubic"},
            "time_shift_type is 'cubic', expected 'exponential' or 'linear'",
        ),
        ({"max_image_seq_len": 256}, "base_image_seq_len and max_image_seq_len are both 256"),
        ({"shift_terminal": 1.0}, "shift_terminal is 1.0, expected a time below 1"),
        ({"max_shift": "much"}, "max_shift is 'much', expected a number"),
        (
            {"use_karras_sigmas": True, "use_beta_sigmas": True},
            "the spacings karras and beta, expected one",
        ),
    ],
)
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


@pytest.mark.parametrize("known, kind", [
    (SCHEDULER, FlowMatchEulerDiscreteScheduler), (TRANSFORMER, FluxTransformer2DModel),
    (CONTROLNET, FluxControlNetModel), (AUTOENCODER, AutoencoderKL)], ids=lambda x: str(x)[-40:])
def test_every_key_of_diffusers_configs_is_read_or_fixed_or_harmless(known, kind):
    check_keys(known, set(inspect.signature(kind).parameters))


@pytest.mark.parametrize("known, kinds", [
    (CLIP_TEXT, [CLIPTextConfig]), (VISION, [CLIPVisionConfig, SiglipVisionConfig]),
    (T5_ENCODER, [T5Config])], ids=lambda x: str(x)[-40:])
def test_every_key_of_transformers_configs_is_read_or_fixed_or_harmless(known, kinds):
    """Those that all configs have are about training, outputs and generation."""
    for kind in kinds:
        check_keys(known, set(kind().to_dict()) - set(PreTrainedConfig().to_dict()))


def test_the_fixed_values_are_those_of_the_reference_models():
    """A table that asks for what the official folders do not have would refuse them."""
    theirs = dict(inspect.signature(FluxTransformer2DModel).parameters)
    assert all(theirs[key].default == value for key, value in TRANSFORMER.fixed.items())
    theirs = dict(inspect.signature(FlowMatchEulerDiscreteScheduler).parameters)
    assert all(
        theirs[key].default == value for key, value in SCHEDULER.fixed.items() if key in theirs
    )


# ----------------------------------------------------------------------------------- text encoders


TINY_CLIP = dict(hidden_size=16, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
                 vocab_size=50, max_position_embeddings=12)


@pytest.mark.parametrize("settings", [
    {}, {"eos_token_id": 2}, {"eos_token_id": 45}, {"eos_token_id": 0}, {"hidden_act": "gelu"},
    {"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}, {"layer_norm_eps": 0.1},
    {"num_attention_heads": 2}], ids=str)
def test_clip_follows_every_setting_of_its_config(tmp_path, settings):
    """Oracle: transformers' model with the same config; 49 stands for a word that was added."""
    torch.manual_seed(0)
    theirs = CLIPTextModel(CLIPTextConfig(**TINY_CLIP | {"eos_token_id": 48} | settings)).eval()
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor(
        [[47, 3, 49, 4, 48, 48, 48], [47, 45, 3, 0, 48, 48, 48], [47, 48, 3, 4, 45, 0, 2]]
    )
    expected = theirs(ids).pooler_output
    assert torch.allclose(load_clip(tmp_path)(ids), expected, atol=1e-6)


def test_without_a_named_end_the_vocabularys_is_taken():
    assert clip_config({}, Path("x")).eos_token_id == CLIPTextConfig().eos_token_id == 49407


@pytest.mark.parametrize(
    "values",
    [
        {"feed_forward_proj": "gated-silu"},
        {"feed_forward_proj": "relu"},
        {"dense_act_fn": "gelu"},
        {"layer_norm_epsilon": 1e-5},
        {"feed_forward_proj": "gated-gelu", "dense_act_fn": "silu"},
    ],
    ids=str,
)
def test_a_t5_that_computes_otherwise_is_refused(values):
    with pytest.raises(ValueError, match="^x: .*expected"):
        check_t5(values, Path("x"))


@pytest.mark.parametrize("values", [
    {}, {"feed_forward_proj": "gated-gelu"}, {"dense_act_fn": "gelu_new"},
    {"dense_act_fn": "gelu_pytorch_tanh"}, T5Config(feed_forward_proj="gated-gelu").to_dict()],
    ids=lambda values: str(values)[:40])
def test_every_way_to_ask_for_the_approximated_gelu_is_taken(values):
    check_t5(values, Path("x"))
