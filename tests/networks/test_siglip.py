"""SigLIP and Redux's embedder.

Oracles: by hand; transformers and diffusers with the same random weights; official sizes."""

import json
import shutil

import pytest
import torch
from reference import siglip, small_pipeline, small_redux
from safetensors.torch import load_file, save_file
from torch.nn.functional import gelu

from miniflux import add_redux, load
from miniflux.checkpoints.hub import OFFICIAL
from miniflux.checkpoints.layouts import load_redux, load_siglip
from miniflux.networks.clip import ACTIVATIONS
from miniflux.networks.siglip import ReduxEmbedder, SigLIP, SigLIPConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_redux(tmp_path_factory.mktemp("redux") / "redux")


def error(ours, theirs) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_official_sizes_have_the_official_number_of_parameters():
    """428,225,600 with the attention-pooling head: probe, attention, norm and MLP."""
    with torch.device("meta"):
        tower, embedder = SigLIP(), ReduxEmbedder()
    d, inner = 1152, 4304
    head = d + 4 * d * d + 4 * d + 2 * d + 2 * d * inner + inner + d
    assert sum(p.numel() for p in tower.parameters()) == 428_225_600 - head
    assert sum(p.numel() for p in embedder.parameters()) == 64_503_808
    positions = tower.vision_model.embeddings.position_embedding.weight
    assert positions.shape == (729, 1152)
    assert SigLIPConfig().num_patches == 27 * 27


@pytest.mark.parametrize("batch", [1, 3])
def test_the_tokens_are_those_of_transformers(folder, batch):
    theirs, ours = siglip(), load_siglip(folder / "image_encoder")
    images = torch.randn(batch, 3, 26, 26, generator=torch.Generator().manual_seed(0))
    # Measured: 3e-7. The head of the file is not read.
    assert error(ours(images), theirs(images).last_hidden_state) < 1e-5
    state = load_file(folder / "image_encoder" / "model.safetensors")
    assert any(".head." in name for name in state)


def test_the_rows_that_are_left_over_do_not_count(folder):
    tower = load_siglip(folder / "image_encoder")
    images = torch.randn(1, 3, 26, 26)
    changed = images.clone()
    changed[..., 24:, :] = 9.0
    changed[..., :, 24:] = 9.0
    assert torch.equal(tower(images), tower(changed))


def test_the_activation_is_the_tanh_gelu():
    x = torch.linspace(-4, 4, 9)
    assert torch.equal(ACTIVATIONS[SigLIPConfig().hidden_act](x), gelu(x, approximate="tanh"))


def test_the_tower_of_a_whole_siglip_and_one_without_the_prefix_are_the_same(folder, tmp_path):
    """google/siglip-so400m-patch14-384 has a text tower, too.

    Newer versions of transformers omit the prefix."""
    tower = folder / "image_encoder"
    state = load_file(tower / "model.safetensors")
    config = json.loads((tower / "config.json").read_text())
    text = {
        "text_model.final_layer_norm.weight": torch.ones(3),
        "logit_scale": torch.ones(1),
        "logit_bias": torch.ones(1),
    }
    whole_config = {"architectures": ["SiglipModel"], "vision_config": config}
    save_tower(tmp_path / "whole", whole_config, state | text)
    bare = {name.removeprefix("vision_model."): tensor for name, tensor in state.items()}
    save_tower(tmp_path / "bare", config, bare)
    images = torch.randn(2, 3, 26, 26)
    expected = load_siglip(tower)(images)
    assert torch.equal(load_siglip(tmp_path / "whole")(images), expected)
    assert torch.equal(load_siglip(tmp_path / "bare")(images), expected)


def save_tower(path, config, state):
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file(state, path / "model.safetensors")


@pytest.mark.parametrize("values, message", [
    (dict(architectures=["CLIPModel"]), "describes a 'CLIPModel', expected a SiglipVisionModel"),
    (dict(hidden_act="relu"), "hidden_act is 'relu', expected one of quick_gelu, gelu"),
    (dict(num_attention_heads=5), "24 channels cannot be shared by 5 heads"),
    (dict(patch_size=99), "patches of 99 do not fit into images of 26 pixels"),
    (dict(num_hidden_layers=4), "missing vision_model.encoder.layers.3"),
])
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, values, message):
    shutil.copytree(folder / "image_encoder", tmp_path / "tower")
    path = tmp_path / "tower" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message):
        load_siglip(tmp_path / "tower")


# ---------------------------------------------------------------------------------------- add_redux


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    return load(small_pipeline(tmp_path_factory.mktemp("flux") / "flux"), device="cpu")


def original(folder, path):
    """The original layout: the embedder in one file, and SigLIP in a folder of its own."""
    path.mkdir()
    file = path / "flux1-redux-dev.safetensors"
    shutil.copy(folder / "image_embedder" / "diffusion_pytorch_model.safetensors", file)
    shutil.copytree(folder / "image_encoder", path.parent / "siglip")
    return file, path.parent / "siglip"


def test_redux_from_either_layout_is_the_same(flux, folder, tmp_path, monkeypatch):
    file, tower = original(folder, tmp_path / "redux")
    x = torch.randn(1, 9, 24)
    expected = add_redux(flux, folder).redux(x)
    for with_redux in (
        add_redux(flux, file, tower),
        add_redux(flux, file.parent, image_encoder=str(tower)),
    ):
        assert torch.equal(with_redux.redux(x), expected)
        assert with_redux.siglip.config.image_size == 26
    assert flux.redux is None                               # the model itself is unchanged


def test_siglip_is_found_in_the_local_cache(flux, folder, tmp_path, monkeypatch):
    file, tower = original(folder, tmp_path / "redux")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    sentence = (
        "reads images through SigLIP, which is neither in .*image_encoder nor in .*hub: give")
    with pytest.raises(FileNotFoundError, match=sentence):
        add_redux(flux, file)
    repo = tmp_path / "hub" / "models--google--siglip-so400m-patch14-384"
    shutil.copytree(tower, repo / "snapshots" / "a")
    assert add_redux(flux, file).siglip is not None


def test_load_redux_is_dev_with_redux(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for name, source in (("dev", small_pipeline(tmp_path / "dev")), ("redux", folder)):
        repo = tmp_path / "hub" / ("models--" + OFFICIAL[name].replace("/", "--"))
        shutil.copytree(source, repo / "snapshots" / "a")
    flux = load("redux", device="cpu")
    assert flux.redux is not None
    assert flux.config.name == "dev"
    assert load(folder, device="cpu").redux is not None     # Redux's folder by its path, too


def test_a_folder_may_hold_a_model_and_redux_together(folder, tmp_path):
    both = small_pipeline(tmp_path / "both")
    for part in ("image_encoder", "image_embedder"):
        shutil.copytree(folder / part, both / part)
    assert load(both, device="cpu").redux is not None


def test_redux_beside_a_transformer_in_the_original_layout_is_not_taken_for_it(folder, tmp_path):
    from miniflux.checkpoints.finding import find_parts
    for name in ("flux1-dev.safetensors", "flux1-redux-dev.safetensors"):
        (tmp_path / name).touch()
    assert find_parts(tmp_path)["transformer"].name == "flux1-dev.safetensors"


def test_what_is_not_redux_or_does_not_fit_is_refused(flux, folder, tmp_path):
    with pytest.raises(ValueError, match="holds no Redux: it has no folder image_embedder/"):
        add_redux(flux, tmp_path)
    sentence = "is not a Redux embedder: it lacks redux_up or redux_down"
    with pytest.raises(ValueError, match=sentence):
        load_redux(folder / "image_encoder" / "model.safetensors")
    narrow = tmp_path / "narrow"
    shutil.copytree(folder, narrow)
    path = narrow / "image_embedder" / "diffusion_pytorch_model.safetensors"
    state = {
        "redux_up.weight": torch.ones(60, 24),
        "redux_up.bias": torch.ones(60),
        "redux_down.weight": torch.ones(20, 60),
        "redux_down.bias": torch.ones(20),
    }
    save_file(state, path)
    sentence = (
        "does not fit: SigLIP's tokens and Redux's are 24 and 20 wide, expected 24 and 32")
    with pytest.raises(ValueError, match=sentence):
        add_redux(flux, narrow)
