"""The tables of names: official index files, the reference libraries' models, and there and back
without a difference.

The full-size models are built on the meta device, which allocates nothing.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from reference import transformer, vae
from torch import nn

from miniflux.checkpoints import names
from miniflux.checkpoints.names import (
    autoencoder_from_diffusers,
    autoencoder_levels,
    autoencoder_to_diffusers,
    count,
    mmdit_from_diffusers,
    mmdit_to_diffusers,
)
from miniflux.networks.autoencoder import Autoencoder
from miniflux.networks.clip import CLIPText
from miniflux.networks.mmdit import MMDiT, MMDiTConfig
from miniflux.networks.t5 import T5

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"  # official configs and index files
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the official index files are not here"
)
SCHNELL = MMDiTConfig(guidance_embed=False)


def on_meta(kind, *args, **kwargs) -> nn.Module:
    with torch.device("meta"):
        return kind(*args, **kwargs)


def shapes(state: dict) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def index(name: str) -> dict:
    return json.loads((REFERENCE / name).read_text())


# ----------------------------------------------------------------------------------- the full sizes


@pytest.mark.parametrize(
    "config, parameters",
    [
        (MMDiTConfig(), 11_901_408_320),
        (SCHNELL, 11_891_178_560),
        (MMDiTConfig(in_channels=384), 11_902_391_360),
        (MMDiTConfig(in_channels=128), 11_901_604_928),
    ],
    ids=["dev", "schnell", "fill", "canny"],
)
def test_the_transformers_have_the_official_number_of_parameters(config, parameters):
    """Oracle: the published checkpoints (half of the bytes that their indices state)."""
    assert sum(p.numel() for p in on_meta(MMDiT, config).parameters()) == parameters


@pytest.mark.parametrize("kind, parameters, tensors", [
    (Autoencoder, 83_819_683, 244), (CLIPText, 123_060_480, 196), (T5, 4_762_310_656, 219)])
def test_the_other_networks_have_the_official_number_of_parameters(kind, parameters, tensors):
    """Oracle: the published checkpoints."""
    state = on_meta(kind).state_dict()
    assert sum(tensor.numel() for tensor in state.values()) == parameters and len(state) == tensors


@needs_reference
@pytest.mark.parametrize(
    "config, folder, ours, theirs",
    [(MMDiTConfig(), "FLUX.1-dev", 780, 1160), (SCHNELL, "FLUX.1-schnell", 776, 1156)],
    ids=["dev", "schnell"],
)
def test_the_transformers_have_the_names_of_the_official_index(config, folder, ours, theirs):
    """Oracle: the index files of the official repositories, for the number of bytes too."""
    official = index(f"{folder}/transformer/diffusion_pytorch_model.safetensors.index.json")
    state = on_meta(MMDiT, config).state_dict()
    mapped = mmdit_to_diffusers(state)
    assert mapped.keys() == official["weight_map"].keys()
    assert len(mapped) == theirs
    assert len(state) == ours
    assert (
        2 * sum(tensor.numel() for tensor in mapped.values()) == official["metadata"]["total_size"]
    )


@needs_reference
def test_t5_has_the_names_of_the_official_index():
    """Oracle: the index file of the official repository."""
    official = index("FLUX.1-dev/text_encoder_2/model.safetensors.index.json")
    state = on_meta(T5).state_dict()
    assert state.keys() == official["weight_map"].keys()
    assert (
        2 * sum(tensor.numel() for tensor in state.values()) == official["metadata"]["total_size"]
    )


@pytest.mark.parametrize(
    "config", [MMDiTConfig(), SCHNELL, MMDiTConfig(in_channels=384)], ids=["dev", "schnell", "fill"]
)
def test_the_transformers_map_to_diffusers_and_back(config):
    """Oracle: diffusers' own model of that size, names and shapes."""
    theirs = on_meta(FluxTransformer2DModel, in_channels=config.in_channels, out_channels=64,
                     guidance_embeds=config.guidance_embed)
    ours = shapes(on_meta(MMDiT, config).state_dict())
    mapped = mmdit_to_diffusers(on_meta(MMDiT, config).state_dict())
    assert shapes(mapped) == shapes(theirs.state_dict())
    assert shapes(mmdit_from_diffusers(mapped)) == ours


def test_the_autoencoder_maps_to_diffusers_and_back():
    """Oracle: diffusers' own model of that size, names and shapes."""
    theirs = on_meta(
        AutoencoderKL,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    ours = on_meta(Autoencoder).state_dict()
    mapped = autoencoder_to_diffusers(ours)
    assert shapes(mapped) == shapes(theirs.state_dict())
    assert shapes(autoencoder_from_diffusers(mapped)) == shapes(ours)


# ---------------------------------------------------------------------------- small models, numbers


@pytest.mark.parametrize("guidance", [True, False])
def test_a_transformer_comes_back_from_the_original_names_bit_for_bit(guidance):
    theirs = transformer(guidance, layers=(2, 3)).state_dict()
    there_and_back = mmdit_to_diffusers(mmdit_from_diffusers(dict(theirs)))
    assert there_and_back.keys() == theirs.keys()
    assert all(torch.equal(there_and_back[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("blocks, widths", [(1, (8, 16, 24, 24)), (2, (8, 8)), (3, (8, 16, 16))])
def test_an_autoencoder_comes_back_from_the_original_names_bit_for_bit(blocks, widths):
    theirs = vae(widths, blocks=blocks).state_dict()
    assert autoencoder_levels(set(theirs)) == (len(widths), blocks)
    ours = autoencoder_from_diffusers(dict(theirs))
    assert autoencoder_levels(set(ours)) == (len(widths), blocks)
    there_and_back = autoencoder_to_diffusers(ours)
    assert there_and_back.keys() == theirs.keys()
    assert all(torch.equal(there_and_back[name], tensor) for name, tensor in theirs.items())


def test_the_halves_of_the_last_modulation_are_swapped():
    """By hand: shift, scale in the original; scale, shift in diffusers; weight and bias."""
    theirs = transformer().state_dict()
    ours = mmdit_from_diffusers(dict(theirs))
    for kind in ("weight", "bias"):
        scale, shift = theirs[f"norm_out.linear.{kind}"].chunk(2)
        assert torch.equal(
            ours[f"final_layer.adaLN_modulation.1.{kind}"], torch.cat([shift, scale])
        )


def test_the_rows_of_a_single_block_are_q_k_v_mlp():
    theirs = transformer().state_dict()
    block = "single_transformer_blocks.1."
    rows = torch.cat(
        [
            theirs[block + part + ".weight"]
            for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
        ]
    )
    assert torch.equal(mmdit_from_diffusers(dict(theirs))["single_blocks.1.linear1.weight"], rows)


def test_levels_of_the_decoder_are_numbered_from_the_picture():
    theirs = vae().state_dict()
    ours = autoencoder_from_diffusers(dict(theirs))
    assert torch.equal(
        ours["decoder.up.3.block.0.conv1.weight"],
        theirs["decoder.up_blocks.0.resnets.0.conv1.weight"],
    )
    assert torch.equal(
        ours["encoder.down.3.block.0.conv1.weight"],
        theirs["encoder.down_blocks.3.resnets.0.conv1.weight"],
    )


# ------------------------------------------------------------------------- memory and strange names


@pytest.mark.parametrize(
    "theirs, convert", [(transformer, mmdit_from_diffusers), (vae, autoencoder_from_diffusers)]
)
def test_the_source_is_emptied_as_it_is_converted(theirs, convert, monkeypatch):
    """Joined tensors are copies: their parts must be gone before the next ones are made."""
    state, sizes = theirs().state_dict(), []
    join = torch.cat
    monkeypatch.setattr(
        names.torch, "cat", lambda parts, *args: sizes.append(len(state)) or join(parts, *args)
    )
    convert(state)
    assert sizes == sorted(sizes, reverse=True) and len(state) == 0


def test_strange_names_are_passed_on_for_the_loader_to_report():
    state = transformer().state_dict()
    kept = {"transformer_blocks.0.attn.to_q.lora.weight", "transformer_blocks.x.norm.weight",
            "transformer_blocks.0.attn.to_k.weight", "transformer_blocks.0.attn.to_v.weight"}
    del state["transformer_blocks.0.attn.to_q.weight"]
    state |= {name: torch.ones(1) for name in kept if name not in state}
    mapped = mmdit_from_diffusers(state)
    assert kept <= mapped.keys() and "double_blocks.0.img_attn.qkv.weight" not in mapped


def test_parts_that_cannot_be_joined_are_passed_on_for_the_loader_to_report():
    for wrong in (torch.ones(48, 7), torch.tensor(1.0), torch.ones(48)):
        state = transformer().state_dict()
        state["transformer_blocks.0.attn.to_k.weight"] = wrong
        mapped = mmdit_from_diffusers(state)
        assert mapped["transformer_blocks.0.attn.to_k.weight"] is wrong
        assert "double_blocks.0.img_attn.qkv.weight" not in mapped


def test_blocks_are_counted_by_their_largest_number():
    assert count({f"blocks.{i}.weight" for i in range(12)}, "blocks") == 12
    assert count({"blocks.0.a", "blocks.2.a", "blocks.2.b"}, "blocks") == 3
    assert (
        count(
            {
                "blocks.x.a",
                "blocks.-1.a",
                "blocks.",
                "block.7.a",
                "blocks.3",
                "blocks.²3.a",
                "a.blocks.9.a",
            },
            "blocks",
        )
        == 0
    )
    assert (
        count({"blocks.999999.a", "blocks.0.a"}, "blocks") == 2
    )  # a hostile number builds no million blocks
