"""Tokenizers that several files of tests use."""

import random

import pytest
from tokenizer_texts import OFFICIAL, WORDS, clip_pipeline
from tokenizers import models, pre_tokenizers, trainers

from miniflux.tokenizers import CLIPTokenizer, T5Tokenizer
from miniflux.tokenizers.bpe import END, START


@pytest.fixture(scope="session")
def official_clip():
    return CLIPTokenizer.from_folder(OFFICIAL / "tokenizer")


@pytest.fixture(scope="session")
def official_t5():
    return T5Tokenizer.from_folder(OFFICIAL / "tokenizer_2")


@pytest.fixture(scope="session")
def small_clip_folder(tmp_path_factory):
    """A vocabulary of 600 symbols, learned here.

    Most bytes have no form with `</w>`: they are unknown at the end of a word."""
    folder = tmp_path_factory.mktemp("clip")
    reference = clip_pipeline(models.BPE(unk_token=END, end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    reference.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    reference.model.save(str(folder))
    return folder


@pytest.fixture(scope="session")
def small_t5_folder(tmp_path_factory):
    """A SentencePiece model of some 200 pieces, learned here."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("t5")
    sentences = [" ".join(random.Random(i).choices(WORDS, k=12)) for i in range(500)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_prefix=str(folder / "spiece"),
        vocab_size=300,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        character_coverage=1.0,
        minloglevel=2,
        num_threads=1,
    )
    return folder
