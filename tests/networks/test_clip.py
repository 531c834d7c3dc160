"""CLIP's text tower.

Oracles by hand: the official number of parameters, and each fact about pooling as a property."""

import math

import pytest
import torch

from miniflux.networks.clip import CLIPConfig, CLIPLayer, CLIPText, quick_gelu

SMALL = CLIPConfig(
    hidden_size=16,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=50,
)
START, END = 48, 49


@pytest.fixture(scope="module")
def clip() -> CLIPText:
    torch.manual_seed(0)
    return CLIPText(SMALL)


def ids(*tokens: int, length: int = 12) -> torch.Tensor:
    return torch.tensor([[START, *tokens, END] + [END] * (length - len(tokens) - 2)])


def test_the_official_sizes_have_the_official_number_of_parameters():
    with torch.device("meta"):
        model = CLIPText()
    assert sum(p.numel() for p in model.parameters()) == 123_060_480


def test_the_tensors_are_named_as_in_the_official_file(clip):
    linears = ["layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"]
    linears += [f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")]
    expected = {
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
    }
    for kind in ("weight", "bias"):
        expected.add(f"text_model.final_layer_norm.{kind}")
        for i in range(2):
            layer = f"text_model.encoder.layers.{i}"
            expected |= {f"{layer}.{name}.{kind}" for name in linears}
    assert set(clip.state_dict()) == expected


def test_the_activation_is_quick_gelu():
    expected = [x / (1 + math.exp(-1.702 * x)) for x in (-1.0, 0.0, 2.0)]
    assert quick_gelu(torch.tensor([-1.0, 0.0, 2.0])).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_layer_normalises_before_attention_and_before_the_mlp():
    torch.manual_seed(0)
    layer = CLIPLayer(SMALL)
    layer.self_attn.out_proj.weight.zero_()
    layer.self_attn.out_proj.bias.zero_()
    x = torch.randn(1, 5, 16)
    norm = layer.layer_norm2
    normed = torch.nn.functional.layer_norm(x, (16,), norm.weight, norm.bias, 1e-5)
    expected = x + layer.mlp.fc2(quick_gelu(layer.mlp.fc1(normed)))
    torch.testing.assert_close(layer(x, is_causal=True), expected)


def test_attention_is_causal(clip):
    a, b = clip.text_model(ids(3, 4, 5)), clip.text_model(ids(3, 4, 6))
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.allclose(a[:, 3:], b[:, 3:])


def test_attention_scores_are_divided_by_the_root_of_the_head_width(clip):
    attention = clip.text_model.encoder.layers[0].self_attn
    x = torch.randn(1, 6, 16)
    q = attention.q_proj(x).view(6, 4, 4).transpose(0, 1)   # (H, L, D)
    k = attention.k_proj(x).view(6, 4, 4).transpose(0, 1)
    v = attention.v_proj(x).view(6, 4, 4).transpose(0, 1)
    scores = q @ k.mT / 2 + torch.full((6, 6), -torch.inf).triu(1)
    out = attention.out_proj((scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 6, 16))
    torch.testing.assert_close(attention(x, is_causal=True), out)


def test_the_pooled_vector_is_the_normalised_state_at_the_first_end_of_text(clip):
    tokens = torch.cat([ids(3, 4, 5), ids(7), ids()])
    model = clip.text_model
    states = model.final_layer_norm(model.encoder(model.embeddings(tokens), is_causal=True))
    assert torch.equal(clip(tokens), torch.stack([states[0, 4], states[1, 2], states[2, 1]]))


def test_padding_after_the_end_changes_nothing(clip):
    short, long = clip(ids(3, 4, 5, length=5)), clip(ids(3, 4, 5, length=77))
    torch.testing.assert_close(short, long)
    other = ids(3, 4, 5)
    other[0, 6:] = 1                                    # another padding token
    torch.testing.assert_close(clip(other), long)


def test_an_end_of_text_inside_the_prompt_ends_it(clip):
    torch.testing.assert_close(clip(ids(3, END, 5)), clip(ids(3)))


def test_positions_are_learned(clip):
    assert not torch.allclose(clip(ids(3, 4)), clip(ids(4, 3)), atol=1e-3)
    embeddings = clip.text_model.embeddings
    expected = embeddings.token_embedding.weight[3] + embeddings.position_embedding.weight[1]
    assert torch.equal(embeddings(ids(3))[0, 1], expected)
