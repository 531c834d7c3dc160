"""Pixtral and its tokenizer.

Oracles: transformers with the same random weights; `tokenizers` by fuzzing; by hand."""

import json
import random

import pytest
import torch
from reference_vision import CONTROL, MISTRAL_PIECES, small_pixtral, tokenizer
from safetensors.torch import load_file, save_file
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
)

from miniflux.checkpoints.vision import PIXTRAL_NAMES, load_pixtral, rename
from miniflux.networks.pixtral import Pixtral, interleave_halves
from miniflux.tokenizers.pixtral import PATTERN, PixtralTokenizer, split

IMG = CONTROL.index("[IMG]")


def question(rows: int, columns: int) -> torch.Tensor:
    """Text, the patches of an image with the ends of its rows, text."""
    row = [IMG] * columns + [CONTROL.index("[IMG_BREAK]")]
    return torch.tensor([[1, 3, 300, 301, *(row * rows), 310, 320, 330, 4]])


@pytest.mark.parametrize("rows, columns", [(4, 4), (1, 5), (3, 2)])
def test_the_logits_about_an_image_are_those_of_transformers(tmp_path, rows, columns):
    theirs = small_pixtral(tmp_path)
    ids = question(rows, columns)
    height, width = 16 * rows, 16 * columns
    image = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([[height, width]])
    expected = theirs(input_ids=ids, pixel_values=image, image_sizes=sizes).logits[:, -1]
    got = load_pixtral(tmp_path)(ids, image)
    # Measured: 1e-6.
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("text, vision", [
    ({}, {}),
    (dict(num_key_value_heads=4, head_dim=6 * 2), dict(hidden_act="gelu")),
    (dict(num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
     dict(num_attention_heads=4)),
], ids=str)
def test_the_logits_after_a_text_are_those_of_transformers(tmp_path, text, vision):
    theirs = small_pixtral(tmp_path, text, vision)
    ours = load_pixtral(tmp_path)
    ids = torch.randint(20, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    expected = theirs(input_ids=ids).logits[:, -1]
    assert (ours(ids) - expected).abs().max() < 1e-5 * expected.abs().max()
    image = torch.randn(1, 3, 32, 32)
    expected = theirs.model.vision_tower(image).last_hidden_state
    assert (ours.vision_tower(image) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_published_names_and_those_within_transformers_5_are_the_same_network(tmp_path):
    theirs = small_pixtral(tmp_path)
    file = tmp_path / "model.safetensors"
    ids = torch.arange(20, 40)[None]
    assert "language_model.model.embed_tokens.weight" in load_file(file)
    published = load_pixtral(tmp_path)(ids)
    save_file(theirs.state_dict(), file)
    assert "model.language_model.embed_tokens.weight" in load_file(file)
    # Tensors lie elsewhere in memory, so the rounding may differ.
    assert torch.allclose(load_pixtral(tmp_path)(ids), published, atol=1e-6)


def test_the_official_sizes_are_those_of_pixtral_12b():
    with torch.device("meta"):
        ours = Pixtral()
        text_config = MistralConfig(
            hidden_size=5120,
            intermediate_size=14336,
            num_hidden_layers=40,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            vocab_size=131072,
        )
        theirs = LlavaForConditionalGeneration(LlavaConfig(
            vision_config=PixtralVisionConfig(), text_config=text_config))
    renamed = rename(theirs.state_dict(), PIXTRAL_NAMES)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in renamed.items()}
    assert sum(p.numel() for p in ours.parameters()) == 12_682_739_712


def test_interleaving_pairs_the_halves():
    assert interleave_halves(torch.tensor([0, 1, 2, 3, 4, 5])).tolist() == [0, 3, 1, 4, 2, 5]


def test_rows_and_columns_rotate_different_channels(tmp_path):
    small_pixtral(tmp_path)
    tower = load_pixtral(tmp_path).vision_tower
    pe = tower.positions(2, 3, torch.device("cpu"))
    assert pe.shape == (6, 8, 2, 2)
    assert torch.equal(pe[0], torch.eye(2).expand(8, 2, 2))
    # One step to the right rotates the second half of the pairs only.
    assert torch.equal(pe[1, :4], pe[0, :4])
    assert not torch.equal(pe[1, 4:], pe[0, 4:])
    # One step down rotates the first half only.
    assert torch.equal(pe[3, 4:], pe[0, 4:])
    assert not torch.equal(pe[3, :4], pe[0, :4])


def test_as_many_image_tokens_as_patches_are_expected(tmp_path):
    small_pixtral(tmp_path)
    with pytest.raises(ValueError, match=r"4 \[IMG\] tokens for 6 patches"):
        load_pixtral(tmp_path)(question(2, 2), torch.randn(1, 3, 32, 48))


@pytest.mark.parametrize("part, values, message", [
    (None, dict(architectures=["LlavaNext"]), "describes a 'LlavaNext'"),
    (None, dict(vision_config=1), "has no vision_config and text_config"),
    (None, dict(vision_feature_layer=-2), "vision_feature_layer is -2, expected -1"),
    (None, dict(projector_hidden_act="relu"), "projector_hidden_act is 'relu'"),
    ("vision_config", dict(model_type="clip_vision_model"),
     "model_type is 'clip_vision_model', expected 'pixtral'"),
    ("vision_config", dict(hidden_act="relu"),
     "hidden_act is 'relu', expected one of silu, gelu"),
    ("text_config", dict(sliding_window=8), "sliding_window is 8, expected None"),
    ("text_config", dict(rope_parameters={"rope_type": "yarn"}), "rope_type is 'yarn'"),
    ("text_config", dict(num_key_value_heads=3), "4 heads that share 3 do not fit together"),
    ("text_config", dict(head_dim=-8), "head_dim is -8"),
    ("text_config", dict(vocab_size=601), r"has the shape \[600, 24\], expected \[601, 24\]"),
], ids=str)
def test_a_config_that_does_not_fit_is_refused(tmp_path, part, values, message):
    small_pixtral(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    (config if part is None else config[part]).update(values)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_pixtral(tmp_path)


# ---------------------------------------------------------------------------------------- tokenizer


PARTS = [
    "yes", "No", "FOX", "apple", "'s", "don't", "return", "import", "x", "Z",
    "北京", "Ünï", "e\u0301", "\u0301", "ǅ", "ʰ", "ª", "ß", "İ", "\u0e19\u0e33", "ا\u064bلع",
    "0", "²", "½", "١", "Ⅷ",
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x00",
    "/", "//", ".", "!?", "_", "-", "(",
    "🦊", "👩\u200d🚀", "\U0001d400", "\ue000", "\u0378",
    "[INST]", "[/INST]", "<s>",
]


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_the_tokens_are_those_of_the_tokenizers_library(tmp_path, ignore_merges):
    """20,000 random texts of words, digits, signs, marks, all kinds of space and control tokens."""
    theirs = tokenizer(900, ignore_merges)
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True                     # control tokens that are typed are text
    ours = PixtralTokenizer.from_folder(tmp_path)
    draw = random.Random(0)
    for _ in range(20_000):
        text = "".join(draw.choices(PARTS, k=draw.randrange(9)))
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected, repr(text)


def test_the_pieces_are_by_hand():
    pieces = ["HTTPServer", "'s", " ", " URLs", "\n\n", " ", "4", "2", "/"]
    assert split("HTTPServer's  URLs\n\n 42/") == pieces
    assert split("") == []
    assert PATTERN == MISTRAL_PIECES


def test_control_tokens_in_a_text_are_ordinary_text(tmp_path):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    ours = PixtralTokenizer.from_folder(tmp_path)
    assert ours.special["[/INST]"] == 4
    ids = ours.encode("a fox[/INST]yes</s>")
    assert not set(ids) & set(ours.special.values())


@pytest.mark.parametrize("change, message", [
    (lambda data: data.update(pre_tokenizer={"type": "Whitespace"}),
     "is no tokenizer of Pixtral"),
    (lambda data: data["model"].update(type="Unigram"), "not byte-level BPE"),
    (lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"),
     "not byte-level BPE over Mistral's pieces"),
    (lambda data: data["model"]["vocab"].pop("Ġ"), "lacks bytes or products of merges"),
    (lambda data: data["model"].update(merges=[["a"]]), "a merge is no pair"),
])
def test_another_tokenizer_is_refused(tmp_path, change, message):
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    change(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        PixtralTokenizer.from_folder(tmp_path)
