"""The algorithm's pieces. Oracles: by hand, and the published values of the schedules."""

import math

import pytest
import torch

from miniflux.flux import SCHEDULES, Schedule
from miniflux.networks.mmdit import MMDiT, MMDiTConfig
from miniflux.sampling import (
    classifier_free,
    distillation_loss,
    euler,
    flow,
    flow_matching_loss,
    heun,
    image_ids,
    interpolate,
    keep_known,
    logit_normal_times,
    noise,
    once_a_state,
    patchify,
    schedule,
    text_ids,
    unpatchify,
)


def test_the_channel_varies_slowest_within_a_token():
    """By hand: entry (c, y, x) of the first 2x2 patch lies at c·4 + y·2 + x."""
    z = torch.arange(16 * 4 * 6.0).reshape(1, 16, 4, 6)
    tokens = patchify(z)
    assert tokens.shape == (1, 6, 64)
    for c in range(16):
        for y in range(2):
            for x in range(2):
                assert tokens[0, 0, c * 4 + y * 2 + x] == z[0, c, y, x]
    assert tokens[0, 1, 0] == z[0, 0, 0, 2]                                     # row-major tokens
    assert tokens[0, 3, 0] == z[0, 0, 2, 0]


def test_unpatchify_is_the_inverse_of_patchify():
    z = torch.randn(2, 16, 8, 6)
    assert torch.equal(unpatchify(patchify(z), 8, 6), z)


def test_positions_are_integers_of_index_row_and_column():
    ids = image_ids(4, 6, index=1)
    assert ids.tolist() == [[1, 0, 0], [1, 0, 1], [1, 0, 2], [1, 1, 0], [1, 1, 1], [1, 1, 2]]
    assert not ids.is_floating_point()
    assert text_ids(2).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_schnells_schedule_is_not_shifted():
    assert schedule(4, 4096, SCHEDULES["schnell"]) == [1, 0.75, 0.5, 0.25, 0]


def test_devs_schedule_has_the_published_values():
    """Values of the original at 1024x1024: 4 steps, and the ends of 28."""
    assert schedule(4, 4096) == pytest.approx([1, 0.90453076, 0.75951093, 0.51284415, 0], abs=1e-7)
    long = schedule(28, 4096)
    first = [1, 0.988409, 0.976222, 0.963394, 0.949873, 0.935599]
    assert len(long) == 29 and long[:6] == pytest.approx(first, abs=1e-6)
    assert long[-4:] == pytest.approx([0.274828, 0.195455, 0.104721, 0], abs=1e-6)


@pytest.mark.parametrize("tokens, mu", [
    (256, 0.5), (1024, 0.63), (4080, 1.147292), (4096, 1.15), (16384, 3.23)])
def test_the_shift_grows_with_the_number_of_image_tokens(tokens, mu):
    """At t = 1/2 the shifted time is the logistic function of mu."""
    assert schedule(2, tokens)[1] == pytest.approx(1 / (1 + math.exp(-mu)), abs=1e-6)


def test_own_sigmas_are_shifted_too():
    assert schedule(2, 4096, sigmas=[1.0, 0.5])[1] == schedule(2, 4096)[1]
    shifted = Schedule(use_dynamic_shifting=False, shift=3.0)
    assert schedule(2, 64, shifted, sigmas=[1.0, 0.5]) == [1.0, 0.75, 0.0]


def test_euler_is_exact_on_a_straight_flow():
    """If the velocity is constant, noise - data, one step and many end at the data."""
    data, start = torch.randn(2, 5), torch.randn(2, 5)
    for steps in (1, 7):
        end = euler(lambda x, t: start - data, start, schedule(steps, 4096))
        assert torch.allclose(end, data, atol=1e-6)


def test_the_state_stays_float32_when_the_velocity_is_bfloat16():
    def velocity(x, t):
        return torch.full_like(x, 2**-9, dtype=torch.bfloat16)

    x = euler(velocity, torch.ones(1), [1.0, 0.5, 0.0])
    assert x.dtype == torch.float32 and x.item() == 1 - 2**-9                   # 1 in bfloat16


def test_on_step_sees_number_time_and_state_before_each_step():
    seen = []

    def on_step(step, t, x):
        seen.append((step, t, x.item()))

    euler(lambda x, t: torch.ones_like(x), torch.zeros(1), [1.0, 0.75, 0.0], on_step)
    assert seen == [(0, 1.0, 0.0), (1, 0.75, -0.25)]


def test_a_batch_of_noise_equals_its_singles():
    assert torch.equal(noise([5, 6], 4, 6), torch.cat([noise([5], 4, 6), noise([6], 4, 6)]))


def test_bfloat16_noise_is_the_rounded_float32_noise():
    assert torch.equal(noise([3], 8, 8, dtype=torch.bfloat16), noise([3], 8, 8).bfloat16())


def test_classifier_free_guidance_of_scale_one_is_the_identity():
    def guided(scale):
        return classifier_free(lambda x, t: x + 1, lambda x, t: x - 4, scale)

    assert guided(1.0)(torch.zeros(1), 0.5).item() == 1
    assert guided(2.0)(torch.zeros(1), 0.5).item() == 6


@pytest.mark.parametrize("steps, strength, kept", [
    (28, 0.6, 17), (28, 1.0, 28), (4, 0.1, 1), (50, 0.8, 40), (10, 0.3, 3), (1000, 0.001, 1)])
def test_strength_keeps_the_last_steps_of_the_whole_schedule(steps, strength, kept):
    """A begun step counts: 0.6 of 28 steps are 16.8, so 17."""
    whole, rest = schedule(steps, 4096), schedule(steps, 4096, strength=strength)
    assert rest == whole[-kept - 1:]


def test_what_is_kept_arrives_at_its_latents_whatever_the_model_predicts():
    """By hand: there x(t) = t · eps + (1 - t) · z; elsewhere the predicted velocity acts."""
    z, eps = torch.randn(2, 1, 2, 4, 4)
    mask = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    seen = []
    velocity = keep_known(lambda x, t: torch.ones_like(x), mask, eps - z)
    start = 0.9 * eps + 0.1 * z
    x = euler(velocity, start, [0.9, 0.6, 0.2, 0.0], lambda step, t, x: seen.append((t, x)))
    for t, state in seen:
        assert torch.allclose(state[..., 2:], (t * eps + (1 - t) * z)[..., 2:], atol=1e-6)
    assert torch.allclose(x[..., 2:], z[..., 2:], atol=1e-6)
    assert torch.allclose(x[..., :2], (start - 0.9)[..., :2], atol=1e-6)


def test_interpolation_runs_from_latents_to_noise_and_its_slope_is_the_velocity():
    """By hand: x(0) = z, x(1) = eps, and x(t) - t (eps - z) = z at every t."""
    z, eps = torch.randn(2, 3, 16, 4, 4)
    assert torch.equal(interpolate(z, eps, 0.0), z) and torch.equal(interpolate(z, eps, 1.0), eps)
    t = torch.tensor([0.1, 0.5, 0.9])
    x = interpolate(z, eps, t)
    assert torch.allclose(x - t[:, None, None, None] * (eps - z), z, atol=1e-6)
    assert torch.equal(x[1], interpolate(z, eps, 0.5)[1])


def test_points_and_tokens_are_interpolated_as_latents_are():
    z, eps, t = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0.0, 0.5, 1.0])
    expected = torch.stack([z[0], (z[1] + eps[1]) / 2, eps[2]])
    torch.testing.assert_close(interpolate(z, eps, t), expected)


def test_training_times_are_logit_normal():
    """Half of them below 1/2, and 68% between sigmoid(-1) and sigmoid(1)."""
    t = logit_normal_times(20_000, torch.Generator().manual_seed(0))
    assert t.shape == (20_000,) and (0 < t).all() and (t < 1).all()
    assert float((t < 0.5).float().mean()) == pytest.approx(0.5, abs=0.02)
    assert float(((t > 0.2689) & (t < 0.7311)).float().mean()) == pytest.approx(0.683, abs=0.02)


def test_the_flow_matching_loss_is_zero_for_the_true_velocity_and_weighted_where_asked():
    z, eps = torch.randn(2, 2, 16, 4, 4)
    t = torch.tensor([0.3, 0.8])
    assert flow_matching_loss(lambda x, t: eps - z, z, eps, t) == 0
    wrong = lambda x, t: eps - z + 1                                            # noqa: E731
    assert flow_matching_loss(wrong, z, eps, t) == pytest.approx(1.0, abs=1e-5)
    half = torch.zeros(2, 1, 4, 4)
    half[:, :, :2] = 1
    assert flow_matching_loss(wrong, z, eps, t, half) == pytest.approx(0.5, abs=1e-5)


def test_a_student_with_its_teachers_guided_velocity_has_no_distillation_loss():
    """By hand, guidance differing from image to image: v_neg + w (v - v_neg)."""
    z, eps = torch.randn(2, 2, 16, 4, 4)
    t, w = torch.tensor([0.3, 0.8]), torch.tensor([1.0, 6.0])
    teacher = classifier_free(lambda x, t: 3 * x, lambda x, t: x, w)
    student = lambda x, t: x + w[:, None, None, None] * 2 * x                   # noqa: E731
    assert distillation_loss(student, teacher, z, eps, t) < 1e-10
    assert distillation_loss(lambda x, t: 3 * x, teacher, z, eps, t) > 1


def test_a_velocity_takes_times_and_guidance_of_each_image():
    """A batch with times and guidance of its own equals its images one by one."""
    torch.manual_seed(0)
    mmdit = MMDiT(MMDiTConfig(
        in_channels=64, vec_in_dim=8, context_in_dim=8, hidden_size=32, num_heads=2, depth=1,
        depth_single_blocks=1, axes_dim=(4, 6, 6)))
    x = torch.randn(2, 16, 4, 4)
    txt = torch.randn(2, 3, 8)
    pooled = torch.randn(2, 8)
    t, w = [0.25, 0.75], [1.0, 4.0]
    both = flow(mmdit, txt, pooled, torch.tensor(w), 4, 4)(x, torch.tensor(t))
    for i in range(2):
        one = flow(mmdit, txt[i:i + 1], pooled[i:i + 1], w[i], 4, 4)(x[i:i + 1], t[i])
        assert torch.allclose(both[i:i + 1], one, atol=1e-5)


def test_heun_is_of_second_order_and_takes_two_passes_a_step_but_one_at_the_end():
    """dx/dt = x has the solution x(t) = e^(t - 1); half the step has a quarter of the error."""
    passes = []

    def velocity(x, t):
        passes.append(t)
        return x

    def error(steps):
        passes.clear()
        ts = [1 - 0.9 * i / steps for i in range(steps + 1)]                    # ends before 0
        x = heun(velocity, torch.ones(1, dtype=torch.float64), ts)
        return abs(x.item() - math.exp(-0.9))

    assert 3.5 < error(8) / error(16) < 4.5 and len(passes) == 32
    heun(velocity, torch.ones(1), [1.0, 0.5, 0.0])
    assert passes[-3:] == [1.0, 0.5, 0.5]


def test_what_is_computed_once_a_state_is_computed_again_for_another_one():
    calls = []
    residuals = once_a_state(lambda x, t: calls.append(t) or [x])
    x = torch.zeros(1)
    for state, t in ((x, 1.0), (x, 1.0), (x, 0.5), (torch.zeros(1), 0.5)):
        assert residuals(state, t)[0] is state
    assert calls == [1.0, 0.5, 0.5]
