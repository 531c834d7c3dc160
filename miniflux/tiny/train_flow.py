"""Stages 2 and 3: the transformer and both text encoders learn to paint, by flow matching; then guidance is distilled.

    base:      x_t = (1 - t) z + t ε,   loss = ‖v(x_t, t, caption) - (ε - z)‖²               t logit-normal, ε normal
    guidance:  loss = ‖v_student(x_t, t, caption, w) - (v_∅ + w (v_caption - v_∅))‖²         w uniform in [1, 6]

The first is rectified flow (Liu et al. 2022, arXiv:2209.03003) with the time distribution of Esser et al. 2024
(arXiv:2403.03206). One caption in ten is dropped, so that the network also knows the velocity v_∅ without a prompt. The
second teaches the guidance embedding what classifier-free guidance would compute with two passes (Meng et al. 2022,
arXiv:2210.03142): this is what makes a FLUX "dev". In the first stage the guidance is 1, which changes nothing.
"""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..flux import Flux, FluxConfig
from ..generate import generate
from ..networks.attention import attention_backend
from ..networks.autoencoder import Autoencoder
from ..networks.clip import CLIPConfig, CLIPText
from ..networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs, Modulation
from ..networks.t5 import T5, T5Config
from ..sampling import image_ids, patchify, text_ids
from ..tokenizers import CLIPTokenizer, T5Tokenizer
from .scenes import render, sample_scene
from .train_autoencoder import to_tensor
from .training import train, write_sheet
from .vocabulary import MAX_TOKENS

MMDIT = MMDiTConfig(vec_in_dim=128, context_in_dim=128, hidden_size=192, num_heads=3, depth=2, depth_single_blocks=5,
                    axes_dim=(8, 28, 28))
CLIP = CLIPConfig(hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=2, vocab_size=1214,
                  max_position_embeddings=MAX_TOKENS)
T5_SIZES = T5Config(d_model=128, d_kv=64, d_ff=256, num_layers=2, num_heads=2, vocab_size=512)
SIDE = 16                                # of the latents: 128 pixels / 8
BATCH, DROPOUT = 64, 0.1
PROMPTS = [sample_scene(random.Random(i), held_out=True).caption for i in range(24)]        # of a sample sheet


class Painter(nn.Module):
    """The three networks that are trained together: token ids and a noisy picture in, a velocity out."""

    def __init__(self, mmdit: MMDiTConfig = MMDIT, clip: CLIPConfig = CLIP, t5: T5Config = T5_SIZES):
        super().__init__()
        self.mmdit, self.clip, self.t5 = MMDiT(mmdit), CLIPText(clip), T5(t5)
        initialise(self.mmdit)

    def forward(self, x: Tensor, t: Tensor, guidance: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """x (B, N, 64), t (B,), guidance (B,), token ids (B, L) each -> velocity (B, N, 64)."""
        return self.velocity(x, t, guidance, *self.encode(clip_ids, t5_ids))

    def encode(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.t5(t5_ids), self.clip(clip_ids)

    def velocity(self, x: Tensor, t: Tensor, guidance: Tensor, txt: Tensor, vec: Tensor) -> Tensor:
        ids = image_ids(SIDE, SIDE, device=x.device), text_ids(txt.shape[1], device=x.device)
        return self.mmdit(MMDiTInputs(x, txt, vec, t, guidance, *ids))


def initialise(mmdit: MMDiT) -> None:
    """Every block starts as the identity: its modulation, and so its gates, are zero (adaLN-Zero, Peebles & Xie 2022)."""
    for module in mmdit.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    for module in mmdit.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.lin.weight)
    for layer in (mmdit.final_layer.linear, mmdit.final_layer.adaLN_modulation[1], mmdit.guidance_in.out_layer):
        nn.init.zeros_(layer.weight)


def numbers(tokenizer: T5Tokenizer) -> dict[str, int]:
    return {piece: number for piece, (number, _) in tokenizer.pieces.items()}


def taken_over(flux: Flux, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer) -> dict[str, Tensor]:
    """The weights of a `Painter` that knows what `flux` knows, in other vocabularies: each piece that both have keeps its vector."""
    if flux.mmdit.config != MMDIT:
        raise ValueError(f"the model {flux.config.name} has another transformer than the one that is trained: start with tiny, or a folder "
                         "of this command's")
    painter = Painter()
    painter.mmdit.load_state_dict(flux.mmdit.state_dict())
    for network, known, key, pieces, known_pieces in (
            (painter.clip, flux.clip, "text_model.embeddings.token_embedding.weight", clip_tokenizer.vocab, flux.clip_tokenizer.vocab),
            (painter.t5, flux.t5, "shared.weight", numbers(t5_tokenizer), numbers(flux.t5_tokenizer))):
        table, before = network.state_dict()[key].clone(), known.state_dict()
        for piece in pieces.keys() & known_pieces.keys():
            table[pieces[piece]] = before[key][known_pieces[piece]]
        network.load_state_dict(before | {key: table})
    return painter.state_dict()


@torch.no_grad()
def encode_scenes(autoencoder: Autoencoder, clip_tokenizer: CLIPTokenizer, t5_tokenizer: T5Tokenizer, count: int, seed: int,
                  device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """`count` scenes as tokens (count, N, 64) in bfloat16 and their captions' ids (count, L) for CLIP and T5. The last row
    is the empty caption."""
    rng, tokens, captions = random.Random(seed), [], []
    for begin in range(0, count, 64):
        scenes = [sample_scene(rng) for _ in range(min(64, count - begin))]
        pictures = to_tensor(np.stack([render(scene) for scene in scenes])).to(device, memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            z = autoencoder.encode(pictures)
        tokens.append(patchify(z).bfloat16().cpu())
        captions += [scene.caption for scene in scenes]
    captions.append("")
    return torch.cat(tokens), clip_tokenizer(captions, MAX_TOKENS), t5_tokenizer(captions, MAX_TOKENS)


def noisy(tokens: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A random time for every picture: x_t, t, and the velocity ε - z."""
    noise = torch.randn(tokens.shape, generator=generator).to(tokens.device)
    t = torch.sigmoid(torch.randn(len(tokens), generator=generator)).to(tokens.device)
    z, s = tokens.float(), t[:, None, None]
    return (1 - s) * z + s * noise, t, noise - z


def run(folder: Path, model: tuple[Autoencoder, CLIPTokenizer, T5Tokenizer], steps: int | None, minutes: float | None,
        device: torch.device, teacher: dict[str, Tensor] | None, scenes: int, lr: float, start: Flux | None = None,
        compiled: bool = False) -> None:
    """Train the base model, from what `start` knows on if it is given; or, given the base model's weights as `teacher`, distil
    guidance into a copy of it. `compiled` runs the networks through torch.compile, which needs a C++ compiler."""
    torch.manual_seed(0)
    painter = Painter().to(device)
    if start is not None:
        painter.load_state_dict(taken_over(start, *model[1:]))
    if teacher is not None:
        painter.load_state_dict(teacher)
        guide = Painter().to(device).requires_grad_(False)
        guide.load_state_dict(teacher)
        painter.clip.requires_grad_(False)
        painter.t5.requires_grad_(False)
    if compiled:                                       # Note: the methods, not the module: the names of its weights stay as they are
        for network in (painter,) if teacher is None else (painter, guide):
            network.forward, network.velocity = torch.compile(network.forward), torch.compile(network.velocity)
    tokens, clip_ids, t5_ids = encode_scenes(*model, scenes, seed=10 if teacher is None else 11, device=device)

    def batch(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        index = torch.randint(len(tokens), (BATCH,), generator=generator)
        caption = torch.where(torch.rand(BATCH, generator=generator) < DROPOUT, len(tokens), index)
        return tokens[index].to(device), clip_ids[caption].to(device), t5_ids[caption].to(device)

    def base_loss(generator: torch.Generator) -> Tensor:
        z, clip, t5 = batch(generator)
        x, t, target = noisy(z, generator)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            v = painter(x, t, torch.ones_like(t), clip, t5)
        return (v.float() - target).square().mean()

    def guidance_loss(generator: torch.Generator) -> Tensor:
        z, clip, t5 = batch(generator)
        x, t, _ = noisy(z, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            with torch.no_grad():
                empty = clip_ids[-1:].expand(BATCH, -1).to(device), t5_ids[-1:].expand(BATCH, -1).to(device)
                one = torch.ones(2 * BATCH, device=device)
                txt, vec = guide.encode(torch.cat([clip, empty[0]]), torch.cat([t5, empty[1]]))
                v, v_empty = guide.velocity(torch.cat([x, x]), torch.cat([t, t]), one, txt, vec).float().chunk(2)
                target = v_empty + w[:, None, None] * (v - v_empty)
            v = painter.velocity(x, t, w, txt[:BATCH], vec[:BATCH])
        return (v.float() - target).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = Painter().to(device)
        averaged.load_state_dict(ema)
        autoencoder, clip_tokenizer, t5_tokenizer = model
        flux = Flux(clip_tokenizer, t5_tokenizer, averaged.clip, averaged.t5, averaged.mmdit, autoencoder,
                    FluxConfig(name=folder.name, size=8 * SIDE, max_text_tokens=MAX_TOKENS))
        guided = dict(guidance=1.0, true_cfg=3.5, negative_prompt="") if teacher is None else dict(guidance=3.5)
        pictures = generate(flux, PROMPTS, steps=20, progress=False, **guided)
        return write_sheet(folder, step, pictures, PROMPTS)

    train(painter, base_loss if teacher is None else guidance_loss, folder, lr=lr, steps=steps, minutes=minutes,
          seed=1 if teacher is None else 2, on_save=on_save)
