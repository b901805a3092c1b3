"""Scenes of two shapes, each with a caption to be told from one that is nearly the same and false; needs no files.

The wrong caption has the same words in another order (swap), or one attribute, object or relation replaced by one that
the scene does not show. Right and wrong ones name only combinations that training shows, so that words alone, without
the image, do not tell which is right.
"""

from collections.abc import Iterator
from pathlib import Path
from random import Random

from pydantic import Field

from multimodal.batch import Sample
from multimodal.data.choices import Choice, Choices, ChoiceSource
from multimodal.data.shapes import Shapes, kinds
from multimodal.data.shapes_captions import OPPOSITES, Kind
from multimodal.data.shapes_drawing import COLOURS, SHAPES, TEXTURES

CATEGORIES = ("swap_attribute", "swap_object", "replace_attribute", "replace_object", "replace_relation")
VALUES = {"colour": tuple(COLOURS), "texture": tuple(TEXTURES), "shape": tuple(SHAPES)}
ATTRIBUTES = ("colour", "texture")

Said = tuple[Kind, str, Kind]
"""The first object, where it stands to the second, the second."""


def say(said: Said) -> str:
    """ "a striped red circle left of a plain blue square"."""
    return f"a {said[0].name} {said[1]} a {said[2].name}"


def wrong_ones(right: Said, known: frozenset[Kind], rng: Random) -> dict[str, Said]:
    """A false description for each category that has one, of `known` combinations only."""
    first, relation, second = right
    found = {
        "swap_attribute": _pick(_swapped(right), known, rng),
        "swap_object": (second, relation, first),
        "replace_attribute": _pick(_replaced(right, ATTRIBUTES), known, rng),
        "replace_object": _pick(_replaced(right, ("shape",)), known, rng),
        "replace_relation": (first, OPPOSITES[relation], second),
    }
    return {category: said for category, said in found.items() if said is not None}


def _swapped(right: Said) -> Iterator[Said]:
    """An attribute changes places between two objects that differ in it, and in their shape."""
    first, relation, second = right
    for attribute in ATTRIBUTES:
        ours, theirs = getattr(first, attribute), getattr(second, attribute)
        if ours != theirs and first.shape != second.shape:
            yield first._replace(**{attribute: theirs}), relation, second._replace(**{attribute: ours})


def _replaced(right: Said, attributes: tuple[str, ...]) -> Iterator[Said]:
    """One object is of a value that neither of the two has."""
    first, relation, second = right
    for attribute in attributes:
        for value in VALUES[attribute]:
            if value not in (getattr(first, attribute), getattr(second, attribute)):
                yield first._replace(**{attribute: value}), relation, second
                yield first, relation, second._replace(**{attribute: value})


def _pick(every: Iterator[Said], known: frozenset[Kind], rng: Random) -> Said | None:
    possible = [said for said in every if {said[0], said[2]} <= known]
    return rng.choice(possible) if possible else None


class ShapesBinding(Choices):
    """Scenes of two objects, as training may show them but other ones, with up to five choices each."""

    size: int = Field(default=1000, gt=0)
    """Number of scenes."""
    image_size: int = Field(default=64, ge=32, le=512)
    """Side of the square image in pixels."""
    seed: int = Field(default=3000, ge=0)
    """Another seed gives other scenes; it should not be that of training."""
    held_out: float = Field(default=0.25, ge=0.05, le=0.5)
    """Share of the combinations of colour, texture and shape that training never shows, as there."""

    @property
    def categories(self) -> tuple[str, ...]:
        return CATEGORIES

    def build(self, root: Path) -> "BindingSource":
        """`root` is not read: every scene is computed."""
        return BindingSource(self)


class BindingSource(ChoiceSource):
    """The scenes, and the choices about them."""

    def __init__(self, knobs: ShapesBinding) -> None:
        self.scenes = Shapes(
            size=knobs.size,
            image_size=knobs.image_size,
            seed=knobs.seed,
            held_out=knobs.held_out,
            two_objects=1.0,
        ).build(Path())
        self.seed, known = knobs.seed, frozenset(kinds(knobs.held_out)[0])
        self.choices = [choice for index in range(knobs.size) for choice in self._choices(index, known)]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> Sample:
        return Sample(self.key(index), {"image": self.scenes[index].inputs["image"]})

    def key(self, index: int) -> str:
        return f"shapes_binding/{index}"

    def _choices(self, index: int, known: frozenset[Kind]) -> Iterator[Choice]:
        scene, rng = self.scenes.scene(index), Random((self.seed << 64) + index)
        (first, second), relation = (thing.kind for thing in scene.things), scene.relation
        assert relation is not None
        right = (first, relation, second) if rng.random() < 0.5 else (second, OPPOSITES[relation], first)
        for category, wrong in wrong_ones(right, known, rng).items():
            yield Choice(index, say(right), (say(wrong),), category)
