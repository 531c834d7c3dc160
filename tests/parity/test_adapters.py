"""ControlNets and IP-Adapters in whole tasks equal diffusers' pipelines: the same small random models, seed and pictures (<= 1e-3)."""

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
from pipelines import box_mask, difference, mean_of_the_posterior, picture  # noqa: F401
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


# --------------------------------------------------------------------------------------------------------- ControlNet

NETS = {
    "plain": dict(), "union": dict(modes=4), "doubles only": dict(layers=(2, 0), seed=7), "xlabs": dict(layers=(2, 0), hint=True),
    "other": dict(seed=11), "without guidance": dict(guidance=False),
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


CONTROL = picture(140, 90, 2)


@pytest.mark.parametrize("name, mode", [("plain", None), ("union", 2), ("doubles only", None), ("xlabs", None), ("without guidance", None)])
def test_generate_with_a_controlnet(folder, nets, name, mode):
    ours, theirs = nets[name]
    keywords = dict(width=96, height=64, steps=3, guidance=4.0)
    got = difference(generate, FluxControlNetPipeline, folder, {}, parts={"controlnet": theirs}, **keywords,
                     ours=dict(controlnet=(ours, CONTROL, 0.7, 0.0, 1.0, mode)),
                     theirs=dict(control_image=CONTROL, control_mode=mode, controlnet_conditioning_scale=0.7))
    assert got < BOUND
    assert difference(generate, FluxPipeline, folder, {}, **keywords, ours=dict(controlnet=(ours, CONTROL, 0.7, 0.0, 1.0, mode))) > 0.01


@pytest.mark.parametrize("start, end", [(0.0, 0.5), (0.3, 1.0), (0.25, 0.75), (0.1, 0.2)])
def test_a_controlnet_acts_in_a_part_of_the_steps(folder, nets, start, end):
    ours, theirs = nets["plain"]
    assert difference(generate, FluxControlNetPipeline, folder, {}, parts={"controlnet": theirs}, width=64, height=64, steps=4,
                      ours=dict(controlnet=(ours, CONTROL, 1.0, start, end), guidance=7.0),
                      theirs=dict(control_image=CONTROL, control_guidance_start=start, control_guidance_end=end)) < BOUND


def test_the_residuals_of_the_prompt_serve_both_passes_of_true_cfg(folder, nets):
    ours, theirs = nets["plain"]
    assert difference(generate, FluxControlNetPipeline, folder, {}, parts={"controlnet": theirs}, width=64, height=64, steps=3,
                      guidance=3.5, true_cfg=3.0, negative_prompt="a blue cat", ours=dict(controlnet=(ours, CONTROL)),
                      theirs=dict(control_image=CONTROL)) < BOUND


def test_several_pictures_of_several_prompts(folder, nets):
    """The pipeline repeats a single control picture once too often for num_images: two prompts, one picture each."""
    ours, theirs = nets["plain"]
    pictures = [picture(64, 48), picture(64, 48, 5)]
    assert difference(generate, FluxControlNetPipeline, folder, {}, prompt=["a red apple", "an owl at night"], width=64, height=48,
                      parts={"controlnet": theirs}, steps=2, guidance=3.5, ours=dict(controlnet=(ours, pictures)),
                      theirs=dict(control_image=pictures)) < BOUND


def test_two_nets_are_added(folder, nets):
    first, second = picture(140, 90, 2), picture(50, 50, 3)
    assert difference(generate, FluxControlNetPipeline, folder, {}, width=64, height=64, steps=3, guidance=3.5,
                      parts={"controlnet": FluxMultiControlNetModel([nets["plain"][1], nets["other"][1]])},
                      ours=dict(controlnet=[(nets["plain"][0], first, 0.5, 0.0, 0.7), (nets["other"][0], second, 0.8)]),
                      theirs=dict(control_image=[first, second], controlnet_conditioning_scale=[0.5, 0.8],
                                  control_guidance_start=[0.0, 0.0], control_guidance_end=[0.7, 1.0])) < BOUND


def test_one_union_net_serves_two_pictures(folder, nets):
    """The pipeline takes a list of one net for several pictures."""
    ours, theirs = nets["union"]
    first, second = picture(140, 90, 2), picture(50, 50, 3)
    assert difference(generate, FluxControlNetPipeline, folder, {}, width=64, height=64, steps=2, guidance=3.5,
                      parts={"controlnet": FluxMultiControlNetModel([theirs])},
                      ours=dict(controlnet=[(ours, first, 0.5, 0.0, 1.0, "canny"), (ours, second, 0.8, 0.0, 1.0, 2)]),
                      theirs=dict(control_image=[first, second], control_mode=[0, 2], controlnet_conditioning_scale=[0.5, 0.8],
                                  control_guidance_start=[0.0, 0.0], control_guidance_end=[1.0, 1.0])) < BOUND


@pytest.mark.parametrize("name, mode", [("plain", None), ("union", 3), ("xlabs", None)])
def test_image_to_image_with_a_controlnet(folder, nets, name, mode):
    ours, theirs = nets[name]
    assert difference(image_to_image, FluxControlNetImg2ImgPipeline, folder, {"image": picture(80, 80)}, parts={"controlnet": theirs},
                      width=96, height=64, steps=4, strength=0.7, guidance=5.0,
                      ours=dict(controlnet=(ours, CONTROL, 0.7, 0.0, 0.8, mode)),
                      theirs=dict(control_image=CONTROL, control_mode=mode, controlnet_conditioning_scale=0.7,
                                  control_guidance_end=0.8)) < BOUND


@pytest.mark.parametrize("name, mode", [("plain", None), ("union", 3), ("doubles only", None)])
def test_inpaint_with_a_controlnet(folder, nets, name, mode):
    ours, theirs = nets[name]
    images = {"image": picture(80, 80), "mask": box_mask(80, 80, (20, 20, 70, 60))}
    assert difference(inpaint, FluxControlNetInpaintPipeline, folder, images, parts={"controlnet": theirs},
                      width=96, height=64, steps=4, strength=0.7, guidance=5.0,
                      ours=dict(controlnet=(ours, CONTROL, 0.7, 0.2, 1.0, mode)),
                      theirs=dict(control_image=CONTROL, control_mode=mode, controlnet_conditioning_scale=0.7,
                                  control_guidance_start=0.2)) < BOUND


# --------------------------------------------------------------------------------------------------------- IP-Adapter


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """A folder with image_encoder/ and two IP-Adapters."""
    path = tmp_path_factory.mktemp("ip")
    clip_vision().save_pretrained(path / "image_encoder")
    save_file(ip_adapter_state(), path / "first.safetensors")
    save_file(ip_adapter_state(seed=10), path / "second.safetensors")
    return path


def follow(adapters, count: int, scale=1.0):
    """Adds the first `count` adapters to either side, and the scale to the pipeline."""
    names = ["first.safetensors", "second.safetensors"][:count]

    def adapt(flux):
        for name in names:
            flux = add_ip_adapter(flux, adapters / name)
        return flux

    def adapt_theirs(pipeline):
        pipeline.load_ip_adapter(str(adapters), weight_name=names, image_encoder_pretrained_model_name_or_path=str(adapters / "image_encoder"),
                                 image_encoder_dtype=torch.float32)
        pipeline.set_ip_adapter_scale(scale)

    return dict(adapt=adapt, adapt_theirs=adapt_theirs)


FOLLOWED, SECOND, AVOIDED = picture(75, 50, 3), picture(40, 61, 4), picture(30, 30, 5)


@pytest.mark.parametrize("scale", [1.0, 0.6, [0.3, 0.9]], ids=str)
def test_generate_after_a_picture(folder, adapters, scale):
    both = dict(width=96, height=64, steps=3, **follow(adapters, 1, scale), theirs=dict(ip_adapter_image=FOLLOWED))
    assert difference(generate, FluxPipeline, folder, {}, **both, ours=dict(ip_image=FOLLOWED, ip_scale=scale)) < BOUND
    assert difference(generate, FluxPipeline, folder, {}, **both) > 0.1


@pytest.mark.parametrize("avoided", [None, AVOIDED], ids=["black", "a picture"])
def test_true_cfg_with_a_picture_to_avoid(folder, adapters, avoided):
    assert difference(generate, FluxPipeline, folder, {}, width=64, height=64, steps=3, true_cfg=4.0, negative_prompt="",
                      **follow(adapters, 1, [0.3, 0.9]), ours=dict(ip_image=FOLLOWED, ip_scale=[0.3, 0.9], negative_ip_image=avoided),
                      theirs=dict(ip_adapter_image=FOLLOWED, negative_ip_adapter_image=avoided)) < BOUND


def test_only_a_picture_to_avoid(folder, adapters):
    assert difference(generate, FluxPipeline, folder, {}, width=64, height=64, steps=2, true_cfg=4.0, negative_prompt="",
                      **follow(adapters, 1), ours=dict(negative_ip_image=AVOIDED), theirs=dict(negative_ip_adapter_image=AVOIDED)) < BOUND


def test_two_adapters_with_scales_of_their_own(folder, adapters):
    scales = [0.7, [0.2, 1.1]]
    assert difference(generate, FluxPipeline, folder, {}, width=64, height=64, steps=3, true_cfg=2.0, negative_prompt="a blue cat",
                      **follow(adapters, 2, scales), ours=dict(ip_image=[FOLLOWED, SECOND], ip_scale=scales),
                      theirs=dict(ip_adapter_image=[FOLLOWED, SECOND])) < BOUND


def test_two_pictures_for_one_adapter_and_two_prompts(folder, adapters):
    assert difference(generate, FluxPipeline, folder, {}, prompt=["a red apple", "an owl at night"], width=64, height=48, steps=2,
                      **follow(adapters, 1), ours=dict(ip_image=[[FOLLOWED, SECOND]]),
                      theirs=dict(ip_adapter_image=[[FOLLOWED, SECOND]])) < BOUND


@pytest.mark.parametrize("task, pipeline, images", [
    (image_to_image, FluxImg2ImgPipeline, {"image": picture(80, 80)}),
    (inpaint, FluxInpaintPipeline, {"image": picture(80, 80), "mask": box_mask(80, 80, (20, 20, 70, 60))}),
    (kontext_edit, FluxKontextPipeline, {"image": picture(80, 80)}),
], ids=["image_to_image", "inpaint", "kontext_edit"])
def test_other_tasks_follow_a_picture(folder, adapters, task, pipeline, images):
    kontext = task is kontext_edit
    assert difference(task, pipeline, folder, images, width=64, height=64, steps=3, true_cfg=2.0, negative_prompt="a blue cat",
                      **follow(adapters, 1, 0.8), ours=dict(ip_image=FOLLOWED, ip_scale=0.8) | (dict(auto_resize=False) if kontext else {}),
                      theirs=dict(ip_adapter_image=FOLLOWED) | (dict(max_area=64 * 64, _auto_resize=False) if kontext else {})) < BOUND


def test_a_controlnet_and_a_picture_together(folder, nets, adapters):
    ours, theirs = nets["plain"]
    assert difference(generate, FluxControlNetPipeline, folder, {}, parts={"controlnet": theirs}, width=64, height=64, steps=3,
                      guidance=3.5, **follow(adapters, 1), ours=dict(controlnet=(ours, CONTROL), ip_image=FOLLOWED),
                      theirs=dict(control_image=CONTROL, ip_adapter_image=FOLLOWED)) < BOUND
