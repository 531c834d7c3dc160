"""Measures what a variant adds: does it fill the hole, follow the edges, keep to the depths, obey
an instruction, vary an image? Held-out combinations only.

    python -m miniflux.tiny.measure.evaluate_variant fill --model tiny-training/fill
    python -m miniflux.tiny.measure.evaluate_variant controlnet --model tiny-training/controlnet

    fill         the judge (`judge.py`) finds the object in the hole; grey levels by which the rest
                 differs
    canny        edges of the result within 2 pixels of those given, and the other way round:
                 precision, recall, F1; controlnet (with the model tiny) the same
    depth        the part that differs from the ground is the part that was given as near:
                 intersection over union
    kontext      where the edit changes the image, the result is twice as near to the scene after it
                 as to the one before; elsewhere, the peak signal-to-noise ratio to the scene before
    redux        the judge sees in the result the object, the colour and the ground of the image
    ip-adapter   the ground of the image, and the object and the colour of the prompt

Each figure stands beside that of the true scene after the autoencoder, which no variant can exceed.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ...adapters.controlnet import load_controlnet
from ...adapters.ip_adapter import add_ip_adapter
from ...checks import check_number
from ...command import command
from ...control import control
from ...fill import fill
from ...flags import Parser
from ...flux import Flux
from ...generate import generate
from ...imaging.saving import check_output, save
from ...kontext_edit import kontext_edit
from ...loading import load
from ...networks.controlnet import ControlNet
from ...redux import redux
from ..train.variant import VARIANTS
from ..world.edits import EDITS, named, sample_edit
from ..world.grounds import IMAGE_SIZE, render_ground
from ..world.pairs import alike, depth_map, edges
from ..world.rendering import contact_sheet, object_masks, render
from ..world.scenes import Scene, sample_scene
from .evaluate import rates, round_trip
from .judge import judge

BATCH = 16
STEPS = 28
Figures = dict[str, float]


def object_box(scene: Scene, room: int = 6) -> np.ndarray:
    """The hole around a scene's only object: (128, 128) uint8."""
    o, = scene.objects
    mask = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    rows = slice(max(o.y - room, 0), o.y + o.size + room)
    mask[rows, max(o.x - room, 0):o.x + o.size + room] = 255
    return mask


def edge_f1(a: np.ndarray, b: np.ndarray, reach: int = 2) -> float:
    """Two edge maps (128, 128, 3): the harmonic mean of the shares of each that lie within `reach`
    pixels of the other."""
    maps = torch.from_numpy(np.stack([a, b])[..., 0] > 0)[:, None].float()      # (2, 1, 128, 128)
    near = F.max_pool2d(maps, 2 * reach + 1, stride=1, padding=reach)
    shares = [float((maps[i] * near[1 - i]).sum() / maps[i].sum().clamp(min=1)) for i in (0, 1)]
    return 2 * shares[0] * shares[1] / max(sum(shares), 1e-9)


def overlap(image: np.ndarray, scene: Scene) -> float:
    """Intersection over union of the scene's objects and of what differs from its ground by more
    than 40 grey levels."""
    painted = np.abs(image - render_ground(scene.ground, scene.seed)).max(-1) > 40
    wanted = object_masks(scene).any(0)
    return float((painted & wanted).sum() / max((painted | wanted).sum(), 1))


def follows(result: np.ndarray, before: np.ndarray, after: np.ndarray) -> tuple[bool, float]:
    """Whether an image (128, 128, 3) shows the edit, and how well it keeps the rest: in dB, NaN if
    the edit leaves nothing."""
    changed, result = (before != after).any(-1), np.float32(result)
    to_after = float(np.abs(result - after)[changed].mean())
    to_before = float(np.abs(result - before)[changed].mean())
    error = float("nan")
    if not changed.all():
        error = float(np.square(result - before)[~changed].mean())
    return to_after < to_before / 2, 10 * np.log10(255**2 / max(error, 1e-9))


def generate_in_batches(count: int, generate_part: Callable[[slice], list]) -> np.ndarray:
    """The images (count, 128, 128, 3) that `generate_part` makes of one slice after another."""
    images = []
    for i in range(0, count, BATCH):
        images += generate_part(slice(i, min(i + BATCH, count)))
    return np.stack([np.asarray(image) for image in images])


def measure(flux: Flux, variant: str, count: int, seed: int = 0, steps: int = STEPS,
            net: ControlNet | None = None) -> tuple[Figures, np.ndarray]:
    """The figures of a variant over `count` held-out scenes, from seed on; and the images. With a
    net: of the model with it."""
    scenes = [sample_scene(random.Random(seed + i), kind="single", held_out=True)
              for i in range(count)]
    prompts = [scene.caption for scene in scenes]
    true = np.stack([render(scene) for scene in scenes])
    holes = [object_box(scene) for scene in scenes]
    given = list(true)
    if variant == "canny":
        given = [edges(image) for image in true]
    elif variant == "depth":
        given = [depth_map(scene) for scene in scenes]

    def part(part: slice) -> list:
        keywords = dict(width=IMAGE_SIZE, height=IMAGE_SIZE, seed=seed + part.start, steps=steps,
                        progress=False)
        if net:
            controlnet = (net, given[part], 1.0, 0.0, 1.0, variant)
            return generate(flux, prompts[part], controlnet=controlnet, **keywords)
        if variant == "fill":
            return fill(flux, prompts[part], given[part], holes[part], **keywords)
        return control(flux, prompts[part], given[part], **keywords)

    images, best = generate_in_batches(count, part), round_trip(flux, true)
    figures = {}
    for suffix, results in (("", images), (", at best", best)):
        right = [verdict.object == scene.objects[0].name
                 for verdict, scene in zip(judge(results), scenes)]
        figures[f"object right{suffix}"] = float(np.mean(right))
    for suffix, results in (("", images), (", at best", best)):
        if variant == "fill":
            difference = np.abs(np.float32(results) - true)[np.stack(holes) == 0]
            figures[f"grey levels outside the hole{suffix}"] = float(difference.mean())
        elif variant == "canny":
            scores = [edge_f1(edges(result), edge) for result, edge in zip(results, given)]
            figures[f"edge F1{suffix}"] = float(np.mean(scores))
        else:
            shares = [overlap(result, scene) for result, scene in zip(results, scenes)]
            figures[f"overlap with what is near{suffix}"] = float(np.mean(shares))
    return figures, images


def measure_edits(flux: Flux, count: int, seed: int = 0, steps: int = STEPS
                  ) -> tuple[Figures, np.ndarray]:
    """The same for a model that edits by instructions; each kind of edit comes equally often."""
    kinds = tuple(EDITS)
    edits = [sample_edit(random.Random(seed + i), kinds[i % len(kinds)], held_out=True)
             for i in range(count)]
    before, after = (np.stack([render(edit[i]) for edit in edits]) for i in (0, 2))
    instructions = [edit[1] for edit in edits]

    def part(part: slice) -> list:
        return kontext_edit(flux, instructions[part], list(before[part]), seed=seed + part.start,
                            steps=steps, progress=False)

    images = generate_in_batches(count, part)
    figures = {}
    for suffix, results in (("", images), (", at best", round_trip(flux, after))):
        done = [follows(*scene) for scene in zip(results, before, after)]
        kept = [psnr for _, psnr in done if np.isfinite(psnr)]
        figures[f"instruction done{suffix}"] = float(np.mean([right for right, _ in done]))
        figures[f"the rest kept, dB{suffix}"] = float(np.mean(kept))
        if not suffix:
            for i, kind in enumerate(kinds[:count]):
                own = [right for right, _ in done[i::len(kinds)]]
                figures[f"  {kind}"] = float(np.mean(own))
    return figures, images


def measure_variations(flux: Flux, count: int, seed: int = 0, steps: int = STEPS
                       ) -> tuple[Figures, np.ndarray]:
    """The same for a model that reads images; every second object has another colour than its
    glyph. Redux reads the scenes; an IP-Adapter is given the objects as a prompt, and reads images
    of others on their grounds."""
    scenes = [sample_scene(random.Random(seed + i), kind="single", coloured=i % 2 == 1,
                           held_out=True) for i in range(count)]
    true = np.stack([render(scene) for scene in scenes])

    def vary(i: int) -> list:
        return redux(flux, true[i], seed=seed + i, steps=steps, progress=False)

    def follow(i: int, scale: float = 1.0) -> list:
        reference = render(alike(scenes[i], random.Random(seed + i)))
        return generate(flux, named(scenes[i]), ip_image=reference, ip_scale=scale, seed=seed + i,
                        steps=steps, progress=False)

    def stack(generate_one: Callable[[int], list]) -> np.ndarray:
        return np.stack([np.asarray(generate_one(i)[0]) for i in range(count)])

    images = stack(vary if flux.redux else follow)
    results = {"": images, ", at best": round_trip(flux, true)}
    if not flux.redux:
        results[", without the image"] = stack(lambda i: follow(i, 0.0))
    figures = {}
    for suffix, painted in results.items():
        seen = rates(judge(painted), scenes)
        for what in ("object", "colour", "ground"):
            figures[f"{what} right{suffix}"] = getattr(seen, what)
    return figures, images


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.measure.evaluate_variant",
                    description="Measure a variant on held-out combinations.")
    add = parser.add_argument
    add("variant", choices=[*VARIANTS, "kontext", "redux", "controlnet", "ip-adapter"],
        help="what the model is made for")
    add("--model", required=True, help="a shipped name or a folder (required)")
    add("--images", type=int, default=50, help="how many to generate (default 50)")
    add("--output", default="evaluation.png",
        help="the contact sheet to write (default evaluation.png)")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        check_number("--images", args.images, 1, 100_000, whole=True)
        figures, images = measure_by_name(args.variant, args.model, args.images)
        save(contact_sheet(list(images[:32]), [""] * 32), output, {"model": args.model})
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    lines = [f"{name:36}{value:8.3f}" for name, value in figures.items()]
    print("\n".join([*lines, str(output)]))


def measure_by_name(variant: str, model: str, count: int) -> tuple[Figures, np.ndarray]:
    if variant == "controlnet":
        return measure(load("tiny"), "canny", count, net=load_controlnet(model))
    if variant == "ip-adapter":
        return measure_variations(add_ip_adapter(load("tiny"), model), count)
    if variant in VARIANTS:
        return measure(load(model), variant, count)
    return (measure_edits if variant == "kontext" else measure_variations)(load(model), count)


if __name__ == "__main__":
    main()
