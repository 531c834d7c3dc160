"""Plans. Oracles: by hand, for the official sizes; and the peak of all tensors that are alive while a small model runs, each of them
counted when an operation makes it and when it goes."""

import copy
import json
import logging
import subprocess
import sys
import weakref

import pytest
import torch
from reference import small_pipeline
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from miniflux import Prompt, generate, load
from miniflux.checkpoints.formats import meta_tensors, read_safetensors
from miniflux.checkpoints.saving import write_mmdit
from miniflux.engine.offload import change_networks, offload, slots
from miniflux.engine.plan import GIB, MARGIN, WAYS, activations, expect, nbytes
from miniflux.engine.quantize import quantize
from miniflux.flux import Flux, FluxConfig
from miniflux.loading import assemble_meta
from miniflux.networks.attention import attention_backend
from miniflux.networks.autoencoder import Autoencoder, AutoencoderConfig
from miniflux.networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs
from miniflux.networks.t5 import T5, T5Config
from miniflux.plan import main, report

SMALL = dict(width=64, height=48, steps=2, max_text_tokens=8, output="tensor", progress=False)


class Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that operations have made and that are still there; `peak` is the most."""

    def __init__(self, *known):
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in known}
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor) and (key := (storage := tensor.untyped_storage())._cdata) not in self.live:
                self.live[key] = storage.nbytes()
                self.now += self.live[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.gone, key)
        return result

    def gone(self, key):
        self.now -= self.live.pop(key, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_pipeline(tmp_path_factory.mktemp("plan") / "flux")


def medium(dtype: torch.dtype) -> Flux:
    """Small in all, but large enough for what counts to count."""
    torch.manual_seed(0)
    mmdit = MMDiT(MMDiTConfig(context_in_dim=128, vec_in_dim=24, hidden_size=256, num_heads=2, depth=2, depth_single_blocks=4))
    vae = Autoencoder(AutoencoderConfig(ch=32, ch_mult=(1, 2, 4, 4), num_res_blocks=1))
    t5 = T5(T5Config(d_model=128, d_kv=32, d_ff=320, num_layers=2, num_heads=4, vocab_size=50))
    flux = Flux(None, None, None, t5, mmdit, vae, FluxConfig(size=256, max_text_tokens=64))
    return change_networks(flux, lambda network: network.to(dtype).eval().requires_grad_(False))


def paint(flux: Flux) -> None:
    with attention_backend("sdpa"), torch.no_grad():                     # as on a GPU
        txt = flux.t5(torch.arange(64)[None] % 50)
        generate(flux, Prompt(txt, torch.randn(1, 24)), width=256, height=256, steps=4, output="tensor", progress=False)


def shapes(flux: Flux) -> Flux:
    return change_networks(flux, lambda network: copy.deepcopy(network).to("meta"))


# ---------------------------------------------------------------------------------------------------------------- measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_a_whole_model_takes_is_what_was_measured(dtype):
    flux = medium(dtype)
    weights = sum(tensor.nbytes for part in (flux.t5, flux.mmdit, flux.autoencoder) for *_, tensor in slots(part))
    with Alive(*(tensor for part in (flux.t5, flux.mmdit, flux.autoencoder) for *_, tensor in slots(part))) as alive:
        paint(flux)
    planned = expect(shapes(flux), "whole", None, 256, 256, steps=4).device
    assert 0.95 < planned / (weights + alive.peak) < 1.1


@pytest.mark.parametrize("mode", ["modulation", "model", "block", "leaf", "disk"])
def test_what_an_offloaded_model_takes_is_what_was_measured(mode):
    """Parts that are converted when they come are made by operations, as copies on a GPU are."""
    flux = medium(torch.bfloat16)
    offloaded = offload(flux, "cpu", mode, dtype=torch.float32)
    tensors = [tensor for part in (offloaded.t5, offloaded.mmdit, *offloaded.mmdit.precomputed, offloaded.autoencoder) for *_, tensor in slots(part)]
    staying = sum(tensor.nbytes for tensor in tensors if tensor.dtype == torch.float32)
    with Alive(*tensors) as alive:
        paint(offloaded)
    single = shapes(change_networks(flux, lambda network: network.float()))
    planned = expect(single, mode, None, 256, 256, steps=4, prefetch=False).device
    assert 0.95 < planned / (staying + alive.peak) < 1.15


@pytest.mark.parametrize("form", ["int8", "nf4"])
def test_what_a_quantised_model_takes_is_what_was_measured(form):
    flux = quantize(medium(torch.bfloat16), form)
    tensors = [tensor for part in (flux.t5, flux.mmdit, flux.autoencoder) for *_, tensor in slots(part)]
    with Alive(*tensors) as alive:
        paint(flux)
    planned = expect(shapes(flux), "whole", None, 256, 256, steps=4).device
    assert 0.95 < planned / (sum(tensor.nbytes for tensor in tensors) + alive.peak) < 1.25


@pytest.mark.parametrize("part, size", [("mmdit", 512), ("autoencoder", 128), ("t5", 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_each_network_holds_while_it_computes_is_what_was_measured(part, size, dtype):
    flux = medium(dtype)
    tensors = [tensor for *_, tensor in slots(getattr(flux, part))]
    with Alive(*tensors) as alive, attention_backend("sdpa"):
        if part == "mmdit":
            like, n = flux.mmdit.img_in.weight, (size // 16) ** 2
            img, txt, pooled = (torch.randn(2, *shape).to(like) for shape in ((n, 64), (64, 128), (24,)))
            ones, img_ids, txt_ids = torch.ones(2).to(like), torch.zeros(n, 3).long(), torch.zeros(64, 3).long()
            flux.mmdit(MMDiTInputs(img, txt, pooled, ones, ones, img_ids, txt_ids))
        elif part == "t5":
            flux.t5(torch.zeros(1, size, dtype=torch.long))
        else:
            flux.autoencoder.decode(torch.randn(2, 16, size // 8, size // 8).to(dtype))
    text = size if part == "t5" else 64
    planned = activations(flux, size, size, 1 if part == "t5" else 2, text)[part]
    # T5's scores take less where no mask is copied, in float32.
    assert 0.95 < planned / alive.peak < (2.5 if part == "t5" else 1.2)


# ------------------------------------------------------------------------------------------------------------------ by hand


def test_dev_takes_what_its_weights_take():
    """In bfloat16: 22.17 GiB the transformer, 8.87 T5, 0.23 CLIP, 0.16 the autoencoder."""
    flux = assemble_meta("dev", torch.bfloat16)
    assert round(nbytes(flux.mmdit) / GIB, 2) == 22.17 and round(nbytes(flux.t5) / GIB, 2) == 8.87
    at = {mode: expect(flux, mode, None, 1024, 1024) for mode in WAYS}
    weights = 2 * (11_901_408_320 + 4_762_310_656 + 123_060_480 + 83_819_683)
    decoding = 3 * 2 * 1024 * 1024 * 256
    assert at["whole"].device == weights + decoding and at["whole"].memory == 0
    assert at["model"].memory == weights and 16.06 < at["model"].device / GIB < 17.2
    # A double block without its modulation has 226,474,752 parameters; two of them are there.
    assert 4 * 226e6 < at["block"].device < 4 * 226e6 + decoding and at["disk"].memory < 1e9
    # 3,247,448,064 numbers modulate, 32,262,144 make the vector they act on; but for a few biases, these are gone when it decodes.
    assert 0 < at["modulation"].device - decoding - weights + 2 * (3_247_448_064 + 32_262_144) < 1e5
    assert at["modulation"].memory == weights
    assert at["whole"].device > at["modulation"].device > at["model"].device > at["block"].device >= at["leaf"].device


@pytest.mark.parametrize("name, parameters", [("schnell", 11_891_178_560), ("dev", 11_901_408_320), ("fill", 11_902_391_360),
                                              ("canny", 11_901_604_928), ("kontext", 11_901_408_320)])
def test_official_models_that_are_not_here_have_their_official_sizes(name, parameters, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert nbytes(assemble_meta(name, torch.bfloat16).mmdit) == 2 * parameters


def test_a_model_without_numbers_has_the_shapes_of_the_loaded_one(folder):
    loaded, planned = load(folder, device="cpu", dtype=torch.bfloat16), assemble_meta(folder, torch.bfloat16)
    for part in ("clip", "t5", "mmdit", "autoencoder"):
        a, b = (getattr(flux, part).state_dict() for flux in (loaded, planned))
        assert {name: (t.shape, t.dtype) for name, t in a.items()} == {name: (t.shape, t.dtype) for name, t in b.items()}
        assert all(t.is_meta for t in b.values())
    assert planned.config == loaded.config


def test_only_matrices_are_read_without_numbers_and_only_within(tmp_path):
    save_file({"matrix": torch.ones(3, 4), "vector": torch.ones(3), "bytes": torch.ones(3, 4, dtype=torch.uint8)}, tmp_path / "a.safetensors")
    with meta_tensors():
        state = read_safetensors(tmp_path / "a.safetensors")
    assert {name: tensor.is_meta for name, tensor in state.items()} == {"matrix": True, "vector": False, "bytes": False}
    assert not read_safetensors(tmp_path / "a.safetensors")["matrix"].is_meta


# -------------------------------------------------------------------------------------------------------------------- fit


def test_what_fits_as_a_whole_is_loaded_as_a_whole(folder):
    assert not hasattr(load(folder, device="cpu", fit=True).mmdit, "offloader")


def test_what_does_not_fit_is_offloaded_and_paints_the_same_picture(folder, monkeypatch, caplog):
    monkeypatch.setattr("miniflux.engine.plan.free_memory", lambda device: 100_000)
    monkeypatch.setattr("miniflux.engine.offload.SMALL", 1000)
    with caplog.at_level(logging.INFO):
        fitted = load(folder, device="cpu", fit=True)
    assert fitted.mmdit.offloader.mode == "disk" and "disk, about" in caplog.text
    assert torch.equal(generate(fitted, "an owl", **SMALL), generate(load(folder, device="cpu"), "an owl", **SMALL))


MEASURE = """
import json, re, sys, torch
from pathlib import Path
from miniflux import Prompt, generate, load
from miniflux.engine import plan
from miniflux.loading import assemble_meta

def kib(field):
    return int(re.search(field + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

plan.free_memory = lambda device: 1
assemble_meta(sys.argv[1], torch.bfloat16)        # the meta device brings a compiler along
before = kib("VmRSS")
flux = load(sys.argv[1], device="cpu", dtype=torch.bfloat16, fit=True)
assert flux.mmdit.offloader.mode == "disk"
z = generate(flux, Prompt(torch.randn(1, 8, 64), torch.randn(1, 24)), width=64, height=64, steps=2, output="latents", progress=False)
assert z.isfinite().all()
print(json.dumps(1024 * (kib("VmHWM") - before)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident memory from /proc")
def test_a_checkpoint_whose_tensors_must_be_joined_is_never_all_in_memory_either(tmp_path):
    """The diffusers layout, 318 MB; q, k and v are a third of it."""
    torch.manual_seed(0)
    config = MMDiTConfig(context_in_dim=64, vec_in_dim=24, hidden_size=768, num_heads=6, depth=4, depth_single_blocks=8)
    write_mmdit(tmp_path, MMDiT(config).bfloat16())
    size = sum(path.stat().st_size for path in tmp_path.glob("transformer/*.safetensors"))
    peak = json.loads(subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True).stdout)
    assert peak < 0.3 * size                                                    # measured: 0.2


@pytest.mark.parametrize("mode", ["whole", "modulation", "model", "block"])
def test_with_a_device_of_its_own_the_first_way_that_fits_is_taken(folder, mode, monkeypatch):
    """meta plays the GPU, which has just as much as this way needs."""
    monkeypatch.setattr("miniflux.engine.offload.SMALL", 1000)
    need = MARGIN * expect(assemble_meta(folder, torch.bfloat16), mode, None, 32, 32, prefetch=False).device + 1
    monkeypatch.setattr("miniflux.engine.plan.free_memory", lambda device: need if device.type == "meta" else 1e9)
    fitted = load(folder, device="meta", dtype=torch.bfloat16, fit=True)
    assert getattr(getattr(fitted.mmdit, "offloader", None), "mode", "whole") == mode


# ------------------------------------------------------------------------------------------------------------------ command


def test_the_command_says_what_fits(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["plan", "--model", "dev", "--size", "512", "--vram", "20", "--ram", "64"])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "dev at 512 x 512, 1 at once, in bfloat16; 20.0 GiB on the device, 64.0 GiB in the computer"
    assert lines[2].split() == ["whole", "31.8", "GiB", "-", "no"]
    assert lines[3].startswith('offload "modulation"') and lines[3].endswith("no")
    assert lines[4].endswith("yes: load('dev', fit=True) does this") and lines[4].startswith('offload "model"')
    assert any(line.startswith("nf4, whole") and line.endswith("yes") for line in lines)


def test_for_a_model_that_fits_nothing_else_is_proposed(folder):
    lines = report(str(folder), vram=1.0)
    assert "whole" in lines[2] and "does this" in lines[2] and not any("int8" in line for line in lines)


@pytest.mark.parametrize("arguments, sentence", [
    (["--vram", "0"], "vram is 0.0"),
    (["--size", "8"], "size is 8"),
    (["--num-images", "0"], "num_images is 0"),
    (["--model", "no-such-model"], "'no-such-model' is neither a folder nor a known model"),
])
def test_a_mistake_ends_in_one_line_and_exit_code_2(arguments, sentence, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["plan", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and sentence in error and error.count("\n") == 1
