"""Looking inside. Oracles: the run that nobody watches, bit for bit; attention by hand."""

import doctest
from dataclasses import replace

import pytest
import torch

import miniflux
from miniflux import (
    add_lora,
    generate,
    inspection,
    kontext_edit,
    load,
    precompute_modulation,
    quantize,
)
from miniflux.inspection import pieces, watch, words

HALF = dict(width=96, height=64, steps=2, seed=3, output="latents", progress=False)
PROMPT = "a fox next to a red apple"


@pytest.fixture(scope="module")
def flux():
    return load("tiny", device="cpu")


def watched(flux, task=generate, *inputs, **settings):
    with watch(flux.mmdit) as seen:
        z = task(flux, *inputs, **settings)
    return z, seen


def hooks(mmdit) -> int:
    """How many hooks lie on the transformer and its parts."""
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in mmdit.modules())


VARIANTS = {
    "the plain model": lambda flux: flux,
    "a LoRA that is merged": lambda flux: add_lora(flux, "tiny-neon"),
    "a LoRA beside the weights": lambda flux: add_lora(flux, "tiny-neon", merge=False),
    "int8 weights": lambda flux: quantize(flux, "int8"),
    "precomputed modulation": precompute_modulation,
    "a LoRA on int8 weights": lambda flux: add_lora(quantize(flux, "int8"), "tiny-neon"),
}


@pytest.mark.parametrize("change", VARIANTS.values(), ids=VARIANTS)
def test_watching_changes_no_bit_of_the_image(flux, change):
    """Two images in one batch, not square, two steps, fourteen blocks seen."""
    model = change(flux)
    z, seen = watched(model, generate, [PROMPT, "an owl"], **HALF)
    assert torch.equal(z, generate(model, [PROMPT, "an owl"], **HALF))
    assert len(seen) == 2 * 7 and all(len(block.attention) == 2 for block in seen)


def test_watching_changes_no_bit_of_a_model_without_guidance():
    model = load("tiny-schnell", device="cpu")
    z, seen = watched(model, generate, PROMPT, **HALF)
    assert torch.equal(z, generate(model, PROMPT, **HALF)) and len(seen) == 14


def test_the_tokens_of_a_kontext_image_are_seen_too():
    model = load("tiny-kontext", device="cpu")
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    settings = HALF | dict(width=64, height=64, auto_resize=False)
    z, seen = watched(model, kontext_edit, "remove the apple", image, **settings)
    assert torch.equal(z, kontext_edit(model, "remove the apple", image, **settings))
    L, N, M = model.config.max_text_tokens, 16, 16
    assert seen[0].attention.shape == (1, 3, L + N + M, L + N + M)
    assert seen[0].image_to_text().shape == (1, 3, N + M, L)


def test_all_that_is_kept_has_the_documented_shape(flux):
    _, seen = watched(flux, generate, PROMPT, **HALF)
    L, N, hidden = flux.config.max_text_tokens, 24, flux.mmdit.config.hidden_size
    assert [block.name for block in seen[:7]] == [*(f"double_blocks.{i}" for i in range(2)),
                                                  *(f"single_blocks.{i}" for i in range(5))]
    for block in seen:
        assert block.L == L and block.attention.shape == (1, 3, L + N, L + N)
        assert block.values.shape == (1, 3, L + N, 64)
        assert block.output.shape == block.hidden.shape == (1, L + N, hidden)
        assert block.image_to_text().shape == (1, 3, N, L)
        assert block.text_to_image().shape == (1, 3, L, N)
        counts = {name: len(vectors) for name, vectors in block.modulation.items()}
        double = block.name.startswith("double")
        assert counts == ({"img_mod": 6, "txt_mod": 6} if double else {"modulation": 3})
        for vectors in block.modulation.values():
            assert all(vector.shape == (1, 1, hidden) for vector in vectors)


def test_attention_times_values_is_what_attention_returned(flux):
    for block in watched(flux, generate, PROMPT, **HALF)[1]:
        sums = block.attention.sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums))
        output = (block.attention @ block.values).transpose(1, 2).flatten(2)
        torch.testing.assert_close(output, block.output, rtol=1e-4, atol=1e-5)


def test_the_hidden_states_are_those_that_the_next_block_receives(flux):
    """From the last double block to the first single one too: the text first, then the image."""
    for i in (0, 2):
        received = []
        handle = flux.mmdit.single_blocks[i].register_forward_pre_hook(
            lambda block, inputs, received=received: received.append(inputs[0].clone()))
        seen = watched(flux, generate, PROMPT, **HALF)[1]
        handle.remove()
        assert torch.equal(seen[1 + i].hidden, received[0])
        assert torch.equal(seen[7 + 1 + i].hidden, received[1])


def test_a_few_blocks_can_be_chosen(flux):
    with watch(flux.mmdit, {"single_blocks.4"}) as seen:
        z = generate(flux, PROMPT, **HALF)
    assert [block.name for block in seen] == ["single_blocks.4"] * 2
    assert torch.equal(z, generate(flux, PROMPT, **HALF))
    with pytest.raises(ValueError, match="no block 'single_blocks.5'.*to single_blocks.4"):
        with watch(flux.mmdit, {"single_blocks.5"}):
            pass


def test_a_transformer_without_double_blocks_can_be_watched(flux):
    from miniflux.networks.mmdit import MMDiT
    torch.manual_seed(0)
    model = replace(flux, mmdit=MMDiT(replace(flux.mmdit.config, depth=0, depth_single_blocks=1)))
    seen = watched(model, generate, PROMPT, **HALF)[1]
    assert [block.L for block in seen] == 2 * [flux.config.max_text_tokens]


def test_nothing_stays_on_the_transformer(flux):
    """Neither after an ordinary end nor after an error within a block."""
    before = hooks(flux.mmdit)
    watched(flux, generate, PROMPT, **HALF)
    assert hooks(flux.mmdit) == before

    def fail(block, inputs):
        raise RuntimeError("stop here")

    handle = flux.mmdit.single_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        watched(flux, generate, PROMPT, **HALF)
    handle.remove()
    assert hooks(flux.mmdit) == before
    z, seen = watched(flux, generate, PROMPT, **HALF)
    assert len(seen) == 14 and torch.equal(z, generate(flux, PROMPT, **HALF))


def test_an_attention_elsewhere_is_not_recorded(flux):
    """Only what the watched transformer does is kept; another may run within the `with`."""
    other = load("tiny-schnell", device="cpu")
    with watch(flux.mmdit) as seen:
        generate(other, PROMPT, **HALF)
    assert seen == []


def test_pieces_are_the_text_tokens_of_the_transformer(flux):
    tokens = pieces(flux, "a fox")
    assert tokens[:3] == ["▁a", "▁fox", "</s>"]
    assert tokens[3:] == ["<pad>"] * (flux.config.max_text_tokens - 3)
    assert len(pieces(flux, "a fox", max_text_tokens=5)) == 5


def test_both_tokenizers_can_be_read_backwards(flux):
    clip, t5 = flux.clip_tokenizer, flux.t5_tokenizer
    symbols = [clip.id_to_symbol[number] for number in clip.encode("a red apple")]
    assert "".join(symbols) == "a</w>red</w>apple</w>"
    assert "".join(t5.id_to_piece[number] for number in t5.encode("a red apple")) == "▁a▁red▁apple"


def test_repeated_words_are_numbered_and_pieces_are_joined():
    assert doctest.testmod(inspection, extraglobs={"flux": miniflux.load("tiny")}).attempted > 1
    assert words(["▁a", "▁fox", "▁and", "▁a", "▁cat", "</s>"]) == {
        "a": [0], "fox": [1], "and": [2], "a (2)": [3], "cat": [4], "</s>": [5]}
    assert words(["▁fox", ",", "</s>", "<pad>"]) == {"fox,": [0, 1], "</s>": [2], "<pad>": [3]}
