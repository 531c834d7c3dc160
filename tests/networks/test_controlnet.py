"""ControlNet. Oracles: diffusers with the same random weights; the published key lists; by hand."""

import json
from pathlib import Path

import pytest
import torch
from reference import controlnet
from safetensors.torch import save_file

from miniflux.checkpoints.building import WithoutInitialisation
from miniflux.checkpoints.layouts import load_controlnet
from miniflux.checkpoints.names import controlnet_from_any
from miniflux.checkpoints.sizes import mmdit_sizes
from miniflux.networks.controlnet import ControlNet, ControlNetConfig, assign
from miniflux.sampling import image_ids, patchify, text_ids

KEYS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "keys"
SIZES = [dict(), dict(modes=4), dict(hint=True, layers=(2, 0)), dict(layers=(2, 0), guidance=False)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_residuals_are_those_of_diffusers(tmp_path, sizes):
    theirs = controlnet(**sizes)
    theirs.save_pretrained(tmp_path)
    ours = load_controlnet(tmp_path)
    draw = torch.Generator().manual_seed(0)
    img = torch.randn(2, 12, 64, generator=draw)
    txt = torch.randn(2, 5, 32, generator=draw)
    vec = torch.randn(2, 24, generator=draw)
    control = torch.randn(2, 3, 48, 64, generator=draw)     # an image for XLabs' hint
    if not ours.config.hint:
        control = torch.randn(2, 12, 64, generator=draw)    # tokens for InstantX'
    mode = 2 if ours.config.modes else None
    t = torch.tensor([0.3, 0.8])
    guidance = torch.full((2,), 3.5) if ours.config.guidance_embed else None
    expected = theirs(
        hidden_states=img,
        controlnet_cond=control,
        controlnet_mode=None if mode is None else torch.full((2, 1), mode),
        conditioning_scale=1.0,
        encoder_hidden_states=txt,
        pooled_projections=vec,
        timestep=t,
        img_ids=image_ids(6, 8).float(),
        txt_ids=text_ids(5).float(),
        guidance=guidance,
        return_dict=False,
    )
    if ours.config.hint:
        control = patchify(ours.input_hint_block(control))
    got = ours(img, control, mode, txt, vec, t, guidance, image_ids(6, 8), text_ids(5))
    for group, group_expected in zip(got, expected):
        assert len(group) == len(group_expected or [])
        for a, b in zip(group, group_expected or []):
            assert (a - b).abs().max() < 1e-5 * b.abs().max()           # measured: 4e-7


@pytest.mark.skipif(not KEYS.is_dir(), reason="the published key lists are not here")
@pytest.mark.parametrize("file, config, parameters", [
    ("controlnet_instantx_union", ControlNetConfig(), 3_301_956_608),
    ("controlnet_xlabs",
     ControlNetConfig(depth=2, depth_single_blocks=0, modes=0, hint=True), 743_807_280),
])
def test_a_published_file_is_read_whole(file, config, parameters):
    shapes = json.loads((KEYS / f"{file}.json").read_text())
    state = controlnet_from_any({
        name: torch.empty(shape, device="meta") for name, shape in shapes.items()
    })
    with torch.device("meta"), WithoutInitialisation():
        net = ControlNet(config)
    shapes = {name: tensor.shape for name, tensor in net.state_dict().items()}
    assert {name: tensor.shape for name, tensor in state.items()} == shapes
    assert sum(p.numel() for p in net.parameters()) == parameters
    modes = len(state.get("controlnet_mode_embedder.weight", ()))
    hint = "input_hint_block.0.weight" in state
    sizes = mmdit_sizes(state, Path(file))
    assert ControlNetConfig(modes=modes, hint=hint, **sizes) == config


def test_the_interval_is_rounded_up_so_that_the_sixth_of_six_serves_no_block():
    """Five residuals for 19 blocks serve 4, 4, 4, 4 and 3 of them; six have the same interval.

    XLabs' residuals take turns."""
    five = assign(list(range(5)), 19, repeat=False)
    assert [five.count(i) for i in range(5)] == [4, 4, 4, 4, 3]
    six = assign(list(range(6)), 19, repeat=False)
    assert [six.count(i) for i in range(6)] == [4, 4, 4, 4, 3, 0]
    assert assign([0, 1], 5, repeat=True) == [0, 1, 0, 1, 0]
    assert assign([], 3, repeat=False) == [None] * 3


def test_a_single_file_in_either_layout_is_the_same_net(tmp_path):
    """XLabs publishes the original names.

    A head's channels are then divided among the axes as in all official models."""
    from diffusers import FluxControlNetModel
    from reference import randomise
    theirs = randomise(FluxControlNetModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=0,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=24,
        guidance_embeds=True,
        axes_dims_rope=(4, 14, 14),
        conditioning_embedding_channels=16,
    ), 3)
    theirs.register_to_config(patch_size=2)                 # of the hint, as in XLabs' config
    theirs.save_pretrained(tmp_path / "folder")
    folder = load_controlnet(tmp_path / "folder")
    state = {}
    for name, tensor in folder.state_dict().items():
        state[name.replace("controlnet_x_embedder", "pos_embed_input")] = tensor.contiguous()
    save_file(state, tmp_path / "xlabs.safetensors")
    save_file(theirs.state_dict(), tmp_path / "diffusers.safetensors")
    for file in ("xlabs.safetensors", "diffusers.safetensors"):
        net = load_controlnet(tmp_path / file)
        # Note: the axes are not in the shapes; (4, 14, 14) is the default for 32 channels.
        assert net.config == folder.config
        for a, b in zip(net.state_dict().values(), folder.state_dict().values()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("spoil, sentence", [
    (lambda state: state.clear() or state.update(a=torch.zeros(1)), "is not a FLUX ControlNet"),
    (lambda state: state.pop("controlnet_x_embedder.weight"), "is not a FLUX ControlNet"),
    (lambda state: state.pop("controlnet_blocks.0.bias"), "missing controlnet_blocks.0.bias"),
    (lambda state: state.update({"controlnet_x_embedder.weight": torch.zeros(48, 68)}),
     r"has the shape \[48, 68\], expected \[48, 64\]"),
])
def test_a_damaged_file_gets_one_sentence(tmp_path, spoil, sentence):
    state = controlnet().state_dict()
    spoil(state)
    save_file(state, tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match=sentence):
        load_controlnet(tmp_path / "net.safetensors")


def test_a_folder_of_something_else_gets_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="has no safetensors file: expected the ControlNet's"):
        load_controlnet(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    sentence = "describes a 'FluxTransformer2DModel', expected a FluxControlNetModel"
    with pytest.raises(ValueError, match=sentence):
        load_controlnet(tmp_path)
