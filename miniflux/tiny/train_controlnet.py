"""Stage 7: a ControlNet that knows four kinds of control: edges, depths, blurred and grey pictures (arXiv:2302.05543).

    loss = ‖v_base(x_t, t, caption, w; net(x_t, c, kind, ...)) - (ε - z) - (v_base(x_t, t, caption, w) - v_base(x_t, t, caption, 1))‖²

c are the tokens of the control picture. Only the net learns: it begins as a copy of the base model's first blocks, and what it adds to
the base model's tokens begins as zero. The last two terms are what guidance w changes in the base model, as for the other variants.
"""

import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..adapters.controlnet import MODES
from ..flux import Flux
from ..generate import generate
from ..latents import encode
from ..networks.attention import attention_backend
from ..networks.controlnet import ControlNet, ControlNetConfig, assign
from ..networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs
from ..sampling import image_ids, patchify, text_ids
from . import export
from .pairs import blurred, depth_map, edges, grey
from .scenes import Scene, render
from .train_autoencoder import to_tensor
from .train_flow import BATCH, SIDE, noisy
from .train_variant import SHOWN, encode_variant, guidance_change, side_by_side
from .training import train, write_sheet

# Kind -> the control picture (128, 128, 3) uint8 of a scene and its picture. Pictures take turns: the i-th is of the i-th kind.
KINDS = {"canny": lambda scene, picture: edges(picture), "depth": lambda scene, picture: depth_map(scene),
         "blur": lambda scene, picture: blurred(picture), "gray": lambda scene, picture: grey(picture)}


def beginning(base: MMDiT, depth: int = 1, depth_single_blocks: int = 1) -> ControlNet:
    """The net before it learns: a copy of the base model's embeddings and first blocks, that adds nothing."""
    sizes = {field.name: getattr(base.config, field.name) for field in fields(MMDiTConfig)}
    net = ControlNet(ControlNetConfig(**sizes | dict(depth=depth, depth_single_blocks=depth_single_blocks, modes=max(MODES.values()) + 1)))
    state = net.state_dict()
    net.load_state_dict(state | {name: value for name, value in base.state_dict().items() if name in state})
    for layer in (net.controlnet_x_embedder, *net.controlnet_blocks, *net.controlnet_single_blocks):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net.to(base.img_in.weight.device)


def controlled(base: MMDiT, net: ControlNet, x: Tensor, control: Tensor, mode: int, *rest: Tensor) -> Tensor:
    """The base model's velocity (B, N, 64) under the net's residuals; rest as the transformer takes it."""
    txt, vec, t, guidance, *ids = rest
    doubles, singles = net(x, control, mode, txt, vec, t, guidance, *ids)
    residuals = assign(doubles, base.config.depth, repeat=False)
    residuals += assign(singles, base.config.depth_single_blocks, repeat=False)
    return base(MMDiTInputs(x, *rest, residuals))


def control_picture(i: int, scene: Scene) -> np.ndarray:
    return list(KINDS.values())[i % len(KINDS)](scene, render(scene))


def control_inputs(flux: Flux, scenes: list[Scene], pictures: np.ndarray, rng: random.Random) -> Tensor:
    return patchify(encode(flux, to_tensor(np.stack([control_picture(i, scene) for i, scene in enumerate(scenes)]))))


def run(folder: Path, flux: Flux, steps: int | None, minutes: float | None, count: int, lr: float) -> None:
    """Train a net for the model `flux`, which stays as it is; writes it into the folder in the form of diffusers."""
    torch.manual_seed(0)
    *columns, shown = encode_variant(flux, control_inputs, count, seed=50)
    base, net = flux.mmdit.requires_grad_(False), beginning(flux.mmdit)
    device, modes = base.img_in.weight.device, [MODES[kind] for kind in KINDS]
    ids = image_ids(SIDE, SIDE, device=device), text_ids(columns[2].shape[1], device=device)

    def loss(generator: torch.Generator) -> Tensor:
        kind = int(torch.randint(len(modes), (), generator=generator))
        index = len(modes) * torch.randint(len(columns[0]) // len(modes), (BATCH,), generator=generator) + kind
        tokens, control, *prompt = (part[index].to(device, torch.float32) for part in columns)
        x, t, target = noisy(tokens, generator)
        w = 1 + 5 * torch.rand(BATCH, generator=generator).to(device)
        with torch.autocast(device.type, torch.bfloat16), attention_backend("formula"):
            guidance = guidance_change(base, x, *prompt, t, w, *ids)
            v = controlled(base, net, x, control, modes[kind], *prompt, t, w, *ids)
        return (v.float() - target - guidance.float()).square().mean()

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = beginning(base)
        averaged.load_state_dict(ema)
        captions = [scene.caption for scene in shown[:SHOWN]]
        given = [control_picture(i, scene) for i, scene in enumerate(shown[:SHOWN])]
        painted = [generate(flux, caption, steps=16, progress=False, controlnet=(averaged, control, 1.0, 0.0, 1.0, modes[i % len(modes)]))[0]
                   for i, (caption, control) in enumerate(zip(captions, given))]
        export.write_controlnet(folder, averaged)
        return write_sheet(folder, step, *side_by_side(given, painted, captions))

    train(net, loss, folder, lr=lr, steps=steps, minutes=minutes, seed=6, on_save=on_save)
