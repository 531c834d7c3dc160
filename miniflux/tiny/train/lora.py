"""Learning a change of a network's weights instead of new ones (LoRA, Hu et al. 2021,
arXiv:2106.09685).

    W' = W + B A            only A (rank, in) and B (out, rank) learn; B begins at zero
"""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from .data import BATCH
from .loop import train, write_sheet

RANK = 32                                # of the factors while they learn
KEPT = 24                                # of the factors in the file
SHOWN = 16                               # images on a sample sheet

Show = Callable[[], tuple[list, list[str]]]             # () -> (images, captions) for a sheet
Write = Callable[[Path, dict[str, "LowRank"], dict[str, Tensor]], None]


class LowRank(nn.Module):
    """A change of a weight: W -> W + B A."""

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        rows, columns = weight.shape
        self.A = nn.Parameter(torch.randn(rank, columns) / columns ** 0.5)
        self.B = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A


def add_factors(net: nn.Module, rank: int = RANK) -> dict[str, LowRank]:
    """Give each linear layer a change to learn, and freeze all else; layer -> its change."""
    net.requires_grad_(False)
    changes = {}
    for name, layer in list(net.named_modules()):
        if isinstance(layer, nn.Linear):
            changes[name] = LowRank(layer.weight, rank)
            register_parametrization(layer, "weight", changes[name])
    return changes


def factor(weights: dict[str, Tensor], name: str, which: str) -> Tensor:
    """The factor "A" or "B" of a layer among learnt weights."""
    return weights[f"{name}.parametrizations.weight.0.{which}"]


def reduced(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (rank, in) and (out, rank) whose product is the nearest to B A of that rank
    (Eckart and Young 1936)."""
    U, s, V = torch.linalg.svd(B @ A, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * V[:rank], U[:, :rank] * root


def write_lora(path: Path, changes: dict[str, LowRank], weights: dict[str, Tensor]) -> None:
    """The learnt factors, reduced in rank, under the names of BFL's Control LoRAs, in bfloat16."""
    factors = {}
    for name in changes:
        A, B = reduced(*(factor(weights, name, which).float() for which in "AB"), KEPT)
        factors |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    write_factors(path, factors)


def write_factors(path: Path, factors: dict[str, Tensor]) -> None:
    partial = path.with_suffix(".part")
    save_file({name: tensor.bfloat16().contiguous() for name, tensor in factors.items()}, partial)
    partial.replace(path)


def train_lora(folder: Path, net: nn.Module, changes: dict[str, LowRank],
               loss: Callable[[torch.Generator], Tensor], show: Show, *, steps: int | None,
               minutes: float | None, lr: float, seed: int, file: str = "lora.safetensors",
               write: Write = write_lora) -> None:
    """Learn the changes of a network's layers. Writes the LoRA and a sheet of what `show()` returns
    into the folder, both of the averaged weights."""

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        now = {name: value.clone() for name, value in net.state_dict().items()}
        net.load_state_dict(ema)
        images, captions = show()
        net.load_state_dict(now)
        write(folder / file, changes, ema)
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
