"""From text to token numbers: CLIP's byte-level BPE and T5's unigram model.

FLUX.1 reads a prompt twice. CLIP's tokens become one vector that colours the whole picture; T5's tokens are the sequence
the transformer attends to. The two tokenizers answer one question, "which pieces is this text made of?", from two ends:

    CLIP  byte-pair encoding, bottom up: start from single bytes, glue the pair that was learned first, repeat.
    T5    unigram model, top down: each piece has a log-probability; of all ways to cut a word take the most probable one.

    "Hello,  World's 2024"  ->  CLIP  hello</w> ,</w> world</w> 's</w> 2</w> 0</w> 2</w> 4</w>
                            ->  T5    ▁Hello , ▁World ' s ▁20 24

Both turn `list[str]` into int64 tensors (B, length), framed and padded as the text encoders were trained, and equal the
fast tokenizers of the `tokenizers` library. Where they cannot: code points newer than this Python's Unicode tables, and
CLIP's NFC for combining marks newer than Unicode 9 (the library's tables are older there).

Sources: BPE: Sennrich et al. 2016, arXiv:1508.07909. CLIP: Radford et al. 2021, arXiv:2103.00020. Unigram: Kudo 2018,
arXiv:1804.10959. SentencePiece: Kudo & Richardson 2018, arXiv:1808.06226. Grapheme clusters: Unicode Annex 29.
"""

import base64
import heapq
import json
import re
import struct
import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

remember = lru_cache(maxsize=50_000)  # prompts repeat their words; the least recently used are forgotten


def check_text(text: str) -> None:
    if not isinstance(text, str):
        raise ValueError(f"a prompt must be a str, got {type(text).__name__}: {text!r:.60}")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"the prompt has a lone surrogate, which is no character, expected valid Unicode: {text!r:.60}")


def frame(encode: Callable, texts: list[str], length: int, start: list[int], end: int, pad: int) -> torch.Tensor:
    """`start`, the tokens of each text, `end`, then `pad` up to `length`: (B, length).

    Note: truncation cuts the text's tokens; the end token always stays.
    """
    if not isinstance(texts, (list, tuple)):
        raise ValueError(f"texts must be a list of strings, got {type(texts).__name__}: {texts!r:.60}")
    room = length - len(start) - 1
    if room < 0:
        raise ValueError(f"length must be at least {len(start) + 1}, to hold the special tokens, got {length}")
    rows = [start + encode(text)[:room] + [end] for text in texts]
    rows = [row + [pad] * (length - len(row)) for row in rows]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), length)  # (B, length), also for B = 0


# ---------------------------------------------------------------------------------------------------------------- CLIP

START, END = "<|startoftext|>", "<|endoftext|>"

# Unicode's White_Space. Note: Python's \s also counts the separators U+001C..U+001F.
SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + "\u2028\u2029\u202f\u205f\u3000"

# Python's \w is exactly: letters (L*), numbers (N*), underscore. `normalise_clip` has put spaces around each number, so
# [^\W_]+ is a run of letters or one number. END gets here only if typed in capitals: then it is three ordinary pieces.
CLIP_PIECE = re.compile(rf"(<\|)(endoftext)(\|>)|('s|'t|'re|'ve|'m|'ll|'d|[^\W_]+|(?:[^\w{SPACE}]|_)+)")


def normalise_clip(text: str) -> str:
    """NFC, lower case, numbers set apart.

    >>> normalise_clip("OΣ 42 Ⅷ")
    'oσ  4  2   ⅷ '

    Note: lower case goes character by character. `str.lower` looks at the neighbours: "OΣ".lower() is "oς".
    Note: each digit, Roman or circled number is a piece of its own: "2024" is four tokens.
    """
    lower = (c.lower() for c in unicodedata.normalize("NFC", text))
    return "".join(f" {c} " if c.isnumeric() and not c.isalpha() else c for c in lower)


def split_clip(text: str) -> list[str]:
    """Cut normalised text into the pieces BPE works on: contractions, words, single numbers, runs of anything else.

    >>> split_clip(normalise_clip("It's 10km—away!!"))
    ['it', "'s", '1', '0', 'km', '—', 'away', '!!']
    """
    return [piece for groups in CLIP_PIECE.findall(text) for piece in groups if piece]


def byte_symbols() -> list[str]:
    """One printable character for each byte (GPT-2): printable bytes stand for themselves, the rest from U+0100 upwards.

    >>> "".join(byte_symbols()[byte] for byte in "né !\\n".encode())
    'nÃ©Ġ!Ċ'
    """
    spare = map(chr, range(256, 512))
    return [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b else next(spare) for b in range(256)]


class CLIPTokenizer:
    """Byte-level BPE with `</w>` at the end of each word.

    vocab: symbol -> id; merges: pairs of symbols in the order they were learned. `<|startoftext|>` and `<|endoftext|>`
    (which is end, padding and unknown in one) have the ids the vocabulary gives them. ValueError if it does not fit.

    With the official files: encode("a photo of 北京") == [320, 1125, 539, 161, 234, 245, 21078, 361]
    """

    def __init__(self, vocab: dict[str, int], merges: list[tuple[str, str]], max_length: int = 77):
        missing = [symbol for symbol in [START, END, *map("".join, merges)] if symbol not in vocab]
        if missing:
            raise ValueError(f"CLIP's vocabulary lacks special tokens or products of merges: {missing[:5]}")
        self.vocab, self.max_length = vocab, max_length
        self.start, self.end = vocab[START], vocab[END]
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.symbols = byte_symbols()

    @classmethod
    def from_folder(cls, folder) -> "CLIPTokenizer":
        """Reads vocab.json, merges.txt and, where there is one, tokenizer_config.json."""
        folder = Path(folder)
        vocab = read_json(folder / "vocab.json")
        lines = read_bytes(folder / "merges.txt").decode("utf-8", errors="replace").split("\n")
        merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
        if {len(pair) for pair in merges} - {2} or set(map(type, vocab.values())) - {int}:
            raise ValueError(f"{folder} is damaged, expected numbers in vocab.json and pairs in merges.txt")
        return cls(vocab, merges, read_max_length(folder, default=77))

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Start, tokens, end, padded with end: (B, length)."""
        return frame(self.encode, texts, self.max_length if length is None else length, [self.start], self.end, self.end)

    def encode(self, text: str) -> list[int]:
        """The tokens of the text alone, without start and end.

        Note: special tokens typed in the text are honoured: END in the text as it is, START in small letters or capitals.
        """
        check_text(text)
        ids = []
        for i, part in enumerate(text.split(END)):
            ids += [self.end] * (i > 0)
            for j, words in enumerate(normalise_clip(part).split(START)):
                ids += [self.start] * (j > 0)
                for piece in split_clip(words):
                    ids += self.merge(piece)
        return ids

    @remember
    def merge(self, piece: str) -> list[int]:
        """Byte-pair encoding: glue the pair with the lowest rank (of equals: the leftmost) until no pair has a rank.

        "low" -> l o w</w> -> lo w</w> -> low</w>. A heap holds the candidates, so n bytes cost O(n log n).
        """
        symbols = [self.symbols[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += "</w>"
        n = len(symbols)
        before, after = list(range(-1, n)), list(range(1, n + 2))  # neighbours; a glued symbol leaves "" on the right
        heap = []

        def consider(i: int) -> None:
            pair = (symbols[i], symbols[after[i]]) if i >= 0 and after[i] < n else None
            if pair in self.ranks:
                heapq.heappush(heap, (self.ranks[pair], i, pair))

        for i in range(n):
            consider(i)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = after[i]
            if j < n and pair == (symbols[i], symbols[j]):  # else one of them was glued to another neighbour meanwhile
                symbols[i], symbols[j] = symbols[i] + symbols[j], ""
                after[i], before[after[j]] = after[j], i
                consider(before[i])
                consider(i)
        return [self.vocab.get(symbol, self.end) for symbol in symbols if symbol]


# ------------------------------------------------------------------------------------------------------------------ T5

SPECIAL = re.compile(r"<pad>|</s>|<unk>|<extra_id_\d+>")
UNKNOWN_PENALTY = 10.0  # an unknown character scores this much less than the least probable piece

# What of Annex 29's classes Extend and Prepend does not follow from the general category.
JOINS_LEFT = re.compile("[\u0e33\u0eb3\u200c\u200d\uff9e\uff9f\U0001f3fb-\U0001f3ff\U000e0020-\U000e007f]")
STANDS_ALONE = re.compile("[\u102b\u102c\u1038\u1062-\u1064\u1067-\u106d\u1083\u1087-\u108c\u108f\u109a-\u109c\u1a61\u1a63"
                          "\u1a64\uaa7b\uaa7d\U00011720\U00011721]")
JOINS_RIGHT = re.compile("[\u0600-\u0605\u06dd\u070f\u0890\u0891\u08e2\u0d4e\U000110bd\U000110cd\U000111c2\U000111c3"
                         "\U000113d1\U0001193f\U00011941\U00011a84-\U00011a89\U00011d46\U00011f02]")


@remember
def joining(c: str) -> str:
    """How a character joins its neighbours in a cluster: "left", "right", "never" (controls) or not by itself, ""."""
    category = unicodedata.category(c)
    if JOINS_LEFT.match(c) or category[0] == "M" and not STANDS_ALONE.match(c):
        return "left"
    return "right" if JOINS_RIGHT.match(c) else "never" if category in ("Cc", "Cf", "Zl", "Zp") else ""


def clusters(text: str) -> Iterator[str]:
    """Cut text into grapheme clusters, what a reader sees as one character.

    >>> [len(cluster) for cluster in clusters("ae\\u0301\\r\\nx")]
    [1, 2, 2, 1]

    Note: only clusters below six bytes matter to `CharacterMap`, so the rules that make longer ones are left out: Hangul
    syllables, flags, Indic conjuncts, emoji sequences. (It shows only where a later member of such a sequence is a
    character the map replaces *and* has a two-byte accent, as in: heart, zero-width joiner, ™, U+0301.)
    """
    start = 0
    for i in range(1, len(text)):
        left, right = joining(text[i - 1]), joining(text[i])
        joined = (right == "left" or left == "right") and "never" not in (left, right)
        if not joined and text[i - 1 : i + 1] != "\r\n":
            yield text[start:i]
            start = i
    if text:
        yield text[start:]


class CharacterMap:
    """SentencePiece's precompiled map of characters: "ﬁ" -> "fi", "①" -> "1", "\\t" -> " ", most controls -> nothing.

    The bytes are: u32 size of a trie, the trie, the replacements (UTF-8, each ended by NUL). The trie is a double array
    (Aoe 1989, laid out as in darts-clone): node p's child by byte b is unit p ^ offset(p) ^ b, if that unit's label is b.

        unit, 32 bits:  [30..10] offset  [9] offset counts in 256s  [8] a replacement ends here: its position among the
                        replacements is in unit p ^ offset(p)  [31 and 7..0] label; bit 31 marks units with positions
    """

    def __init__(self, charsmap: bytes):
        size = struct.unpack_from("<I", charsmap)[0] if len(charsmap) >= 4 else 0
        if charsmap and (size % 4 or not 4 <= size <= len(charsmap) - 4):
            raise ValueError(f"the character map is damaged: a trie of {size} bytes does not fit {len(charsmap)} bytes")
        units = np.frombuffer(charsmap[4 : 4 + size], "<u4")
        children = np.arange(len(units), dtype=np.uint32) ^ ((units >> 10) << ((units & 512) >> 6))  # p ^ offset(p)
        if np.any((children | 255)[units >> 31 == 0] >= len(units)):
            raise ValueError(f"the character map is damaged: its trie leads outside of its {len(units)} units")
        self.units, self.children = units.tolist(), children.tolist()
        self.replacements = charsmap[4 + size :]

    def __call__(self, text: str) -> str:
        return "".join(map(self.replace, clusters(text))) if self.units else text

    @remember
    def replace(self, cluster: str) -> str:
        """Note: a cluster below six bytes is tried as a whole, and replaced as a whole by what its *shortest* known prefix
        stands for: "ﬁ" with an accent becomes "fi", the accent is lost. All else goes character by character."""
        whole = self.find(cluster) if len(cluster.encode("utf-8")) < 6 else None
        if whole is not None:
            return whole
        return "".join(c if (found := self.find(c)) is None else found for c in cluster)

    def find(self, key: str) -> str | None:
        """The replacement of the shortest prefix of `key` that has one."""
        node = self.children[0]
        for byte in key.encode("utf-8"):
            unit, node = self.units[node ^ byte], self.children[node ^ byte]
            if unit & 0x800000FF != byte:
                return None
            if unit & 256:
                position = self.units[node] & 0x7FFFFFFF
                return self.replacements[position:].split(b"\0", 1)[0].decode("utf-8", errors="replace")
        return None


class T5Tokenizer:
    """Unigram model over normalised text in which "▁" stands for a space.

    pieces: (piece, log-probability) in the order of their ids; charsmap: the bytes of a `CharacterMap` (b"": none);
    special: token -> id, cut out of the text as it is; by default the pieces named like T5's. `<pad>`, `</s>` and `<unk>`
    have the ids the pieces give them. ValueError if one is missing or the map is damaged.

    With the official files: encode("a photo of 北京") == [3, 9, 1202, 13, 3, 2]
    """

    def __init__(self, pieces: list[tuple[str, float]], charsmap: bytes = b"", max_length: int = 512,
                 special: dict[str, int] | None = None):
        self.pieces = {piece: (number, score) for number, (piece, score) in enumerate(pieces)}
        missing = [token for token in ("<pad>", "</s>", "<unk>") if token not in self.pieces]
        if missing:
            raise ValueError(f"T5's vocabulary of {len(pieces)} pieces lacks {missing}")
        if special is None:
            special = {piece: number for number, (piece, _) in enumerate(pieces) if SPECIAL.fullmatch(piece)}
        self.pad, self.end, self.unknown = (self.pieces[token][0] for token in ("<pad>", "</s>", "<unk>"))
        self.special, self.max_length = special, max_length
        longest_first = map(re.escape, sorted(special, key=len, reverse=True))
        self.special_pattern = re.compile(f"({'|'.join(longest_first) or '(?!)'})")
        self.map_characters = CharacterMap(charsmap)
        self.longest = max(map(len, self.pieces))
        self.unknown_score = min(score for _, score in pieces) - UNKNOWN_PENALTY

    @classmethod
    def from_folder(cls, folder) -> "T5Tokenizer":
        """Reads tokenizer.json or, where there is none, spiece.model; and tokenizer_config.json where there is one."""
        folder = Path(folder)
        if (folder / "tokenizer.json").exists():
            pieces, charsmap, special = read_tokenizer_json(folder / "tokenizer.json")
        elif (folder / "spiece.model").exists():
            pieces, charsmap, special = read_spiece_model(folder / "spiece.model")
        else:
            raise FileNotFoundError(f"{folder} has neither tokenizer.json nor spiece.model, expected one of T5's tokenizer")
        return cls(pieces, charsmap, read_max_length(folder, default=512), special)

    def __call__(self, texts: list[str], length: int | None = None) -> torch.Tensor:
        """Pieces, `</s>`, padded with `<pad>`: (B, length)."""
        return frame(self.encode, texts, self.max_length if length is None else length, [], self.end, self.pad)

    def encode(self, text: str) -> list[int]:
        """The pieces of the text alone, without `</s>`.

        Note: special tokens typed in the text are honoured, and only the very start of a text gets a "▁" put in front.
        """
        check_text(text)
        ids = []
        for i, part in enumerate(self.special_pattern.split(text)):  # ordinary, special, ordinary, ...
            if i % 2:
                ids.append(self.special[part])
                continue
            part = self.normalise(part)
            if i == 0 and part and part[0] != "▁":
                part = "▁" + part
            for word in re.findall("▁[^▁]*|[^▁]+", part):
                ids += self.cut(word)
        return ids

    def normalise(self, text: str) -> str:
        """Map characters, drop spaces on the right, turn runs of spaces into "▁": "a  ﬁne day " -> "a▁fine▁day"."""
        return re.sub(" +", "▁", self.map_characters(text).rstrip(SPACE))

    @remember
    def cut(self, word: str) -> list[int]:
        """Viterbi: the most probable way to cut a word into pieces.

        best[end] = max over the pieces word[start:end] of best[start] + log p(piece)

        Note: of equal scores the earlier start wins. A character that is no piece is unknown; neighbours make one <unk>.
        """
        best = [0.0] + [-np.inf] * len(word)
        last = [(0, self.unknown)] * len(best)  # start and id of the last piece of the best way to reach each end
        for start in range(len(word)):
            for end in range(start + 1, min(start + self.longest, len(word)) + 1):
                number, score = self.pieces.get(word[start:end], (None, 0.0))
                if number is None and end == start + 1:
                    number, score = self.unknown, self.unknown_score
                if number is not None and best[start] + score > best[end]:
                    best[end], last[end] = best[start] + score, (start, number)
        ids, end = [], len(word)
        while end > 0:
            end, number = last[end]
            if [number] != ids[-1:] or number != self.unknown:
                ids.append(number)
        return ids[::-1]


# --------------------------------------------------------------------------------------------------------------- files


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found, expected a tokenizer in the Hugging Face layout")
    return path.read_bytes()


def read_json(path: Path) -> dict:
    try:
        return dict(json.loads(read_bytes(path)).items())
    except (AttributeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, expected a JSON object ({error})") from None


def read_config(folder: Path) -> dict:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.exists() else {}


def read_max_length(folder: Path, default: int) -> int:
    """Note: transformers writes 1e30 for "no limit"."""
    length = read_config(folder).get("model_max_length")
    return length if isinstance(length, int) and 2 <= length < 10**6 else default


def read_tokenizer_json(path: Path) -> tuple[list[tuple[str, float]], bytes, dict[str, int]]:
    """The pieces, the character map and the special tokens of a tokenizer.json with a unigram model."""
    data = read_json(path)
    try:
        if data["model"]["type"] != "Unigram":
            raise ValueError(f"its model is {data['model']['type']!r}")
        pieces = [(str(piece), float(score)) for piece, score in data["model"]["vocab"]]
        steps = data["normalizer"] or {}
        maps = [step.get("precompiled_charsmap") for step in steps.get("normalizers", [steps])]
        special = {token["content"]: int(token["id"]) for token in data["added_tokens"] if token["content"]}
        return pieces, base64.b64decode("".join(filter(None, maps))), special
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer of T5, expected a Unigram model ({error})") from None


def read_spiece_model(path: Path) -> tuple[list[tuple[str, float]], bytes, dict[str, int]]:
    """The same from a SentencePiece model: a protobuf message of the fields 1: a piece (1: text, 2: score, 3: kind),
    2: training (3: model type), 3: normaliser (2: character map).

    SentencePiece knows no <extra_id_N>; T5 appends them in falling order. How many is said in tokenizer_config.json;
    where there is none: the official 100 after the official 32,000 pieces, else 0.
    """
    pieces, charsmap, special = [], b"", {}
    config = read_config(path.parent)
    try:
        for field, message in protobuf_fields(read_bytes(path)):
            values = dict(protobuf_fields(message)) if field in (1, 2, 3) else {}
            if field == 1:
                if values.get(3, 1) in (2, 3, 4):  # unknown, control, user defined
                    special[values[1].decode("utf-8")] = len(pieces)
                pieces.append((values[1].decode("utf-8"), struct.unpack("<f", values.get(2, bytes(4)))[0]))
            elif field == 2 and values.get(3, 1) != 1:
                raise ValueError("its model type is not unigram")
            elif field == 3:
                charsmap = values.get(2, b"")
        named = len(set(re.findall(r"<extra_id_\d+>", json.dumps(config))))
        extra = max(named, config.get("extra_ids") or 0) if config else 100 * (len(pieces) == 32_000)
        for i in reversed(range(extra * ("<extra_id_0>" not in dict(pieces)))):
            special[f"<extra_id_{i}>"] = len(pieces)
            pieces.append((f"<extra_id_{i}>", 0.0))
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is damaged, expected a SentencePiece unigram model ({error})") from None
    return pieces, charsmap, special


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an int for integers of variable length, bytes for all else.

    >>> list(protobuf_fields(b"\\x08\\x96\\x01" b"\\x12\\x02hi"))
    [(1, 150), (2, b'hi')]
    """
    position = 0

    def integer() -> int:  # seven bits a byte, the lowest first; bit 7 says that there is more
        nonlocal position
        value = 0
        for shift in range(0, 64, 7):
            position += 1
            value |= (message[position - 1] & 127) << shift
            if message[position - 1] < 128:
                break
        return value

    while position < len(message):
        number, kind = divmod(integer(), 8)
        size = integer() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        if kind == 0:
            yield number, size
        elif position + size <= len(message):
            yield number, message[position : position + size]
            position += size
        else:
            raise ValueError("it is cut off")
