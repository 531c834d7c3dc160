"""ControlNets in a call. Oracles: by hand; a call without them. parity/ compares the images with
diffusers'."""

import pytest
import torch
from PIL import Image
from reference import controlnet, small_pipeline

from miniflux import Control, generate, image_to_image, inpaint, load, load_controlnet
from miniflux.adapters.controlnet import MODES, read_control, residuals_of, window
from miniflux.prompt import encode_prompt

EDGES = Image.effect_noise((80, 48), 90).convert("RGB")


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return load(small_pipeline(tmp_path_factory.mktemp("control") / "flux"), device="cpu")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    controlnet().save_pretrained(path := tmp_path_factory.mktemp("net"))
    return load_controlnet(path, device="cpu")


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    controlnet(modes=7).save_pretrained(path := tmp_path_factory.mktemp("union"))
    return load_controlnet(path, device="cpu")


SMALL = dict(width=48, height=32, steps=2, max_text_tokens=8, output="latents", progress=False)


def sampled(flux, controlnet, **keywords):
    keywords = SMALL | dict(guidance=3.5) | keywords
    return generate(flux, "a red apple", controlnet=controlnet, **keywords)


def test_a_scale_of_zero_an_empty_window_and_an_empty_list_change_nothing(flux, net):
    plain = sampled(flux, None)
    for control in ((net, EDGES, 0), (net, EDGES, 1.0, 0.4, 0.5), []):
        assert torch.equal(sampled(flux, control), plain)
    assert not torch.allclose(sampled(flux, (net, EDGES)), plain, atol=1e-2)


def test_a_net_does_not_run_outside_its_window(flux, net, monkeypatch):
    """Of four steps those that lie within [0.25, 0.75] as a whole: the second and the third."""
    seen, times, forward = [], [], type(net).forward

    def spy(self, *args):
        seen.append(float(args[5][0]))
        return forward(self, *args)

    monkeypatch.setattr(type(net), "forward", spy)
    control = net, EDGES, 1.0, 0.25, 0.75
    sampled(flux, control, steps=4, on_step=lambda step, t, x: times.append(t))
    assert seen == pytest.approx(times[1:3])


@pytest.mark.parametrize("start, end, times", [
    (0.0, 1.0, (0.0, 1.0)),
    (0.25, 0.75, (0.2, 0.8)),
    (0.2, 0.8, (0.2, 0.8)),             # a step counts where it lies in the window as a whole
    (0.0, 0.5, (0.5, 1.0)),
    (0.5, 1.0, (0.0, 0.5)),
    (0.3, 0.4, (1.0, 0.0))])            # no step does: an empty interval
def test_a_window_of_steps_is_an_interval_of_times(start, end, times):
    assert window([1.0, 0.8, 0.5, 0.2, 0.0], start, end) == times


def test_a_net_acts_between_the_steps_too(flux, net):
    """A sampler may evaluate the velocity at times that no step begins with."""
    ts = [1.0, 0.75, 0.5, 0.25, 0.0]
    control = read_control(flux, Control(net, EDGES, start=0.25, end=0.75))
    text = encode_prompt(flux, "a red apple", 8)
    residuals = residuals_of(flux, [control], text, ts, 48, 32, 3.5)
    x = torch.randn(1, 16, 4, 6)
    active = [t for t in (0.99, 0.76, 0.75, 0.74, 0.5, 0.26, 0.25, 0.1)
              if residuals(x, t)[0] is not None]
    assert active == [0.75, 0.74, 0.5, 0.26]


def test_heun_evaluates_the_net_within_its_window(flux, net):
    plain = sampled(flux, None, sampler="heun")
    assert torch.equal(sampled(flux, (net, EDGES, 1.0, 0.4, 0.5), sampler="heun"), plain)
    assert not torch.allclose(sampled(flux, (net, EDGES), sampler="heun"), plain, atol=1e-2)


def test_two_nets_add_up_to_one_of_twice_the_scale(flux, net):
    two = sampled(flux, [(net, EDGES, 0.5), Control(net, EDGES, 0.5)])
    assert torch.allclose(two, sampled(flux, (net, EDGES, 1.0)), atol=1e-5)


def test_a_batch_equals_its_singles(flux, net):
    turned = EDGES.rotate(180)
    batch = generate(flux, ["a red apple", "an owl"], controlnet=(net, [EDGES, turned]), seed=4,
                     **SMALL)
    single = generate(flux, "an owl", controlnet=(net, turned), seed=5, **SMALL)
    assert (batch[1:] - single).abs().max() < 1e-5 * single.abs().max()


def test_the_result_has_the_control_images_shape_and_the_guidance_of_the_pipeline(flux, net):
    """32 · 32 pixels in the shape 5 : 3; diffusers' default guidance with a ControlNet is 7."""
    keywords = dict(steps=1, max_text_tokens=8, progress=False)
    image, = generate(flux, "a red apple", controlnet=(net, EDGES), **keywords)
    assert image.size == (32, 16) and image.info["guidance"] == 7.0
    image, = generate(flux, "a red apple", **keywords)
    assert image.info["guidance"] == 3.5


def test_modes_have_names(flux, union):
    depth, number, pose = (sampled(flux, (union, EDGES, 1.0, 0.0, 1.0, mode))
                           for mode in ("depth", MODES["depth"], "pose"))
    assert torch.equal(depth, number) and not torch.equal(depth, pose)


def test_control_images_are_cropped_like_the_image_around_a_mask(flux, net):
    """What lies outside the region around the mask cannot matter; what lies inside does."""
    mask = Image.new("L", (96, 64))
    mask.paste(255, (8, 8, 24, 24))
    near, far = (Image.effect_noise((96, 64), 90).convert("RGB") for _ in range(2))
    far.paste(near.crop((0, 0, 48, 64)))
    other = Image.effect_noise((96, 64), 90).convert("RGB")
    keywords = SMALL | dict(width=32, height=32, mask_padding=8)
    a, b, c = (inpaint(flux, "an owl", EDGES.resize((96, 64)), mask, controlnet=(net, control),
                       **keywords) for control in (near, far, other))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


def test_a_net_with_guidance_steers_a_model_without(tmp_path, net):
    """schnell has no guidance embedding, the net has: it gets the guidance of the call."""
    schnell = load(small_pipeline(tmp_path / "flux", guidance=False), device="cpu")
    weak, strong = (sampled(schnell, (net, EDGES), guidance=guidance) for guidance in (2.0, 8.0))
    assert not torch.allclose(weak, strong, atol=1e-3)


@pytest.mark.parametrize("control, sentence", [
    (lambda net, union: (net,), "expected .net, image, scale, start, end, mode."),
    (lambda net, union: [net, EDGES], "expected .net, image, scale, start, end, mode."),
    (lambda net, union: ("net.safetensors", EDGES), "with a net of load_controlnet"),
    (lambda net, union: (net, "missing.png"), "the control image missing.png does not exist"),
    (lambda net, union: (net, EDGES, "much"), "the scale of a ControlNet is 'much'"),
    (lambda net, union: (net, EDGES, float("nan")), "the scale of a ControlNet is nan"),
    (lambda net, union: (net, EDGES, 1.0, 0.5, 0.4),
     "the end of a ControlNet is 0.4: expected a number from 0.5 to 1"),
    (lambda net, union: (net, EDGES, 1.0, -0.1), "the start of a ControlNet is -0.1"),
    (lambda net, union: (union, EDGES),
     "the mode is None: this union net needs a number below 7, or one of canny, tile"),
    (lambda net, union: (union, EDGES, 1.0, 0.0, 1.0, 7), "the mode is 7"),
    (lambda net, union: (union, EDGES, 1.0, 0.0, 1.0, "cany"), "the mode is 'cany'"),
    (lambda net, union: (net, EDGES, 1.0, 0.0, 1.0, 0), "has one kind of control only"),
    (lambda net, union: (net, [EDGES, EDGES, EDGES]), "3 images are given for 1 to paint"),
])
def test_a_wrong_controlnet_gets_one_sentence(flux, net, union, control, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        sampled(flux, control(net, union))


def test_a_controlnet_of_another_width_gets_one_sentence(flux, tmp_path):
    from diffusers import FluxControlNetModel
    FluxControlNetModel(
        in_channels=64, num_layers=1, num_single_layers=0, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8)).save_pretrained(tmp_path)
    net = load_controlnet(tmp_path, device="cpu")
    message = "made for another model: its hidden_size is 32, that of flux is 48"
    with pytest.raises(ValueError, match=message):
        image_to_image(flux, "a red apple", EDGES, controlnet=(net, EDGES))
