"""Quantisation. Oracles: the formulas; the error each format may have; torch's own 8-bit products;
the unquantised model."""

from dataclasses import replace

import pytest
import torch
from reference import small_pipeline
from safetensors.torch import save_file
from torch import nn

from miniflux import add_lora, generate, load, remove_lora
from miniflux.checkpoints.quantized import NF4, QuantizedLinear
from miniflux.engine.quantize import FORMATS, DynamicLinear, pack_fp8, pack_int8, pack_nf4, quantize
from miniflux.networks.mmdit import MMDiT, MMDiTConfig


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The small pipeline with a transformer whose rows are whole blocks of 64."""
    flux = load(small_pipeline(tmp_path_factory.mktemp("quantize") / "flux"), device="cpu")
    torch.manual_seed(0)
    config = MMDiTConfig(vec_in_dim=24, context_in_dim=32, hidden_size=64, num_heads=2,
                         depth=2, depth_single_blocks=2, axes_dim=(4, 14, 14))
    return replace(flux, mmdit=MMDiT(config).eval().requires_grad_(False))


def paint(flux, **keywords):
    settings = dict(width=48, height=32, steps=2, max_text_tokens=24, output="latents",
                    progress=False)
    return generate(flux, "a red apple", **settings | keywords)


def error(a, b) -> float:
    return float((a - b).norm() / b.norm())


def test_int8_is_the_nearest_of_255_multiples_of_the_rows_scale():
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 127
    packed = pack_int8(weight).dequantize()
    assert ((packed - weight).abs() <= step / 2 * 1.0001).all()
    assert torch.allclose(packed.abs().amax(1), weight.abs().amax(1))


def test_fp8_keeps_three_bits_after_the_first_of_every_number():
    """e4m3: within 1/16 of each number, down to the smallest it can represent, 2^-9 of a scale."""
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    smallest = weight.abs().amax(1, keepdim=True) / 448 * 2**-9
    bound = torch.maximum(weight.abs() / 16, smallest) * 1.0001
    assert ((pack_fp8(weight).dequantize() - weight).abs() <= bound).all()


def test_nf4_is_the_nearest_of_sixteen_in_each_block():
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(0))
    blocks = weight.view(6, 2, 64)
    absmax = blocks.abs().amax(2, keepdim=True)
    table = torch.tensor(NF4)
    nearest = (blocks / absmax)[..., None].sub(table).abs().argmin(-1)
    assert torch.equal(pack_nf4(weight).dequantize(), (table[nearest] * absmax).view(6, 128))


@pytest.mark.parametrize("form, weights", [
    ("int8", torch.arange(-127, 128).float()[None].repeat(3, 1)),
    ("fp8", torch.tensor([[448.0, -1.75, 0.0, 2**-6, 240.0]])),
    ("nf4", torch.tensor(NF4).repeat(2, 4)),
])
def test_weights_that_a_format_can_represent_are_kept_exactly(form, weights):
    pack = FORMATS[form][0]
    assert torch.equal(pack(weights).dequantize(), weights)
    assert torch.equal(pack(torch.zeros(2, 64)).dequantize(), torch.zeros(2, 64))


@pytest.mark.parametrize("form, bound", [                   # twice what was measured:
    ("int8", 0.0015),                                       # 0.0007
    ("fp8", 0.008),                                         # 0.004
    ("nf4", 0.017),                                         # 0.008
    ("int8-dynamic", 0.0016),                               # 0.0008
    ("fp8-dynamic", 0.009),                                 # 0.0046
])
def test_a_velocity_of_a_quantised_model_is_close(flux, form, bound):
    """The relative error of the latents after one step."""
    quantized = quantize(flux, form)
    got = paint(quantized, steps=1)
    expected = paint(flux, steps=1)
    assert 0 < error(got, expected) < bound
    assert isinstance(quantized.mmdit.double_blocks[0].img_mlp[0], FORMATS[form][2])
    assert not isinstance(quantized.mmdit.img_in, QuantizedLinear)
    # The given model is as it was.
    assert not isinstance(flux.mmdit.double_blocks[0].img_mlp[0], QuantizedLinear)


@pytest.mark.parametrize("form, of_float32", [("int8", 0.26), ("fp8", 0.26), ("nf4", 0.15)])
def test_the_weights_take_a_quarter_or_an_eighth(form, of_float32):
    with torch.device("meta"):
        layer = nn.Linear(3072, 9216)
    packed = FORMATS[form][0](torch.randn(64, 3072))
    size = sum(part.numel() * part.dtype.itemsize for part in packed.parts.values())
    assert size < of_float32 * 4 * 64 * layer.in_features


@pytest.mark.parametrize("kind, bound", [("int8", 0.015), ("fp8", 0.05)])
def test_a_product_in_eight_bits_is_close_and_few_rows_are_multiplied_as_they_are(kind, bound):
    x = torch.randn(2, 20, 64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    pack = FORMATS[f"{kind}-dynamic"][0]
    layer = DynamicLinear(pack(weight), torch.float32, torch.device("cpu"))
    layer.bias = nn.Parameter(torch.randn(32))
    exact = x @ layer.weight.T + layer.bias
    assert layer(x).shape == (2, 20, 32)
    assert 0 < error(layer(x), exact) < bound
    few = x[:, :4]
    assert torch.equal(layer(few), nn.functional.linear(few, layer.weight, layer.bias))


@pytest.mark.parametrize("form", ["int8", "int8-dynamic"])
def test_loras_before_and_after_are_the_same_and_go_again(flux, tmp_path, form):
    draw = torch.Generator().manual_seed(5)
    file = tmp_path / "lora.safetensors"
    state = {}
    for name in ("double_blocks.0.img_attn.qkv", "img_in"):
        layer = flux.mmdit.get_submodule(name)
        down = torch.randn(4, layer.in_features, generator=draw) * 0.3
        up = torch.randn(layer.out_features, 4, generator=draw) * 0.3
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, file)
    before = quantize(add_lora(flux, file), form)
    after = add_lora(quantize(flux, form), file)
    assert torch.equal(paint(before), paint(after))
    assert isinstance(before.mmdit.double_blocks[0].img_attn.qkv.base, QuantizedLinear)
    assert error(paint(after), paint(add_lora(flux, file))) < 0.03
    assert torch.equal(paint(remove_lora(after)), paint(quantize(flux, form)))


def test_what_is_quantised_stays_and_parts_can_be_chosen(flux):
    def query(flux):
        return flux.t5.encoder.block[0].layer[0].SelfAttention.q

    once = quantize(flux, "int8", parts=("t5",))
    assert once.mmdit is flux.mmdit
    assert isinstance(query(once), QuantizedLinear)
    assert query(quantize(once, "fp8")).kind == "int8"


@pytest.mark.parametrize("arguments, sentence", [
    (("int4",), "the format is 'int4': expected one of int8, fp8, nf4"),
    (("int8", ("vae",)), "parts are .'vae',.: expected some of mmdit, t5, clip"),
    (("int8", "mmdit"), "parts are 'mmdit'"),
])
def test_a_wrong_format_or_part_gets_one_sentence(flux, arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        quantize(flux, *arguments)
