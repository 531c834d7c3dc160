"""Learning a change of a network's weights instead of new ones (LoRA, Hu et al. 2021,
arXiv:2106.09685).

    W' = W + B A            only A (rank, in) and B (out, rank) learn; B begins at zero
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from ...adapters.lora_saving import save_lora
from .data import BATCH
from .loop import train, write_sheet

RANK = 32                                # of the factors while they learn
KEPT = 24                                # of the factors in the file
SHOWN = 16                               # images on a sample sheet

Show = Callable[[], tuple[list, list[str]]]             # () -> (images, captions) for a sheet
Write = Callable[[Path, dict[str, tuple[Tensor, Tensor]]], None]


def learnt(weights: dict[str, Tensor], names: Iterable[str]) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors A and B of each layer, in float32, from the weights of the network."""
    return {name: (weights[f"{name}.A"].float(), weights[f"{name}.B"].float()) for name in names}


def reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (rank, in) and (out, rank) whose product is the nearest to B A of that rank
    (Eckart and Young 1936)."""
    U, s, V = torch.linalg.svd(B @ A, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def write_lora(path: Path, factors: dict[str, tuple[Tensor, Tensor]]) -> None:
    """The learnt factors, reduced in rank, under the names of BFL's Control LoRAs, in bfloat16."""
    save_lora(path, {name: reduced(A, B, KEPT) for name, (A, B) in factors.items()})


def train_lora(folder: Path, net: nn.Module, loras: Iterable[str],
               loss: Callable[[torch.Generator], Tensor], show: Show, *, steps: int | None,
               minutes: float | None, lr: float, seed: int, file: str = "lora.safetensors",
               write: Write = write_lora) -> None:
    """Learn the LoRAs on these layers of a network. Writes the LoRA and a sheet of what `show()`
    returns into the folder, both of the averaged weights."""

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        now = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(ema)
        images, captions = show()
        net.load_state_dict(now)
        write(folder / file, learnt(ema, loras))
        return write_sheet(folder, step, images, captions)

    train(net, loss, folder, lr=lr, batch=BATCH, steps=steps, minutes=minutes, seed=seed,
          on_save=on_save)


def side_by_side(given: list, painted: list, captions: list[str]) -> tuple[list, list[str]]:
    """Each image after the one that it was made from, for a sheet."""
    images, texts = [], []
    for before, after, caption in zip(given, painted, captions):
        images += [before, after]
        texts += ["", caption]
    return images, texts
