"""Everything on a device that is not the CPU. Oracle: the same call on the CPU; and a count by hand of
how often the host waits for the device.

On the pretend device (`pretend_device.py`) nothing may be on two devices, in float64 or complex, as on
CUDA and MPS. No step of any mode reads an element back, but one of the first-block cache."""

import functools
import itertools

import pytest
import torch
from PIL import Image
from pretend_device import CPU, PretendDevice, PretendTensor
from reference_vision import small_pixtral, small_vit

from miniflux import (
    add_ip_adapter,
    add_lora,
    cache,
    control,
    encode_prompt,
    fill,
    generate,
    image_to_image,
    inpaint,
    kontext_edit,
    kontext_inpaint,
    load,
    load_controlnet,
    offload,
    precompute_modulation,
    quantize,
    redux,
    tile,
)
from miniflux.imaging.preview import fit_preview, linear_preview
from miniflux.imaging.watermark import add_watermark, read_watermark
from miniflux.networks import native
from miniflux.safety.filters import is_flagged, load_filters
from miniflux.sampling import flow, flow_matching_loss

PRETEND = "pretend:0"
IMAGE = Image.effect_noise((64, 64), 90).convert("RGB")
MASK = Image.new("L", (64, 64))
MASK.paste(255, (0, 0, 32, 40))
SETTINGS = dict(width=64, height=64, steps=3, output="tensor", progress=False)


@functools.cache
def model(name: str, device: str):
    return load(name, device=device, dtype=torch.float32)


@functools.cache
def controlnet(device: str):
    return load_controlnet("tiny-controlnet", device=device, dtype=torch.float32)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch):
    """The compiled kernels are the CPU's alone, and round otherwise."""
    monkeypatch.setattr(native, "_cpu", None)


def both(call) -> tuple[torch.Tensor, torch.Tensor, PretendDevice]:
    """What call(device) returns on the CPU and on the pretend device."""
    expected = call("cpu")
    with PretendDevice() as device:
        result = call(PRETEND)
    return expected, result.raw if isinstance(result, PretendTensor) else result, device


def difference(call) -> float:
    expected, result, _ = both(call)
    return float((result - expected).abs().max())


TASKS = {
    "generate": lambda d: generate(model("tiny", d), "a fox", **SETTINGS),
    "several prompts": lambda d: generate(model("tiny", d), ["a fox", "an owl"], num_images=2, **SETTINGS),
    "true cfg": lambda d: generate(model("tiny", d), "a fox", negative_prompt="a cat", true_cfg=1.5, **SETTINGS),
    "heun": lambda d: generate(model("tiny", d), "a fox", sampler="heun", **SETTINGS),
    "schnell": lambda d: generate(model("tiny-schnell", d), "a fox", **SETTINGS),
    "image_to_image": lambda d: image_to_image(model("tiny", d), "a fox", IMAGE, **SETTINGS),
    "inpaint": lambda d: inpaint(model("tiny", d), "a fox", IMAGE, MASK, **SETTINGS),
    "fill": lambda d: fill(model("tiny-fill", d), "a fox", IMAGE, MASK, **SETTINGS),
    "fill, pasted back": lambda d: fill(model("tiny-fill", d), "a fox", IMAGE, MASK, paste_back=True, **SETTINGS),
    "canny": lambda d: control(model("tiny-canny", d), "a fox", IMAGE, **SETTINGS),
    "canny of an image": lambda d: control(model("tiny-canny", d), "a fox", IMAGE, image=IMAGE, mask=MASK, **SETTINGS),
    "redux": lambda d: redux(model("tiny-redux", d), IMAGE, **SETTINGS),
    "kontext_edit": lambda d: kontext_edit(model("tiny-kontext", d), "remove it", IMAGE, **SETTINGS),
    "kontext_inpaint": lambda d: kontext_inpaint(model("tiny-kontext", d), "a fox", IMAGE, MASK, **SETTINGS),
    "controlnet": lambda d: generate(
        model("tiny", d), "a fox", controlnet=(controlnet(d), IMAGE, 0.7, 0.0, 1.0, "canny"), **SETTINGS),
}


@pytest.mark.parametrize("task", TASKS)
def test_each_task_computes_what_it_computes_on_the_cpu_and_reads_nothing_back(task):
    expected, result, device = both(TASKS[task])
    assert (result - expected).abs().max() < 1e-5
    assert not device.reads


def test_pil_images_are_those_of_the_cpu_but_for_rounding():
    def call(device):
        image, = generate(model("tiny", device), "a fox", **SETTINGS | dict(output="pil"))
        return torch.tensor(list(image.tobytes()))

    assert difference(call) <= 1


# -------------------------------------------------------------------------------------------------------------- features

FEATURES = {
    "lora": lambda flux: add_lora(flux, "tiny-neon"),
    "unmerged lora": lambda flux: add_lora(flux, "tiny-neon", name="again", merge=False),
    "ip": lambda flux: add_ip_adapter(flux, "tiny-ip-adapter"),
    "int8": lambda flux: quantize(flux, "int8"),
    "nf4": lambda flux: quantize(flux, "nf4"),
    "modulation": precompute_modulation,
    "first block": lambda flux: cache(flux, "first_block", threshold=0.3),
    "taylor": lambda flux: cache(flux, "taylor", interval=2, warmup=1),
    "tile": lambda flux: tile(flux, 32),
}
# Elements that are read back in a call of three steps: the first step has nothing to be compared with.
READS = dict.fromkeys(FEATURES, 0) | {"first block": 2}


def call_with(*names: str):
    def call(device: str) -> torch.Tensor:
        flux = model("tiny", device)
        for name in names:
            flux = FEATURES[name](flux)
        more = dict(ip_image=IMAGE) if flux.ip_adapters else {}
        return generate(flux, "a fox", **SETTINGS, **more)

    return call


@pytest.mark.parametrize("names", [(name,) for name in FEATURES], ids=" ".join)
def test_each_feature_computes_what_it_computes_on_the_cpu(names):
    expected, result, device = both(call_with(*names))
    assert (result - expected).abs().max() < 1e-5
    assert sum(device.reads.values()) == READS[names[0]], device.reads


# To the other features, nf4 is like int8; and a model has one cache.
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2) if "nf4" not in pair and pair != ("first block", "taylor")]


@pytest.mark.parametrize("names", PAIRS, ids=" ".join)
def test_so_do_two_features_together(names):
    expected, result, device = both(call_with(*names))
    assert (result - expected).abs().max() < 1e-5
    assert sum(device.reads.values()) == max(READS[name] for name in names), device.reads


@pytest.mark.parametrize("mode", ["modulation", "model", "block", "leaf", "disk"])
@pytest.mark.parametrize("feature", ["unmerged lora", "int8", "first block", "tile"])
def test_an_offloaded_model_computes_it_on_the_device(mode, feature):
    def call(device):
        return generate(offload(FEATURES[feature](model("tiny", "cpu")), device, mode), "a fox", **SETTINGS)

    expected, result, device = both(call)
    assert (result - expected).abs().max() < 1e-5
    assert sum(device.reads.values()) == READS[feature], device.reads


# ---------------------------------------------------------------------------------------------------- what surrounds a call


def test_previews_and_watermarks_are_made_on_the_device():
    def call(device):
        flux, seen = model("tiny", device), []
        table = fit_preview(flux, [IMAGE]).to(device)
        marked = generate(flux, "a fox", **SETTINGS, on_finish=add_watermark,
                          on_step=lambda step, t, x: seen.append(linear_preview(table, x)))
        assert len(read_watermark(marked)) == 1
        return seen[-1]

    assert difference(call) < 1e-4


def test_the_content_filters_answer_what_they_answer_on_the_cpu(tmp_path):
    (tmp_path / "vit").mkdir()
    (tmp_path / "pixtral").mkdir()
    small_vit(tmp_path / "vit")
    small_pixtral(tmp_path / "pixtral")

    def call(device):
        filters = load_filters(tmp_path / "vit", tmp_path / "pixtral", device=device)
        image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)).to(device)
        return torch.tensor([is_flagged(image, filters), is_flagged("a fox", filters)])

    assert difference(lambda device: call(device).float()) == 0


def test_a_step_of_training_changes_the_weights_as_on_the_cpu():
    def call(device):
        torch.manual_seed(0)
        flux = load("tiny", device=device, dtype=torch.float32)
        with torch.no_grad():
            text = encode_prompt(flux, ["a fox", "an owl"])
        z, eps = torch.randn(2, 16, 8, 8).to(device), torch.randn(2, 16, 8, 8).to(device)
        t = torch.tensor([0.3, 0.8]).to(device)
        with torch.enable_grad():
            weights = [weight.requires_grad_() for weight in flux.mmdit.parameters()]
            loss = flow_matching_loss(flow(flux.mmdit, text.txt, text.pooled, 3.5, 8, 8), z, eps, t)
            gradients = torch.autograd.grad(loss, weights)
        changed = [weight.detach() - 0.01 * gradient for weight, gradient in zip(weights, gradients)]
        return torch.cat([weight.flatten() for weight in changed])

    expected, result, device = both(call)
    assert (result - expected).abs().max() < 1e-5 and not device.reads


# ------------------------------------------------------------------------------------------------------- the device itself


def test_the_pretend_device_refuses_what_a_gpu_refuses():
    with PretendDevice() as device:
        here = torch.ones(3, device=PRETEND)
        with pytest.raises(RuntimeError, match="tensors on the pretend device and on cpu"):
            here + torch.ones(3)
        with pytest.raises(RuntimeError, match="float64 on the device"):
            here.double()
        with pytest.raises(RuntimeError, match="complex64 on the device"):
            torch.complex(here, here)
        assert here.device.type == "pretend" and not device.reads
        assert float(here.sum()) == 3 and sum(device.reads.values()) == 1
        assert here.to(CPU).tolist() == [1, 1, 1]
