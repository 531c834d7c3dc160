"""The invisible watermark. Oracles: OpenCV's colours and a decoder written out in loops; the library invisible-watermark where it is."""

import io

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from samples import SHARED

from miniflux.imaging.images import to_pil
from miniflux.imaging.watermark import MESSAGE, add_watermark, read_watermark

NOISE = np.random.default_rng(0).integers(0, 256, (264, 333, 3), dtype=np.uint8)
HILLS = np.asarray(Image.fromarray(NOISE[:20, :30]).resize((300, 280), Image.Resampling.BICUBIC))
PICTURES = {"noise": NOISE, "hills": HILLS, **{name: np.asarray(Image.new("RGB", (256, 272), name)) for name in (
    "white", "black", "grey", "red", "blue", "yellow")}}


def tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(pixels, np.float32) / 255).permute(2, 0, 1)[None]


def marked(pixels: np.ndarray, **message) -> np.ndarray:
    return np.asarray(to_pil(add_watermark(tensor(pixels), **message))[0])


def read_in_loops(pixels: np.ndarray, length: int = 46) -> list[int]:
    u = cv2.cvtColor(pixels[..., ::-1].copy(), cv2.COLOR_BGR2YUV)[..., 1].astype(int)
    votes = [[] for _ in range(length)]
    for i in range(u.shape[0] // 8):
        for j in range(u.shape[1] // 8):
            block = u[8 * i:8 * i + 8, 8 * j:8 * j + 8]
            sums = [block[a:a + 2, b:b + 2].sum() / 2 for a in range(0, 8, 2) for b in range(0, 8, 2)]
            votes[(i * (u.shape[1] // 8) + j) % length].append(max(sums[1:]) % 36 > 18)
    return [int(np.mean(votes) > 0.5) for votes in votes]


@pytest.mark.parametrize("name", PICTURES)
def test_the_message_is_read_from_the_bytes_of_any_picture(name):
    pixels = marked(PICTURES[name])
    assert read_watermark(tensor(pixels)) == [MESSAGE] and read_in_loops(pixels) == MESSAGE
    assert read_watermark(tensor(PICTURES[name])) != [MESSAGE]


@pytest.mark.parametrize("name", PICTURES)
def test_the_library_reads_the_message_and_its_own_marks_are_read(name):
    library = pytest.importorskip("imwatermark", reason="pip install invisible-watermark")
    found = library.WatermarkDecoder("bits", len(MESSAGE)).decode(marked(PICTURES[name])[..., ::-1].copy(), "dwtDct")
    assert [int(bit) for bit in found] == MESSAGE
    encoder = library.WatermarkEncoder()
    encoder.set_watermark("bits", MESSAGE)
    theirs = encoder.encode(PICTURES[name][..., ::-1].copy(), "dwtDct")[..., ::-1]
    assert name in ("white", "blue", "yellow") or read_watermark(tensor(theirs)) == [MESSAGE]     # which it cannot mark


def test_the_message_is_the_originals_without_its_leading_zeros():
    assert len(MESSAGE) == 46 and int("".join(map(str, MESSAGE)), 2) == 0b001010101111111010000111100111001111010100101110


def test_the_mark_survives_a_good_jpeg():
    file = io.BytesIO()
    Image.fromarray(marked(HILLS)).save(file, "JPEG", quality=95, subsampling=0)
    assert read_watermark(tensor(np.asarray(Image.open(file)))) == [MESSAGE]


def test_the_mark_is_invisible():
    """The brightness stays, and the colours hardly change. Measured: 0.3 of 255 on average; where blue is full, up to 12."""
    change = marked(HILLS).astype(float) - HILLS
    assert abs(change).mean() < 0.5 and np.quantile(abs(change @ [0.299, 0.587, 0.114]), 0.99) < 0.6
    assert abs(marked(PICTURES["white"]).astype(float) - 255).max() <= 9


def test_only_whole_blocks_are_touched():
    change = marked(NOISE).astype(int) != NOISE
    assert NOISE.shape[1] % 8 and not change[:, 328:].any() and change.any()


def test_another_message_and_a_batch():
    pictures = torch.cat([tensor(HILLS), tensor(HILLS).flip(-1)])
    assert read_watermark(add_watermark(pictures, [1, 0, 0, 1, 1]), 5) == [[1, 0, 0, 1, 1]] * 2


def test_a_picture_without_room_gets_one_sentence():
    with pytest.raises(ValueError, match="an image of 40 x 40 pixels has room for 25 bits, not 46"):
        add_watermark(torch.zeros(1, 3, 40, 40))
    with pytest.raises(ValueError, match="has room for 0 bits"):
        read_watermark(torch.zeros(1, 3, 7, 400))


@pytest.mark.skipif(not SHARED.is_dir(), reason="the pictures lie beside the repository")
def test_a_photo_on_white_is_marked():
    pixels = np.asarray(Image.open(SHARED / "robot.webp").convert("RGB"))
    assert read_in_loops(marked(pixels)) == MESSAGE


def test_pictures_of_every_kind_are_marked_and_read(tmp_path):
    """Oracle: the same picture as a tensor."""
    picture = Image.fromarray(np.random.default_rng(5).integers(40, 200, (64, 96, 3), dtype=np.uint8))
    marked, = add_watermark(picture)
    assert isinstance(marked, Image.Image) and marked.size == (96, 64)
    marked.save(tmp_path / "marked.png")
    expected = add_watermark(torch.from_numpy(np.asarray(picture) / 255).permute(2, 0, 1)[None])
    assert np.array_equal(np.asarray(marked), (expected[0] * 255).round().permute(1, 2, 0).numpy())
    for source in (marked, tmp_path / "marked.png", str(tmp_path / "marked.png"), np.asarray(marked), expected, expected[0]):
        assert read_watermark(source) == [MESSAGE]
    assert read_watermark([marked, marked]) == [MESSAGE, MESSAGE]
    for mistake in (3, None, "nowhere.png"):
        with pytest.raises((ValueError, FileNotFoundError)):
            read_watermark(mistake)
