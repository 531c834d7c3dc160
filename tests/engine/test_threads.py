"""Calls from several threads on one model. Oracle: the same calls one after the other.

Every pair of features that can be combined samples from four threads at once."""

import copy
import itertools
import pickle
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from reference import clip_vision, ip_adapter_state, small_pipeline
from safetensors.torch import save_file

from miniflux import add_ip_adapter, add_lora, generate, load, quantize
from miniflux.checkpoints.formats import meta_tensors
from miniflux.engine.caching import cache
from miniflux.engine.compiling import compile
from miniflux.engine.features import NOT_AFTER, check_order, mark
from miniflux.engine.modulation import precompute_modulation
from miniflux.engine.offload import offload
from miniflux.engine.tiling import tile
from miniflux.networks.attention import attention_backend
from miniflux.networks.mmdit import MMDiT, MMDiTConfig

PROMPTS = ("a red apple", "two owls at night", "a cat", "a blue car")
SIZES = MMDiTConfig(vec_in_dim=24, context_in_dim=32, hidden_size=64, num_heads=2,
                    depth=2, depth_single_blocks=2, axes_dim=(4, 14, 14))
STORED = ("lora", "unmerged lora", "int8", "ip", "modulation", "compile",
          "first block", "taylor", "tile")
FEATURES = (*STORED, "offload block", "offload leaf", "offload disk")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("threads") / "flux")


@pytest.fixture(scope="module")
def flux(folder):
    torch.manual_seed(0)
    return replace(load(folder, device="cpu"), mmdit=MMDiT(SIZES).eval().requires_grad_(False))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    path = tmp_path_factory.mktemp("features")
    draw = torch.Generator().manual_seed(5)
    lora = path / "lora.safetensors"
    name = "diffusion_model.double_blocks.0.img_attn.qkv.lora_{}.weight"
    save_file({
        name.format("A"): torch.randn(4, 64, generator=draw),
        name.format("B"): torch.randn(192, 4, generator=draw),
    }, lora)
    save_file(ip_adapter_state(hidden=64), path / "ip.safetensors")
    clip_vision().save_pretrained(path / "image_encoder")
    return {
        "lora": lambda flux: add_lora(flux, lora, name="merged"),
        "unmerged lora": lambda flux: add_lora(flux, lora, name="unmerged", merge=False),
        "int8": lambda flux: quantize(flux, "int8"),
        "ip": lambda flux: add_ip_adapter(flux, path / "ip.safetensors"),
        "modulation": precompute_modulation,
        "compile": lambda flux: compile(flux, backend="eager"),
        "first block": lambda flux: cache(flux, "first_block", threshold=0.5),
        "taylor": lambda flux: cache(flux, "taylor", interval=2, warmup=1),
        "tile": lambda flux: tile(flux, 32),
        "offload block": lambda flux: offload(flux, "cpu", "block", dtype=torch.float64),
        "offload leaf": lambda flux: offload(flux, "cpu", "leaf"),
        "offload disk": lambda flux: offload(flux, "cpu", "disk"),
    }


def sample(flux, i: int, **settings) -> torch.Tensor:
    usual = dict(width=48 + 16 * (i % 2), height=48, steps=3, seed=i, max_text_tokens=8,
                 output="tensor", progress=False)
    settings = usual | settings
    if i == 3:
        settings |= dict(negative_prompt="an owl", true_cfg=2.0)
    if flux.ip_adapters:
        image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(i))
        settings |= dict(ip_image=image)
    return generate(flux, PROMPTS[i], **settings)


def in_threads(function, inputs) -> list:
    """function(x) for all inputs at once: for each its result, or its error.
    Threads change places every few microseconds."""
    results = {}

    def run(i, x):
        try:
            results[i] = function(x)
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(inputs)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return [results[i] for i in range(len(results))]


@pytest.fixture(scope="module")
def exclusive():
    """Pairs that one model cannot have both of."""
    pairs = [
        ("first block", "taylor"),
        ("offload block", "offload leaf"),
        ("offload block", "offload disk"),
        ("offload leaf", "offload disk"),
    ]
    return {frozenset(pair) for pair in pairs}


# Compiling takes seconds, so it meets only those that act within the blocks or around them.
WITH_COMPILE = {"unmerged lora", "int8", "first block", "offload block"}
PAIRS = [pair for pair in itertools.combinations(FEATURES, 2)
         if "compile" not in pair or WITH_COMPILE & set(pair)]


@pytest.mark.parametrize("first, second", PAIRS)
def test_four_threads_sample_what_one_samples_with_two_features(
        flux, features, exclusive, first, second):
    if {first, second} in exclusive:
        with pytest.raises(ValueError, match="already"):
            features[second](features[first](flux))
        return
    model = features[second](features[first](flux))
    expected = [sample(model, i) for i in range(4)]
    for i, result in enumerate(in_threads(lambda i: sample(model, i), [*range(4)])):
        assert isinstance(result, torch.Tensor), result
        # Note: the sizes that a graph is compiled for depend on the order of the calls,
        # and the rounding on those sizes.
        bound = 1e-5 if "compile" in (first, second) else 0
        assert (result - expected[i]).abs().max() <= bound


def test_each_thread_has_an_attention_backend_of_its_own(flux):
    backends = "formula", "sdpa", "chunked", "auto"

    def with_backend(i):
        with attention_backend(backends[i]):
            return sample(flux, i, steps=6)

    expected = [with_backend(i) for i in range(4)]
    for result, one in zip(in_threads(with_backend, [*range(4)]), expected):
        assert torch.equal(result, one)


def test_threads_load_with_and_without_numbers_at_once(folder):
    def kind(i):
        with meta_tensors() if i % 2 else nullcontext():
            mmdit = load(folder, device="cpu").mmdit
        return {tensor.device.type for tensor in mmdit.parameters() if tensor.ndim == 2}

    def stay(tensor, device, dtype):
        return tensor

    with pytest.MonkeyPatch.context() as patch:             # meta tensors are not moved to the CPU
        patch.setattr("miniflux.checkpoints.building.place", stay)
        assert in_threads(kind, [*range(8)]) == [{"cpu"}, {"meta"}] * 4


# ------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("feature", STORED)
@pytest.mark.parametrize("store", [
    copy.deepcopy,
    lambda flux: pickle.loads(pickle.dumps(flux)),
], ids=["deepcopy", "pickle"])
def test_a_model_with_any_feature_that_can_be_stored_is_copied_and_pickled(
        flux, features, feature, store):
    model = features[feature](flux)
    copied = store(model)
    for parameter in copied.mmdit.parameters():
        assert all(parameter is not other for other in model.mmdit.parameters())
    # Note: not bit for bit. The order of a sum may depend on the addresses of the weights.
    assert (sample(copied, 0) - sample(model, 0)).abs().max() < 1e-5


def test_a_copy_has_a_modulation_of_its_own(flux):
    model = precompute_modulation(flux)
    copied, = copy.deepcopy(model).mmdit.precomputed
    original, = model.mmdit.precomputed
    assert copied.layers[0].lin.weight is not original.layers[0].lin.weight


@pytest.mark.parametrize("store, sentence", [
    (copy.deepcopy, "cannot be changed any more"),
    (pickle.dumps, "cannot be pickled"),
])
def test_an_offloaded_model_is_not_stored(flux, store, sentence):
    with pytest.raises(ValueError, match=f"an offloaded model {sentence}"):
        store(offload(flux, "cpu", "block"))


# -------------------------------------------------------------------------------- order


TOO_LATE = [(feature, other) for feature in NOT_AFTER for other in NOT_AFTER[feature]]


@pytest.mark.parametrize("feature, other", TOO_LATE)
def test_a_feature_that_comes_too_late_gets_one_sentence(flux, feature, other):
    mmdit = copy.copy(flux.mmdit)
    mark(mmdit, other)
    sentence = f"this model is {other} already, and then cannot be {feature}"
    with pytest.raises(ValueError, match=sentence):
        check_order(replace(flux, mmdit=mmdit), feature)


# ------------------------------------------------------------------------------- growth


RESIDENT = """
import gc, re, sys
from pathlib import Path
from miniflux import cache, generate, load, tile
from miniflux.engine.modulation import precompute_modulation

def resident():
    gc.collect()
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

def once(i):
    flux = tile(cache(precompute_modulation(load(sys.argv[1], device="cpu")), threshold=0.3), 32)
    generate(flux, f"number {i}", width=32, height=32, steps=2, max_text_tokens=8, progress=False)

for i in range(40):
    once(i)
before = resident()
for i in range(200):
    once(i)
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_two_hundred_loads_and_calls_take_no_more_memory(folder):
    """A model of this size has 1 MB of weights."""
    command = [sys.executable, "-c", RESIDENT, str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 8 * 2**20
