"""How well does a tiny model generate what it never saw? The judge (`judge.py`) looks at held-out
combinations.

    python -m miniflux.tiny.measure.evaluate tiny --prompts 50 --output evaluation.png

    object     "a fox on a red background": the first object is a fox
    sharp      and as like a fox as an undistorted image
    colour     "a blue teapot on a pink background": it is a teapot, and blue
    two        "an owl above a car on a green background": both are there
    relation   and one is above the other
    count      "three bees on a gray background": three objects, all bees
    ground     of all of these: the border has the colour

No object of a prompt was ever shown to the model on this ground. Beside each figure stands the
judge's own accuracy: on the true scenes as they were rendered, and after the model's autoencoder.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from tqdm import tqdm

from ...checks import check_number
from ...command import command
from ...flags import Parser
from ...flux import Flux
from ...generate import generate
from ...imaging.images import to_pil
from ...imaging.saving import check_output, save
from ...latents import decode
from ...loading import load
from ..train.data import normalize
from ..world.grounds import IMAGE_SIZE
from ..world.rendering import contact_sheet, render
from ..world.scenes import Scene, is_held_out, sample_scene
from ..world.words import ALL_OBJECTS, OBJECTS, RECOLOURABLE
from .judge import Verdict, judge, sprites

BATCH = 10                               # images generated side by side
SHOWN = 32                               # images on the contact sheet
CHECKED = 25                             # true scenes of each question that measure the judge
WORD_LISTS = {"64": OBJECTS, "108": ALL_OBJECTS}
KIND_OF = {"two": "pair", "count": "count"}     # question: the kind of its scenes, where not single
QUESTIONS: dict[str, Callable[[Scene], bool]] = dict(   # question: which scenes it is about
    object=lambda scene: scene.kind == "single" and scene.objects[0].colour is None,
    colour=lambda scene: scene.kind == "single" and scene.objects[0].colour is not None,
    two=lambda scene: scene.kind == "pair" and scene.relation in BETWEEN,
    count=lambda scene: scene.kind == "count",
)
BETWEEN: dict[str, Callable[[int, int], bool]] = {      # relation: whether it holds for (dx, dy)
    "left of": lambda dx, dy: dx > abs(dy), "right of": lambda dx, dy: -dx > abs(dy),
    "above": lambda dx, dy: dy > abs(dx), "below": lambda dx, dy: -dy > abs(dx),
}                                                       # from the first object to the second


@dataclass(frozen=True)
class Rates:
    """Fractions of images, in [0, 1]; NaN where no image was asked that."""

    object: float
    sharp: float
    colour: float
    two: float
    relation: float
    count: float
    ground: float


@dataclass(frozen=True)
class Report:
    """A model's rates on its own images; the judge's on true scenes, as rendered and after the
    model's autoencoder."""

    painted: Rates
    rendered: Rates
    decoded: Rates
    images: np.ndarray                   # (n, 128, 128, 3) uint8
    verdicts: list[Verdict]
    seconds: float                       # that generating took


def held_out_scenes(n: int, seed: int = 0, questions: tuple[str, ...] = tuple(QUESTIONS),
                    objects: Sequence[str] = OBJECTS) -> list[Scene]:
    """`n` scenes for each question, of objects on grounds with which training never shows them."""
    scenes = []
    for question in questions:
        rng = random.Random(f"{question} {seed}")
        asked: list[Scene] = []
        while len(asked) < n:
            scene = sample_scene(rng, kind=KIND_OF.get(question, "single"), held_out=True,
                                 coloured=question == "colour", objects=objects)
            if QUESTIONS[question](scene):
                asked.append(scene)
        scenes += asked
    return scenes


def answers(verdict: Verdict, scene: Scene) -> dict[str, bool]:
    """The questions that the image of a scene answers, and whether it is right."""
    first = scene.objects[0]
    right = {"ground": verdict.ground == scene.ground}
    if QUESTIONS["object"](scene):
        same = verdict.object == first.name
        right |= {"object": same, "sharp": same and verdict.sharp}
    if QUESTIONS["colour"](scene):
        colour = verdict.found[0].colour or RECOLOURABLE.get(verdict.object)
        right["colour"] = (verdict.object, colour) == (first.name, first.colour)
    if QUESTIONS["two"](scene):
        seen = {found.name: found for found in reversed(verdict.found)}
        a, b = (seen.get(o.name) for o in scene.objects)
        holds = bool(a and b) and BETWEEN[scene.relation](b.x - a.x, b.y - a.y)
        right |= {"two": bool(a and b), "relation": holds}
    if QUESTIONS["count"](scene):
        found = Counter(found.name for found in verdict.found)
        right["count"] = found == Counter(o.name for o in scene.objects)
    return right


def rates(verdicts: list[Verdict], scenes: list[Scene]) -> Rates:
    """How often the verdicts are right about the images of these scenes."""
    right = [answers(verdict, scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
    values = []
    for field in fields(Rates):
        asked = [answer[field.name] for answer in right if field.name in answer]
        values.append(float(np.mean(asked or [math.nan])))
    return Rates(*values)


@torch.inference_mode()
def round_trip(flux: Flux, images: np.ndarray) -> np.ndarray:
    """Images after the model's autoencoder: none that the model generates can be better."""
    weight = next(flux.autoencoder.parameters())
    decoded = []
    for begin in range(0, len(images), BATCH):
        z = flux.autoencoder.encode(normalize(images[begin:begin + BATCH]).to(weight))
        decoded += to_pil(decode(flux, z))
    return np.stack(decoded)


def evaluate(flux: Flux, scenes: list[Scene], seed: int = 0, *, steps: int | None = None,
             guidance: float | None = None, true_cfg: float = 1.0) -> Report:
    """Generate the captions of scenes, image i from seed + i, and judge the images.

    Raises ValueError for a scene that training may have shown, and what `generate` raises."""
    for scene in scenes:
        if not all(is_held_out(o.name, scene.ground) for o in scene.objects):
            raise ValueError(f"{scene.caption!r} is no held-out combination: "
                             "only what training never shows is measured")
    images, began = [], time.perf_counter()
    for i in tqdm(range(0, len(scenes), BATCH), desc="painting", unit="batch", disable=None):
        captions = [scene.caption for scene in scenes[i:i + BATCH]]
        images += generate(flux, captions, width=IMAGE_SIZE, height=IMAGE_SIZE, seed=seed + i,
                           steps=steps, guidance=guidance, negative_prompt="", true_cfg=true_cfg,
                           progress=False)
    seconds, painted = time.perf_counter() - began, np.stack(images)
    checked = []
    for belongs in QUESTIONS.values():
        checked += [scene for scene in scenes if belongs(scene)][:CHECKED]
    true, verdicts = np.stack([render(scene) for scene in checked]), judge(painted)
    decoded = judge(round_trip(flux, true))
    return Report(rates(verdicts, scenes), rates(judge(true), checked), rates(decoded, checked),
                  painted, verdicts, seconds)


def table(report: Report) -> str:
    """The rates in three lines: the model's, then how far the judge itself can be trusted."""
    n = len(report.verdicts)
    rows = {"painted by the model": report.painted, "true scenes": report.rendered,
            "... through its autoencoder": report.decoded}
    lines = [f"{f'{n} held-out images':28}" + "".join(f"{f.name:>9}" for f in fields(Rates))]
    for what, values in rows.items():
        shares = ["        -" if math.isnan(rate) else f"{rate:9.0%}" for rate in astuple(values)]
        lines.append(f"{what:28}" + "".join(shares))
    lines.append(f"painted in {report.seconds:.1f} s, {report.seconds / n:.2f} s an image")
    return "\n".join(lines)


def sheet_captions(report: Report, scenes: list[Scene], shown: list[int]) -> list[str]:
    """The captions of some images, each with the questions that it answers wrongly."""
    captions = []
    for i in shown:
        right = answers(report.verdicts[i], scenes[i])
        wrong = [question for question, is_right in right.items()
                 if not is_right and question != "sharp"]
        captions.append(scenes[i].caption + (f" [not {', '.join(wrong)}]" if wrong else ""))
    return captions


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m miniflux.tiny.measure.evaluate",
                        description="Measure a tiny model on held-out combinations.")
    add = parser.add_argument
    add("model", nargs="?", default="tiny", help="a shipped name or a folder (default tiny)")
    add("--prompts", type=int, default=50,
        help="how many images to generate for each question (default 50)")
    add("--words", choices=list(WORD_LISTS), default="64",
        help="the 64 objects of the world, or all 108 that the first model was taught (default 64)")
    add("--seed", type=int, default=0, help="of the prompts and of the first image (default 0)")
    add("--steps", type=int, help="from noise to image (default: the model's)")
    add("--guidance", type=float, help="how strictly to follow the prompt (default: the model's)")
    add("--true-cfg", type=float, default=1.0, help="scale of two-pass guidance (default 1.0: off)")
    add("--output", default="evaluation.png",
        help="the contact sheet to write (default evaluation.png)")
    args = parser.parse_args(argv)
    try:
        output = check_output(args.output)
        check_number("--prompts", args.prompts, 1, 100_000, whole=True)
        sprites()                        # Note: it needs the font, so it comes before any work
        scenes = held_out_scenes(args.prompts, args.seed, objects=WORD_LISTS[args.words])
        report = evaluate(load(args.model), scenes, args.seed, steps=args.steps,
                          guidance=args.guidance, true_cfg=args.true_cfg)
        shown = [i * len(scenes) // SHOWN for i in range(min(SHOWN, len(scenes)))]
        sheet = contact_sheet([report.images[i] for i in shown],
                              sheet_captions(report, scenes, shown))
        save(sheet, output, {"model": args.model, "seed": args.seed})
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error))
    print(f"{table(report)}\n{output}")


if __name__ == "__main__":
    main()
