"""How a scene of `shapes` is drawn: colours, textures, outlines, background."""

from cmath import rect
from collections.abc import Callable
from functools import lru_cache
from math import cos, pi, radians, sin
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from multimodal.data.shapes_captions import Kind, Scene

RGB = tuple[int, int, int]
Grid = NDArray[Any]

COLOURS: dict[str, RGB] = {
    "red": (215, 35, 40),
    "orange": (250, 135, 20),
    "yellow": (250, 225, 50),
    "green": (45, 165, 65),
    "cyan": (60, 210, 225),
    "blue": (45, 85, 230),
    "purple": (135, 55, 190),
    "pink": (250, 135, 195),
}

TEXTURES: dict[str, Callable[[Grid, Grid], Grid]] = {
    "plain": lambda u, v: np.zeros_like(u, dtype=bool),
    "striped": lambda u, v: (0.85 * u + 0.25) % 1 < 0.5,  # one through the middle: unlike two-toned
    "dotted": lambda u, v: np.hypot(u % 1 - 0.5, v % 1 - 0.5) < 0.3,
    "checkered": lambda u, v: (u % 1 < 0.5) ^ (v % 1 < 0.5),
    "two-toned": lambda u, v: u > 0,
}
"""Where an object is dark; u and v are counted in periods from the centre of the object."""


def _polygon(corners: int, radius: float = 1.0, inner: float | None = None) -> tuple[complex, ...]:
    """A regular polygon that points up; with `inner`, a star whose notches lie on that radius."""
    radii = (radius,) if inner is None else (radius, inner)
    steps = corners * len(radii)
    return tuple(rect(radii[i % len(radii)], 2 * pi * i / steps - pi / 2) for i in range(steps))


def _heart(points: int = 32) -> tuple[complex, ...]:
    turns = (2 * pi * i / points for i in range(points))
    return tuple(
        complex(16 * sin(t) ** 3, 5 * cos(2 * t) + 2 * cos(3 * t) + cos(4 * t) - 13 * cos(t) - 2.5) / 17.5
        for t in turns
    )


_CROSS_ARM = (-0.34 - 0.94j, 0.34 - 0.94j, 0.34 - 0.34j)

SHAPES: dict[str, tuple[tuple[complex, ...], float]] = {
    "circle": (_polygon(40, radius=0.95), 0),
    "square": (tuple(z * rect(1, pi / 4) for z in _polygon(4, radius=1.14)), 14),
    "triangle": (tuple(z + 0.2j for z in _polygon(3, radius=1.12)), 12),
    "star": (_polygon(5, inner=0.5), 36),
    "cross": (tuple(z * 1j**quarter for quarter in range(4) for z in _CROSS_ARM), 20),
    "heart": (_heart(), 20),
    "ring": ((*_polygon(40, radius=0.98), -0.98j, *_polygon(40, radius=0.45)[::-1], -0.45j), 0),
    "diamond": ((-1j, 0.62 + 0j, 1j, -0.62 + 0j), 12),
}
"""Outlines in the square from -1-1j to 1+1j (y down), and by how many degrees each may turn and stay what it is."""

SUPERSAMPLING = 2
PERIODS = 7.5  # of a texture, across the image
TURNS = 16  # angles of a texture
FIELDS = 16  # backgrounds before they are coloured


def draw(scene: Scene, image_size: int, rng: Random) -> Image.Image:
    """The scene as RGB; what its description leaves open (background, shades, angles) comes from `rng`."""
    image = _background(image_size, rng)
    for thing in scene.things:
        side = round(thing.extent * image_size)
        corner = (round(thing.x * image_size - side / 2), round(thing.y * image_size - side / 2))
        image.paste(_surface(thing.kind, side, image_size, rng), corner, _silhouette(thing.kind.shape, side, rng))
    return image


def _background(image_size: int, rng: Random) -> Image.Image:
    """Two greyish tones that run into each other, with a little grain."""
    grey = rng.randint(105, 220)
    tones = [tuple(grey + rng.randint(-20, 20) for _ in "rgb") for _ in range(2)]
    image = Image.new("RGB", (image_size, image_size), tones[0])
    image.paste(tones[1], (0, 0), _field(rng.randrange(FIELDS), image_size))
    return image


def _surface(kind: Kind, side: int, image_size: int, rng: Random) -> Image.Image:
    """A square of the object's colour, in a shade of its own, with its texture."""
    light = rng.uniform(0.9, 1.05)
    red, green, blue = (round(light * channel) + rng.randint(-8, 8) for channel in COLOURS[kind.colour])
    surface = Image.new("RGB", (side, side), (red, green, blue))
    pattern = _pattern(kind.texture, rng.randrange(TURNS), image_size)
    margin = (image_size - side) // 2
    dark = (red // 4, green // 4, blue // 4)
    surface.paste(dark, (0, 0), pattern.crop((margin, margin, margin + side, margin + side)))
    return surface


def _silhouette(shape: str, side: int, rng: Random) -> Image.Image:
    """The shape as a smooth mask, slightly turned."""
    outline, degrees = SHAPES[shape]
    scale = side * SUPERSAMPLING
    turn = rect(scale / 2, radians(rng.uniform(-degrees, degrees)))
    centre = complex(scale - 1, scale - 1) / 2
    mask = Image.new("L", (scale, scale))
    points = [turn * z + centre for z in outline]
    ImageDraw.Draw(mask).polygon([(z.real, z.imag) for z in points], fill=255)
    return mask.reduce(SUPERSAMPLING)


@lru_cache(maxsize=256)
def _pattern(texture: str, turn: int, image_size: int) -> Image.Image:
    """Where a texture is dark, at one of its angles, as a mask as large as the image."""
    points = SUPERSAMPLING * image_size
    steps = PERIODS * ((np.arange(points) + 0.5) / points - 0.5)
    x, y = np.meshgrid(steps, steps)
    angle = 2 * pi * turn / TURNS
    dark = TEXTURES[texture](x * cos(angle) + y * sin(angle), y * cos(angle) - x * sin(angle))
    return Image.fromarray(np.uint8(255) * dark).reduce(SUPERSAMPLING)


@lru_cache(maxsize=256)
def _field(number: int, image_size: int) -> Image.Image:
    """A grainy gradient in one of the directions, as a mask."""
    steps = np.linspace(-0.5, 0.5, image_size)
    angle = 2 * pi * number / FIELDS
    slope = steps[None, :] * cos(angle) + steps[:, None] * sin(angle)
    grain = np.frombuffer(Random(number).randbytes(image_size**2), np.uint8).reshape(image_size, image_size)
    return Image.fromarray((128 + 110 * slope + (grain - 127.5) / 4).astype(np.uint8))
