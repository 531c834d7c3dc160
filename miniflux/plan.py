"""The command that lists the ways of running a model that fit in memory, without loading it.

    miniflux plan --model dev --size 1024 --vram 12

The estimates are in `engine/plan.py`; `load(..., fit=True)` takes the first way that fits.
"""

import torch

from .checks import check_number
from .command import Parser, command
from .devices import DTYPES, default_dtype, find_device
from .engine.plan import FORMS, GIB, Way, expect, free_memory, modes
from .imaging.images import check_side
from .loading import assemble_meta


@command
def main() -> None:
    parser = Parser(prog="miniflux plan",
                    description="List the ways of running a model that fit, without loading it.")
    parser.add_argument("--model", default="tiny", help="as for miniflux generate (default tiny)")
    parser.add_argument("--transformer", help="a single file whose transformer replaces the "
                                              "model's (default: none)")
    parser.add_argument("--size", type=int,
                        help="width and height in pixels (default: the model's)")
    parser.add_argument("--num-images", type=int, default=1, help="images at once (default 1)")
    parser.add_argument("--steps", type=int, default=28, help="steps an image (default 28)")
    parser.add_argument("--vram", type=float, help="GiB on the device (default: what is free on "
                                                   "the first of cuda, mps, cpu)")
    parser.add_argument("--ram", type=float,
                        help="GiB of the computer's memory (default: what is free)")
    parser.add_argument("--dtype", choices=DTYPES,
                        help="to compute in (default bfloat16, float32 on the CPU)")
    args = parser.parse_args()
    try:
        lines = report(args.model, args.transformer, args.size, args.num_images, args.steps,
                       args.vram, args.ram, DTYPES.get(args.dtype))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print("\n".join(lines))


def report(model: str, transformer: str | None = None, size: int | None = None,
           num_images: int = 1, steps: int = 28, vram: float | None = None,
           ram: float | None = None, dtype: torch.dtype | None = None) -> list[str]:
    """The lines of the command. With vram, an accelerator of so many GiB is assumed."""
    check_number("num_images", num_images, 1, 1000, whole=True)
    check_number("steps", steps, 1, 1000, whole=True)
    if vram is not None:
        check_number("vram", vram, 0.1, 10_000)
    if ram is not None:
        check_number("ram", ram, 0.1, 100_000)
    if size is not None:
        check_side("size", size)
    device = torch.device("cuda") if vram is not None else find_device()
    dtype = dtype or default_dtype(device)
    flux = assemble_meta(model, dtype, transformer)
    size = size or flux.config.size
    here = free_memory(device) if vram is None else vram * GIB
    memory = free_memory(torch.device("cpu")) if ram is None else ram * GIB

    def ways(form: str | None, names: tuple[str, ...]) -> list[Way]:
        prefetch = device.type == "cuda"
        return [expect(flux, mode, form, size, size, num_images, steps, prefetch=prefetch)
                for mode in names]

    found = ways(None, modes(device))
    first = next((way for way in found if way.fits(here, memory)), None)
    if first is None or first.mode != "whole":
        for form in FORMS:
            found += ways(form, modes(device)[:4])

    where = device if vram is None else "the device"
    lines = [f"{flux.config.name} at {size} x {size}, {num_images} at once, in {str(dtype)[6:]}; "
             f"{here / GIB:.1f} GiB on {where}, {memory / GIB:.1f} GiB in the computer",
             f"{'':24} {'device':>10} {'computer':>10}   fits"]
    for way in found:
        fits = "yes" if way.fits(here, memory) else "no"
        if way is first:
            fits += f": load({model!r}, fit=True) does this"
        lines.append(f"{describe(way):24} {spell(way.device):>10} {spell(way.memory):>10}   {fits}")
    return lines


def describe(way: Way) -> str:
    """Such as 'int8, offload "block"'."""
    mode = way.mode if way.mode == "whole" else f'offload "{way.mode}"'
    return f"{way.form}, {mode}" if way.form else mode


def spell(size: int) -> str:
    if not size:
        return "-"
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


if __name__ == "__main__":
    main()
