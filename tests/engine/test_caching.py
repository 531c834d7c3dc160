"""Caches. Oracles: diffusers' hooks on the same small random model; by hand;
the model without a cache."""

import weakref

import pytest
import torch
from diffusers import (
    FirstBlockCacheConfig,
    FluxKontextPipeline,
    FluxPipeline,
    TaylorSeerCacheConfig,
)
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from PIL import Image
from pipelines import difference, mean_of_the_posterior  # noqa: F401
from reference import clip_vision, controlnet, ip_adapter_state, small_pipeline
from safetensors.torch import save_file

from miniflux import (
    add_ip_adapter,
    add_lora,
    cli,
    generate,
    kontext_edit,
    load,
    load_controlnet,
)
from miniflux.engine.caching import CacheStates, Series, cache
from miniflux.engine.tiling import tile
from miniflux.flags import parser
from miniflux.networks.mmdit import CallMemory, MMDiTInputs
from miniflux.sampling import flow

EDGES = Image.effect_noise((64, 48), 90).convert("RGB")
FIRST_SINGLE = "single_blocks.0.linear1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("caching") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    path = tmp_path_factory.mktemp("net")
    controlnet().save_pretrained(path)
    return load_controlnet(path, device="cpu")


def paint(flux, prompt="a red apple", **keywords):
    settings = dict(width=64, height=48, steps=10, seed=7, max_text_tokens=24, output="latents",
                    progress=False)
    return generate(flux, prompt, **settings | keywords)


def counted(flux, part, call):
    """What the call returns, and how often that part of the transformer was computed."""
    seen = []
    handle = flux.mmdit.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
    result = call()
    handle.remove()
    return result, len(seen)


def peer(folder, config, prompt="a red apple", negative_prompt=None, true_cfg=1.0):
    """The latents that diffusers samples, and how often it computed the first single block."""
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.enable_cache(config)
    seen = []
    layer = pipeline.transformer.single_transformer_blocks[0].proj_mlp
    layer.register_forward_hook(lambda *_: seen.append(1))
    prompts = [prompt] if isinstance(prompt, str) else prompt
    generators = [torch.Generator("cpu").manual_seed(7 + i) for i in range(len(prompts))]
    latents = pipeline(
        prompt, negative_prompt=negative_prompt, true_cfg_scale=true_cfg,
        width=64, height=48, num_inference_steps=10, max_sequence_length=24,
        generator=generators, output_type="latent").images
    return pipeline._unpack_latents(latents, 48, 64, pipeline.vae_scale_factor), len(seen)


CALLS = {
    "one": {},
    "true cfg": dict(negative_prompt="a blue cat", true_cfg=3.0),
    "batch": dict(prompt=["a red apple", "two owls at night"]),
}


@pytest.mark.parametrize("threshold", [0.45, 0.55, 0.9])
@pytest.mark.parametrize("call", CALLS)
def test_the_first_block_cache_equals_diffusers(folder, flux, threshold, call):
    cached = cache(flux, "first_block", threshold=threshold)
    ours, computed = counted(cached, FIRST_SINGLE, lambda: paint(cached, **CALLS[call]))
    theirs, expected = peer(folder, FirstBlockCacheConfig(threshold), **CALLS[call])
    assert computed == expected
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_the_thresholds_of_that_comparison_leave_out_some_steps_but_not_all(flux):
    """A random model's steps resemble each other little."""
    counts = []
    for threshold in (0.3, 0.45, 0.55, 0.9):
        cached = cache(flux, threshold=threshold)
        _, computed = counted(cached, FIRST_SINGLE, lambda cached=cached: paint(cached))
        counts.append(computed)
    assert counts[0] == 10 > counts[1] > counts[2] > counts[3]


@pytest.mark.parametrize("interval, warmup, order", [
    (5, 3, 1), (2, 1, 1), (3, 2, 2), (4, 3, 0), (2, 4, 3),
])
@pytest.mark.parametrize("call", CALLS)
def test_taylor_equals_diffusers_lite_form(folder, flux, interval, warmup, order, call):
    cached = cache(flux, "taylor", interval=interval, warmup=warmup, order=order)
    config = TaylorSeerCacheConfig(
        cache_interval=interval, disable_cache_before_step=warmup, max_order=order,
        taylor_factors_dtype=torch.float32, use_lite_mode=True)
    ours, computed = counted(cached, FIRST_SINGLE, lambda: paint(cached, **CALLS[call]))
    theirs, expected = peer(folder, config, **CALLS[call])
    assert computed == expected < 20
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_series_of_order_two_continues_a_parabola():
    """1, 4, 9 at the steps 1, 2, 3: differences 3, 5, of these 2, and 9 + 5 Δ + 2 Δ² / 2."""
    series = Series()
    for step, value in ((1, 1.0), (2, 4.0), (3, 9.0)):
        series.step = step
        series.update(torch.tensor([value]), order=2)
    series.step = 5
    assert [float(f) for f in series.factors] == [9, 5, 2]
    assert float(series.predict()) == 9 + 5 * 2 + 2 * 2**2 / 2


@pytest.mark.parametrize("method, off", [
    ("first_block", dict(threshold=0)),
    ("taylor", dict(interval=1)),
])
def test_a_cache_that_is_off_is_the_model_itself(flux, method, off):
    assert cache(flux, method, **off) is flux


def test_a_cache_that_never_finds_a_resemblance_changes_no_bit(flux):
    assert torch.equal(paint(cache(flux, threshold=1e-9)), paint(flux))
    assert torch.equal(paint(cache(flux, "taylor", warmup=10)), paint(flux))


METHODS = [("first_block", dict(threshold=0.55)), ("taylor", dict(interval=3))]


@pytest.mark.parametrize("method, settings", METHODS)
def test_each_call_begins_anew(flux, method, settings):
    cached = cache(flux, method, **settings)
    first = paint(cached)
    paint(cached, "two owls at night", width=32, height=32, steps=3)
    assert torch.equal(paint(cached), first)
    assert not torch.equal(first, paint(flux))


@pytest.mark.parametrize("method, settings", METHODS)
def test_nothing_is_remembered_when_a_call_is_over(flux, method, settings, monkeypatch):
    """Two streams during a call with true CFG, none afterwards."""
    states = weakref.WeakSet()
    lengths = []
    state_for = CacheStates.state_for

    def spy(self, inputs):
        states.add(state := state_for(self, inputs))
        return state

    monkeypatch.setattr(CacheStates, "state_for", spy)
    paint(cache(flux, method, **settings), true_cfg=2.0, negative_prompt="a cat",
          on_step=lambda *_: lengths.append(len(states)))
    assert lengths == [0] + [2] * 9
    assert len(states) == 0


@pytest.mark.parametrize("method, settings", METHODS)
def test_a_velocity_that_is_used_twice_begins_anew_where_the_time_rises(flux, method, settings):
    cached = cache(flux, method, **settings)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 16, 4, 4, generator=generator)
    txt = torch.randn(1, 5, 32, generator=generator)
    vec = torch.randn(1, 24, generator=generator)
    velocity = flow(cached.mmdit, txt, vec, 3.5, 4, 4)
    times = (1.0, 0.9, 0.8, 0.7, 0.6)
    first = [velocity(x, t) for t in times]
    second = [velocity(x, t) for t in times]
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("method, settings", METHODS)
def test_the_model_that_was_cached_stays_as_it_is(flux, method, settings):
    before = paint(flux)
    names = list(flux.mmdit.state_dict())
    cached = cache(flux, method, **settings)
    paint(cached)
    assert torch.equal(paint(flux), before)
    assert list(cached.mmdit.state_dict()) == names
    for a, b in zip(cached.mmdit.parameters(), flux.mmdit.parameters(), strict=True):
        assert a is b


def test_residuals_of_a_controlnet_are_added_once_and_are_those_of_the_step(flux):
    """Two steps with unlike residuals, the second not computed.

    Its result is that of a transformer whose other blocks add what they added in the first step.
    (diffusers adds the first step's residuals and the second's.)
    """
    mmdit = flux.mmdit
    generator = torch.Generator().manual_seed(0)
    img = torch.randn(1, 6, 64, generator=generator)
    txt = torch.randn(1, 5, 32, generator=generator)
    vec = torch.randn(1, 24, generator=generator)
    t = torch.tensor([0.5])
    guidance = torch.tensor([3.5])
    img_ids = torch.randint(0, 4, (6, 3))
    txt_ids = torch.zeros(5, 3, dtype=torch.int64)
    depth = mmdit.config.depth + mmdit.config.depth_single_blocks
    first, second = torch.randn(2, depth, 1, 6, 48, generator=generator)
    inputs = MMDiTInputs(img, txt, vec, t, guidance, img_ids, txt_ids, memory=CallMemory())
    in_first = inputs._replace(residuals=list(first))
    in_second = inputs._replace(residuals=list(second))

    starts = []                                 # after the first block
    ends = []                                   # before the last layer
    handles = [
        mmdit.double_blocks[0].register_forward_hook(lambda block, _, out: starts.append(out[0])),
        mmdit.final_layer.register_forward_pre_hook(lambda layer, given: ends.append(given[0])),
    ]
    mmdit(in_first)
    for handle in handles:
        handle.remove()
    start, = starts
    end, = ends
    others = end - start - sum(first)
    conditioning = mmdit.conditioning(vec, t, guidance)
    expected = mmdit.final_layer(start + others + sum(second), conditioning)

    cached = cache(flux, threshold=0.1).mmdit
    assert torch.equal(cached(in_first), mmdit(in_first))
    got = cached(in_second)
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (got - mmdit(in_second)).abs().max() > 1e-2 * expected.abs().max()


PEERS = {
    "first_block": FirstBlockCacheConfig(0.55),
    "taylor": TaylorSeerCacheConfig(
        cache_interval=3, taylor_factors_dtype=torch.float32, use_lite_mode=True),
}


@pytest.mark.parametrize("method, settings", METHODS)
@pytest.mark.parametrize("kind", ["ip adapter", "kontext"])
def test_further_keys_and_further_tokens_are_cached_as_diffusers_does(
        folder, tmp_path, method, settings, kind):
    save_file(ip_adapter_state(), tmp_path / "ip.safetensors")
    clip_vision().save_pretrained(tmp_path / "image_encoder")

    def adapt(flux):
        if kind == "ip adapter":
            flux = add_ip_adapter(flux, tmp_path / "ip.safetensors")
        return cache(flux, method, **settings)

    def adapt_theirs(pipeline):
        if kind == "ip adapter":
            encoder = str(tmp_path / "image_encoder")
            pipeline.load_ip_adapter(str(tmp_path), weight_name="ip.safetensors",
                                     image_encoder_dtype=torch.float32,
                                     image_encoder_pretrained_model_name_or_path=encoder)
            pipeline.set_ip_adapter_scale(1.0)
        pipeline.transformer.enable_cache(PEERS[method])
        # Of their pipelines only FluxPipeline does it itself.
        _set_cache_context(pipeline.transformer, CacheContext("cond"))

    both = dict(width=64, height=48, steps=8, output="latents",
                adapt=adapt, adapt_theirs=adapt_theirs)
    if kind == "kontext":
        got = difference(kontext_edit, FluxKontextPipeline, folder, {"image": EDGES},
                         auto_resize=False, max_area=64 * 48, **both)
    else:
        got = difference(generate, FluxPipeline, folder, {}, ours=dict(ip_image=EDGES),
                         theirs=dict(ip_adapter_image=EDGES), **both)
    assert got < 1e-4


@pytest.mark.parametrize("method, settings", METHODS)
def test_a_controlnet_and_a_batch_are_cached_and_without_skipped_steps_all_is_the_same(
        flux, net, method, settings):
    keywords = dict(prompt=["a red apple", "two owls"], num_images=2,
                    controlnet=(net, EDGES, 0.2, 0.0, 0.6))
    plain = paint(flux, **keywords)
    cached = cache(flux, method, **settings)
    got, computed = counted(cached, FIRST_SINGLE, lambda: paint(cached, **keywords))
    assert 1 < computed < 10
    assert not torch.allclose(got, plain, atol=1e-3)
    never = dict(threshold=1e-9) if method == "first_block" else dict(warmup=10)
    assert torch.equal(paint(cache(flux, method, **never), **keywords), plain)


@pytest.mark.parametrize("method, settings", METHODS)
def test_a_lora_may_be_added_before_or_after_the_cache(flux, tmp_path, method, settings):
    generator = torch.Generator().manual_seed(0)
    file = tmp_path / "lora.safetensors"
    state = {}
    for name in ("single_blocks.1.linear1", "double_blocks.1.img_attn.proj", "img_in"):
        layer = flux.mmdit.get_submodule(name)
        down = 0.1 * torch.randn(4, layer.in_features, generator=generator)
        up = 0.1 * torch.randn(layer.out_features, 4, generator=generator)
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, file)
    after = paint(cache(add_lora(flux, file), method, **settings))
    assert torch.equal(paint(add_lora(cache(flux, method, **settings), file)), after)
    assert not torch.allclose(after, paint(cache(flux, method, **settings)), atol=1e-3)


def test_bfloat16_stays_bfloat16(folder):
    flux = load(folder, device="cpu", dtype=torch.bfloat16)
    for method, settings in METHODS:
        assert torch.isfinite(paint(cache(flux, method, **settings))).all()


@pytest.mark.parametrize("arguments, sentence", [
    (("second_block",), "there is no cache 'second_block': expected one of first_block, taylor"),
    (("first_block", dict(interval=3)),
     "the cache 'first_block' has no interval: expected threshold"),
    (("taylor", dict(threshold=0.1)),
     "the cache 'taylor' has no threshold: expected interval, warmup, order"),
    (("first_block", dict(threshold=-0.1)), "threshold is -0.1: expected a number from 0 to 10"),
    (("first_block", dict(threshold=float("nan"))), "threshold is nan"),
    (("taylor", dict(interval=2.5)), "interval is 2.5: expected a whole number"),
    (("taylor", dict(warmup=0)), "warmup is 0: expected a whole number from 1"),
])
def test_wrong_settings_get_one_sentence(flux, arguments, sentence):
    method, settings = (*arguments, {})[:2]
    with pytest.raises(ValueError, match=sentence):
        cache(flux, method, **settings)


def test_a_second_cache_gets_one_sentence(flux):
    with pytest.raises(ValueError, match="this model is cached already"):
        cache(cache(flux), "taylor")


def command(folder, path, *flags):
    usual = "--device cpu --width 64 --height 48 --steps 6 --max-text-tokens 8 --quiet".split()
    argv = ["a red apple", "--model", str(folder), *usual, "--output", str(path), *flags]
    cli.run(parser("generate", ""), generate, argv=argv)


@pytest.mark.parametrize("flags, method, settings", [
    (["--cache", "taylor", "--cache-interval", "2"], "taylor", dict(interval=2)),
    (["--cache-threshold", "0.55", "--tile", "32"], "first_block", dict(threshold=0.55)),
    (["--cache", "first_block"], "first_block", {}),
])
def test_the_commands_flags_are_the_functions_keywords(
        folder, flux, tmp_path, flags, method, settings):
    command(folder, tmp_path / "a.png", *flags)
    cached = cache(tile(flux, 32) if "--tile" in flags else flux, method, **settings)
    expected, = paint(cached, steps=6, seed=0, max_text_tokens=8, output="pil")
    with Image.open(tmp_path / "a.png") as image:
        assert image.tobytes() == expected.tobytes()
        for flag in flags:
            assert flag in image.text["command"]


@pytest.mark.parametrize("flags, sentence", [
    (["--cache", "taylor", "--cache-threshold", "0.1"], "the cache 'taylor' has no threshold"),
    (["--cache-interval", "2"], "the cache 'first_block' has no interval"),
    (["--tile", "33"], "the size of a tile is 33: expected a multiple of 32 pixels"),
    (["--shard"], "this process is alone: start several with `torchrun"),
    (["--shard", "--offload", "block"], "--shard and --offload both place the weights"),
])
def test_wrong_flags_get_one_line(folder, tmp_path, capsys, flags, sentence):
    with pytest.raises(SystemExit) as stop:
        command(folder, tmp_path / "a.png", *flags)
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert sentence in error[-1]
    assert not list(tmp_path.iterdir())
