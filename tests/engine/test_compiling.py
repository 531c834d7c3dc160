"""Compiled blocks. Oracle: the model that is not compiled, whose images they must generate
up to float32 rounding."""

import shutil

import pytest
import torch
from PIL import Image
from reference import clip_vision, controlnet, ip_adapter_state, small_pipeline
from safetensors.torch import save_file

from miniflux import add_ip_adapter, add_lora, generate, load, load_controlnet
from miniflux.engine.caching import cache
from miniflux.engine.compiling import compile
from miniflux.engine.quantize import quantize
from miniflux.networks.attention import attention_backend

BOUND = 1e-5  # of the largest latent
IMAGE = Image.effect_noise((64, 48), 90).convert("RGB")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return load(small_pipeline(tmp_path_factory.mktemp("compiling") / "flux"), device="cpu")


def paint(flux, prompt="a red apple", **keywords):
    settings = dict(width=64, height=48, steps=2, seed=7, max_text_tokens=24, output="latents",
                    progress=False)
    return generate(flux, prompt, **settings | keywords)


def difference(a, b):
    return float((a - b).abs().max() / b.abs().max())


class Counting:
    """A backend that runs what it is given as it is, and keeps it."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph, inputs):
        self.graphs.append(graph)
        return graph.forward


def test_two_graphs_serve_all_blocks_and_all_sizes(flux):
    """Two double and three single blocks, in the sizes of three images.
    A batch of one is a size of its own to the compiler."""
    backend = Counting()
    compiled = compile(flux, backend)
    for width, height in ((64, 48), (96, 48), (80, 112)):
        expected = paint(flux, width=width, height=height)
        assert difference(paint(compiled, width=width, height=height), expected) < BOUND
        assert len(backend.graphs) == 2
    for count in (2, 3, 4):
        expected = paint(flux, num_images=count)
        assert difference(paint(compiled, num_images=count), expected) < BOUND
        assert len(backend.graphs) == 4
    paint(compiled, max_text_tokens=7)
    assert len(backend.graphs) <= 6


@pytest.mark.parametrize("attention", ["auto", "sdpa", "formula"])
def test_the_image_is_that_of_the_model(flux, attention):
    keywords = dict(prompt=["a red apple", "two owls"], true_cfg=2.0, negative_prompt="a cat")
    compiled = compile(flux, "aot_eager")
    with attention_backend(attention):
        assert difference(paint(compiled, **keywords), paint(flux, **keywords)) < BOUND


def test_residuals_and_further_keys_enter_compiled_blocks(flux, tmp_path):
    save_file(ip_adapter_state(), tmp_path / "ip.safetensors")
    clip_vision().save_pretrained(tmp_path / "image_encoder")
    controlnet().save_pretrained(tmp_path / "net")
    flux = add_ip_adapter(flux, tmp_path / "ip.safetensors")
    net = load_controlnet(tmp_path / "net", device="cpu")
    keywords = dict(ip_image=IMAGE, controlnet=(net, IMAGE, 0.5))
    assert difference(paint(compile(flux, "eager"), **keywords), paint(flux, **keywords)) < BOUND


def lora(path, mmdit):
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in ("single_blocks.1.linear1", "double_blocks.1.img_attn.proj"):
        layer = mmdit.get_submodule(name)
        down = 0.1 * torch.randn(4, layer.in_features, generator=generator)
        up = 0.1 * torch.randn(layer.out_features, 4, generator=generator)
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, path)
    return path


@pytest.mark.parametrize("merge", [True, False])
def test_a_lora_may_be_added_before_or_after(flux, tmp_path, merge):
    file = lora(tmp_path / "lora.safetensors", flux.mmdit)
    changed = add_lora(flux, file, merge=merge)
    expected = paint(changed)
    after = add_lora(compile(flux, "eager"), file, merge=merge)
    assert difference(paint(compile(changed, "eager")), expected) < BOUND
    assert difference(paint(after), expected) < BOUND
    assert difference(paint(flux), expected) > 100 * BOUND


def test_a_cache_around_compiled_blocks_leaves_out_the_same_steps(flux):
    expected = paint(cache(flux, threshold=0.5), steps=6)
    compiled = cache(compile(flux, "eager"), threshold=0.5)
    assert difference(paint(compiled, steps=6), expected) < BOUND


def test_quantised_weights_may_be_compiled(flux):
    small = quantize(flux, "int8", parts=("mmdit",))
    assert difference(paint(compile(small, "eager")), paint(small)) < BOUND


def test_the_model_that_was_compiled_stays_as_it_is(flux):
    backend = Counting()
    compiled = compile(flux, backend)
    assert list(compiled.mmdit.state_dict()) == list(flux.mmdit.state_dict())
    for a, b in zip(compiled.mmdit.parameters(), flux.mmdit.parameters(), strict=True):
        assert a is b
    paint(flux)
    assert not backend.graphs


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None,
                    reason="inductor needs a C++ compiler")
def test_the_compiler_of_pytorch_generates_the_same_image(flux):
    compiled = compile(flux)
    for width in (64, 96):
        expected = paint(flux, steps=1, width=width)
        assert difference(paint(compiled, steps=1, width=width), expected) < BOUND


def test_a_backend_that_is_not_there_gets_one_sentence(flux):
    sentence = "there is no backend 'inductr' to compile with: expected one of .*inductor"
    with pytest.raises(ValueError, match=sentence):
        compile(flux, "inductr")


def test_what_has_to_come_later_gets_one_sentence(flux):
    with pytest.raises(ValueError, match="this model is compiled already"):
        compile(compile(flux, "eager"), "eager")
