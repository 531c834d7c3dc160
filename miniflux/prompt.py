"""Text -> conditioning: the prompt as the transformer reads it.

    txt (B, L, context_in_dim)    one vector a token, from T5: the text stream
    pooled (B, vec_in_dim)        one vector a prompt, from CLIP: joins the time embedding
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .checkpoints.formats import read_safetensors
from .checks import quote, to_number
from .files import atomic_write
from .flux import Flux
from .word_list import warn_of_unknown_words

log = logging.getLogger("miniflux")


@dataclass(frozen=True)
class Prompt:
    """Encoded text of B prompts; accepted wherever a prompt is."""

    txt: Tensor
    pooled: Tensor

    def __post_init__(self):
        if self.txt.ndim != 3 or self.pooled.ndim != 2 or len(self.txt) != len(self.pooled):
            raise ValueError("a Prompt has txt (B, L, width) and pooled (B, width), "
                             f"got {list(self.txt.shape)} and {list(self.pooled.shape)}")

    def __len__(self) -> int:
        return len(self.pooled)

    def save(self, path: str | os.PathLike) -> None:
        """Keep it in a safetensors file, so that the text encoders are not needed again."""
        path = Path(path)
        if not path.parent.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: its folder does not exist")
        with atomic_write(path) as partial:
            save_file({"txt": self.txt.contiguous(), "pooled": self.pooled.contiguous()}, partial)

    @staticmethod
    def load(path: str | os.PathLike) -> "Prompt":
        """One that was saved. Raises FileNotFoundError, or ValueError for another file."""
        tensors = read_safetensors(path)
        if "vec" in tensors:                                # its name in files of version 0.1
            tensors["pooled"] = tensors.pop("vec")
        are_floats = all(tensor.is_floating_point() for tensor in tensors.values())
        if set(tensors) != {"txt", "pooled"} or not are_floats:
            raise ValueError(f"{path} holds no encoded prompt: expected txt and pooled, "
                             "as Prompt.save writes them")
        # Note: copies, as the file may be replaced or deleted while the prompt is in use.
        return Prompt(tensors["txt"].clone(), tensors["pooled"].clone())


PromptLike = str | list[str] | Prompt


def check_prompt(name: str, prompt: PromptLike) -> None:
    """Raises ValueError for what is no prompt."""
    is_list = isinstance(prompt, (list, tuple)) and len(prompt) > 0
    is_list = is_list and all(isinstance(text, str) for text in prompt)
    if not is_list and not isinstance(prompt, (str, Prompt)):
        raise ValueError(f"{name} must be a string, a list of strings or a Prompt, "
                         f"got {type(prompt).__name__} {quote(prompt)}")


@torch.no_grad()
def encode_prompt(flux: Flux, prompt: PromptLike, max_text_tokens: int | None = None) -> Prompt:
    """Encode one prompt or several.

    prompt: a string or a list of strings; a `Prompt` only changes its device and dtype.
    max_text_tokens: T5 tokens to pad to (default: as many as the model was made for). A longer
        prompt is cut, with a warning in the log.

    Returns the `Prompt` on the transformer's device, in its dtype.
    Raises ValueError for a prompt that is not text, or for more tokens than the model can read."""
    length = text_length(flux, max_text_tokens)
    if isinstance(prompt, Prompt):
        return to_model(prompt, flux)
    check_prompt("the prompt", prompt)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if None in (flux.clip_tokenizer, flux.t5_tokenizer, flux.clip, flux.t5):
        raise ValueError("this model was loaded without its text encoders: pass an encoded Prompt, "
                         "or add text_encoder/, text_encoder_2/, tokenizer/ and tokenizer_2/ to "
                         "its folder")
    for text in dict.fromkeys(texts):
        warn_of_cut(flux, text, length)
        warn_of_unknown_words(flux, text)
    device = flux.t5.shared.weight.device
    # Note: padding is part of the text stream: T5 and the transformer attend to it.
    txt = flux.t5(flux.t5_tokenizer(texts, length).to(device))      # (B, L, context_in_dim)
    pooled = flux.clip(flux.clip_tokenizer(texts).to(device))       # (B, vec_in_dim)
    return to_model(Prompt(txt, pooled), flux)


def text_length(flux: Flux, max_text_tokens: int | None) -> int:
    """The number of T5 tokens to pad to: as asked for, else as many as the model was made for."""
    limit = flux.config.max_text_tokens
    length = limit if max_text_tokens is None else to_number(max_text_tokens, whole=True)
    if length is None or not 1 <= length <= limit:
        raise ValueError(f"max_text_tokens is {quote(max_text_tokens)}: "
                         f"this model reads 1 to {limit} tokens")
    return length


def warn_of_cut(flux: Flux, text: str, length: int) -> None:
    """Logs what the text encoders will not read of a text, if it is too long for them."""
    lost = cut_off(text, flux.t5_tokenizer.encode, length - 1)      # one token marks the end
    if lost:
        log.warning("the prompt is longer than the %d tokens that this model reads: cut off is %r",
                    length, shorten(lost))
        return
    room = flux.clip_tokenizer.max_length - 2               # two mark the start and the end
    lost = cut_off(text, flux.clip_tokenizer.encode, room)
    if lost:
        log.info("CLIP, which sums the prompt up in one vector, reads only %d tokens of it, "
                 "without %r; T5 reads all of it", room, shorten(lost))


def cut_off(text: str, encode: Callable[[str], list[int]], room: int) -> str:
    """The end of a text that does not fit into so many tokens; "" if all of it fits."""
    if len(encode(text)) <= room:
        return ""
    # The most characters that fit, by bisection: more of them need no fewer tokens.
    fit, too_many = 0, len(text)
    while too_many - fit > 1:
        middle = (fit + too_many) // 2
        if len(encode(text[:middle])) <= room:
            fit = middle
        else:
            too_many = middle
    return text[fit:].strip()


def shorten(text: str, limit: int = 100) -> str:
    return text if len(text) <= limit else f"{text[:limit // 2]} ... {text[-limit // 2:]}"


def to_model(prompt: Prompt, flux: Flux) -> Prompt:
    """The prompt on the transformer's device, in its dtype."""
    weight = flux.mmdit.img_in.weight
    have = prompt.txt.shape[-1], prompt.pooled.shape[-1]
    need = flux.mmdit.config.context_in_dim, flux.mmdit.config.vec_in_dim
    if have != need:
        raise ValueError("the Prompt has the widths {} and {}, this model needs {} and {}".format(
            *have, *need))
    return Prompt(prompt.txt.to(weight), prompt.pooled.to(weight))


def repeat_prompt(prompt: Prompt, n: int) -> Prompt:
    """n copies of each prompt, side by side: a, b -> a, a, b, b."""
    return Prompt(prompt.txt.repeat_interleave(n, dim=0), prompt.pooled.repeat_interleave(n, dim=0))


def repeat_negative(negative: Prompt, count: int) -> Prompt:
    """A negative prompt for each of `count` images.

    negative: one for all, or as many as divide them evenly."""
    if count % len(negative):
        raise ValueError(f"there are {len(negative)} negative prompts for {count} images: "
                         "give one, or one for each prompt")
    return repeat_prompt(negative, count // len(negative))
