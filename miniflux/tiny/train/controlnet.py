"""Stage 7: a ControlNet for four kinds of control: edges, depths, blurred and grey images
(arXiv:2302.05543).

    loss = ‖v_base(x_t, t, caption, w; net(x_t, c, kind, ...)) - (ε - z) - (v_base(w) - v_base(1))‖²

c are the tokens of the control image. Only the net learns: it begins as a copy of the base model's
first blocks, and the residuals that it adds to the base model's tokens begin at zero. The last two
terms are what guidance w changes in the base model, as for the variants.
"""

import random
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ...adapters.controlnet import MODES
from ...flux import Flux
from ...generate import generate
from ...networks.controlnet import ControlNet, ControlNetConfig, assign
from ...networks.mmdit import MMDiT, MMDiTConfig
from ...sampling import Conditions, Velocity, flow_matching_loss, image_ids, patchify, text_ids
from .. import export
from ..world.pairs import blurred, depth_map, edges, grey
from ..world.rendering import render
from ..world.scenes import Scene
from .data import BATCH, encode_images, encode_scenes, take
from .loop import train, write_sheet
from .lora import SHOWN, side_by_side
from .precision import training_mode
from .velocity import LATENT_SIZE, draw_guidance, noise_and_times, velocity, without_guidance

LEARNING_RATE = 1e-3
# Kind of control -> its image (128, 128, 3) uint8 of a scene and the scene's image. Scenes take
# turns: the i-th has the i-th kind.
CONTROLS = {
    "canny": lambda scene, image: edges(image), "depth": lambda scene, image: depth_map(scene),
    "blur": lambda scene, image: blurred(image), "gray": lambda scene, image: grey(image)}


def initial_net(base: MMDiT, depth: int = 1, depth_single_blocks: int = 1) -> ControlNet:
    """The net before it learns: a copy of the base model's embeddings and first blocks, whose
    residuals are zero."""
    sizes = {field.name: getattr(base.config, field.name) for field in fields(MMDiTConfig)}
    sizes |= dict(depth=depth, depth_single_blocks=depth_single_blocks)
    net = ControlNet(ControlNetConfig(**sizes, modes=max(MODES.values()) + 1))
    state = net.state_dict()
    copied = {name: value for name, value in base.state_dict().items() if name in state}
    net.load_state_dict(state | copied)
    outputs = (*net.controlnet_blocks, *net.controlnet_single_blocks)
    for layer in (net.controlnet_x_embedder, *outputs):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return net.to(base.img_in.weight.device)


def controlled(base: MMDiT, net: ControlNet, control: Tensor, mode: int, txt: Tensor,
               pooled: Tensor, guidance: Tensor) -> Velocity:
    """The base model's velocity with the net's residuals, for control tokens (B, N, 64)."""
    img_ids = image_ids(LATENT_SIZE, LATENT_SIZE, device=txt.device)
    txt_ids = text_ids(txt.shape[1], device=txt.device)

    def residuals(x: Tensor, t: Tensor) -> list[Tensor]:
        doubles, singles = net(patchify(x), control, mode, txt, pooled, t, guidance, img_ids,
                               txt_ids)                                         # (B, N, hidden)
        return [*assign(doubles, base.config.depth, repeat=False),
                *assign(singles, base.config.depth_single_blocks, repeat=False)]

    return velocity(base, txt, pooled, guidance, Conditions(residuals=residuals))


def control_image(i: int, scene: Scene) -> np.ndarray:
    """The control image of the i-th scene."""
    return list(CONTROLS.values())[i % len(CONTROLS)](scene, render(scene))


def control_inputs(flux: Flux, scenes: list[Scene], images: np.ndarray, rng: random.Random
                   ) -> Tensor:
    given = [control_image(i, scene) for i, scene in enumerate(scenes)]
    return patchify(encode_images(flux, given))                                 # (n, N, 64)


def run(folder: Path, flux: Flux, scenes: int, *, steps: int | None, minutes: float | None) -> None:
    """Train a net for the model `flux`, which stays as it is; writes it into the folder in the form
    of diffusers."""
    torch.manual_seed(0)
    columns, first = encode_scenes(flux, scenes, seed=50, extra=control_inputs)
    base, net = flux.mmdit.requires_grad_(False), initial_net(flux.mmdit)
    device, modes = base.img_in.weight.device, [MODES[kind] for kind in CONTROLS]

    def loss(generator: torch.Generator) -> Tensor:
        kind = int(torch.randint(len(modes), (), generator=generator))
        among = torch.randint(len(columns[0]) // len(modes), (BATCH,), generator=generator)
        z, control, *text = take(columns, len(modes) * among + kind, device)
        eps, t = noise_and_times(z, generator)
        w = draw_guidance(BATCH, generator, device)
        with training_mode(device):
            v = controlled(base, net, control, modes[kind], *text, w)
            return flow_matching_loss(without_guidance(v, base, *text, w), z, eps, t)

    def on_save(step: int, ema: dict[str, Tensor]) -> dict:
        averaged = initial_net(base)
        averaged.load_state_dict(ema)
        export.write_controlnet(folder, averaged)
        captions = [scene.caption for scene in first[:SHOWN]]
        given = [control_image(i, scene) for i, scene in enumerate(first[:SHOWN])]
        painted = []
        for i, (caption, image) in enumerate(zip(captions, given)):
            control = (averaged, image, 1.0, 0.0, 1.0, modes[i % len(modes)])
            painted += generate(flux, caption, steps=16, progress=False, controlnet=control)
        return write_sheet(folder, step, *side_by_side(given, painted, captions))

    train(net, loss, folder, lr=LEARNING_RATE, batch=BATCH, steps=steps, minutes=minutes, seed=6,
          on_save=on_save)
