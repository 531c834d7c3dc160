"""What may be given as a picture, sizes, and conversions. Oracle: by hand; Pillow."""

import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import SHARED

from miniflux.imaging.images import as_pil, natural_size, preprocess, round_size, to_pil, to_tensor
from miniflux.imaging.info import marks
from miniflux.imaging.reading import read_each, read_image, read_images, size_of
from miniflux.imaging.saving import encodable, save

COLOURS = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def png_header(path: Path, width: int, height: int) -> Path:
    """A PNG of a few bytes that claims to be so large."""
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    return path


def test_a_path_an_array_and_a_tensor_are_the_same_picture(tmp_path):
    Image.fromarray(COLOURS).save(tmp_path / "a.png")
    floats = COLOURS.astype(np.float32) / 255
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), Image.fromarray(COLOURS), COLOURS, floats, floats.astype(np.float64),
                   torch.from_numpy(COLOURS).permute(2, 0, 1), torch.from_numpy(floats).permute(2, 0, 1)):
        picture = read_image(source)
        assert size_of(picture) == (7, 5)
        assert torch.allclose(to_tensor(picture, 7, 5), torch.from_numpy(floats).permute(2, 0, 1)[None])


def test_numbers_keep_their_precision_where_the_size_fits():
    floats = np.random.default_rng(0).random((8, 6, 3), dtype=np.float32)
    assert torch.equal(to_tensor(read_image(floats), 6, 8)[0], torch.from_numpy(floats).permute(2, 0, 1))


def test_several_pictures_are_a_list_or_one_array_or_one_tensor():
    assert len(read_images([COLOURS, Image.fromarray(COLOURS)])) == len(read_images(np.stack([COLOURS, COLOURS]))) == 2
    assert len(read_images(torch.rand(3, 3, 8, 8))) == 3


def test_transparent_parts_lie_on_white():
    """By hand: red at alpha 128 on white; nothing on white. A palette's transparency counts too."""
    rgba = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    rgba.putpixel((1, 0), (10, 20, 30, 0))
    picture = read_image(rgba)
    assert picture.mode == "RGB" and picture.getpixel((0, 0)) == (255, 127, 127) and picture.getpixel((1, 0)) == (255, 255, 255)
    palette = Image.new("P", (1, 1))
    palette.info["transparency"] = 0
    assert read_image(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_greys_are_scaled_not_cut_off(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100, 65535]], np.uint16)).save(tmp_path / "grey.png")
    assert [read_image(tmp_path / "grey.png").getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "CMYK", "YCbCr", "HSV", "I;16", "I", "PA"])
def test_every_usual_mode_is_read(mode):
    assert read_image(Image.new(mode, (3, 2))).mode == "RGB"


def test_the_orientation_of_a_photo_is_applied(tmp_path):
    photo, exif = Image.new("RGB", (4, 2)), Image.Exif()
    exif[0x0112] = 6                                                            # turned by 90 degrees
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert read_image(tmp_path / "photo.jpg").size == (2, 4)


def test_a_picture_of_one_pixel_becomes_any_size():
    assert torch.equal(preprocess([read_image(Image.new("RGB", (1, 1), (255, 0, 0)))], 16, 32)[0, :, 5, 7], torch.tensor([1.0, -1, -1]))


@pytest.mark.parametrize("mode, colour, expected", [
    ("1", 1, (255, 255, 255)),
    ("L", 100, (100, 100, 100)),
    ("LA", (100, 128), (177, 177, 177)),                    # half of it is the white beneath: 100 · 128/255 + 255 · 127/255
    ("La", (50, 128), (177, 177, 177)),                     # the same, multiplied by alpha before
    ("RGB", (10, 20, 30), (10, 20, 30)),
    ("RGBA", (10, 20, 30, 0), (255, 255, 255)),
    ("RGBa", (5, 10, 15, 128), (132, 137, 142)),
    ("RGBX", (10, 20, 30, 7), (10, 20, 30)),
    ("CMYK", (255, 0, 0, 0), (0, 255, 255)),
    ("YCbCr", (76, 85, 255), (254, 0, 0)),
    ("HSV", (0, 255, 255), (255, 0, 0)),
    ("LAB", (255, 128, 128), (255, 255, 255)),              # L* = 100, a* = b* = 0: white
    ("LAB", (0, 128, 128), (0, 0, 0)),
    ("I;16", 257 * 100, (100, 100, 100)),
    ("I;16B", 257 * 100, (100, 100, 100)),
    ("I", 257 * 100, (100, 100, 100)),
    ("I", 100, (100, 100, 100)),
    ("F", 0.4, (102, 102, 102)),
])
def test_every_mode_of_pillow_has_its_colours(mode, colour, expected):
    """By hand, to a unit or two of 255 where a formula rounds."""
    picture = as_pil(read_image(Image.new(mode, (3, 2), colour)))
    assert picture.mode == "RGB" and picture.size == (3, 2)
    assert max(abs(a - b) for a, b in zip(picture.getpixel((1, 1)), expected)) <= 2


def test_a_palettes_transparent_colour_is_the_background():
    picture = Image.new("P", (2, 1), 1)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    assert read_image(picture).getpixel((0, 0)) == (200, 100, 50)
    picture.info["transparency"] = 1
    assert read_image(picture).getpixel((0, 0)) == (255, 255, 255)


RAMP = np.tile(np.arange(256), (4, 1))


@pytest.mark.parametrize("array", [
    RAMP.astype(np.uint8), RAMP.astype(np.int32), RAMP.astype(np.int64), RAMP.astype(np.uint32), RAMP * 257, (RAMP * 257).astype(np.uint16),
    (RAMP * 257).astype(">u2"), RAMP / 255, (RAMP / 255).astype(np.float16), (RAMP / 255).astype(np.float32),
], ids=lambda array: str(array.dtype))
def test_numbers_of_every_type_have_their_brightness(array):
    """Oracle: the ramp as bytes. Arrays, tensors and, of the types it has, Pillow's pictures."""
    for source in (array, array[..., None], torch.from_numpy(array.astype(array.dtype.newbyteorder("="))) if array.dtype != np.uint32 else array,
                   *([Image.fromarray(array)] if array.dtype in (np.uint8, np.int32, np.uint16, np.float32) else [])):
        found = np.asarray(as_pil(read_image(source)), int)
        assert abs(found - RAMP[..., None]).max() <= 0


def test_what_is_read_shares_no_memory_with_what_was_given():
    array = np.zeros((4, 4, 3), np.float32)
    read_image(array).add_(1)
    assert array.max() == 0


def test_resizing_is_pillows_lanczos():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    expected = np.asarray(picture.resize((32, 16), Image.Resampling.LANCZOS))
    assert np.array_equal(np.asarray(to_pil(preprocess([picture], 32, 16) / 2 + 0.5)[0]), expected)


@pytest.mark.parametrize("source, sentence", [
    (None, "the image is a NoneType: expected a PIL image, a path"),
    (3, "the image is a int"),
    ("missing.png", "the image missing.png does not exist"),
    (np.zeros((4, 4, 2)), "shape .4, 4, 2.: expected .H, W. or .H, W, 3."),
    (np.zeros((0, 4, 3)), "shape .0, 4, 3."),
    (np.full((4, 4, 3), 2.0), "holds float64 from 2.0 to 2.0: expected uint8, or floats in"),
    (np.full((4, 4, 3), np.nan), "holds float64 from nan"),
    (np.full((4, 4, 3), -1, np.int32), "holds int32 from -1 to -1: expected uint8, or floats in"),
    (np.full((4, 4), 65536), "holds int64 from 65536"),
    (np.zeros((4, 4, 4)), "holds float64 from 0.0"),
    (np.zeros((4, 4, 3), complex), "holds complex128"),
    (np.full((4, 4), "x"), "holds <U1"),
    (torch.zeros(64, 64, 3), r"a tensor of the shape \(64, 64, 3\): expected \(3, H, W\)"),
    ("https://example.com/a.png", "https://example.com/a.png is an address, which is not fetched: download it first"),
    (".", "the image . does not exist as a file: it is a folder"),
    (torch.full((3, 4, 4), -1.0), "holds float32 from -1.0"),
    (torch.zeros(3), "a tensor of the shape .3,.: expected .3, H, W."),
    (Image.new("F", (2, 2), 2.0), "holds float32 from 2.0 to 2.0: expected uint8, or floats in"),
    ([], "there is no image: expected one, or a list of them"),
    ([COLOURS, COLOURS[:3]], "the images of one call must have one size, got 7 x 3, 7 x 5"),
])
def test_what_is_no_picture_gets_one_sentence(source, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        read_images(source, "image")


@pytest.mark.parametrize("width", [9_500, 13_500, 50_000], ids=lambda w: f"{w} x {w}")
def test_a_picture_that_claims_to_be_huge_is_refused_before_it_is_decoded(tmp_path, width):
    path = png_header(tmp_path / "bomb.png", width, width)
    assert path.stat().st_size < 100
    with pytest.raises(ValueError, match="claims more than 89,478,485 pixels"):
        read_image(path)


def test_truncated_and_foreign_files_get_one_sentence(tmp_path):
    Image.fromarray(COLOURS.repeat(40, 0).repeat(40, 1)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    (tmp_path / "text.png").write_text("hello")
    for name in ("cut.png", "text.png"):
        with pytest.raises(ValueError, match="cannot be read as an image"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_image(tmp_path)


def test_pictures_of_several_sizes_may_be_read_one_by_one():
    assert [size_of(picture) for picture in read_each([COLOURS, COLOURS[:3]])] == [(7, 5), (7, 3)]


@pytest.mark.parametrize("like, width, height, expected", [
    ((1024, 1024), None, None, (1024, 1024)), ((1, 1), None, None, (1024, 1024)), ((1600, 900), None, None, (1360, 768)),
    ((640, 480), 512, None, (512, 384)), ((640, 480), None, 768, (1024, 768)), ((640, 480), 100, 200, (100, 200)),
    ((1, 100_000), None, None, (16, 16_384)),
])
def test_the_size_to_paint_has_the_pictures_shape(like, width, height, expected):
    assert natural_size(like, 1024 ** 2, width, height) == expected


def test_a_rounded_size_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert round_size(100, 64) == (96, 64)
    assert len(caplog.records) == 1 and round_size(96, 64) == (96, 64) and len(caplog.records) == 1


@pytest.mark.skipif(not SHARED.is_dir(), reason="the pictures lie beside the repository")
def test_real_pictures_are_read_at_their_own_size():
    assert size_of(read_image(SHARED / "robot.webp")) == (840, 840) and size_of(read_image(SHARED / "cup_mask.png")) == (1232, 1632)


def test_metadata_that_is_no_text_is_written_with_escapes(tmp_path):
    """A file called caf\\xe9.png, not in UTF-8, has half of a surrogate pair in its name."""
    save(Image.new("RGB", (4, 4)), tmp_path / "a.png", {"image": "caf\udce9.png", "prompt": "a\0b"}, marks("generate", "tiny", "caf\udce9"))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.text == {"image": "caf\\udce9.png", "prompt": "ab"}
    assert encodable("狐 é") == "狐 é"
