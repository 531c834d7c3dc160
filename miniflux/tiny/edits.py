"""Edits of scenes: what to do, in words, and the scene in which just that has been done.

    >>> scene = sample_scene(random.Random(3))
    >>> instruction, after = edit(scene, random.Random(0))

An edit changes one thing: the ground, the style, one object's kind, colour or size, or whether it is there. Everything else
stays where it is, so what should be kept is known pixel by pixel.
"""
import random
from collections.abc import Callable
from dataclasses import replace

from .glyphs import COLOURS, OBJECTS, RECOLOURABLE
from .grounds import GROUNDS, PLAIN, SCENIC, SIDE
from .scenes import (
    GRID,
    Placed,
    Scene,
    article,
    canonical_form,
    enumerated,
    is_held_out,
    is_visible,
    sample_scene,
)
from .styles import STYLES


def fits(scene: Scene, held_out: bool = False) -> bool:
    """Whether training may show (or, if held out, never shows) all objects of the scene on its ground, and all can be seen."""
    return all(is_held_out(o.name, scene.ground) == held_out and is_visible(o.name, o.colour, scene.ground) for o in scene.objects)


def put(scene: Scene, old: Placed, new: Placed | None) -> Scene:
    """The scene with an object replaced by another, or without it."""
    objects = tuple(o if o != old else new for o in scene.objects)
    return replace(scene, objects=tuple(o for o in objects if o))


def ground(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    new = rng.choice(GROUNDS)
    said = (f"make the background {new}", f"change the background to {new}") if new in PLAIN else (
        f"put it {SCENIC[new][0]}", f"change the background to {'the ' * (new in ('sea', 'sky', 'snow', 'desert'))}{new}")
    return rng.choice(said), replace(scene, ground=new)


def exchange(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    old, new = rng.choice(scene.objects), rng.choice(OBJECTS)
    said = rng.choice(("replace the {} with {}", "turn the {} into {}"))
    return said.format(old.name, article(new)), put(scene, old, replace(old, name=new, colour=None))


def remove(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    old = rng.choice(scene.objects)
    return rng.choice(("remove the {}", "take away the {}")).format(old.name), put(scene, old, None)


def add(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """Into the quarter of the picture, or the side of a single object, that is farthest from all others."""
    name, size = rng.choice(OBJECTS), 40
    spots = [(x, y) for x in (8, SIDE - 8 - size) for y in (8, SIDE - 8 - size)]
    x, y = max(spots, key=lambda spot: min((abs(spot[0] + size / 2 - o.x - o.size / 2) + abs(spot[1] + size / 2 - o.y - o.size / 2)
                                            for o in scene.objects), default=0))
    return f"add {article(name)}", replace(scene, objects=(*scene.objects, Placed(name, None, x, y, size)))


def recolour(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    old, colour = rng.choice(scene.objects), rng.choice(tuple(COLOURS))
    new = replace(old, colour=colour) if old.name in RECOLOURABLE and colour not in (old.colour, RECOLOURABLE[old.name]) else old
    return rng.choice(("make the {} {}", "paint the {} {}")).format(old.name, colour), put(scene, old, new)


def resize(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """To two thirds; or, if nothing else stands there, to three halves. About the same centre, pushed inside the picture."""
    old, word = rng.choice(scene.objects), rng.choice(("bigger", "smaller"))
    size = GRID * round(old.size * (1.5 if word == "bigger" else 1 / 1.5) / GRID)
    centred = (GRID * round((at + (old.size - size) / 2) / GRID) for at in (old.x, old.y))
    x, y = (min(max(at, 0), max(SIDE - size, 0)) for at in centred)
    alone = len(scene.objects) == 1 and size <= 0.95 * SIDE
    return f"make the {old.name} {word}", put(scene, old, replace(old, x=x, y=y, size=size)) if alone or word == "smaller" else scene


def style(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    new = rng.choice(tuple(STYLES))
    said = f"make it {new}" if new == "black and white" else f"turn it into {article(new) if new != 'pixel art' else new}"
    return said, replace(scene, style=new)


EDITS: dict[str, Callable[[Scene, random.Random], tuple[str, Scene]]] = dict(
    ground=ground, exchange=exchange, remove=remove, add=add, recolour=recolour, resize=resize, style=style)


def edit(scene: Scene, rng: random.Random, kind: str | None = None, held_out: bool = False) -> tuple[str, Scene] | None:
    """(instruction, the scene after it), of one of `EDITS`; None where that cannot be done, as a blue fish cannot be made blue.

    The objects that an instruction names with "the" must be there once: no edit of scenes that count."""
    instruction, after = EDITS[kind or rng.choice(tuple(EDITS))](scene, rng)
    names = [o.name for o in after.objects]
    possible = after != scene and fits(after, held_out) and len(set(names)) == len(names) <= 4 and scene.kind not in ("count", "overlap")
    return (instruction, replace(after, caption="")) if possible else None


def sample_edit(rng: random.Random, kind: str | None = None, held_out: bool = False) -> tuple[Scene, str, Scene]:
    """(a scene, an instruction, the scene after it): only what training may show, or only what it never shows."""
    while True:
        scene = sample_scene(rng, held_out=held_out)
        if scene.style is None and (done := edit(scene, rng, kind, held_out)):
            return scene, *done


def named(scene: Scene) -> str:
    """Its objects alone: "a cat and a red apple"."""
    words = [f"{o.colour} {o.name}" if o.colour else o.name for o in scene.objects]
    return enumerated(words) if words else "nothing"


def describe(scene: Scene) -> str:
    """A caption in the canonical form, of any scene: "a cat and a red apple on a blue background"."""
    return canonical_form(named(scene), scene.ground, scene.style)
