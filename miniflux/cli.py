"""What the commands share: flags, errors in one line, pictures on disk.

The flags mirror the function's keywords; a flag that is not given leaves the function's own default in place.
"""

import argparse
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial, reduce
from pathlib import Path
from typing import NoReturn

import torch
from PIL import Image
from torch import Tensor

from . import __version__, command
from .adapters.controlnet import MODES, Control, load_controlnet
from .adapters.ip_adapter import add_ip_adapter
from .adapters.lora import add_lora
from .checkpoints.finding import list_models
from .checkpoints.formats import concat_on_disk
from .checks import check_number
from .command import say
from .devices import DTYPES, default_dtype, find_device
from .engine import distributed
from .engine.caching import METHODS, cache
from .engine.compiling import compile
from .engine.offload import MODES as TURNS
from .engine.offload import offload
from .engine.quantize import FORMATS, quantize
from .engine.tiling import tile
from .flux import SCHEDULES, Flux
from .imaging.images import to_pil
from .imaging.info import marks, spell
from .imaging.masks import blur_mask, expand_canvas, mask_from_alpha
from .imaging.saving import SIDES, check_output, number, rescue, save, strip
from .imaging.watermark import MESSAGE, add_watermark
from .latents import decode
from .loading import assemble, load, with_schedule
from .prompt import encode_prompt
from .sampling import SAMPLERS, OnFinish, seeds_from
from .settings import DEFAULTS, DISTILLED_STEPS, MAX_SEED

PICTURES = ("image", "reference", "control_image", "canny", "depth", "ip_image", "negative_ip_image")  # flags that name some


log = logging.getLogger("miniflux")


class Parser(command.Parser):
    """Of several processes, only the first to fail says why."""

    def error(self, message: str) -> NoReturn:
        if not distributed.is_first_to_fail():
            self.exit(2)
        super().error(in_flags(self, message))


class TaskParser(Parser):
    """The parser of a task, which can point to the task that takes a flag."""

    def describe(self, unknown: list[str]) -> str:
        flag = next((word.partition("=")[0] for word in unknown if word.startswith("-")), None)
        if flag in ELSEWHERE:
            return f"{self.prog.rpartition('.')[2]} takes no {flag}: that is a flag of {ELSEWHERE[flag]}"
        return super().describe(unknown)


# Flags that only some tasks have.
ELSEWHERE = {
    "--image": "image_to_image, inpaint, fill, control, redux, kontext_edit and kontext_inpaint",
    "--strength": "image_to_image, inpaint, fill, control and kontext_inpaint",
    "--mask": "inpaint, fill, control and kontext_inpaint",
    "--expand": "fill",
    "--paste-back": "fill",
    "--canny": "control",
    "--depth": "control",
    "--reference": "kontext_inpaint",
    "--controlnet": "generate, image_to_image and inpaint",
    "--ip-adapter": "generate, image_to_image, inpaint, kontext_edit and kontext_inpaint",
}

# Advice of the functions -> advice that a command line can follow.
ADVICE = {
    "strict=False leaves them out": "--lora-lenient leaves them out",
    'ask for output="latents", or add vae/': "add vae/",
    "pass an encoded Prompt, or add": "add",
    'load("redux"), or add it with add_redux(flux, source)': "choose one that has, such as --model tiny-redux or --model redux",
    ", and call start() in each of them": "",
    "give image= too": "give --image too",
    "the mode is ": "--control-mode is ",
    "leave the mode out": "leave --control-mode out, or give none for this net",
    "max_text_tokens is": "--max-text-tokens is",
    "as image_encoder=": "as --image-encoder",
}


def in_flags(p: argparse.ArgumentParser, message: str) -> str:
    """The message of a function with flags in the place of its keywords: `steps is 0` -> `--steps is 0`."""
    for python, shell in ADVICE.items():
        message = message.replace(python, shell)
    for action in p._actions:
        if not action.option_strings:
            continue
        name, flag = action.dest, action.option_strings[-1]
        message = re.sub(rf"(?<![\w./-]){name}=", f"{flag} ", message)         # "choose with transformer=x"
        message = re.sub(rf"^{name} (?=is |are |has )", f"{flag} ", message)
        if "_" in name:                                     # no word of English, so it is the keyword
            message = re.sub(rf"(?<![\w./-]){name}(?![\w./-])", flag, message)
    return message


class ListModels(argparse.Action):
    def __call__(self, parser, *_):
        say("\n".join(list_models()))
        parser.exit()


def parser(task: str, description: str, prompt: bool = True) -> TaskParser:
    """The flags of all tasks; a task adds its own."""
    p = TaskParser(prog=f"python -m miniflux.{task}", description=description)
    if prompt:
        p.add_argument("prompt", help="what to paint")
    shape = "the model's" if task in ("generate", "redux") else "the picture's shape, at the model's number of pixels"
    p.add_argument("--output", default=f"{task}.png", help=f"the picture to write; several are numbered (default {task}.png)")
    p.add_argument("--model", default="tiny", help="a shipped name, an official short name, a Hub id or a folder (default tiny)")
    p.add_argument("--transformer", help="a single file whose transformer replaces the model's (default: none)")
    p.add_argument("--schedule", choices=list(SCHEDULES),
                   help="how the times are spaced (default: as the model's folder asks for)")
    p.add_argument("--width", type=int, help=f"pixels, rounded down to a multiple of 16 (default: {shape})")
    p.add_argument("--height", type=int, help=f"pixels, rounded down to a multiple of 16 (default: {shape})")
    p.add_argument("--steps", type=int,
                   help=f"steps from noise to picture (default {DEFAULTS[task].steps}; {DISTILLED_STEPS} for schnell)")
    p.add_argument("--guidance", type=float, help=f"how strictly to follow the prompt (default {DEFAULTS[task].guidance})")
    p.add_argument("--seed", type=seed, default=0, help="of the first picture; the next ones count up (default 0)")
    p.add_argument("--num-images", type=int, default=1, help="pictures to paint (default 1)")
    p.add_argument("--batch", type=int,
                   help="pictures to paint at once; more need more memory, and share what --offload costs (default 1)")
    p.add_argument("--negative-prompt", help="what not to paint; acts with --true-cfg above 1 (default: none)")
    p.add_argument("--true-cfg", type=float, default=1.0, help="scale of two-pass guidance (default 1.0: off)")
    p.add_argument("--sigmas", type=float, nargs="+", help="own falling times in (0, 1], not --steps (default: even)")
    p.add_argument("--sampler", choices=SAMPLERS, help="euler, or heun: second order, two passes a step (default euler)")
    p.add_argument("--max-text-tokens", type=int, help="T5 tokens the prompt is padded to (default: the model's)")
    p.add_argument("--quantize", choices=FORMATS, help="weights in fewer bits (default: as they are)")
    p.add_argument("--lora", nargs="+", default=[], metavar="FILE",
                   help="LoRAs to add: files, folders, Hub ids or shipped names (default: none)")
    p.add_argument("--lora-scales", type=float, nargs="+", metavar="SCALE", help="how strongly each of them acts (default: 1)")
    p.add_argument("--lora-lenient", action="store_true",
                   help="leave out what of a LoRA belongs to no part of this model (default: stop there)")
    p.add_argument("--device", help="cuda, mps, cpu (default: the first of these there is)")
    p.add_argument("--dtype", choices=DTYPES, help="of the weights (default bfloat16, float32 on the CPU)")
    p.add_argument("--offload", choices=TURNS, help="parts of the model take turns on the device (default: all are there)")
    p.add_argument("--cache", choices=METHODS, help="compute only a part of the steps in full (default: off)")
    p.add_argument("--cache-threshold", type=float, help="change of the first block up to which a step is not computed "
                                                         f"(default {METHODS['first_block']['threshold']})")
    p.add_argument("--cache-interval", type=int, help=f"of the computed steps of --cache taylor (default {METHODS['taylor']['interval']})")
    p.add_argument("--tile", type=int, metavar="PIXELS", help="read and paint pictures in tiles of this size (default: as a whole)")
    p.add_argument("--compile", action="store_true", help="compile the transformer's blocks, which takes a minute (default: off)")
    p.add_argument("--shard", action="store_true", help="with torchrun: each process keeps only its share of the weights (default: off)")
    p.add_argument("--preview", action="store_true", help="also write the picture expected at each step (default: off)")
    p.add_argument("--preview-with", metavar="FILE", help="the same without decoding, by a map of `miniflux preview` or TAEF1 (default: off)")
    p.add_argument("--safety", nargs="+", metavar="FILTER", help="stop pictures that this classifier flags, such as "
                   "Falconsai/nsfw_image_detection, or that a Pixtral named after it does, and its prompts (default: no filter)")
    p.add_argument("--watermark", action="store_true", help="hide the original's invisible watermark in the picture (default: off)")
    p.add_argument("--no-metadata", action="store_true", help="write into the picture only that it is generated, and by which model "
                                                              "(default: also the prompt and all settings)")
    p.add_argument("--quiet", action="store_true", help="no progress bar and no notes (default: off)")
    p.add_argument("--list-models", action=ListModels, nargs=0, help="say what is shipped and what is in the cache, and stop")
    p.add_argument("--version", action="version", version=__version__)
    p.shared = {action.dest for action in p._actions}
    return p


def seed(text: str) -> int:
    """A whole number. Other programs draw one for "random" or -1; here a picture can be painted again."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_SEED:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: expected a whole number from 0 to {MAX_SEED} (for another picture "
                                         "each time, draw one yourself: --seed $RANDOM)")
    return number


def add_strength(p: Parser, default: float) -> None:
    p.add_argument("--strength", type=float, default=default, help=f"how far back to noise, in (0, 1] (default {default})")


def add_image_and_mask(p: Parser, expand: bool = False) -> None:
    """The flags of the tasks that repaint a part of a picture; `image_and_mask` reads them."""
    p.add_argument("--image", required=True, help="the picture (required)")
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument("--mask", help="white where the picture is to be repainted")
    source.add_argument("--mask-from-alpha", action="store_true", help="the picture's transparent part is the mask")
    if expand:
        source.add_argument("--expand", type=int, nargs=4, metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
                            help="paint beyond the picture's edges, so many pixels on each side")
    p.add_argument("--mask-blur", type=float, default=0.0, help="pixels by which the mask's edge is blurred (default 0.0)")
    if not expand:
        p.add_argument("--mask-padding", type=int, help="paint only the mask's surroundings, so many pixels wider, enlarged "
                                                        "(default: the whole picture)")


def image_and_mask(flux: Flux, args: argparse.Namespace) -> dict:
    """The picture and the mask that the flags of `add_image_and_mask` ask for."""
    image, mask = args.image, args.mask
    if getattr(args, "expand", None):
        image, mask = expand_canvas(image, *args.expand)
    elif args.mask_from_alpha:
        mask = mask_from_alpha(image)
    return {"image": image, "mask": blur_mask(mask, args.mask_blur) if args.mask_blur else mask}


def add_controls(p: Parser) -> None:
    """The flags of the tasks that ControlNets can steer; `controls` reads them."""
    p.add_argument("--controlnet", nargs="+", metavar="NET",
                   help="ControlNets: files, folders, Hub ids or shipped names (default: none)")
    p.add_argument("--control-image", nargs="+", metavar="PICTURE", help="the control picture of each of them")
    p.add_argument("--control-scale", nargs="+", type=float, metavar="SCALE", help="how strongly each of them acts (default 1.0)")
    p.add_argument("--control-start", nargs="+", type=float, metavar="PART", help="from which part of the steps on (default 0.0)")
    p.add_argument("--control-end", nargs="+", type=float, metavar="PART", help="until which part of the steps (default 1.0)")
    p.add_argument("--control-mode", nargs="+", metavar="KIND", help=f"of control, for union nets: {', '.join(MODES)}, a number, or "
                                                                           "none for another net")


def controls(flux: Flux, args: argparse.Namespace) -> list[Control]:
    """The ControlNets that the flags of `add_controls` ask for; one scale, start, end or mode serves all of them."""
    nets, weight, columns = args.controlnet or [], flux.mmdit.img_in.weight, []
    for field in Control._fields[1:]:
        values = getattr(args, f"control_{field}") or ([] if field == "image" else [Control._field_defaults[field]])
        if values and not nets and getattr(args, f"control_{field}"):
            raise ValueError(f"--control-{field} without a ControlNet: name one by --controlnet, or use the task control")
        if len(values) != len(nets) and (len(values) > 1 or field == "image"):
            raise ValueError(f"there are {len(values)} values of --control-{field} for {len(nets)} ControlNets: give one for each")
        columns.append(values * len(nets) if len(values) == 1 else values)
    columns[-1] = [int(mode) if mode and mode.isdecimal() else None if mode == "none" else mode for mode in columns[-1]]
    return [Control(load_controlnet(net, device=weight.device, dtype=weight.dtype), *rest) for net, *rest in zip(nets, *columns)]


def add_ip_images(p: Parser) -> None:
    """The flags of the tasks that can follow a picture."""
    p.add_argument("--ip-adapter", nargs="+", metavar="FILE",
                   help="IP-Adapters to add: files, folders, Hub ids or shipped names (default: none)")
    p.add_argument("--ip-image", nargs="+", metavar="PICTURE", help="the picture that each of them follows")
    p.add_argument("--ip-scale", nargs="+", type=float, metavar="SCALE", help="how strongly each of them acts (default 1.0)")
    p.add_argument("--negative-ip-image", nargs="+", metavar="PICTURE", help="what they avoid; acts with --true-cfg (default: black)")
    p.add_argument("--image-encoder", help="the folder or Hub id of CLIP's vision tower (default: beside the IP-Adapter, or the cached one)")


def add_auto_resize(p: Parser) -> None:
    p.add_argument("--no-auto-resize", dest="auto_resize", action="store_false",
                   help="show the model the picture in its own size (default: in the nearest shape it was trained on)")


def run(p: Parser, paint: Callable, inputs: Callable[[Flux, argparse.Namespace], dict] = lambda flux, args: {},
        argv: list[str] | None = None) -> None:
    """Parse, load, paint, save; every mistake of the user ends in one line. Each flag is the keyword of `paint` of its name;
    `inputs` makes those that take more than a flag.

    What can be checked is checked before the first step. The pictures are painted and saved one after the other (--batch at
    once), so that whatever happens later, or to one of them, costs no other."""
    args = p.parse_args(argv)
    leads = distributed.is_rank_zero()
    quiet = args.quiet or not leads
    logging.basicConfig(level=logging.ERROR if quiet else logging.INFO, format="%(message)s", stream=sys.stderr)
    written: list[Path] = []
    try:
        device = distributed.start(args.device) if distributed.is_distributed() else args.device
        count = check_number("--num-images", args.num_images, 1, 1000, whole=True)
        at_once = count if args.batch is None and distributed.is_distributed() else min(args.batch or 1, count)
        check_number("--batch", 1 if args.batch is None else args.batch, 1, 1000, whole=True)
        output = check_output(args.output)
        paths = [number(output, i, count) for i in range(count)]
        for path in {paths[-1]} - {output}:
            check_output(path)
        preview = check_output(os.path.splitext(args.output)[0] + "-preview.png") if args.preview or args.preview_with else None
        note_flags_without_effect(args)
        finish = on_finish(args)
        dtype = DTYPES.get(args.dtype)
        if args.shard:                                      # each process takes its share from the CPU's memory
            device, dtype = "cpu", dtype or default_dtype(find_device(device))
        if args.offload:
            flux = offloaded(args, find_device(device), dtype)
        else:
            flux = load(args.model, device=device, dtype=dtype, transformer=args.transformer,
                        schedule=args.schedule)
            flux = adapt(flux, args)
        look = partial(decode, flux)
        if args.preview_with:
            from .imaging.preview import load_preview
            look = load_preview(args.preview_with, flux)
        keywords = asked(flux, args, paint) | inputs(flux, args)
        if at_once < count:                                 # the text is encoded once for all pictures
            keywords |= {name: encode_prompt(flux, keywords[name], args.max_text_tokens)
                         for name in ("prompt", "negative_prompt") if keywords.get(name) is not None}
        own = {name: value for name, value in vars(args).items() if name not in p.shared and value not in (None, False)}
        metadata = {"prompt": args.prompt, "model": args.model, "version": __version__} | own
        exif = marks(p.prog.rpartition(".")[2], flux.config.name, None if args.no_metadata else args.prompt)
        if args.lora:
            metadata["lora"] = ", ".join(f"{file} {scale:g}" for file, scale in zip(args.lora, lora_scales(args)))
        seeds, states, trouble = seeds_from(args.seed, count), [], []

        def before_step(step: int, t: float, x: Tensor) -> None:
            if step == 0 and not written and leads:
                check_size(args, paths, 8 * x.shape[3], 8 * x.shape[2])
            if preview and not written:
                states.append((t, x[:1]))

        for first in range(0, count, at_once):
            pictures = paint(flux, **keywords | {
                "seed": seeds[first], "num_images": min(at_once, count - first), "output": "pil", "progress": not quiet,
                "on_finish": finish, "on_step": before_step})
            if not leads:
                continue
            for picture, path, own_seed in zip(pictures, paths[first:], seeds[first:]):
                made = {} if args.no_metadata else metadata | picture.info | {"command": spell(p, args, own_seed)}
                place, mishap = rescue(picture, path, made, exif)
                trouble += [mishap] if mishap else []
                if place:
                    written.append(place)
                    say(place)
            if preview and first == 0:
                made = {} if args.no_metadata else metadata | pictures[0].info
                trouble += write_preview(states, look, finish, pictures[0], preview, made, exif)
        if trouble:
            p.error("; ".join(trouble))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped; {len(written)} of {args.num_images} pictures are written") from None
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        p.error(str(error))


def check_size(args: argparse.Namespace, paths: list[Path], width: int, height: int) -> None:
    """Before the first step: can pictures of this size be written as is asked for?"""
    suffix = paths[0].suffix.lower()
    if max(width, height) > SIDES[suffix]:
        raise ValueError(f"a {suffix} holds at most {SIDES[suffix]} pixels a side, this picture has {width} x {height}: give --output a "
                         "name that ends in .png")
    if args.watermark and (width // 8) * (height // 8) < len(MESSAGE):
        raise ValueError(f"{width} x {height} pixels have no room for the watermark's {len(MESSAGE)} bits, of 8 x 8 pixels each: make "
                         "the picture larger, or leave --watermark out")
    # Note: a PNG of noise is as large as its bytes.
    check_output(paths[0], room=3 * width * height * len(paths))


def note_flags_without_effect(args: argparse.Namespace) -> None:
    """Flags that only act together with others, which are not there."""
    guided = args.true_cfg > 1
    notes = {
        "--negative-prompt acts only with --true-cfg above 1": args.negative_prompt and not guided,
        "--true-cfg acts only with a --negative-prompt": guided and args.negative_prompt is None,
        "--ip-adapter acts only with an --ip-image": getattr(args, "ip_adapter", None) and not args.ip_image,
        "--negative-ip-image acts only with --true-cfg above 1 and a --negative-prompt":
            getattr(args, "negative_ip_image", None) and not (guided and args.negative_prompt is not None),
        "--lora-lenient acts only with --lora": args.lora_lenient and not args.lora,
        "--thresholds acts only with --canny": tuple(getattr(args, "thresholds", (50, 200))) != (50, 200) and not args.canny,
        "--mask-blur acts only with a mask": getattr(args, "mask_blur", 0) and not getattr(args, "mask", None)
            and not getattr(args, "mask_from_alpha", False) and not getattr(args, "expand", None),
    }
    for note, applies in notes.items():
        if applies:
            log.warning("%s: it changes nothing here", note)
    low, high = getattr(args, "thresholds", (0, 1))
    if low > high:
        raise ValueError(f"--thresholds are {low:g} and {high:g}: expected the lower one first")


def write_preview(states: list[tuple[float, Tensor]], look: Callable[[Tensor], Tensor], finish: OnFinish | None, last: Image.Image,
                  path: Path, metadata: dict, exif: dict[int, bytes]) -> list[str]:
    """Write the strip of what each step expected; returns what went wrong. The pictures are written before."""
    try:
        save(strip([*estimates(states, look, finish), last]), path, metadata, exif)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError)) and not command.is_out_of_memory(error):
            raise
        return [f"the preview {path} cannot be written: {' '.join(str(error).split()):.200}"]
    say(path)
    return []


def on_finish(args: argparse.Namespace) -> OnFinish | None:
    """What is done with the finished pictures: filtered, then marked. Also filters what the flags give: the prompt and the pictures."""
    steps: list[OnFinish] = []
    if args.safety:
        from .safety.filters import is_flagged, load_filters, stop_flagged

        if len(args.safety) > 2:
            raise ValueError(f"--safety has {len(args.safety)} filters: expected a classifier and at most one Pixtral")
        filters = load_filters(*args.safety, device=args.device)
        if filters.pixtral is not None and args.prompt and is_flagged(args.prompt, filters):
            raise ValueError("the prompt was stopped by the content filter: try another")
        for flag in PICTURES:
            given = getattr(args, flag, None) or []
            for path in [given] if isinstance(given, str) else given:
                if is_flagged(Path(path), filters):
                    raise ValueError(f"the picture {path} was stopped by the content filter: try another")
        steps.append(stop_flagged(filters))
    if args.watermark:
        steps.append(marked)
    return (lambda pictures: reduce(lambda seen, step: step(seen), steps, pictures)) if steps else None


def marked(pictures: Tensor) -> Tensor:
    """With the watermark, or as they are if they are too small for it (as with --paste-back into a small picture)."""
    try:
        return add_watermark(pictures)
    except ValueError as error:
        log.error("written without the watermark: %s", error)
        return pictures


def offloaded(args: argparse.Namespace, device: torch.device, dtype: torch.dtype | None) -> Flux:
    """The model whose parts come to the device in turn, from the files as they are: mapped, so that none is in memory twice."""
    dtype = dtype or default_dtype(device)
    with concat_on_disk() if args.offload == "disk" else nullcontext():
        flux = assemble(args.model, torch.device("cpu"), None, args.transformer)
    if args.schedule:
        flux = with_schedule(flux, args.schedule)
    return offload(adapt(flux, args), device, args.offload, dtype=dtype)


def lora_scales(args: argparse.Namespace) -> list[float]:
    scales = [1.0] * len(args.lora) if args.lora_scales is None else args.lora_scales
    if not args.lora and scales:
        raise ValueError("--lora-scales without a LoRA: name one by --lora")
    if len(scales) != len(args.lora):
        raise ValueError(f"there are {len(scales)} scales for {len(args.lora)} LoRAs: give one for each")
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


def adapt(flux: Flux, args: argparse.Namespace) -> Flux:
    """The model as the flags want it: quantised, with LoRAs and IP-Adapters, compiled, with a cache, in tiles, over several processes."""
    if args.shard and args.offload:
        raise ValueError("--shard and --offload both say where the weights lie: give one of them")
    flux = quantize(flux, args.quantize) if args.quantize else flux
    for file, scale, name in zip(args.lora, lora_scales(args), lora_names(args.lora)):
        flux = add_lora(flux, file, scale, name, strict=not args.lora_lenient)
    for file in getattr(args, "ip_adapter", None) or []:
        flux = add_ip_adapter(flux, file, args.image_encoder)
    flux = compile(flux) if args.compile else flux
    if args.cache or args.cache_threshold is not None or args.cache_interval is not None:
        flux = cache(flux, args.cache or "first_block", threshold=args.cache_threshold, interval=args.cache_interval)
    flux = tile(flux, args.tile) if args.tile is not None else flux
    return distributed.distribute(flux, args.shard) if args.shard or distributed.is_distributed() else flux


def asked(flux: Flux, args: argparse.Namespace, paint: Callable) -> dict:
    """The keywords of `paint` that flags of the same name give."""
    names = inspect.signature(paint).parameters
    keywords = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if hasattr(args, "controlnet"):
        keywords["controlnet"] = controls(flux, args)
    if {"ip_image", "negative_ip_image"} & keywords.keys() and not args.ip_adapter:
        raise ValueError("there is a picture for an IP-Adapter, but none to follow it: name one by --ip-adapter")
    if len(keywords.get("ip_scale", ())) == 1:
        keywords["ip_scale"], = keywords["ip_scale"]
    return keywords


def estimates(states: list[tuple[float, Tensor]], look: Callable[[Tensor], Tensor], finish: OnFinish | None) -> list:
    """Pictures of where each step but the last expects the flow to end: x - t·v, with v from the step that followed."""
    pictures = []
    for (t, x), (t_next, x_next) in zip(states, states[1:]):
        seen = look(x - t * (x_next - x) / (t_next - t))    # one at a time: memory for one picture is there
        pictures += to_pil(finish(seen) if finish else seen)
    return pictures
