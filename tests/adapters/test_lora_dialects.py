"""Whole files of each dialect. Oracles: the formula on the weights; the published key lists."""

import json
from pathlib import Path

import pytest
import torch
from reference import small_pipeline
from safetensors.torch import save_file

from miniflux import add_lora, load
from miniflux.adapters.lora_file import official_targets, parse
from miniflux.checkpoints.names import mmdit_modules

KEYS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "keys"
H = 48  # hidden size of the small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("lora") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


def pair(generator, rows: int, columns: int, rank: int = 3):
    return torch.randn(rank, columns, generator=generator) * 0.2, torch.randn(
        rows, rank, generator=generator
    ) * 0.2


def plain(flux) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors for every linear layer of ours."""
    generator = torch.Generator().manual_seed(9)
    return {
        name: pair(generator, module.out_features, module.in_features)
        for name, module in flux.mmdit.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def in_original_names(
    prefix: str, down: str, up: str, joint: str = ".", alpha: float | None = None
):
    def write(factors):
        state = {}
        for name, (a, b) in factors.items():
            key = prefix + name.replace(".", joint)
            state |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
            if alpha is not None:
                state[f"{key}.alpha"] = torch.tensor(alpha)
        return state

    return write


def in_diffusers_names(
    prefix: str, down: str, up: str, joint: str = ".", alpha: float | None = None
):
    """q, k, v and the MLP of a fused layer become modules that share A; the halves of the last
    modulation are swapped."""

    def write(factors):
        state = {}
        for name, parts in mmdit_modules(2, 3).items():
            if name not in factors:
                continue
            a, b = factors[name]
            b = torch.cat(b.chunk(2)[::-1]) if name == "final_layer.adaLN_modulation.1" else b
            rows = b.split([H, H, H, len(b) - 3 * H][: len(parts)]) if len(parts) > 1 else [b]
            for part, piece in zip(parts, rows):
                key = prefix + part.replace(".", joint)
                state |= {
                    f"{key}.{down}.weight": a.clone(),
                    f"{key}.{up}.weight": piece.contiguous(),
                }
                if alpha is not None:
                    state[f"{key}.alpha"] = torch.tensor(alpha)
        return state

    return write


DIALECTS = {
    "kohya": ("kohya", in_original_names("lora_unet_", "lora_down", "lora_up", "_", 1.5)),
    "ai-toolkit on original names": (
        "BFL",
        in_original_names("diffusion_model.", "lora_A", "lora_B"),
    ),
    "PEFT around the original": ("BFL", in_original_names("base_model.model.", "lora_A", "lora_B")),
    "PEFT with an adapter's name": (
        "BFL",
        in_original_names("base_model.model.", "lora_A.default", "lora_B.default"),
    ),
    "diffusers": ("diffusers", in_diffusers_names("transformer.", "lora_A", "lora_B", alpha=2.0)),
    "diffusers without alphas": (
        "diffusers",
        in_diffusers_names("transformer.", "lora_A", "lora_B"),
    ),
    "PEFT around diffusers": (
        "diffusers",
        in_diffusers_names("base_model.model.", "lora_A", "lora_B"),
    ),
    "bare": ("diffusers", in_diffusers_names("", "lora.down", "lora.up")),
    "OneTrainer": (
        "OneTrainer",
        in_diffusers_names("lora_transformer_", "lora_down", "lora_up", "_", 0.5),
    ),
}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_changes_the_weights_by_the_formula(flux, tmp_path, name, merge):
    expected_dialect, write = DIALECTS[name]
    factors = plain(flux)
    state = write(factors)
    save_file(state, tmp_path / "a.safetensors")
    scale = 0.5 * next(
        (float(tensor) / 3 for key, tensor in state.items() if key.endswith("alpha")), 1.0
    )
    changed = add_lora(flux, tmp_path / "a.safetensors", 0.5, merge=merge)
    for module, (a, b) in factors.items():
        layer, base = changed.mmdit.get_submodule(module), flux.mmdit.get_submodule(module)
        x = torch.randn(5, base.in_features)
        assert torch.allclose(
            layer(x),
            torch.nn.functional.linear(x, base.weight + scale * b @ a, base.bias),
            atol=1e-4,
        ), module
    parsed = parse(state, {}, official_targets(), "a")
    assert parsed.dialect == expected_dialect and not parsed.unmatched
    assert str(parsed).startswith(
        f"matched {len(state)} of {len(state)} tensors, dialect {expected_dialect}, rank 3"
    )


def test_xlabs_names_one_for_the_picture_and_two_for_the_text(flux, tmp_path):
    generator = torch.Generator().manual_seed(0)
    state, expected = {}, {}
    for key, module, rows in (
        ("double_blocks.1.processor.qkv_lora1", "double_blocks.1.img_attn.qkv", 3 * H),
        ("double_blocks.1.processor.proj_lora2", "double_blocks.1.txt_attn.proj", H),
        ("single_blocks.2.processor.qkv_lora", "single_blocks.2.linear1", 3 * H),
        ("single_blocks.2.processor.proj_lora", "single_blocks.2.linear2", H),
    ):
        base = flux.mmdit.get_submodule(module).weight
        a, b = pair(generator, rows, base.shape[1])
        state |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
        expected[module] = base.clone()
        expected[module][:rows] += b @ a
    save_file(state, tmp_path / "x.safetensors")
    changed = add_lora(flux, tmp_path / "x.safetensors")
    assert all(
        torch.allclose(changed.mmdit.get_submodule(module).weight, weight, atol=1e-5)
        for module, weight in expected.items()
    )


@pytest.mark.parametrize("merge", [True, False])
def test_lokr_is_a_kronecker_product(flux, tmp_path, merge):
    """By hand: w1 whole and w2 of rank 2 (alpha / 2 counts); both whole (alpha does not count)."""
    generator = torch.Generator().manual_seed(0)
    w1, a, b = (torch.randn(*shape, generator=generator) for shape in ((4, 6), (12, 2), (2, 8)))
    v1, v2 = torch.randn(6, 4, generator=generator), torch.randn(24, 12, generator=generator)
    save_file(
        {
            "lora_unet_double_blocks_0_img_attn_proj.lokr_w1": w1,
            "lora_unet_double_blocks_0_img_attn_proj.lokr_w2_a": a,
            "lora_unet_double_blocks_0_img_attn_proj.lokr_w2_b": b,
            "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(3.0),
            "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": v1,
            "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": v2,
            "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(3.0),
        },
        tmp_path / "k.safetensors",
    )
    changed = add_lora(flux, tmp_path / "k.safetensors", 0.5, merge=merge)
    for layer, delta in (("proj", 1.5 * torch.kron(w1, a @ b)), ("qkv", torch.kron(v1, v2))):
        base = flux.mmdit.get_submodule(f"double_blocks.0.img_attn.{layer}")
        x = torch.randn(3, H)
        expected = torch.nn.functional.linear(x, base.weight + 0.5 * delta, base.bias)
        assert torch.allclose(
            changed.mmdit.get_submodule(f"double_blocks.0.img_attn.{layer}")(x), expected, atol=1e-4
        )


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_dora_scales_the_changed_weights_rows_or_columns(flux, tmp_path, axis, merge):
    """By hand: OneTrainer's magnitudes (1, in) belong to columns, PEFT's (out,) to rows."""
    generator = torch.Generator().manual_seed(0)
    base = flux.mmdit.double_blocks[0].img_mlp[0]
    (a, b), m = (
        pair(generator, 4 * H, H),
        torch.rand((1, H) if axis == 0 else (4 * H,), generator=generator) + 0.5,
    )
    save_file(
        {
            "lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_down.weight": a,
            "lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_up.weight": b,
            "lora_transformer_transformer_blocks_0_ff_net_0_proj.dora_scale": m,
        },
        tmp_path / "d.safetensors",
    )
    direction = base.weight + b @ a
    whole = (
        m.view(1, -1) * direction / direction.norm(dim=0, keepdim=True)
        if axis == 0
        else m.view(-1, 1) * direction / direction.norm(dim=1, keepdim=True)
    )
    expected, x = base.weight + 0.4 * (whole - base.weight), torch.randn(3, H)
    layer = (
        add_lora(flux, tmp_path / "d.safetensors", 0.4, merge=merge)
        .mmdit.double_blocks[0]
        .img_mlp[0]
    )
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, expected, base.bias), atol=1e-4)


def test_text_encoder_parts_reach_clip(flux, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = flux.clip.text_model.encoder.layers[1].mlp.fc1
    a, b = pair(generator, base.out_features, base.in_features)
    for key in (
        "lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A",
    ):
        up = key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
        save_file({f"{key}.weight": a, f"{up}.weight": b}, tmp_path / "t.safetensors")
        changed = add_lora(flux, tmp_path / "t.safetensors")
        assert torch.allclose(
            changed.clip.text_model.encoder.layers[1].mlp.fc1.weight, base.weight + b @ a, atol=1e-5
        )
        assert changed.mmdit is flux.mmdit  # what is not touched is shared


@pytest.mark.skipif(not KEYS.is_dir(), reason="the published key lists lie beside the repository")
@pytest.mark.parametrize(
    "file, dialect, rank",
    [
        ("lora_kohya", "kohya", "16"),
        ("lora_xlabs", "XLabs", "16"),
        ("lora_diffusers", "diffusers", "32"),
        ("lora_aitoolkit", "BFL", "16"),
        ("lora_control_bfl", "BFL Control", "64 to 128"),
    ],
)
def test_every_tensor_of_a_published_file_has_the_right_target(file, dialect, rank):
    """Names and shapes in full size: each change is as large as the rows it is meant for."""
    from miniflux.checkpoints.building import WithoutInitialisation
    from miniflux.networks.mmdit import MMDiT

    with torch.device("meta"), WithoutInitialisation():
        mmdit = MMDiT()
    shapes = json.loads((KEYS / f"{file}.json").read_text())
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    parsed = parse(state, {}, official_targets(), file)
    start = f"matched {len(shapes)} of {len(shapes)} tensors, dialect {dialect}, rank {rank},"
    assert start in str(parsed)
    touched = {}
    for change in parsed.changes:
        module = change.target.module
        if "weight" in change.factors:                      # a norm's
            assert change.shape == (128,)
            continue
        rows, width = mmdit.get_submodule(module).weight.shape
        begin, end = change.target.rows or (0, rows)
        is_wide = (file, module) == ("lora_control_bfl", "img_in")
        assert change.shape == (end - begin, 128 if is_wide else width)
        touched.setdefault(module, []).append((begin, end))
    for rows in touched.values():  # no row is changed twice
        rows.sort()
        assert all(a[1] <= b[0] for a, b in zip(rows, rows[1:]))


def bad_files(flux) -> dict[str, tuple[dict, str]]:
    a, b = torch.ones(3, H), torch.ones(H, 3)
    key = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    return {
        "empty": ({}, "is no LoRA of FLUX.1: it holds no tensors"),
        "sdxl": (
            {"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": a},
            "its names are those of Stable Diffusion's",
        ),
        "other": (
            {"model.layers.0.q.lora_A.weight": a},
            "is no LoRA of FLUX.1: it holds model.layers.0.q",
        ),
        "ranks": (
            {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.ones(H, 4)},
            "whose ranks disagree",
        ),
        "half": ({f"{key}.lora_A.weight": a}, "has only one half of a LoRA, A"),
        "nan": (good | {f"{key}.lora_B.weight": b * float("nan")}, "with NaN or infinity"),
        "alphas": (good | {f"{key}.alpha": torch.ones(2)}, "has an alpha of the shape"),
        "width": (
            {f"{key}.lora_A.weight": torch.ones(3, 64), f"{key}.lora_B.weight": torch.ones(64, 3)},
            "is for another model: it changes double_blocks.0.img_attn.qkv by "
            r"\[64, 64\], which is \[48, 48\] here",
        ),
        "unmatched": (
            good | {"transformer.nowhere.lora_A.weight": a},
            "matched 2 of 3 tensors, .* not matched are transformer.nowhere",
        ),
        "integers": (good | {f"{key}.lora_A.weight": a.int()}, "expected floating-point numbers"),
        "lokr": ({f"{key}.lokr_w1": a, f"{key}.lokr_w2_a": a}, "lacks lokr_w2"),
        "fill": (
            {
                "transformer.x_embedder.lora_A.weight": torch.ones(3, 384),
                "transformer.x_embedder.lora_B.weight": b,
            },
            "is for another model",
        ),
    }


@pytest.mark.parametrize(
    "case",
    "empty sdxl other ranks half nan alphas width unmatched integers lokr fill".split(),
)
def test_a_bad_file_gets_one_sentence_and_changes_nothing(flux, tmp_path, case):
    state, sentence = bad_files(flux)[case]
    save_file(
        {name: tensor.clone() for name, tensor in state.items()}, tmp_path / "bad.safetensors"
    )
    before = {name: p.clone() for name, p in flux.mmdit.named_parameters()}
    with pytest.raises(ValueError, match=sentence):
        add_lora(flux, tmp_path / "bad.safetensors")
    assert flux.loras is None
    assert all(torch.equal(p, before[name]) for name, p in flux.mmdit.named_parameters())
    if case == "unmatched":
        assert add_lora(flux, tmp_path / "bad.safetensors", strict=False).loras is not None
