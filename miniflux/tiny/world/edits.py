"""Edits of scenes: an instruction in words, and the scene in which just that has been done.

    >>> scene = sample_scene(random.Random(3))
    >>> instruction, after = edit(scene, random.Random(0))

An edit changes one thing: the ground, the style, one object's kind, colour or size, or whether it
is there. Everything else stays where it is, so what should be kept is known pixel by pixel.
"""

import random
from collections.abc import Callable
from dataclasses import replace

from .captions import canonical_form
from .glyphs import COLOURS
from .grounds import GROUNDS, IMAGE_SIZE, PLAIN, SCENIC
from .scenes import GRID, Placed, Scene, is_held_out, is_visible, sample_scene
from .styles import STYLES
from .words import OBJECTS, RECOLOURABLE, article, enumerated

ADDED = 40                               # size of an added object in pixels
WITH_ARTICLE = "sea", "sky", "snow", "desert"    # "... to the sea", but "... to night"


def fits(scene: Scene, held_out: bool = False) -> bool:
    """Whether training may show (or, if held out, never shows) all objects of the scene on its
    ground, and all can be seen."""
    return all(is_held_out(o.name, scene.ground) == held_out
               and is_visible(o.name, o.colour, scene.ground) for o in scene.objects)


def put(scene: Scene, old: Placed, new: Placed | None) -> Scene:
    """The scene with an object replaced by another, or without it."""
    objects = tuple(o if o != old else new for o in scene.objects)
    return replace(scene, objects=tuple(o for o in objects if o))


def ground(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    new = rng.choice(GROUNDS)
    if new in PLAIN:
        forms = (f"make the background {new}", f"change the background to {new}")
    else:
        place = f"the {new}" if new in WITH_ARTICLE else new
        forms = (f"put it {SCENIC[new][0]}", f"change the background to {place}")
    return rng.choice(forms), replace(scene, ground=new)


def exchange(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    old, new = rng.choice(scene.objects), rng.choice(OBJECTS)
    form = rng.choice(("replace the {} with {}", "turn the {} into {}"))
    return form.format(old.name, article(new)), put(scene, old, replace(old, name=new, colour=None))


def remove(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    old = rng.choice(scene.objects)
    return rng.choice(("remove the {}", "take away the {}")).format(old.name), put(scene, old, None)


def add(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """In the quarter of the image that is farthest from all other objects."""
    name = rng.choice(OBJECTS)

    def distance(spot: tuple[int, int]) -> float:
        """To the nearest object, centre to centre, along the axes."""
        x, y = spot[0] + ADDED / 2, spot[1] + ADDED / 2
        distances = [abs(x - o.x - o.size / 2) + abs(y - o.y - o.size / 2) for o in scene.objects]
        return min(distances, default=0)

    ends = (GRID, IMAGE_SIZE - GRID - ADDED)
    x, y = max([(x, y) for x in ends for y in ends], key=distance)
    new = Placed(name, None, x, y, ADDED)
    return f"add {article(name)}", replace(scene, objects=(*scene.objects, new))


def recolour(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    old, colour = rng.choice(scene.objects), rng.choice(tuple(COLOURS))
    own = RECOLOURABLE.get(old.name)
    possible = old.name in RECOLOURABLE and colour not in (old.colour, own)
    instruction = rng.choice(("make the {} {}", "paint the {} {}")).format(old.name, colour)
    return instruction, put(scene, old, replace(old, colour=colour) if possible else old)


def resize(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    """To two thirds; or, if nothing else stands there, to three halves. About the same centre, on
    the grid, pushed inside the image."""
    old, word = rng.choice(scene.objects), rng.choice(("bigger", "smaller"))
    size = GRID * round(old.size * (1.5 if word == "bigger" else 1 / 1.5) / GRID)
    corner = []
    for at in (old.x, old.y):
        centred = GRID * round((at + (old.size - size) / 2) / GRID)
        corner.append(min(max(centred, 0), max(IMAGE_SIZE - size, 0)))
    new = replace(old, x=corner[0], y=corner[1], size=size)
    alone = len(scene.objects) == 1 and size <= 0.95 * IMAGE_SIZE
    possible = alone or word == "smaller"
    return f"make the {old.name} {word}", put(scene, old, new) if possible else scene


def style(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    new = rng.choice(tuple(STYLES))
    instruction = {"black and white": "make it black and white",
                   "pixel art": "turn it into pixel art"}.get(new, f"turn it into {article(new)}")
    return instruction, replace(scene, style=new)


EDITS: dict[str, Callable[[Scene, random.Random], tuple[str, Scene]]] = dict(
    ground=ground, exchange=exchange, remove=remove, add=add, recolour=recolour, resize=resize,
    style=style)


def edit(scene: Scene, rng: random.Random, kind: str | None = None,
         held_out: bool = False) -> tuple[str, Scene] | None:
    """(instruction, the scene after it), of one of `EDITS`; None where that cannot be done, as a
    blue fish cannot be made blue.

    The objects that an instruction names with "the" must be there once: no edit of counts."""
    instruction, after = EDITS[kind or rng.choice(tuple(EDITS))](scene, rng)
    names = [o.name for o in after.objects]
    possible = (after != scene and fits(after, held_out) and len(set(names)) == len(names) <= 4
                and scene.kind not in ("count", "overlap"))
    return (instruction, replace(after, caption="")) if possible else None


def sample_edit(rng: random.Random, kind: str | None = None,
                held_out: bool = False) -> tuple[Scene, str, Scene]:
    """(a scene, an instruction, the scene after it): only what training may show, or only what it
    never shows."""
    while True:
        scene = sample_scene(rng, held_out=held_out)
        if scene.style is None and (done := edit(scene, rng, kind, held_out)):
            return scene, *done


def named(scene: Scene) -> str:
    """Its objects alone: "a cat and a red apple"."""
    words = [f"{o.colour} {o.name}" if o.colour else o.name for o in scene.objects]
    return enumerated(words) if words else "nothing"


def describe(scene: Scene) -> str:
    """A caption of any scene in the canonical form: "a cat and a red apple in the sea"."""
    return canonical_form(named(scene), scene.ground, scene.style)
