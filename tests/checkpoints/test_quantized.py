"""Quantised files. Oracles: gguf-py; torch's own float8; the published formulas written out; the
same weights unquantised."""

import json
import random
import struct
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from reference import small_pipeline, t5, t5_state, transformer
from safetensors.torch import save_file
from torch import Tensor

from miniflux import add_lora, generate, load, remove_lora
from miniflux.checkpoints.blocks import BLOCKS, OTHER_BLOCKS
from miniflux.checkpoints.gguf import PLAIN, read_gguf
from miniflux.checkpoints.layouts import load_mmdit, load_t5
from miniflux.checkpoints.names import T5_GGUF, mmdit_from_diffusers, mmdit_to_diffusers
from miniflux.checkpoints.quantized import (
    BLOCK,
    FP4,
    NF4,
    QuantizedLinear,
    QuantizedTensor,
    concat,
    gather_quantized,
)
from miniflux.networks.mmdit import MMDiTInputs


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wide(seed: int = 0) -> dict[str, Tensor]:
    """A transformer 128 wide under its original names, so that rows are whole blocks."""
    from diffusers import FluxTransformer2DModel
    from reference import randomise
    return mmdit_from_diffusers(
        randomise(
            FluxTransformer2DModel(
                in_channels=64,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=64,
                num_attention_heads=4,
                joint_attention_dim=64,
                pooled_projection_dim=64,
                guidance_embeds=True,
                axes_dims_rope=(8, 28, 28),
            ),
            seed,
        ).state_dict()
    )


# The config of `wide`.
CONFIG = {"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1,
          "attention_head_dim": 64, "num_attention_heads": 4, "joint_attention_dim": 64,
          "pooled_projection_dim": 64, "guidance_embeds": True, "axes_dims_rope": [8, 28, 28]}


def forward(network, seed: int = 0) -> Tensor:
    config = network.config
    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(3)])
    return network(
        MMDiTInputs(
            img=randn(1, 6, 64),
            txt=randn(1, 5, config.context_in_dim, seed=1),
            pooled=randn(1, config.vec_in_dim, seed=2),
            t=torch.tensor([0.4]),
            guidance=torch.tensor([3.5]),
            img_ids=ids,
            txt_ids=torch.zeros(5, 3, dtype=torch.int64),
        )
    )


def unpacked(network) -> dict[str, Tensor]:
    """The weights that the layers compute with."""
    state = dict(network.named_parameters())
    return state | {
        f"{name}.weight": module.weight
        for name, module in network.named_modules()
        if isinstance(module, QuantizedLinear)
    }


# --------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("kind", BLOCKS)
def test_every_block_format_gives_the_numbers_of_gguf_py(kind):
    """Random bytes, so every value of every field occurs; not a bit differs."""
    number, size, length, numbers = BLOCKS[kind]
    assert GGMLQuantizationType[kind].value == number and GGML_QUANT_SIZES[
        GGMLQuantizationType[kind]
    ] == (size, length)
    data = np.random.default_rng(number).integers(0, 256, (400, length), dtype=np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                     # scales that are no numbers
        expected = gguf.quants.dequantize(data, GGMLQuantizationType[kind])
    got = numbers(torch.from_numpy(data)).reshape(400, size).numpy()
    assert np.array_equal(got, expected, equal_nan=True)


def gguf_file(path: Path, state: dict[str, Tensor], kinds, architecture: str = "flux") -> Path:
    """Written by gguf-py; kinds(name) is a type in which gguf-py can write, or None for float32."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "small")
    writer.add_array("some.words", ["a", "list", "of texts"])
    writer.add_array("some.numbers", [1, 2, 3])
    for name, tensor in state.items():
        kind = kinds(name, tensor)
        if kind is None:
            writer.add_tensor(name, tensor.float().contiguous().numpy())
        else:
            kind = GGMLQuantizationType[kind]
            writer.add_tensor(
                name,
                gguf.quants.quantize(tensor.float().contiguous().numpy(), kind),
                raw_dtype=kind,
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16"])
def test_a_transformer_in_gguf_computes_with_gguf_pys_numbers(tmp_path, kind):
    state = wide()
    path = gguf_file(
        tmp_path / "flux1.gguf",
        state,
        lambda name, tensor: kind if tensor.ndim == 2 and "blocks" in name else None,
    )
    network, weights = load_mmdit(path, "cpu", torch.float32), None
    weights = unpacked(network)
    for name, tensor in state.items():
        expected = tensor
        if tensor.ndim == 2 and "blocks" in name:
            number = GGMLQuantizationType[kind]
            expected = torch.from_numpy(
                gguf.quants.dequantize(
                    gguf.quants.quantize(tensor.contiguous().numpy(), number), number
                ).copy()
            )
        assert torch.equal(weights[name], expected), name
    is_packed = isinstance(network.double_blocks[0].img_attn.qkv, QuantizedLinear)
    assert is_packed == (kind in BLOCKS) and forward(network).isfinite().all()


@pytest.mark.parametrize("kind, name", [(21, "IQ3_S"), (16, "IQ2_XXS"), (39, "MXFP4")])
def test_a_gguf_format_that_is_not_read_is_named(tmp_path, kind, name):
    assert GGMLQuantizationType[name].value == kind
    path = gguf_file(tmp_path / "a.gguf", {"x": randn(4, 64)}, lambda name, tensor: "Q4_0")
    q4_0 = struct.pack("<IQ", GGMLQuantizationType.Q4_0.value, 0)
    path.write_bytes(path.read_bytes().replace(q4_0, struct.pack("<IQ", kind, 0)))
    with pytest.raises(
        ValueError, match=f"the tensor x is in the format {name}, which is not read here"
    ):
        read_gguf(path)


def test_every_gguf_format_is_read_or_named():
    """Oracle: gguf-py's list. The Q4_0_4_4 family is no longer in the format."""
    known = {number for number, *_ in BLOCKS.values()} | set(PLAIN) | set(OTHER_BLOCKS)
    assert {kind.value for kind in GGMLQuantizationType} <= known
    assert all(GGMLQuantizationType(number).name == name for number, name in OTHER_BLOCKS.items()
               if number in set(GGMLQuantizationType))


PREFIXES = ["model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.",
            "_orig_mod.", "model._orig_mod.", "_orig_mod.transformer."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", ["safetensors", "gguf", "float8", "nf4", "folder"])
def test_a_prefix_of_the_names_is_left_out_in_every_container(tmp_path, container, prefix):
    """Oracle: the same weights without the prefix."""
    state = {name: tensor.contiguous() for name, tensor in wide().items()}
    is_matrix = {name for name, tensor in state.items() if tensor.ndim == 2 and "blocks" in name}

    def stored(prefix: str) -> dict[str, Tensor]:
        if container == "nf4":
            parts = {
                name: bnb_four_bits(tensor, "nf4", False) if name in is_matrix else {"": tensor}
                for name, tensor in state.items()
            }
            return {prefix + name + suffix: part for name, group in parts.items()
                    for suffix, part in group.items()}
        return {prefix + name: tensor.to(torch.float8_e4m3fn)
                if container == "float8" and name in is_matrix else tensor
                for name, tensor in state.items()}

    def network(prefix: str):
        if container == "gguf":
            path = gguf_file(
                tmp_path / f"{prefix}a.gguf",
                stored(prefix),
                lambda name, _: "Q8_0" if name.removeprefix(prefix) in is_matrix else None,
            )
        elif container == "folder":
            path = tmp_path / f"{prefix}folder"
            path.mkdir()
            tensors = {prefix + name: tensor.contiguous()
                       for name, tensor in mmdit_to_diffusers(state).items()}
            save_file(tensors, path / "diffusion_pytorch_model.safetensors")
            (path / "config.json").write_text(json.dumps(CONFIG))
        else:
            path = tmp_path / f"{prefix}a.safetensors"
            save_file(stored(prefix), path)
        return load_mmdit(path, "cpu", torch.float32)

    expected, got = unpacked(network("")), unpacked(network(prefix))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_compiled_block_inside_of_a_checkpoint_is_read(tmp_path):
    """torch.compile of single blocks writes its own word into the middle of the names."""
    state = {name: tensor.contiguous() for name, tensor in wide().items()}
    compiled = {
        name.replace("blocks.0.", "blocks.0._orig_mod."): tensor for name, tensor in state.items()
    }
    save_file(compiled, tmp_path / "a.safetensors")
    network = load_mmdit(tmp_path / "a.safetensors", "cpu", torch.float32)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


def test_t5_in_gguf_is_t5(tmp_path):
    """Names of llama.cpp; the embedding, which is no linear layer, is unpacked."""
    state, names = t5_state(t5(d_model=64)), {ours: theirs for theirs, ours in T5_GGUF.items()}

    def rename(name: str) -> str:
        for ours, theirs in sorted(names.items(), key=lambda pair: -len(pair[0])):
            name = name.replace(ours, theirs)
        return name

    path = gguf_file(
        tmp_path / "t5.gguf",
        {rename(name): tensor for name, tensor in state.items()},
        lambda name, tensor: (
            "Q8_0"
            if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and "rel_b" not in name
            else None
        ),
        "t5",
    )
    save_file(state, tmp_path / "t5.safetensors")
    plain, packed = (
        load_t5(tmp_path / "t5.safetensors", "cpu", torch.float32),
        load_t5(path, "cpu", torch.float32),
    )
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    assert isinstance(packed.encoder.block[1].layer[0].SelfAttention.q, QuantizedLinear)
    assert (packed(ids) - plain(ids)).abs().max() < 0.05 * plain(ids).abs().max()


def test_a_gguf_file_that_cannot_be_is_refused_in_one_sentence(tmp_path):
    path = gguf_file(tmp_path / "a.gguf", {"x": randn(4, 64)}, lambda name, tensor: "Q4_0")
    good = path.read_bytes()
    for spoilt, sentence in (
        (b"", "it ends within its header"),
        (b"PK" + good[2:], "does not begin with GGUF"),
        (good[:40], "it ends within"),
        (good[:-32], "its data end too early"),
        (good[:8] + struct.pack("<Q", 1 << 60) + good[16:], "claims"),
        (good.replace(b"\x02\0\0\0" + bytes(8), b"\x63\0\0\0" + bytes(8)), "the type 99"),
    ):
        (tmp_path / "b.gguf").write_bytes(spoilt)
        with pytest.raises(ValueError, match=f"b.gguf is not a complete GGUF file.*{sentence}"):
            read_gguf(tmp_path / "b.gguf")
    with pytest.raises(FileNotFoundError, match="nowhere.gguf does not exist"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_damaged_gguf_headers_are_refused_or_read_within_the_file(tmp_path):
    """Every read is refused in one line, or gives tensors that lie within the file."""
    path = gguf_file(
        tmp_path / "a.gguf",
        {"x": randn(4, 64), "y": randn(3)},
        lambda name, tensor: "Q4_0" if tensor.ndim == 2 else None,
    )
    good, draw, read = path.read_bytes(), random.Random(0), 0
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(draw.choice((1, 1, 2, 8))):
            data[draw.randrange(len(data) - 96)] = draw.choice(
                (0, 1, 127, 128, 255, draw.randrange(256))
            )
        path.write_bytes(data[:draw.choice((len(data), draw.randrange(len(data))))])
        try:
            tensors = read_gguf(path)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < len(str(path)) + 300
            continue
        read += 1
        stored = [
            part
            for tensor in tensors.values()
            for part in (tensor.parts.values() if isinstance(tensor, QuantizedTensor) else [tensor])
        ]
        assert sum(part.numel() * part.dtype.itemsize for part in stored) <= 2 * len(data)
    assert read > 100


# ------------------------------------------------------------------------------------------- float8


@pytest.mark.parametrize("form", ["plain", "e5m2", "older", "newer", "rows"])
def test_float8_files_are_weights_times_their_scales(tmp_path, form):
    """ComfyUI's forms; a scale of 1 where there is none."""
    state, stored = wide(), {}
    dtype = torch.float8_e5m2 if form == "e5m2" else torch.float8_e4m3fn
    expected = {}
    for name, tensor in state.items():
        module = name.removesuffix(".weight")
        if tensor.ndim != 2 or "blocks" not in name:
            stored[name] = expected[name] = tensor
            continue
        scale = {"older": tensor.abs().max() / 448, "newer": tensor.abs().max() / 448,
                 "rows": tensor.abs().amax(1) / 448}.get(form, torch.tensor(1.0))
        stored[name] = (tensor / (scale[:, None] if scale.ndim else scale)).to(dtype)
        expected[name] = stored[name].float() * (scale[:, None] if scale.ndim else scale)
        if form == "older":
            stored |= {f"{module}.scale_weight": scale, f"{module}.scale_input": torch.tensor(1.0)}
        if form in ("newer", "rows"):
            stored |= {
                f"{module}.weight_scale": scale,
                f"{module}.input_scale": torch.tensor(1.0),
                f"{module}.comfy_quant": torch.tensor(
                    list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8
                ),
            }
    if form == "older":
        stored["scaled_fp8"] = torch.empty(0, dtype=dtype)
    save_file(
        {f"model.diffusion_model.{name}": tensor.contiguous() for name, tensor in stored.items()},
        tmp_path / "flux1.safetensors",
    )
    network = load_mmdit(tmp_path / "flux1.safetensors", "cpu", torch.float32)
    weights = unpacked(network)
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    size = sum(
        b.numel() * b.dtype.itemsize
        for b in (*network.double_blocks[0].parameters(), *network.double_blocks[0].buffers())
    )
    assert size < 0.3 * sum(
        4 * t.numel() for name, t in state.items() if name.startswith("double")
    )  # a quarter of float32, and scales


# ------------------------------------------------------------------------------------- bitsandbytes


def bnb_four_bits(weight: Tensor, kind: str, nested: bool) -> dict[str, Tensor]:
    """A weight as bitsandbytes stores it (suffix -> tensor), by its formulas."""
    table = torch.tensor(NF4 if kind == "nf4" else FP4)
    blocks = weight.reshape(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    codes = (
        ((blocks / absmax[:, None])[..., None] - table).abs().argmin(-1).flatten().to(torch.uint8)
    )
    form = {"quant_type": kind, "blocksize": BLOCK, "dtype": "float32", "shape": list(weight.shape)}
    stored = {"": (codes[::2] << 4 | codes[1::2])[:, None], ".absmax": absmax, ".quant_map": table}
    if nested:
        offset, levels = absmax.mean(), torch.linspace(-1, 1, 256)
        groups = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        top = groups.abs().amax(1)
        nearest = (
            ((groups / top[:, None])[..., None] - levels).abs().argmin(-1).flatten()[: len(absmax)]
        )
        stored |= {
            ".absmax": nearest.to(torch.uint8),
            ".nested_absmax": top,
            ".nested_quant_map": levels,
        }
        form |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(offset)}
    stored[f".quant_state.bitsandbytes__{kind}"] = torch.tensor(
        list(json.dumps(form).encode()), dtype=torch.uint8
    )
    return stored


def bnb_numbers(stored: dict[str, Tensor], kind: str, shape) -> Tensor:
    """What bitsandbytes computes back, number by number."""
    absmax, table = stored[".absmax"], stored[".quant_map"]
    form = json.loads(bytes(stored[f".quant_state.bitsandbytes__{kind}"].tolist()))
    numbers = []
    for i, byte in enumerate(stored[""].flatten().tolist()):
        for place, code in ((2 * i, byte >> 4), (2 * i + 1, byte & 15)):
            scale = absmax[place // 64]
            if "nested_offset" in form:
                scale = (
                    stored[".nested_quant_map"][int(scale)]
                    * stored[".nested_absmax"][place // 64 // 256]
                    + form["nested_offset"]
                )
            numbers.append(float(table[code] * scale))
    return torch.tensor(numbers).view(shape)


@pytest.mark.parametrize("kind, nested", [("nf4", False), ("nf4", True), ("fp4", False)])
def test_four_bits_are_a_table_times_the_largest_of_each_block(kind, nested):
    weight = randn(6, 128)
    stored = bnb_four_bits(weight, kind, nested)
    packed = gather_quantized(
        {f"a.weight{suffix}": tensor for suffix, tensor in stored.items()}, "file"
    )["a.weight"]
    assert torch.allclose(packed.dequantize(), bnb_numbers(stored, kind, (6, 128)), atol=1e-6)
    assert (packed.dequantize() - weight).abs().max() < 0.6


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_folder_of_diffusers_is_joined_without_unpacking(tmp_path, kind):
    """Its q, k and v are apart; ours are one weight."""
    state, stored, expected = mmdit_to_diffusers(wide()), {}, {}
    for name, tensor in state.items():
        if tensor.ndim != 2 or "blocks" not in name:
            stored[name] = expected[name] = tensor
        elif kind == "nf4":
            parts = bnb_four_bits(tensor, "nf4", nested=True)
            stored |= {name + suffix: part for suffix, part in parts.items()}
            expected[name] = gather_quantized(
                {f"a.weight{suffix}": part for suffix, part in parts.items()}, "file"
            )["a.weight"].dequantize()
        else:
            scb = tensor.abs().amax(1)
            stored |= {
                name: (tensor * 127 / scb[:, None]).round().to(torch.int8),
                name.removesuffix("weight") + "SCB": scb,
                name.removesuffix("weight") + "weight_format": torch.tensor(0, dtype=torch.uint8),
            }
            expected[name] = stored[name].float() * (scb / 127)[:, None]
    save_file(
        {name: tensor.contiguous() for name, tensor in stored.items()},
        tmp_path / "diffusion_pytorch_model.safetensors",
    )
    config = CONFIG | {"quantization_config": {"quant_method": "bitsandbytes"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    network = load_mmdit(tmp_path, "cpu", torch.float32)
    weights = mmdit_to_diffusers(unpacked(network))
    assert isinstance(network.double_blocks[0].img_attn.qkv, QuantizedLinear) and isinstance(
        network.single_blocks[0].linear1, QuantizedLinear
    )
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s.pop("a.weight.absmax"),
        lambda s: s.pop("a.weight.quant_map"),
        lambda s: s.pop("a.weight"),
        lambda s: s.update({"a.weight.absmax": torch.ones(3)}),
        lambda s: s.update({"a.weight.quant_map": torch.ones(16)}),
        lambda s: s.update({"a.weight.quant_map": torch.ones(3)}),
        lambda s: s.update({"a.weight": torch.zeros(5, 1, dtype=torch.uint8)}),
        lambda s: s.update(
            {"a.weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)}
        ),
        lambda s: s.update(
            {"b.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn), "b.weight_scale": torch.ones(5)}
        ),
        lambda s: s.update(
            {
                "b.weight": torch.zeros(2, 2).to(torch.float8_e4m3fn),
                "b.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8),
            }
        ),
        lambda s: s.update(
            {"b.weight": torch.zeros(2, 2, dtype=torch.int8), "b.SCB": torch.ones(3)}
        ),
        lambda s: s.update({"b.SCB": torch.ones(3)}),
    ],
)
def test_parts_that_lack_or_do_not_fit_get_one_sentence(spoil):
    state = {
        f"a.weight{suffix}": tensor
        for suffix, tensor in bnb_four_bits(randn(6, 128), "nf4", False).items()
    }
    spoil(state)
    with pytest.raises(
        ValueError,
        match=r"^file: [ab]\S* (is quantised in a form|belongs to a weight that is not)",
    ):
        gather_quantized(state, "file")


# ------------------------------------------------------------------------------------ a whole model


def test_joining_keeps_what_is_of_one_kind_packed():
    weights = [
        gather_quantized({"a.weight": randn(n, 64, seed=n).to(torch.float8_e4m3fn)}, "file")[
            "a.weight"
        ]
        for n in (2, 3)
    ]
    joined = concat(weights)
    assert isinstance(joined, QuantizedTensor) and joined.shape == (5, 64)
    assert torch.equal(joined.dequantize(), torch.cat([weight.dequantize() for weight in weights]))
    assert torch.equal(
        concat([weights[0], randn(1, 64)]), torch.cat([weights[0].dequantize(), randn(1, 64)])
    )


def test_a_single_file_with_a_whole_model_is_loaded(tmp_path):
    """As ComfyUI packs them: four parts under their prefixes, the transformer in float8. Tokenizers
    are not in it."""
    from reference import clip, clip_state, vae

    from miniflux.checkpoints.names import autoencoder_from_diffusers

    parts = {
        "model.diffusion_model.": {
            k: v.to(torch.float8_e4m3fn) if v.ndim == 2 else v for k, v in wide().items()
        },
        "vae.": autoencoder_from_diffusers(vae(widths=(32, 32), groups=32).state_dict()),
        "text_encoders.clip_l.transformer.": clip_state(clip(hidden=64)),
        "text_encoders.t5xxl.transformer.": t5_state(t5(d_model=64)),
    }
    save_file(
        {
            prefix + name: tensor.contiguous()
            for prefix, part in parts.items()
            for name, tensor in part.items()
        },
        tmp_path / "flux1-all.safetensors",
    )
    flux = load(tmp_path / "flux1-all.safetensors", device="cpu")
    assert flux.clip.config.hidden_size == 64
    assert flux.t5.config.d_model == 64
    assert flux.autoencoder.config.z_channels == 16
    assert torch.equal(
        flux.mmdit.img_in.weight, wide()["img_in.weight"].to(torch.float8_e4m3fn).float()
    )
    with pytest.raises(ValueError, match="without its text encoders"):
        generate(flux, "an owl")


def test_a_lora_changes_a_packed_model_and_goes_again(tmp_path):
    """Its changes stay unmerged, whether they were to be merged or not."""
    folder = small_pipeline(tmp_path / "flux")
    state = {name: tensor.to(torch.float8_e4m3fn) if tensor.ndim == 2 else tensor
             for name, tensor in mmdit_from_diffusers(transformer().state_dict()).items()}
    save_file(
        {name: tensor.contiguous() for name, tensor in mmdit_to_diffusers(state).items()},
        folder / "transformer" / "diffusion_pytorch_model.safetensors",
    )
    save_file(
        {
            "diffusion_model.txt_in.lora_A.weight": randn(2, 32),
            "diffusion_model.txt_in.lora_B.weight": randn(48, 2),
        },
        tmp_path / "lora.safetensors",
    )
    flux = load(folder, device="cpu")

    def paint(flux):
        return generate(
            flux,
            "an owl",
            width=32,
            height=32,
            steps=1,
            max_text_tokens=8,
            output="latents",
            progress=False,
        )

    merged, unmerged = (
        add_lora(flux, tmp_path / "lora.safetensors"),
        add_lora(flux, tmp_path / "lora.safetensors", merge=False),
    )
    assert not torch.allclose(paint(merged), paint(flux), atol=1e-3)
    assert (paint(merged) - paint(unmerged)).abs().max() < 1e-4 * paint(merged).abs().max()
    assert isinstance(merged.mmdit.txt_in.base, QuantizedLinear) and isinstance(
        merged.mmdit.img_in, QuantizedLinear
    )
    assert torch.equal(paint(remove_lora(merged)), paint(flux))
