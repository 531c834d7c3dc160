"""How a task runs as a command: parse, load, paint, save.

    main() of a task -> flags.parser(...) -> run(parser, task)

Everything that can be checked is checked before the first step. The images are painted and saved
one after the other (--batch at once), so a later failure never costs an image that is finished.
"""

import argparse
import inspect
import logging
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from . import __version__
from .adapters.controlnet import Control, load_controlnet
from .adapters.ip_adapter import add_ip_adapter
from .adapters.lora import add_lora
from .checkpoints.formats import concat_on_disk
from .checks import check_number
from .command import is_out_of_memory, say
from .devices import DTYPES, default_dtype, find_device
from .engine import distributed
from .engine.caching import cache
from .engine.compiling import compile
from .engine.offload import offload
from .engine.quantize import quantize
from .engine.tiling import tile
from .flags import TaskParser
from .flux import Flux
from .imaging.images import to_pil
from .imaging.info import marks, spell
from .imaging.masks import blur_mask, expand_canvas, mask_from_alpha
from .imaging.saving import SIDES, check_output, number, rescue, save, strip
from .imaging.watermark import MESSAGE, add_watermark
from .latents import decode
from .loading import assemble, load, with_schedule
from .prompt import encode_prompt
from .sampling import OnFinish, seeds_from

log = logging.getLogger("miniflux")

Inputs = Callable[[Flux, argparse.Namespace], dict]
States = list[tuple[float, Tensor]]

# Flags that name images, which --safety filters.
IMAGES = ("image", "reference", "control_image", "canny", "depth", "ip_image", "negative_ip_image")


def no_inputs(flux: Flux, args: argparse.Namespace) -> dict:
    return {}


def run(p: TaskParser, paint: Callable, inputs: Inputs = no_inputs,
        argv: list[str] | None = None) -> None:
    """Run a task as a command; every mistake of the user ends in one line.

    p: the parser. Each flag is the keyword of `paint` of its name.
    paint: the task's function.
    inputs: makes the keywords that take more than a flag.
    argv: the arguments (default: those of the process)."""
    args = p.parse_args(argv)
    quiet = args.quiet or not distributed.is_rank_zero()
    level = logging.ERROR if quiet else logging.INFO
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stderr)
    written: list[Path] = []
    try:
        check_counts(args)
        paths = output_paths(args)
        note_flags_without_effect(args)
        finish = on_finish(args)
        flux = model(args)
        keywords = task_keywords(flux, args, paint) | inputs(flux, args)
        trouble = paint_and_save(p, args, flux, paint, keywords, finish, paths, written, quiet)
        if trouble:
            p.error("; ".join(trouble))
    except KeyboardInterrupt:
        stopped = f"stopped; {len(written)} of {args.num_images} images are written"
        raise KeyboardInterrupt(stopped) from None
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        p.error(str(error))


def paint_and_save(p: TaskParser, args: argparse.Namespace, flux: Flux, paint: Callable,
                   keywords: dict, finish: OnFinish | None, paths: list[Path],
                   written: list[Path], quiet: bool) -> list[str]:
    """Paint the images, a batch at a time, and write each at once.

    written: the paths of finished images are added to it.

    Returns what went wrong after an image was finished, one sentence each."""
    count = len(paths)
    at_once = batch_size(args)
    if at_once < count:                                     # the text is encoded once for all
        for name in ("prompt", "negative_prompt"):
            if keywords.get(name) is not None:
                keywords[name] = encode_prompt(flux, keywords[name], args.max_text_tokens)
    preview = preview_path(args)
    look = preview_decoder(args, flux)
    metadata = common_metadata(p, args)
    exif = marks(p.prog.rpartition(".")[2], flux.config.name,
                 None if args.no_metadata else args.prompt)
    seeds = seeds_from(args.seed, count)
    writes = distributed.is_rank_zero()
    states: States = []
    trouble: list[str] = []

    def before_step(step: int, t: float, x: Tensor) -> None:
        if step == 0 and not written and writes:
            check_size(args, paths, 8 * x.shape[3], 8 * x.shape[2])
        if preview and not written:
            states.append((t, x[:1]))

    for first in range(0, count, at_once):
        images = paint(flux, **keywords | {
            "seed": seeds[first],
            "num_images": min(at_once, count - first),
            "output": "pil",
            "progress": not quiet,
            "on_finish": finish,
            "on_step": before_step,
        })
        if not writes:
            continue
        for image, path, seed in zip(images, paths[first:], seeds[first:]):
            text = metadata | image.info | {"command": spell(p, args, seed)}
            place, mishap = rescue(image, path, {} if args.no_metadata else text, exif)
            if mishap:
                trouble.append(mishap)
            if place:
                written.append(place)
                say(place)
        if preview and first == 0:
            text = {} if args.no_metadata else metadata | images[0].info
            mishap = write_preview(states, look, finish, images[0], preview, text, exif)
            if mishap:
                trouble.append(mishap)
    return trouble


# ------------------------------------------------------------------------ before the first step


def check_counts(args: argparse.Namespace) -> None:
    check_number("--num-images", args.num_images, 1, 1000, whole=True)
    if args.batch is not None:
        check_number("--batch", args.batch, 1, 1000, whole=True)


def batch_size(args: argparse.Namespace) -> int:
    """How many images are painted at once; several processes share all of them."""
    if args.batch is not None:
        return min(args.batch, args.num_images)
    return args.num_images if distributed.is_distributed() else 1


def output_paths(args: argparse.Namespace) -> list[Path]:
    """Where each image is to be written, after a check that it can be."""
    output = check_output(args.output)
    paths = [number(output, i, args.num_images) for i in range(args.num_images)]
    check_output(paths[-1])
    if preview_path(args):
        check_output(preview_path(args))
    return paths


def preview_path(args: argparse.Namespace) -> Path | None:
    if not args.preview and not args.preview_with:
        return None
    return Path(os.path.splitext(args.output)[0] + "-preview.png")


def check_size(args: argparse.Namespace, paths: list[Path], width: int, height: int) -> None:
    """Whether images of this size can be written as the flags ask for."""
    suffix = paths[0].suffix.lower()
    if max(width, height) > SIDES[suffix]:
        raise ValueError(f"a {suffix} holds at most {SIDES[suffix]} pixels a side, this image has "
                         f"{width} x {height}: give --output a name that ends in .png")
    if args.watermark and (width // 8) * (height // 8) < len(MESSAGE):
        raise ValueError(f"{width} x {height} pixels have no room for the watermark's "
                         f"{len(MESSAGE)} bits, of 8 x 8 pixels each: make the image larger, or "
                         "leave --watermark out")
    # Note: a PNG of noise is as large as its bytes.
    check_output(paths[0], room=3 * width * height * len(paths))


def note_flags_without_effect(args: argparse.Namespace) -> None:
    """Log flags that act only together with others, which are not there."""
    has_negative = args.negative_prompt is not None
    guided = args.true_cfg > 1
    given = {name: value for name, value in vars(args).items() if value}
    has_mask = {"mask", "mask_from_alpha", "expand"} & given.keys()
    low, high = given.get("thresholds", (50, 200))
    notes = {
        "--negative-prompt acts only with --true-cfg above 1": has_negative and not guided,
        "--true-cfg acts only with a --negative-prompt": guided and not has_negative,
        "--ip-adapter acts only with an --ip-image":
            "ip_adapter" in given and "ip_image" not in given,
        "--negative-ip-image acts only with --true-cfg above 1 and a --negative-prompt":
            "negative_ip_image" in given and not (guided and has_negative),
        "--lora-lenient acts only with --lora": args.lora_lenient and not args.lora,
        "--thresholds acts only with --canny":
            (low, high) != (50, 200) and "canny" not in given,
        "--mask-blur acts only with a mask": "mask_blur" in given and not has_mask,
    }
    for note, applies in notes.items():
        if applies:
            log.warning("%s: it changes nothing here", note)
    if low > high:
        raise ValueError(f"--thresholds are {low:g} and {high:g}: expected the lower one first")


# -------------------------------------------------------------------------------- the model


def model(args: argparse.Namespace) -> Flux:
    """The model that the flags ask for, on its device."""
    device, dtype = args.device, DTYPES.get(args.dtype)
    if distributed.is_distributed():
        device = distributed.start(args.device)
    if args.shard:                                          # each process takes its share from RAM
        dtype = dtype or default_dtype(find_device(device))
        device = "cpu"
    if args.offload:
        return offloaded(args, find_device(device), dtype)
    flux = load(args.model, device=device, dtype=dtype, transformer=args.transformer,
                schedule=args.schedule)
    return adapt(flux, args)


def offloaded(args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> Flux:
    """The model whose parts are loaded to the device in turn.

    Its files stay mapped, so that no weight is in memory twice."""
    with concat_on_disk() if args.offload == "disk" else nullcontext():
        flux = assemble(args.model, torch.device("cpu"), None, args.transformer)
    if args.schedule:
        flux = with_schedule(flux, args.schedule)
    return offload(adapt(flux, args), device, args.offload, dtype=dtype or default_dtype(device))


def adapt(flux: Flux, args: argparse.Namespace) -> Flux:
    """The model with the features that the flags ask for, in their legal order."""
    if args.shard and args.offload:
        raise ValueError("--shard and --offload both place the weights: give one of them")
    if args.quantize:
        flux = quantize(flux, args.quantize)
    for file, scale, name in zip(args.lora, lora_scales(args), lora_names(args.lora)):
        flux = add_lora(flux, file, scale, name, strict=not args.lora_lenient)
    for file in getattr(args, "ip_adapter", None) or []:
        flux = add_ip_adapter(flux, file, args.image_encoder)
    if args.compile:
        flux = compile(flux)
    if args.cache or args.cache_threshold is not None or args.cache_interval is not None:
        flux = cache(flux, args.cache or "first_block", threshold=args.cache_threshold,
                     interval=args.cache_interval)
    if args.tile is not None:
        flux = tile(flux, args.tile)
    if args.shard or distributed.is_distributed():
        flux = distributed.distribute(flux, args.shard)
    return flux


def lora_scales(args: argparse.Namespace) -> list[float]:
    scales = [1.0] * len(args.lora) if args.lora_scales is None else args.lora_scales
    if not args.lora and scales:
        raise ValueError("--lora-scales without a LoRA: name one by --lora")
    if len(scales) != len(args.lora):
        raise ValueError(f"there are {len(scales)} scales for {len(args.lora)} LoRAs: "
                         "give one for each")
    return scales


def lora_names(files: list[str]) -> list[str]:
    """A name of its own for each file: its last part, or the whole path where several end alike.

    >>> lora_names(["a/neon.safetensors", "b/neon.safetensors", "c/ink.safetensors"])
    ['a/neon.safetensors', 'b/neon.safetensors', 'ink']
    """
    short = [Path(file).name.removesuffix(".safetensors") for file in files]
    names = [name if short.count(name) == 1 else file for name, file in zip(short, files)]
    for i, name in enumerate(names):
        if name in names[:i]:                               # the very same file twice
            names[i] = f"{name} ({names[:i].count(name) + 1})"
    return names


# ------------------------------------------------------------------------------- its inputs


def task_keywords(flux: Flux, args: argparse.Namespace, paint: Callable) -> dict:
    """The keywords of `paint` that flags of the same name give."""
    names = inspect.signature(paint).parameters
    keywords = {name: value for name, value in vars(args).items()
                if name in names and value is not None}
    if hasattr(args, "controlnet"):
        keywords["controlnet"] = controls(flux, args)
    if {"ip_image", "negative_ip_image"} & keywords.keys() and not args.ip_adapter:
        raise ValueError("there is an image for an IP-Adapter, but no IP-Adapter: "
                         "name one by --ip-adapter")
    if len(keywords.get("ip_scale", ())) == 1:
        keywords["ip_scale"], = keywords["ip_scale"]
    return keywords


def image_and_mask(flux: Flux, args: argparse.Namespace) -> dict:
    """The image and the mask that the flags of `add_image_and_mask` ask for."""
    image, mask = args.image, args.mask
    if getattr(args, "expand", None):
        image, mask = expand_canvas(image, *args.expand)
    elif args.mask_from_alpha:
        mask = mask_from_alpha(image)
    if args.mask_blur:
        mask = blur_mask(mask, args.mask_blur)
    return {"image": image, "mask": mask}


def controls(flux: Flux, args: argparse.Namespace) -> list[Control]:
    """The ControlNets that the flags of `add_controls` ask for.

    One scale, start, end or mode serves all of them."""
    nets, weight = args.controlnet or [], flux.mmdit.img_in.weight
    columns = []
    for field in Control._fields[1:]:
        given = getattr(args, f"control_{field}")
        if given and not nets:
            raise ValueError(f"--control-{field} without a ControlNet: name one by --controlnet, "
                             "or use the task control")
        values = given or ([] if field == "image" else [Control._field_defaults[field]])
        if len(values) != len(nets) and (len(values) > 1 or field == "image"):
            raise ValueError(f"there are {len(values)} values of --control-{field} for {len(nets)} "
                             "ControlNets: give one for each")
        columns.append(values * len(nets) if len(values) == 1 else values)
    columns[-1] = [control_mode(mode) for mode in columns[-1]]
    return [Control(load_controlnet(net, device=weight.device, dtype=weight.dtype), *rest)
            for net, *rest in zip(nets, *columns)]


def control_mode(mode: str | None) -> int | str | None:
    if mode is None or mode == "none":
        return None
    return int(mode) if mode.isdecimal() else mode


# ------------------------------------------------------------------------------ its outputs


def common_metadata(p: TaskParser, args: argparse.Namespace) -> dict[str, object]:
    """The text that all images of a command carry."""
    metadata = {"prompt": args.prompt, "model": args.model, "version": __version__}
    for name, value in vars(args).items():
        if name not in p.shared and value not in (None, False):
            metadata[name] = value
    if args.lora:
        scaled = zip(args.lora, lora_scales(args))
        metadata["lora"] = ", ".join(f"{file} {scale:g}" for file, scale in scaled)
    return metadata


def on_finish(args: argparse.Namespace) -> OnFinish | None:
    """The function of finished images that the flags ask for: first filter, then mark.

    With --safety, the prompt and the images of the flags are filtered here."""
    steps: list[OnFinish] = []
    if args.safety:
        steps.append(safety_filter(args))
    if args.watermark:
        steps.append(with_watermark)
    if not steps:
        return None

    def finish(images: Tensor) -> Tensor:
        for step in steps:
            images = step(images)
        return images

    return finish


def safety_filter(args: argparse.Namespace) -> OnFinish:
    from .safety.filters import is_flagged, load_filters, stop_flagged

    if len(args.safety) > 2:
        raise ValueError(f"--safety has {len(args.safety)} filters: "
                         "expected a classifier and at most one Pixtral")
    filters = load_filters(*args.safety, device=args.device)
    if filters.pixtral is not None and args.prompt and is_flagged(args.prompt, filters):
        raise ValueError("the prompt was stopped by the content filter: try another")
    for flag in IMAGES:
        given = getattr(args, flag, None) or []
        for path in [given] if isinstance(given, str) else given:
            if is_flagged(Path(path), filters):
                raise ValueError(f"the image {path} was stopped by the content filter: try another")
    return stop_flagged(filters)


def with_watermark(images: Tensor) -> Tensor:
    """With the watermark; as they are if they are too small, as --paste-back may make them."""
    try:
        return add_watermark(images)
    except ValueError as error:
        log.error("written without the watermark: %s", error)
        return images


def preview_decoder(args: argparse.Namespace, flux: Flux) -> Callable[[Tensor], Tensor]:
    """The function from latents to images that previews use."""
    if args.preview_with:
        from .imaging.preview import load_preview
        return load_preview(args.preview_with, flux)
    return partial(decode, flux)


def write_preview(states: States, look: Callable[[Tensor], Tensor], finish: OnFinish | None,
                  last: Image.Image, path: Path, metadata: dict,
                  exif: dict[int, bytes]) -> str | None:
    """Write the strip of the image expected at each step; returns what went wrong, if anything."""
    try:
        save(strip([*estimates(states, look, finish), last]), path, metadata, exif)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not is_out_of_memory(error):
            raise
        return f"the preview {path} cannot be written: {' '.join(str(error).split()):.200}"
    say(path)
    return None


def estimates(states: States, look: Callable[[Tensor], Tensor],
              finish: OnFinish | None) -> list[Image.Image]:
    """For each step but the last, the image at which the flow is expected to end.

    x - t · v, with the velocity v from the step that followed."""
    images = []
    for (t, x), (t_next, x_next) in zip(states, states[1:]):
        v = (x_next - x) / (t_next - t)
        seen = look(x - t * v)                              # one at a time, to save memory
        images += to_pil(finish(seen) if finish else seen)
    return images
