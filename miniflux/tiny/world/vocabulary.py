"""Stage 0: the two vocabularies of the tiny FLUX, learnt from captions, in the official files.

CLIP's byte-pair merges are learnt by the `tokenizers` library, T5's unigram pieces by
`sentencepiece`. Both contain every printable ASCII character, so that any prompt can be read, if in
small pieces. Both fold case: "THREE CATS" and "three cats" are the same tokens.
"""

import json
import random
import string
import tempfile
from collections.abc import Iterable
from pathlib import Path

from ...checkpoints.configs import WORD_LIST
from ...checkpoints.saving import write_json
from ...tokenizers.bpe import byte_symbols
from ...tokenizers.files import read_spiece_model
from ...word_list import words_of
from .edits import sample_edit
from .scenes import sample_scene

MAX_TOKENS = 32                          # of a prompt, for both encoders
CLIP_MERGES, T5_PIECES = 700, 900
START, END = "<|startoftext|>", "<|endoftext|>"


def captions(count: int, seed: int) -> list[str]:
    """Of scenes, and one in five the instruction of an edit."""
    rng = random.Random(seed)
    return [sample_edit(rng)[1] if i % 5 == 0 else sample_scene(rng).caption for i in range(count)]


def write_word_list(folder: Path, texts: Iterable[str]) -> None:
    """`words.json`: every word of the captions, so that `generate` can name the words of a prompt
    that the model was not taught."""
    words = {word for text in texts for word in words_of(text)}
    write_json(folder / WORD_LIST, {"words": sorted(words)})


def learn_clip(texts: list[str], folder: Path) -> None:
    """`vocab.json`, `merges.txt` and their configs: 256 bytes, the same at the end of a word, the
    merges, two special tokens."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    learner.normalizer = normalizers.Sequence(
        [normalizers.NFC(), spaces, normalizers.Lowercase()])
    words = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + CLIP_MERGES, end_of_word_suffix="</w>",
        initial_alphabet=sorted(alphabet), show_progress=False))
    merges = json.loads(learner.to_str())["model"]["merges"][:CLIP_MERGES]
    symbols = byte_symbols()
    pieces = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    pieces += ["".join(pair) for pair in merges] + [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {piece: i for i, piece in enumerate(pieces)})
    lines = "".join(f"{a} {b}\n" for a, b in merges)
    (folder / "merges.txt").write_text("#version: 0.2\n" + lines, "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS})


def learn_t5(texts: list[str], folder: Path) -> None:
    """`spiece.model`, and the same pieces with T5's pipeline as `tokenizer.json`."""
    import sentencepiece
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    folder.mkdir(parents=True, exist_ok=True)
    # Note: a piece needs two *different* words that contain it; with a comma each word becomes two.
    words = sorted({word.strip(",") for text in texts for word in text.split()})
    texts = texts + [f"{word}, {word}" for word in words]
    with tempfile.TemporaryDirectory() as scratch:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=f"{scratch}/spiece", vocab_size=T5_PIECES,
            hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
            required_chars="".join(sorted(set(string.printable.strip().lower()))),
            # Note: "_cf" folds case in the file's own character map, so for every library.
            normalization_rule_name="nmt_nfkc_cf")
        (folder / "spiece.model").write_bytes(Path(f"{scratch}/spiece.model").read_bytes())
    pieces, character_map, _ = read_spiece_model(folder / "spiece.model")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([
        normalizers.Precompiled(character_map), normalizers.Strip(left=False, right=True),
        normalizers.Replace(Regex(" {2,}"), "▁")])
    spaces = dict(replacement="▁", prepend_scheme="first")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(**spaces)
    tokenizer.post_processor = processors.TemplateProcessing(
        "$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace(**spaces)
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {
        "tokenizer_class": "T5TokenizerFast", "model_max_length": MAX_TOKENS, "extra_ids": 0,
        "additional_special_tokens": []})


def learn(folder: Path, count: int) -> None:
    """Both vocabularies, into `tokenizer/` and `tokenizer_2/`, and the list of words."""
    texts = captions(count, seed=3)
    learn_clip(texts, folder / "tokenizer")
    learn_t5(texts, folder / "tokenizer_2")
    write_word_list(folder, texts)
