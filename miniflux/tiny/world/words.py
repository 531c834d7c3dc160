"""The words of the world: the objects that the model is taught, their synonyms, a little grammar.

`miniflux tiny words` lists them (`listing.py`).
"""

import random

ALL_OBJECTS = (                          # the order counts: held-out pairs are found by index
    "cat", "dog", "fox", "owl", "frog", "pig", "lion", "panda", "rabbit", "bear", "monkey", "wolf",
    "penguin", "elephant", "sheep", "turtle", "fish", "whale", "octopus", "crab", "butterfly",
    "bee", "ladybug", "duck", "apple", "banana", "pear", "lemon", "strawberry", "pineapple",
    "watermelon", "carrot", "mushroom", "pizza", "burger", "donut", "cake", "car", "rocket",
    "boat", "train", "bus", "bicycle", "plane", "tractor", "tree", "sunflower", "rose", "cactus",
    "leaf", "star", "heart", "balloon", "umbrella", "guitar", "key", "book", "house", "moon",
    "sun", "bell", "crown", "hat", "gift", "ball", "clock", "robot", "ghost", "pumpkin", "dress",
    "cup", "teapot", "bird", "parrot", "chick", "cow", "horse", "mouse", "tiger", "koala", "snail",
    "dolphin", "dinosaur", "unicorn", "flamingo", "peach", "tomato", "avocado", "trumpet",
    "pretzel", "lollipop", "cookie", "truck", "helicopter", "snowman", "cloud", "shoe", "shirt",
    "camera", "chair", "door", "castle", "tent", "diamond", "pencil", "drum", "backpack", "bucket",
)
OBJECTS = (                              # of these, the 64 that are clear at 56 pixels: the world
    "cat", "dog", "fox", "owl", "frog", "pig", "lion", "panda", "rabbit", "bear", "monkey",
    "penguin", "elephant", "turtle", "fish", "whale", "octopus", "crab", "butterfly", "ladybug",
    "duck", "cow", "horse", "tiger", "unicorn", "dinosaur", "flamingo",
    "apple", "banana", "lemon", "strawberry", "pineapple", "watermelon", "mushroom", "pizza",
    "burger", "donut", "cake", "pumpkin",
    "car", "rocket", "boat", "tree", "sunflower", "rose", "cactus", "star", "heart", "balloon",
    "book", "house", "castle", "moon", "sun", "snowman", "crown", "hat", "shoe", "backpack", "gift",
    "ball", "robot", "ghost", "teapot",
)
RECOLOURABLE = dict(    # object: the colour of its glyph, or None where that lies between two names
    apple="red", car="red", heart="red", balloon="red", book="red", teapot="red", rose="red",
    mushroom="red", guitar="red", star="yellow", key="yellow", bell="yellow", fish="blue",
    dress="blue", umbrella=None, leaf=None, shoe="blue", tent="orange", backpack="red",
    bucket="blue",
)
SYNONYMS = dict(                         # used instead of the word in one caption of ten
    cat=("kitten", "kitty"), dog=("puppy",), rabbit=("bunny",), ladybug=("ladybird",),
    burger=("hamburger",), donut=("doughnut",), car=("automobile",), rocket=("spaceship",),
    boat=("sailboat", "ship"), bicycle=("bike",), plane=("airplane",), gift=("present",),
    ball=("football",), clock=("alarm clock",), cup=("mug",), hat=("top hat",),
    mushroom=("toadstool",), leaf=("maple leaf",), horse=("pony",), dinosaur=("t-rex",),
    truck=("lorry",), shoe=("sneaker",), shirt=("t-shirt",), bucket=("pail",), diamond=("gem",),
    backpack=("rucksack",), bird=("bluebird",), castle=("fortress",), cookie=("biscuit",),
    house=("home",), pig=("piglet",), gray=("grey",), cyan=("turquoise",), purple=("violet",),
)
PLURALS = dict(wolf="wolves", leaf="leaves", sheep="sheep", fish="fish", mouse="mice",
               snowman="snowmen", tomato="tomatoes")


def article(words: str) -> str:
    """article("red apple") = "a red apple", article("owl") = "an owl"; but "a unicorn"."""
    return f"{'an' if words[0] in 'aeiou' and not words.startswith('uni') else 'a'} {words}"


def enumerated(words: list[str]) -> str:
    """enumerated(["cat", "owl", "red apple"]) = "a cat, an owl and a red apple"."""
    *others, last = map(article, words)
    return f"{', '.join(others)} and {last}" if others else last


def plural(words: str) -> str:
    """plural("fox") = "foxes", plural("pony") = "ponies", plural("key") = "keys"."""
    *rest, noun = words.split()
    if noun in PLURALS:
        regular = PLURALS[noun]
    elif noun[-1] == "y" and noun[-2] not in "aeiou":
        regular = noun[:-1] + "ies"
    else:
        regular = noun + ("es" if noun.endswith(("s", "x", "ch")) else "s")
    return " ".join([*rest, regular])


def synonym(rng: random.Random, word: str) -> str:
    """The word, or one time in ten another one for the same thing."""
    return rng.choice(SYNONYMS[word]) if word in SYNONYMS and rng.random() < 0.1 else word
