"""The files that tokenizers are stored in.

    tokenizer.json                   all of it (all that transformers 5 writes)
    vocab.json, merges.txt           CLIP's vocabulary in the older layout
    spiece.model                     T5's, a protobuf message of SentencePiece
    tokenizer_config.json, special_tokens_map.json, added_tokens.json
                                     settings and added tokens

A setting that changes tokens in the references is read, or refused by name with another value than
the one that is built here.
"""

import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from ..files import read_json
from .added_tokens import AddedToken

# With other values the references would give other tokens.
FIXED = {"padding_side": "right", "truncation_side": "right", "split_special_tokens": False}
CLIP_FIXED = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>",
              "unk_token": "<|endoftext|>"}
T5_FIXED = {"eos_token": "</s>", "unk_token": "<unk>"}
READ = ("added_tokens_decoder", "additional_special_tokens", "extra_ids", "extra_special_tokens",
        "model_max_length", "pad_token")
# Keys of tokenizer_config.json on which no token depends, with the reason.
HARMLESS = {
    "add_bos_token": "the start and end are those of the class", "add_eos_token": "the same",
    "add_prefix_space": "not used by these classes",
    "backend": "which code runs it", "tokenizer_class": "its name", "processor_class": "a name",
    "chat_template": "for chats", "response_template": "for chats",
    "chat_control_tokens": "for chats",
    "clean_up_tokenization_spaces": "acts on decoding", "errors": "acts on decoding",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output": "acts on decoding",
    "do_lower_case": "the class lowers the case whatever it is",
    "files_loaded": "a note", "is_local": "a note", "local_files_only": "a note",
    "legacy": "of the class without tokenizer.json", "sp_model_kwargs": "the same",
    "model_input_names": "the names of outputs", "name_or_path": "a note", "verbose": "a note",
    "sep_token": "not used", "cls_token": "not used", "mask_token": "not used",
}


def read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found, "
                                "expected a tokenizer in the Hugging Face layout")
    return path.read_bytes()


def read_settings(folder: Path, fixed: dict[str, object]) -> dict:
    """The settings of a folder, checked."""
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            settings |= read_json(folder / name)
    for key, value in settings.items():
        # Some files give a token with its rules.
        if key.endswith("_token") and isinstance(value, dict):
            settings[key] = value.get("content")
    for key, expected in (FIXED | fixed).items():
        if (found := settings.get(key)) not in (None, expected):
            raise ValueError(f"{folder}: the tokenizer's {key} is {found!r:.60}, "
                             f"expected {expected!r}")
    return settings


def common_settings(settings: dict, max_length: int) -> dict:
    """The arguments that every tokenizer has. Note: transformers writes 1e30 for "no limit"."""
    length = settings.get("model_max_length")
    result = {"max_length": length if type(length) is int and 2 <= length < 10**6 else max_length}
    if isinstance(settings.get("pad_token"), str):
        result["pad"] = settings["pad_token"]
    return result


def read_added_tokens(folder: Path, settings: dict) -> dict[str, AddedToken]:
    """The added tokens of a folder's settings, by their content."""
    tokens: dict[str, AddedToken] = {}
    try:
        if (folder / "added_tokens.json").is_file():
            for content, number in read_json(folder / "added_tokens.json").items():
                tokens[content] = added_token({"content": content}, number)
        for number, token in (settings.get("added_tokens_decoder") or {}).items():
            tokens[token["content"]] = added_token(token, number)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder} has damaged added tokens "
                         f"({type(error).__name__}: {error})") from None
    return tokens


def added_token(token: dict, number: int | str) -> AddedToken:
    """One of a file's added tokens.

    Note: special ones are by default not normalised, others are."""
    if not isinstance(token["content"], str) or not 0 <= int(number) < 10**7:
        raise ValueError(f"{token['content']!r:.60} has the number {number!r:.20}")
    flags = {key: bool(token.get(key, False)) for key in ("single_word", "lstrip", "rstrip")}
    normalized = bool(token.get("normalized", not token.get("special", False)))
    return AddedToken(token["content"], int(number), normalized=normalized, **flags)


def check_padding(data: dict) -> None:
    """Refuses a tokenizer.json that pads or cuts on the left."""
    for key in ("padding", "truncation"):
        side = (data.get(key) or {}).get("direction", "Right")
        if side != "Right":
            raise ValueError(f"its {key} is on the side {side!r:.20}, expected 'Right'")


# --------------------------------------------------------------------------------------------- CLIP


def read_clip_files(folder: Path) -> dict:
    """The arguments of a `CLIPTokenizer`."""
    settings = read_settings(folder, CLIP_FIXED)
    added = read_added_tokens(folder, settings)
    if (folder / "tokenizer.json").is_file():
        vocab, merges, own = read_clip_json(folder / "tokenizer.json")
        added = own | added
    else:
        vocab = read_json(folder / "vocab.json")
        lines = read_bytes(folder / "merges.txt").decode("utf-8", errors="replace").split("\n")
        merges = [tuple(line.split()) for line in lines
                  if line.strip() and not line.startswith("#version")]
        if ({len(pair) for pair in merges} - {2}
                or not all(type(number) is int and number >= 0 for number in vocab.values())):
            raise ValueError(f"{folder} is damaged, "
                             "expected numbers in vocab.json and pairs in merges.txt")
    arguments = common_settings(settings, 77)
    return arguments | {"vocab": vocab, "merges": merges, "added": added.values()}


def read_clip_json(path: Path) -> tuple[dict, list[tuple[str, str]], dict[str, AddedToken]]:
    """The vocabulary, the merges and the added tokens of a tokenizer.json with CLIP's BPE."""
    data = read_json(path)
    try:
        check_padding(data)
        model = data["model"]
        fixed = {"type": "BPE", "end_of_word_suffix": "</w>", "continuing_subword_prefix": "",
                 "dropout": None, "byte_fallback": False, "fuse_unk": False, "ignore_merges": False}
        for key, expected in fixed.items():
            if (found := model.get(key)) not in (None, expected):
                raise ValueError(f"its model's {key} is {found!r:.40}, expected {expected!r}")
        steps = [step["type"] for step in data["normalizer"]["normalizers"]]
        if steps != ["NFC", "Replace", "Lowercase"]:
            raise ValueError(f"its normalizer is {steps!r:.60}, expected NFC, Replace, Lowercase")
        # Note: a merge was one string with a space, and is a pair in newer files.
        merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair)
                  for pair in model["merges"]]
        if any(len(pair) != 2 for pair in merges):
            raise ValueError("a merge is no pair")
        vocab = {str(symbol): int(number) for symbol, number in model["vocab"].items()}
        added = {token["content"]: added_token(token, token["id"])
                 for token in data["added_tokens"]}
        return vocab, merges, added
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer of CLIP ({type(error).__name__}: "
                         f"{str(error):.120})") from None


# ----------------------------------------------------------------------------------------------- T5


def read_t5_files(folder: Path) -> dict:
    """The arguments of a `T5Tokenizer`."""
    settings = read_settings(folder, T5_FIXED)
    arguments = common_settings(settings, 512)
    if (folder / "tokenizer.json").is_file():
        pieces, charsmap, added, prepend_always = read_t5_json(folder / "tokenizer.json")
        arguments["prepend_always"] = prepend_always
    elif (folder / "spiece.model").is_file():
        pieces, charsmap, added = read_spiece_model(folder / "spiece.model")
    else:
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor spiece.model, "
                                "expected one of T5's tokenizer")
    added = {token.content: token for token in added} | read_added_tokens(folder, settings)
    return {"pieces": pieces, "charsmap": charsmap, "added": list(added.values())} | arguments


def read_t5_json(path: Path) -> tuple[list[tuple[str, float]], bytes, list[AddedToken], bool]:
    """The pieces, the character map and the added tokens of a tokenizer.json with a unigram model,
    and whether every word gets a "▁" in front."""
    data = read_json(path)
    try:
        check_padding(data)
        if data["model"]["type"] != "Unigram":
            raise ValueError(f"its model is {data['model']['type']!r}")
        pieces = [(str(piece), float(score)) for piece, score in data["model"]["vocab"]]
        steps = data["normalizer"] or {}
        maps = [step.get("precompiled_charsmap") for step in steps.get("normalizers", [steps])]
        added = [added_token(token, token["id"])
                 for token in data["added_tokens"] if token["content"]]
        cut = data.get("pre_tokenizer") or {}
        schemes = [step.get("prepend_scheme") for step in cut.get("pretokenizers", [cut])]
        return pieces, base64.b64decode("".join(filter(None, maps))), added, "always" in schemes
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no tokenizer of T5, "
                         f"expected a Unigram model ({error})") from None


def read_spiece_model(path: Path) -> tuple[list[tuple[str, float]], bytes, list[AddedToken]]:
    """The same from a SentencePiece model: a protobuf message of the fields

    1: a piece (1: text, 2: score, 3: kind)
    2: training (3: model type)
    3: normaliser (2: character map)

    SentencePiece has no <extra_id_N>; T5 appends them in falling order. Their number is in
    tokenizer_config.json; where there is none: the official 100 after the official 32,000 pieces,
    else 0.
    """
    pieces, charsmap, special = [], b"", {}
    file = path.parent / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    try:
        for field, message in protobuf_fields(read_bytes(path)):
            values = dict(protobuf_fields(message)) if field in (1, 2, 3) else {}
            if field == 1:
                text, score = values[1].decode("utf-8"), values.get(2, bytes(4))
                if values.get(3, 1) in (2, 3, 4):            # unknown, control, user defined
                    special[text] = len(pieces)
                pieces.append((text, struct.unpack("<f", score)[0]))
            elif field == 2 and values.get(3, 1) != 1:
                raise ValueError("its model type is not unigram")
            elif field == 3:
                charsmap = values.get(2, b"")
        named = len(set(re.findall(r"<extra_id_\d+>", json.dumps(config))))
        official = 100 * (len(pieces) == 32_000)
        extra = max(named, config.get("extra_ids") or 0) if config else official
        for i in reversed(range(extra * ("<extra_id_0>" not in dict(pieces)))):
            special[f"<extra_id_{i}>"] = len(pieces)
            pieces.append((f"<extra_id_{i}>", 0.0))
    except (AttributeError, LookupError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is damaged, "
                         f"expected a SentencePiece unigram model ({error})") from None
    return pieces, charsmap, [AddedToken(content, number) for content, number in special.items()]


def protobuf_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(number, value) of each field: an int for integers of variable length, bytes for all else.

    >>> list(protobuf_fields(b"\\x08\\x96\\x01" b"\\x12\\x02hi"))
    [(1, 150), (2, b'hi')]
    """
    position = 0

    def integer() -> int:                # seven bits a byte, the lowest first; bit 7: there is more
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
