"""What a LoRA file must not do: act by half, on what is not there, or at a scale of zero."""

import pytest
import torch
from lora_states import CLIP, NORM, PROJ, QKV, T5, H, change, draw, file_of, lora, pair

from miniflux import add_lora, generate, load, set_lora_scales


@pytest.fixture(scope="module")
def flux():
    return load("tiny", device="cpu")


def test_all_adapters_in_one_file_act(flux, tmp_path):
    pairs = {name: pair(rank=rank) for name, rank in (("first", 4), ("second", 3))}
    state = {}
    for name, (a, b) in pairs.items():
        state |= lora(f"base_model.model.{PROJ}", a, b, f"lora_A.{name}", f"lora_B.{name}")
    changed = add_lora(flux, file_of(tmp_path, state))
    assert torch.allclose(change(flux, changed), sum(b @ a for a, b in pairs.values()), atol=1e-5)


A, B = pair()


@pytest.mark.parametrize(
    "state, sentence",
    [
        (
            lora(f"transformer.{PROJ}", A, B) | lora("lora_unet_" + PROJ.replace(".", "_"), A, B),
            "has two changes of double_blocks.0",
        ),
        (
            lora(PROJ, A, B) | lora(PROJ, A, B, "lora_A", "lora_B"),
            "holds two tensors for one factor of double_blocks.0",
        ),
        (lora(PROJ, A, B) | {f"{PROJ}.diff": draw(H, H)}, "has several changes of one parameter"),
        (
            lora("transformer_blocks.0.attn.to_q", A, B) | lora(QKV, A, draw(3 * H, 4)),
            "has two changes of double_blocks.0",
        ),
        ({f"{PROJ}.alpha": torch.tensor(1.0)}, "has only an alpha"),
        ({f"{PROJ}.dora_scale": draw(H)}, "has only dora"),
        ({f"{PROJ}.dora_scale": draw(H), f"{PROJ}.diff_b": draw(H)}, "has DoRA magnitudes"),
        ({f"{PROJ}.hada_w1_a": B, f"{PROJ}.hada_w1_b": A}, "lacks hada_w2"),
        (
            {f"{PROJ}.oft_blocks": draw(4, 48, 48)},
            "of OFT: LoRA, DoRA, LoKr, LoHa and full differences are read",
        ),
        ({f"base_model.model.{PROJ}.ia3_l": draw(H, 1)}, "of IA3"),
        ({f"base_model.model.{PROJ}.vera_lambda_d": draw(4)}, "of VeRA"),
        ({f"base_model.model.{PROJ}.boft_R.default": draw(1, 4, 8, 8)}, "of BOFT"),
        ({f"base_model.model.{PROJ}.hra_u": draw(H, 8)}, "of HRA"),
        (lora(PROJ, A, B) | {f"{PROJ}.lora_E": draw(4, 1)}, "of AdaLoRA"),
        (
            lora(PROJ, A, B) | {f"{PROJ}.lora_mid.weight": draw(4, 4, 3, 3)},
            "of LoCon, LoHa or LoKr of a convolution",
        ),
        ({f"{PROJ}.weight": draw(H, H), f"{PROJ}.bias": draw(H)}, "is no LoRA of FLUX.1"),
        ({f"{NORM}.diff_b": draw(64)}, "has a diff_b, and no bias in this model"),
        ({f"{NORM}.diff": draw(32)}, "is for another model"),
        (lora(PROJ, A, B) | {f"{PROJ}.alpha": torch.tensor(float("nan"))}, "holds alpha with NaN"),
    ],
    ids=lambda value: value[-20:] if isinstance(value, str) else "",
)
@pytest.mark.parametrize("strict", [True, False])
def test_what_is_not_clear_or_not_read_is_refused_by_name(flux, tmp_path, state, sentence, strict):
    with pytest.raises(ValueError, match=sentence):
        add_lora(flux, file_of(tmp_path, state), strict=strict)


@pytest.mark.parametrize(
    "key",
    [
        "transformer.time_text_embed.guidance_embedder.linear_1",
        "lora_unet_guidance_in_in_layer",
        "transformer.transformer_blocks.18.attn.to_q",
        "lora_unet_single_blocks_37_linear1",
        "transformer.single_transformer_blocks.37.attn.to_q",
        "lora_te1_" + CLIP.replace(".", "_"),
        f"text_encoder_2.{T5}",
    ],
)
def test_a_part_that_the_model_lacks_is_a_sentence_and_can_be_left_out(tmp_path, key):
    from dataclasses import replace

    flux = replace(load("tiny-schnell", device="cpu"), clip=None, t5=None)
    a, b = pair()
    path = file_of(tmp_path, lora(key, a, b) | lora(PROJ, a, b))
    with pytest.raises(
        ValueError, match="for parts that this model does not have: strict=False leaves them"
    ):
        add_lora(flux, path)
    assert torch.allclose(change(flux, add_lora(flux, path, strict=False)), b @ a, atol=1e-5)
    with pytest.raises(ValueError, match="changes only parts that this model does not have"):
        add_lora(flux, file_of(tmp_path, lora(key, a, b), "only.safetensors"), strict=False)


@pytest.mark.parametrize(
    "state",
    [
        {f"{NORM}.scale": draw(64) + 2} | lora(PROJ, A, B),
        lora("img_in", draw(4, 128), B),
        {f"{PROJ}.diff_b": draw(H)},
        {f"{PROJ}.set_weight": draw(H, H)},
        lora(PROJ, A, B) | {f"{PROJ}.dora_scale": draw(H) + 2},
    ],
    ids=["norms", "a wider first layer", "a bias", "a weight", "DoRA"],
)
@pytest.mark.parametrize("merge", [True, False])
def test_a_scale_of_zero_changes_nothing_at_all(flux, tmp_path, state, merge):
    off = add_lora(flux, file_of(tmp_path, state), 0.0, name="a", merge=merge)
    assert off.mmdit is flux.mmdit
    on = set_lora_scales(off, {"a": 1.0})
    assert on.mmdit is not flux.mmdit
    assert set_lora_scales(on, {"a": 0.0}).mmdit is flux.mmdit


def test_at_a_scale_of_zero_a_control_lora_leaves_the_picture_as_it_is(flux, tmp_path):
    def paint(model):
        return generate(model, "a fox", seed=1, steps=1, progress=False, output="latents")

    off = add_lora(flux, file_of(tmp_path, lora("img_in", draw(4, 128), B)), 0.0)
    assert torch.equal(paint(off), paint(flux))
