"""Tokenizers -> their files, which the tokenizers library and transformers read too."""

import base64
import json
from dataclasses import asdict
from pathlib import Path

from ..files import atomic_write
from .added_tokens import AddedToken
from .bpe import END, START, CLIPTokenizer
from .unigram import T5Tokenizer


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        partial.write_text(text, "utf-8")


def write_json(path: Path, content: dict) -> None:
    write(path, json.dumps(content, ensure_ascii=False, indent=1))


def added_tokens_json(tokens: list[AddedToken]) -> dict[str, dict]:
    """The added tokens as `added_tokens_decoder` of a tokenizer_config.json."""
    result = {}
    for token in sorted(tokens, key=lambda token: token.id):
        values = asdict(token)
        result[str(values.pop("id"))] = values | {"special": False}
    return result


def write_clip_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """`vocab.json`, `merges.txt` and `tokenizer_config.json`."""
    added = {token.content for token in tokenizer.added} - {START, END}
    vocab = {symbol: number for symbol, number in tokenizer.vocab.items() if symbol not in added}
    merges = sorted(tokenizer.ranks, key=tokenizer.ranks.get)
    ids = {number: symbol for symbol, number in tokenizer.vocab.items()}
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    write(folder / "merges.txt", "\n".join(lines) + "\n")
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.max_length,
        "bos_token": START, "eos_token": END, "unk_token": END, "pad_token": ids[tokenizer.pad],
        "added_tokens_decoder": added_tokens_json(tokenizer.added)})


def write_t5_tokenizer(folder: Path, tokenizer: T5Tokenizer) -> None:
    """`tokenizer.json` and `tokenizer_config.json`."""
    pieces = [[piece, score] for piece, (_, score) in tokenizer.pieces.items()]
    metaspace = {"type": "Metaspace", "replacement": "▁", "split": True,
                 "prepend_scheme": "always" if tokenizer.prepend_always else "first"}
    steps = []
    if tokenizer.charsmap:
        charsmap = base64.b64encode(tokenizer.charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    cut = metaspace
    if tokenizer.prepend_always:
        cut = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]}
    else:
        steps.append({"type": "Strip", "strip_left": False, "strip_right": True})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"})
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    sequence = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [asdict(token) | {"special": not token.normalized}
                         for token in sorted(tokenizer.added, key=lambda token: token.id)],
        "normalizer": {"type": "Sequence", "normalizers": steps} if steps else None,
        "pre_tokenizer": cut, "decoder": metaspace,
        "post_processor": {
            "type": "TemplateProcessing", "single": [sequence[0], end],
            "pair": [sequence[0], end, sequence[1], end],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [tokenizer.end], "tokens": ["</s>"]}}},
        "model": {"type": "Unigram", "unk_id": tokenizer.unknown, "vocab": pieces,
                  "byte_fallback": False}})
    ids = {number: piece for piece, (number, _) in tokenizer.pieces.items()}
    ids |= {number: content for content, number in tokenizer.special.items()}
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "T5TokenizerFast", "model_max_length": tokenizer.max_length,
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": ids[tokenizer.pad],
        "extra_ids": 0, "additional_special_tokens": []})
