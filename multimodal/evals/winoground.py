"""Two images and two captions of the same words: which belongs to which? Scores of Winoground."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.choices import Choice, Choices
from multimodal.data.views import Inputs
from multimodal.evals.choice import cosines, open_choices
from multimodal.evals.intervals import means
from multimodal.parts import Encoder, Eval, Report, Sources

CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


def winoground_hits(
    scores: Tensor,  # [n, 2, 2] of caption (row) with image (column); pairs on the diagonal
) -> dict[str, Tensor]:  # bool [n] each
    """`text`: each image has the higher score with its own caption; `image`: each caption with its own image.

    `group`: both. Ties count against the model, and NaN too. Thrush et al. 2022, equations 1 to 3; guessing, that is
    four scores in any order, has 1/4, 1/4 and 1/6.
    """
    own = scores.diagonal(dim1=1, dim2=2)  # [n, 2]
    other_caption = scores.flip(1).diagonal(dim1=1, dim2=2)  # with the same image
    other_image = scores.flip(2).diagonal(dim1=1, dim2=2)  # with the same caption
    text, image = (own > other_caption).all(dim=1), (own > other_image).all(dim=1)
    return {"text": text, "image": image, "group": text & image}


class Winoground(Eval):
    """Pairs of images and captions, told apart in both directions. Metrics: `text`, `image` and `group` score."""

    dataset: Choices
    """Choices that come two by two: the wrong caption of one is the right one of the other."""
    max_images: int | None = Field(gt=0)
    """Take only pairs of the first so many images; null for all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(CHANCE)

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        images, choices = open_choices(data, self.dataset, self.max_images)
        if len(choices) % 2 and self.max_images is not None:
            choices = choices[:-1]  # the other one is beyond
        pairs = list(zip(choices[::2], choices[1::2], strict=False))
        if len(choices) % 2 or not pairs or any(a.wrong != (b.right,) or b.wrong != (a.right,) for a, b in pairs):
            raise ValueError(
                "choices of the dataset do not come two by two, the wrong caption of one being the right one of the "
                "other: evals=[choice] takes any"
            )
        return partial(self._run, images, pairs)

    def _run(self, images: Inputs, pairs: Sequence[tuple[Choice, Choice]], encoder: Encoder) -> Report:
        image_features = encoder.encode("image", images)
        sides = [torch.tensor([pair[side].image for pair in pairs]) for side in range(2)]
        seen = [image_features[side] for side in sides]
        said = [encoder.encode("text", [pair[side].right for pair in pairs]) for side in range(2)]
        scores = torch.stack([torch.stack([cosines(image, text) for image in seen], dim=1) for text in said], dim=1)
        hits = {name: found.double() for name, found in winoground_hits(scores).items()}
        return Report(means(hits, CHANCE))
