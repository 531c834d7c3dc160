"""For the tests of tokenizers: texts, small tokenizers, the rules of the `tokenizers` library."""

import json
import random
import re
import shutil
import struct
import unicodedata
from functools import lru_cache
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from miniflux.tokenizers import CLIPTokenizer
from miniflux.tokenizers.bpe import END, START, byte_symbols
from miniflux.tokenizers.unigram import SPECIAL

OFFICIAL = Path(__file__).resolve().parents[2] / "shared" / "reference" / "FLUX.1-dev"
official = pytest.mark.skipif(
    not OFFICIAL.is_dir(), reason="the official tokenizer files are not here")

# Marks whose canonical order (or, for U+11938, composition) came with Unicode 10 and later. The
# `tokenizers` library applies NFC by the tables of Unicode 9, Python's are newer: CLIP's tokens
# differ where one of these stands next to another combining mark.
NFC_NEWER_THAN_THE_LIBRARY = re.compile(
    "["
    # Unicode 10 to 14
    "\u07fd\u0898-\u089f\u08ca-\u08d3\u09fe\u0c3c\u0d3b-\u0d3c\u0eba\u1715\u1abf-\u1ace"
    "\u1df6-\u1dfa\ua82c\U00010d24-\U00010d27\U00010eab-\U00010eac\U00010f46-\U00010f50"
    "\U00010f82-\U00010f85\U00011070\U0001133b\U0001145e\U00011839-\U0001183a"
    "\U00011930-\U00011943\U000119e0\U00011a34\U00011a47\U00011a99\U00011d42-\U00011d45"
    "\U00011d97\U00016ff0-\U00016ff1\U0001e130-\U0001e136\U0001e2ae\U0001e2ec-\U0001e2ef"
    # Unicode 15
    "\U00010efa-\U00010eff\U00011f41-\U00011f42\U0001e08f\U0001e4ec-\U0001e4ef"
    # Unicode 16
    "\u0897\U00010d69-\U00010d6d\U00011380-\U000113e2\U00016100-\U0001612f"
    "\U00016d40-\U00016d6f\U0001e5ee-\U0001e5ef"
    "]"
)

WORDS = """
a photo of an astronaut riding a horse on mars in the style of Van Gogh's sketches,
they're 3 cats; she'll don't I'm we've he'd a red apple to the left of an owl at night
painting with light snow river mountain café naïve Straße ﬁne 北京 東京 Москва Αθήνας ΣΊΣΥΦΟΣ
नमस्ते สวัสดี 서울 العربية עברית İstanbul ① ½ Ⅷ ㎏ ™ 2024 1,000 km² … — “quoted” 🙂
""".split()
TYPED = """
<|startoftext|> <|endoftext|> <|STARTOFTEXT|> <|EndOfText|> </s> <pad> <unk>
<extra_id_0> <extra_id_57> ＜/s＞ 's 't 're 've 'm 'll 'd 'S 'LL ’s '' _ __ ▁ ▁▁ <| |>
""".split()
TYPED += ["\r\n", " ", "  ", "\u3000 ", "\x85", "\u2003"]
EMOJI = list("🙂👩👨👧❤🔥⚕🏳🌈🇩🇪🇫🇷🏽🏿\u200d\ufe0f#\u20e3")


@lru_cache
def assigned() -> list[str]:
    """Every assigned code point of Python's Unicode, without surrogates."""
    return [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in ("Cn", "Cs")]


def strings(count: int, seed: int) -> list[str]:
    """Random text of 0 to 2,000 characters; each string mixes one to three kinds of characters."""
    draw = random.Random(seed)
    known = [c for c in assigned() if unicodedata.category(c) != "Co"]
    by_category = {first: [] for first in "LMNPSZC"}
    for c in known:
        by_category[unicodedata.category(c)[0]].append(c)
    latin = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ   ")
    two_bytes = [c for c in known if 0x80 <= ord(c) < 0x800]
    compatible = [c for c in known if unicodedata.decomposition(c)]
    ascii_ = list(map(chr, range(128)))
    pools = [known, latin, latin, ascii_, two_bytes, compatible, EMOJI, TYPED, WORDS]
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
    shortest = ascii(min(wrong, key=len, default=""))
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, the shortest: {shortest}"


def without_newer_marks(texts: list[str]) -> list[str]:
    return [NFC_NEWER_THAN_THE_LIBRARY.sub("", text) for text in texts]


def each_code_point() -> list[str]:
    return assigned() + [f"a{c}b " for c in assigned()]


def clip_pipeline(model) -> Tokenizer:
    """The rules of CLIP's fast tokenizer, as transformers builds it."""
    reference = Tokenizer(model)
    reference.normalizer = normalizers.Sequence([
        normalizers.NFC(),
        normalizers.Replace(Regex(r"\s+"), " "),
        normalizers.Lowercase(),
    ])
    pattern = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
               r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    reference.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ])
    return reference


def t5_pipeline(pieces, charsmap: bytes) -> Tokenizer:
    """The rules of T5's tokenizer.json."""
    reference = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    reference.normalizer = normalizers.Sequence([
        normalizers.Precompiled(charsmap),
        normalizers.Strip(left=False),
        normalizers.Replace(Regex(" {2,}"), "▁"),
    ])
    reference.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    special = [piece for piece, _ in pieces if SPECIAL.fullmatch(piece)]
    reference.add_special_tokens([AddedToken(piece, normalized=False) for piece in special])
    return reference


def mark_specials(reference: Tokenizer) -> Tokenizer:
    start = AddedToken(START, normalized=True)
    end = AddedToken(END, normalized=False)
    reference.add_special_tokens([start, end])
    return reference


def copy(folder: Path, target: Path, **config) -> Path:
    shutil.copytree(folder, target)
    if config:
        (target / "tokenizer_config.json").write_text(json.dumps(config))
    return target


def tiny_clip(**changes) -> CLIPTokenizer:
    """Bytes, "low</w>" and nothing else.

    The special tokens come first, so their ids are not the official ones."""
    symbols = [START, END, *byte_symbols()]
    symbols += [symbol + "</w>" for symbol in byte_symbols()]
    symbols += ["ow</w>", "low</w>"]
    settings = {
        "vocab": {symbol: i for i, symbol in enumerate(symbols)},
        "merges": [("o", "w</w>"), ("l", "ow</w>")],
        "max_length": 8,
    }
    return CLIPTokenizer(**(settings | changes))


PIECES = [
    ("<pad>", 0.0),
    ("</s>", 0.0),
    ("<unk>", 0.0),
    ("▁", -2.0),
    ("a", -3.0),
    ("b", -3.0),
    ("ab", -4.0),
    ("▁a", -5.0),
]


def charsmap_of(**replacements: str) -> bytes:
    """A character map built by hand for keys of one ASCII letter.

    It has one block of 256 units for the root, and one for each leaf."""
    units, texts = [0] * 256, b""
    units[0] = 1 << 10 | 0  # the root: offset 1, so its children are the units 1 ^ byte
    for key, text in replacements.items():
        node, leaf = 1 ^ ord(key), len(units)
        units[node] = (leaf ^ node) << 10 | 1 << 8 | ord(key)
        units += [1 << 31 | len(texts)] + [0] * 255
        texts += text.encode() + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + texts
