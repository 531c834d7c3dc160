"""The training of a ControlNet for the tiny model. Oracles: the base model; diffusers on the folder
that is written."""

import random

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel

from miniflux import generate, load, load_controlnet
from miniflux.adapters.controlnet import MODES
from miniflux.sampling import image_ids, text_ids
from miniflux.tiny.measure.evaluate_variant import measure
from miniflux.tiny.train import __main__ as command
from miniflux.tiny.train import controlnet
from miniflux.tiny.train.controlnet import CONTROLS, controlled, initial_net
from miniflux.tiny.train.velocity import velocity
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene


def inputs() -> tuple:
    torch.manual_seed(0)
    return (
        torch.randn(2, 64, 64),
        torch.randn(2, 64, 64),
        MODES["depth"],
        torch.randn(2, 8, 128),
        torch.randn(2, 128),
        torch.tensor([0.3, 0.9]),
        torch.tensor([3.5, 1.0]),
        image_ids(16, 16),
        text_ids(8),
    )


def test_a_net_begins_by_changing_nothing():
    base = load("tiny", device="cpu").mmdit
    _, control, mode, txt, pooled, t, guidance, *_ = inputs()
    x, net = torch.randn(2, 16, 16, 16), initial_net(base)
    v = controlled(base, net, control, mode, txt, pooled, guidance)
    plain = velocity(base, txt, pooled, guidance)
    assert torch.equal(v(x, t), plain(x, t))
    torch.nn.init.ones_(net.controlnet_single_blocks[0].weight)
    assert not torch.equal(v(x, t), plain(x, t))


def test_the_stage_writes_a_net_that_steers_and_that_diffusers_computes_alike(
    tmp_path, monkeypatch
):
    for name, value in (("BATCH", 4), ("SHOWN", 5)):
        monkeypatch.setattr(controlnet, name, value)
    with torch.enable_grad():
        command.main(
            [
                "controlnet",
                "--steps",
                "3",
                "--scenes",
                "8",
                "--work",
                str(tmp_path),
                "--device",
                "cpu",
            ]
        )
    folder = tmp_path / "controlnet"
    net = load_controlnet(folder, device="cpu")
    x, control, mode, txt, vec, t, guidance, *ids = inputs()
    ours = net(x, control, mode, txt, vec, t, guidance, *ids)
    theirs = FluxControlNetModel.from_pretrained(folder).eval()(
        hidden_states=x,
        controlnet_cond=control,
        controlnet_mode=torch.full((2, 1), mode),
        encoder_hidden_states=txt,
        pooled_projections=vec,
        timestep=t,
        guidance=guidance,
        img_ids=ids[0].float(),
        txt_ids=ids[1].float(),
        return_dict=False,
    )
    for a, b in zip([*ours[0], *ours[1]], [*theirs[0], *theirs[1]]):
        assert 0 < a.abs().max() and (a - b).abs().max() < 2e-5 * b.abs().max().clamp(min=1)
    flux, picture = load("tiny", device="cpu"), render(sample_scene(random.Random(0)))
    (steered,) = generate(
        flux, "a cat", steps=2, progress=False, controlnet=(net, picture, 100.0, 0.0, 1.0, "gray")
    )
    assert (
        not np.array_equal(steered, generate(flux, "a cat", steps=2, progress=False)[0])
        and (folder / "sheet.png").is_file()
    )
    figures, pictures = measure(flux, "canny", 2, steps=1, net=net)
    assert (
        pictures.shape == (2, 128, 128, 3)
        and figures["edge F1, at best"] > 0.8 > figures["edge F1"]
    )  # untrained


@pytest.mark.parametrize("kind", CONTROLS)
def test_every_kind_makes_a_picture_of_a_scene_and_has_a_number(kind):
    scene = sample_scene(random.Random(2))
    control = CONTROLS[kind](scene, render(scene))
    assert (
        control.shape == (128, 128, 3)
        and control.dtype == np.uint8
        and kind in MODES
        and not np.array_equal(control, render(scene))
    )
