"""The files tokenizers are stored in: tokenizer.json, tokenizer_config.json, and SentencePiece's spiece.model.

A spiece.model is a protobuf message; the thirty lines that read one are the last function here.
"""

import base64
import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path


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
