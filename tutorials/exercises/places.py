"""Exercises of chapter 5: patches and places.

Replace each `raise NotImplementedError` with your own code. Then run

    python -m pytest tutorials/exercises/places.py
"""

import torch
from torch import Tensor

from miniflux.networks.attention import apply_rope, rope_table
from miniflux.sampling import image_ids, patchify


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------ 1. ★ Any patch size, 15 minutes


def patchify_by(z: Tensor, p: int) -> Tensor:
    """Latents (B, C, h, w) cut into patches of p x p: tokens (B, h/p · w/p, C · p · p).

    Within a token the channel varies slowest, then the row, then the column.

    Hint: reshape so that h becomes (h/p, p) and w becomes (w/p, p), then permute."""
    raise NotImplementedError


def test_patches_of_two_are_those_of_flux():
    z = random(2, 16, 4, 6)
    assert torch.equal(patchify_by(z, 2), patchify(z)), (
        "with p = 2 you should get the package's patchify: is the channel slowest in your tokens?")


def test_patches_of_one_are_the_latent_pixels_row_by_row():
    z = random(1, 16, 2, 3)
    mine = patchify_by(z, 1)
    assert tuple(mine.shape) == (1, 6, 16), f"expected (1, 6, 16), yours: {tuple(mine.shape)}"
    assert torch.equal(mine[0, 4], z[0, :, 1, 1]), (
        "token 4 of 2 rows of 3 lies in row 1, column 1")


def test_a_patch_is_a_square_of_the_image():
    z = random(1, 3, 8, 12)
    mine = patchify_by(z, 4)
    assert tuple(mine.shape) == (1, 6, 48), f"expected (1, 6, 48), yours: {tuple(mine.shape)}"
    assert torch.equal(mine[0, 1], z[0, :, 0:4, 4:8].flatten()), (
        "the second token should hold the rows 0 to 3 and the columns 4 to 7")


# --------------------------------------------------------- 2. ★★ Only differences count, 20 minutes


def turn_pairs(x: Tensor, position: Tensor, theta: float = 10000.0) -> Tensor:
    """RoPE on one axis without complex numbers: x (S, D), positions (S,) -> (S, D).

    Pair i, that is the channels 2i and 2i + 1, turns by the angle position · theta^(-2i / D):

        a, b  ->  a cos - b sin,  a sin + b cos

    Hint: neighbours form a pair. x[:, 0::2] are the first halves of all pairs."""
    raise NotImplementedError


def test_it_is_the_rotation_of_the_package():
    x, position = random(5, 8), torch.tensor([0, 3, 1, 7, 2])
    theirs = apply_rope(x, rope_table(position[:, None], (8,), 10000.0))
    assert torch.allclose(turn_pairs(x, position), theirs, atol=1e-5), (
        "this is not the package's rotation: do neighbouring channels form a pair, and does the "
        "first pair turn fastest?")


def test_the_place_zero_changes_nothing():
    x = random(3, 8)
    assert torch.allclose(turn_pairs(x, torch.zeros(3)), x), "the position 0 should turn nothing"


def test_turning_keeps_the_length():
    x = random(4, 8)
    mine = turn_pairs(x, torch.arange(4)).norm(dim=-1)
    assert torch.allclose(mine, x.norm(dim=-1), rtol=1e-5), "a rotation should not change lengths"


def test_scores_depend_on_differences_only():
    q, k = random(1, 8, seed=1), random(1, 8, seed=2)
    scores = [(turn_pairs(q, torch.tensor([m + 4])) * turn_pairs(k, torch.tensor([m]))).sum()
              for m in (0, 1, 10)]
    assert max(scores) - min(scores) < 1e-4, (
        "the score of two tokens four places apart should be the same everywhere, yours are "
        f"{[round(float(score), 3) for score in scores]}")


# ------------------------------------------------------------ 3. ★★ Stretched positions, 15 minutes


def stretched_ids(h: int, w: int, trained: int = 16) -> Tensor:
    """Places (N, 3) of an image of h x w latent pixels, such that no difference is larger than in
    training on trained x trained latent pixels.

    The longer side of the grid gets the range of training: with 16 tokens in a row where there were
    8, the columns become 0, 7/15, 14/15, ..., 7. Both axes are stretched by the same factor, and a
    grid that is no larger than in training stays as it is. The result is in float32.

    Hint: `image_ids(h, w)` and one factor. Try it in the chapter's `placed`, at 256 x 256."""
    raise NotImplementedError


def test_the_trained_size_stays_as_it_is():
    assert torch.equal(stretched_ids(16, 16), image_ids(16, 16).float()), (
        "16 x 16 latent pixels are the size of training: nothing to stretch")
    assert torch.equal(stretched_ids(8, 16), image_ids(8, 16).float()), (
        "a grid that is smaller than in training should stay as it is")


def test_the_last_row_and_column_are_those_of_training():
    mine = stretched_ids(32, 32)
    assert mine.dtype == torch.float32, f"places between integers need float32, not {mine.dtype}"
    last = mine[-1].tolist()
    assert torch.allclose(mine[-1], torch.tensor([0.0, 7.0, 7.0])), (
        f"the last token of 32 x 32 latent pixels should lie at [0, 7, 7], yours at {last}")


def test_both_axes_are_stretched_alike():
    mine = stretched_ids(16, 32)
    steps = mine[16, 1].item(), mine[1, 2].item()
    assert abs(steps[0] - 7 / 15) < 1e-6 and abs(steps[1] - 7 / 15) < 1e-6, (
        "a step down and a step to the right should both be 7/15 for 16 x 32 latent pixels, or "
        f"circles become ellipses; yours are {steps[0]:.3f} and {steps[1]:.3f}")
