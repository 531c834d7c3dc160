"""Compiled blocks. Oracle: the model that is not compiled, whose pictures they must paint but for float32 rounding."""

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

BOUND = 1e-5                                                                    # of the largest latent
PICTURE = Image.effect_noise((64, 48), 90).convert("RGB")


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return load(small_pipeline(tmp_path_factory.mktemp("compiling") / "flux"), device="cpu")


def paint(flux, prompt="a red apple", **keywords):
    keywords = dict(width=64, height=48, steps=2, seed=7, max_text_tokens=24, output="latents", progress=False) | keywords
    return generate(flux, prompt, **keywords)


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
    """Two double and three single blocks, in the sizes of three pictures; a batch of one is a size of its own to the compiler."""
    backend = Counting()
    compiled = compile(flux, backend)
    for size in ((64, 48), (96, 48), (80, 112)):
        assert difference(paint(compiled, width=size[0], height=size[1]), paint(flux, width=size[0], height=size[1])) < BOUND
        assert len(backend.graphs) == 2
    for count in (2, 3, 4):
        assert difference(paint(compiled, num_images=count), paint(flux, num_images=count)) < BOUND
        assert len(backend.graphs) == 4
    paint(compiled, max_text_tokens=7)
    assert len(backend.graphs) <= 6


@pytest.mark.parametrize("attention", ["auto", "sdpa", "formula"])
def test_the_picture_is_that_of_the_model(flux, attention):
    with attention_backend(attention):
        keywords = dict(prompt=["a red apple", "two owls"], true_cfg=2.0, negative_prompt="a cat")
        assert difference(paint(compile(flux, "aot_eager"), **keywords), paint(flux, **keywords)) < BOUND


def test_residuals_and_further_keys_enter_compiled_blocks(flux, tmp_path):
    save_file(ip_adapter_state(), tmp_path / "ip.safetensors")
    clip_vision().save_pretrained(tmp_path / "image_encoder")
    controlnet().save_pretrained(tmp_path / "net")
    flux = add_ip_adapter(flux, tmp_path / "ip.safetensors")
    keywords = dict(ip_image=PICTURE, controlnet=(load_controlnet(tmp_path / "net", device="cpu"), PICTURE, 0.5))
    assert difference(paint(compile(flux, "eager"), **keywords), paint(flux, **keywords)) < BOUND


def lora(path, generator=torch.Generator().manual_seed(0)):
    state = {}
    for module, inside, out in (("single_blocks.1.linear1", 48, 48 * 7), ("double_blocks.1.img_attn.proj", 48, 48)):
        state[f"diffusion_model.{module}.lora_A.weight"] = 0.1 * torch.randn(4, inside, generator=generator)
        state[f"diffusion_model.{module}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    save_file(state, path)
    return path


@pytest.mark.parametrize("merge", [True, False])
def test_a_lora_may_be_added_before_or_after(flux, tmp_path, merge):
    file = lora(tmp_path / "lora.safetensors")
    expected = paint(add_lora(flux, file, merge=merge))
    assert difference(paint(compile(add_lora(flux, file, merge=merge), "eager")), expected) < BOUND
    assert difference(paint(add_lora(compile(flux, "eager"), file, merge=merge)), expected) < BOUND
    assert difference(paint(flux), expected) > 100 * BOUND


def test_a_cache_around_compiled_blocks_leaves_out_the_same_steps(flux):
    cached = cache(flux, threshold=0.5)
    assert difference(paint(cache(compile(flux, "eager"), threshold=0.5), steps=6), paint(cached, steps=6)) < BOUND


def test_quantised_weights_may_be_compiled(flux):
    small = quantize(flux, "int8", parts=("mmdit",))
    assert difference(paint(compile(small, "eager")), paint(small)) < BOUND


def test_the_model_that_was_compiled_stays_as_it_is(flux):
    backend = Counting()
    compiled = compile(flux, backend)
    assert list(compiled.mmdit.state_dict()) == list(flux.mmdit.state_dict())
    assert all(a is b for a, b in zip(compiled.mmdit.parameters(), flux.mmdit.parameters(), strict=True))
    paint(flux)
    assert not backend.graphs


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a C++ compiler")
def test_the_compiler_of_pytorch_paints_the_same_picture(flux):
    compiled = compile(flux)
    assert difference(paint(compiled, steps=1), paint(flux, steps=1)) < BOUND
    assert difference(paint(compiled, steps=1, width=96), paint(flux, steps=1, width=96)) < BOUND


def test_a_backend_that_is_not_there_gets_one_sentence(flux):
    with pytest.raises(ValueError, match="there is no backend 'inductr' to compile with: expected one of .*inductor"):
        compile(flux, "inductr")


def test_what_has_to_come_later_gets_one_sentence(flux):
    with pytest.raises(ValueError, match="this model is cached already: compile the model as it was before"):
        compile(cache(flux), "eager")
    with pytest.raises(ValueError, match="this model is compiled already"):
        compile(compile(flux, "eager"), "eager")
