"""Masks and what is put back under them. Oracle: by hand; parity of cropping and pasting is in tests/parity/test_tasks.py."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from miniflux import blur_mask, expand_canvas, mask_from_alpha
from miniflux.imaging.masks import (
    around_mask,
    crop_box,
    feather,
    fit_masks,
    latent_mask,
    paste,
    read_masks,
)
from miniflux.imaging.reading import read_images

PICTURE = [Image.new("RGB", (64, 48))]


def box(width: int, height: int, *corners: int) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, corners)
    return mask


def test_a_mask_is_cut_at_half_grey():
    hole = fit_masks([Image.fromarray(np.array([[127, 128]], np.uint8).repeat(16, 0).repeat(8, 1))], 16, 16)
    assert hole.shape == (1, 1, 16, 16) and hole[0, 0, 3].tolist() == [0.0] * 8 + [1.0] * 8


@pytest.mark.parametrize("mask", [
    box(64, 48, 8, 8, 40, 40), np.asarray(box(64, 48, 8, 8, 40, 40)), np.asarray(box(64, 48, 8, 8, 40, 40)) > 0,
    torch.from_numpy(np.asarray(box(64, 48, 8, 8, 40, 40)) / 255), box(64, 48, 8, 8, 40, 40).convert("1"),
], ids=["PIL", "bytes", "booleans", "tensor", "one bit"])
def test_a_mask_may_be_given_in_many_forms(mask):
    assert torch.equal(fit_masks(read_masks(mask, PICTURE), 64, 48), fit_masks([box(64, 48, 8, 8, 40, 40)], 64, 48))


def test_white_strokes_on_nothing_are_a_mask():
    strokes = Image.new("RGBA", (64, 48))
    strokes.paste((255, 255, 255, 255), (8, 8, 40, 40))
    assert torch.equal(fit_masks(read_masks(strokes, PICTURE), 64, 48), fit_masks([box(64, 48, 8, 8, 40, 40)], 64, 48))


def test_a_mask_of_another_size_is_resized_which_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        masks = read_masks(box(32, 24, 0, 0, 32, 12), PICTURE)
    assert [r.message for r in caplog.records] == ["the mask of 32 x 24 is resized to the image's 64 x 48"]
    assert fit_masks(masks, 64, 48)[0, 0, :20].all() and not fit_masks(masks, 64, 48)[0, 0, 28:].any()


def test_an_empty_and_a_thin_mask_get_one_sentence():
    with pytest.raises(ValueError, match="the mask is empty: expected white where"):
        fit_masks([Image.new("L", (64, 48))], 64, 48)
    with pytest.raises(ValueError, match="the mask is empty"):
        crop_box(Image.new("L", (64, 48)), 64, 64, 0)
    with pytest.raises(ValueError, match="the mask is too thin"):
        latent_mask(fit_masks([box(64, 48, 1, 1, 7, 7)], 64, 48))
    with pytest.raises(ValueError, match="there are 2 masks for 3 images"):
        read_masks([box(64, 48, 0, 0, 9, 9)] * 2, PICTURE * 3)


def test_the_mask_of_the_latents_takes_the_first_of_eight_pixels():
    mask = latent_mask(fit_masks([box(64, 48, 8, 8, 23, 41)], 64, 48))
    assert mask.shape == (1, 1, 6, 8) and mask[0, 0].nonzero().tolist() == [[y, x] for y in range(1, 6) for x in (1, 2)]


def test_the_transparent_part_becomes_the_mask(tmp_path):
    picture = Image.new("RGBA", (4, 2), (9, 9, 9, 255))
    picture.putpixel((3, 1), (9, 9, 9, 0))
    picture.save(tmp_path / "hole.png")
    for source in (picture, tmp_path / "hole.png"):
        mask = mask_from_alpha(source)
        assert mask.mode == "L" and mask.getpixel((3, 1)) == 255 and mask.getpixel((0, 0)) == 0
    with pytest.raises(ValueError, match="no transparent part"):
        mask_from_alpha(Image.new("RGB", (4, 2)))


def test_blurring_a_mask_leaves_a_straight_edge_where_it_was():
    mask = box(64, 48, 32, 0, 64, 48)
    assert blur_mask(mask, 4).getpixel((32, 24)) not in (0, 255)
    assert torch.equal(fit_masks([blur_mask(mask, 4)], 64, 48), fit_masks([mask], 64, 48))
    with pytest.raises(ValueError, match="the blur's radius is -1"):
        blur_mask(mask, -1)


def test_a_larger_canvas_has_the_picture_in_its_place_and_the_rest_in_the_mask():
    canvas, mask = expand_canvas(Image.new("RGB", (10, 6), (255, 0, 0)), left=4, bottom=3, overlap=2)
    assert canvas.size == mask.size == (14, 9)
    assert canvas.getpixel((4, 0)) == canvas.getpixel((13, 5)) == (255, 0, 0) and canvas.getpixel((3, 0)) == (127, 127, 127)
    kept = {(x, y) for x in range(14) for y in range(9) if mask.getpixel((x, y)) == 0}
    assert kept == {(x, y) for x in range(6, 14) for y in range(4)}            # no overlap where there is no margin


@pytest.mark.parametrize("margins", [{}, dict(left=-1), dict(left=4, overlap=3), dict(top=2.5), dict(right=10**6)], ids=str)
def test_wrong_margins_get_one_sentence(margins):
    with pytest.raises(ValueError, match="expected a"):
        expand_canvas(Image.new("RGB", (10, 6)), **margins)


@pytest.mark.parametrize("size, corners, target, padding, expected", [
    ((100, 100), (40, 40, 60, 60), (64, 64), 5, (35, 35, 65, 65)),
    ((100, 100), (40, 40, 60, 60), (128, 64), 0, (30, 40, 70, 60)),             # grown to twice as wide as high
    ((100, 100), (0, 40, 20, 60), (128, 64), 0, (0, 40, 40, 60)),               # and shifted to lie inside
    ((100, 100), (80, 40, 100, 60), (128, 64), 0, (60, 40, 100, 60)),
    ((30, 100), (5, 0, 25, 100), (64, 64), 9, (0, 0, 30, 100)),                 # as far as the picture reaches
])
def test_the_box_around_a_mask_has_the_shape_to_paint(size, corners, target, padding, expected):
    assert crop_box(box(*size, *corners), *target, padding) == expected


def test_a_feathered_mask_rises_inside_and_is_zero_outside():
    """By hand, along a row: five pixels of rise with a width of four."""
    hole = torch.zeros(1, 1, 1, 16)
    hole[..., 4:] = 1
    weight = feather(hole.expand(-1, -1, 16, -1), 4)[0, 0, 8]
    assert torch.allclose(weight, torch.tensor([0, 0, 0, 0, .2, .4, .6, .8] + [1] * 8))  # the picture's edge is no edge of the mask


def test_a_wide_picture_covers_its_box_and_what_is_outside_stays_bit_for_bit():
    picture, painted = torch.rand(1, 3, 20, 30), torch.ones(2, 3, 16, 16)
    weight = torch.zeros(1, 1, 20, 30)
    weight[..., 4:9, 6:20] = 1
    result = paste(painted, picture, weight, (5, 3, 25, 13))
    assert result.shape == (2, 3, 20, 30) and (result[..., 4:9, 6:20] == 1).all()
    outside = (weight == 0).expand(2, 3, -1, -1)
    assert torch.equal(result[outside], picture.expand(2, -1, -1, -1)[outside])


def test_around_the_mask_is_for_one_picture():
    with pytest.raises(ValueError, match="mask_padding works on one image, got 2"):
        around_mask(PICTURE * 2, [box(64, 48, 0, 0, 9, 9)] * 2, 64, 64, 4)
    with pytest.raises(ValueError, match="mask_padding is -3"):
        around_mask(PICTURE, [box(64, 48, 0, 0, 9, 9)], 64, 64, -3)


BLOCK = np.zeros((32, 48), np.uint8)
BLOCK[8:24, 16:40] = 1


@pytest.mark.parametrize("mask", [
    BLOCK, BLOCK * 255, BLOCK[..., None], BLOCK.astype(bool), BLOCK.astype(np.int64), BLOCK.astype(np.uint16), BLOCK.astype(np.float32),
    BLOCK.astype(np.float64), np.stack([BLOCK] * 3, -1), torch.from_numpy(BLOCK), torch.from_numpy(BLOCK)[None],
    torch.from_numpy(BLOCK)[None, None], torch.from_numpy(BLOCK).bool(), torch.from_numpy(BLOCK).long(), torch.from_numpy(BLOCK).half(),
    Image.fromarray(BLOCK), Image.fromarray(BLOCK * 255), Image.fromarray(BLOCK * 255).convert("1"), Image.fromarray(BLOCK.astype(np.int32)),
    Image.fromarray(BLOCK.astype(np.float32)), Image.fromarray(BLOCK.astype(np.uint16)), Image.fromarray(BLOCK).convert("RGB"),
], ids=lambda mask: f"{type(mask).__name__} {getattr(mask, 'dtype', getattr(mask, 'mode', ''))}")
def test_zeros_and_ones_are_a_mask_whatever_holds_them(mask):
    photo = read_images(np.zeros((32, 48, 3), np.uint8))
    hole = fit_masks(read_masks(mask, photo), 48, 32)
    assert torch.equal(hole[0, 0], torch.from_numpy(BLOCK).float())


def test_a_mask_file_of_zeros_and_ones_is_read(tmp_path):
    Image.fromarray(BLOCK).save(tmp_path / "mask.png")
    hole = fit_masks(read_masks(tmp_path / "mask.png", read_images(np.zeros((32, 48, 3), np.uint8))), 48, 32)
    assert hole.sum() == BLOCK.sum()
