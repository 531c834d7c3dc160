"""Depth Anything.

Oracles: transformers with the same random weights; the published sizes; by hand."""

import json
import shutil

import pytest
import torch
from reference_vision import small_depth
from safetensors.torch import load_file, save_file
from transformers import DepthAnythingConfig as TheirConfig
from transformers import DepthAnythingForDepthEstimation, Dinov2Config

from miniflux.checkpoints.vision import depth_anything_names, load_depth_anything
from miniflux.networks.depth_anything import DepthAnything, DepthAnythingConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("depth") / "v1"
    small_depth(path)
    return path


def error(ours, theirs) -> float:
    assert ours.shape == theirs.shape
    assert theirs.abs().max() > 0.1
    assert theirs.std() > 1e-3
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("height, width", [
    (70, 70),           # a square grid of the network's own size: no stretched positions
    (84, 56),
    (14, 14),
    (14, 98),
    (100, 75),          # some rows are left over
    (71, 70),
])
def test_the_depths_are_those_of_transformers(tmp_path, height, width):
    theirs = small_depth(tmp_path)
    images = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    # Measured: 1.2e-6.
    assert error(load_depth_anything(tmp_path)(images), theirs(images).predicted_depth) < 1e-5


@pytest.mark.parametrize("backbone, values", [
    (dict(out_indices=[2, 3, 4, 5]), {}),
    (dict(out_indices=[1, -3, -2, -1]), {}),
    (dict(out_indices=None, out_features=["stage1", "stage2", "stage4", "stage5"]), {}),
    ({}, dict(depth_estimation_type="metric", max_depth=20)),
    ({}, dict(depth_estimation_type="relative", max_depth=3)),
], ids=str)
def test_a_v2_config_is_followed(tmp_path, backbone, values):
    theirs = small_depth(tmp_path, backbone, **values)
    images = torch.randn(1, 3, 56, 70, generator=torch.Generator().manual_seed(1))
    assert error(load_depth_anything(tmp_path)(images), theirs(images).predicted_depth) < 1e-5


def test_the_large_model_has_the_published_names_shapes_and_number_of_parameters():
    with torch.device("meta"):
        ours = DepthAnything()
        backbone = Dinov2Config(
            hidden_size=1024,
            num_hidden_layers=24,
            num_attention_heads=16,
            image_size=518,
            out_indices=[21, 22, 23, 24],
            reshape_hidden_states=False,
        )
        theirs = DepthAnythingForDepthEstimation(TheirConfig(
            backbone_config=backbone,
            reassemble_hidden_size=1024,
            neck_hidden_sizes=[256, 512, 1024, 1024],
            fusion_hidden_size=256,
        )).state_dict()
    assert len(theirs) == 503
    assert sum(tensor.numel() for tensor in theirs.values()) == 335_315_649
    renamed = depth_anything_names(theirs)                  # all but the mask token
    assert len(renamed) == 502
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in renamed.items()}
    assert sum(p.numel() for p in ours.parameters()) == 335_315_649 - 1024


def test_the_published_names_and_those_within_transformers_5_are_the_same_network(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "new")
    new_file = tmp_path / "new" / "model.safetensors"
    save_file(small_depth(tmp_path / "again").state_dict(), new_file)
    published = load_file(folder / "model.safetensors")
    assert "backbone.encoder.layer.0.attention.attention.query.weight" in published
    assert "backbone.encoder.layer.0.attention.q_proj.weight" in load_file(new_file)
    x = torch.randn(1, 3, 28, 42)
    assert torch.equal(load_depth_anything(folder)(x), load_depth_anything(tmp_path / "new")(x))


def test_the_positions_are_stretched_only_for_another_grid_and_never_for_the_class_token():
    net = DepthAnything(DepthAnythingConfig(
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=42,
        out_indices=(1, 2, 3, 4),
        neck_hidden_sizes=(2, 2, 2, 2),
        fusion_hidden_size=4,
    ))
    embeddings = net.backbone.embeddings
    embeddings.position_embeddings.data.normal_()
    assert embeddings.positions(3, 3) is embeddings.position_embeddings
    stretched = embeddings.positions(5, 2)
    assert stretched.shape == (1, 11, 8)
    assert torch.equal(stretched[:, 0], embeddings.position_embeddings[:, 0])


@pytest.mark.parametrize("values, backbone, message", [
    (dict(architectures=["DPTForDepthEstimation"]), {},
     "describes a 'DPTForDepthEstimation', expected a DepthAnythingForDepthEstimation"),
    (dict(backbone_config=None), {}, "has no backbone_config"),
    (dict(depth_estimation_type="other"), {}, "depth_estimation_type 'other' are not"),
    (dict(head_in_index=0), {}, "head_in_index is 0, expected -1"),
    (dict(reassemble_factors=[4, 2, 1, 1]), {}, r"reassemble_factors is \[4, 2, 1, 1\], expected"),
    (dict(max_depth=-1), {}, "max_depth is -1, expected a positive number"),
    (dict(neck_hidden_sizes=[4, 8]), {}, "do not fit together"),
    (dict(patch_size=16), {}, "patch_size is 14, expected 16"),
    ({}, dict(reshape_hidden_states=True), "reshape_hidden_states is True, expected False"),
    ({}, dict(use_swiglu_ffn=True), "use_swiglu_ffn is True, expected False"),
    ({}, dict(out_indices=[1, 2, 3, 6]),
     r"out_indices are \[1, 2, 3, 6\], expected four of the 5 layers"),
    ({}, dict(out_indices=[1, 1, 2, 3]), "expected four of the 5 layers"),
    ({}, dict(out_indices="abcd"), "expected four of the 5 layers"),
    ({}, dict(hidden_size=10**9), "reassemble_hidden_size is 24"),
    ({}, dict(num_hidden_layers=10**9),
     "num_hidden_layers is 1000000000, expected a whole number"),
    ({}, dict(num_attention_heads=5), "24 channels cannot be shared by 5 heads"),
    ({}, dict(num_hidden_layers=6), "missing backbone.encoder.layers.5"),
], ids=str)
def test_a_config_that_does_not_fit_is_refused(folder, tmp_path, values, backbone, message):
    shutil.copytree(folder, tmp_path / "net")
    path = tmp_path / "net" / "config.json"
    config = json.loads(path.read_text())
    config["backbone_config"] |= backbone
    path.write_text(json.dumps(config | values))
    with pytest.raises(ValueError, match=message):
        load_depth_anything(tmp_path / "net")
