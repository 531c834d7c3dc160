"""The kinds of change in LoRA files. Oracle: the formula on the tiny model's weights."""

import pytest
import torch
from lora_states import NORM, PROJ, QKV, H, change, draw, file_of, lora, pair

from miniflux import add_lora, load


@pytest.fixture(scope="module")
def flux():
    return load("tiny", device="cpu")


@pytest.mark.parametrize(
    "alpha",
    [
        torch.tensor(2),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([[2.0]]),
        torch.tensor(2.0, dtype=torch.bfloat16),
    ],
    ids=str,
)
def test_an_alpha_may_be_an_integer(flux, tmp_path, alpha):
    a, b = pair()
    key = "lora_unet_double_blocks_0_img_attn_proj"
    changed = add_lora(flux, file_of(tmp_path, lora(key, a, b) | {f"{key}.alpha": alpha}))
    assert torch.allclose(change(flux, changed), 0.5 * b @ a, atol=1e-5)


def test_a_module_without_an_alpha_beside_others_with_one_has_its_rank(flux, tmp_path):
    """As in sd-scripts, ComfyUI and diffusers."""
    a, b = pair()
    keys = [f"lora_unet_double_blocks_{i}_img_attn_proj" for i in (0, 1)]
    state = lora(keys[0], a, b) | lora(keys[1], a, b) | {f"{keys[0]}.alpha": torch.tensor(1.0)}
    changed = add_lora(flux, file_of(tmp_path, state))
    assert torch.allclose(change(flux, changed), 0.25 * b @ a, atol=1e-5)
    assert torch.allclose(change(flux, changed, "double_blocks.1.img_attn.proj"), b @ a, atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize(
    "key, rows",
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", slice(None)),
        ("transformer.transformer_blocks.0.attn.to_k", slice(H, 2 * H)),
    ],
)
def test_loha_is_a_product_number_by_number(flux, tmp_path, key, rows, merge):
    base = flux.mmdit.get_submodule(QKV)
    height = len(base.weight[rows])
    a1, b1, a2, b2 = draw(height, 4), draw(4, H), draw(height, 4) + 1, draw(4, H) - 1
    state = {
        f"{key}.hada_w1_a": a1,
        f"{key}.hada_w1_b": b1,
        f"{key}.hada_w2_a": a2,
        f"{key}.hada_w2_b": b2,
        f"{key}.alpha": torch.tensor(2.0),
    }
    layer = add_lora(flux, file_of(tmp_path, state), 0.6, merge=merge).mmdit.get_submodule(QKV)
    weight, x = base.weight.clone(), draw(3, H)
    weight[rows] += 0.6 * 0.5 * (a1 @ b1) * (a2 @ b2)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight, base.bias), atol=1e-5)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("method", ["lokr", "loha"])
def test_dora_may_hold_a_lokr_or_a_loha(flux, tmp_path, method, merge):
    """By hand: the length of each row is m, the direction that of W + Δ."""
    key, base = "lycoris_transformer_blocks_0_attn_to_v", flux.mmdit.get_submodule(QKV)
    m = draw(H, 1).abs() + 1
    if method == "lokr":
        w1, w2 = draw(4, 4), draw(48, 48)
        state, delta = {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2)
    else:
        (b1, a1), (b2, a2) = pair(), pair(rank=4)
        state = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        delta = (a1 @ b1) * (a2 @ b2)
    path = file_of(
        tmp_path, {f"{key}.{name}": x for name, x in (state | {"dora_scale": m}).items()}
    )
    layer = add_lora(flux, path, merge=merge).mmdit.get_submodule(QKV)
    weight, x = base.weight.clone(), draw(3, H)
    changed = weight[2 * H :] + delta
    weight[2 * H :] = m * changed / changed.norm(dim=1, keepdim=True)
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, weight, base.bias), atol=1e-4)


@pytest.mark.parametrize(
    "key",
    [
        f"diffusion_model.{NORM}.diff",
        f"diffusion_model.{NORM}.scale.diff",
        f"lora_unet_{NORM.replace('.', '_')}.w_norm",
        "transformer.transformer_blocks.0.attn.norm_q.diff",
    ],
)
def test_a_difference_is_added_to_a_norms_scale(flux, tmp_path, key):
    diff = draw(64)
    changed = add_lora(flux, file_of(tmp_path, {key: diff}), 0.5)
    assert torch.allclose(change(flux, changed, NORM, parameter="scale"), 0.5 * diff, atol=1e-6)


@pytest.mark.parametrize(
    "network, module, parameter, key",
    [
        ("mmdit", PROJ, "weight", f"diffusion_model.{PROJ}.diff"),
        ("mmdit", PROJ, "bias", f"diffusion_model.{PROJ}.diff_b"),
        ("mmdit", PROJ, "bias", f"lora_unet_{PROJ.replace('.', '_')}.diff_b"),
        (
            "clip",
            "text_model.embeddings.token_embedding",
            "weight",
            "text_encoders.clip_l.transformer.text_model.embeddings.token_embedding.diff",
        ),
        (
            "clip",
            "text_model.final_layer_norm",
            "weight",
            "lora_te1_text_model_final_layer_norm.w_norm",
        ),
        (
            "clip",
            "text_model.final_layer_norm",
            "bias",
            "lora_te1_text_model_final_layer_norm.b_norm",
        ),
        ("t5", "shared", "weight", "text_encoders.t5xxl.transformer.shared.diff"),
        (
            "t5",
            "encoder.final_layer_norm",
            "weight",
            "text_encoder_2.encoder.final_layer_norm.diff",
        ),
    ],
)
@pytest.mark.parametrize("merge", [True, False])
def test_a_difference_is_added_to_any_parameter(
    flux, tmp_path, network, module, parameter, key, merge
):
    diff = draw(*getattr(getattr(flux, network).get_submodule(module), parameter).shape)
    changed = add_lora(flux, file_of(tmp_path, {key: diff}), 0.5, merge=merge)
    layer = getattr(changed, network).get_submodule(module)
    before = getattr(getattr(flux, network).get_submodule(module), parameter)
    assert torch.allclose(getattr(layer, parameter), before + 0.5 * diff, atol=1e-6)


def test_a_lora_of_an_embedding_changes_its_rows(flux, tmp_path):
    """ComfyUI's extraction treats every matrix alike."""
    name = "text_model.embeddings.position_embedding"
    weight = flux.clip.get_submodule(name).weight
    a, b = pair(*weight.shape)
    changed = add_lora(
        flux, file_of(tmp_path, lora(f"text_encoders.clip_l.transformer.{name}", a, b))
    )
    assert torch.allclose(change(flux, changed, name, "clip"), b @ a, atol=1e-5)


@pytest.mark.parametrize(
    "key, module, parameter",
    [
        (f"diffusion_model.{NORM}.scale.set_weight", NORM, "scale"),
        (f"{NORM}.scale", NORM, "scale"),
        ("transformer.transformer_blocks.0.attn.norm_q.weight", NORM, "scale"),
        (f"diffusion_model.{PROJ}.set_weight", PROJ, "weight"),
        (f"diffusion_model.{PROJ}.bias.set_weight", PROJ, "bias"),
        (f"base_model.model.{PROJ}.modules_to_save.default.weight", PROJ, "weight"),
    ],
)
def test_what_a_file_sets_takes_the_place_of_the_models(flux, tmp_path, key, module, parameter):
    value = draw(*getattr(flux.mmdit.get_submodule(module), parameter).shape)
    path = file_of(tmp_path, {key: value})
    assert torch.equal(
        getattr(add_lora(flux, path, 0.5).mmdit.get_submodule(module), parameter), value
    )
    assert add_lora(flux, path, 0.0).mmdit is flux.mmdit


def test_comfyuis_form_of_a_control_lora_is_read(flux, tmp_path):
    """lora_B.bias as diff_b, the norms as set_weight, and the shape of the widened layer."""
    a, b, bias = draw(4, 128), draw(H, 4), draw(H)
    state = lora("diffusion_model.img_in", a, b) | {
        "diffusion_model.img_in.diff_b": bias,
        "diffusion_model.img_in.reshape_weight": torch.tensor([H, 128]),
    }
    wide = add_lora(flux, file_of(tmp_path, state)).mmdit
    assert wide.config.in_channels == 128
    assert torch.allclose(wide.img_in.weight[:, 64:], (b @ a)[:, 64:], atol=1e-5)
    assert torch.allclose(wide.img_in.bias, flux.mmdit.img_in.bias + bias, atol=1e-6)


def test_float8_factors_are_read(flux, tmp_path):
    a, b = (x.to(torch.float8_e4m3fn) for x in pair())
    changed = add_lora(flux, file_of(tmp_path, lora(PROJ, a, b)))
    assert torch.allclose(change(flux, changed), b.float() @ a.float(), atol=1e-5)
