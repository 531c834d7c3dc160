"""The shipped scenes of the course: those that the world draws, with the facts that it knows."""

import numpy as np
import pytest
import torch

from miniflux.tiny.world.examples import COUNT, FOLDER, examples, mask_tile, scenes, tiles
from miniflux.tiny.world.rendering import render


def test_the_shipped_sheets_are_what_the_world_draws():
    """After a change of the world: python -m miniflux.tiny.world.examples."""
    images, masks = tiles(FOLDER / "images.webp"), tiles(FOLDER / "masks.png")
    for scene, image, mask in zip(scenes(), images, masks, strict=True):
        assert np.array_equal(image.permute(1, 2, 0), render(scene))
        assert np.array_equal(mask.permute(1, 2, 0), mask_tile(scene))


@pytest.mark.parametrize("kind, objects", [("pair", 2), ("single", 1)])
def test_an_example_has_a_caption_that_names_its_objects_and_a_mask_for_each(kind, objects):
    found = examples(kind)
    assert len(found) == COUNT
    for example in found:
        assert len(example.objects) == objects and example.image.shape == (3, 128, 128)
        assert all(name in example.caption.split() for name in example.objects)
        assert example.masks.shape == (objects, 128, 128) and example.masks.dtype == torch.bool
        assert example.masks.flatten(1).any(1).all() and example.masks.sum(0).max() == 1


def test_another_kind_is_refused():
    with pytest.raises(ValueError, match="no examples of the kind 'four'"):
        examples("four")


def test_the_examples_are_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 300_000
