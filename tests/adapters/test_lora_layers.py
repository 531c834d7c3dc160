"""LoRA as a layer: forward, merged, training, saving. Oracle: W + scale B A by hand."""

import pytest
import torch
from lora_states import QKV, H, change, draw, file_of, lora, pair
from safetensors.torch import load_file
from torch import nn

from miniflux import add_lora, load
from miniflux.adapters.lora_file import official_targets, parse
from miniflux.adapters.lora_layers import LoRALinear, insert_loras
from miniflux.adapters.lora_saving import save_lora
from miniflux.networks.mmdit import MMDiTInputs
from miniflux.sampling import image_ids, text_ids


@pytest.fixture(scope="module")
def flux():
    return load("tiny", device="cpu")


def test_the_layer_and_its_merged_weight_compute_the_same():
    base, (a, b), x = nn.Linear(12, 20), pair(20, 12, rank=3), draw(5, 12)
    layer = LoRALinear(base, a, b, scale=0.7)
    expected = base.weight + 0.7 * b @ a
    assert torch.allclose(layer.merged(), expected, atol=1e-6)
    assert torch.allclose(layer(x), nn.functional.linear(x, expected, base.bias), atol=1e-6)


def test_layers_can_be_stacked():
    base, (a, b), (c, d) = nn.Linear(12, 20), pair(20, 12, rank=3), pair(20, 12, rank=2)
    layer = LoRALinear(LoRALinear(base, a, b, 0.5), c, d, 2.0)
    assert torch.allclose(layer.merged(), base.weight + 0.5 * b @ a + 2 * d @ c, atol=1e-6)


@pytest.mark.parametrize("by_columns", [True, False])
def test_a_merged_weight_is_stored_as_the_one_before(flux, tmp_path, by_columns):
    """By columns, which the compiled kernels need, or by rows."""
    weight = draw(8, 6).t().contiguous().t() if by_columns else draw(8, 6)
    base = nn.Linear(6, 8)
    base.weight = nn.Parameter(weight, requires_grad=False)
    assert LoRALinear(base, *pair(8, 6)).merged().stride() == weight.stride()
    changed = add_lora(flux, file_of(tmp_path, lora("img_in", *pair(H, 64))))
    assert changed.mmdit.img_in.weight.stride() == flux.mmdit.img_in.weight.stride()


def test_only_the_factors_learn_and_at_first_nothing_changes():
    torch.manual_seed(0)
    network = load("tiny", device="cpu").mmdit
    prompt = torch.randn(1, 8, 128), torch.randn(1, 128)
    times = torch.tensor([0.5]), torch.tensor([3.5])
    inputs = MMDiTInputs(torch.randn(1, 64, 64), *prompt, *times, image_ids(16, 16), text_ids(8))

    def velocity():
        return network(inputs)

    before, count = velocity(), sum(isinstance(m, nn.Linear) for m in network.modules())
    loras = insert_loras(network, rank=4)
    assert len(loras) == count and torch.allclose(velocity(), before, atol=1e-4)
    learning = {name for name, p in network.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.{factor}" for name in loras for factor in "AB"}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        with torch.enable_grad():
            loss = velocity().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


@pytest.mark.parametrize("diffusers", [True, False])
def test_a_saved_lora_changes_the_weights_by_its_products(flux, tmp_path, diffusers):
    factors = {name: pair(layer.out_features, layer.in_features) for name, layer in
               flux.mmdit.named_modules() if isinstance(layer, nn.Linear)}
    path = tmp_path / "a.safetensors"
    save_lora(path, factors, diffusers=diffusers, dtype=torch.float32)
    changed = add_lora(flux, path)
    for name, (a, b) in factors.items():
        assert torch.allclose(change(flux, changed, name), b @ a, atol=1e-5), name
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_saved_lora_may_change_text_encoders_and_is_in_bfloat16(flux, tmp_path):
    name = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    layer = flux.clip.get_submodule(name.removeprefix("text_encoder."))
    a, b = pair(layer.out_features, layer.in_features)
    path = tmp_path / "a.safetensors"
    save_lora(path, {name: (a, b), QKV: pair(3 * H)}, diffusers=True)
    state = load_file(path)
    assert {tensor.dtype for tensor in state.values()} == {torch.bfloat16} and len(state) == 8
    assert torch.equal(state[f"{name}.lora_B.weight"], b.bfloat16())
    assert not parse(state, {}, official_targets(), "a").unmatched
