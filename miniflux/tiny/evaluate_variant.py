"""Measures what a variant adds: does it fill the hole, follow the edges, keep to the depths, do as it is told, vary? Held-out combinations only.

    python -m miniflux.tiny.evaluate_variant fill --model tiny-training/fill
    python -m miniflux.tiny.evaluate_variant controlnet --model tiny-training/controlnet                   (with the model tiny)

    fill      the judge (`judge.py`) finds the object in the hole; the rest differs by so many grey levels
    canny     edges of the result within 2 pixels of those given, and the other way round: precision, recall, F1; controlnet the same
    depth     the part that differs from the ground is the part that was given as near: intersection over union
    kontext   where the edit changes the picture, the result is twice as near to the scene after as to the one before;
              elsewhere, the peak signal-to-noise ratio to the scene before
    redux     the judge sees in the result the object, the colour and the ground of the picture that was read; ip-adapter the ground of
              that picture, and the object and the colour of the prompt

Each figure stands beside that of the true scene after the autoencoder, which no variant can exceed.
"""

import random
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..adapters.controlnet import load_controlnet
from ..adapters.ip_adapter import add_ip_adapter
from ..cli import Parser
from ..command import command
from ..control import control
from ..fill import fill
from ..flux import Flux
from ..generate import generate
from ..imaging.images import check_number, check_output, save
from ..kontext_edit import kontext_edit
from ..loading import load
from ..networks.controlnet import ControlNet
from ..redux import redux
from .edits import EDITS, named, sample_edit
from .evaluate import rates, round_trip
from .grounds import SIDE, paint_ground
from .judge import judge
from .pairs import alike, depth_map, edges
from .scenes import Scene, contact_sheet, object_masks, render, sample_scene
from .train_variant import VARIANTS

BATCH = 16


def object_box(scene: Scene, room: int = 6) -> np.ndarray:
    """The hole around a scene's only object: (128, 128) uint8."""
    placed, mask = scene.objects[0], np.zeros((SIDE, SIDE), np.uint8)
    mask[max(placed.y - room, 0):placed.y + placed.size + room, max(placed.x - room, 0):placed.x + placed.size + room] = 255
    return mask


def edge_f1(a: np.ndarray, b: np.ndarray, reach: int = 2) -> float:
    """Two edge maps (128, 128, 3): the harmonic mean of the shares of each that lie within `reach` pixels of the other."""
    maps = torch.from_numpy(np.stack([a, b])[..., 0] > 0)[:, None].float()      # (2, 1, 128, 128)
    near = F.max_pool2d(maps, 2 * reach + 1, stride=1, padding=reach)
    precision, recall = (float((maps[i] * near[1 - i]).sum() / maps[i].sum().clamp(min=1)) for i in (0, 1))
    return 2 * precision * recall / max(precision + recall, 1e-9)


def overlap(picture: np.ndarray, scene: Scene) -> float:
    """Intersection over union of the scene's objects and of what differs from its ground by more than 40 grey levels."""
    painted = np.abs(picture - paint_ground(scene.ground, scene.seed)).max(-1) > 40
    wanted = object_masks(scene).any(0)
    return float((painted & wanted).sum() / max((painted | wanted).sum(), 1))


def measure(flux: Flux, variant: str, count: int, seed: int = 0, steps: int = 28, net: ControlNet | None = None
            ) -> tuple[dict[str, float], np.ndarray]:
    """The figures of a variant over `count` held-out scenes, painted from seed on; and the pictures. With a net: of the model with it."""
    scenes = [sample_scene(random.Random(seed + i), kind="single", held_out=True) for i in range(count)]
    true = np.stack([render(scene) for scene in scenes])
    given = {"fill": true, "canny": [edges(picture) for picture in true], "depth": [depth_map(scene) for scene in scenes]}[variant]
    holes, painted = [object_box(scene) for scene in scenes], []
    for i in range(0, count, BATCH):
        part, keywords = slice(i, i + BATCH), dict(width=SIDE, height=SIDE, seed=seed + i, steps=steps, progress=False)
        prompts = [scene.caption for scene in scenes[part]]
        if net:
            painted += generate(flux, prompts, controlnet=(net, list(given[part]), 1.0, 0.0, 1.0, variant), **keywords)
        elif variant == "fill":
            painted += fill(flux, prompts, list(given[part]), holes[part], **keywords)
        else:
            painted += control(flux, prompts, list(given[part]), **keywords)
    pictures, best = np.stack([np.asarray(picture) for picture in painted]), round_trip(flux, true)
    names = [scene.objects[0].name for scene in scenes]
    figures = {"object right": float(np.mean([v.object == name for v, name in zip(judge(pictures), names)])),
               "object right, at best": float(np.mean([v.object == name for v, name in zip(judge(best), names)]))}
    for suffix, results in (("", pictures), (", at best", best)):
        if variant == "fill":
            outside = np.stack(holes) == 0
            figures[f"grey levels outside the hole{suffix}"] = float(np.abs(np.float32(results) - true)[outside].mean())
        elif variant == "canny":
            figures[f"edge F1{suffix}"] = float(np.mean([edge_f1(edges(result), edge) for result, edge in zip(results, given)]))
        else:
            figures[f"overlap with what is near{suffix}"] = float(np.mean([overlap(result, scene) for result, scene in zip(results, scenes)]))
    return figures, pictures


def measure_edits(flux: Flux, count: int, seed: int = 0, steps: int = 28) -> tuple[dict[str, float], np.ndarray]:
    """The same for a model that edits by instructions; each kind of edit comes equally often."""
    edits = [sample_edit(random.Random(seed + i), tuple(EDITS)[i % len(EDITS)], held_out=True) for i in range(count)]
    before, after = (np.stack([render(edit[i]) for edit in edits]) for i in (0, 2))
    painted = []
    for i in range(0, count, BATCH):
        part = slice(i, i + BATCH)
        painted += kontext_edit(flux, [instruction for _, instruction, _ in edits[part]], list(before[part]), seed=seed + i, steps=steps,
                                progress=False)
    pictures = np.stack([np.asarray(picture) for picture in painted])
    figures = {}
    for suffix, results in (("", pictures), (", at best", round_trip(flux, after))):
        done = [follows(result, *pair) for result, pair in zip(results, zip(before, after))]
        figures[f"instruction done{suffix}"] = float(np.mean([right for right, _ in done]))
        figures[f"the rest kept, dB{suffix}"] = float(np.mean([kept for _, kept in done if np.isfinite(kept)]))
        if not suffix:
            figures |= {f"  {kind}": float(np.mean([right for right, _ in done[i::len(EDITS)]])) for i, kind in enumerate(EDITS) if i < count}
    return figures, pictures


def measure_variations(flux: Flux, count: int, seed: int = 0, steps: int = 28) -> tuple[dict[str, float], np.ndarray]:
    """The same for a model that reads pictures; every second object has another colour than by itself. Redux reads the scenes; an
    IP-Adapter is told the objects, and reads pictures of others on their grounds."""
    scenes = [sample_scene(random.Random(seed + i), kind="single", coloured=i % 2 == 1, held_out=True) for i in range(count)]
    true = np.stack([render(scene) for scene in scenes])

    def paint(what: Callable[[int], list]) -> np.ndarray:
        return np.stack([np.asarray(what(i)[0]) for i in range(count)])

    def followed(i: int, scale: float = 1.0) -> list:
        return generate(flux, named(scenes[i]), ip_image=render(alike(scenes[i], random.Random(seed + i))), ip_scale=scale, seed=seed + i,
                        steps=steps, progress=False)

    pictures = paint((lambda i: redux(flux, true[i], seed=seed + i, steps=steps, progress=False)) if flux.redux else followed)
    results = {"": pictures, ", at best": round_trip(flux, true)}
    if not flux.redux:
        results[", without the picture"] = paint(lambda i: followed(i, 0.0))
    figures = {}
    for suffix, painted in results.items():
        seen = rates(judge(painted), scenes)
        figures |= {f"{what} right{suffix}": getattr(seen, what) for what in ("object", "colour", "ground")}
    return figures, pictures


def follows(result: np.ndarray, before: np.ndarray, after: np.ndarray) -> tuple[bool, float]:
    """Whether a picture (128, 128, 3) shows the edit, and how well it keeps what the edit leaves: in dB, NaN if it leaves nothing."""
    changed, result = (before != after).any(-1), np.float32(result)
    to_after, to_before = (float(np.abs(result - scene)[changed].mean()) for scene in (after, before))
    error = float(np.square(result - before)[~changed].mean()) if not changed.all() else float("nan")
    return to_after < to_before / 2, 10 * np.log10(255**2 / max(error, 1e-9))


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.evaluate_variant", description="Measure a variant on held-out combinations.")
    parser.add_argument("variant", choices=[*VARIANTS, "kontext", "redux", "controlnet", "ip-adapter"], help="what the model is made for")
    parser.add_argument("--model", required=True, help="a shipped name or a folder (required)")
    parser.add_argument("--pictures", type=int, default=50, help="how many to paint (default 50)")
    parser.add_argument("--output", default="evaluation.png", help="the contact sheet to write (default evaluation.png)")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        check_number("--pictures", args.pictures, 1, 100_000, whole=True)
        if args.variant == "controlnet":
            figures, pictures = measure(load("tiny"), "canny", args.pictures, net=load_controlnet(args.model))
        elif args.variant == "ip-adapter":
            figures, pictures = measure_variations(add_ip_adapter(load("tiny"), args.model), args.pictures)
        elif args.variant in VARIANTS:
            figures, pictures = measure(load(args.model), args.variant, args.pictures)
        else:
            figures, pictures = (measure_edits if args.variant == "kontext" else measure_variations)(load(args.model), args.pictures)
        save(contact_sheet(list(pictures[:32]), [""] * 32), output, {"model": args.model})
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    print("\n".join(f"{name:36}{value:8.3f}" for name, value in figures.items()) + f"\n{output}")


if __name__ == "__main__":
    main()
