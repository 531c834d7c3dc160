"""Offloading. Oracles: the model without it, whose images are the same bit for bit;
the meta device in the place of a GPU, which shows where each tensor is;
a made-up CUDA that logs what happens in which order;
the system's own count of resident memory.
"""

import contextlib
import copy
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from PIL import Image
from reference import clip_vision, controlnet, ip_adapter_state, small_pipeline, small_redux
from safetensors.torch import save_file
from torch import nn

from miniflux import (
    Prompt,
    add_ip_adapter,
    add_lora,
    add_redux,
    generate,
    image_to_image,
    load,
    load_controlnet,
    redux,
)
from miniflux.checkpoints import formats
from miniflux.checkpoints.formats import read_safetensors
from miniflux.checkpoints.quantized import QuantizedLinear
from miniflux.engine import offload as module
from miniflux.engine.modulation import PrecomputedModulation
from miniflux.engine.offload import MODES, Offloader, change_networks, offload, offload_units, slots
from miniflux.engine.pages import is_within, mapped_ranges
from miniflux.engine.quantize import quantize
from miniflux.engine.tiling import tile
from miniflux.engine.wrapping import wrap_in_place
from miniflux.flux import Flux, FluxConfig
from miniflux.networks.mmdit import MMDiT, MMDiTConfig
from miniflux.prompt import encode_prompt

SMALL = dict(width=64, height=48, steps=2, max_text_tokens=8, output="tensor", progress=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("offload") / "flux", layers=(2, 3))


@pytest.fixture(scope="module")
def flux(folder):
    return load(folder, device="cpu")


@pytest.fixture(autouse=True)
def in_proportion(monkeypatch):
    """The small model has few tensors as large as those that would go."""
    monkeypatch.setattr(module, "SMALL", 1000)


def networks(flux):
    found = []
    change_networks(flux, lambda network: found.append(network) or network)
    return [*found, *getattr(flux.mmdit, "precomputed", ())]


def devices(part) -> set[str]:
    """Where the large tensors of a part are; of the transformer, those of its blocks."""
    parts = [part.double_blocks, part.single_blocks] if isinstance(part, MMDiT) else [part]
    large = [t for part in parts for *_, t in slots(part) if t.numel() > module.SMALL]
    return {tensor.device.type for tensor in large}


# ----------------------------------------------------------------------- the same image


@pytest.mark.parametrize("mode", MODES)
def test_an_image_is_the_same_bit_for_bit(flux, mode):
    offloaded = offload(flux, "cpu", mode)
    keywords = SMALL | dict(negative_prompt="an owl", true_cfg=2.0)
    expected = generate(flux, "a red apple", **keywords)
    for _ in range(2):                          # the second call finds what the first has left
        assert torch.equal(generate(offloaded, "a red apple", **keywords), expected)


@pytest.mark.parametrize("mode", MODES)
def test_parts_that_are_converted_as_they_come_equal_those_that_were_loaded_so(folder, mode):
    """From bfloat16 to float32, in which all of its numbers are exact."""
    def rounded(network):
        return network.bfloat16().requires_grad_(False)

    stored = change_networks(load(folder, device="cpu"), rounded)
    converted = change_networks(load(folder, device="cpu"), lambda part: rounded(part).float())
    offloaded = offload(stored, "cpu", mode, dtype=torch.float32)
    got = generate(offloaded, "a red apple", **SMALL)
    expected = generate(converted, "a red apple", **SMALL)
    assert got.dtype == torch.float32
    assert torch.allclose(got, expected, atol=1e-5)
    assert encode_prompt(offloaded, "a red apple", 8).txt.dtype == torch.float32


def tensors_of(flux) -> list[tuple[str, int]]:
    """The name and the identity of every tensor."""
    return [(name, id(tensor)) for network in networks(flux) for _, name, tensor in slots(network)]


def test_the_given_model_stays_as_it_is(flux):
    before = tensors_of(flux)
    for mode in MODES:
        generate(offload(flux, "cpu", mode, dtype=torch.bfloat16), "an owl", **SMALL)
        offload(flux, "meta", mode)
    assert before == tensors_of(flux)
    assert not any("forward" in vars(network) for network in networks(flux))


def test_an_interrupted_call_leaves_a_model_that_works(flux):
    def stop(step, t, x):
        raise KeyboardInterrupt

    offloaded = offload(flux, "cpu", "block", dtype=torch.bfloat16)
    expected = generate(offloaded, "an owl", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        generate(offloaded, "an owl", **SMALL, on_step=stop)
    assert torch.equal(generate(offloaded, "an owl", **SMALL), expected)


# ---------------------------------------------------------------------- what lies where


@pytest.fixture
def without_numbers(monkeypatch):
    """A time on meta has no value: each row of the modulation is computed when it is needed."""
    at = PrecomputedModulation.at

    def without_time(self, inputs):
        return at(self, inputs._replace(time=None))

    monkeypatch.setattr(PrecomputedModulation, "at", without_time)


def before_it_runs(part, function):
    """Calls function(part) once the part has been loaded."""
    def wrapper(module, call, *inputs, **named):
        function(module)
        return call(*inputs, **named)

    wrap_in_place(part, "forward", wrapper, innermost=True)


def test_of_the_modulation_alone_one_layer_at_a_time_is_on_the_device(flux, without_numbers):
    offloaded = offload(flux, "meta", "modulation")
    *resident, modulations = networks(offloaded)
    turning = offload_units(modulations, "modulation")
    alone = []                                  # for each call, whether no other layer was there

    def look(layer):
        here = [part for part in turning if "meta" in devices(part)]
        alone.append(here == [layer])

    for layer in turning:
        before_it_runs(layer, look)
    z = generate(offloaded, "an owl", **SMALL | dict(output="latents"))
    assert z.device.type == "meta"
    assert len(alone) >= len(turning)
    assert all(alone)
    assert devices(modulations) == {"cpu"}
    assert all(devices(network) == {"meta"} for network in resident)


@pytest.mark.parametrize("mode", MODES[1:])
def test_one_part_at_a_time_is_on_the_device(flux, mode, without_numbers):
    """The device is meta, on which the networks run without numbers.
    Beside the part there is at most one modulation layer."""
    offloaded = offload(flux, "meta", mode)
    seen = {}                                   # for each part that ran, the parts that were there

    def parts_of(group):
        units = [unit for network in group for unit in offload_units(network, mode)]
        return [unit for unit in units if "forward" in vars(unit)]

    def watch(group):
        def look(part):
            seen[part] = [other for other in group if "meta" in devices(other)]

        for part in group:
            before_it_runs(part, look)

    *others, modulations = networks(offloaded)
    parts = parts_of(others)
    layers = parts_of([modulations])
    watch(parts)
    watch(layers)
    z = generate(offloaded, "an owl", **SMALL | dict(output="latents"))
    assert z.device.type == "meta"
    offloaded.autoencoder.decode(z)
    for part, here in seen.items():
        assert here in ([part], []), "a part runs while another one is there"
    assert sum(len(here) for here in seen.values()) > 5
    assert {*parts, *layers} - {*seen} == {offloaded.autoencoder.encoder}
    for network in networks(offloaded):
        if network is not offloaded.autoencoder:
            assert devices(network) == {"cpu"}


@pytest.mark.parametrize("mode", MODES[1:])
def test_what_is_small_stays_on_the_device_and_shows_where_the_model_is(flux, mode):
    offloaded = offload(flux, "meta", mode, dtype=torch.bfloat16)
    weight = offloaded.mmdit.img_in.weight
    assert (weight.device.type, weight.dtype) == ("meta", torch.bfloat16)
    bias = offloaded.t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    scale = offloaded.mmdit.double_blocks[0].img_attn.norm.query_norm.scale
    for small in (bias, scale, next(offloaded.autoencoder.parameters())):
        assert small.device.type == "meta"
    assert devices(offloaded.mmdit.double_blocks[0]) == {"cpu"}


# ---------------------------------------------------------------------------- with CUDA


class MadeUpCUDA:
    """Streams and events that only log each call, with their number in the log."""

    def __init__(self, monkeypatch):
        log = self.log = []

        class Stream:
            def __init__(self, device=None, name="copies"):
                self.name = name

            def wait_stream(self, other):
                log.append(("wait", self.name, other.name))

        class Event:
            def record(self, stream):
                self.number = len(log)
                log.append(("record", stream.name))

            def synchronize(self):
                log.append(("synchronize", self.number))

        def stream(chosen):
            return contextlib.nullcontext()

        def current_stream(device):
            return Stream(name="compute")

        def synchronize(device):
            log.append(("synchronize", "all"))

        for replacement in (Stream, Event, stream, current_stream, synchronize):
            monkeypatch.setattr(torch.cuda, replacement.__name__, replacement)


@pytest.fixture
def cuda(monkeypatch, without_numbers) -> list:
    """The log of a made-up CUDA, whose device is meta."""
    log = MadeUpCUDA(monkeypatch).log
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(module, "find_device", lambda name: types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(Offloader, "copy", lambda self, tensor: tensor.to("meta"))
    monkeypatch.setattr(Offloader, "to_device", lambda self, value: meta(value))
    return log


def test_with_cuda_the_next_block_is_copied_while_the_present_one_computes(flux, cuda, monkeypatch):
    """At most two blocks are there. The copy of a block begins when the block before has been
    started, and the one before that, whose place it takes, has finished.
    Nothing computes before its copy has arrived."""
    blocks: list = []
    load = Offloader.load

    def spy(self, part):
        if part in blocks:
            cuda.append(("copy", blocks.index(part)))
        load(self, part)

    monkeypatch.setattr(Offloader, "load", spy)
    offloaded = offload(flux, "cuda", "block")
    blocks += [*offloaded.mmdit.double_blocks, *offloaded.mmdit.single_blocks]

    def log_run(block):
        here = {j for j, other in enumerate(blocks) if "meta" in devices(other)}
        cuda.append(("run", blocks.index(block), here))

    for block in blocks:
        before_it_runs(block, log_run)
    generate(offloaded, "an owl", **SMALL | dict(output="latents"))

    order = [*range(len(blocks))] * 2
    runs = [entry for entry in cuda if entry[0] == "run"]
    assert [i for _, i, _ in runs] == order
    # Each block is copied before it is called, while the one before computes;
    # after the last step, the first one is copied once more.
    expected = []
    for i in order:
        expected += [("copy", i), ("run", i)]
    expected.append(("copy", 0))
    assert [entry[:2] for entry in cuda if entry[0] in ("copy", "run")] == expected
    for _, i, here in runs:
        assert i in here
        assert here <= {i, (i - 1) % len(blocks)}
    for entry in runs:
        assert cuda[cuda.index(entry) - 1] == ("wait", "compute", "copies")  # its copy has arrived
    copies = [place for place, entry in enumerate(cuda) if entry[0] == "copy"]
    for place in copies[2:]:
        recorded, (action, number) = cuda[place - 2:place]
        assert recorded == ("record", "compute")
        assert action == "synchronize"
        assert number < place - 2


def test_with_cuda_the_order_of_layers_is_learnt_in_the_first_step(flux, cuda):
    """Layers are not called in the order in which they are defined.
    One that was not expected costs a synchronisation."""
    begun = []

    def on_step(*_):
        begun.append(len(cuda))

    offloaded = offload(flux, "cuda", "leaf")
    generate(offloaded, "an owl", **SMALL | dict(output="latents", steps=3), on_step=on_step)
    steps = [cuda[begin:end] for begin, end in zip(begun, [*begun[1:], None])]
    first, *rest = [step.count(("synchronize", "all")) for step in steps]
    assert first > 2
    assert rest == [2, 2]                       # those of the modulation, where it begins and ends


def meta(value):
    if isinstance(value, list | tuple):
        moved = map(meta, value)
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value.to("meta") if isinstance(value, torch.Tensor) else value


# -------------------------------------------------------------------------------- pages


@pytest.mark.skipif(sys.platform != "linux", reason="reads the mappings from /proc")
class TestPages:
    def test_tensors_of_a_file_are_known_and_those_in_memory_are_not(self, tmp_path):
        path = tmp_path / "a.safetensors"
        save_file({"a": torch.randn(300, 100), "b": torch.randn(300, 100)}, path)
        tensors = read_safetensors(path, lambda name: name == "b")
        ranges = mapped_ranges()
        assert is_within(tensors["a"], ranges)
        assert is_within(tensors["b"], ranges)
        assert not is_within(torch.randn(300, 100), ranges)

    def test_a_mapped_tensor_that_was_changed_is_not_given_back(self, tmp_path):
        """The change is in memory only."""
        save_file({"a": torch.randn(300, 100)}, tmp_path / "a.safetensors")
        a = read_safetensors(tmp_path / "a.safetensors")["a"]
        a[0, 0] = 5
        assert not is_within(a, mapped_ranges())

    def test_pages_that_were_given_back_are_read_again(self, tmp_path):
        offloader = Offloader(torch.device("cpu"), None, True, "disk")
        slot = ({"a": nn.Parameter(torch.randn(300, 1000), requires_grad=False)}, "a")
        before = slot[0]["a"].clone()
        offloader.map([(*slot, slot[0]["a"])])
        offloader.pages.drop(slot[0]["a"])
        assert torch.equal(slot[0]["a"], before)
        assert slot[0]["a"].data_ptr() in offloader.pages.mapped

    def test_memory_that_is_not_mapped_is_never_given_back(self):
        offloader = Offloader(torch.device("cpu"), None, True, "disk")
        a = torch.ones(300, 1000)
        offloader.pages.drop(a)
        assert a.sum() == 300_000


def test_too_little_disk_for_what_is_not_in_a_file_is_said_in_one_sentence(flux, monkeypatch):
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(formats.shutil, "disk_usage", lambda folder: usage)
    sentence = "of this model are not in a file as they are, and .* has 0.0 GB free: set TMPDIR"
    with pytest.raises(ValueError, match=sentence):
        offload(flux, "cpu", "disk")


MEASURE = """
import json, re, sys, torch
from pathlib import Path
from miniflux.checkpoints.layouts import load_mmdit
from miniflux.engine.offload import offload
from miniflux.flux import Flux, FluxConfig
from miniflux import Prompt, generate

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = kib("VmRSS")
mmdit = load_mmdit(Path(sys.argv[1]), "cpu", torch.bfloat16)
flux = Flux(None, None, None, None, mmdit, None, FluxConfig())
prompt = Prompt(torch.randn(1, 8, 64), torch.randn(1, 24))
if sys.argv[2] != "whole":
    flux = offload(flux, "cpu", sys.argv[2], dtype=getattr(torch, sys.argv[3]))
z = generate(flux, prompt, width=64, height=64, steps=2, output="latents", progress=False)
assert z.isfinite().all()
print(json.dumps([1024 * (kib("VmHWM") - before), 1024 * (kib("VmRSS") - before)]))
"""


@pytest.fixture(scope="module")
def twelve_blocks(tmp_path_factory):
    """A transformer of 318 MB in bfloat16.
    A double block without its modulation has 28 MB, in float32 57."""
    torch.manual_seed(0)
    config = MMDiTConfig(context_in_dim=64, vec_in_dim=24, hidden_size=768, num_heads=6,
                         depth=4, depth_single_blocks=8)
    path = tmp_path_factory.mktemp("twelve") / "flux1-small.safetensors"
    save_file(MMDiT(config).bfloat16().state_dict(), path)
    return path


def resident(path, *arguments: str) -> tuple[int, int]:
    """Bytes at most, and at the end, of a process that generates an image."""
    # Note: with this threshold the system gets freed memory back at once, as it does with weights
    # of FLUX.1's size. Of smaller ones the allocator keeps some, by chance.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
    command = [sys.executable, "-c", MEASURE, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_from_disk_a_few_blocks_are_in_memory_and_not_the_model(twelve_blocks, dtype):
    size = twelve_blocks.stat().st_size
    whole, disk = (resident(twelve_blocks, mode, dtype)[0] for mode in ("whole", "disk"))
    assert whole > size  # each weight is touched
    # Measured: 0.2 and 0.3 of the file, of which the first calls of the libraries are a part.
    assert disk < 0.3 * size if dtype == "bfloat16" else disk < 0.45 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_on_the_cpu_the_modulation_is_read_from_the_file_and_leaves_memory(twelve_blocks):
    """27% of the parameters modulate: 16 layers of 3 x 768 x 768 in the double blocks,
    8 in the single blocks, and one of 2 x 768 x 768 at the end."""
    modulation = 2 * (16 * 3 + 8 * 3 + 2) * 768 * 768
    whole, rest = (resident(twelve_blocks, mode, "bfloat16") for mode in ("whole", "modulation"))
    assert all(0.9 * modulation < a - b < 1.1 * modulation for a, b in zip(whole, rest))


# ----------------------------------------------------------------------------- the rest


def lora_file(path, mmdit, rank: int = 2):
    generator = torch.Generator().manual_seed(0)
    names = ("double_blocks.0.img_attn.qkv", "double_blocks.1.img_mod.lin",
             "single_blocks.1.linear1")
    state = {}
    for name in names:
        layer = mmdit.get_submodule(name)
        down = torch.randn(rank, layer.in_features, generator=generator) / 4
        up = torch.randn(layer.out_features, rank, generator=generator) / 4
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, path)
    return path


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("merge", [True, False])
def test_loras_go_along(flux, tmp_path, mode, merge):
    changed = add_lora(flux, lora_file(tmp_path / "a.safetensors", flux.mmdit), merge=merge)
    expected = generate(changed, "an owl", **SMALL)
    assert torch.equal(generate(offload(changed, "cpu", mode), "an owl", **SMALL), expected)
    assert not torch.allclose(expected, generate(flux, "an owl", **SMALL), atol=1e-3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_quantised_layers_travel_packed(flux, mode, form):
    packed = quantize(flux, form)
    offloaded = offload(packed, "cpu", mode)
    expected = generate(packed, "an owl", **SMALL)
    assert torch.equal(generate(offloaded, "an owl", **SMALL), expected)
    assert any(isinstance(layer, QuantizedLinear) for layer in offloaded.mmdit.modules())


def test_with_a_dtype_packed_layers_unpack_to_it(flux):
    stored = change_networks(flux, lambda network: copy.deepcopy(network).bfloat16())
    offloaded = offload(quantize(stored, "int8"), "cpu", "disk", dtype=torch.float32)
    assert generate(offloaded, "an owl", **SMALL).isfinite().all()
    for layer in offloaded.mmdit.modules():
        if isinstance(layer, QuantizedLinear):
            assert layer.weight.dtype == torch.float32


@pytest.mark.parametrize("mode", MODES)
def test_tiling_goes_before_or_after(flux, mode):
    expected = generate(tile(flux, 32), "an owl", **SMALL)
    before = offload(tile(flux, 32), "cpu", mode)
    after = tile(offload(flux, "cpu", mode), 32)
    assert torch.equal(generate(before, "an owl", **SMALL), expected)
    assert torch.equal(generate(after, "an owl", **SMALL), expected)


def test_what_would_change_an_offloaded_model_is_refused_in_one_sentence(flux, tmp_path):
    offloaded = offload(flux, "cpu", "block")
    file = lora_file(tmp_path / "a.safetensors", flux.mmdit)
    with pytest.raises(ValueError, match="add LoRAs"):
        add_lora(offloaded, file)
    sentence = ("an offloaded model cannot be changed any more: "
                "add LoRAs, quantise and copy it before")
    with pytest.raises(ValueError, match=sentence):
        copy.deepcopy(offloaded.t5)
    sentence = ("is offloaded already, and then cannot be offloaded: "
                "use the model as it was before")
    with pytest.raises(ValueError, match=sentence):
        offload(offloaded, "cpu", "model")


@pytest.mark.parametrize("device, mode, message", [
    ("cpu", "blocks", "the mode is 'blocks': expected one of modulation, model, block, leaf, disk"),
    ("abacus", "block", "the device 'abacus' cannot be used here"),
])
def test_mistakes_are_answered_in_one_sentence(flux, device, mode, message):
    with pytest.raises(ValueError, match=message):
        offload(flux, device, mode)


def test_a_model_that_lies_on_the_device_is_refused(flux):
    moved = change_networks(flux, lambda network: copy.deepcopy(network).to("meta"))
    with pytest.raises(ValueError, match='this model lies on meta: load it with device="cpu"'):
        offload(moved, "cpu")


def test_images_are_encoded_by_an_offloaded_model_too(flux):
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    expected = image_to_image(flux, "an owl", image, **SMALL)
    for mode in MODES:
        offloaded = offload(flux, "cpu", mode)
        assert torch.equal(image_to_image(offloaded, "an owl", image, **SMALL), expected)


@pytest.fixture(scope="module")
def extras(folder, tmp_path_factory):
    """The small model with Redux and an IP-Adapter, and a ControlNet for it."""
    path = tmp_path_factory.mktemp("extras")
    clip_vision().save_pretrained(path / "image_encoder")
    save_file(ip_adapter_state(), path / "ip.safetensors")
    controlnet().save_pretrained(path / "net")
    flux = add_redux(load(folder, device="cpu"), small_redux(path / "redux"))
    flux = add_ip_adapter(flux, path / "ip.safetensors")
    return flux, load_controlnet(path / "net", device="cpu")


@pytest.fixture
def image():
    return Image.effect_noise((40, 30), 90).convert("RGB")


@pytest.mark.parametrize("mode", MODES)
def test_redux_ip_adapters_and_controlnets_go_along(extras, image, mode):
    flux, net = extras
    keywords = SMALL | dict(ip_image=image, controlnet=(net, image))
    offloaded = offload(flux, "cpu", mode)
    assert torch.equal(redux(offloaded, image, **SMALL), redux(flux, image, **SMALL))
    expected = generate(flux, "an owl", **keywords)
    offloaded = offload(flux, "cpu", mode)
    assert torch.equal(generate(offloaded, "an owl", **keywords), expected)


@pytest.mark.parametrize("mode", MODES)
def test_redux_and_ip_adapters_are_converted_too(extras, image, mode):
    """From bfloat16 to float32: the images are those of the weights rounded to bfloat16,
    computed in float32."""
    def rounded(network):
        return copy.deepcopy(network).bfloat16()

    flux, _ = extras
    stored = change_networks(flux, rounded)
    exact = change_networks(flux, lambda network: rounded(network).float())

    offloaded = offload(stored, "cpu", mode, dtype=torch.float32)
    expected = redux(exact, image, **SMALL)
    assert torch.allclose(redux(offloaded, image, **SMALL), expected, atol=1e-4)

    offloaded = offload(stored, "cpu", mode, dtype=torch.float32)
    expected = generate(exact, "an owl", ip_image=image, **SMALL)
    got = generate(offloaded, "an owl", ip_image=image, **SMALL)
    assert torch.allclose(got, expected, atol=1e-4)


# ----------------------------------------------------------------------------- on a GPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
class TestOnAGPU:
    @pytest.mark.parametrize("prefetch", [True, False])
    @pytest.mark.parametrize("mode", MODES)
    def test_an_image_is_that_of_the_whole_model_on_it(self, folder, mode, prefetch):
        whole = load(folder, device="cuda")
        stored = load(folder, device="cpu", dtype=torch.bfloat16)
        offloaded = offload(stored, "cuda", mode, prefetch=prefetch)
        for seed in range(3):
            expected = generate(whole, "an owl", seed=seed, **SMALL)
            assert torch.equal(generate(offloaded, "an owl", seed=seed, **SMALL), expected)

    @pytest.mark.parametrize("mode", ["block", "leaf", "disk"])
    def test_a_few_blocks_are_on_it_at_most(self, mode):
        config = MMDiTConfig(context_in_dim=64, vec_in_dim=24, hidden_size=1536, num_heads=12,
                             depth=4, depth_single_blocks=24)
        mmdit = MMDiT(config).bfloat16().requires_grad_(False)
        size = sum(p.nbytes for p in mmdit.parameters())
        whole = Flux(None, None, None, None, mmdit, None, FluxConfig())
        flux = offload(whole, "cuda", mode)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        prompt = Prompt(torch.randn(1, 8, 64), torch.randn(1, 24))
        keywords = dict(width=64, height=64, steps=3, output="latents", progress=False)
        assert generate(flux, prompt, **keywords).isfinite().all()
        assert torch.cuda.max_memory_reserved() < size / 4
