"""Stage 2: the transformer and both text encoders learn to generate, by flow matching.

    x_t = (1 - t) z + t ε,    loss = ‖v(x_t, t, caption) - (ε - z)‖²      t logit-normal, ε normal

Rectified flow (Liu et al. 2022, arXiv:2209.03003) with the time distribution of Esser et al. 2024
(arXiv:2403.03206). One caption in ten is dropped, so that the network also learns the velocity
without a prompt. The guidance is 1, which changes nothing yet: `guidance.py` teaches that.
"""

import random
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...flux import Flux, FluxConfig
from ...generate import generate
from ...networks.autoencoder import Autoencoder
from ...networks.clip import CLIPConfig, CLIPText
from ...networks.mmdit import MMDiT, MMDiTConfig, Modulation
from ...networks.t5 import T5, T5Config
from ...sampling import Velocity, flow_matching_loss
from ...tokenizers import CLIPTokenizer, T5Tokenizer
from ..world.grounds import IMAGE_SIZE
from ..world.rendering import render
from ..world.scenes import sample_scene
from ..world.vocabulary import MAX_TOKENS
from .data import BATCH, CHUNK, encode_images, to_columns
from .loop import train, write_sheet
from .precision import training_mode
from .velocity import noise_and_times, velocity

MMDIT = MMDiTConfig(vec_in_dim=128, context_in_dim=128, hidden_size=192, num_heads=3, depth=2,
                    depth_single_blocks=5, axes_dim=(8, 28, 28))
CLIP = CLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2,
                  num_attention_heads=2, vocab_size=1214, max_position_embeddings=MAX_TOKENS)
T5_SIZES = T5Config(d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2, vocab_size=512)
LEARNING_RATE = 5e-3
DROPOUT = 0.1                            # the share of captions that are dropped
EPOCHS = 16                              # passes over the scenes before others take their place
LENGTHS = 16, 20, 24, MAX_TOKENS         # to which the captions of a batch are padded
PROMPTS = [sample_scene(random.Random(i), held_out=True).caption for i in range(24)]


class Parts(NamedTuple):
    """The parts of a model between which the transformer is trained."""

    autoencoder: Autoencoder
    clip_tokenizer: CLIPTokenizer
    t5_tokenizer: T5Tokenizer


class JointModel(nn.Module):
    """The three networks that are trained together: token ids and a state in, a velocity out."""

    def __init__(self, mmdit: MMDiTConfig = MMDIT, clip: CLIPConfig = CLIP,
                 t5: T5Config = T5_SIZES):
        super().__init__()
        self.mmdit = MMDiT(mmdit)
        self.clip = CLIPText(clip)
        self.t5 = T5(t5)
        initialise(self.mmdit)

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, L) each -> txt (B, L, 128) and pooled (B, 128)."""
        return self.t5(t5_ids), self.clip(clip_ids)

    def velocity(self, clip_ids: Tensor, t5_ids: Tensor, guidance: float | Tensor) -> Velocity:
        return velocity(self.mmdit, *self.encode(clip_ids, t5_ids), guidance)


def initialise(mmdit: MMDiT) -> None:
    """Every block starts as the identity: its modulation, and so its gates, are zero (adaLN-Zero,
    Peebles & Xie 2022)."""
    for module in mmdit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in mmdit.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.lin.weight)
    final = mmdit.final_layer
    for layer in (final.linear, final.adaLN_modulation[1], mmdit.guidance_in.out_layer):
        nn.init.zeros_(layer.weight)


def compile_blocks(mmdit: MMDiT) -> None:
    """Compile the blocks one by one, in place: equal ones are compiled once."""
    for block in (*mmdit.double_blocks, *mmdit.single_blocks):
        block.compile()


def piece_ids(tokenizer: T5Tokenizer) -> dict[str, int]:
    return {piece: number for piece, (number, _) in tokenizer.pieces.items()}


def transfer_weights(flux: Flux, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer
                     ) -> dict[str, Tensor]:
    """The weights of a `JointModel` that begins as `flux`, with other vocabularies: each piece that
    is in both keeps its vector."""
    if flux.mmdit.config != MMDIT:
        raise ValueError(f"the model {flux.config.name} has another transformer than the one that "
                         "is trained: start with tiny, or a folder of this command's")
    model = JointModel()
    model.mmdit.load_state_dict(flux.mmdit.state_dict())
    tables = (
        (model.clip, flux.clip, "text_model.embeddings.token_embedding.weight",
         clip_tokenizer.vocab, flux.clip_tokenizer.vocab),
        (model.t5, flux.t5, "shared.weight",
         piece_ids(t5_tokenizer), piece_ids(flux.t5_tokenizer)))
    for network, known, key, pieces, known_pieces in tables:
        state = known.state_dict()
        table = network.state_dict()[key].clone()
        for piece in pieces.keys() & known_pieces.keys():
            table[pieces[piece]] = state[key][known_pieces[piece]]
        network.load_state_dict(state | {key: table})
    return model.state_dict()


class Captions:
    """Token ids of many captions; batches of them have one length. The last one is empty."""

    def __init__(self, captions: list[str], clip: CLIPTokenizer, t5: T5Tokenizer):
        captions = [*captions, ""]
        self.clip_ids = clip(captions, MAX_TOKENS)                              # (n + 1, 32)
        self.t5_ids = t5(captions, MAX_TOKENS)                                  # (n + 1, 32)
        padding = int(self.t5_ids[-1, -1])
        end = int(self.clip_ids[-1, -1])
        used = torch.maximum((self.t5_ids != padding).sum(1),
                             (self.clip_ids != end).sum(1) + 1)[:-1]            # (n,)
        self.by_length = used.argsort(stable=True)
        self.fitting = [int((used <= length).sum()) for length in LENGTHS]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """n random captions that fit into a random length: their numbers (n,), and the ids for CLIP
        and T5 (n, length), in which a few captions are dropped."""
        choices = [i for i, fitting in enumerate(self.fitting) if fitting]
        choice = choices[int(torch.randint(len(choices), (), generator=generator))]
        among = torch.randint(self.fitting[choice], (n,), generator=generator)
        index = self.by_length[among]
        dropped = torch.rand(n, generator=generator) < DROPOUT
        caption = torch.where(dropped, len(self.clip_ids) - 1, index)
        length = LENGTHS[choice]
        return index, self.clip_ids[caption, :length], self.t5_ids[caption, :length]

    def empty(self, n: int, length: int) -> tuple[Tensor, Tensor]:
        """The ids of n empty captions."""
        return self.clip_ids[-1:, :length].expand(n, -1), self.t5_ids[-1:, :length].expand(n, -1)


@torch.no_grad()
def encode_base(flux: Flux, count: int, seed: int) -> tuple[Tensor, Captions]:
    """`count` scenes: latents (count, 16, 16, 16) in bfloat16, and their captions."""
    rng = random.Random(seed)
    rows, captions = [], []
    for begin in range(0, count, CHUNK):
        scenes = [sample_scene(rng) for _ in range(min(CHUNK, count - begin))]
        rows.append([encode_images(flux, np.stack([render(scene) for scene in scenes]))])
        captions += [scene.caption for scene in scenes]
    latents, = to_columns(rows)
    return latents, Captions(captions, flux.clip_tokenizer, flux.t5_tokenizer)


class RenewedScenes:
    """Encoded scenes for a long run; after every `EPOCHS` passes over them come others.

    `renew(step)` before each step; a run that goes on in the middle has the same scenes then."""

    def __init__(self, flux: Flux, count: int, seed: int):
        self.flux, self.count, self.seed = flux, count, seed
        self.generation = -1

    def renew(self, step: int) -> None:
        generation = step * BATCH // (EPOCHS * self.count)
        if generation != self.generation:
            self.generation = generation
            seed = self.seed + 1000 * generation
            self.latents, self.captions = encode_base(self.flux, self.count, seed)

    def draw(self, generator: torch.Generator, device: torch.device) -> tuple[Tensor, ...]:
        """Latents (B, 16, 16, 16), and the ids of their captions for CLIP and T5 (B, L)."""
        index, clip_ids, t5_ids = self.captions.draw(BATCH, generator)
        z = self.latents[index].to(device).float()
        return z, clip_ids.to(device), t5_ids.to(device)


def bundle(model: JointModel, parts: Parts, name: str) -> Flux:
    """The model as `generate` takes it."""
    config = FluxConfig(name=name, size=IMAGE_SIZE, max_text_tokens=MAX_TOKENS)
    return Flux(parts.clip_tokenizer, parts.t5_tokenizer, model.clip, model.t5, model.mmdit,
                parts.autoencoder, config)


def run(folder: Path, parts: Parts, device: torch.device, scenes: int, *, steps: int | None,
        minutes: float | None, start: Flux | None = None, compiled: bool = False) -> None:
    """Train the base model, with the weights of `start` first if it is given.

    compiled: run the transformer's blocks through torch.compile, which needs a C++ compiler."""
    torch.manual_seed(0)
    model = JointModel().to(device)
    if start is not None:
        model.load_state_dict(transfer_weights(start, parts.clip_tokenizer, parts.t5_tokenizer))
    if compiled:
        compile_blocks(model.mmdit)
    data = RenewedScenes(bundle(model, parts, folder.name), scenes, seed=10)

    def loss(generator: torch.Generator) -> Tensor:
        z, *ids = data.draw(generator, device)
        eps, t = noise_and_times(z, generator)
        with training_mode(device):
            v = model.velocity(*ids, guidance=1.0)
            return flow_matching_loss(v, z, eps, t)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = JointModel().to(device)
        averaged.load_state_dict(ema)
        images = generate(bundle(averaged, parts, folder.name), PROMPTS, steps=20, guidance=1.0,
                          true_cfg=3.5, negative_prompt="", progress=False)
        return write_sheet(folder, step, images, PROMPTS)

    train(model, loss, folder, lr=LEARNING_RATE, batch=BATCH, steps=steps, minutes=minutes, seed=1,
          before_step=data.renew, on_save=on_save)
