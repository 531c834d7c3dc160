"""Stage 0: the two vocabularies of the tiny FLUX, learnt from captions, in the official files.

CLIP's byte-pair merges are learnt by the `tokenizers` library, T5's unigram pieces by `sentencepiece`. Both know every
printable ASCII character, so that any prompt can be read, if in small pieces.
"""

import json
import random
import string
import tempfile
from pathlib import Path

from ..tokenizers.bpe import byte_symbols
from ..tokenizers.files import read_spiece_model
from .edits import sample_edit
from .scenes import sample_scene

MAX_TOKENS = 32                          # of a prompt, for both encoders
CLIP_MERGES, T5_PIECES = 700, 900
START, END = "<|startoftext|>", "<|endoftext|>"


def captions(count: int, seed: int) -> list[str]:
    """Of scenes, and one in five the instruction of an edit."""
    rng = random.Random(seed)
    return [sample_edit(rng)[1] if i % 5 == 0 else sample_scene(rng).caption for i in range(count)]


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), "utf-8")


def learn_clip(texts: list[str], folder: Path) -> None:
    """`vocab.json`, `merges.txt` and their configs: 256 bytes, the same ending a word, the merges, two special tokens."""
    from tokenizers import (
        Regex,
        Tokenizer,
        models,
        normalizers,
        pre_tokenizers,
        trainers,
    )

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    cut = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    learner.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learner.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=2 * len(alphabet) + CLIP_MERGES, end_of_word_suffix="</w>",
                                                           initial_alphabet=sorted(alphabet), show_progress=False))
    merges = [tuple(pair) for pair in json.loads(learner.to_str())["model"]["merges"]][:CLIP_MERGES]
    symbols = byte_symbols()
    words = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(pair) for pair in merges), START, END]
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), "utf-8")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | {"tokenizer_class": "CLIPTokenizer", "model_max_length": MAX_TOKENS})


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
    # Note: a piece is considered if two *different* words contain it; with a comma each word becomes two.
    words = sorted({word.strip(",") for text in texts for word in text.split()})
    texts = texts + [f"{word}, {word}" for word in words]
    with tempfile.TemporaryDirectory() as scratch:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts), model_prefix=f"{scratch}/spiece", vocab_size=T5_PIECES, hard_vocab_limit=False,
            pad_id=0, eos_id=1, unk_id=2, bos_id=-1, required_chars=string.printable.strip(), minloglevel=2)
        (folder / "spiece.model").write_bytes(Path(f"{scratch}/spiece.model").read_bytes())
    pieces, charsmap, _ = read_spiece_model(folder / "spiece.model")
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), normalizers.Strip(left=False, right=True),
                                                 normalizers.Replace(Regex(" {2,}"), "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json",
               special | {"tokenizer_class": "T5TokenizerFast", "model_max_length": MAX_TOKENS, "extra_ids": 0,
                          "additional_special_tokens": []})


def learn(folder: Path, count: int) -> None:
    """Both vocabularies, into `folder/tokenizer` and `folder/tokenizer_2`."""
    texts = captions(count, seed=3)
    learn_clip(texts, folder / "tokenizer")
    learn_t5(texts, folder / "tokenizer_2")
