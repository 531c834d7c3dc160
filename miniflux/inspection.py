"""Looking inside: what each block of the transformer computes in one pass.

    states = []
    generate(flux, "a fox", seed=7, on_step=lambda step, t, x: states.append((t, x)))
    t, x = states[14]
    with watch(flux.mmdit) as seen:
        v = velocity(x, t)                              # the same bits as without `watch`
    seen[0].attention                                   # (B, H, S, S): each row sums to one
    seen[0].modulation["img_mod"]                       # shift, scale, gate, shift, scale, gate

`watch` only listens: it puts forward hooks on the blocks and a wrapper around attention, and
removes both at the end, also after an error. Outside of it nothing is stored and nothing is slower.
To study a whole run, keep its states x and repeat the steps that interest you, as above: this costs
no memory while the image is sampled.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .flux import Flux
from .networks.attention import attention_through, norm_rope
from .networks.mmdit import MMDiT, ModulationOut

BLOCKS = "double_blocks", "single_blocks"
MODULATION = "img_mod", "txt_mod", "modulation"


@dataclass
class Seen:
    """What one block computed. S = L + N tokens, the text first; H heads of D channels."""

    name: str                               # "double_blocks.0", ..., "single_blocks.4"
    L: int                                  # the number of text tokens
    attention: Tensor | None = None         # (B, H, S, S): row = query, column = key
    values: Tensor | None = None            # (B, H, S, D)
    output: Tensor | None = None            # (B, S, H·D): what attention returned
    modulation: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)  # each (B, 1, hidden)
    hidden: Tensor | None = None            # (B, S, hidden): the tokens after the block

    def image_to_text(self) -> Tensor:
        """How much each image token attends to each text token: (B, H, N, L)."""
        return self.attention[:, :, self.L:, :self.L]

    def text_to_image(self) -> Tensor:
        """How much each text token attends to each image token: (B, H, L, N)."""
        return self.attention[:, :, :self.L, self.L:]


@contextmanager
def watch(mmdit: MMDiT, blocks: Collection[str] | None = None) -> Iterator[list[Seen]]:
    """Within it, each pass of the transformer appends one `Seen` per block to the list.

    mmdit: the transformer of any model, also with LoRAs, quantized, or with precomputed modulation.
    blocks: the names of the blocks to keep, such as {"double_blocks.1"}; by default all. The large
    models need this: 4096 image tokens make attention maps of 2 GB per block.

    The order is that of the computation: double blocks, then single blocks; a second pass appends
    to the same list. Raises ValueError for a block that the transformer does not have."""
    modules: dict[str, nn.Module] = {}
    for kind in BLOCKS:
        modules |= {f"{kind}.{i}": block for i, block in enumerate(getattr(mmdit, kind))}
    unknown = set(blocks or ()) - set(modules)
    if unknown:
        raise ValueError(f"there is no block {sorted(unknown)[0]!r}: expected names from "
                         f"double_blocks.0 to {list(modules)[-1]}")
    seen: list[Seen] = []
    current: list[Seen] = []                # the block that runs now, if it is one to keep
    text_length: list[int] = [0]

    def count_text(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        text_length[0] = output.shape[1]

    def begin(name: str) -> Callable:
        def hook(block: nn.Module, inputs: tuple) -> None:
            current[:] = [Seen(name, text_length[0])]
        return hook

    def keep_modulation(name: str) -> Callable:
        def hook(layer: nn.Module, inputs: tuple, output: tuple[ModulationOut, ...]) -> None:
            vectors = [vector for sublayer in output for vector in sublayer]
            current[0].modulation[name] = tuple(vectors)
        return hook

    def end(block: nn.Module, inputs: tuple, output: Tensor | tuple[Tensor, Tensor]) -> None:
        # A double block returns (img, txt), a single block the joint sequence.
        current[0].hidden = output if isinstance(output, Tensor) else torch.cat(output[::-1], dim=1)
        seen.append(current.pop())

    def record(attention: Callable, qkv: Tensor, pe: Tensor, img_scale: Tensor,
               txt_scale: Tensor | None, L: int) -> Tensor:
        if not current:
            return attention(qkv, pe, img_scale, txt_scale, L)
        # Note: before the call, which may overwrite qkv.
        q, k, v = norm_rope(qkv, pe, img_scale, img_scale if txt_scale is None else txt_scale, L)
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5                   # (B, H, S, S)
        current[0].attention = scores.softmax(dim=-1)
        current[0].values = v.clone()
        output = attention(qkv, pe, img_scale, txt_scale, L)                    # (B, S, H·D)
        current[0].output = output.clone()
        return output

    handles = [mmdit.txt_in.register_forward_hook(count_text)]
    for name, block in modules.items():
        if blocks is not None and name not in blocks:
            continue
        handles.append(block.register_forward_pre_hook(begin(name)))
        for part in MODULATION:
            if hasattr(block, part):
                hook = keep_modulation(part)
                handles.append(getattr(block, part).register_forward_hook(hook))
        handles.append(block.register_forward_hook(end))
    try:
        with attention_through(record):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def pieces(flux: Flux, prompt: str, max_text_tokens: int | None = None) -> list[str]:
    """The prompt as the transformer's text tokens, one string per token, padding included.

    >>> pieces(flux, "a fox")[:4]
    ['▁a', '▁fox', '</s>', '<pad>']
    """
    length = max_text_tokens or flux.config.max_text_tokens
    ids = flux.t5_tokenizer([prompt], length)[0].tolist()
    return [flux.t5_tokenizer.id_to_piece[number] for number in ids]


def words(tokens: list[str]) -> dict[str, list[int]]:
    """Word -> the positions of its tokens. A repeated word is numbered: "a", "a (2)".

    >>> words(["▁two", "▁pine", "apple", "s", "</s>", "<pad>", "<pad>"])
    {'two': [0], 'pineapples': [1, 2, 3], '</s>': [4], '<pad>': [5, 6]}
    """
    spans: list[tuple[str, list[int]]] = []
    for i, token in enumerate(tokens):
        special = token in ("</s>", "<pad>")
        if special and spans and spans[-1][0] == token:
            spans[-1][1].append(i)
        elif special or token.startswith("▁") or not spans or spans[-1][0] in ("</s>", "<pad>"):
            spans.append((token.removeprefix("▁"), [i]))
        else:
            word, positions = spans[-1]
            spans[-1] = word + token, [*positions, i]
    found: dict[str, list[int]] = {}
    for word, positions in spans:
        name, count = word, 1
        while name in found:
            count += 1
            name = f"{word} ({count})"
        found[name] = positions
    return found
