"""Files and folders -> networks: every layout gives the same parameters, sizes come from configs or
tensors, and what is not the expected network is refused in one sentence.

Oracle of the parameters: the reference model that wrote them, bit for bit.
"""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from reference import clip, clip_state, t5, t5_state, transformer, vae
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig

from miniflux.checkpoints.configs import autoencoder_config, clip_config, mmdit_config
from miniflux.checkpoints.layouts import load_autoencoder, load_clip, load_mmdit, load_t5
from miniflux.checkpoints.names import autoencoder_from_diffusers, mmdit_from_diffusers
from miniflux.checkpoints.sizes import t5_config
from miniflux.networks.autoencoder import AutoencoderConfig
from miniflux.networks.clip import CLIPConfig
from miniflux.networks.mmdit import MMDiT, MMDiTConfig
from miniflux.networks.t5 import T5, T5Config

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"  # official configs and index files
LOADERS = {
    "transformer": load_mmdit,
    "vae": load_autoencoder,
    "text_encoder": load_clip,
    "text_encoder_2": load_t5,
}
needs_reference = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="the official configs are not here"
)


def save(path: Path, state: dict[str, Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path)
    return path


def change(folder: Path, **values) -> Path:
    """The same folder with other values in its config.json; None removes a key."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(
        json.dumps({k: v for k, v in config.items() if v is not None})
    )
    return folder


def holds(network: nn.Module, state: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> bool:
    """Whether the parameters of a network are exactly these tensors."""
    ours = network.state_dict()
    return ours.keys() == state.keys() and all(
        torch.equal(ours[name], tensor.to(dtype)) for name, tensor in state.items()
    )


def official(name: str) -> dict:
    return json.loads((REFERENCE / name / "config.json").read_text())


@pytest.fixture
def folder(tmp_path) -> Path:
    """transformer/, vae/, text_encoder/ and text_encoder_2/ as diffusers writes them; each test has
    its own."""
    for name, model in (
        ("transformer", transformer()),
        ("vae", vae()),
        ("text_encoder", clip()),
        ("text_encoder_2", t5()),
    ):
        model.save_pretrained(tmp_path / name)
    save(
        tmp_path / "text_encoder" / "model.safetensors", clip_state(clip())
    )  # transformers 5 writes other names
    return tmp_path


# -------------------------------------------------------------------------------------- config.json


@needs_reference
def test_the_official_configs_give_the_default_sizes():
    """Oracle: the config.json files of the official repositories."""
    assert mmdit_config(official("FLUX.1-dev/transformer"), REFERENCE) == MMDiTConfig()
    assert mmdit_config(official("FLUX.1-schnell/transformer"), REFERENCE) == MMDiTConfig(
        guidance_embed=False
    )
    assert autoencoder_config(official("FLUX.1-dev/vae"), REFERENCE) == AutoencoderConfig()
    assert autoencoder_config(official("FLUX.1-schnell/vae"), REFERENCE) == AutoencoderConfig()
    assert clip_config(official("FLUX.1-dev/text_encoder"), REFERENCE) == CLIPConfig()
    with torch.device("meta"):
        state = T5().state_dict()
    assert (
        t5_config(official("FLUX.1-dev/text_encoder_2"), state, REFERENCE)
        == t5_config({}, state, REFERENCE)
        == T5Config()
    )


def test_a_config_that_leaves_everything_out_has_the_defaults_of_diffusers():
    assert mmdit_config({}, Path("x")) == MMDiTConfig(guidance_embed=False)
    theirs = AutoencoderKL().config
    assert autoencoder_config({"shift_factor": 0.5}, Path("x")) == AutoencoderConfig(
        ch=64, ch_mult=(1,), num_res_blocks=theirs.layers_per_block, shift_factor=0.5,
        z_channels=theirs.latent_channels, num_groups=theirs.norm_num_groups,
        scale_factor=theirs.scaling_factor)
    theirs, ours = CLIPTextConfig(), clip_config({}, Path("x"))
    assert all(getattr(theirs, field.name) == getattr(ours, field.name) for field in fields(ours))


@pytest.mark.parametrize(
    "values, out",
    [
        ({}, 64),
        ({"in_channels": 96}, 96),
        ({"in_channels": 96, "out_channels": None}, 96),
        ({"in_channels": 384, "out_channels": 64}, 64),
    ],
    ids=str,
)
def test_a_transformer_without_out_channels_has_as_many_as_in_channels(values, out):
    assert mmdit_config(values, Path("x")).out_channels == out


@pytest.mark.parametrize("value", ["64", 0, -1, 1.5, True, None, [64], {}, 10**12], ids=str)
@pytest.mark.parametrize(
    "read, key",
    [
        (mmdit_config, "in_channels"),
        (mmdit_config, "num_attention_heads"),
        (mmdit_config, "attention_head_dim"),
        (mmdit_config, "num_layers"),
        (mmdit_config, "num_single_layers"),
        (mmdit_config, "joint_attention_dim"),
        (autoencoder_config, "layers_per_block"),
        (autoencoder_config, "latent_channels"),
        (autoencoder_config, "norm_num_groups"),
        (clip_config, "hidden_size"),
        (clip_config, "num_attention_heads"),
        (clip_config, "vocab_size"),
    ],
)
def test_a_size_that_is_no_size_is_refused(read, key, value):
    with pytest.raises(ValueError, match="^x/config.json: .*, expected .*whole number"):
        read({key: value}, Path("x/config.json"))


@pytest.mark.parametrize(
    "read, values, message",
    [
        (
            mmdit_config,
            {"guidance_embeds": "false"},
            "guidance_embeds is 'false', expected true or false",
        ),
        (mmdit_config, {"axes_dims_rope": [16, 56]}, r"that sum to the head width"),
        (mmdit_config, {"axes_dims_rope": [64, 64]}, r"expected three even numbers"),
        (mmdit_config, {"axes_dims_rope": [15, 57, 56]}, r"expected three even numbers"),
        (mmdit_config, {"axes_dims_rope": [16, 56.0, 56]}, r"expected a short list of sizes"),
        (mmdit_config, {"axes_dims_rope": 128}, r"expected a short list of sizes"),
        (mmdit_config, {"axes_dims_rope": [-16, 88, 56]}, r"expected a short list of sizes"),
        (
            mmdit_config,
            {"_class_name": "SD3Transformer2DModel"},
            "describes a 'SD3Transformer2DModel', expected a FluxTransformer2D",
        ),
        (
            autoencoder_config,
            {"_class_name": "AutoencoderTiny"},
            "describes a 'AutoencoderTiny', expected a AutoencoderKL",
        ),
        (autoencoder_config, {"block_out_channels": []}, "block_out_channels is"),
        (autoencoder_config, {"block_out_channels": 128}, "block_out_channels is 128"),
        (autoencoder_config, {"block_out_channels": "128"}, "block_out_channels is '128'"),
        (autoencoder_config, {"block_out_channels": [0, 0]}, "block_out_channels is"),
        (
            autoencoder_config,
            {"block_out_channels": [128, 192]},
            "expected a list of multiples of its first",
        ),
        (autoencoder_config, {"block_out_channels": [32] * 100}, "expected a short list of sizes"),
        (
            autoencoder_config,
            {"scaling_factor": 0},
            "scaling_factor is 0, expected a positive number",
        ),
        (autoencoder_config, {"scaling_factor": float("inf")}, "scaling_factor is inf"),
        (autoencoder_config, {"shift_factor": None}, "shift_factor is None"),
        (
            clip_config,
            {"architectures": ["BertModel"]},
            "describes a 'BertModel', expected a CLIPTextModel",
        ),
        (
            clip_config,
            {"hidden_act": "relu"},
            "hidden_act is 'relu', expected one of quick_gelu, gelu",
        ),
        (clip_config, {"num_attention_heads": 7}, "512 channels cannot be shared by 7 heads"),
        (
            clip_config,
            {"eos_token_id": None},
            "eos_token_id is None, expected a whole number from 0",
        ),
        (mmdit_config, {"patch_size": 2}, "patch_size is 2, expected 1"),
        (autoencoder_config, {"use_quant_conv": True}, "use_quant_conv is True, expected False"),
        (
            autoencoder_config,
            {"use_post_quant_conv": True},
            "use_post_quant_conv is True, expected Fa",
        ),
        (autoencoder_config, {"act_fn": "relu"}, "act_fn is 'relu', expected 'silu'"),
        (
            autoencoder_config,
            {"mid_block_add_attention": False},
            "mid_block_add_attention is False",
        ),
        (autoencoder_config, {"in_channels": 4}, "in_channels is 4, expected 3"),
        (
            autoencoder_config,
            {
                "block_out_channels": [64, 64],
                "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
            },
            "expected 2 of 'DownEncoderBlock2D'",
        ),
        (autoencoder_config, {}, "shift_factor is None, expected a number"),
        (clip_config, {"layer_norm_eps": "small"}, "layer_norm_eps is 'small'"),
    ],
    ids=lambda value: str(value)[:50] if isinstance(value, dict) else "",
)
def test_a_config_that_does_not_fit_is_refused(read, values, message):
    with pytest.raises(ValueError, match=f"^x/config.json.*{message}"):
        read(values, Path("x/config.json"))


@pytest.mark.parametrize("architectures", [None, [], "CLIPTextModel", 3, [None]], ids=str)
def test_a_config_that_names_no_class_is_read_for_its_sizes(architectures):
    assert clip_config({"architectures": architectures}, Path("x")) == clip_config({}, Path("x"))


def test_a_shift_of_zero_is_a_shift():
    assert autoencoder_config({"shift_factor": 0, "scaling_factor": 1}, Path("x")).shift_factor == 0


# ---------------------------------------------------------------------------------- the transformer


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("in_channels", [64, 128, 384])
def test_a_transformer_in_any_layout_is_the_same(tmp_path, guidance, in_channels):
    """diffusers' folder in one file and in shards that split blocks, diffusers' names in a file,
    original names, ComfyUI's prefix among unrelated tensors."""
    model = transformer(guidance, in_channels)
    expected = mmdit_from_diffusers(model.state_dict())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    strangers = {
        name: torch.ones(3)
        for name in ("vae.decoder.conv_in.weight", "model.other", "text_encoders.clip_l.x")
    }
    prefixed = {"model.diffusion_model." + name: tensor for name, tensor in expected.items()}
    for path in (
        tmp_path / "one",
        tmp_path / "shards",
        save(tmp_path / "diffusers.safetensors", model.state_dict()),
        save(tmp_path / "original.safetensors", expected),
        save(tmp_path / "comfy.safetensors", prefixed | strangers),
    ):
        network = load_mmdit(path)
        assert holds(network, expected), path
        assert network.config.guidance_embed == guidance
        assert (network.config.in_channels, network.config.out_channels) == (in_channels, 64)


def test_a_transformer_from_diffusers_names_with_the_prefix_is_the_same(tmp_path):
    state = transformer().state_dict()
    path = save(
        tmp_path / "a.safetensors",
        {"model.diffusion_model." + name: tensor for name, tensor in state.items()},
    )
    assert holds(load_mmdit(path), mmdit_from_diffusers(state))


@pytest.mark.parametrize(
    "config",
    [
        MMDiTConfig(
            in_channels=12,
            out_channels=8,
            vec_in_dim=5,
            context_in_dim=7,
            hidden_size=128,
            num_heads=1,
            depth=1,
            depth_single_blocks=1,
        ),
        MMDiTConfig(
            hidden_size=128,
            num_heads=2,
            axes_dim=(8, 28, 28),
            depth=2,
            depth_single_blocks=1,
            guidance_embed=False,
        ),
        MMDiTConfig(
            hidden_size=48,
            num_heads=3,
            axes_dim=(4, 6, 6),
            depth=1,
            depth_single_blocks=12,
            vec_in_dim=9,
            mlp_ratio=2.5,
        ),
        MMDiTConfig(
            hidden_size=56,
            num_heads=4,
            axes_dim=(2, 6, 6),
            depth=11,
            depth_single_blocks=0,
            mlp_ratio=488 / 56,
        ),
    ],
    ids=lambda config: f"{config.hidden_size}",
)
def test_the_sizes_of_a_single_file_are_those_of_its_tensors(tmp_path, config):
    """There and back. Heads of 128 turn 16, 56, 56 channels by index, row, column, as official,
    others in proportion."""
    network = MMDiT(config)
    found = load_mmdit(save(tmp_path / "a.safetensors", network.state_dict())).config
    assert {**vars(found), "mlp_ratio": 0} == {**vars(config), "mlp_ratio": 0}
    assert found.mlp_ratio == pytest.approx(config.mlp_ratio, rel=0.02)


def test_every_mlp_width_is_found_again(tmp_path):
    """120 / 88 * 88 is 119.99999999999999 in floating point: a quotient that rounds down must not
    lose a row."""
    for hidden, width in ((88, 120), (56, 488), (96, 100), (8, 2)):
        config = MMDiTConfig(
            hidden_size=hidden,
            num_heads=hidden // 8,
            axes_dim=(4, 2, 2),
            depth=1,
            depth_single_blocks=1,
            mlp_ratio=width / hidden,
        )
        network = load_mmdit(save(tmp_path / "a.safetensors", MMDiT(config).state_dict()))
        assert (
            network.double_blocks[0].img_mlp[0].out_features
            == network.single_blocks[0].linear2.in_features - hidden
            == width
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_are_converted_to_the_wanted_type(tmp_path, dtype):
    state = mmdit_from_diffusers(transformer().state_dict())
    stored = {
        name: tensor.to(torch.float8_e4m3fn if tensor.ndim == 2 else torch.bfloat16)
        for name, tensor in state.items()
    }
    assert holds(load_mmdit(save(tmp_path / "a.safetensors", state), "cpu", dtype), state, dtype)
    fp8 = load_mmdit(save(tmp_path / "fp8.safetensors", stored), "cpu", dtype)
    for name, tensor in stored.items():
        module, _, attribute = name.rpartition(".")
        assert torch.equal(getattr(fp8.get_submodule(module), attribute), tensor.to(dtype))


def test_networks_come_to_the_wanted_device_ready_to_use(folder):
    for name, load in LOADERS.items():
        network = load(folder / name, "meta", torch.bfloat16)
        assert not network.training
        assert all(
            (p.device.type, p.dtype, p.requires_grad) == ("meta", torch.bfloat16, False)
            for p in network.parameters()
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_float32_file_is_used_where_it_lies_on_the_disk(tmp_path):
    """Oracle: the system's list of mapped files: every parameter's address is in a mapping of the
    checkpoint, none in a copy."""
    network = MMDiT(MMDiTConfig(hidden_size=128, num_heads=1, depth=1, depth_single_blocks=1))
    path = save(tmp_path / "flux1-a.safetensors", network.state_dict())
    network = load_mmdit(path, "cpu", torch.float32)
    lines = [
        line.split()[0]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(path))
    ]
    mapped = [range(*(int(address, 16) for address in line.split("-"))) for line in lines]
    assert mapped and all(
        any(p.data_ptr() in piece for piece in mapped) for p in network.parameters()
    )


# ------------------------------------------------------------------------- autoencoder, CLIP and T5


def test_an_autoencoder_in_any_layout_is_the_same(tmp_path):
    """A single file has the official 32 groups and factors, which are not in its tensors."""
    model = vae((32, 64, 96), groups=32, blocks=2)
    expected = autoencoder_from_diffusers(model.state_dict())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
    for path in (tmp_path / "one", tmp_path / "shards", save(tmp_path / "ae.safetensors", expected),
                 save(tmp_path / "diffusers.safetensors", model.state_dict())):
        network = load_autoencoder(path)
        assert holds(network, expected), path
        assert network.config == AutoencoderConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=2)


def test_an_autoencoder_with_other_groups_needs_its_config(folder):
    """The number of groups is not in the tensors, and a guess would paint wrong pictures."""
    config = load_autoencoder(folder / "vae").config
    assert config == AutoencoderConfig(ch=8, ch_mult=(1, 2, 3, 3), num_res_blocks=1, num_groups=4)
    path = save(folder / "ae.safetensors", autoencoder_from_diffusers(vae().state_dict()))
    with pytest.raises(
        ValueError,
        match=r"widths \[8, 16, 24, 24\], expected multiples .* of 32.* vae/ with a config.json",
    ):
        load_autoencoder(path)


def test_groups_that_do_not_divide_the_widths_are_refused(folder):
    with pytest.raises(
        ValueError, match="vae: there is no Autoencoder of these sizes: .*divisible"
    ):
        load_autoencoder(change(folder / "vae", norm_num_groups=5))


# What published CLIP files hold besides the text tower.
CLIP_EXTRAS = {"logit_scale": torch.tensor(1.0), "text_projection.weight": torch.ones(24, 24),
               "text_model.embeddings.position_ids": torch.arange(77)[None]}


def test_clip_in_any_layout_is_the_same(folder):
    """With and without the prefix; loose, with what ComfyUI's and OpenAI's files hold besides; a
    whole CLIP in a folder."""
    expected = clip_state(clip())
    assert holds(load_clip(folder / "text_encoder"), expected)
    assert load_clip(folder / "text_encoder").config.num_attention_heads == 4
    bare = save(
        folder / "text_encoder" / "model.safetensors",
        {k.removeprefix("text_model."): v for k, v in expected.items()},
    )
    assert holds(load_clip(bare.parent), expected)
    vision = {
        "visual_projection.weight": torch.ones(24, 9),
        "vision_model.encoder.layers.7.mlp.fc1.weight": torch.ones(3),
        "vision_model.embeddings.position_ids": torch.arange(5),
    }
    whole = save(folder / "whole" / "model.safetensors", expected | CLIP_EXTRAS | vision).parent
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    (whole / "config.json").write_text(
        json.dumps(
            {
                "architectures": ["CLIPModel"],
                "hidden_size": 99,
                "text_config": config,
                "vision_config": {"hidden_size": 9},
            }
        )
    )
    assert holds(load_clip(whole), expected)


def test_a_loose_clip_has_heads_of_64_channels(folder):
    expected = clip_state(clip(hidden=128))
    network = load_clip(save(folder / "clip_l.safetensors", expected | CLIP_EXTRAS))
    assert holds(network, expected)
    assert network.config == CLIPConfig(
        hidden_size=128,
        intermediate_size=257,
        num_hidden_layers=3,
        num_attention_heads=2,
        vocab_size=600,
    )
    with pytest.raises(ValueError, match="is 24 wide, expected a multiple of 64"):
        load_clip(save(folder / "clip_s.safetensors", clip_state(clip())))


def test_t5_in_any_layout_is_the_same(folder):
    """Sharded; loose in float16, with the embedding under two names or under the other; a whole T5
    with its decoder."""
    model, path = t5(), folder / "t5xxl_fp16.safetensors"
    expected = t5_state(model)
    model.save_pretrained(folder / "shards", max_shard_size="50KB")
    assert len(list((folder / "shards").glob("*.safetensors"))) > 2
    assert holds(load_t5(folder / "text_encoder_2"), expected) and holds(
        load_t5(folder / "shards"), expected
    )
    half = {name: tensor.half() for name, tensor in expected.items()}
    second = {"encoder.embed_tokens.weight": half["shared.weight"]}
    rest = {name: tensor for name, tensor in half.items() if name != "shared.weight"}
    decoder = {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(2),
        "lm_head.weight": torch.ones(3),
    }
    for state in (half, half | second, rest | second, half | decoder):
        assert holds(load_t5(save(path, state), "cpu", torch.float32), half)
    assert load_t5(path).config == T5Config(
        d_model=32, d_kv=12, d_ff=50, num_layers=3, num_heads=4, vocab_size=300
    )


# ---------------------------------------------------------------------------------- what is refused


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    state = mmdit_from_diffusers(transformer().state_dict())
    lacking = {
        name: tensor for name, tensor in state.items() if not name.startswith("single_blocks.1")
    }
    with pytest.raises(
        ValueError,
        match=r"a.safetensors is not a MMDiT of these sizes: "
        r"missing (single_blocks\.1\.\S+, ){4}\S+ and 3 more; unexpected extra.weight$",
    ):
        load_mmdit(save(tmp_path / "a.safetensors", lacking | {"extra.weight": torch.ones(1)}))


def test_a_tensor_of_another_shape_is_named(folder):
    for tensor, expected in (
        ("txt_in.bias", r"\[48\]"),
        ("double_blocks.1.img_mlp.2.weight", r"\[48, 192\]"),
    ):
        state = mmdit_from_diffusers(transformer().state_dict()) | {tensor: torch.ones(47)}
        with pytest.raises(
            ValueError, match=rf"a.safetensors: {tensor} has the shape \[47\], expected {expected}"
        ):
            load_mmdit(save(folder / "a.safetensors", state))


def test_a_config_of_another_depth_or_width_is_refused(folder):
    with pytest.raises(
        ValueError, match="transformer is not a MMDiT of these sizes: missing double_blocks.2"
    ):
        load_mmdit(change(folder / "transformer", num_layers=3))
    with pytest.raises(ValueError, match="txt_in.weight has the shape .48, 32., expected .48, 33."):
        load_mmdit(change(folder / "transformer", num_layers=2, joint_attention_dim=33))


def test_whole_numbers_are_no_weights(tmp_path):
    state = mmdit_from_diffusers(transformer().state_dict())
    with pytest.raises(
        ValueError, match="img_in.weight holds torch.int8, expected floating-point numbers"
    ):
        load_mmdit(
            save(
                tmp_path / "a.safetensors",
                state | {"img_in.weight": state["img_in.weight"].to(torch.int8)},
            )
        )


@pytest.mark.parametrize("load, message", [
    (load_mmdit, "is not a FLUX transformer: it lacks img_in.weight, txt_in.weight,"),
    (load_autoencoder, "is not a FLUX autoencoder: it lacks encoder.conv_in"),
    (load_clip, "holds no CLIP text tower: it lacks text_model.embeddings"),
    (load_t5, r"is not a gated T5 encoder \(v1.1\): it lacks shared.weight")])
@pytest.mark.parametrize(
    "state",
    [
        {},
        {"a": torch.ones(3)},
        {"img_in.weight": torch.tensor(1.0)},
        {"encoder.down.0.block.0.conv1.weight": torch.ones(2)},
    ],
    ids=["nothing", "a stranger", "a scalar", "a vector"],
)
def test_a_file_of_another_model_is_refused(tmp_path, load, message, state):
    with pytest.raises(ValueError, match=f"a.safetensors {message}"):
        load(save(tmp_path / "a.safetensors", state))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (5,), (100,)], ids=str)
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, shape):
    state = mmdit_from_diffusers(transformer().state_dict())
    state["double_blocks.0.img_attn.norm.query_norm.scale"] = torch.ones(shape)
    with pytest.raises(
        ValueError, match="a.safetensors(: 48 channels cannot be heads| is not a FLUX transformer)"
    ):
        load_mmdit(save(tmp_path / "a.safetensors", state))


def test_a_t5_that_is_not_gated_or_has_no_heads_is_refused(tmp_path):
    state = t5_state(t5())
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    gate = "encoder.block.0.layer.1.DenseReluDense.wi_0.weight"
    with pytest.raises(ValueError, match=f"it lacks {gate}"):
        load_t5(
            save(
                tmp_path / "a.safetensors",
                {name: tensor for name, tensor in state.items() if name != gate},
            )
        )
    for shape in ((32, 0), (0, 4), (32, 5), (2, 4), (1000, 4)):
        with pytest.raises(ValueError, match="it lacks|do not fit together"):
            load_t5(save(tmp_path / "a.safetensors", state | {bias: torch.ones(shape)}))


def test_folders_of_one_part_given_for_another_are_refused(folder):
    for name, load in zip(LOADERS, reversed(LOADERS.values())):
        with pytest.raises(ValueError, match=f"{name}/config.json describes a '.*', expected a "):
            load(folder / name)


def test_weights_in_a_pickle_are_refused(folder):
    for name, stem in (
        ("transformer", "diffusion_pytorch_model"),
        ("text_encoder_2", "pytorch_model"),
    ):
        for path in (folder / name).glob("*.safetensors"):
            path.unlink()
        torch.save({}, folder / name / f"{stem}.bin")
    for load, name in ((load_mmdit, "transformer"), (load_t5, "text_encoder_2")):
        with pytest.raises(
            ValueError,
            match="model.bin is a pickle, which can run any code .*: convert it to safetensors",
        ):
            load(folder / name)


def test_loading_imports_no_compiler():
    """Initialising an embedding on the meta device imports torch._dynamo, a second of every cold
    start."""
    code = (
        "import sys, miniflux; miniflux.load(device='cpu'); "
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
