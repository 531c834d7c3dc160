"""The tokenizers against the fast tokenizers of the `tokenizers` library, against SentencePiece, and by hand."""

import base64
import doctest
import json
import random
import re
import shutil
import struct
import unicodedata
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from miniflux.networks import character_map, tokenizer_files
from miniflux.networks import tokenizers as ours
from miniflux.networks.character_map import CharacterMap, clusters
from miniflux.networks.tokenizers import (
    CLIPTokenizer,
    T5Tokenizer,
    normalise_clip,
    split_clip,
)

OFFICIAL = Path(__file__).resolve().parents[2].parent / "shared" / "reference" / "FLUX.1-dev"
official = pytest.mark.skipif(not OFFICIAL.is_dir(), reason="the official tokenizer files are not here")

# Marks whose canonical order (or, for U+11938, composition) came with Unicode 10 and later. The tables by which the
# `tokenizers` library applies NFC are those of Unicode 9, Python's are newer: CLIP's tokens differ where one of these
# stands next to another combining mark. The lines are the versions 10 to 14, then 15, then 16.
NFC_NEWER_THAN_THE_LIBRARY = re.compile(
    "[\u07fd\u0898-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1ace\u1df6-\u1dfa\ua82c"
    "\U00010d24-\U00010d27\U00010eab-\U00010eac\U00010f46-\U00010f50\U00010f82-\U00010f85\U00011070\U0001133b\U0001145e"
    "\U00011839-\U0001183a\U00011930-\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42-\U00011d45\U00011d97"
    "\U00016ff0-\U00016ff1\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef"
    "\U00010efa-\U00010eff\U00011f41-\U00011f42\U0001e08f\U0001e4ec-\U0001e4ef"
    "\u0897\U00010d69-\U00010d6d\U00011380-\U000113e2\U00016100-\U0001612f\U00016d40-\U00016d6f\U0001e5ee-\U0001e5ef]"
)

WORDS = """a photo of an astronaut riding a horse on mars in the style of Van Gogh's sketches, they're 3 cats; she'll don't
I'm we've he'd a red apple to the left of an owl at night painting with light snow river mountain café naïve Straße ﬁne
北京 東京 Москва Αθήνας ΣΊΣΥΦΟΣ नमस्ते สวัสดี 서울 العربية עברית İstanbul ① ½ Ⅷ ㎏ ™ 2024 1,000 km² … — “quoted” 🙂""".split()
TYPED = """<|startoftext|> <|endoftext|> <|STARTOFTEXT|> <|EndOfText|> </s> <pad> <unk> <extra_id_0> <extra_id_57> ＜/s＞
's 't 're 've 'm 'll 'd 'S 'LL ’s '' _ __ ▁ ▁▁ <| |>""".split() + ["\r\n", " ", "  ", "\u3000 ", "\x85", "\u2003"]
EMOJI = list("🙂👩👨👧❤🔥⚕🏳🌈🇩🇪🇫🇷🏽🏿\u200d\ufe0f#\u20e3")


@lru_cache
def assigned() -> list[str]:
    """Every code point this Python knows, without surrogates."""
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]


def strings(count: int, seed: int) -> list[str]:
    """Random text of 0 to 2,000 characters; each string mixes one to three kinds of characters."""
    draw = random.Random(seed)
    known = [c for c in assigned() if unicodedata.category(c) != "Co"]
    by_category = {first: [c for c in known if unicodedata.category(c)[0] == first] for first in "LMNPSZC"}
    latin = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ   ")
    two_bytes = [c for c in known if 0x80 <= ord(c) < 0x800]
    compatible = [c for c in known if unicodedata.decomposition(c)]
    pools = [known, latin, latin, list(map(chr, range(128))), two_bytes, compatible, EMOJI, TYPED, WORDS]
    pools += [[word + " " for word in WORDS], *by_category.values()]
    result = []
    for i in range(count):
        length = draw.choice([0, 1, 2, 3, 5, 8, 13, 30]) if i % 500 else draw.randint(30, 2000)
        chosen = draw.sample(pools, draw.randint(1, 3))
        result.append("".join(draw.choice(draw.choice(chosen)) for _ in range(length))[:2000])
    return result


def assert_equal(tokenizer, reference: Tokenizer, texts: list[str]) -> None:
    expected = reference.encode_batch(texts, add_special_tokens=False)
    wrong = [t for t, e in zip(texts, expected) if tokenizer.encode(t) != e.ids]
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the shortest: {ascii(min(wrong, key=len))}"


def without_newer_marks(texts: list[str]) -> list[str]:
    return [NFC_NEWER_THAN_THE_LIBRARY.sub("", text) for text in texts]


def each_code_point() -> list[str]:
    return assigned() + [f"a{c}b " for c in assigned()]


# ------------------------------------------------------------------------------------------------------------- fixtures


def clip_pipeline(model) -> Tokenizer:
    """The rules of CLIP's fast tokenizer, as transformers builds it."""
    reference = Tokenizer(model)
    reference.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    pattern = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    reference.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return reference


def t5_pipeline(pieces, charsmap: bytes) -> Tokenizer:
    """The rules of T5's tokenizer.json."""
    reference = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    reference.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(charsmap), normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")])
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    reference.add_special_tokens([AddedToken(piece, normalized=False) for piece, _ in pieces if ours.SPECIAL.fullmatch(piece)])
    return reference


def mark_specials(reference: Tokenizer) -> Tokenizer:
    reference.add_special_tokens([AddedToken(ours.START, normalized=True), AddedToken(ours.END, normalized=False)])
    return reference


@pytest.fixture(scope="module")
def official_clip():
    return CLIPTokenizer.from_folder(OFFICIAL / "tokenizer")


@pytest.fixture(scope="module")
def official_t5():
    return T5Tokenizer.from_folder(OFFICIAL / "tokenizer_2")


@pytest.fixture(scope="module")
def small_clip_folder(tmp_path_factory):
    """A vocabulary of 600 symbols, learned here. Most bytes have no `</w>` form: unknown at the end of a word."""
    folder = tmp_path_factory.mktemp("clip")
    reference = clip_pipeline(models.BPE(unk_token=ours.END, end_of_word_suffix="</w>"))
    reference.train_from_iterator([" ".join(WORDS)] * 9, trainers.BpeTrainer(
        vocab_size=600, special_tokens=[ours.START, ours.END], end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    reference.model.save(str(folder))
    return folder


@pytest.fixture(scope="module")
def small_t5_folder(tmp_path_factory):
    """A SentencePiece model of some 200 pieces, learned here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("t5")
    sentences = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=str(folder / "spiece"), vocab_size=300, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, character_coverage=1.0, minloglevel=2, num_threads=1)
    return folder


def copy(folder: Path, target: Path, **config) -> Path:
    shutil.copytree(folder, target)
    if config:
        (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


# ---------------------------------------------------------------------------------- equality with the tokenizers library


@official
def test_clip_equals_the_tokenizers_library_on_the_official_files(official_clip):
    """Oracle: the fast pipeline of the `tokenizers` library with the official vocabulary."""
    files = str(OFFICIAL / "tokenizer/vocab.json"), str(OFFICIAL / "tokenizer/merges.txt")
    reference = mark_specials(clip_pipeline(models.BPE.from_file(*files, unk_token=ours.END, end_of_word_suffix="</w>")))
    assert_equal(official_clip, reference, without_newer_marks(strings(50_000, seed=1)))
    assert_equal(official_clip, reference, each_code_point())


@official
def test_t5_equals_the_tokenizers_library_on_the_official_files(official_t5):
    """Oracle: the official tokenizer.json run by the `tokenizers` library."""
    reference = Tokenizer.from_file(str(OFFICIAL / "tokenizer_2/tokenizer.json"))
    assert_equal(official_t5, reference, strings(50_000, seed=2))
    assert_equal(official_t5, reference, each_code_point())


def test_clip_equals_the_tokenizers_library_on_a_small_vocabulary(small_clip_folder):
    """Oracle: the fast pipeline of the `tokenizers` library with a vocabulary of other ids and many unknowns."""
    files = str(small_clip_folder / "vocab.json"), str(small_clip_folder / "merges.txt")
    reference = mark_specials(clip_pipeline(models.BPE.from_file(*files, unk_token=ours.END, end_of_word_suffix="</w>")))
    assert_equal(CLIPTokenizer.from_folder(small_clip_folder), reference, without_newer_marks(strings(50_000, seed=3)))


def test_t5_equals_the_tokenizers_library_on_a_small_vocabulary(small_t5_folder, tmp_path):
    """Oracle: the rules of T5's tokenizer.json, run by the `tokenizers` library on pieces that SentencePiece reports."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(small_t5_folder / "spiece.model"))
    pieces = [(model.id_to_piece(i), model.get_score(i)) for i in range(len(model))]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in (2, 1, 0)]
    from_spiece = T5Tokenizer.from_folder(copy(small_t5_folder, tmp_path / "spiece", extra_ids=3))
    charsmap = tokenizer_files.read_spiece_model(small_t5_folder / "spiece.model")[1]
    reference = t5_pipeline(pieces, charsmap)
    texts = strings(50_000, seed=4)
    assert_equal(from_spiece, reference, texts)

    (tmp_path / "json").mkdir()
    reference.save(str(tmp_path / "json/tokenizer.json"))
    from_json = T5Tokenizer.from_folder(tmp_path / "json")
    assert from_json.pieces == from_spiece.pieces and from_json.special == from_spiece.special
    assert all(from_json.encode(text) == from_spiece.encode(text) for text in texts[:5000])


def test_t5_equals_sentencepiece_where_the_definitions_agree(small_t5_folder):
    """Oracle: SentencePiece itself. It has no grapheme clusters, no typed special tokens, and adds in float32: plain words."""
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(small_t5_folder / "spiece.model"))
    tokenizer = T5Tokenizer.from_folder(small_t5_folder)
    draw = random.Random(5)
    pools = [WORDS, list("aeinorst"), list("北京é①Σ \t\u3000"), list("astronautphoto' ,.")]
    texts = ["".join(draw.choice(draw.choice(pools)) + draw.choice(["", " "]) for _ in range(draw.randint(0, 30)))
             for _ in range(20_000)]
    texts = [unicodedata.normalize("NFC", text) for text in texts]
    wrong = [t for t, e in zip(texts, model.encode(texts)) if tokenizer.encode(t) != e]
    assert not wrong, (len(wrong), ascii(min(wrong, key=len)))


@official
def test_grapheme_clusters_are_cut_like_the_library_cuts_them(official_t5):
    """Oracle: the library's own character map, on pairs and triples of all kinds of characters that join or do not."""
    steps = json.loads((OFFICIAL / "tokenizer_2/tokenizer.json").read_text())["normalizer"]["normalizers"]
    reference = normalizers.Precompiled(base64.b64decode(steps[0]["precompiled_charsmap"]))
    marks = [c for c in assigned() if unicodedata.category(c) in ("Mn", "Mc", "Me", "Cf", "Cc", "Lm", "Sk", "Zl", "Zp")]
    for text in [f"{base}{c}{end}" for c in marks for base in ("²", "ﬁ", "a", "") for end in ("", "\u0301", "ﬁ\u0301")]:
        assert official_t5.map_characters(text) == reference.normalize_str(text), ascii(text)


# ------------------------------------------------------------------------------------------------------ worked examples


def test_the_examples_in_the_docstrings_hold():
    assert all(doctest.testmod(module).failed == 0 for module in (ours, character_map, tokenizer_files))


CLIP_EXAMPLES = {
    "A cat holding a sign that says hello world": [320, 2368, 5050, 320, 2292, 682, 1563, 3306, 1002],
    "": [],
    "Hello,  World's 2024 café!! 🙂": [3306, 267, 1002, 568, 273, 271, 273, 275, 15304, 748, 14860],
    "It's 10km—away…": [585, 568, 272, 271, 4590, 2005, 1520, 959],
    "a photo of 北京": [320, 1125, 539, 161, 234, 245, 21078, 361],
}
T5_EXAMPLES = {
    "A cat holding a sign that says hello world": [71, 1712, 3609, 3, 9, 1320, 24, 845, 21820, 296],
    "": [],
    "Hello,  World's 2024 café!! 🙂": [8774, 6, 1150, 31, 7, 460, 2266, 11949, 1603, 3, 2],
    "It's 10km—away…": [94, 31, 7, 335, 5848, 318, 8006, 233],
    "x\u00a0y\ttab\nnew": [3, 226, 3, 63, 3808, 126],
    "a photo of 北京": [3, 9, 1202, 13, 3, 2],
}


@official
def test_clip_gives_the_known_ids_of_the_examples(official_clip):
    """Oracle: golden numbers of the reference."""
    for text, ids in CLIP_EXAMPLES.items():
        assert official_clip.encode(text) == ids
        assert official_clip([text]).tolist() == [[49406] + ids + [49407] * (76 - len(ids))]


@official
def test_t5_gives_the_known_ids_of_the_examples(official_t5):
    """Oracle: golden numbers of the reference."""
    for text, ids in T5_EXAMPLES.items():
        assert official_t5.encode(text) == ids
        assert official_t5([text], length=32).tolist() == [ids + [1] + [0] * (31 - len(ids))]


@official
def test_the_official_vocabularies_have_the_known_layout(official_clip, official_t5):
    assert (len(official_clip.vocab), official_clip.start, official_clip.end) == (49408, 49406, 49407)
    assert (len(official_t5.pieces), official_t5.pad, official_t5.end, official_t5.unknown) == (32100, 0, 1, 2)
    assert (official_clip.max_length, official_t5.max_length) == (77, 512) and official_t5.special["<extra_id_99>"] == 32000
    assert official_t5.special["<extra_id_0>"] == 32099


# -------------------------------------------------------------------------------------------------------- by hand: CLIP


def tiny_clip(**changes) -> CLIPTokenizer:
    """Bytes, "low</w>" and nothing else; the specials come first, so their ids are not the official ones."""
    symbols = [ours.START, ours.END, *ours.byte_symbols(), *(s + "</w>" for s in ours.byte_symbols()), "ow</w>", "low</w>"]
    merges = [("o", "w</w>"), ("l", "ow</w>")]
    return CLIPTokenizer(**{"vocab": {s: i for i, s in enumerate(symbols)}, "merges": merges, "max_length": 8, **changes})


def test_special_ids_come_from_the_vocabulary():
    tokenizer = tiny_clip()
    assert tokenizer(["low"]).tolist() == [[0, tokenizer.vocab["low</w>"], 1, 1, 1, 1, 1, 1]]


def test_clip_truncation_keeps_the_end_token():
    tokens = tiny_clip()(["low " * 20, "low"])
    assert tokens.shape == (2, 8) and tokens.dtype == torch.int64
    assert tokens[0, 0] == 0 and tokens[0, -1] == 1 and (tokens[0, 1:-1] == tiny_clip().vocab["low</w>"]).all()
    assert tiny_clip()(["low low"], length=2).tolist() == [[0, 1]]


def test_the_lowest_rank_is_merged_first_and_the_leftmost_of_equals():
    vocab = {s: i for i, s in enumerate([ours.START, ours.END, "a", "a</w>", "aa", "aa</w>"])}
    assert CLIPTokenizer(vocab, [("a", "a"), ("a", "a</w>")]).merge("aaa") == [4, 3]
    assert CLIPTokenizer(vocab, [("a", "a</w>"), ("a", "a")]).merge("aaa") == [2, 5]
    assert CLIPTokenizer(vocab, [("a", "a")]).merge("aaaa") == [4, 2, 3]


def test_numbers_are_split_digit_by_digit():
    assert split_clip(normalise_clip("in 2024 km² ⅷ½x")) == ["in", "2", "0", "2", "4", "km", "²", "ⅷ", "½", "x"]


def test_lower_case_is_taken_character_by_character():
    """Oracle: a final capital sigma becomes σ, never ς; the dotted capital I becomes i and a dot."""
    assert normalise_clip("ΟΔΟΣ İ") == "οδοσ i\u0307"


def test_special_tokens_typed_in_a_prompt_are_honoured_by_clip():
    """Note the end token in capitals: it is ordinary text, the start token is not."""
    tokenizer = tiny_clip()
    low = tokenizer.vocab["low</w>"]
    assert tokenizer.encode("low<|endoftext|>low <|startoftext|> <|StartOfText|>") == [low, 1, low, 0, 0]
    assert split_clip(normalise_clip("<|ENDOFTEXT|>!!")) == ["<|", "endoftext", "|>", "!!"]
    assert split_clip(normalise_clip("!<|ENDOFTEXT|>!!")) == ["!<|", "endoftext", "|>!!"]


def test_white_space_is_unicodes_and_not_pythons():
    """Oracle: Unicode's White_Space. Python's \\s has four more, the separators U+001C to U+001F."""
    assert split_clip("a\x1cb\u2003c\x85d\u200be") == ["a", "\x1c", "b", "c", "d", "\u200b", "e"]


def test_python_word_characters_are_letters_numbers_and_the_underscore():
    """Oracle: the general categories L* and N*, by which the library's pattern is written."""
    for c in assigned():
        category = unicodedata.category(c)[0]
        assert bool(re.match(r"\w", c)) == (category in "LN" or c == "_")
        assert (c.isnumeric() and not c.isalpha()) == (category == "N")


def test_a_symbol_outside_of_the_vocabulary_is_the_end_token():
    assert CLIPTokenizer({ours.START: 0, ours.END: 1, "a</w>": 2}, []).encode("a b ba") == [2, 1, 1, 2]


# ---------------------------------------------------------------------------------------------------------- by hand: T5

PIECES = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), ("a", -3.0), ("b", -3.0), ("ab", -4.0), ("▁a", -5.0)]


def charsmap_of(**replacements: str) -> bytes:
    """A character map built by hand for keys of one ASCII letter: one block of 256 units for the root, one for each leaf."""
    units, texts = [0] * 256, b""
    units[0] = 1 << 10 | 0  # the root: offset 1, so its children are the units 1 ^ byte
    for key, text in replacements.items():
        node, leaf = 1 ^ ord(key), len(units)
        units[node] = (leaf ^ node) << 10 | 1 << 8 | ord(key)
        units += [1 << 31 | len(texts)] + [0] * 255
        texts += text.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts


def test_t5_truncation_keeps_the_end_token_and_padding_fills_the_length():
    tokenizer = T5Tokenizer(PIECES, max_length=6)
    assert tokenizer(["ab", "b b b b b b", ""]).tolist() == [[3, 6, 1, 0, 0, 0], [3, 5, 3, 5, 3, 1], [1, 0, 0, 0, 0, 0]]
    assert tokenizer([]).shape == (0, 6) and tokenizer(["ab"], length=1).tolist() == [[1]]


def test_of_equal_scores_the_earlier_start_wins():
    """▁ + a and ▁a both score -5."""
    assert T5Tokenizer(PIECES).encode("a") == [7]
    assert T5Tokenizer(PIECES + [("▁ab", -6.0)]).encode("ab") == [8]  # against ▁ + ab


def test_an_unknown_character_scores_ten_less_than_the_least_piece_and_neighbours_are_one():
    tokenizer = T5Tokenizer(PIECES)
    assert tokenizer.unknown_score == -15.0
    assert tokenizer.encode("xyz a xaxx") == [3, 2, 7, 3, 2, 4, 2]


def test_leading_spaces_are_not_doubled_and_only_spaces_are_nothing():
    tokenizer = T5Tokenizer(PIECES)
    assert tokenizer.encode(" a") == tokenizer.encode("  a  ") == tokenizer.encode("a") == [7]
    assert tokenizer.encode("    ") == tokenizer.encode("") == []


def test_text_after_a_special_token_gets_no_space_in_front():
    tokenizer = T5Tokenizer(PIECES)
    assert tokenizer.encode("a</s>a a") == [7, 1, 4, 7]
    assert tokenizer.encode("</s>a") == [1, 4]


@official
def test_text_after_an_extra_id_follows_tokenizer_json(official_t5):
    """Oracle: tokenizer.json; the class T5Tokenizer of transformers 5 would give 296, "▁world"."""
    assert official_t5.encode("hello<extra_id_5>world") == [21820, 32094, 7276]


def test_a_short_cluster_is_replaced_as_a_whole_by_its_shortest_prefix():
    """An accent behind a mapped character is lost in a cluster below six bytes, and kept from six bytes on."""
    characters = CharacterMap(charsmap_of(q="K", w=""))
    assert characters("q a w") == "K a "
    assert characters("q\u0301") == "K" and characters("q\u0301\u0301\u0301") == "K\u0301\u0301\u0301"
    assert characters("a\u0301\x00q") == "a\u0301\x00K" and CharacterMap(b"")("q\u0301") == "q\u0301"


def test_grapheme_clusters_follow_annex_29():
    assert list(clusters("e\u0301\u200da\r\n\u0301\u0600x\u0e33")) == ["e\u0301\u200d", "a", "\r\n", "\u0301", "\u0600x\u0e33"]
    assert list(clusters("\n\r \u102b")) == ["\n", "\r", " ", "\u102b"] and list(clusters("")) == []


def test_extra_ids_are_appended_in_falling_order_when_the_config_names_them(small_t5_folder, tmp_path):
    plain = T5Tokenizer.from_folder(small_t5_folder)
    assert "<extra_id_0>" not in plain.special and set(plain.special) == {"<pad>", "</s>", "<unk>"}
    size = len(plain.pieces)
    configs = [{"extra_ids": 3}, {"additional_special_tokens": ["<extra_id_0>", "<extra_id_1>", "<extra_id_2>"]},
               {"added_tokens_decoder": {str(size + 2 - i): {"content": f"<extra_id_{i}>"} for i in range(3)}}]
    for i, config in enumerate(configs):
        tokenizer = T5Tokenizer.from_folder(copy(small_t5_folder, tmp_path / str(i), **config))
        assert [tokenizer.special[f"<extra_id_{k}>"] for k in (2, 1, 0)] == [size, size + 1, size + 2]
        assert tokenizer.encode("<extra_id_1>") == [size + 1]


@official
def test_a_spiece_model_of_the_official_pieces_gets_the_100_official_extra_ids(official_t5, tmp_path):
    """Oracle: tokenizer.json. The protobuf message is written here, from the pieces of that file."""

    def field(number: int, content: bytes) -> bytes:
        size = len(content)
        length = bytes([size & 127 | 128, size >> 7 & 127 | 128, size >> 14])  # padded with a zero group: still valid
        return bytes([number << 3 | 2]) + length + content

    pieces, charsmap, special = tokenizer_files.read_tokenizer_json(OFFICIAL / "tokenizer_2/tokenizer.json")
    message = [field(3, field(2, charsmap))]
    for i, (piece, score) in enumerate(pieces[:32_000]):
        kind = b"\x18" + (bytes([2]) if piece == "<unk>" else bytes([3]) if i < 2 else bytes([1]))
        message.append(field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + kind))
    (tmp_path / "spiece.model").write_bytes(b"".join(message))
    assert tokenizer_files.read_spiece_model(tmp_path / "spiece.model") == (pieces, charsmap, special)
    assert T5Tokenizer.from_folder(tmp_path).encode("a fox<extra_id_5>") == official_t5.encode("a fox<extra_id_5>")


def test_model_max_length_is_read_and_1e30_means_none(small_t5_folder, small_clip_folder, tmp_path):
    for i, (written, t5, clip) in enumerate([(64, 64, 64), (10**30, 512, 77), (1e30, 512, 77)]):
        assert T5Tokenizer.from_folder(copy(small_t5_folder, tmp_path / f"t{i}", model_max_length=written)).max_length == t5
        assert CLIPTokenizer.from_folder(copy(small_clip_folder, tmp_path / f"c{i}", model_max_length=written)).max_length == clip
    assert T5Tokenizer.from_folder(small_t5_folder).max_length == 512
    assert CLIPTokenizer.from_folder(small_clip_folder).max_length == 77


# ------------------------------------------------------------------------------------------------------ mistakes, damage


@pytest.mark.parametrize("tokenizer", [tiny_clip(), T5Tokenizer(PIECES)])
def test_what_is_not_text_is_refused_in_one_sentence(tokenizer):
    for text in (None, 3, b"bytes", ["list"], "half a \ud83d"):
        with pytest.raises(ValueError, match="prompt"):
            tokenizer.encode(text)
    with pytest.raises(ValueError, match="list of strings"):
        tokenizer("a prompt alone")
    with pytest.raises(ValueError, match="length must be at least"):
        tokenizer(["a"], length=0)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="vocab.json"):
        CLIPTokenizer.from_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor spiece.model"):
        T5Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", [
    "", "{", "[]", "3", "\ufffd", "{}", '{"model": 3}', '{"model": {"type": "BPE"}}', '{"a": "b"}', "[" * 100_000,
    '{"model": {"type": "Unigram", "vocab": [["a"]]}, "normalizer": null, "added_tokens": []}',
    '{"model": {"type": "Unigram", "vocab": [["a", 0]]}, "normalizer": null, "added_tokens": []}',
    '{"model": {"type": "Unigram", "vocab": []}, "normalizer": {"precompiled_charsmap": "?"}, "added_tokens": [3]}'])
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
    damaged = [data[:cut] for cut in [*range(200), *(draw.randrange(len(data)) for _ in range(50))]]
    damaged += [b"\xff" * 1000, b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x0b\x0c" * 9, data[:50] + b"\x80" * 99]
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


def test_a_damaged_character_map_is_refused_or_harmless():
    """Offsets that lead outside are refused when it is loaded; whatever is accepted ends for every text."""
    good = charsmap_of(q="K")
    for bad in (b"\1", good[:100], struct.pack("<I", 2**31) + good[4:], struct.pack("<I", 1027) + good[4:], bytes(8)):
        with pytest.raises(ValueError, match="character map"):
            CharacterMap(bad)
    outside = bytearray(good)
    struct.pack_into("<I", outside, 4, 0x7FFFFF00)
    with pytest.raises(ValueError, match="leads outside"):
        CharacterMap(bytes(outside))
    draw = random.Random(7)
    for _ in range(300):
        scrambled = bytearray(good)
        for _ in range(20):
            scrambled[draw.randrange(4, len(good))] = draw.randrange(256)
        try:
            characters = CharacterMap(bytes(scrambled))
        except ValueError:
            continue
        assert all(isinstance(characters(text), str) for text in ("q", "aq\u0301", "the quick brown fox", "北京\x00"))


def test_a_very_long_word_is_cut_in_time_that_grows_with_its_length():
    """A word of 50,000 characters: an algorithm whose time grows with the square would not come back."""
    clip, t5 = CLIPTokenizer(tiny_clip().vocab, [("o", "w</w>"), ("l", "ow</w>")]), T5Tokenizer(PIECES)
    assert len(clip.encode("lowab" * 10_000)) == 50_000 and t5.encode("lowab" * 10_000)


@pytest.mark.parametrize("number", [-1, True, 1.5, None])
def test_a_vocabulary_with_numbers_that_are_no_ids_is_refused(tmp_path, number):
    (tmp_path / "vocab.json").write_text(json.dumps({ours.START: 0, ours.END: 1, "a": number}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(ValueError, match="expected numbers in vocab.json"):
        CLIPTokenizer.from_folder(tmp_path)
