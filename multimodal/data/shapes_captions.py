"""What a scene of `shapes` holds, and how it is put into words: every caption is true of its scene."""

from dataclasses import dataclass
from random import Random
from typing import NamedTuple

TEMPLATES = (
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "an image of {}",
    "an image that shows {}",
    "this is {}",
    "there is {}",
    "here we see {}",
    "look at {}",
    "just {}",
    "{} and nothing else",
    "{} in a simple scene",
    "the picture shows {}",
    "a simple drawing of {}",
    "in this photo there is {}",
)
"""Around the description of a scene, of one object or of two."""

NOUN_PHRASES = ("{texture} {colour} {shape}", "{colour} {texture} {shape}", "{colour} {shape} with {pattern}")
"""An object without its article and size. Colour, texture and shape are always named."""

PATTERNS = {
    "plain": "no pattern",
    "striped": "stripes",
    "dotted": "dots",
    "checkered": "checks",
    "two-toned": "two tones",
}
"""What an object of each texture is "with"."""

OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""The relations of two objects, each with the one that holds when they change places in the sentence."""

SYNONYMS = {
    "small": ("little", "tiny"),
    "large": ("big", "huge"),
    "plain": ("solid",),
    "striped": ("stripy",),
    "dotted": ("spotted",),
    "checkered": ("checked",),
    "two-toned": ("two-coloured",),
    "cyan": ("turquoise",),
    "purple": ("violet",),
    "circle": ("disc",),
    "cross": ("plus sign",),
    "diamond": ("rhombus",),
    "ring": ("hoop",),
    "left of": ("to the left of", "on the left side of"),
    "right of": ("to the right of", "on the right side of"),
    "above": ("over", "higher than"),
    "below": ("under", "beneath"),
}
"""Other words for a word; what is not listed has none."""

SYNONYM_SHARE = 0.3
SIZE_NAMED_SHARE = 0.5


class Kind(NamedTuple):
    """What zero-shot classification tells apart: a combination of three attributes."""

    colour: str
    texture: str
    shape: str

    @property
    def name(self) -> str:
        """The class name, "striped red circle"."""
        return f"{self.texture} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Thing:
    """An object and its place; lengths are shares of the image's side, y points down."""

    kind: Kind
    size: str
    """ "small" or "large"."""
    x: float
    """Of the centre."""
    y: float
    """Of the centre."""
    extent: float
    """Side of the square around it."""


@dataclass(frozen=True)
class Scene:
    """One object, or two and where the first stands to the second."""

    things: tuple[Thing, ...]
    relation: str | None = None
    """A key of `OPPOSITES`, where there are two."""


def write_captions(scene: Scene, number: int, rng: Random) -> tuple[str, ...]:
    """So many true captions, each from another template."""
    return tuple(template.format(_describe(scene, rng)) for template in rng.sample(TEMPLATES, number))


def _describe(scene: Scene, rng: Random) -> str:
    """ "a small striped red circle", or "a plain blue star to the left of a large dotted pink heart"."""
    phrases = [_noun_phrase(thing, rng) for thing in scene.things]
    if scene.relation is None:
        return phrases[0]
    if rng.random() < 0.5:
        return f"{phrases[0]} {_say(scene.relation, rng)} {phrases[1]}"
    return f"{phrases[1]} {_say(OPPOSITES[scene.relation], rng)} {phrases[0]}"


def _noun_phrase(thing: Thing, rng: Random) -> str:
    colour, texture, shape = (_say(word, rng) for word in thing.kind)
    pattern = PATTERNS[thing.kind.texture]
    phrase = rng.choice(NOUN_PHRASES).format(colour=colour, texture=texture, shape=shape, pattern=pattern)
    if rng.random() < SIZE_NAMED_SHARE:
        phrase = f"{_say(thing.size, rng)} {phrase}"
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _say(word: str, rng: Random) -> str:
    """The word itself, or now and then a synonym."""
    others = SYNONYMS.get(word)
    return rng.choice(others) if others and rng.random() < SYNONYM_SHARE else word
