"""The transformer against oracles by hand: parameter counts and names of the official files, and
each of its parts written out once more in the plainest way."""

import math

import pytest
import torch
import torch.nn.functional as F

from miniflux.networks import mmdit
from miniflux.networks.attention import apply_rope, formula, rope_table
from miniflux.networks.mmdit import (
    DoubleBlock,
    FinalLayer,
    MMDiT,
    MMDiTConfig,
    MMDiTInputs,
    RMSNorm,
    SingleBlock,
    modulate,
    split_heads,
    timestep_embedding,
)

SMALL = MMDiTConfig(in_channels=8, out_channels=8, vec_in_dim=12, context_in_dim=20, hidden_size=32,
                    num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(4, 4, 8))
L, N = 3, 6


def small(**changes) -> MMDiT:
    torch.manual_seed(0)
    return MMDiT(MMDiTConfig(**{**SMALL.__dict__, **changes}))


def inputs(batch: int = 2, **changes) -> dict:
    torch.manual_seed(1)
    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(3)])
    return dict(
        img=torch.randn(batch, N, 8),
        txt=torch.randn(batch, L, 20),
        pooled=torch.randn(batch, 12),
        t=torch.linspace(0.2, 0.9, batch),
        guidance=torch.full((batch,), 3.5),
        img_ids=ids,
        txt_ids=torch.zeros(L, 3, dtype=torch.int64)) | changes


@pytest.mark.parametrize("changes, parameters, tensors", [
    ({}, 11_901_408_320, 780),
    ({"guidance_embed": False}, 11_891_178_560, 776),
    ({"in_channels": 128}, 11_901_604_928, 780),
    ({"in_channels": 384}, 11_902_391_360, 780)], ids=["dev", "schnell", "control", "fill"])
def test_the_official_sizes_have_the_official_number_of_parameters(changes, parameters, tensors):
    with torch.device("meta"):
        model = MMDiT(MMDiTConfig(**changes))
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_the_tensors_are_named_as_in_the_official_file():
    def linear(*names):
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    norms = {f"norm.{kind}_norm.scale" for kind in ("query", "key")}
    stream = linear("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    stream |= {f"attn.{norm}" for norm in norms}
    single = linear("linear1", "linear2", "modulation.lin") | norms
    expected = linear("img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1")
    for name in ("time_in", "vector_in", "guidance_in"):
        expected |= linear(f"{name}.in_layer", f"{name}.out_layer")
    for i in range(2):
        expected |= {f"double_blocks.{i}.img_{name}" for name in stream}
        expected |= {f"double_blocks.{i}.txt_{name}" for name in stream}
        expected |= {f"single_blocks.{i}.{name}" for name in single}
    assert set(small().state_dict()) == expected


def test_axes_that_do_not_fill_a_head_are_refused():
    with pytest.raises(ValueError, match="that sum to the head width"):
        MMDiTConfig(axes_dim=(16, 56, 48))


# ------------------------------------------------------------------------------------ conditioning


def test_cosines_come_before_sines():
    cosines, sines = timestep_embedding(torch.zeros(2)).split(128, dim=1)
    assert cosines.eq(1).all() and sines.eq(0).all()


def test_the_time_is_multiplied_by_a_thousand_and_the_frequencies_fall_to_one_ten_thousandth():
    embedding = timestep_embedding(torch.tensor([0.25]))[0]
    for k in (0, 1, 64, 127):
        angle = 250 * 10000 ** (-k / 128)
        assert embedding[k].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert embedding[128 + k].item() == pytest.approx(math.sin(angle), abs=1e-4)


@pytest.mark.parametrize("dtype, value, thousandfold", [
    (torch.bfloat16, 0.90453076, 908),
    (torch.bfloat16, 3.5, 3504),
    (torch.bfloat16, 30, 29952),
    (torch.bfloat16, 10, 9984),
    (torch.bfloat16, 2.5, 2496),
    (torch.float16, 3.5, 3500),
    (torch.float16, 30, 30000),
    (torch.float16, 2.5, 2500)])
def test_time_and_guidance_are_rounded_as_in_the_original(dtype, value, thousandfold):
    embedding = timestep_embedding(torch.tensor([value]).to(dtype))
    frequencies = 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    exact = torch.cat([(thousandfold * frequencies).cos(), (thousandfold * frequencies).sin()])
    assert embedding.dtype == dtype
    # One rounding of the result, and the float32 error of an angle of up to 30,000.
    bound = torch.finfo(dtype).eps / 2 + 3e-3
    torch.testing.assert_close(embedding[0].double(), exact, rtol=0, atol=bound)


def test_time_guidance_and_prompt_are_summed():
    model, x = small(), inputs()
    time = model.time_in(timestep_embedding(x["t"]))
    guidance = model.guidance_in(timestep_embedding(x["guidance"]))
    prompt = model.vector_in.out_layer(F.silu(model.vector_in.in_layer(x["pooled"])))
    vec = model.conditioning(x["pooled"], x["t"], x["guidance"])
    torch.testing.assert_close(vec, time + guidance + prompt)


def test_a_missing_or_useless_guidance_is_refused():
    with pytest.raises(ValueError, match="needs a guidance value"):
        small()(MMDiTInputs(**inputs(guidance=None)))
    with pytest.raises(ValueError, match="pass guidance=None"):
        small(guidance_embed=False)(MMDiTInputs(**inputs()))
    assert small(guidance_embed=False)(MMDiTInputs(**inputs(guidance=None))).shape == (2, N, 8)


# ------------------------------------------------------------------------------------------- parts


def normed(x, norm: RMSNorm):
    """x / rms(x) · scale, by hand."""
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.scale


def test_the_rows_of_a_fused_projection_are_q_then_k_then_v_each_head_by_head():
    x = torch.randn(2, 5, 3 * 4 * 8)
    qkv = split_heads(x, num_heads=4)
    assert qkv.shape == (2, 5, 3, 4, 8)
    for part in range(3):
        for head in range(4):
            start = part * 32 + head * 8
            assert torch.equal(qkv[:, :, part, head], x[..., start: start + 8])


def test_modulation_is_one_plus_scale_times_layer_norm_plus_shift():
    x = torch.randn(2, 5, 32)
    shift, scale = torch.randn(2, 2, 1, 32)
    variance = x.var(-1, keepdim=True, unbiased=False)
    normed = (x - x.mean(-1, keepdim=True)) / (variance + 1e-6).sqrt()
    torch.testing.assert_close(modulate(x, shift, scale), (1 + scale) * normed + shift)


def test_the_norm_of_queries_and_keys_divides_by_their_root_mean_square():
    norm, x = RMSNorm(16), 3 * torch.randn(2, 5, 16)
    norm.scale += torch.randn(16)
    torch.testing.assert_close(norm(x), normed(x, norm))


def test_the_gelu_is_the_tanh_approximation():
    block = DoubleBlock(32, 2, 64)
    for gelu in (block.img_mlp[1], block.txt_mlp[1]):
        x = torch.tensor([-2.0, 0.5, 3.0])
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        torch.testing.assert_close(gelu(x), 0.5 * x * (1 + torch.tanh(inner)))


def rotation(tokens: int) -> torch.Tensor:
    return mmdit.rope_table(torch.arange(3 * tokens).view(tokens, 3), (4, 4, 8), 10000.0)


def uneven(block: torch.nn.Module) -> torch.nn.Module:
    """Norm scales of different values, so that two that are confused show."""
    for module in block.modules():
        if isinstance(module, RMSNorm):
            module.scale += 0.3 * torch.randn(16)
    return block


def test_a_double_block_written_out():
    torch.manual_seed(0)
    block = uneven(DoubleBlock(32, 2, 64))
    img, txt, vec = torch.randn(2, N, 32), torch.randn(2, L, 32), torch.randn(2, 32)
    pe = rotation(L + N)

    def chunks(mod):                    # shift, scale, gate of the attention, then of the MLP
        return mod.lin(F.silu(vec)).view(2, 6, 1, 32).unbind(1)

    def project(x, attn):
        q, k, v = attn.qkv(x).view(2, -1, 3, 2, 16).permute(2, 0, 3, 1, 4)
        return normed(q, attn.norm.query_norm), normed(k, attn.norm.key_norm), v

    streams = [(txt, block.txt_mod, block.txt_attn, block.txt_mlp),             # text first
               (img, block.img_mod, block.img_attn, block.img_mlp)]
    projected = [project(modulate(x, *chunks(mod)[:2]), attn) for x, mod, attn, _ in streams]
    q, k, v = (torch.cat(parts, dim=2) for parts in zip(*projected))
    both = formula(apply_rope(q, pe), apply_rope(k, pe), v).transpose(1, 2).flatten(2)
    expected = []
    for (x, mod, attn, mlp), out in zip(streams, (both[:, :L], both[:, L:])):
        _, _, gate1, shift2, scale2, gate2 = chunks(mod)
        x = x + gate1 * attn.proj(out)
        expected.append(x + gate2 * mlp(modulate(x, shift2, scale2)))
    img_out, txt_out = block(img, txt, vec, pe)
    torch.testing.assert_close(txt_out, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(img_out, expected[1], rtol=1e-5, atol=1e-5)


def test_a_single_block_written_out():
    torch.manual_seed(0)
    block = uneven(SingleBlock(32, 2, 64))
    x, vec, pe = torch.randn(2, 7, 32), torch.randn(2, 32), rotation(7)
    shift, scale, gate = block.modulation.lin(F.silu(vec)).view(2, 3, 1, 32).unbind(1)
    h = modulate(x, shift, scale)
    weight, bias = block.linear1.weight, block.linear1.bias
    q, k, v = (F.linear(h, weight[i: i + 32], bias[i: i + 32]) for i in (0, 32, 64))
    q, k, v = (x.view(2, 7, 2, 16).transpose(1, 2) for x in (q, k, v))
    q = apply_rope(normed(q, block.norm.query_norm), pe)
    k = apply_rope(normed(k, block.norm.key_norm), pe)
    attn = formula(q, k, v).transpose(1, 2).flatten(2)
    mlp = F.gelu(F.linear(h, weight[96:], bias[96:]), approximate="tanh")
    weight, bias = block.linear2.weight, block.linear2.bias
    y = F.linear(attn, weight[:, :32]) + F.linear(mlp, weight[:, 32:]) + bias
    torch.testing.assert_close(block(x, vec, pe), x + gate * y, rtol=1e-5, atol=1e-5)


def test_the_final_layer_reads_shift_before_scale():
    layer = FinalLayer(32, 8)
    img, vec = torch.randn(2, N, 32), torch.randn(2, 32)
    shift, scale = layer.adaLN_modulation[1](F.silu(vec)).view(2, 2, 1, 32).unbind(1)
    torch.testing.assert_close(layer(img, vec), layer.linear(modulate(img, shift, scale)))


def test_closed_gates_leave_both_streams_untouched():
    block = DoubleBlock(32, 2, 64)
    for mod in (block.img_mod, block.txt_mod):
        for gate in (2, 5):
            mod.lin.weight[32 * gate: 32 * gate + 32] = 0
            mod.lin.bias[32 * gate: 32 * gate + 32] = 0
    img, txt = torch.randn(2, N, 32), torch.randn(2, L, 32)
    img_out, txt_out = block(img, txt, torch.randn(2, 32), rotation(L + N))
    assert torch.equal(img_out, img) and torch.equal(txt_out, txt)


# --------------------------------------------------------------------------------------- the whole


def test_text_tokens_come_before_image_tokens(monkeypatch):
    model, x, seen = small(), inputs(), []

    def spy(qkv, pe, image, text=None, L=0):
        seen.append((qkv, pe))
        return attention(qkv, pe, image, text, L)

    attention = mmdit.attention
    monkeypatch.setattr(mmdit, "attention", spy)
    x["txt_ids"] = torch.full((L, 3), 7)                # recognisable, where FLUX has zeros
    model(MMDiTInputs(**x))
    block = model.double_blocks[0]
    mod, _ = block.txt_mod(model.conditioning(x["pooled"], x["t"], x["guidance"]))
    txt_qkv = block.txt_attn.project(modulate(model.txt_in(x["txt"]), mod.shift, mod.scale))
    torch.testing.assert_close(seen[0][0][:, :L, 2], txt_qkv[:, :, 2])
    assert len(seen) == 4 and all(qkv.shape[1] == L + N for qkv, _ in seen)
    expected = mmdit.rope_table(torch.cat([x["txt_ids"], x["img_ids"]]), (4, 4, 8), 10000.0)
    assert all(torch.equal(pe, expected) for _, pe in seen)


def test_the_velocity_belongs_to_the_image_tokens():
    model, x = small(), inputs()
    changed = model(MMDiTInputs(**x | {"img_ids": x["img_ids"].flip(0), "img": x["img"].flip(1)}))
    torch.testing.assert_close(changed.flip(1), model(MMDiTInputs(**x)), rtol=1e-4, atol=1e-5)


def test_text_tokens_have_no_order():
    model, x = small(), inputs()
    flipped = model(MMDiTInputs(**x | {"txt": x["txt"].flip(1)}))
    torch.testing.assert_close(flipped, model(MMDiTInputs(**x)), rtol=1e-4, atol=1e-5)


def test_a_batch_equals_its_singles():
    model, x = small(), inputs(batch=3)
    together = model(MMDiTInputs(**x))
    for i in range(3):
        alone = {name: x[name] if "ids" in name else x[name][i: i + 1] for name in x}
        one = model(MMDiTInputs(**alone))
        torch.testing.assert_close(one, together[i: i + 1], rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- float16


def loud(block: torch.nn.Module, *linears: torch.nn.Linear) -> torch.nn.Module:
    """A float16 block whose given linears overflow."""
    block.half()
    for linear in linears:
        linear.bias.fill_(65504)
        linear.weight.fill_(0)
    return block


def open_gates(modulation: mmdit.Modulation) -> None:
    modulation.lin.weight.zero_()
    modulation.lin.bias.fill_(2)


def test_float16_text_is_clamped_after_a_double_block():
    block = DoubleBlock(32, 2, 64)
    open_gates(block.txt_mod)
    loud(block, block.txt_mlp[2])
    img, txt, vec = torch.randn(1, N, 32), torch.randn(1, L, 32), torch.randn(1, 32)
    _, txt = block(img.half(), txt.half(), vec.half(), rotation(L + N))
    assert torch.equal(txt, torch.full_like(txt, 65504))


def test_float16_tokens_are_clamped_after_a_single_block():
    block = SingleBlock(32, 2, 64)
    open_gates(block.modulation)
    loud(block, block.linear2)
    x = block(torch.randn(1, 7, 32).half(), torch.randn(1, 32).half(), rotation(7))
    assert torch.equal(x, torch.full_like(x, 65504))


def test_other_dtypes_are_not_clamped():
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.tensor([1e5, -1e30], dtype=dtype)
        assert torch.equal(mmdit.clamp_fp16(x), x)


def test_residuals_are_added_to_the_image_tokens_after_each_block():
    """By hand: the same blocks, run one after the other, with an addition between them."""
    model, given = small(), inputs()
    residuals = [torch.randn(2, N, 32), None, None, torch.randn(2, N, 32)]
    pe = rope_table(torch.cat([given["txt_ids"], given["img_ids"]]), (4, 4, 8), 10000.0)
    vec = model.conditioning(given["pooled"], given["t"], given["guidance"])
    img, txt = model.img_in(given["img"]), model.txt_in(given["txt"])
    img, txt = model.double_blocks[0](img, txt, vec, pe)
    img, txt = model.double_blocks[1](img + residuals[0], txt, vec, pe)
    x = model.single_blocks[0](torch.cat([txt, img], dim=1), vec, pe)
    x = model.single_blocks[1](x, vec, pe)
    expected = model.final_layer(x[:, L:] + residuals[3], vec)
    assert torch.allclose(model(MMDiTInputs(**given, residuals=residuals)), expected, atol=1e-5)
    without = model(MMDiTInputs(**given))
    assert torch.equal(model(MMDiTInputs(**given, residuals=[None] * 4)), without)


def test_image_queries_attend_to_further_keys_before_their_rotation():
    """By hand, for one block: softmax(q kᵀ / √D) v of the normalised queries, without a gate."""
    block = small().double_blocks[0]
    img, txt, vec = torch.randn(2, N, 32), torch.randn(2, L, 32), torch.randn(2, 32)
    pe = rope_table(torch.randint(0, 9, (L + N, 3)), (4, 4, 8), 10000.0)
    k, v = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 5, 16)
    plain_img, plain_txt = block(img, txt, vec, pe)
    with_img, with_txt = block(img, txt, vec, pe, [(k, v), (k, 2 * v)])
    mod, _ = block.img_mod(vec)
    q = block.img_attn.qkv(modulate(img, mod.shift, mod.scale))[..., :32]
    q = normed(q.unflatten(-1, (2, 16)).transpose(1, 2), block.img_attn.norm.query_norm)
    added = ((q @ k.transpose(-1, -2) / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)
    assert torch.allclose(with_img, plain_img + 3 * added, atol=1e-5)
    assert torch.equal(with_txt, plain_txt)
    assert not torch.allclose(plain_img, with_img, atol=1e-2)
