"""The scenes of PixArt-tiny and the grammar of their captions.

A *scene* is one or two objects on a background. `describe` puts a scene into words, with fixed or
varied wording; `parse_caption` turns any of these captions back into its scene.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

# ----------------------------------------------------------------------------------------------
# The vocabulary of scenes
# ----------------------------------------------------------------------------------------------

COLOURS = {  # sRGB; chosen far apart in hue so that an image can be read back
    "red": (216, 34, 44),
    "orange": (246, 124, 18),
    "yellow": (252, 212, 30),
    "green": (48, 164, 62),
    "cyan": (24, 182, 204),
    "blue": (40, 80, 228),
    "purple": (136, 52, 200),
    "pink": (250, 122, 186),
}
BACKGROUNDS = {  # low in chroma, so that every colour above stands out on all
    "white": (244, 244, 246),
    "gray": (148, 150, 154),
    "black": (26, 26, 30),
    "cream": (240, 222, 184),
    "navy": (22, 30, 66),
    "mint": (182, 222, 200),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
SIZES = {"small": 0.125, "large": 0.2}  # radius as a fraction of the image's short side
RELATIONS = {  # where the first object is, seen from the second: (dx, dy), y grows downwards
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

# Never shown in training: whole (colour, shape) pairs and (shape, relation, shape) triples. One
# pair per shape; every shape and both axes occur in the triples. A triple's mirror image is held
# out with it.
HELD_OUT_PAIRS = frozenset(
    {
        ("red", "star"),
        ("orange", "heart"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("purple", "ring"),
        ("pink", "square"),
    }
)
HELD_OUT_TRIPLES = frozenset(
    {
        ("circle", "left of", "star"),
        ("square", "left of", "heart"),
        ("triangle", "left of", "ring"),
        ("star", "left of", "square"),
        ("heart", "left of", "circle"),
        ("ring", "above", "square"),
        ("star", "above", "heart"),
        ("circle", "above", "triangle"),
        ("heart", "above", "ring"),
        ("triangle", "above", "star"),
    }
)


@dataclass(frozen=True)
class SceneObject:
    """One object: `size` is None where a caption leaves it open."""

    colour: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """One or two objects on a background; `relation` is where the first is, seen from the second.

    `background` is None where a caption leaves it open.
    """

    objects: tuple[SceneObject, ...]
    background: str | None
    relation: str | None = None

    def is_held_out(self) -> bool:
        """Whether training leaves this scene out, because of a pair or a triple."""
        return self.has_held_out_pair() or self.has_held_out_triple()

    def has_held_out_pair(self) -> bool:
        return any((t.colour, t.shape) in HELD_OUT_PAIRS for t in self.objects)

    def has_held_out_triple(self) -> bool:
        if self.relation is None:
            return False
        first, second = (t.shape for t in self.objects)
        mirrored = (second, INVERSE[self.relation], first)
        return bool({(first, self.relation, second), mirrored} & HELD_OUT_TRIPLES)


def sample_scene(rng: np.random.Generator, num_objects: int | None = None) -> Scene:
    """Draws a scene uniformly over the vocabulary.

    `num_objects`: 1 or 2; without it, one object in 35 % of the scenes.
    """
    if num_objects is None:
        num_objects = 1 if rng.random() < 0.35 else 2
    objects = tuple(
        SceneObject(
            str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES)), str(rng.choice(list(SIZES)))
        )
        for _ in range(num_objects)
    )
    background = str(rng.choice(list(BACKGROUNDS)))
    relation = str(rng.choice(list(RELATIONS))) if num_objects == 2 else None
    return Scene(objects, background, relation)


def sample_training_scene(rng: np.random.Generator, num_objects: int | None = None) -> Scene:
    """Like `sample_scene`, without anything that is held out."""
    while (scene := sample_scene(rng, num_objects)).is_held_out():
        pass
    return scene


def change_one_attribute(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with exactly one attribute (of an object, relation or background) changed."""
    choices = [(n, None) for n in ("background", "relation") if getattr(scene, n) is not None]
    for i, item in enumerate(scene.objects):
        choices += [("colour", i), ("shape", i)] + [("size", i)] * (item.size is not None)
    name, index = choices[rng.integers(len(choices))]
    values = {"background": BACKGROUNDS, "relation": RELATIONS, "colour": COLOURS}
    values |= {"shape": SHAPES, "size": SIZES}

    def other(now: str) -> str:
        return str(rng.choice([v for v in values[name] if v != now]))

    if index is None:
        return replace(scene, **{name: other(getattr(scene, name))})
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **{name: other(getattr(objects[index], name))})
    return replace(scene, objects=tuple(objects))


# ----------------------------------------------------------------------------------------------
# Captions
# ----------------------------------------------------------------------------------------------

SIZE_WORDS = {"small": ("small", "little", "tiny"), "large": ("large", "big", "huge")}
SHAPE_WORDS = {
    "circle": ("circle", "ball", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "ring": ("ring", "hoop"),
}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath"),
}
TEMPLATES = (
    "{objects} on a {background} background",
    "{objects} on a {background} background",
    "{objects}, {background} background",
    "{objects} in front of a {background} backdrop",
    "a picture of {objects} on a {background} background",
    "on a {background} background there is {objects}",
    "a {background} backdrop with {objects}",
)
SHORT_TEMPLATES = ("{objects}", "a picture of {objects}")  # these leave the background open


def describe(
    scene: Scene,
    rng: np.random.Generator | None = None,
    *,
    omit_sizes: bool = False,
    omit_background: bool = False,
) -> str:
    """The scene as a caption: plain wording without `rng`, varied wording with it."""

    def pick(words: tuple[str, ...]) -> str:
        return words[0] if rng is None else words[rng.integers(len(words))]

    def phrase(item: SceneObject) -> str:
        size = "" if omit_sizes or item.size is None else pick(SIZE_WORDS[item.size]) + " "
        noun = f"{size}{item.colour} {pick(SHAPE_WORDS[item.shape])}"
        return ("an " if noun[0] in "aeiou" else "a ") + noun

    objects = phrase(scene.objects[0])
    if scene.relation is not None:
        objects += f" {pick(RELATION_WORDS[scene.relation])} {phrase(scene.objects[1])}"
    if omit_background or scene.background is None:
        return pick(SHORT_TEMPLATES).format(objects=objects)
    return pick(TEMPLATES).format(objects=objects, background=scene.background)


def _alternatives(words: dict[str, tuple[str, ...]]) -> str:
    longest_first = sorted((w for group in words.values() for w in group), key=len, reverse=True)
    return "|".join(map(re.escape, longest_first))


_OBJECT = re.compile(
    rf"\b(?:({_alternatives(SIZE_WORDS)})\s+)?({'|'.join(COLOURS)})\s+"
    rf"({_alternatives(SHAPE_WORDS)})\b"
)
_RELATION = re.compile(rf"\b({_alternatives(RELATION_WORDS)})\b")
_BACKGROUND = re.compile(rf"\b({'|'.join(BACKGROUNDS)})\s+(?:background|backdrop)\b")


def _canonical(word: str, words: dict[str, tuple[str, ...]]) -> str:
    return next(name for name, group in words.items() if word in group)


def relation_position(caption: str) -> int:
    """Index of the character where the relation's words start; the caption's length if none."""
    found = list(_OBJECT.finditer(caption))
    relation = len(found) == 2 and _RELATION.search(caption, found[0].end(), found[1].start())
    return relation.start() if relation else len(caption)


def parse_caption(caption: str) -> Scene:
    """The scene that a caption of this grammar describes; attributes that it leaves open are None.

    Raises: ValueError if the caption does not follow the grammar.
    """
    text = " ".join(caption.lower().split())
    found = list(_OBJECT.finditer(text))
    background = _BACKGROUND.search(text)
    if not 1 <= len(found) <= 2:
        raise ValueError(
            f"caption={caption!r} is not a scene caption: name one or two objects with colour and "
            "shape, for example 'a large red heart on a white background'."
        )
    objects = tuple(
        SceneObject(colour, _canonical(shape, SHAPE_WORDS), size and _canonical(size, SIZE_WORDS))
        for size, colour, shape in (m.groups() for m in found)
    )
    named = background and background[1]
    if len(objects) == 1:
        return Scene(objects, named)
    relation = _RELATION.search(text, found[0].end(), found[1].start())
    if relation is None:
        raise ValueError(
            f"caption={caption!r} has two objects and no relation between them: "
            f"use one of {', '.join(RELATION_WORDS)}."
        )
    return Scene(objects, named, _canonical(relation[1], RELATION_WORDS))
