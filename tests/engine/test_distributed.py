"""Several processes. Oracle: one process, whose pictures N gloo processes must paint, and end together.

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

SIZES = MMDiTConfig(hidden_size=64, num_heads=4, axes_dim=(4, 4, 8), depth=2, depth_single_blocks=3, vec_in_dim=128, context_in_dim=128)


def small():
    """The shipped model with a small random transformer of four heads."""
    flux = load(device="cpu")
    torch.manual_seed(0)
    return replace(flux, mmdit=MMDiT(SIZES).eval())


def lora(path):
    from safetensors.torch import save_file
    generator, state = torch.Generator().manual_seed(0), {}
    for module, inside, out in (("single_blocks.1.linear1", 64, 64 * 7), ("double_blocks.1.img_attn.proj", 64, 64)):
        state[f"diffusion_model.{module}.lora_A.weight"] = 0.1 * torch.randn(4, inside, generator=generator)
        state[f"diffusion_model.{module}.lora_B.weight"] = 0.1 * torch.randn(out, 4, generator=generator)
    save_file(state, path)
    return path


def paint(flux, prompt="an owl", **keywords):
    """35 image tokens and 9 of text: neither divides evenly."""
    keywords = dict(width=112, height=80, steps=3, max_text_tokens=9, output="latents", progress=False) | keywords
    return generate(flux, prompt, **keywords)


# -------------------------------------------------------------------------------------------- what each process of a run does


def difference(alone, together):
    """Of the largest number; of all processes the one that is farthest off."""
    assert alone.shape == together.shape and torch.isfinite(alone).all()
    worst = (alone - together).abs().max() / alone.abs().max()
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def transformer_with_everything(flux, B):
    """Residuals of ControlNets, and keys of IP-Adapters: some for each picture, some for all of them."""
    generator = torch.Generator().manual_seed(1)
    shapes = (B, 7, 64), (B, 5, 128), (B, 128)
    img, txt, vec = (torch.randn(shape, generator=generator) for shape in shapes)
    residuals = [torch.randn(B, 7, 64, generator=generator) if i % 2 else None for i in range(5)]
    kv = [[tuple(torch.randn(n, 4, 3, 16, generator=generator) for _ in range(2)) for n in (1, B)] for _ in range(2)]
    ids = torch.randint(0, 5, (7, 3), generator=generator), torch.zeros(5, 3, dtype=torch.int64)
    t, guidance = torch.full((B,), 0.7), torch.full((B,), 3.5)
    return flux.mmdit(MMDiTInputs(img, txt, vec, t, guidance, *ids, residuals, kv))


def pictures(path):
    """Every combination painted alone and together: {what: difference}."""
    flux, tiny = small(), load(device="cpu")
    two, four = ["an owl", "a fox"], ["an owl", "a fox", "a car", "a cat"]
    cases = {
        "one picture": (flux, {}), "fewer text tokens than processes": (flux, dict(max_text_tokens=1)), "two pictures": (flux, dict(prompt=two)),
        "three pictures": (flux, dict(prompt=four[:3])), "four pictures": (flux, dict(prompt=four)), "decoded": (flux, dict(prompt=two, output="tensor")),
        "true cfg": (flux, dict(true_cfg=3.0, negative_prompt="a cat")), "lora": (add_lora(flux, lora(path.with_suffix(".lora")), merge=False), {}),
        "in tiles": (tile(flux, 64), dict(prompt=four, output="tensor")),
        "quantised": (quantize(flux, "int8", parts=("mmdit",)), dict(prompt=two)), "modulation ahead": (precompute_modulation(flux), dict(prompt=two)),
        "compiled": (compile(flux, "eager"), {}),
        "cached": (cache(tiny, threshold=0.2), dict(steps=8)), "cached, four pictures": (cache(tiny, threshold=0.2), dict(steps=8, prompt=four)),
        "taylor": (cache(flux, "taylor", interval=2, warmup=1), dict(prompt=four, steps=6)),
    }
    if dist.get_world_size() > 3:                           # the shipped model has three heads
        del cases["cached"]
    report = {}
    for name, (model, keywords) in cases.items():
        report[name] = difference(paint(model, **keywords), paint(distributed.distribute(model), **keywords))
    for name in ("one picture", "four pictures", "true cfg", "lora", "cached, four pictures"):
        model, keywords = cases[name]
        shards = distributed.distribute(model, shard=True)
        report[f"{name}, sharded"] = difference(paint(model, **keywords), paint(shards, **keywords))
    for B in (1, 4):
        report[f"residuals and keys, {B}"] = difference(*(transformer_with_everything(f, B) for f in (flux, distributed.distribute(flux))))
    weight = shards.mmdit.single_blocks[1].linear1.weight
    report["share of a sharded weight"] = weight.to_local().numel() / weight.numel()
    if dist.get_rank() == 0:
        path.write_text(json.dumps(report))


def heads(path):
    """More processes than the shipped model has heads: it is said before anything is sent, by all of them."""
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
    with torch.no_grad():
        {"pictures": pictures, "heads": heads, "killed": killed, "killed, sharded": partial(killed, shard=True)}[scenario](Path(path))


# ----------------------------------------------------------------------------------------------------------------- tests


def torchrun(processes, *arguments, check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_paint_what_one_paints(tmp_path, processes):
    torchrun(processes, __file__, "pictures", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    assert report.pop("share of a sharded weight") == 1 / processes
    assert {name: worst for name, worst in report.items() if not worst <= 1e-5} == {} and len(report) >= 20


def test_more_processes_than_heads_get_one_sentence(tmp_path):
    torchrun(4, __file__, "heads", tmp_path / "report.json")
    sentence, *others = json.loads((tmp_path / "report.json").read_text())
    assert others == [sentence] * 3
    assert sentence == ("the 3 heads of this transformer cannot be divided among 4 processes: start at most 3, "
                        "or paint a multiple of 4 pictures at once")


def test_the_command_paints_one_picture_and_only_the_first_process_speaks(tmp_path):
    done = torchrun(2, "-m", "miniflux.generate", "an owl", "--steps", "2", "--output", tmp_path / "owl.png")
    assert done.stdout == f"{tmp_path / 'owl.png'}\n" and os.listdir(tmp_path) == ["owl.png"]
    expected, = generate(load(device="cpu"), "an owl", steps=2, progress=False)
    with Image.open(tmp_path / "owl.png") as picture:
        assert max(abs(a - b) for a, b in zip(picture.tobytes(), expected.tobytes())) <= 1


def test_the_command_shards(tmp_path):
    torchrun(2, "-m", "miniflux.generate", "an owl", "--steps", "2", "--shard", "--cache-threshold", "0.1", "--num-images", "2",
             "--tile", "128", "--output", tmp_path / "owl.png")
    expected = generate(cache(load(device="cpu"), threshold=0.1), "an owl", steps=2, num_images=2, progress=False)
    for i, one in enumerate(expected, 1):
        with Image.open(tmp_path / f"owl-{i}.png") as picture:
            assert "--shard" not in picture.text["command"] and "--tile 128" in picture.text["command"]  # one process can repeat it
            assert max(abs(a - b) for a, b in zip(picture.tobytes(), one.tobytes())) <= 1


def test_a_mistake_is_answered_once(tmp_path):
    done = torchrun(2, "-m", "miniflux.generate", "an owl", "--model", tmp_path / "nothing", check=False)
    assert done.returncode and done.stderr.count("is neither a folder nor a known model") == 1


@pytest.mark.parametrize("scenario", ["killed", "killed, sharded"])
def test_a_killed_process_ends_the_others_with_a_message(tmp_path, scenario):
    """Without torchrun, which would end them itself: each process notices on its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [subprocess.Popen(
        [sys.executable, __file__, scenario, str(tmp_path)], stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                          "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}) for rank in range(2)]
    try:
        assert processes[1].wait(timeout=120) == -signal.SIGKILL
        message = processes[0].communicate(timeout=60)[1]       # gloo's own limit is half an hour
    finally:
        for process in processes:
            process.kill()
    assert processes[0].returncode == 1 and "another process of this run has ended" in message


def test_torchrun_ends_when_a_process_is_killed(tmp_path):
    done = torchrun(2, __file__, "killed", tmp_path, check=False)
    assert done.returncode and "exitcode: -9" in done.stderr


def test_one_process_is_the_model_itself_and_quantised_weights_are_not_sharded():
    flux = load(device="cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert distributed.distribute(flux) is flux and distributed.distribute(flux, shard=True) is flux
        with pytest.raises(ValueError, match="quantised weights cannot be sharded"):
            distributed.distribute(quantize(flux, "int8"), shard=True)
    finally:
        dist.destroy_process_group()


def test_a_process_that_is_alone_gets_one_sentence():
    with pytest.raises(ValueError, match="this process is alone: start several with `torchrun --nproc-per-node N`"):
        distributed.distribute(load(device="cpu"))


def test_a_device_of_no_process_gets_one_sentence():
    with pytest.raises(ValueError, match="the device is 'cuda:1': with several processes, expected cuda"):
        distributed.start("cuda:1")


if __name__ == "__main__":
    main()
