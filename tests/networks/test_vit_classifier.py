"""The image classifier.

Oracles: transformers with the same random weights; the published sizes."""

import json

import pytest
import torch
from reference_vision import small_vit
from safetensors.torch import load_file, save_file
from transformers import ViTConfig as TheirConfig
from transformers import ViTForImageClassification

from miniflux.checkpoints.vision import VIT_NAMES, load_vit_classifier, rename
from miniflux.networks.vit_classifier import ViTClassifier


def test_the_logits_are_those_of_transformers(tmp_path):
    theirs = small_vit(tmp_path)
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = theirs(images).logits
    got = load_vit_classifier(tmp_path)(images)
    # Measured: 5e-7.
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_published_names_and_those_within_transformers_5_are_the_same_network(tmp_path):
    theirs = small_vit(tmp_path)
    file = tmp_path / "model.safetensors"
    images = torch.randn(1, 3, 32, 32)
    assert "vit.encoder.layer.0.intermediate.dense.weight" in load_file(file)
    published = load_vit_classifier(tmp_path)(images)
    save_file(theirs.state_dict(), file)
    assert "vit.layers.0.mlp.fc1.weight" in load_file(file)
    assert torch.equal(load_vit_classifier(tmp_path)(images), published)


def test_the_published_model_has_200_tensors_and_85800194_parameters():
    with torch.device("meta"):
        ours = ViTClassifier()
        theirs = ViTForImageClassification(TheirConfig(num_labels=2))
    renamed = rename(theirs.state_dict(), VIT_NAMES)
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in renamed.items()}
    assert len(renamed) == 200
    assert sum(p.numel() for p in ours.parameters()) == 85_800_194


def test_the_labels_are_the_configs(tmp_path):
    labels = {0: "a", 1: "b", 2: "c"}
    small_vit(tmp_path, id2label=labels, label2id={label: i for i, label in labels.items()})
    assert load_vit_classifier(tmp_path).config.labels == ("a", "b", "c")


@pytest.mark.parametrize("values, message", [
    (dict(architectures=["ViTModel"]),
     "describes a 'ViTModel', expected a ViTForImageClassification"),
    (dict(id2label={"0": "a", "2": "b"}),
     "id2label is .*, expected a label for each number from 0"),
    (dict(id2label=None), "id2label is None"),
    (dict(qkv_bias=False), "qkv_bias is False, expected True"),
    (dict(hidden_act="relu"), "hidden_act is 'relu', expected one of quick_gelu, gelu"),
    (dict(patch_size=16), "position_embeddings has the shape"),
])
def test_a_config_that_does_not_fit_is_refused(tmp_path, values, message):
    small_vit(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(ValueError, match=message):
        load_vit_classifier(tmp_path)
