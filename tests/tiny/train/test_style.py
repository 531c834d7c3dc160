"""The training of a style for the tiny model. Oracles: by hand; diffusers with the file that is
written."""

import numpy as np
import torch
from diffusers import FluxPipeline

from miniflux import add_lora, load
from miniflux.checkpoints.hub import SHIPPED
from miniflux.networks.mmdit import MMDiTInputs
from miniflux.sampling import image_ids, text_ids
from miniflux.tiny.train import __main__ as command
from miniflux.tiny.train import style
from miniflux.tiny.train.style import neon


def test_neon_draws_edges_in_their_colour_and_leaves_the_rest_dark():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32] = 10, 120, 0  # green to the left, black to the right
    drawn = neon(picture)
    assert (
        (drawn[:, 31, 1] > 150).all()
        and (drawn[:, 31, 1] > 2 * drawn[:, 31, 0].astype(int)).all()
        and (drawn[:, :10] < 10).all()
    )


def test_the_style_is_a_lora_that_diffusers_adds_alike(tmp_path, monkeypatch):
    monkeypatch.setattr(style, "BATCH", 4)
    with torch.enable_grad():
        command.main(
            ["style", "--steps", "10", "--scenes", "8", "--work", str(tmp_path), "--device", "cpu"]
        )
    plain = load("tiny", device="cpu")
    ours = add_lora(plain, tmp_path / "style")
    pipeline = FluxPipeline.from_pretrained(SHIPPED / "tiny", torch_dtype=torch.float32)
    pipeline.load_lora_weights(tmp_path / "style")
    torch.manual_seed(0)
    x, txt, vec, t, w = (
        torch.randn(2, 64, 64),
        torch.randn(2, 8, 128),
        torch.randn(2, 128),
        torch.tensor([0.3, 0.9]),
        torch.tensor([3.5, 1]),
    )
    ids = image_ids(16, 16), text_ids(8)
    theirs = pipeline.transformer(
        x, txt, vec, t, *(i.float() for i in ids), guidance=w, return_dict=False
    )[0]
    result = ours.mmdit(MMDiTInputs(x, txt, vec, t, w, *ids))
    assert (result - theirs).abs().max() < 2e-5 * theirs.abs().max()
    assert (
        result - plain.mmdit(MMDiTInputs(x, txt, vec, t, w, *ids))
    ).abs().max() > 1e-3 * theirs.abs().max()
