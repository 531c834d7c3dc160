"""How well does a tiny model paint what it never saw? A judge without a neural network (`judge.py`) looks at held-out combinations.

    python -m miniflux.tiny.evaluate tiny --prompts 50 --output evaluation.png

    object      "a fox on a red background": the first object is a fox                 sharp: and as like as an undistorted painting
    colour      "a blue teapot on a pink background": it is a teapot, and blue
    two         "an owl above a car on a green background": both are there             relation: and one is above the other
    count       "three bees on a gray background": three objects, all bees
    ground      of all of these: the border has the colour

No object of a prompt was ever shown to the model on this ground. The judge's own accuracy stands beside each figure: on the true
scenes as they were rendered, and after the model's autoencoder.
"""
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from tqdm import tqdm

from .. import cli
from ..command import command
from ..flux import Flux
from ..generate import generate
from ..imaging.images import check_number, check_output, save, to_pil
from ..latents import decode
from ..loading import load
from .glyphs import OBJECTS, RECOLOURABLE
from .grounds import SIDE
from .judge import Verdict, judge, sprites
from .scenes import Scene, contact_sheet, is_held_out, render, sample_scene
from .train_autoencoder import to_tensor

BATCH, SHOWN = 10, 32                                  # pictures painted side by side; pictures on the contact sheet
CHECKED = 25                                           # true scenes of each question by which the judge itself is measured
QUESTIONS: dict[str, Callable[[Scene], bool]] = dict(  # kind of prompt: which scenes it takes
    object=lambda scene: scene.kind == "single" and scene.objects[0].colour is None,
    colour=lambda scene: scene.kind == "single" and scene.objects[0].colour is not None,
    two=lambda scene: scene.kind == "pair" and scene.relation in BETWEEN,
    count=lambda scene: scene.kind == "count",
)
BETWEEN: dict[str, Callable[[int, int], bool]] = {     # relation: whether (dx, dy) from the first object to the second says so
    "left of": lambda dx, dy: dx > abs(dy), "right of": lambda dx, dy: -dx > abs(dy),
    "above": lambda dx, dy: dy > abs(dx), "below": lambda dx, dy: -dy > abs(dx),
}


@dataclass(frozen=True)
class Rates:
    """Fractions of pictures, in [0, 1]; NaN where no picture was asked that."""
    object: float
    sharp: float
    colour: float
    two: float
    relation: float
    count: float
    ground: float


@dataclass(frozen=True)
class Report:
    """A model's rates on its own pictures; the judge's on true scenes, as rendered and after the model's autoencoder."""
    painted: Rates
    rendered: Rates
    decoded: Rates
    pictures: np.ndarray                               # (n, 128, 128, 3) uint8
    verdicts: list[Verdict]
    seconds: float                                     # that painting took


def held_out_scenes(n: int, seed: int = 0, questions: tuple[str, ...] = tuple(QUESTIONS), objects: int = len(OBJECTS)) -> list[Scene]:
    """`n` scenes for each question, of objects on grounds with which training never shows them; of the first `objects` objects."""
    scenes = []
    for question in questions:
        rng, kind = random.Random(f"{question} {seed}"), {"two": "pair", "count": "count"}.get(question, "single")
        wanted: list[Scene] = []
        while len(wanted) < n:
            scene = sample_scene(rng, kind=kind, coloured=question == "colour", held_out=True)
            known = all(OBJECTS.index(o.name) < objects for o in scene.objects)
            wanted += [scene] if known and QUESTIONS[question](scene) else []
        scenes += wanted
    return scenes


def answers(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """What the picture of a scene is asked, and whether it is right."""
    first, seen = scene.objects[0], {found.name: found for found in reversed(verdict.found)}
    there = all(o.name in seen for o in scene.objects)
    right = {"ground": verdict.ground == scene.ground}
    if QUESTIONS["object"](scene):
        right |= {"object": verdict.object == first.name, "sharp": verdict.object == first.name and verdict.sharp}
    if QUESTIONS["colour"](scene):
        colour = verdict.found[0].colour or RECOLOURABLE.get(verdict.object)
        right |= {"colour": (verdict.object, colour) == (first.name, first.colour)}
    if QUESTIONS["two"](scene):
        a, b = (seen.get(o.name) for o in scene.objects)
        right |= {"two": there, "relation": bool(a and b and BETWEEN[scene.relation](b.x - a.x, b.y - a.y))}
    if QUESTIONS["count"](scene):
        right |= {"count": Counter(found.name for found in verdict.found) == Counter(o.name for o in scene.objects)}
    return right


def rates(verdicts: list[Verdict], scenes: list[Scene]) -> Rates:
    """How often the verdicts are right about the pictures of these scenes."""
    right = [answers(verdict, scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    return Rates(*(float(np.mean([r[f.name] for r in right if f.name in r] or [math.nan])) for f in fields(Rates)))


@torch.no_grad()
def round_trip(flux: Flux, pictures: np.ndarray) -> np.ndarray:
    """What the model's autoencoder leaves of pictures: no picture that the model paints can be better."""
    decoded = []
    for begin in range(0, len(pictures), BATCH):
        z = flux.autoencoder.encode(to_tensor(pictures[begin:begin + BATCH]).to(next(flux.autoencoder.parameters())))
        decoded += to_pil(decode(flux, z))
    return np.stack(decoded)


def evaluate(flux: Flux, scenes: list[Scene], seed: int = 0, *, steps: int | None = None, guidance: float | None = None,
             true_cfg: float = 1.0) -> Report:
    """Paint the captions of scenes, picture i from seed + i, and judge the pictures.

    Raises ValueError for a scene that training may have shown, and what `generate` raises."""
    for scene in scenes:
        if not all(is_held_out(o.name, scene.ground) for o in scene.objects):
            raise ValueError(f"{scene.caption!r} is no held-out combination: only what training never shows is measured")
    pictures, begin = [], time.perf_counter()
    for i in tqdm(range(0, len(scenes), BATCH), desc="painting", unit="batch", disable=None):
        pictures += generate(flux, [scene.caption for scene in scenes[i:i + BATCH]], width=SIDE, height=SIDE, seed=seed + i,
                             steps=steps, guidance=guidance, negative_prompt="", true_cfg=true_cfg, progress=False)
    seconds, painted = time.perf_counter() - begin, np.stack(pictures)
    asked = [[scene for scene in scenes if belongs(scene)][:CHECKED] for belongs in QUESTIONS.values()]
    checked = [scene for group in asked for scene in group]
    true, verdicts = np.stack([render(scene) for scene in checked]), judge(painted)
    return Report(rates(verdicts, scenes), rates(judge(true), checked), rates(judge(round_trip(flux, true)), checked), painted,
                  verdicts, seconds)


def table(report: Report) -> str:
    """The rates in three lines: what the model paints, then how far the judge itself can be trusted."""
    n = len(report.verdicts)
    rows = {"painted by the model": report.painted, "true scenes": report.rendered, "... through its autoencoder": report.decoded}
    lines = [f"{what:28}" + "".join("        -" if math.isnan(r) else f"{r:9.0%}" for r in astuple(rates)) for what, rates in rows.items()]
    return "\n".join([f"{f'{n} held-out pictures':28}" + "".join(f"{f.name:>9}" for f in fields(Rates)), *lines,
                      f"painted in {report.seconds:.1f} s, {report.seconds / n:.2f} s a picture"])


@command
def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m miniflux.tiny.evaluate", description="Measure a tiny model on held-out combinations.")
    parser.add_argument("model", nargs="?", default="tiny", help="a shipped name or a folder (default tiny)")
    parser.add_argument("--prompts", type=int, default=50, help="how many pictures to paint for each question (default 50)")
    parser.add_argument("--objects", type=int, default=len(OBJECTS), help="only the first so many of the world's objects (default all)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the first picture (default 0)")
    parser.add_argument("--steps", type=int, help="from noise to picture (default: the model's)")
    parser.add_argument("--guidance", type=float, help="how strictly to follow the prompt (default: the model's)")
    parser.add_argument("--true-cfg", type=float, default=1.0, help="scale of two-pass guidance (default 1.0: off)")
    parser.add_argument("--output", default="evaluation.png", help="the contact sheet to write (default evaluation.png)")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        check_number("--prompts", args.prompts, 1, 100_000, whole=True)
        check_number("--objects", args.objects, 30, len(OBJECTS), whole=True)
        sprites()                                      # Note: it needs the font, so it comes before any work
        scenes = held_out_scenes(args.prompts, args.seed, objects=args.objects)
        report = evaluate(load(args.model), scenes, args.seed, steps=args.steps, guidance=args.guidance, true_cfg=args.true_cfg)
        shown = [i * len(scenes) // SHOWN for i in range(min(SHOWN, len(scenes)))]
        captions = []
        for scene, verdict in ((scenes[i], report.verdicts[i]) for i in shown):
            wrong = [question for question, right in answers(verdict, scene).items() if not right and question != "sharp"]
            captions.append(scene.caption + (f" [not {', '.join(wrong)}]" if wrong else ""))
        save(contact_sheet([report.pictures[i] for i in shown], captions), output, {"model": args.model, "seed": args.seed})
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    print(f"{table(report)}\n{output}")


if __name__ == "__main__":
    main()
