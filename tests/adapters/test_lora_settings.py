"""PEFT's settings. Oracle: PEFT, which saves an adapter and merges it into the same model."""

import json

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from reference import small_pipeline
from safetensors.torch import load_file, save_file

from miniflux import add_lora, load
from miniflux.checkpoints.names import mmdit_from_diffusers

LAYERS = ["to_q", "to_k", "to_out.0", "proj_mlp", "norm_out.linear", "x_embedder"]
Q = "transformer_blocks.0.attn.to_q"
H = 48


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("settings") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


def peft_folder(folder, path, config):
    """Saves an adapter with random factors; returns the weights that PEFT merges it to."""
    model = get_peft_model(FluxTransformer2DModel.from_pretrained(folder / "transformer"), config)
    generator = torch.Generator().manual_seed(7)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=generator) * 0.1
    model.save_pretrained(path)
    return mmdit_from_diffusers(model.merge_and_unload().state_dict())


def largest_error(flux, weights) -> float:
    ours = flux.mmdit.state_dict()
    assert ours.keys() == weights.keys()
    return max((ours[name] - weights[name]).abs().max().item() for name in ours)


KINDS = {
    "LoRA": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS),
    "rsLoRA": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_rslora=True),
    "DoRA": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True),
    "rsLoRA with DoRA": LoraConfig(
        r=4, lora_alpha=6, target_modules=LAYERS, use_dora=True, use_rslora=True
    ),
    "LoRA with a bias": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, lora_bias=True),
    "LoRA and biases": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, bias="lora_only"),
    "LoRA with a bias, and biases": LoraConfig(
        r=4, lora_alpha=6, target_modules=LAYERS, lora_bias=True, bias="lora_only"
    ),
    "LoRA and all biases": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, bias="all"),
    "saved modules": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q"],
        modules_to_save=["norm_out.linear", "x_embedder"],
    ),
    "some layers": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q"],
        layers_to_transform=[1],
        layers_pattern="transformer_blocks",
    ),
    "patterns": LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=LAYERS,
        rank_pattern={r"^transformer_blocks\.0": 2, "to_q": 3},
        alpha_pattern={r"single_transformer_blocks\.\d+\.attn\.to_q": 9, "to_k": 1, "to_q": 5},
    ),
    "gaussian": LoraConfig(r=4, lora_alpha=6, target_modules=LAYERS, init_lora_weights="gaussian"),
    "LoKr": LoKrConfig(r=4, alpha=6, target_modules=LAYERS),
    "LoKr of whole factors": LoKrConfig(r=64, alpha=6, target_modules=LAYERS),
    "LoKr of products": LoKrConfig(
        r=2, alpha=6, target_modules=LAYERS, decompose_both=True, decompose_factor=6
    ),
    "LoKr with patterns": LoKrConfig(
        r=4, alpha=6, target_modules=LAYERS, alpha_pattern={".*to_q": 3}, rank_pattern={"to_k": 2}
    ),
    "LoHa": LoHaConfig(r=4, alpha=6, target_modules=LAYERS),
    "LoHa with patterns": LoHaConfig(
        r=4, alpha=6, target_modules=LAYERS, alpha_pattern={".*to_q": 3}, rank_pattern={"to_k": 2}
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_adapter_changes_the_weights_as_in_peft(folder, flux, tmp_path, kind):
    weights = peft_folder(folder, tmp_path / "adapter", KINDS[kind])
    assert largest_error(flux, weights) > 0.01
    for source in (tmp_path / "adapter", tmp_path / "adapter" / "adapter_model.safetensors"):
        assert largest_error(add_lora(flux, source), weights) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_a_start_that_changes_the_models_own_weights_is_refused_by_name(
    folder, flux, tmp_path, start
):
    peft_folder(
        folder, tmp_path / "a", LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start)
    )
    with pytest.raises(
        ValueError, match=f"was initialised with {start}, .* save it as a plain LoRA"
    ):
        add_lora(flux, tmp_path / "a")


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_such_a_lora_that_peft_has_converted_is_read(folder, flux, tmp_path, start):
    model = get_peft_model(
        FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        LoraConfig(r=4, target_modules=["to_q"], init_lora_weights=start),
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data += torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) * 0.1
    weights = mmdit_from_diffusers({name: p.clone() for name, p in get_merged(model).items()})
    model.save_pretrained(
        tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "start"
    )
    assert largest_error(add_lora(flux, tmp_path / "a"), weights) < 1e-4


def get_merged(model):
    """The merged weights, with the model left as it is."""
    model.merge_adapter()
    state = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p.clone()
        for name, p in model.state_dict().items()
        if "lora_" not in name
    }
    model.unmerge_adapter()
    return state


@pytest.mark.parametrize(
    "config",
    [
        peft.IA3Config(target_modules=["to_q"], feedforward_modules=[]),
        peft.VeraConfig(r=4, target_modules=["to_q"]),
        peft.OFTConfig(oft_block_size=8, target_modules=["to_q"]),
        peft.BOFTConfig(boft_block_size=8, target_modules=["to_q"]),
        peft.HRAConfig(r=4, target_modules=["to_q"]),
        peft.FourierFTConfig(n_frequency=9, target_modules=["to_q"]),
        peft.LNTuningConfig(target_modules=["norm_q"]),
        peft.RandLoraConfig(r=4, target_modules=["to_q"]),
    ],
    ids=lambda config: str(config.peft_type.value),
)
def test_other_methods_of_peft_are_refused_by_name_with_and_without_their_settings(
    folder, flux, tmp_path, config
):
    peft_folder(folder, tmp_path / "a", config)
    kind = config.peft_type.value
    with pytest.raises(
        ValueError,
        match=f"is a PEFT adapter of the kind '{kind}': expected one of LORA, LOKR, LOHA",
    ):
        add_lora(flux, tmp_path / "a")
    save_file(
        load_file(tmp_path / "a" / "adapter_model.safetensors"), tmp_path / "bare.safetensors"
    )
    with pytest.raises(ValueError, match="LoRA, DoRA, LoKr, LoHa and full differences are read"):
        add_lora(flux, tmp_path / "bare.safetensors", strict=False)


# ------------------------------------------------------------------------------- by hand, one layer


def adapter(path, config, rank: int = 4, name: str = "adapter_model.safetensors"):
    path.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rank, H, generator=generator), torch.randn(H, rank, generator=generator)
    save_file(
        {f"base_model.model.{Q}.lora_A.weight": a, f"base_model.model.{Q}.lora_B.weight": b},
        path / name,
    )
    if config is not None:
        (path / "adapter_config.json").write_text(
            config if isinstance(config, str) else json.dumps(config)
        )
    return b @ a


def scale_of(flux, source, product) -> float:
    layer = "double_blocks.0.img_attn.qkv"
    got = (
        add_lora(flux, source).mmdit.get_submodule(layer).weight
        - flux.mmdit.get_submodule(layer).weight
    )[:H]
    scale = (got * product).sum() / (product**2).sum()
    assert torch.allclose(got, scale * product, atol=1e-4)
    return scale.item()


@pytest.mark.parametrize(
    "pattern, alpha",
    [
        ({r"transformer_blocks\.\d+\.attn\.to_q": 2}, 2),
        ({"^transformer_blocks.0.attn.to_q": 2}, 2),
        ({Q: 2}, 2),
        ({"to_q": 2, Q: 32}, 2),
        ({Q: 32, "to_q": 2}, 32),
        ({"to_k": 2}, 8),
        ({"o_q": 2}, 8),
        ({"attn": 2}, 8),
        ({".*": 2}, 2),
        ({"to_q|to_k": 2}, 2),
        ({"(to_k|to_q)": 2}, 2),
        ({r".*\.0\..*": 2}, 2),
        ({r"to_[qk]": 2.5}, 2.5),
        ({"single_transformer_blocks.0.attn.to_q": 2}, 8),
        ({}, 8),
        (None, 8),
    ],
    ids=str,
)
def test_the_first_regular_expression_that_fits_gives_the_alpha(flux, tmp_path, pattern, alpha):
    """The same as PEFT's own function."""
    if pattern:
        key = peft.utils.other.get_pattern_key(pattern.keys(), Q)
        assert pattern.get(key, 8) == alpha
    product = adapter(
        tmp_path / "a", {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "alpha_pattern": pattern}
    )
    assert scale_of(flux, tmp_path / "a", product) == pytest.approx(alpha / 4, rel=1e-4)


@pytest.mark.parametrize(
    "config, sentence",
    [
        (
            {"r": 8, "lora_alpha": 8},
            "has the rank 4, its settings say 8: they belong to another file",
        ),
        ({"r": 4, "rank_pattern": {"to_q": 2}}, "has the rank 4, its settings say 2"),
        ({"r": 4, "lora_alpha": "8"}, "lora_alpha is '8', expected a number"),
        ({"r": 4, "lora_alpha": True}, "lora_alpha is True, expected a number"),
        ({"r": 4, "alpha_pattern": {"to_q(": 2}}, "which is no regular expression"),
        ({"r": 4, "alpha_pattern": [2]}, r"alpha_pattern is \[2\], expected an object"),
        (
            {"r": 4, "alpha_pattern": {"to_q": None}},
            "alpha_pattern for 'to_q' is None, expected a number",
        ),
        ({"r": 4, "use_dora": True}, "lacks the DoRA magnitudes that its settings mention"),
        ({"r": 4, "use_qalora": True}, "has the PEFT settings use_qalora"),
        ({"peft_type": "ADALORA", "r": 4}, "of the kind 'ADALORA'"),
        ("{", "is not valid JSON"),
    ],
    ids=str,
)
def test_settings_that_are_wrong_or_not_read_are_refused(flux, tmp_path, config, sentence):
    adapter(tmp_path / "a", config)
    with pytest.raises(ValueError, match=sentence):
        add_lora(flux, tmp_path / "a")


def test_settings_count_for_the_file_that_they_lie_beside_and_for_no_other(flux, tmp_path):
    config = {"r": 4, "lora_alpha": 16}
    product = adapter(tmp_path / "a", config)
    adapter(tmp_path / "a", None, name="other.safetensors")
    alone = adapter(tmp_path / "b", config, name="style.safetensors")
    assert scale_of(flux, tmp_path / "a", product) == pytest.approx(4)
    assert scale_of(flux, tmp_path / "a" / "adapter_model.safetensors", product) == pytest.approx(4)
    assert scale_of(flux, tmp_path / "a" / "other.safetensors", product) == pytest.approx(1)
    assert scale_of(flux, tmp_path / "b", alone) == pytest.approx(4)
    assert scale_of(flux, tmp_path / "b" / "style.safetensors", alone) == pytest.approx(4)


@pytest.mark.parametrize(
    "metadata, scale",
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 2}, 0.5),
        ({"r": 4, "lora_alpha": 2}, 0.5),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 2}, 1.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.use_rslora": True}, 1.0),
    ],
    ids=str,
)
def test_the_files_own_metadata_comes_before_settings_beside_it(flux, tmp_path, metadata, scale):
    product = adapter(tmp_path / "a", {"r": 4, "lora_alpha": 16})
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(
        load_file(path), path, {"format": "pt", "lora_adapter_metadata": json.dumps(metadata)}
    )
    assert scale_of(flux, path, product) == pytest.approx(scale)


def test_an_alpha_in_the_file_comes_before_all_settings(flux, tmp_path):
    product = adapter(tmp_path / "a", {"r": 4, "lora_alpha": 16})
    path = tmp_path / "a" / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{Q}.alpha": torch.tensor(2)}, path)
    assert scale_of(flux, path, product) == pytest.approx(0.5)
