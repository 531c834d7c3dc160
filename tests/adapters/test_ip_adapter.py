"""IP-Adapter and CLIP's vision tower.

Oracles: transformers and diffusers with the same random weights; the published key list."""

import json
from pathlib import Path

import pytest
import torch
from diffusers.models.embeddings import ImageProjection
from PIL import Image
from reference import clip_vision, ip_adapter_state, small_pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor

from miniflux import add_ip_adapter, add_lora, generate, load, remove_lora
from miniflux.adapters.ip_adapter import (
    IPAdapter,
    IPAdapterConfig,
    clip_vectors,
    config_from_tensors,
    rename,
)
from miniflux.checkpoints.building import WithoutInitialisation
from miniflux.checkpoints.layouts import load_clip_vision
from miniflux.networks.clip import CLIPVision

SHARED = Path(__file__).resolve().parents[3] / "shared"
KEYS = SHARED / "reference" / "keys" / "ip_adapter_xlabs_v1.json"
IMAGE = Image.effect_noise((75, 50), 90).convert("RGB")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("ip")
    clip_vision().save_pretrained(path / "image_encoder")
    save_file(ip_adapter_state(), path / "a.safetensors")
    save_file(ip_adapter_state(tokens=16, seed=10), path / "b.safetensors")
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return load(small_pipeline(tmp_path_factory.mktemp("ip") / "flux"), device="cpu")


@pytest.fixture(scope="module")
def flux(plain, files):
    return add_ip_adapter(plain, files / "a.safetensors")


def sample(flux, **keywords):
    size = dict(width=48, height=32, steps=2, max_text_tokens=8)
    return generate(flux, "a red apple", **size, output="latents", progress=False, **keywords)


def largest_difference(a, b):
    return (a - b).abs().max()


# ------------------------------------------------------------------------------------- vision tower


def test_the_vectors_are_those_of_transformers(files):
    theirs, ours = clip_vision(), load_clip_vision(files / "image_encoder")
    images = torch.randn(3, 3, 26, 26, generator=torch.Generator().manual_seed(0))
    expected = theirs(images).image_embeds
    # Measured: 4e-7.
    assert largest_difference(ours(images), expected) < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("size", [(75, 50), (50, 75), (26, 26), (13, 9), (301, 27)])
def test_an_image_is_cropped_and_resized_as_transformers_does(flux, size):
    image = Image.effect_noise(size, 90).convert("RGB")
    theirs = clip_vision()
    processor = CLIPImageProcessor(size=26, crop_size=26)
    expected = theirs(processor(image, return_tensors="pt").pixel_values).image_embeds
    assert largest_difference(clip_vectors(flux, [image]), expected) < 1e-5 * expected.abs().max()


def test_the_official_tower_has_the_official_number_of_parameters():
    with torch.device("meta"), WithoutInitialisation():
        tower = CLIPVision()
    assert sum(p.numel() for p in tower.parameters()) == 303_966_208


def test_the_tower_of_a_whole_clip_is_the_same(files, tmp_path):
    state = {}
    for name, tensor in load_file(files / "image_encoder" / "model.safetensors").items():
        if "projection" not in name:
            name = "vision_model." + name.removeprefix("vision_model.")
        state[name] = tensor
    more = {
        "text_model.final_layer_norm.weight": torch.ones(3),
        "text_projection.weight": torch.ones(2, 2),
        "logit_scale": torch.ones(()),
        "vision_model.embeddings.position_ids": torch.arange(10)[None],
    }
    save_file(state | more, tmp_path / "model.safetensors")
    vision = json.loads((files / "image_encoder" / "config.json").read_text())
    config = {"architectures": ["CLIPModel"], "projection_dim": 20, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(config))
    a = load_clip_vision(files / "image_encoder")
    b = load_clip_vision(tmp_path)
    assert a.config == b.config
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(x, y)


# -------------------------------------------------------------------------------------- the adapter


@pytest.mark.parametrize("tokens", [4, 16])
def test_the_tokens_are_those_of_diffusers(tokens):
    """v1 makes 4 tokens, v2 16; the shapes show which."""
    state = {rename(name): tensor for name, tensor in ip_adapter_state(tokens=tokens).items()}
    config = config_from_tensors(state, Path("file"))
    ours, theirs = IPAdapter(config), ImageProjection(20, 32, tokens)
    ours.load_state_dict(state)
    theirs.load_state_dict({
        name.removeprefix("projection.").replace("proj", "image_embeds"): tensor
        for name, tensor in state.items() if name.startswith("projection.")
    })
    x = torch.randn(2, 20, generator=torch.Generator().manual_seed(0))
    expected = theirs(x)
    assert config.tokens == tokens
    assert largest_difference(ours.projection(x), expected) < 1e-5
    k, v = ours(x)[1]
    assert k.shape == (1, 2 * tokens, 48)
    weight = state["double_blocks.1.v_proj.weight"]
    bias = state["double_blocks.1.v_proj.bias"]
    assert torch.allclose(v[0], expected.flatten(0, 1) @ weight.T + bias, atol=1e-5)


@pytest.mark.skipif(not KEYS.is_file(), reason="the published key list is not here")
def test_the_published_file_is_read_whole():
    """80 tensors; 12,607,488 parameters in the projection and 478,267,392 in the blocks."""
    state = {
        rename(name): torch.empty(shape, device="meta")
        for name, shape in json.loads(KEYS.read_text()).items()
    }
    config = config_from_tensors(state, KEYS)
    assert config == IPAdapterConfig()
    with torch.device("meta"), WithoutInitialisation():
        adapter = IPAdapter(config)
    shapes = {name: tensor.shape for name, tensor in adapter.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert len(state) == 80
    assert sum(p.numel() for p in adapter.parameters()) == 12_607_488 + 478_267_392


def test_the_other_names_that_diffusers_reads_are_the_same_adapter(plain, files, tmp_path):
    others = {
        "ip_adapter_proj_model.": "image_proj.",
        "double_blocks.": "ip_adapter.",
        ".processor": "",
        "ip_adapter_double_stream_k_proj": "to_k_ip",
        "ip_adapter_double_stream_v_proj": "to_v_ip",
    }
    state = {}
    for name, tensor in ip_adapter_state().items():
        for xlabs, other in others.items():
            name = name.replace(xlabs, other)
        state[name] = tensor
    assert "ip_adapter.1.to_k_ip.weight" in state
    assert "image_proj.proj.bias" in state
    save_file(state, tmp_path / "other.safetensors")
    a = add_ip_adapter(plain, files / "a.safetensors").ip_adapters[0].state_dict()
    b = add_ip_adapter(plain, tmp_path, files / "image_encoder").ip_adapters[0].state_dict()
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_no_image_a_scale_of_zero_and_none_change_nothing(plain, flux):
    expected = sample(plain)
    for keywords in (
        {},
        dict(ip_image=IMAGE, ip_scale=0),
        dict(ip_image=IMAGE, ip_scale=[0, 0.0]),
        dict(ip_image=[None]),
    ):
        assert torch.equal(sample(flux, **keywords), expected)
    assert not torch.allclose(sample(flux, ip_image=IMAGE), expected, atol=1e-2)
    assert plain.ip_adapters == ()


def test_the_keys_are_made_once_a_call(flux, monkeypatch):
    calls, forward = [], IPAdapter.forward
    monkeypatch.setattr(IPAdapter, "forward", lambda self, x: calls.append(1) or forward(self, x))
    sample(flux, ip_image=IMAGE)
    assert len(calls) == 1


def test_a_lora_can_be_added_and_removed_next_to_it(flux, tmp_path):
    lora = {
        "diffusion_model.txt_in.lora_A.weight": torch.full((2, 32), 0.1),
        "diffusion_model.txt_in.lora_B.weight": torch.full((48, 2), 0.1),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    with_lora = add_lora(flux, tmp_path / "lora.safetensors")
    expected = sample(flux, ip_image=IMAGE)
    assert not torch.equal(sample(with_lora, ip_image=IMAGE), expected)
    assert torch.equal(sample(remove_lora(with_lora), ip_image=IMAGE), expected)


@pytest.mark.parametrize("keywords, sentence", [
    (dict(ip_image=[IMAGE, IMAGE]),
     "there are 2 ip_images for 1 IP-Adapters: give one for each"),
    (dict(ip_image=IMAGE, negative_ip_image=[IMAGE] * 3),
     "there are 3 negative_ip_images for 1 IP-Adapters"),
    (dict(ip_image="missing.png"), "the ip_image missing.png does not exist"),
    (dict(ip_image=[[]]), "there is no ip_image"),
    (dict(ip_image=IMAGE, ip_scale=[1, 2, 3]), "ip_scale is .1, 2, 3.: expected a number"),
    (dict(ip_image=IMAGE, ip_scale=[[1, 2, 3]]),
     "ip_scale has 3 numbers for an IP-Adapter, this model has 2 double blocks"),
    (dict(ip_image=IMAGE, ip_scale="much"), "ip_scale is 'much'"),
    (dict(ip_image=IMAGE, ip_scale=float("inf")), "ip_scale is inf"),
])
def test_a_wrong_image_or_scale_gets_one_sentence(flux, keywords, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        sample(flux, **keywords)


def test_an_image_for_a_model_without_an_adapter_gets_one_sentence(plain):
    with pytest.raises(ValueError, match="the model flux has no IP-Adapter: add_ip_adapter"):
        sample(plain, ip_image=IMAGE)


@pytest.mark.parametrize("state, sentence", [
    ({"a": torch.zeros(1)}, "is no IP-Adapter for FLUX.1 in XLabs' form"),
    (ip_adapter_state(depth=3), "made for another model: its depth is 3, that of flux is 2"),
    (ip_adapter_state(hidden=32),
     "made for another model: its hidden_size is 32, that of flux is 48"),
    (ip_adapter_state(joint=16),
     "made for another model: its context_in_dim is 16, that of flux is 32"),
    (ip_adapter_state(vectors=12), "do not fit: the vectors are 12 and 20 wide"),
    ({k: v for k, v in ip_adapter_state().items() if not k.endswith("v_proj.bias")},
     "missing double_blocks.0.v_proj.bias"),
], ids=["a stranger", "depth", "width", "text width", "vectors", "a lack"])
def test_a_wrong_file_gets_one_sentence(plain, files, tmp_path, state, sentence):
    save_file(state, tmp_path / "ip.safetensors")
    with pytest.raises(ValueError, match=sentence):
        add_ip_adapter(plain, tmp_path / "ip.safetensors", files / "image_encoder")


def test_a_missing_file_or_encoder_gets_one_sentence(plain, files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    save_file(ip_adapter_state(), tmp_path / "ip.safetensors")
    sentence = "the IP-Adapter .*missing.safetensors does not exist"
    with pytest.raises(FileNotFoundError, match=sentence):
        add_ip_adapter(plain, tmp_path / "missing.safetensors")
    with pytest.raises(FileNotFoundError, match="openai/clip-vit-large-patch14"):
        add_ip_adapter(plain, tmp_path / "ip.safetensors")
    sentence = "the image encoder nowhere does not exist: expected a file, a folder or a Hub id"
    with pytest.raises(FileNotFoundError, match=sentence):
        add_ip_adapter(plain, tmp_path / "ip.safetensors", "nowhere")
    (tmp_path / "two").mkdir()
    with pytest.raises(ValueError, match="has no safetensors file: expected the IP-Adapter's"):
        add_ip_adapter(plain, tmp_path / "two")
