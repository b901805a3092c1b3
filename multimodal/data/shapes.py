"""The embedded data set: scenes of coloured, textured shapes, drawn and put into words from a seed, without a file.

A fixed share of the combinations of colour, texture and shape never occurs in training. The split "unseen" shows those
only, one object an image, so that it measures zero-shot classification: every word is known, the class is new.
"""

from itertools import product
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import Field

from multimodal.batch import Sample
from multimodal.data.shapes_captions import OPPOSITES, Kind, Scene, Thing, write_captions
from multimodal.data.shapes_drawing import COLOURS, SHAPES, TEXTURES, draw
from multimodal.parts import Dataset, Source

EXTENTS = {
    1: {"small": (0.34, 0.42), "large": (0.50, 0.62)},
    2: {"small": (0.30, 0.35), "large": (0.42, 0.47)},
}
"""Shares of the image's side, by the number of objects in the scene."""

LEAST_GAP = 0.04


def kinds(held_out: float) -> tuple[tuple[Kind, ...], tuple[Kind, ...]]:
    """Every combination, as (for training, never in training), in a fixed order.

    Held out are whole diagonals of the cube of attributes, the last one in part: they share the loss among all values
    alike, and leave every pair of values to training, in some other combination.
    """
    colours, textures, shapes = list(COLOURS), list(TEXTURES), list(SHAPES)

    def diagonal(kind: Kind) -> int:
        place = colours.index(kind.colour) + 3 * textures.index(kind.texture) + shapes.index(kind.shape)
        return place % len(shapes)

    every = [Kind(*values) for values in product(colours, textures, shapes)]
    unseen = set(sorted(every, key=diagonal)[: round(held_out * len(every))])
    return tuple(kind for kind in every if kind not in unseen), tuple(kind for kind in every if kind in unseen)


# --- scenes ---------------------------------------------------------------------------------------------------------


def one_object(kind: Kind, rng: Random) -> Scene:
    """The object anywhere in the image, whole."""
    size, extent = _draw_size(1, rng)
    x, y = (rng.uniform(extent / 2, 1 - extent / 2) for _ in "xy")
    return Scene((Thing(kind, size, x, y, extent),))


def two_objects(first: Kind, second: Kind, rng: Random) -> Scene:
    """Side by side or one above the other, apart, and nearly on one line, so that the relation is plain to see."""
    relation = rng.choice(tuple(OPPOSITES))
    sizes, extents = zip(*(_draw_size(2, rng) for _ in range(2)), strict=True)
    free = 1 - sum(extents)
    gap = rng.uniform(LEAST_GAP, free)
    start = rng.uniform(0, free - gap)
    along = [start + extents[0] / 2, start + extents[0] + gap + extents[1] / 2]
    if relation in ("right of", "below"):
        along = [1 - place for place in along]
    line = rng.uniform(0.25, 0.75)
    across = [min(max(line + rng.uniform(-0.1, 0.1), extent / 2), 1 - extent / 2) for extent in extents]
    xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
    things = zip((first, second), sizes, xs, ys, extents, strict=True)
    return Scene(tuple(Thing(*thing) for thing in things), relation)


def _draw_size(objects: int, rng: Random) -> tuple[str, float]:
    size = rng.choice(("small", "large"))
    return size, rng.uniform(*EXTENTS[objects][size])


# --- the part -------------------------------------------------------------------------------------------------------


class Shapes(Dataset):
    """Scenes of one or two objects, drawn as they are asked for; needs no files."""

    split: Literal["train", "unseen"] = "train"
    """`train`: one or two objects, no labels; `unseen`: one object, of a combination held out of training; labelled."""
    size: int = Field(default=100_000, gt=0)
    """Number of samples."""
    image_size: int = Field(default=64, ge=32, le=512)
    """Side of the square image in pixels; textures need at least 32."""
    seed: int = Field(default=0, ge=0)
    """Another seed gives other scenes; the combinations held out stay the same."""
    held_out: float = Field(default=0.25, ge=0.05, le=0.5)
    """Share of the combinations of colour, texture and shape that training never shows."""
    two_objects: float = Field(default=0.3, ge=0, le=1)
    """Share of training scenes with two objects."""
    num_captions: int = Field(default=3, ge=1, le=8)
    """Captions of a sample, each from another template."""

    def build(self, root: Path) -> "ShapesSource":
        """`root` is not read: every sample is computed."""
        return ShapesSource(self)


class ShapesSource(Source):
    """The samples; each is a function of (seed, split, index) and the knobs alone."""

    def __init__(self, knobs: Shapes) -> None:
        self.knobs = knobs
        training, unseen = kinds(knobs.held_out)
        self.labelled = knobs.split == "unseen"
        self.kinds = unseen if self.labelled else training
        self.class_names = tuple(kind.name for kind in unseen) if self.labelled else ()

    def __len__(self) -> int:
        return self.knobs.size

    def __getitem__(self, index: int) -> Sample:
        rng = self._rng(index)
        scene = self._scene(index, rng)
        text = write_captions(scene, self.knobs.num_captions, rng)
        image = draw(scene, self.knobs.image_size, rng)
        return Sample(self.key(index), {"image": image, "text": text}, self.label(index))

    def captions(self, index: int) -> tuple[str, ...]:
        rng = self._rng(index)
        return write_captions(self._scene(index, rng), self.knobs.num_captions, rng)

    def key(self, index: int) -> str:
        return f"shapes/{self.knobs.split}/{index}"

    def label(self, index: int) -> int | None:
        return index % len(self.kinds) if self.labelled else None

    def scene(self, index: int) -> Scene:
        """What the image shows and the captions say."""
        return self._scene(index, self._rng(index))

    def _rng(self, index: int) -> Random:
        """The sample's own numbers: first for its scene, then for its words, then for its picture."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the {len(self)} samples of shapes/{self.knobs.split}")
        return Random(((2 * self.knobs.seed + self.labelled) << 64) + index)

    def _scene(self, index: int, rng: Random) -> Scene:
        if self.labelled:
            return one_object(self.kinds[index % len(self.kinds)], rng)
        if rng.random() < self.knobs.two_objects:
            first, second = rng.sample(self.kinds, 2)
            return two_objects(first, second, rng)
        return one_object(rng.choice(self.kinds), rng)
