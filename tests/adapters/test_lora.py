"""LoRA. Oracles: the formula on the weights; peft and diffusers with the same random weights; the published key lists."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxControlPipeline, FluxPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from reference import small_pipeline
from safetensors.torch import load_file, save_file

from miniflux import add_lora, control, generate, load, remove_lora, set_lora_scales
from miniflux.adapters.lora import main
from miniflux.adapters.lora_file import official_targets, parse
from miniflux.checkpoints.names import mmdit_modules

KEYS = Path(__file__).resolve().parents[3] / "shared" / "reference" / "keys"
BOUND = 1e-3
H = 48                                                                          # hidden size of the small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("lora") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


def paint(flux, **keywords):
    return generate(flux, "a red apple", width=64, height=48, steps=2, seed=3, max_text_tokens=16, output="tensor", progress=False, **keywords)


def peft_file(folder, path, seed: int, rank: int = 4, alpha: float = 6.0, **config) -> Path:
    """A LoRA with random factors over every linear layer, made by peft and saved by diffusers."""
    pipeline = FluxPipeline.from_pretrained(folder)
    layers = [name for name, module in pipeline.transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    pipeline.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=False, **config))
    generator = torch.Generator().manual_seed(seed)
    for name, p in pipeline.transformer.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.15
    FluxPipeline.save_lora_weights(path, get_peft_model_state_dict(pipeline.transformer),
                                   **_collate_lora_metadata({"transformer": pipeline.transformer}))
    return path


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    return peft_file(folder, path / "first", 1), peft_file(folder, path / "second", 2, rank=2, alpha=1.0, use_rslora=True)


def pipeline_with(folder, *files_and_weights):
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for i, (file, _) in enumerate(files_and_weights):
        pipeline.load_lora_weights(file, adapter_name=f"lora{i}")
    if files_and_weights:
        pipeline.set_adapters([f"lora{i}" for i in range(len(files_and_weights))], [weight for _, weight in files_and_weights])
    return pipeline


def theirs(pipeline):
    return pipeline("a red apple", width=64, height=48, num_inference_steps=2, max_sequence_length=16, output_type="pt",
                    generator=torch.Generator().manual_seed(3)).images


# -------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("weights", [(1.0,), (0.6,), (0.7, 0.4)], ids=str)
def test_pictures_equal_those_of_diffusers(folder, flux, files, weights, merge):
    changed = flux
    for file, weight in zip(files, weights):
        changed = add_lora(changed, file, weight, name=file.name, merge=merge)
    a, b = paint(changed), theirs(pipeline_with(folder, *zip(files, weights)))
    assert (a - b).abs().max() < BOUND and (a - paint(flux)).abs().max() > 0.05


def test_after_removal_the_picture_is_that_of_diffusers_after_unloading(folder, flux, files):
    pipeline = pipeline_with(folder, (files[0], 1.0))
    pipeline.unload_lora_weights()
    assert (paint(remove_lora(add_lora(flux, files[0]))) - theirs(pipeline)).abs().max() < BOUND


def bfl_control(flux, seed: int = 4, rank: int = 5) -> dict[str, torch.Tensor]:
    """A LoRA as BFL published for Canny and Depth: every linear with a bias on B, all norm scales, a first layer twice as wide."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    state = {}
    for name, module in flux.mmdit.named_modules():
        if isinstance(module, torch.nn.Linear):
            state |= {f"{name}.lora_A.weight": random(rank, 128 if name == "img_in" else module.in_features),
                      f"{name}.lora_B.weight": random(module.out_features, rank), f"{name}.lora_B.bias": random(module.out_features)}
        elif hasattr(module, "scale"):
            state[f"{name}.scale"] = 1 + random(len(module.scale))
    return state


@pytest.fixture(scope="module")
def control_file(flux, tmp_path_factory):
    path = tmp_path_factory.mktemp("control") / "flux1-canny-dev-lora.safetensors"
    save_file(bfl_control(flux), path)
    return path


def control_in_diffusers_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same for the pipeline, whose own conversion knows only the official sizes."""
    result = {}
    for name, parts in mmdit_modules(2, 3).items():
        if f"{name}.scale" in state:
            result[f"transformer.{parts[0]}.weight"] = state[f"{name}.scale"]
            continue
        a, b, bias = (state[f"{name}.lora_{kind}"] for kind in ("A.weight", "B.weight", "B.bias"))
        for i, part in enumerate(parts):
            rows = slice(i * H, (i + 1) * H if i < 3 and len(parts) > 1 else None)
            halves = (lambda x: torch.cat(x.chunk(2)[::-1])) if name == "final_layer.adaLN_modulation.1" else (lambda x: x)
            result |= {f"transformer.{part}.lora_A.weight": a.clone(), f"transformer.{part}.lora_B.weight": halves(b)[rows].clone(),
                       f"transformer.{part}.lora_B.bias": halves(bias)[rows].clone()}
    return result


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("second", [False, True])
def test_a_control_lora_alone_and_with_a_narrow_one_on_top_equal_diffusers(folder, flux, files, control_file, second, merge, monkeypatch):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    parts = FluxPipeline.from_pretrained(folder).components
    pipeline = FluxControlPipeline(**{name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")})
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(control_in_diffusers_names(load_file(control_file)), adapter_name="control")
    changed = add_lora(flux, control_file, 0.85, name="control", merge=merge)
    if second:
        pipeline.load_lora_weights(files[1], adapter_name="second")
        changed = add_lora(changed, files[1], 0.125, name="second", merge=merge)
    pipeline.set_adapters(["control", "second"][:1 + second], [0.85, 0.125][:1 + second])
    a = control(changed, "a red apple", edges, width=64, height=48, steps=2, seed=3, max_text_tokens=16, output="tensor", progress=False)
    b = pipeline("a red apple", control_image=edges, width=64, height=48, num_inference_steps=2, max_sequence_length=16, output_type="pt",
                 generator=torch.Generator().manual_seed(3)).images
    assert (a - b).abs().max() < BOUND
    assert changed.mmdit.config.in_channels == 128 and remove_lora(changed).mmdit.config.in_channels == 64


# ------------------------------------------------------------------------------------------------------------- dialects


def pair(generator, rows: int, columns: int, rank: int = 3):
    return torch.randn(rank, columns, generator=generator) * 0.2, torch.randn(rows, rank, generator=generator) * 0.2


def plain(flux) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Random factors for every linear layer of ours."""
    generator = torch.Generator().manual_seed(9)
    return {name: pair(generator, module.out_features, module.in_features) for name, module in flux.mmdit.named_modules()
            if isinstance(module, torch.nn.Linear)}


def in_original_names(prefix: str, down: str, up: str, joint: str = ".", alpha: float | None = None):
    def write(factors):
        state = {}
        for name, (a, b) in factors.items():
            key = prefix + name.replace(".", joint)
            state |= {f"{key}.{down}.weight": a, f"{key}.{up}.weight": b}
            if alpha is not None:
                state[f"{key}.alpha"] = torch.tensor(alpha)
        return state
    return write


def in_diffusers_names(prefix: str, down: str, up: str, joint: str = ".", alpha: float | None = None):
    """q, k, v and the MLP of a fused layer become modules of their own, which share A; the last modulation is swapped."""
    def write(factors):
        state = {}
        for name, parts in mmdit_modules(2, 3).items():
            if name not in factors:
                continue
            a, b = factors[name]
            b = torch.cat(b.chunk(2)[::-1]) if name == "final_layer.adaLN_modulation.1" else b
            rows = b.split([H, H, H, len(b) - 3 * H][:len(parts)]) if len(parts) > 1 else [b]
            for part, piece in zip(parts, rows):
                key = prefix + part.replace(".", joint)
                state |= {f"{key}.{down}.weight": a.clone(), f"{key}.{up}.weight": piece.contiguous()}
                if alpha is not None:
                    state[f"{key}.alpha"] = torch.tensor(alpha)
        return state
    return write


DIALECTS = {
    "kohya": ("kohya", in_original_names("lora_unet_", "lora_down", "lora_up", "_", 1.5)),
    "ai-toolkit on original names": ("BFL", in_original_names("diffusion_model.", "lora_A", "lora_B")),
    "PEFT around the original": ("BFL", in_original_names("base_model.model.", "lora_A", "lora_B")),
    "PEFT with an adapter's name": ("BFL", in_original_names("base_model.model.", "lora_A.default", "lora_B.default")),
    "diffusers": ("diffusers", in_diffusers_names("transformer.", "lora_A", "lora_B", alpha=2.0)),
    "diffusers without alphas": ("diffusers", in_diffusers_names("transformer.", "lora_A", "lora_B")),
    "PEFT around diffusers": ("diffusers", in_diffusers_names("base_model.model.", "lora_A", "lora_B")),
    "bare": ("diffusers", in_diffusers_names("", "lora.down", "lora.up")),
    "OneTrainer": ("OneTrainer", in_diffusers_names("lora_transformer_", "lora_down", "lora_up", "_", 0.5)),
}


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("name", DIALECTS)
def test_every_dialect_changes_the_weights_by_the_formula(flux, tmp_path, name, merge):
    expected_dialect, write = DIALECTS[name]
    factors = plain(flux)
    state = write(factors)
    save_file(state, tmp_path / "a.safetensors")
    scale = 0.5 * next((float(tensor) / 3 for key, tensor in state.items() if key.endswith("alpha")), 1.0)
    changed = add_lora(flux, tmp_path / "a.safetensors", 0.5, merge=merge)
    for module, (a, b) in factors.items():
        layer, base = changed.mmdit.get_submodule(module), flux.mmdit.get_submodule(module)
        x = torch.randn(5, base.in_features)
        assert torch.allclose(layer(x), torch.nn.functional.linear(x, base.weight + scale * b @ a, base.bias), atol=1e-4), module
    parsed = parse(state, {}, official_targets(), "a")
    assert parsed.dialect == expected_dialect and not parsed.unmatched
    assert str(parsed).startswith(f"matched {len(state)} of {len(state)} tensors, dialect {expected_dialect}, rank 3")


def test_xlabs_names_one_for_the_picture_and_two_for_the_text(flux, tmp_path):
    generator = torch.Generator().manual_seed(0)
    state, expected = {}, {}
    for key, module, rows in (("double_blocks.1.processor.qkv_lora1", "double_blocks.1.img_attn.qkv", 3 * H),
                              ("double_blocks.1.processor.proj_lora2", "double_blocks.1.txt_attn.proj", H),
                              ("single_blocks.2.processor.qkv_lora", "single_blocks.2.linear1", 3 * H),
                              ("single_blocks.2.processor.proj_lora", "single_blocks.2.linear2", H)):
        base = flux.mmdit.get_submodule(module).weight
        a, b = pair(generator, rows, base.shape[1])
        state |= {f"{key}.down.weight": a, f"{key}.up.weight": b}
        expected[module] = base.clone()
        expected[module][:rows] += b @ a
    save_file(state, tmp_path / "x.safetensors")
    changed = add_lora(flux, tmp_path / "x.safetensors")
    assert all(torch.allclose(changed.mmdit.get_submodule(module).weight, weight, atol=1e-5) for module, weight in expected.items())


@pytest.mark.parametrize("merge", [True, False])
def test_lokr_is_a_kronecker_product(flux, tmp_path, merge):
    """By hand: w1 whole and w2 of rank 2 (alpha / 2 counts); both whole (alpha does not count)."""
    generator = torch.Generator().manual_seed(0)
    w1, a, b = (torch.randn(*shape, generator=generator) for shape in ((4, 6), (12, 2), (2, 8)))
    v1, v2 = torch.randn(6, 4, generator=generator), torch.randn(24, 12, generator=generator)
    save_file({"lora_unet_double_blocks_0_img_attn_proj.lokr_w1": w1, "lora_unet_double_blocks_0_img_attn_proj.lokr_w2_a": a,
               "lora_unet_double_blocks_0_img_attn_proj.lokr_w2_b": b, "lora_unet_double_blocks_0_img_attn_proj.alpha": torch.tensor(3.0),
               "lora_unet_double_blocks_0_img_attn_qkv.lokr_w1": v1, "lora_unet_double_blocks_0_img_attn_qkv.lokr_w2": v2,
               "lora_unet_double_blocks_0_img_attn_qkv.alpha": torch.tensor(3.0)}, tmp_path / "k.safetensors")
    changed = add_lora(flux, tmp_path / "k.safetensors", 0.5, merge=merge)
    for layer, delta in (("proj", 1.5 * torch.kron(w1, a @ b)), ("qkv", torch.kron(v1, v2))):
        base = flux.mmdit.get_submodule(f"double_blocks.0.img_attn.{layer}")
        x = torch.randn(3, H)
        expected = torch.nn.functional.linear(x, base.weight + 0.5 * delta, base.bias)
        assert torch.allclose(changed.mmdit.get_submodule(f"double_blocks.0.img_attn.{layer}")(x), expected, atol=1e-4)


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("axis", [0, 1], ids=["columns", "rows"])
def test_dora_scales_the_changed_weights_rows_or_columns(flux, tmp_path, axis, merge):
    """By hand: OneTrainer's magnitudes (1, in) belong to columns, PEFT's (out,) to rows."""
    generator = torch.Generator().manual_seed(0)
    base = flux.mmdit.double_blocks[0].img_mlp[0]
    (a, b), m = pair(generator, 4 * H, H), torch.rand((1, H) if axis == 0 else (4 * H,), generator=generator) + 0.5
    save_file({"lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_down.weight": a,
               "lora_transformer_transformer_blocks_0_ff_net_0_proj.lora_up.weight": b,
               "lora_transformer_transformer_blocks_0_ff_net_0_proj.dora_scale": m}, tmp_path / "d.safetensors")
    direction = base.weight + b @ a
    whole = m.view(1, -1) * direction / direction.norm(dim=0, keepdim=True) if axis == 0 else m.view(-1, 1) * direction / direction.norm(dim=1, keepdim=True)
    expected, x = base.weight + 0.4 * (whole - base.weight), torch.randn(3, H)
    layer = add_lora(flux, tmp_path / "d.safetensors", 0.4, merge=merge).mmdit.double_blocks[0].img_mlp[0]
    assert torch.allclose(layer(x), torch.nn.functional.linear(x, expected, base.bias), atol=1e-4)


def test_a_dora_made_by_peft_paints_as_in_diffusers(folder, flux, tmp_path):
    file = peft_file(folder, tmp_path / "dora", 5, use_dora=True)
    assert (paint(add_lora(flux, file)) - theirs(pipeline_with(folder, (file, 1.0)))).abs().max() < BOUND


def test_alphas_of_single_modules_come_from_the_metadata(folder, flux, tmp_path):
    file = peft_file(folder, tmp_path / "pattern", 6, alpha_pattern={"transformer_blocks.0.attn.to_q": 12.0}, rank_pattern={"proj_out": 2})
    assert (paint(add_lora(flux, file)) - theirs(pipeline_with(folder, (file, 1.0)))).abs().max() < BOUND


def test_text_encoder_parts_reach_clip(flux, tmp_path):
    generator = torch.Generator().manual_seed(0)
    base = flux.clip.text_model.encoder.layers[1].mlp.fc1
    a, b = pair(generator, base.out_features, base.in_features)
    for key in ("lora_te1_text_model_encoder_layers_1_mlp_fc1.lora_down", "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A"):
        up = key.replace("lora_down", "lora_up").replace("lora_A", "lora_B")
        save_file({f"{key}.weight": a, f"{up}.weight": b}, tmp_path / "t.safetensors")
        changed = add_lora(flux, tmp_path / "t.safetensors")
        assert torch.allclose(changed.clip.text_model.encoder.layers[1].mlp.fc1.weight, base.weight + b @ a, atol=1e-5)
        assert changed.mmdit is flux.mmdit                                      # what is not touched is shared


@pytest.mark.skipif(not KEYS.is_dir(), reason="the published key lists lie beside the repository")
@pytest.mark.parametrize("file, dialect, rank", [("lora_kohya", "kohya", "16"), ("lora_xlabs", "XLabs", "16"), ("lora_diffusers", "diffusers", "32"),
                                                 ("lora_aitoolkit", "BFL", "16"), ("lora_control_bfl", "BFL Control", "64 to 128")])
def test_every_tensor_of_a_published_file_has_the_right_target(file, dialect, rank):
    """Names and shapes in full size: each change is as large as the rows it is meant for."""
    from miniflux.checkpoints.building import WithoutInitialisation
    from miniflux.networks.mmdit import MMDiT
    with torch.device("meta"), WithoutInitialisation():
        mmdit = MMDiT()
    shapes = json.loads((KEYS / f"{file}.json").read_text())
    parsed = parse({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, {}, official_targets(), file)
    assert f"matched {len(shapes)} of {len(shapes)} tensors, dialect {dialect}, rank {rank}," in str(parsed)
    touched = {}
    for delta in parsed.changes:
        weight = getattr(mmdit.get_submodule(delta.target.module), "weight", None)
        start, stop = delta.target.rows or (0, len(weight) if weight is not None else 0)
        if delta.shape:
            width = 128 if (file, delta.target.module) == ("lora_control_bfl", "img_in") else weight.shape[1]
            assert delta.shape == (stop - start, width)
            touched.setdefault(delta.target.module, []).append((start, stop))
        else:
            assert delta.factors["value"].shape == (128,)
    for rows in touched.values():                                               # no row is changed twice
        rows.sort()
        assert all(a[1] <= b[0] for a, b in zip(rows, rows[1:]))


# ------------------------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("merge", [True, False])
def test_a_scale_of_zero_is_the_identity_and_scales_can_change(flux, files, merge):
    off = add_lora(flux, files[0], 0.0, name="a", merge=merge)
    assert torch.equal(paint(off), paint(flux))
    on = set_lora_scales(off, {"a": 0.6})
    assert torch.equal(paint(on), paint(add_lora(flux, files[0], 0.6, merge=merge)))
    assert torch.equal(paint(set_lora_scales(on, {"a": 0.0})), paint(flux))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_removed_is_gone_bit_for_bit_and_the_given_model_is_unchanged(folder, files, control_file, dtype):
    flux = load(folder, device="cpu", dtype=dtype)
    before = {name: p.clone() for name, p in flux.mmdit.named_parameters()}
    both = add_lora(add_lora(flux, files[0], name="a"), control_file, name="b")
    one = remove_lora(both, "b")
    assert all(torch.equal(p, q) for p, q in zip(one.mmdit.parameters(), add_lora(flux, files[0]).mmdit.parameters()))
    for again in (remove_lora(both), remove_lora(remove_lora(both, "a"), "b"), flux):
        assert again.mmdit.config.in_channels == 64 and again.loras is None
        assert all(torch.equal(p, before[name]) for name, p in again.mmdit.named_parameters())


def test_the_order_of_adding_does_not_matter(flux, files):
    a, b = add_lora(add_lora(flux, files[0], name="a"), files[1], name="b"), add_lora(add_lora(flux, files[1], name="b"), files[0], name="a")
    assert (paint(a) - paint(b)).abs().max() < 1e-4


# -------------------------------------------------------------------------------------------------------------- mistakes


def bad_files(flux) -> dict[str, tuple[dict, str]]:
    a, b = torch.ones(3, H), torch.ones(H, 3)
    key = "transformer.transformer_blocks.0.attn.to_q"
    good = {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
    return {
        "empty": ({}, "is no LoRA of FLUX.1: it holds no tensors"),
        "sdxl": ({"lora_unet_input_blocks_4_1_proj_in.lora_down.weight": a}, "its names are those of Stable Diffusion's"),
        "other": ({"model.layers.0.q.lora_A.weight": a}, "is no LoRA of FLUX.1: it holds model.layers.0.q"),
        "ranks": ({f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": torch.ones(H, 4)}, "whose ranks disagree"),
        "half": ({f"{key}.lora_A.weight": a}, "has only one half of a LoRA, A"),
        "nan": (good | {f"{key}.lora_B.weight": b * float("nan")}, "with NaN or infinity"),
        "alphas": (good | {f"{key}.alpha": torch.ones(2)}, "has an alpha of the shape"),
        "width": ({f"{key}.lora_A.weight": torch.ones(3, 64), f"{key}.lora_B.weight": torch.ones(64, 3)},
                  r"is for another model: it changes double_blocks.0.img_attn.qkv by \[64, 64\], which is \[48, 48\] here"),
        "unmatched": (good | {"transformer.nowhere.lora_A.weight": a}, "matched 2 of 3 tensors, .* not matched are transformer.nowhere"),
        "integers": (good | {f"{key}.lora_A.weight": a.int()}, "expected floating-point numbers"),
        "lokr": ({f"{key}.lokr_w1": a, f"{key}.lokr_w2_a": a}, "lacks lokr_w2"),
        "fill": ({"transformer.x_embedder.lora_A.weight": torch.ones(3, 384), "transformer.x_embedder.lora_B.weight": b}, "is for another model"),
    }


@pytest.mark.parametrize("case", ["empty", "sdxl", "other", "ranks", "half", "nan", "alphas", "width", "unmatched", "integers", "lokr",
                                  "fill"])
def test_a_bad_file_gets_one_sentence_and_changes_nothing(flux, tmp_path, case):
    state, sentence = bad_files(flux)[case]
    save_file({name: tensor.clone() for name, tensor in state.items()}, tmp_path / "bad.safetensors")
    before = paint(flux)
    with pytest.raises(ValueError, match=sentence):
        add_lora(flux, tmp_path / "bad.safetensors")
    assert torch.equal(paint(flux), before) and flux.loras is None
    if case == "unmatched":
        assert add_lora(flux, tmp_path / "bad.safetensors", strict=False).loras is not None


def test_names_are_used_once_and_only_what_is_there_can_be_removed(flux, files):
    one = add_lora(flux, files[0], name="a")
    for act, sentence in ((lambda: add_lora(one, files[1], name="a"), "a LoRA named 'a' is there already"),
                          (lambda: remove_lora(one, "b"), "there is no LoRA 'b' to remove: the model has"),
                          (lambda: remove_lora(flux), "there is no LoRA to remove: the model has none"),
                          (lambda: set_lora_scales(one, {"b": 1.0}), "there is no LoRA 'b'"),
                          (lambda: set_lora_scales(one, {"a": float("nan")}), "the scale of a is nan"),
                          (lambda: add_lora(flux, files[0], "strong"), "scale is 'strong'")):
        with pytest.raises(ValueError, match=sentence):
            act()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        add_lora(flux, "nowhere.safetensors")


def test_a_lora_of_the_hub_has_the_name_of_its_repository(flux, files, tmp_path, monkeypatch):
    """Also with a dot in it. The cache is a fake one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(files[0], tmp_path / "models--owner--FLUX.1-style" / "snapshots" / "abc")
    assert [lora.name for lora in add_lora(flux, "owner/FLUX.1-style").loras.added] == ["FLUX.1-style"]


# --------------------------------------------------------------------------------------------------------------- command


def test_the_command_reports_files_and_says_by_its_exit_code_whether_it_understood(tmp_path, monkeypatch, capsys, files):
    good = load_file(files[1] / "pytorch_lora_weights.safetensors")
    save_file({"lora_unet_double_blocks_18_img_attn_proj.lora_down.weight": torch.ones(4, 3072),
               "lora_unet_double_blocks_18_img_attn_proj.lora_up.weight": torch.ones(3072, 4),
               "lora_unet_double_blocks_18_img_attn_proj.alpha": torch.tensor(2.0)}, tmp_path / "good.safetensors")
    save_file(good | {"nowhere.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for names, code, words in ((["good"], 0, ["matched 3 of 3 tensors, dialect kohya, rank 4, alpha 2, changes 1 modules of mmdit"]),
                               (["good", "more"], 1, [f"matched {len(good)} of {len(good) + 1} tensors", "not matched are nowhere.weight"]),
                               (["text"], 1, ["is not a complete safetensors file"])):
        monkeypatch.setattr("sys.argv", ["lora", *(str(tmp_path / f"{name}.safetensors") for name in names)])
        with pytest.raises(SystemExit) as stop:
            main()
        out = capsys.readouterr().out
        assert stop.value.code == code and all(word in out for word in words), out
