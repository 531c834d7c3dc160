"""The training of an IP-Adapter for the tiny model. Oracles: by hand; diffusers with the files that
are written."""

import random

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from miniflux import add_ip_adapter, generate, load
from miniflux.adapters.ip_adapter import clip_vectors
from miniflux.checkpoints.hub import SHIPPED
from miniflux.imaging.reading import read_images
from miniflux.prompt import encode_prompt
from miniflux.tiny.export import write_ip_adapter
from miniflux.tiny.measure.evaluate_variant import measure_variations
from miniflux.tiny.measure.judge import judge
from miniflux.tiny.train import __main__ as command
from miniflux.tiny.train import ip_adapter, towers
from miniflux.tiny.train.data import normalize
from miniflux.tiny.train.ip_adapter import IPAdapterTrainer, clip_vector, encode_references
from miniflux.tiny.world.edits import describe, named
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene


@pytest.fixture
def quick(monkeypatch):
    for module, name, value in (
        (towers, "BATCH", 4),
        (ip_adapter, "BATCH", 4),
        (ip_adapter, "SHOWN", 1),
    ):
        monkeypatch.setattr(module, name, value)


def stage(work, steps: int = 3) -> None:
    with torch.enable_grad():
        command.main(
            [
                "ip-adapter",
                "--steps",
                str(steps),
                "--scenes",
                "6",
                "--work",
                str(work),
                "--device",
                "cpu",
            ]
        )


@pytest.fixture(scope="module")
def plain():
    return load("tiny", device="cpu")


@pytest.fixture(scope="module")
def follower(plain):
    """Random weights that act."""
    torch.manual_seed(0)
    follower = IPAdapterTrainer(plain)
    for block in follower.adapter.double_blocks:
        torch.nn.init.normal_(block["v_proj"].weight, std=0.1)
    return follower


@pytest.fixture(scope="module")
def folder(follower, tmp_path_factory):
    path = tmp_path_factory.mktemp("ip")
    write_ip_adapter(path, follower.clip, follower.adapter)
    return path


def test_before_it_learns_it_changes_nothing_and_then_it_does(tmp_path, quick, plain):
    stage(tmp_path, 1)  # a first step is made with a hundredth of the rate
    adapter = load_file(tmp_path / "ip-adapter" / "ip_adapter.safetensors")
    assert (
        0
        < max(value.abs().max() for name, value in adapter.items() if "v_proj.weight" in name)
        < 1e-2
    )
    assert (tmp_path / "ip-adapter" / "sheet.png").is_file()
    assert all(
        not (v != 0).any() for ((_, v),) in IPAdapterTrainer(plain)(torch.randn(2, 3, 128, 128))
    )


def test_each_picture_has_keys_and_values_of_its_own(plain, follower):
    """As the adapter itself makes them of one picture after the other."""
    pictures = torch.randn(2, 3, 128, 128)
    both = follower(pictures)
    for i, picture in enumerate(pictures):
        alone = follower.adapter(clip_vector(follower.clip, picture[None]))
        for (pair,), expected in zip(both, alone):
            for ours, theirs in zip(pair, expected):
                assert ours.shape == (2, 3, 4, 64)  # pictures, heads, tokens, channels
                assert (ours[i].transpose(0, 1).flatten(1) - theirs[0]).abs().max() < 1e-5


def test_training_reads_a_picture_as_painting_does(plain, folder, follower):
    picture = render(sample_scene(random.Random(1)))
    trained = clip_vector(add_ip_adapter(plain, folder).image_encoder, normalize(picture[None]))
    used = clip_vectors(
        add_ip_adapter(plain, folder), read_images(Image.fromarray(picture), "picture")
    )
    assert (trained - used).abs().max() < 1e-5 * used.abs().max()


def test_diffusers_follows_the_picture_alike(plain, folder):
    pipeline = FluxPipeline.from_pretrained(SHIPPED / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_ip_adapter(
        str(folder),
        weight_name="ip_adapter.safetensors",
        image_encoder_dtype=torch.float32,
        image_encoder_pretrained_model_name_or_path=str(folder / "image_encoder"),
    )
    pipeline.set_ip_adapter_scale(0.7)
    picture = Image.fromarray(render(sample_scene(random.Random(1))))
    theirs = pipeline(
        "a fox",
        ip_adapter_image=picture,
        height=128,
        width=128,
        num_inference_steps=4,
        guidance_scale=3.5,
        max_sequence_length=32,
        output_type="pt",
        generator=torch.Generator("cpu").manual_seed(0),
    ).images
    ours = generate(
        add_ip_adapter(plain, folder),
        "a fox",
        ip_image=picture,
        ip_scale=0.7,
        steps=4,
        output="tensor",
        progress=False,
    )
    without = generate(plain, "a fox", steps=4, output="tensor", progress=False)
    assert (ours - theirs).abs().max() <= 2e-3 and (ours - without).abs().max() > 0.1


def test_what_follows_a_picture_is_measured_beside_the_prompt_alone(plain, folder):
    """Untrained, so it cannot be good; without the picture it is what the model paints of the
    prompt."""
    figures, pictures = measure_variations(add_ip_adapter(plain, folder), 4, steps=4)
    assert (
        pictures.shape == (4, 128, 128, 3)
        and len(figures) == 9
        and figures["ground right, at best"] == 1
    )
    prompts = [
        named(sample_scene(random.Random(i), kind="single", coloured=i % 2 == 1, held_out=True))
        for i in range(4)
    ]
    alone = np.stack(
        [
            np.asarray(generate(plain, prompt, seed=i, steps=4, progress=False)[0])
            for i, prompt in enumerate(prompts)
        ]
    )
    # Only the objects in their own colours are asked for by name: 0 and 2.
    names = [prompt.split()[-1] for prompt in prompts[::2]]
    right = [seen.object == name for seen, name in zip(judge(alone[::2]), names)]
    assert figures["object right, without the image"] == np.mean(right)


def test_the_prompt_names_the_objects_and_the_picture_shows_their_ground(plain):
    """What the adapter learns from: 5 scenes, their grounds in words in the whole captions
    alone."""
    (z, read, asked, asked_vec, said, said_vec), scenes = encode_references(plain, 5, seed=0)
    assert z.shape == (5, 16, 16, 16) and read.shape == (5, 3, 128, 128) and len(scenes) == 5
    for i, scene in enumerate(scenes):
        for told, txt, vec in ((named, asked, asked_vec), (describe, said, said_vec)):
            expected = encode_prompt(plain, told(scene))
            assert (txt[i] - expected.txt[0]).abs().max() < 0.05 and (
                vec[i] - expected.pooled[0]
            ).abs().max() < 0.05


def test_a_stage_killed_in_either_step_goes_on_there_to_the_same_bits(tmp_path, quick, monkeypatch):
    stage(tmp_path / "whole", 6)
    real = towers.train

    def killed(net, loss_of, folder, **keywords):
        calls = []

        def loss(generator):
            calls.append(1)
            if len(calls) > 1 and not (folder / "killed").exists():
                (folder / "killed").touch()
                raise KeyboardInterrupt
            return loss_of(generator)

        return real(net, loss, folder, save_minutes=0, **keywords)

    for module in (towers, ip_adapter):
        monkeypatch.setattr(module, "train", killed)
    for _ in range(2):
        with pytest.raises(SystemExit, match="130"):
            stage(tmp_path / "parts", 6)
    stage(tmp_path / "parts", 6)
    for file in ("image_encoder/model.safetensors", "ip_adapter.safetensors"):
        whole, parts = (
            load_file(tmp_path / work / "ip-adapter" / file) for work in ("whole", "parts")
        )
        assert whole.keys() == parts.keys() and all(
            torch.equal(whole[name], parts[name]) for name in whole
        )
