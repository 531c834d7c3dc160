"""The training of vision towers. Oracle: by hand."""

import math
import random

import pytest
import torch

from miniflux import load
from miniflux.imaging.images import CLIP_COLOURS
from miniflux.prompt import Prompt, encode_prompt
from miniflux.tiny.train import ip_adapter, redux, towers
from miniflux.tiny.train.data import normalize
from miniflux.tiny.train.towers import share, sigmoid_loss, softmax_loss
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene


def test_the_sigmoid_loss_asks_for_the_diagonal():
    """By hand: -log sigmoid(z) = log(1 + exp(-z)), of the own captions' logits and of minus the
    others', summed, for each picture."""
    logits = torch.tensor([[2.0, -1.0], [0.5, -3.0]])
    expected = (
        math.log(1 + math.exp(-2))
        + math.log(1 + math.exp(-1))
        + math.log(1 + math.exp(0.5))
        + math.log(1 + math.exp(3))
    ) / 2
    assert float(sigmoid_loss(logits)) == pytest.approx(expected, rel=1e-6)


def test_the_softmax_loss_asks_for_the_diagonal_in_rows_and_in_columns():
    """By hand: the logarithm of all exponentials' sum less the own logit, of both rows and of both
    columns, on average."""
    logits = torch.tensor([[2.0, -1.0], [0.5, -3.0]])
    expected = (
        sum(
            math.log(1 + math.exp(other - own))
            for own, other in ((2, -1), (-3, 0.5), (2, 0.5), (-3, -1))
        )
        / 4
    )
    assert float(softmax_loss(logits)) == pytest.approx(expected, rel=1e-6)
    assert float(softmax_loss(logits + 7)) == pytest.approx(
        expected, rel=1e-6
    )  # the bias is SigLIP's alone


@pytest.mark.parametrize("stage", [redux, ip_adapter])
def test_the_logits_are_cosines_with_a_scale_and_a_bias(stage):
    net, pictures, vec = stage.pairing(128), torch.randn(3, 3, 128, 128), torch.randn(3, 128)
    if stage is redux:
        seen = net.tower(pictures).mean(1)
    else:
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in CLIP_COLOURS)
        seen = net.tower(((pictures + 1) / 2 - mean) / deviation)
    x, y = net.image_map(seen), net.text_map(vec)
    expected = 10 * float(x[2] @ y[1] / x[2].norm() / y[1].norm()) - math.log(towers.BATCH)
    logits = net(pictures, Prompt(torch.zeros(3, 32, 128), vec))
    assert float(logits[2, 1]) == pytest.approx(expected, abs=1e-4)
    assert net.loss_of is (sigmoid_loss if stage is redux else softmax_loss)


@pytest.mark.parametrize(
    "length, first, then",
    [
        ((9, None), (3, None), (6, None)),
        ((None, 15.0), (None, 5.0), (None, 10.0)),
        ((1, None), (1, None), (1, None)),
    ],
)
def test_a_share_of_a_run_is_counted_in_what_the_run_is(length, first, then):
    assert [tuple(share(part, *length).values()) for part in (1 / 3, 2 / 3)] == [
        pytest.approx(first),
        pytest.approx(then),
    ]


def test_half_of_the_batches_show_all_objects_on_one_ground(monkeypatch):
    """So that it is the objects which tell the captions apart."""
    flux, drawn = load("tiny", device="cpu"), []
    monkeypatch.setattr(
        towers,
        "sample_scene",
        lambda *rest, **keywords: drawn.append(sample_scene(*rest, **keywords)) or drawn[-1],
    )
    alike = 0
    for seed in range(12):
        drawn.clear()
        pictures, captions = towers.sample_pairs(flux, random.Random(seed), 6)
        alike += len({scene.ground for scene in drawn}) == 1
        assert torch.equal(pictures, normalize([render(scene) for scene in drawn]))
        assert torch.equal(
            captions.pooled, encode_prompt(flux, [scene.caption for scene in drawn]).pooled
        )
    assert 3 <= alike <= 9


def test_redux_is_to_say_what_t5_says_as_often_as_there_is_room():
    """By hand: 64 tokens of a picture, 32 of a caption; the mean squared difference to the caption
    said twice, and its own to be least."""
    torch.manual_seed(0)
    reader, pictures, txt = (
        redux.ReduxReader(128),
        torch.randn(2, 3, 128, 128),
        torch.randn(2, 32, 128),
    )
    said = reader.redux(reader.siglip(pictures))
    d = torch.stack(
        [
            torch.stack([(said[i] - torch.cat([txt[j], txt[j]])).square().mean() for j in (0, 1)])
            for i in (0, 1)
        ]
    )
    captions = Prompt(txt, torch.zeros(2, 128))
    assert torch.allclose(reader(pictures, captions), -math.exp(3) * d, rtol=1e-4)
    z = (math.exp(3) * d).tolist()
    tell = (
        sum(
            math.log(1 + math.exp(own - other))
            for own, other in (
                (z[0][0], z[0][1]),
                (z[1][1], z[1][0]),
                (z[0][0], z[1][0]),
                (z[1][1], z[0][1]),
            )
        )
        / 4
    )
    assert float(reader.loss(pictures, captions)) == pytest.approx(
        float(d[0, 0] + d[1, 1]) / 2 + tell / 10, rel=1e-4
    )
