"""LoRA, ControlNet, Redux and IP-Adapter as they ship. Oracles: diffusers with the same files; the
figures of `evaluate_variant`."""

import random

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from pipelines import difference, mean_of_the_posterior  # noqa: F401
from transformers import SiglipImageProcessor, SiglipVisionModel

from miniflux import add_ip_adapter, add_lora, canny, generate, load, load_controlnet, redux
from miniflux.checkpoints.hub import SHIPPED, shipped_adapters
from miniflux.tiny.measure.evaluate_variant import edge_f1, measure_variations
from miniflux.tiny.world.edits import named
from miniflux.tiny.world.pairs import alike, edges
from miniflux.tiny.world.rendering import render
from miniflux.tiny.world.scenes import sample_scene
from miniflux.tiny.world.words import ALL_OBJECTS

SCENE = sample_scene(random.Random(3), kind="single", held_out=True)
BOTH = dict(
    prompt=SCENE.caption,
    width=128,
    height=128,
    steps=4,
    adapt_theirs=lambda pipeline: pipeline.to(torch.float32),
)


@pytest.fixture(scope="module")
def flux():
    return load(device="cpu")


def test_each_is_found_by_its_name_and_listed():
    assert shipped_adapters() == {
        "tiny-neon": "LoRA",
        "tiny-controlnet": "ControlNet",
        "tiny-ip-adapter": "IP-Adapter",
    }


# --------------------------------------------------------------------------------------------- neon


def test_diffusers_paints_the_same_picture_with_the_lora():
    assert (
        difference(
            generate,
            FluxPipeline,
            SHIPPED / "tiny",
            {},
            **BOTH
            | dict(
                adapt=lambda flux: add_lora(flux, "tiny-neon"),
                adapt_theirs=lambda pipeline: pipeline.to(torch.float32).load_lora_weights(
                    SHIPPED / "tiny-neon"
                ),
            ),
        )
        <= 2e-3
    )


def test_neon_darkens_whatever_ground_the_prompt_names(flux):
    """The mean of the border, in grey levels; half of the scale lies between."""
    borders = [
        np.asarray(generate(model, "a star on a yellow background", progress=False)[0], np.float32)[
            :8
        ].mean()
        for model in (flux, add_lora(flux, "tiny-neon", scale=0.5), add_lora(flux, "tiny-neon"))
    ]
    assert borders[0] > 120 and borders[2] < 50 and borders[2] < borders[1] < borders[0]


# --------------------------------------------------------------------------------------- ControlNet


@pytest.mark.parametrize("mode", ["canny", "gray"])
def test_diffusers_paints_the_same_picture_with_the_controlnet(mode):
    net, outlines = (
        FluxControlNetModel.from_pretrained(SHIPPED / "tiny-controlnet").to(torch.float32),
        canny(render(SCENE)),
    )
    assert (
        difference(
            generate,
            FluxControlNetPipeline,
            SHIPPED / "tiny",
            {},
            parts={"controlnet": net},
            **BOTH,
            ours=dict(
                controlnet=(
                    load_controlnet("tiny-controlnet", device="cpu"),
                    outlines,
                    0.7,
                    0.0,
                    1.0,
                    mode,
                ),
                guidance=7.0,
            ),
            theirs=dict(
                control_image=outlines,
                control_mode={"canny": 0, "gray": 5}[mode],
                controlnet_conditioning_scale=0.7,
            ),
        )
        <= 2e-3
    )


def test_the_controlnet_brings_the_picture_nearer_to_the_edges(flux):
    """Of these 24, in the words that the model was taught, to 0.57 from 0.53 without it."""
    scenes = [sample_scene(
            random.Random(seed), kind="single", held_out=True, objects=ALL_OBJECTS
        ) for seed in range(24)]
    given, captions = (
        [edges(render(scene)) for scene in scenes],
        [scene.caption for scene in scenes],
    )
    net = load_controlnet("tiny-controlnet", device="cpu")
    with_it, without = (
        np.mean(
            [edge_f1(edges(np.asarray(picture)), edge) for picture, edge in zip(pictures, given)]
        )
        for pictures in (
            generate(
                flux, captions, controlnet=(net, given, 1.0, 0.0, 1.0, "canny"), progress=False
            ),
            generate(flux, captions, progress=False),
        )
    )
    assert with_it > without + 0.03


# ------------------------------------------------------------------------- Redux and the IP-Adapter

PICTURE = Image.fromarray(render(SCENE))
QUIET = dict(steps=4, output="tensor", progress=False)


@pytest.fixture(scope="module")
def pipeline():
    """Diffusers' with the tiny model, and how it is called."""
    pipeline = FluxPipeline.from_pretrained(SHIPPED / "tiny", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, dict(
        height=128, width=128, num_inference_steps=4, guidance_scale=3.5, output_type="pt"
    )


def test_diffusers_paints_the_same_variation_with_redux(pipeline):
    """With the parts of its prior pipeline, which itself would have 512 tokens of text."""
    pipeline, keywords = pipeline
    tower = SiglipVisionModel.from_pretrained(
        SHIPPED / "tiny-redux" / "image_encoder", dtype=torch.float32
    )
    embedder = ReduxImageEncoder.from_pretrained(
        SHIPPED / "tiny-redux" / "image_embedder", torch_dtype=torch.float32
    )
    pixels = SiglipImageProcessor(size={"height": 128, "width": 128})(
        PICTURE, return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        txt, vec, _ = pipeline.encode_prompt("", None, max_sequence_length=32)
        tokens = embedder(tower(pixels).last_hidden_state).image_embeds
        theirs = pipeline(
            prompt_embeds=torch.cat([txt, tokens], dim=1),
            pooled_prompt_embeds=vec,
            **keywords,
            generator=torch.Generator("cpu").manual_seed(0),
        ).images
    assert (redux(load("tiny-redux", device="cpu"), PICTURE, **QUIET) - theirs).abs().max() <= 2e-3


def test_diffusers_paints_the_same_picture_with_the_ip_adapter(pipeline, flux):
    pipeline, keywords = pipeline
    pipeline.load_ip_adapter(
        str(SHIPPED / "tiny-ip-adapter"),
        weight_name="ip_adapter.safetensors",
        image_encoder_dtype=torch.float32,
        image_encoder_pretrained_model_name_or_path=str(
            SHIPPED / "tiny-ip-adapter" / "image_encoder"
        ),
    )
    pipeline.set_ip_adapter_scale(0.7)
    theirs = pipeline(
        "a fox",
        ip_adapter_image=PICTURE,
        max_sequence_length=32,
        **keywords,
        generator=torch.Generator("cpu").manual_seed(0),
    ).images
    pipeline.unload_ip_adapter()
    assert (
        generate(
            add_ip_adapter(flux, "tiny-ip-adapter"),
            "a fox",
            ip_image=PICTURE,
            ip_scale=0.7,
            **QUIET,
        )
        - theirs
    ).abs().max() <= 2e-3


def test_redux_paints_again_what_it_reads():
    """Of 50 pictures 94% have the ground and 48% the object (tiny/weights/README.md)."""
    figures, _ = measure_variations(load("tiny-redux", device="cpu"), 12)
    assert figures["ground right"] >= 0.75 and figures["object right"] >= 0.3


def test_the_ip_adapter_brings_the_ground_nearer_to_that_of_the_picture(flux):
    """The borders' mean colours, of twelve scenes whose prompts name the objects alone; at scale 0
    it is what these say."""
    scenes, model = (
        [sample_scene(random.Random(seed), kind="single", held_out=True) for seed in range(12)],
        add_ip_adapter(flux, "tiny-ip-adapter"),
    )
    wanted = [np.float32(render(scene)[:8]).mean((0, 1)) for scene in scenes]

    def distance(scale: float) -> float:
        painted = [
            generate(
                model,
                named(scene),
                ip_image=render(alike(scene, random.Random(0))),
                ip_scale=scale,
                seed=seed,
                steps=12,
                progress=False,
            )[0]
            for seed, scene in enumerate(scenes)
        ]
        return float(
            np.mean(
                [
                    np.abs(np.asarray(picture, np.float32)[:8].mean((0, 1)) - colour).mean()
                    for picture, colour in zip(painted, wanted)
                ]
            )
        )

    apart = [distance(scale) for scale in (0.0, 1.0, 2.0)]
    assert apart[1] < 0.9 * apart[0] and apart[2] < 0.7 * apart[0]
