"""LoRAs in whole tasks. Oracles: peft and diffusers with the same random weights; identities."""

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
from miniflux.checkpoints.names import mmdit_modules

BOUND = 1e-3
H = 48  # hidden size of the small model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("lora") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


def paint(flux, **keywords):
    return generate(
        flux,
        "a red apple",
        width=64,
        height=48,
        steps=2,
        seed=3,
        max_text_tokens=16,
        output="tensor",
        progress=False,
        **keywords,
    )


def peft_file(folder, path, seed: int, rank: int = 4, alpha: float = 6.0, **config) -> Path:
    """A LoRA with random factors over every linear layer, made by peft and saved by diffusers."""
    pipeline = FluxPipeline.from_pretrained(folder)
    layers = [
        name
        for name, module in pipeline.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]
    pipeline.transformer.add_adapter(
        LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=layers, init_lora_weights=False, **config
        )
    )
    generator = torch.Generator().manual_seed(seed)
    for name, p in pipeline.transformer.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            p.data = torch.randn(p.shape, generator=generator) * 0.15
    FluxPipeline.save_lora_weights(
        path,
        get_peft_model_state_dict(pipeline.transformer),
        **_collate_lora_metadata({"transformer": pipeline.transformer}),
    )
    return path


@pytest.fixture(scope="module")
def files(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("files")
    return peft_file(folder, path / "first", 1), peft_file(
        folder, path / "second", 2, rank=2, alpha=1.0, use_rslora=True
    )


def pipeline_with(folder, *files_and_weights):
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    for i, (file, _) in enumerate(files_and_weights):
        pipeline.load_lora_weights(file, adapter_name=f"lora{i}")
    if files_and_weights:
        pipeline.set_adapters(
            [f"lora{i}" for i in range(len(files_and_weights))],
            [weight for _, weight in files_and_weights],
        )
    return pipeline


def theirs(pipeline):
    return pipeline(
        "a red apple",
        width=64,
        height=48,
        num_inference_steps=2,
        max_sequence_length=16,
        output_type="pt",
        generator=torch.Generator().manual_seed(3),
    ).images


# ------------------------------------------------------------------------------------ parity


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
    """A LoRA as BFL published for Canny and Depth.

    Every linear layer has a bias on B, all norm scales are replaced, the first layer is widened.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.15

    state = {}
    for name, module in flux.mmdit.named_modules():
        if isinstance(module, torch.nn.Linear):
            state |= {
                f"{name}.lora_A.weight": random(
                    rank, 128 if name == "img_in" else module.in_features
                ),
                f"{name}.lora_B.weight": random(module.out_features, rank),
                f"{name}.lora_B.bias": random(module.out_features),
            }
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
            halves = (
                (lambda x: torch.cat(x.chunk(2)[::-1]))
                if name == "final_layer.adaLN_modulation.1"
                else (lambda x: x)
            )
            result |= {
                f"transformer.{part}.lora_A.weight": a.clone(),
                f"transformer.{part}.lora_B.weight": halves(b)[rows].clone(),
                f"transformer.{part}.lora_B.bias": halves(bias)[rows].clone(),
            }
    return result


@pytest.mark.parametrize("merge", [True, False])
@pytest.mark.parametrize("second", [False, True])
def test_a_control_lora_alone_and_with_a_narrow_one_on_top_equal_diffusers(
    folder, flux, files, control_file, second, merge, monkeypatch
):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    monkeypatch.setattr(
        DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode()
    )
    edges = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8))
    parts = FluxPipeline.from_pretrained(folder).components
    pipeline = FluxControlPipeline(
        **{
            name: part
            for name, part in parts.items()
            if name not in ("image_encoder", "feature_extractor")
        }
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(
        control_in_diffusers_names(load_file(control_file)), adapter_name="control"
    )
    changed = add_lora(flux, control_file, 0.85, name="control", merge=merge)
    if second:
        pipeline.load_lora_weights(files[1], adapter_name="second")
        changed = add_lora(changed, files[1], 0.125, name="second", merge=merge)
    pipeline.set_adapters(["control", "second"][: 1 + second], [0.85, 0.125][: 1 + second])
    size = dict(width=64, height=48)
    ours = dict(steps=2, seed=3, max_text_tokens=16, output="tensor", progress=False)
    reference = dict(num_inference_steps=2, max_sequence_length=16, output_type="pt",
                     generator=torch.Generator().manual_seed(3))
    a = control(changed, "a red apple", edges, **size, **ours)
    b = pipeline("a red apple", control_image=edges, **size, **reference).images
    assert (a - b).abs().max() < BOUND
    assert changed.mmdit.config.in_channels == 128
    assert remove_lora(changed).mmdit.config.in_channels == 64


def test_a_dora_made_by_peft_paints_as_in_diffusers(folder, flux, tmp_path):
    file = peft_file(folder, tmp_path / "dora", 5, use_dora=True)
    assert (
        paint(add_lora(flux, file)) - theirs(pipeline_with(folder, (file, 1.0)))
    ).abs().max() < BOUND


def test_alphas_of_single_modules_come_from_the_metadata(folder, flux, tmp_path):
    file = peft_file(
        folder,
        tmp_path / "pattern",
        6,
        alpha_pattern={"transformer_blocks.0.attn.to_q": 12.0},
        rank_pattern={"proj_out": 2},
    )
    assert (
        paint(add_lora(flux, file)) - theirs(pipeline_with(folder, (file, 1.0)))
    ).abs().max() < BOUND


# -------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("merge", [True, False])
def test_a_scale_of_zero_is_the_identity_and_scales_can_change(flux, files, merge):
    off = add_lora(flux, files[0], 0.0, name="a", merge=merge)
    assert torch.equal(paint(off), paint(flux))
    on = set_lora_scales(off, {"a": 0.6})
    assert torch.equal(paint(on), paint(add_lora(flux, files[0], 0.6, merge=merge)))
    assert torch.equal(paint(set_lora_scales(on, {"a": 0.0})), paint(flux))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_removed_is_gone_bit_for_bit_and_the_given_model_is_unchanged(
    folder, files, control_file, dtype
):
    flux = load(folder, device="cpu", dtype=dtype)
    before = {name: p.clone() for name, p in flux.mmdit.named_parameters()}
    both = add_lora(add_lora(flux, files[0], name="a"), control_file, name="b")
    one = remove_lora(both, "b")
    assert all(
        torch.equal(p, q)
        for p, q in zip(one.mmdit.parameters(), add_lora(flux, files[0]).mmdit.parameters())
    )
    for again in (remove_lora(both), remove_lora(remove_lora(both, "a"), "b"), flux):
        assert again.mmdit.config.in_channels == 64 and again.loras is None
        assert all(torch.equal(p, before[name]) for name, p in again.mmdit.named_parameters())


def test_the_order_of_adding_does_not_matter(flux, files):
    a, b = (
        add_lora(add_lora(flux, files[0], name="a"), files[1], name="b"),
        add_lora(add_lora(flux, files[1], name="b"), files[0], name="a"),
    )
    assert (paint(a) - paint(b)).abs().max() < 1e-4


# ---------------------------------------------------------------------------------- mistakes


def test_names_are_used_once_and_only_what_is_there_can_be_removed(flux, files):
    one = add_lora(flux, files[0], name="a")
    for act, sentence in (
        (lambda: add_lora(one, files[1], name="a"), "a LoRA named 'a' is there already"),
        (lambda: remove_lora(one, "b"), "there is no LoRA 'b' to remove: the model has"),
        (lambda: remove_lora(flux), "there is no LoRA to remove: the model has none"),
        (lambda: set_lora_scales(one, {"b": 1.0}), "there is no LoRA 'b'"),
        (lambda: set_lora_scales(one, {"a": float("nan")}), "the scale of a is nan"),
        (lambda: add_lora(flux, files[0], "strong"), "scale is 'strong'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            act()
    with pytest.raises(FileNotFoundError, match="does not exist"):
        add_lora(flux, "nowhere.safetensors")


def test_a_lora_of_the_hub_has_the_name_of_its_repository(flux, files, tmp_path, monkeypatch):
    """Also with a dot in it. The cache is a fake one."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(files[0], tmp_path / "models--owner--FLUX.1-style" / "snapshots" / "abc")
    assert [lora.name for lora in add_lora(flux, "owner/FLUX.1-style").loras.added] == [
        "FLUX.1-style"
    ]


# ----------------------------------------------------------------------------------- command


def test_the_command_reports_files_and_says_by_its_exit_code_whether_it_understood(
    tmp_path, monkeypatch, capsys, files
):
    good = load_file(files[1] / "pytorch_lora_weights.safetensors")
    save_file(
        {
            "lora_unet_double_blocks_18_img_attn_proj.lora_down.weight": torch.ones(4, 3072),
            "lora_unet_double_blocks_18_img_attn_proj.lora_up.weight": torch.ones(3072, 4),
            "lora_unet_double_blocks_18_img_attn_proj.alpha": torch.tensor(2.0),
        },
        tmp_path / "good.safetensors",
    )
    save_file(good | {"nowhere.weight": torch.ones(1)}, tmp_path / "more.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for names, code, words in (
        (
            ["good"],
            0,
            ["matched 3 of 3 tensors, dialect kohya, rank 4, alpha 2, changes 1 modules of mmdit"],
        ),
        (
            ["good", "more"],
            1,
            [f"matched {len(good)} of {len(good) + 1} tensors", "not matched are nowhere.weight"],
        ),
        (["text"], 2, ["is not a complete safetensors file"]),
    ):
        monkeypatch.setattr(
            "sys.argv", ["lora", *(str(tmp_path / f"{name}.safetensors") for name in names)]
        )
        with pytest.raises(SystemExit) as stop:
            main()
        out = "".join(capsys.readouterr())
        assert stop.value.code == code and all(word in out for word in words), out
