"""Several processes. Oracle: one process, whose images N gloo processes must generate.
They end together.

The processes run this file: `torchrun --nproc-per-node N test_distributed.py SCENARIO FILE`.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from PIL import Image

from miniflux import add_lora, generate, load
from miniflux.engine import distributed
from miniflux.engine.caching import cache
from miniflux.engine.compiling import compile
from miniflux.engine.modulation import precompute_modulation
from miniflux.engine.quantize import quantize
from miniflux.engine.tiling import tile
from miniflux.networks.mmdit import MMDiT, MMDiTConfig, MMDiTInputs

SIZES = MMDiTConfig(hidden_size=64, num_heads=4, axes_dim=(4, 4, 8), depth=2,
                    depth_single_blocks=3, vec_in_dim=128, context_in_dim=128)


def small():
    """The shipped model with a small random transformer of four heads."""
    flux = load(device="cpu")
    torch.manual_seed(0)
    return replace(flux, mmdit=MMDiT(SIZES).eval())


def lora(path, mmdit):
    from safetensors.torch import save_file
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name in ("single_blocks.1.linear1", "double_blocks.1.img_attn.proj"):
        layer = mmdit.get_submodule(name)
        down = 0.1 * torch.randn(4, layer.in_features, generator=generator)
        up = 0.1 * torch.randn(layer.out_features, 4, generator=generator)
        state[f"diffusion_model.{name}.lora_A.weight"] = down
        state[f"diffusion_model.{name}.lora_B.weight"] = up
    save_file(state, path)
    return path


def paint(flux, prompt="an owl", **keywords):
    """35 image tokens and 9 of text: neither divides evenly."""
    settings = dict(width=112, height=80, steps=3, max_text_tokens=9, output="latents",
                    progress=False)
    return generate(flux, prompt, **settings | keywords)


# ------------------------------------------------------ what each process of a run does


def difference(alone, together):
    """Of the largest number; of all processes the one that is farthest off."""
    assert alone.shape == together.shape and torch.isfinite(alone).all()
    worst = (alone - together).abs().max() / alone.abs().max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def transformer_with_everything(flux, B):
    """Residuals of ControlNets, and keys of IP-Adapters: some for each image, some for all."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(shape, generator=generator)

    residuals = [random(B, 7, 64) if i % 2 else None for i in range(5)]
    kv = []                                     # for each double block, from two adapters
    for _ in range(2):
        kv.append([(random(n, 4, 3, 16), random(n, 4, 3, 16)) for n in (1, B)])
    return flux.mmdit(MMDiTInputs(
        img=random(B, 7, 64),
        txt=random(B, 5, 128),
        pooled=random(B, 128),
        t=torch.full((B,), 0.7),
        guidance=torch.full((B,), 3.5),
        img_ids=torch.randint(0, 5, (7, 3), generator=generator),
        txt_ids=torch.zeros(5, 3, dtype=torch.int64),
        residuals=residuals,
        image_kv=kv,
    ))


def images(path):
    """Every combination generated alone and together: {what: difference}."""
    flux = small()
    tiny = load(device="cpu")
    two = ["an owl", "a fox"]
    four = ["an owl", "a fox", "a car", "a cat"]
    with_lora = add_lora(flux, lora(path.with_suffix(".lora"), flux.mmdit), merge=False)
    quantized = quantize(flux, "int8", parts=("mmdit",))
    taylor = cache(flux, "taylor", interval=2, warmup=1)
    cases = {
        "one image": (flux, {}),
        "fewer text tokens than processes": (flux, dict(max_text_tokens=1)),
        "two images": (flux, dict(prompt=two)),
        "three images": (flux, dict(prompt=four[:3])),
        "four images": (flux, dict(prompt=four)),
        "decoded": (flux, dict(prompt=two, output="tensor")),
        "true cfg": (flux, dict(true_cfg=3.0, negative_prompt="a cat")),
        "lora": (with_lora, {}),
        "in tiles": (tile(flux, 64), dict(prompt=four, output="tensor")),
        "quantised": (quantized, dict(prompt=two)),
        "modulation ahead": (precompute_modulation(flux), dict(prompt=two)),
        "compiled": (compile(flux, "eager"), {}),
        "cached": (cache(tiny, threshold=0.2), dict(steps=8)),
        "cached, four images": (cache(tiny, threshold=0.2), dict(steps=8, prompt=four)),
        "taylor": (taylor, dict(prompt=four, steps=6)),
    }
    if dist.get_world_size() > 3:               # the shipped model has three heads
        del cases["cached"]
    report = {}
    for name, (model, keywords) in cases.items():
        alone = paint(model, **keywords)
        together = paint(distributed.distribute(model), **keywords)
        report[name] = difference(alone, together)
    for name in ("one image", "four images", "true cfg", "lora", "cached, four images"):
        model, keywords = cases[name]
        shards = distributed.distribute(model, shard=True)
        alone = paint(model, **keywords)
        together = paint(shards, **keywords)
        report[f"{name}, sharded"] = difference(alone, together)
    for B in (1, 4):
        alone = transformer_with_everything(flux, B)
        together = transformer_with_everything(distributed.distribute(flux), B)
        report[f"residuals and keys, {B}"] = difference(alone, together)
    weight = shards.mmdit.single_blocks[1].linear1.weight
    report["share of a sharded weight"] = weight.to_local().numel() / weight.numel()
    if dist.get_rank() == 0:
        path.write_text(json.dumps(report))


def heads(path):
    """More processes than the shipped model has heads: all raise before anything is sent."""
    try:
        paint(distributed.distribute(load(device="cpu")))
    except ValueError as error:
        sentences = [None] * dist.get_world_size()
        dist.all_gather_object(sentences, str(error))
        if dist.get_rank() == 0:
            path.write_text(json.dumps(sentences))


def killed(path, shard=False):
    """The last process dies in the middle of a call."""
    def on_step(step, t, x):
        if step == 2 and dist.get_rank() == dist.get_world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        paint(distributed.distribute(small(), shard), steps=1000, on_step=on_step)
    except ConnectionError as error:
        sys.exit(str(error))


def main():
    scenario, path = sys.argv[1:]
    assert distributed.is_distributed() and distributed.start() == torch.device("cpu")
    scenarios = {
        "images": images,
        "heads": heads,
        "killed": killed,
        "killed, sharded": partial(killed, shard=True),
    }
    with torch.no_grad():
        scenarios[scenario](Path(path))


# -------------------------------------------------------------------------------- tests


def torchrun(processes, *arguments, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", str(processes), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_generate_what_one_generates(tmp_path, processes):
    torchrun(processes, __file__, "images", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("share of a sharded weight") == 1 / processes
    assert len(report) >= 20
    assert {name: worst for name, worst in report.items() if not worst <= 1e-5} == {}


def test_more_processes_than_heads_get_one_sentence(tmp_path):
    torchrun(4, __file__, "heads", tmp_path / "report.json")
    sentence, *others = json.loads((tmp_path / "report.json").read_text())
    assert others == [sentence] * 3
    assert sentence == ("the 3 heads of this transformer cannot be divided among 4 processes: "
                        "start at most 3, or paint a multiple of 4 pictures at once")


def largest_difference(a: Image.Image, b: Image.Image) -> int:
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes()))


def test_the_command_generates_one_image_and_only_the_first_process_prints(tmp_path):
    path = tmp_path / "owl.png"
    done = torchrun(2, "-m", "miniflux.generate", "an owl", "--steps", "2", "--output", path)
    assert done.stdout == f"{path}\n"
    assert os.listdir(tmp_path) == ["owl.png"]
    expected, = generate(load(device="cpu"), "an owl", steps=2, progress=False)
    with Image.open(path) as image:
        assert largest_difference(image, expected) <= 1


def test_the_command_shards(tmp_path):
    torchrun(2, "-m", "miniflux.generate", "an owl", "--steps", "2", "--num-images", "2",
             "--shard", "--cache-threshold", "0.1", "--tile", "128",
             "--output", tmp_path / "owl.png")
    flux = cache(load(device="cpu"), threshold=0.1)
    expected = generate(flux, "an owl", steps=2, num_images=2, progress=False)
    for i, one in enumerate(expected, 1):
        with Image.open(tmp_path / f"owl-{i}.png") as image:
            command = image.text["command"]     # which one process can repeat
            assert "--shard" not in command
            assert "--tile 128" in command
            assert largest_difference(image, one) <= 1


def test_a_mistake_is_answered_once(tmp_path):
    folder = tmp_path / "nothing"
    done = torchrun(2, "-m", "miniflux.generate", "an owl", "--model", folder, check=False)
    assert done.returncode
    assert done.stderr.count("is neither a folder nor a known model") == 1


@pytest.mark.parametrize("scenario", ["killed", "killed, sharded"])
def test_a_killed_process_ends_the_others_with_a_message(tmp_path, scenario):
    """Without torchrun, which would end them itself: each process notices on its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, __file__, scenario, str(tmp_path)]
    processes = []
    for rank in ("0", "1"):
        processes.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                                          env=environment | {"RANK": rank}))
    try:
        assert processes[1].wait(timeout=120) == -signal.SIGKILL
        message = processes[0].communicate(timeout=60)[1]       # gloo's own limit is half an hour
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1
    assert "another process of this run has ended" in message


def test_torchrun_ends_when_a_process_is_killed(tmp_path):
    done = torchrun(2, __file__, "killed", tmp_path, check=False)
    assert done.returncode
    assert "exitcode: -9" in done.stderr


def test_one_process_is_the_model_itself_and_quantised_weights_are_not_sharded():
    flux = load(device="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert distributed.distribute(flux) is flux
        assert distributed.distribute(flux, shard=True) is flux
        with pytest.raises(ValueError, match="quantised weights cannot be sharded"):
            distributed.distribute(quantize(flux, "int8"), shard=True)
    finally:
        dist.destroy_process_group()


def test_a_process_that_is_alone_gets_one_sentence():
    sentence = "this process is alone: start several with `torchrun --nproc-per-node N`"
    with pytest.raises(ValueError, match=sentence):
        distributed.distribute(load(device="cpu"))


def test_a_device_of_no_process_gets_one_sentence():
    sentence = "the device is 'cuda:1': with several processes, expected cuda"
    with pytest.raises(ValueError, match=sentence):
        distributed.start("cuda:1")


if __name__ == "__main__":
    main()
