"""ControlNets in a call. Oracles: by hand; a call without them. The pictures are compared with diffusers' in parity/."""

import pytest
import torch
from PIL import Image
from reference import controlnet, small_pipeline

from miniflux import Control, generate, image_to_image, inpaint, load, load_controlnet
from miniflux.controlnet import MODES

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


def paint(flux, controlnet, **keywords):
    keywords = dict(width=48, height=32, steps=2, guidance=3.5, max_text_tokens=8, output="latents", progress=False) | keywords
    return generate(flux, "a red apple", controlnet=controlnet, **keywords)


def test_a_scale_of_zero_an_empty_window_and_an_empty_list_change_nothing(flux, net):
    plain = paint(flux, None)
    for control in ((net, EDGES, 0), (net, EDGES, 1.0, 0.4, 0.5), []):
        assert torch.equal(paint(flux, control), plain)
    assert not torch.allclose(paint(flux, (net, EDGES)), plain, atol=1e-2)


def test_a_net_does_not_run_outside_its_window(flux, net, monkeypatch):
    """Of four steps those that lie within [0.25, 0.75] as a whole: the second and the third."""
    seen, forward = [], type(net).forward
    monkeypatch.setattr(type(net), "forward", lambda self, *args: seen.append(float(args[5][0])) or forward(self, *args))
    times = []
    paint(flux, (net, EDGES, 1.0, 0.25, 0.75), steps=4, on_step=lambda step, t, x: times.append(t))
    assert seen == pytest.approx(times[1:3])


def test_two_nets_add_up_to_one_of_twice_the_scale(flux, net):
    assert torch.allclose(paint(flux, [(net, EDGES, 0.5), Control(net, EDGES, 0.5)]), paint(flux, (net, EDGES, 1.0)), atol=1e-5)


def test_a_batch_equals_its_singles(flux, net):
    batch = generate(flux, ["a red apple", "an owl"], controlnet=(net, [EDGES, EDGES.rotate(180)]), width=48, height=32, steps=2, seed=4,
                     max_text_tokens=8, output="latents", progress=False)
    single = generate(flux, "an owl", controlnet=(net, EDGES.rotate(180)), width=48, height=32, steps=2, seed=5, max_text_tokens=8,
                      output="latents", progress=False)
    assert (batch[1:] - single).abs().max() < 1e-5 * single.abs().max()


def test_the_result_has_the_control_pictures_shape_and_the_guidance_of_the_pipeline(flux, net):
    """32 · 32 pixels in the shape 5 : 3; diffusers' default guidance with a ControlNet is 7."""
    picture, = generate(flux, "a red apple", controlnet=(net, EDGES), steps=1, max_text_tokens=8, progress=False)
    assert picture.size == (32, 16) and picture.info["guidance"] == 7.0
    assert generate(flux, "a red apple", steps=1, max_text_tokens=8, progress=False)[0].info["guidance"] == 3.5


def test_modes_have_names(flux, union):
    assert torch.equal(paint(flux, (union, EDGES, 1.0, 0.0, 1.0, "depth")), paint(flux, (union, EDGES, 1.0, 0.0, 1.0, MODES["depth"])))
    assert not torch.equal(paint(flux, (union, EDGES, 1.0, 0.0, 1.0, "depth")), paint(flux, (union, EDGES, 1.0, 0.0, 1.0, "pose")))


def test_control_pictures_are_cut_like_the_picture_around_a_mask(flux, net):
    """What lies outside the region around the mask cannot matter; what lies inside does."""
    mask = Image.new("L", (96, 64))
    mask.paste(255, (8, 8, 24, 24))
    near, far = (Image.effect_noise((96, 64), 90).convert("RGB") for _ in range(2))
    far.paste(near.crop((0, 0, 48, 64)))
    other = Image.effect_noise((96, 64), 90).convert("RGB")
    a, b, c = (inpaint(flux, "an owl", EDGES.resize((96, 64)), mask, controlnet=(net, control), mask_padding=8, width=32, height=32,
                       steps=2, max_text_tokens=8, output="latents", progress=False) for control in (near, far, other))
    assert torch.equal(a, b) and not torch.allclose(a, c, atol=1e-2)


def test_a_net_with_guidance_steers_a_model_without(tmp_path, net):
    """schnell has no guidance embedding, the net has: it gets the guidance of the call."""
    schnell = load(small_pipeline(tmp_path / "flux", guidance=False), device="cpu")
    assert not torch.allclose(paint(schnell, (net, EDGES), guidance=2.0), paint(schnell, (net, EDGES), guidance=8.0), atol=1e-3)


@pytest.mark.parametrize("control, sentence", [
    (lambda net, union: (net,), "expected .net, image, scale, start, end, mode."),
    (lambda net, union: [net, EDGES], "expected .net, image, scale, start, end, mode."),
    (lambda net, union: ("net.safetensors", EDGES), "with a net of load_controlnet"),
    (lambda net, union: (net, "missing.png"), "the control image missing.png does not exist"),
    (lambda net, union: (net, EDGES, "much"), "the scale of a ControlNet is 'much'"),
    (lambda net, union: (net, EDGES, float("nan")), "the scale of a ControlNet is nan"),
    (lambda net, union: (net, EDGES, 1.0, 0.5, 0.4), "the end of a ControlNet is 0.4: expected a number from 0.5 to 1"),
    (lambda net, union: (net, EDGES, 1.0, -0.1), "the start of a ControlNet is -0.1"),
    (lambda net, union: (union, EDGES), "the mode is None: this union net needs a number below 7, or one of canny, tile"),
    (lambda net, union: (union, EDGES, 1.0, 0.0, 1.0, 7), "the mode is 7"),
    (lambda net, union: (union, EDGES, 1.0, 0.0, 1.0, "cany"), "the mode is 'cany'"),
    (lambda net, union: (net, EDGES, 1.0, 0.0, 1.0, 0), "knows one kind of control only"),
    (lambda net, union: (net, [EDGES, EDGES, EDGES]), "3 images are given for 1 to paint"),
])
def test_a_wrong_controlnet_gets_one_sentence(flux, net, union, control, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        paint(flux, control(net, union))


def test_a_controlnet_of_another_width_gets_one_sentence(flux, tmp_path):
    from diffusers import FluxControlNetModel
    FluxControlNetModel(in_channels=64, num_layers=1, num_single_layers=0, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32,
                        pooled_projection_dim=24, axes_dims_rope=(4, 4, 8)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for another model: its hidden_size is 32, that of flux is 48"):
        image_to_image(flux, "a red apple", EDGES, controlnet=(load_controlnet(tmp_path, device="cpu"), EDGES))
