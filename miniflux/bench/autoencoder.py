"""The table `autoencoder`: peak memory of large images, as a whole and in tiles."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.finding import find_source
from ..checkpoints.layouts import load_autoencoder
from ..engine.tiling import tile
from ..loading import load
from .measuring import in_fresh_process, peak_resident, reset_peak, resident

TILE = 512                             # pixels


def our_half(folder: Path, half: str, tile_size: int) -> Callable[[Tensor], Tensor]:
    """Our `encode` or `decode`; in tiles of that many pixels, if they are not 0."""
    autoencoder = load_autoencoder(folder, torch.device("cpu"), torch.float32)
    flux = replace(load(device="cpu"), autoencoder=autoencoder)
    flux = tile(flux, tile_size) if tile_size else flux
    return getattr(flux.autoencoder, half)


def their_half(folder: Path, half: str, tile_size: int) -> Callable[[Tensor], Tensor]:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    if tile_size:
        vae.tile_sample_min_size = tile_size
        vae.tile_latent_min_size = tile_size // 8
        vae.enable_tiling()
    if half == "encode":
        return lambda image: (vae.encode(image).latent_dist.mean - shift) * scale
    return lambda z: vae.decode(z / scale + shift).sample


def peak_and_seconds(folder: str, who: str, half: str, side: int,
                     tile_size: int) -> tuple[int, float]:
    """Bytes that a square image of `side` pixels adds at the peak, and the seconds it takes."""
    call = {"miniflux": our_half, "diffusers": their_half}[who](Path(folder), half, tile_size)
    if half == "decode":
        x = torch.randn(1, 16, side // 8, side // 8)
    else:
        x = torch.rand(1, 3, side, side) * 2 - 1
    with torch.no_grad():
        call(x[:, :, :64, :64])                             # allocates what the first call does
        before = resident()
        reset_peak()
        began = time.perf_counter()
        call(x)
        return peak_resident() - before, time.perf_counter() - began


def bench_autoencoder(source: str) -> None:
    """The model's own autoencoder in float32, each row a process of its own."""
    folder = find_source(source) / "vae"
    small = {"encode": torch.rand(1, 3, 96, 136), "decode": torch.randn(1, 16, 12, 17)}
    for half, x in small.items():
        with torch.no_grad():
            a = our_half(folder, half, 64)(x)
            b = their_half(folder, half, 64)(x)
        assert (a - b).abs().max() < 1e-4 * b.abs().max(), f"{half} differs in tiles"
    print(f"\n{'peak memory of the autoencoder':36} {'miniflux':>19} {'diffusers':>19} "
          f"{'ratio':>8}")
    for half, side in (("encode", 1024), ("decode", 1024), ("decode", 2048)):
        for tile_size in (0, TILE):
            runs = [in_fresh_process(peak_and_seconds, str(folder), who, half, side, tile_size)
                    for who in ("miniflux", "diffusers")]
            title = f"{half} {side} x {side}" + (f", tiles of {tile_size}" if tile_size else "")
            cells = [f"{peak / 2**20:8.0f} MiB {seconds:4.0f} s" for peak, seconds in runs]
            (ours, _), (theirs, _) = runs
            print(f"{title:36} {' '.join(cells)} {theirs / ours:7.2f}x", flush=True)
