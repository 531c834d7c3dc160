"""Small networks of transformers that look at pictures, with random weights: what the depth estimator and the filters must equal.

    small_depth     DepthAnythingForDepthEstimation
"""

from pathlib import Path

from reference import randomise
from transformers import (
    DepthAnythingConfig,
    DepthAnythingForDepthEstimation,
    Dinov2Config,
)


def small_depth(folder: Path, backbone: dict | None = None, **values) -> DepthAnythingForDepthEstimation:
    """The network, which is also saved into the folder."""
    dino = dict(hidden_size=24, num_hidden_layers=5, num_attention_heads=3, image_size=70, patch_size=14, out_indices=[1, 2, 4, 5],
                reshape_hidden_states=False) | (backbone or {})
    net = DepthAnythingForDepthEstimation(DepthAnythingConfig(**dict(
        backbone_config=Dinov2Config(**dino), reassemble_hidden_size=24, neck_hidden_sizes=[4, 8, 12, 16], fusion_hidden_size=8,
        head_hidden_size=4, patch_size=14) | values))
    randomise(net, seed=8).save_pretrained(folder)
    return net
