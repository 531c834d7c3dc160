"""The files of tokenizers."""

import inspect
import json
import random
import re
import struct

import pytest
import transformers
from tokenizer_texts import OFFICIAL, copy, official, strings, t5_pipeline, without_newer_marks

from miniflux.tokenizers import CLIPTokenizer, T5Tokenizer, files
from miniflux.tokenizers.bpe import END, START
from miniflux.tokenizers.files import read_spiece_model, read_t5_json


def test_extra_ids_are_appended_in_falling_order_if_the_config_names_them(
    small_t5_folder, tmp_path
):
    plain = T5Tokenizer.from_folder(small_t5_folder)
    assert set(plain.special) == {"<pad>", "</s>", "<unk>"}
    size = len(plain.pieces)
    decoder = {str(size + 2 - i): {"content": f"<extra_id_{i}>"} for i in range(3)}
    configs = [
        {"extra_ids": 3},
        {"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]},
        {"added_tokens_decoder": decoder},
    ]
    for i, config in enumerate(configs):
        tokenizer = T5Tokenizer.from_folder(copy(small_t5_folder, tmp_path / str(i), **config))
        ids = [tokenizer.special[f"<extra_id_{k}>"] for k in (2, 1, 0)]
        assert ids == [size, size + 1, size + 2]
        assert tokenizer.encode("<extra_id_1>") == [size + 1]


@official
def test_a_spiece_model_of_the_official_pieces_gets_the_100_official_extra_ids(
    official_t5, tmp_path
):
    """Oracle: tokenizer.json. The protobuf message is written here, from that file's pieces."""

    def field(number: int, content: bytes) -> bytes:
        size = len(content)
        # Padded with a group of zeros: still valid.
        length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])
        return bytes([number << 3 | 2]) + length + content

    pieces, charsmap, special, _ = read_t5_json(OFFICIAL / "tokenizer_2/tokenizer.json")
    message = [field(3, field(2, charsmap))]
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}             # control, unknown; 1 is normal
    for piece, score in pieces[:32_000]:
        text = field(1, piece.encode())
        number = b"\x15" + struct.pack("<f", score)
        kind = b"\x18" + bytes([kinds.get(piece, 1)])
        message.append(field(1, text + number + kind))
    (tmp_path / "spiece.model").write_bytes(b"".join(message))
    assert read_spiece_model(tmp_path / "spiece.model") == (pieces, charsmap, special)
    tokenizer = T5Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a fox<extra_id_5>") == official_t5.encode("a fox<extra_id_5>")


def test_model_max_length_is_read_and_1e30_means_none(small_t5_folder, small_clip_folder, tmp_path):
    for i, (written, t5, clip) in enumerate([(64, 64, 64), (10**30, 512, 77), (1e30, 512, 77)]):
        folder = copy(small_t5_folder, tmp_path / f"t{i}", model_max_length=written)
        assert T5Tokenizer.from_folder(folder).max_length == t5
        folder = copy(small_clip_folder, tmp_path / f"c{i}", model_max_length=written)
        assert CLIPTokenizer.from_folder(folder).max_length == clip
    assert T5Tokenizer.from_folder(small_t5_folder).max_length == 512
    assert CLIPTokenizer.from_folder(small_clip_folder).max_length == 77


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor spiece.model"):
        T5Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", [
    "",
    "{",
    "[]",
    "3",
    "\ufffd",
    "{}",
    '{"model": 3}',
    '{"model": {"type": "BPE"}}',
    '{"a": "b"}',
    "[" * 100_000,
    '{"model": {"type": "Unigram", "vocab": [["a"]]}, "normalizer": null, "added_tokens": []}',
    '{"model": {"type": "Unigram", "vocab": [["a", 0]]}, "normalizer": null, "added_tokens": []}',
    '{"model": {"type": "Unigram", "vocab": []}, "normalizer": {"precompiled_charsmap": "?"}, '
    '"added_tokens": [3]}',
])
def test_wrong_json_is_a_value_error(text, tmp_path):
    for name, kind in (("tokenizer.json", T5Tokenizer), ("vocab.json", CLIPTokenizer)):
        (tmp_path / name).write_text(text)
        (tmp_path / "merges.txt").write_text("#version: 0.2\n")
        with pytest.raises(ValueError):
            kind.from_folder(tmp_path)


def test_damaged_merges_are_a_value_error(small_clip_folder, tmp_path):
    for i, text in enumerate(("a b c\n", "alone\n", "never learned\n")):
        folder = copy(small_clip_folder, tmp_path / str(i))
        (folder / "merges.txt").write_text(text)
        with pytest.raises(ValueError):
            CLIPTokenizer.from_folder(folder)


def test_a_truncated_or_scrambled_spiece_model_never_crashes(small_t5_folder, tmp_path):
    """A cut between two fields is a valid message; what loads must also run."""
    data = (small_t5_folder / "spiece.model").read_bytes()
    draw = random.Random(6)
    cuts = [*range(200), *(draw.randrange(len(data)) for _ in range(50))]
    damaged = [data[:cut] for cut in cuts]
    damaged += [
        b"\xff" * 1000,
        b"\x0a" + b"\xff" * 8 + b"\x7f",
        b"\x0b\x0c" * 9,
        data[:50] + b"\x80" * 99,
    ]
    for _ in range(50):
        scrambled = bytearray(data)
        for _ in range(5):
            scrambled[draw.randrange(4000)] = draw.randrange(256)
        damaged.append(bytes(scrambled))
    refused = 0
    for content in damaged:
        (tmp_path / "spiece.model").write_bytes(content)
        try:
            T5Tokenizer.from_folder(tmp_path).encode("a photo ﬁne ①")
        except ValueError as error:
            refused += "\n" not in str(error)
    assert refused > 200


@pytest.mark.parametrize("number", [-1, True, 1.5, None])
def test_a_vocabulary_with_numbers_that_are_no_ids_is_refused(tmp_path, number):
    (tmp_path / "vocab.json").write_text(json.dumps({START: 0, END: 1, "a": number}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="expected numbers in vocab.json"):
        CLIPTokenizer.from_folder(tmp_path)


# ---------------------------------------------------------------------------------- today's folders


TEXTS = [
    "a fox next to 2 red apples",
    "It's 10km—away!!",
    "",
    "北京 ﬁne <|endoftext|> low",
    "  two   spaces ",
    "▁a ▁b",
    "a</s>b c",
    "<|startoftext|> ΣΣ",
]


def test_clip_as_transformers_5_saves_it_is_the_same(small_clip_folder, tmp_path):
    """Only tokenizer.json is written. Oracle: the class that wrote it."""
    theirs = transformers.CLIPTokenizer.from_pretrained(small_clip_folder)
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    ours = CLIPTokenizer.from_folder(tmp_path)
    for sample in [*TEXTS, *strings(300, seed=8)]:
        sample = without_newer_marks([sample])[0]
        expected = theirs(sample, padding="max_length", truncation=True, max_length=77).input_ids
        assert ours([sample])[0].tolist() == expected, ascii(sample)


def test_t5_as_transformers_5_saves_it_is_the_same(small_t5_folder, tmp_path):
    """Its rules differ from those of the official tokenizer.json: every word gets a "▁"."""
    pieces, charsmap, _ = read_spiece_model(small_t5_folder / "spiece.model")
    (tmp_path / "old").mkdir()
    t5_pipeline(pieces, charsmap).save(str(tmp_path / "old/tokenizer.json"))
    theirs = transformers.T5Tokenizer.from_pretrained(tmp_path / "old", extra_ids=0)
    theirs.save_pretrained(tmp_path / "new")
    ours = T5Tokenizer.from_folder(tmp_path / "new")
    assert ours.prepend_always
    for sample in [*TEXTS, *strings(300, seed=9)]:
        expected = theirs(sample, add_special_tokens=False).input_ids
        assert ours.encode(sample) == expected, ascii(sample)


@pytest.mark.parametrize("settings, message", [
    ({"padding_side": "left"}, "the tokenizer's padding_side is 'left', expected 'right'"),
    ({"truncation_side": "left"}, "truncation_side is 'left', expected 'right'"),
    ({"split_special_tokens": True}, "split_special_tokens is True, expected False"),
    ({"bos_token": "[CLS]"}, "bos_token is '\\[CLS\\]', expected '<|startoftext|>'"),
    ({"eos_token": {"content": "</s>"}}, "eos_token is '</s>', expected '<|endoftext|>'"),
    ({"pad_token": "<nothing>"}, "lacks its padding token '<nothing>'"),
])
def test_a_setting_that_is_not_followed_is_refused_by_name(
    small_clip_folder, tmp_path, settings, message
):
    with pytest.raises(ValueError, match=message.replace("|", "\\|")):
        CLIPTokenizer.from_folder(copy(small_clip_folder, tmp_path / "a", **settings))


def test_the_padding_token_is_that_of_the_settings(small_clip_folder, small_t5_folder, tmp_path):
    """Stable Diffusion 2, for example, pads with "!". Oracle: transformers."""
    folder = copy(small_clip_folder, tmp_path / "clip", pad_token="!")
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    expected = theirs("low", padding="max_length", max_length=77).input_ids
    assert CLIPTokenizer.from_folder(folder)(["low"])[0].tolist() == expected
    folder = copy(small_t5_folder, tmp_path / "t5", pad_token={"content": "</s>"})
    assert T5Tokenizer.from_folder(folder)([""], length=3).tolist() == [[1, 1, 1]]


def test_every_key_of_the_tokenizers_settings_is_read_or_fixed_or_harmless():
    """Oracle: the keys that transformers takes, of the classes and of their base."""
    known = {*files.FIXED, *files.CLIP_FIXED, *files.T5_FIXED, *files.READ, *files.HARMLESS}
    base = transformers.PreTrainedTokenizerBase
    source = inspect.getsource(base.__init__) + inspect.getsource(base._from_pretrained)
    keys = set(re.findall(r"kwargs\.pop\(\s*\"(\w+)\"", source))
    keys |= set(base.SPECIAL_TOKENS_ATTRIBUTES)
    for kind in (transformers.CLIPTokenizer, transformers.T5Tokenizer):
        keys |= set(inspect.signature(kind).parameters)
    arguments = {
        "vocab", "merges", "kwargs", "init_inputs", "max_len", "model_specific_special_tokens",
        "response_schema", "subfolder", "proxies", "from_pipeline",
    }
    public = {key for key in keys if not key.startswith("_")}
    assert public - arguments - known == set()
    assert all(files.HARMLESS.values())


@pytest.mark.parametrize("change, message", [
    (lambda data: data["model"].update(type="WordPiece"),
     "its model's type is 'WordPiece', expected 'BPE'"),
    (lambda data: data["model"].update(dropout=0.1),
     "its model's dropout is 0.1, expected None"),
    (lambda data: data["model"].update(end_of_word_suffix=""), "end_of_word_suffix is ''"),
    (lambda data: data["normalizer"]["normalizers"].pop(), "its normalizer is"),
    (lambda data: data.update(padding={"direction": "Left"}),
     "its padding is on the side 'Left'"),
    (lambda data: data["model"]["merges"].append("abc"), "a merge is no pair"),
])
def test_a_clip_tokenizer_with_other_rules_is_refused(small_clip_folder, tmp_path, change, message):
    transformers.CLIPTokenizer.from_pretrained(small_clip_folder).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=message):
        CLIPTokenizer.from_folder(tmp_path)
