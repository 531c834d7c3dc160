"""Training by several processes. Oracle: one process that draws the numbers of all.

The processes run this file: `torchrun --nproc-per-node 2 test_distributed_training.py FOLDER`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from miniflux.engine import distributed
from miniflux.tiny.train import loop


def regression() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)
    )


def loss_of(net: nn.Module, generator: torch.Generator) -> torch.Tensor:
    x = torch.randn(32, 1, generator=generator)
    return (net(x) - x.sin()).square().mean()


def torchrun(*arguments):
    # Note: torchrun puts the folder of its script on the path, not the one that pytest runs in.
    package = Path(loop.__file__).parents[3]
    path = os.pathsep.join(filter(None, [str(package), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            *map(str, arguments),
        ],
        check=True,
        env=environment,
        timeout=300,
    )


def test_two_processes_train_as_one_with_the_batch_of_both_and_the_first_alone_writes(tmp_path):
    torchrun(__file__, tmp_path / "two")
    net, steps = regression(), iter(range(100))

    def both(_: torch.Generator) -> torch.Tensor:
        step = next(steps)
        return (
            sum(loss_of(net, torch.Generator().manual_seed(2 * step + rank)) for rank in (0, 1)) / 2
        )

    with torch.enable_grad():
        loop.train(net, both, tmp_path / "one", lr=1e-2, steps=20)
    one, two = (load_file(tmp_path / run / "state.safetensors") for run in ("one", "two"))
    assert one.keys() == two.keys() and all(
        torch.allclose(one[name], two[name], atol=1e-5) for name in one
    )
    logs = [
        [
            json.loads(line)["loss"]
            for line in (tmp_path / run / "log.jsonl").read_text().splitlines()
        ]
        for run in ("one", "two")
    ]
    assert len(logs[1]) == 2 and torch.allclose(*map(torch.tensor, logs), atol=1e-5)


def test_the_command_trains_under_torchrun_until_the_first_process_says_stop(tmp_path):
    torchrun(
        "-m",
        "miniflux.tiny.train",
        "style",
        "--minutes",
        "0.01",
        "--scenes",
        "4",
        "--work",
        tmp_path,
    )
    assert (tmp_path / "style" / "pytorch_lora_weights.safetensors").is_file() and (
        tmp_path / "style" / "sheet.png"
    ).is_file()


if __name__ == "__main__":
    distributed.start()
    model = regression()
    loop.train(
        model, lambda generator: loss_of(model, generator), Path(sys.argv[1]), lr=1e-2, steps=20
    )
