"""ControlNets and IP-Adapters in whole tasks equal diffusers' pipelines (<= 1e-3).

Both have the same small random models, seed and images."""

import pytest
import torch
from diffusers import (
    FluxControlNetImg2ImgPipeline,
    FluxControlNetInpaintPipeline,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
)
from pipelines import box_mask, difference, mean_of_the_posterior, smooth_noise  # noqa: F401
from reference import clip_vision, controlnet, ip_adapter_state, small_pipeline
from safetensors.torch import save_file

from miniflux import (
    add_ip_adapter,
    generate,
    image_to_image,
    inpaint,
    kontext_edit,
    load_controlnet,
)

BOUND = 1e-3


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("adapters") / "flux")


# --------------------------------------------------------------------------------------- ControlNet

NETS = {
    "plain": dict(),
    "union": dict(modes=4),
    "doubles only": dict(layers=(2, 0), seed=7),
    "xlabs": dict(layers=(2, 0), hint=True),
    "other": dict(seed=11),
    "without guidance": dict(guidance=False),
}


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """Name -> (our net, theirs)."""
    made = {}
    for name, sizes in NETS.items():
        path = tmp_path_factory.mktemp("net") / "net"
        controlnet(**sizes).save_pretrained(path)
        made[name] = load_controlnet(path, device="cpu"), controlnet(**sizes)
    return made


CONTROL = smooth_noise(140, 90, 2)


def difference_with_net(folder, net, **keywords):
    """The difference of `generate` with a ControlNet of diffusers' in the pipeline."""
    return difference(generate, FluxControlNetPipeline, folder, {},
                      parts={"controlnet": net}, **keywords)


@pytest.mark.parametrize("name, mode", [
    ("plain", None),
    ("union", 2),
    ("doubles only", None),
    ("xlabs", None),
    ("without guidance", None),
])
def test_generate_with_a_controlnet(folder, nets, name, mode):
    net, their_net = nets[name]
    settings = dict(width=96, height=64, steps=3, guidance=4.0)
    ours = dict(controlnet=(net, CONTROL, 0.7, 0.0, 1.0, mode))
    theirs = dict(
        control_image=CONTROL,
        control_mode=mode,
        controlnet_conditioning_scale=0.7,
    )
    assert difference_with_net(folder, their_net, **settings, ours=ours, theirs=theirs) < BOUND
    # The ControlNet matters: without it the pipeline's image is another.
    assert difference(generate, FluxPipeline, folder, {}, **settings, ours=ours) > 0.01


@pytest.mark.parametrize("start, end", [(0.0, 0.5), (0.3, 1.0), (0.25, 0.75), (0.1, 0.2)])
def test_a_controlnet_acts_in_a_part_of_the_steps(folder, nets, start, end):
    net, their_net = nets["plain"]
    ours = dict(controlnet=(net, CONTROL, 1.0, start, end), guidance=7.0)
    theirs = dict(
        control_image=CONTROL,
        control_guidance_start=start,
        control_guidance_end=end,
    )
    got = difference_with_net(folder, their_net, width=64, height=64, steps=4,
                              ours=ours, theirs=theirs)
    assert got < BOUND


def test_the_residuals_of_the_prompt_serve_both_passes_of_true_cfg(folder, nets):
    net, their_net = nets["plain"]
    settings = dict(width=64, height=64, steps=3, guidance=3.5)
    got = difference_with_net(folder, their_net, **settings,
                              true_cfg=3.0, negative_prompt="a blue cat",
                              ours=dict(controlnet=(net, CONTROL)),
                              theirs=dict(control_image=CONTROL))
    assert got < BOUND


def test_several_images_for_several_prompts(folder, nets):
    """Two prompts, one image each.

    The pipeline repeats a single control image once too often for num_images."""
    net, their_net = nets["plain"]
    images = [smooth_noise(64, 48), smooth_noise(64, 48, 5)]
    settings = dict(width=64, height=48, steps=2, guidance=3.5)
    got = difference_with_net(folder, their_net, prompt=["a red apple", "an owl at night"],
                              **settings,
                              ours=dict(controlnet=(net, images)),
                              theirs=dict(control_image=images))
    assert got < BOUND


def test_two_nets_are_added(folder, nets):
    plain, their_plain = nets["plain"]
    other, their_other = nets["other"]
    both_nets = FluxMultiControlNetModel([their_plain, their_other])
    first, second = smooth_noise(140, 90, 2), smooth_noise(50, 50, 3)
    ours = dict(controlnet=[(plain, first, 0.5, 0.0, 0.7), (other, second, 0.8)])
    theirs = dict(
        control_image=[first, second],
        controlnet_conditioning_scale=[0.5, 0.8],
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=[0.7, 1.0],
    )
    settings = dict(width=64, height=64, steps=3, guidance=3.5)
    assert difference_with_net(folder, both_nets, **settings, ours=ours, theirs=theirs) < BOUND


def test_one_union_net_serves_two_images(folder, nets):
    """The pipeline takes a list of one net for several images."""
    net, their_net = nets["union"]
    one_net = FluxMultiControlNetModel([their_net])
    first, second = smooth_noise(140, 90, 2), smooth_noise(50, 50, 3)
    ours = dict(controlnet=[
        (net, first, 0.5, 0.0, 1.0, "canny"),
        (net, second, 0.8, 0.0, 1.0, 2),
    ])
    theirs = dict(
        control_image=[first, second],
        control_mode=[0, 2],
        controlnet_conditioning_scale=[0.5, 0.8],
        control_guidance_start=[0.0, 0.0],
        control_guidance_end=[1.0, 1.0],
    )
    settings = dict(width=64, height=64, steps=2, guidance=3.5)
    assert difference_with_net(folder, one_net, **settings, ours=ours, theirs=theirs) < BOUND


@pytest.mark.parametrize("name, mode", [("plain", None), ("union", 3), ("xlabs", None)])
def test_image_to_image_with_a_controlnet(folder, nets, name, mode):
    net, their_net = nets[name]
    images = {"image": smooth_noise(80, 80)}
    settings = dict(width=96, height=64, steps=4, strength=0.7, guidance=5.0)
    ours = dict(controlnet=(net, CONTROL, 0.7, 0.0, 0.8, mode))
    theirs = dict(
        control_image=CONTROL,
        control_mode=mode,
        controlnet_conditioning_scale=0.7,
        control_guidance_end=0.8,
    )
    got = difference(image_to_image, FluxControlNetImg2ImgPipeline, folder, images,
                     parts={"controlnet": their_net}, **settings, ours=ours, theirs=theirs)
    assert got < BOUND


@pytest.mark.parametrize("name, mode", [("plain", None), ("union", 3), ("doubles only", None)])
def test_inpaint_with_a_controlnet(folder, nets, name, mode):
    net, their_net = nets[name]
    images = {"image": smooth_noise(80, 80), "mask": box_mask(80, 80, (20, 20, 70, 60))}
    settings = dict(width=96, height=64, steps=4, strength=0.7, guidance=5.0)
    ours = dict(controlnet=(net, CONTROL, 0.7, 0.2, 1.0, mode))
    theirs = dict(
        control_image=CONTROL,
        control_mode=mode,
        controlnet_conditioning_scale=0.7,
        control_guidance_start=0.2,
    )
    got = difference(inpaint, FluxControlNetInpaintPipeline, folder, images,
                     parts={"controlnet": their_net}, **settings, ours=ours, theirs=theirs)
    assert got < BOUND


# --------------------------------------------------------------------------------------- IP-Adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with image_encoder/ and two IP-Adapters."""
    path = tmp_path_factory.mktemp("ip")
    clip_vision().save_pretrained(path / "image_encoder")
    save_file(ip_adapter_state(), path / "first.safetensors")
    save_file(ip_adapter_state(seed=10), path / "second.safetensors")
    return path


def follow(adapters, count: int, scale=1.0):
    """Keywords that add the first `count` adapters to both sides, and the scale to the pipeline."""
    names = ["first.safetensors", "second.safetensors"][:count]

    def adapt(flux):
        for name in names:
            flux = add_ip_adapter(flux, adapters / name)
        return flux

    def adapt_theirs(pipeline):
        pipeline.load_ip_adapter(
            str(adapters),
            weight_name=names,
            image_encoder_pretrained_model_name_or_path=str(adapters / "image_encoder"),
            image_encoder_dtype=torch.float32,
        )
        pipeline.set_ip_adapter_scale(scale)

    return dict(adapt=adapt, adapt_theirs=adapt_theirs)


FOLLOWED = smooth_noise(75, 50, 3)
SECOND = smooth_noise(40, 61, 4)
AVOIDED = smooth_noise(30, 30, 5)


@pytest.mark.parametrize("scale", [1.0, 0.6, [0.3, 0.9]], ids=str)
def test_generate_after_an_image(folder, adapters, scale):
    both = dict(width=96, height=64, steps=3, **follow(adapters, 1, scale))
    both["theirs"] = dict(ip_adapter_image=FOLLOWED)
    ours = dict(ip_image=FOLLOWED, ip_scale=scale)
    assert difference(generate, FluxPipeline, folder, {}, **both, ours=ours) < BOUND
    # The adapter matters: without the image ours is another.
    assert difference(generate, FluxPipeline, folder, {}, **both) > 0.1


@pytest.mark.parametrize("avoided", [None, AVOIDED], ids=["black", "an image"])
def test_true_cfg_with_an_image_to_avoid(folder, adapters, avoided):
    scale = [0.3, 0.9]
    settings = dict(width=64, height=64, steps=3, true_cfg=4.0, negative_prompt="")
    ours = dict(ip_image=FOLLOWED, ip_scale=scale, negative_ip_image=avoided)
    theirs = dict(ip_adapter_image=FOLLOWED, negative_ip_adapter_image=avoided)
    got = difference(generate, FluxPipeline, folder, {}, **settings,
                     **follow(adapters, 1, scale), ours=ours, theirs=theirs)
    assert got < BOUND


def test_only_an_image_to_avoid(folder, adapters):
    settings = dict(width=64, height=64, steps=2, true_cfg=4.0, negative_prompt="")
    got = difference(generate, FluxPipeline, folder, {}, **settings, **follow(adapters, 1),
                     ours=dict(negative_ip_image=AVOIDED),
                     theirs=dict(negative_ip_adapter_image=AVOIDED))
    assert got < BOUND


def test_two_adapters_with_scales_of_their_own(folder, adapters):
    scales = [0.7, [0.2, 1.1]]
    images = [FOLLOWED, SECOND]
    settings = dict(width=64, height=64, steps=3, true_cfg=2.0, negative_prompt="a blue cat")
    got = difference(generate, FluxPipeline, folder, {}, **settings,
                     **follow(adapters, 2, scales),
                     ours=dict(ip_image=images, ip_scale=scales),
                     theirs=dict(ip_adapter_image=images))
    assert got < BOUND


def test_two_images_for_one_adapter_and_two_prompts(folder, adapters):
    images = [[FOLLOWED, SECOND]]
    settings = dict(width=64, height=48, steps=2)
    got = difference(generate, FluxPipeline, folder, {}, **settings,
                     prompt=["a red apple", "an owl at night"], **follow(adapters, 1),
                     ours=dict(ip_image=images), theirs=dict(ip_adapter_image=images))
    assert got < BOUND


@pytest.mark.parametrize("task, pipeline", [
    (image_to_image, FluxImg2ImgPipeline),
    (inpaint, FluxInpaintPipeline),
    (kontext_edit, FluxKontextPipeline),
], ids=["image_to_image", "inpaint", "kontext_edit"])
def test_other_tasks_follow_an_image(folder, adapters, task, pipeline):
    images = {"image": smooth_noise(80, 80)}
    settings = dict(width=64, height=64, steps=3, true_cfg=2.0, negative_prompt="a blue cat")
    ours = dict(ip_image=FOLLOWED, ip_scale=0.8)
    theirs = dict(ip_adapter_image=FOLLOWED)
    if task is inpaint:
        images["mask"] = box_mask(80, 80, (20, 20, 70, 60))
    if task is kontext_edit:
        ours |= dict(auto_resize=False)
        theirs |= dict(max_area=64 * 64, _auto_resize=False)
    got = difference(task, pipeline, folder, images, **settings,
                     **follow(adapters, 1, 0.8), ours=ours, theirs=theirs)
    assert got < BOUND


def test_a_controlnet_and_an_image_together(folder, nets, adapters):
    net, their_net = nets["plain"]
    settings = dict(width=64, height=64, steps=3, guidance=3.5)
    got = difference_with_net(folder, their_net, **settings, **follow(adapters, 1),
                              ours=dict(controlnet=(net, CONTROL), ip_image=FOLLOWED),
                              theirs=dict(control_image=CONTROL, ip_adapter_image=FOLLOWED))
    assert got < BOUND
