"""The names in LoRA files of many tools. Oracle: the formula on the tiny model's weights."""

import pytest
import torch
from lora_states import CLIP, PROJ, QKV, T5, H, change, file_of, lora, pair

from miniflux import add_lora, load


@pytest.fixture(scope="module")
def flux():
    return load("tiny", device="cpu")


@pytest.mark.parametrize("adapter", ["default", "my-style", "a b", "v1,2", "weight", "ß", "0"])
def test_an_adapter_name_may_have_any_character_but_a_dot(flux, tmp_path, adapter):
    a, b = pair()
    state = lora(
        "transformer_blocks.0.attn.to_out.0", a, b, f"lora_A.{adapter}", f"lora_B.{adapter}"
    )
    assert torch.allclose(change(flux, add_lora(flux, file_of(tmp_path, state))), b @ a, atol=1e-5)


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_double_blocks_0_img_attn_proj",
        "lora_unet_transformer_blocks_0_attn_to_out_0",
        "lora_transformer_transformer_blocks_0_attn_to_out_0",
        "lycoris_transformer_blocks_0_attn_to_out_0",
        "lycoris_double_blocks_0_img_attn_proj",
        "transformer.transformer_blocks.0.attn.to_out.0",
        "transformer.double_blocks.0.img_attn.proj",
        "diffusion_model.double_blocks.0.img_attn.proj",
        "model.diffusion_model.double_blocks.0.img_attn.proj",
        "base_model.model.double_blocks.0.img_attn.proj",
        "base_model.model.transformer_blocks.0.attn.to_out.0",
        "unet.transformer_blocks.0.attn.to_out.0",
        "base_model.model._orig_mod.double_blocks.0.img_attn.proj",
        "transformer_blocks.0.attn.to_out.0",
        "base_model.model.transformer.transformer_blocks.0.attn.to_out.0",
        "diffusion_model.transformer_blocks.0.attn.to_out.0",
    ],
)
@pytest.mark.parametrize(
    "down, up", [("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora.down", "lora.up")]
)
def test_every_prefix_of_the_transformer_is_known(flux, tmp_path, key, down, up):
    a, b = pair()
    changed = add_lora(flux, file_of(tmp_path, lora(key, a, b, down, up)))
    assert torch.allclose(change(flux, changed), b @ a, atol=1e-5)


@pytest.mark.parametrize(
    "network, module, key",
    [
        ("clip", CLIP, f"text_encoder.{CLIP}"),
        ("clip", CLIP, f"text_encoders.clip_l.transformer.{CLIP}"),
        ("clip", CLIP, f"clip_l.{CLIP}"),
        ("clip", CLIP, "lora_te1_" + CLIP.replace(".", "_")),
        ("clip", CLIP, "lora_te_" + CLIP.replace(".", "_")),
        ("clip", CLIP, f"base_model.model.{CLIP}"),
        ("t5", T5, f"text_encoder_2.{T5}"),
        ("t5", T5, f"text_encoders.t5xxl.transformer.{T5}"),
        ("t5", T5, f"t5.{T5}"),
        ("t5", T5, "lora_te2_" + T5.replace(".", "_")),
        ("t5", T5, "lora_te3_" + T5.replace(".", "_")),
        ("t5", T5, "lora_te_" + T5.replace(".", "_")),
    ],
)
def test_every_prefix_of_the_text_encoders_is_known(flux, tmp_path, network, module, key):
    layer = getattr(flux, network).get_submodule(module)
    a, b = pair(layer.out_features, layer.in_features)
    changed = add_lora(flux, file_of(tmp_path, lora(key, a, b)))
    assert torch.allclose(change(flux, changed, module, network), b @ a, atol=1e-5)


def test_clip_in_place_of_t5_is_not_matched(flux, tmp_path):
    """lora_te2_ with CLIP's names is SDXL's second text encoder."""
    state = lora("lora_te2_" + CLIP.replace(".", "_"), *pair()) | lora(PROJ, *pair())
    with pytest.raises(ValueError, match="matched 2 of 4 tensors, .* not matched are lora_te2_"):
        add_lora(flux, file_of(tmp_path, state))


@pytest.mark.parametrize(
    "key, module, start, stop",
    [
        ("transformer.double_blocks.0.img_attn.qkv.1", QKV, H, 2 * H),
        (
            "transformer.double_blocks.1.txt_attn.qkv.2",
            "double_blocks.1.txt_attn.qkv",
            2 * H,
            3 * H,
        ),
        ("lora_unet_double_blocks_0_img_attn_qkv_0", QKV, 0, H),
        ("transformer.single_blocks.2.linear1.0", "single_blocks.2.linear1", 0, H),
        ("transformer.single_blocks.2.linear1.3", "single_blocks.2.linear1", 3 * H, 7 * H),
        (
            "transformer.single_transformer_blocks.2.proj_mlp",
            "single_blocks.2.linear1",
            3 * H,
            7 * H,
        ),
        (
            "transformer.single_transformer_blocks.2.attn.to_qkv",
            "single_blocks.2.linear1",
            0,
            3 * H,
        ),
        (
            "transformer.transformer_blocks.0.attn.to_added_qkv",
            "double_blocks.0.txt_attn.qkv",
            0,
            3 * H,
        ),
        ("transformer.img_in.proj", "img_in", 0, H),
    ],
)
def test_the_parts_of_a_fused_layer_change_their_own_rows(flux, tmp_path, key, module, start, stop):
    a, b = pair(stop - start, flux.mmdit.get_submodule(module).in_features)
    got = change(flux, add_lora(flux, file_of(tmp_path, lora(key, a, b))), module)
    assert torch.allclose(got[start:stop], b @ a, atol=1e-5)
    assert not got[:start].any() and not got[stop:].any()


def test_numbered_factors_of_a_fused_layer_share_its_alpha(flux, tmp_path):
    """sd-scripts' split q, k and v: lora_down.0, .1, .2 with one alpha."""
    key, pairs = "lora_unet_double_blocks_0_img_attn_qkv", [pair(rank=r) for r in (3, 4, 5)]
    state = {f"{key}.alpha": torch.tensor(6.0)}
    for i, (a, b) in enumerate(pairs):
        state |= lora(key, a, b, f"lora_down.{i}", f"lora_up.{i}")
    expected = torch.cat([6 / len(a) * b @ a for a, b in pairs])
    assert torch.allclose(
        change(flux, add_lora(flux, file_of(tmp_path, state)), QKV), expected, atol=1e-5
    )
