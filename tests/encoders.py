"""Small stand-ins for models, as evaluations see them."""

from functools import cache
from hashlib import sha256

import numpy as np
import torch
import torch.nn.functional as F


def unit(*shape, seed=0, shift=0.0):
    """Rows of unit norm at random, float64; `shift` is added to all of them before."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64) + shift, dim=-1)


@cache
def direction(word, dim=64):
    """A fixed direction for a string; the same tensor each time."""
    return unit(dim, seed=int.from_bytes(sha256(word.encode()).digest()[:4], "big")).float()


class PixelEncoder:
    """An image is its pixels, eight by eight, projected at random; a text is a direction. Counts what it reads."""

    logit_scale = 100.0

    def __init__(self, dim=64):
        self.dim, self.images = dim, 0
        self.projection = torch.randn(8 * 8 * 3, dim, generator=torch.Generator().manual_seed(0))

    def encode(self, tower, inputs):
        if tower == "text":
            return torch.stack([direction(text, self.dim) for text in inputs])
        self.images += len(inputs)
        pixels = [
            np.asarray(inputs[i].convert("RGB").resize((8, 8)), np.float32) / 255 - 0.5 for i in range(len(inputs))
        ]
        return F.normalize(torch.from_numpy(np.stack(pixels)).flatten(1) @ self.projection, dim=-1)


class SameEncoder:
    """A collapsed model: one direction for everything."""

    logit_scale = 100.0

    def encode(self, tower, inputs):
        return direction("anything").expand(len(inputs), -1)


class BrokenEncoder:
    """A model that has diverged: no number anywhere."""

    logit_scale = 100.0

    def encode(self, tower, inputs):
        return torch.full((len(inputs), 64), torch.nan)
