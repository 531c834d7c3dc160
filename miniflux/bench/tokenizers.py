"""The table `tokenizers`: the time that a prompt of 512 tokens takes."""

from collections.abc import Callable, Iterator

from ..loading import load
from .measuring import PROMPT, medians


def each_text(tokenizer: Callable, texts: Iterator[str]) -> Callable[[], object]:
    return lambda: tokenizer([next(texts)], 512)


def bench_tokenizers(source: str) -> None:
    flux = load(source, device="cpu")
    words = [f"{word}{i}" for i, word in enumerate(PROMPT.split() * 40)]
    print(f"\n{'a prompt of 512 tokens':36} {'miniflux':>12}")
    for name, tokenizer in (("CLIP", flux.clip_tokenizer), ("T5", flux.t5_tokenizer)):
        # Note: a new text for each call, since the tokenizers cache words.
        texts = iter([" ".join(words)[: 1500 + i] for i in range(64)])
        (seconds,) = medians(each_text(tokenizer, texts), runs=20)
        print(f"{name:36} {1e3 * seconds:9.2f} ms")
