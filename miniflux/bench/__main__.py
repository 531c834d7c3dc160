"""Measures miniflux beside diffusers: the same weights, the same machine, the same run. Each table
first asserts that the results are equal.

    python -m miniflux.bench                    all tables but disk
    python -m miniflux.bench step cold          some of them

    picture       one image of the tiny model, everything loaded, and its share per step
    cold          a fresh process: from the command to the file on disk
    attention     norm, rotation and attention of a block, by every backend
    load          peak memory of loading, as a multiple of the checkpoint
    tasks         a step of each task beside one of generate
    lora          merging a LoRA into a block of FLUX.1's size, beside reading its file and copying
                  the weights
    quantize      memory, a step and the quality of the images, for each format
    int8          memory, time and error of a block of FLUX.1's width in int8, beside torchao's
    offload       memory and time of steps from disk, beside diffusers' group offloading
    autoencoder   peak memory of encoding and decoding large images, as a whole and in tiles
    caching       time and images of caches, beside as many plain steps as take the same time, and
                  beside diffusers' cache
    tokenizers    a prompt of 512 tokens
    disk          peak memory of a step of FLUX.1's size from disk; writes 33 GB, and only when it
                  is named

The peer needs `pip install diffusers transformers`.
"""

import argparse
import os
import time
from importlib.util import find_spec

import torch

from ..command import Parser, command
from .attention import bench_attention
from .autoencoder import bench_autoencoder
from .caching import bench_caching
from .disk import bench_disk
from .int8 import bench_int8
from .loading import bench_load
from .lora import bench_lora
from .measuring import processor
from .offload import bench_offload
from .picture import bench_cold, bench_picture
from .quantize import bench_quantize
from .tasks import bench_tasks
from .tokenizers import bench_tokenizers

BENCHES = {
    "picture": bench_picture,
    "cold": bench_cold,
    "attention": bench_attention,
    "load": bench_load,
    "tasks": bench_tasks,
    "lora": bench_lora,
    "quantize": bench_quantize,
    "int8": bench_int8,
    "offload": bench_offload,
    "autoencoder": bench_autoencoder,
    "caching": bench_caching,
    "tokenizers": bench_tokenizers,
    "disk": bench_disk,
}
# The tables that measure diffusers as well.
PEERS = ("picture", "cold", "attention", "int8", "offload", "autoencoder", "caching")


@command
def main() -> None:
    parser = Parser(prog="python -m miniflux.bench", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*",
                        help=f"of {', '.join(BENCHES)} (default: all but disk)")
    parser.add_argument("--model", default="tiny", help="the model to measure (default tiny)")
    args = parser.parse_args()
    if unknown := [name for name in args.tables if name not in BENCHES]:
        parser.error(f"there is no table {unknown[0]!r}: expected some of {', '.join(BENCHES)}")
    names = args.tables or [name for name in BENCHES if name != "disk"]
    peers = [name for name in names if name in PEERS]
    if peers and not all(map(find_spec, ("diffusers", "transformers"))):
        parser.error(f"{', '.join(peers)} compare with diffusers: `pip install diffusers "
                     "transformers`, or name other tables")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    threads, today = torch.get_num_threads(), time.strftime("%Y-%m-%d")
    print(f"{processor()}, {threads} threads, torch {torch.__version__}, {today}")
    for name in names:
        BENCHES[name](args.model)


if __name__ == "__main__":
    main()
