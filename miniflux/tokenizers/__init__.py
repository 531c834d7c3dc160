"""From text to token ids: CLIP's byte-pair encoding and T5's unigram model.

FLUX.1 reads a prompt twice. CLIP's tokens become one vector that conditions the whole image; T5's
tokens are the sequence that the transformer attends to. The two tokenizers cut a text into pieces
from two ends:

    CLIP  byte-pair encoding, bottom up: start from single bytes, merge the pair that was learned
          first, repeat.
    T5    unigram model, top down: each piece has a log-probability; of all segmentations of a word
          take the most probable one.

    "Hello,  World's 2024"  ->  CLIP  hello</w> ,</w> world</w> 's</w> 2</w> 0</w> 2</w> 4</w>
                            ->  T5    ▁Hello , ▁World ' s ▁20 24

Both turn `list[str]` into int64 tensors (B, length), with the special tokens and the padding that
the text encoders were trained with, and equal the fast tokenizers of the `tokenizers` library. The
exceptions: code points newer than this Python's Unicode tables, and CLIP's NFC for combining marks
newer than Unicode 9 (the library's tables are older there).

Sources: BPE: Sennrich et al. 2016, arXiv:1508.07909. CLIP: Radford et al. 2021, arXiv:2103.00020.
Unigram: Kudo 2018, arXiv:1804.10959. SentencePiece: Kudo & Richardson 2018, arXiv:1808.06226.
"""

from .bpe import CLIPTokenizer
from .unigram import T5Tokenizer

__all__ = ["CLIPTokenizer", "T5Tokenizer"]
