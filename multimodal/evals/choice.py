"""Compositionality: is an image nearer to its caption than to one that says something else in nearly the same words?"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from pydantic import Field
from torch import Tensor

from multimodal.data.choices import Choice as Question
from multimodal.data.choices import Choices, ChoiceSource
from multimodal.data.views import Inputs
from multimodal.evals import figures
from multimodal.evals.intervals import bootstrap
from multimodal.parts import Encoder, Estimate, Eval, Report, Sources

# --- metrics --------------------------------------------------------------------------------------------------------


def choice_hits(
    right: Tensor,  # [n] scores of right captions
    wrong: Tensor,  # [n, m] of wrong ones; -inf where there are fewer than m
) -> Tensor:  # bool [n]
    """Whether the right caption scores higher than all wrong ones; ties count against the model, and NaN too."""
    return (right[:, None] > wrong).all(dim=1)


def cosines(
    image_features: Tensor,  # [n, D] unit norm
    text_features: Tensor,  # [n, D] unit norm
) -> Tensor:  # [n]
    """Row by row, so that the same two vectors have the same cosine wherever they stand: ties are ties."""
    return (image_features * text_features).sum(dim=1)


def by_category(
    hits: Tensor,  # bool [n]
    categories: Tensor,  # int64 [n], from 0
    images: Tensor,  # int64 [n], from 0: the image that each is about
    chances: Tensor,  # [n] of guessing right
    names: Sequence[str],  # of the categories, each of which occurs
) -> dict[str, float | Estimate]:
    """The accuracy of each category, and `mean` over them; intervals are over images."""
    shape = int(images.max()) + 1, len(names)

    def table(values: Tensor) -> Tensor:  # [images, categories]
        return torch.zeros(shape, dtype=torch.float64).index_put((images, categories), values.double(), accumulate=True)

    sums, counts, guessed = table(hits), table(torch.ones_like(chances)), table(chances).sum(dim=0)
    totals = counts.sum(dim=0)
    value, chance = sums.sum(dim=0) / totals, guessed / totals

    def statistic(drawn: Tensor) -> Tensor:  # [R, 1 + categories]
        found = (drawn @ sums) / (drawn @ counts)
        return torch.cat([found.nanmean(dim=1, keepdim=True), found], dim=1)

    low, high = bootstrap(statistic, len(sums))
    rows = zip(
        ("mean", *names),
        [value.mean().item(), *value.tolist()],
        low.tolist(),
        high.tolist(),
        [chance.mean().item(), *chance.tolist()],
        [len(hits), *totals.long().tolist()],
        strict=True,
    )
    return {name: Estimate(*numbers) for name, *numbers in rows}


# --- evaluation -----------------------------------------------------------------------------------------------------


def open_choices(data: Sources, dataset: Choices, limit: int | None) -> tuple[Inputs, list[Question]]:
    """The images, or the first so many, and the choices about them; ValueError where a category has none."""
    source = data.open(dataset)
    assert isinstance(source, ChoiceSource)
    images = Inputs(source, "image", limit)
    choices = [choice for choice in source.choices if choice.image < len(images)]
    if missing := set(dataset.categories).difference(choice.category for choice in choices):
        raise ValueError(f"no choice of the categories {', '.join(sorted(missing))} among {len(images)} images")
    return images, choices


class Choice(Eval):
    """For each image and right caption: is it nearer to that than to the wrong ones?

    Metrics: the accuracy of each category of the dataset, and `mean` over categories. A bag of words is at most at
    chance where only the order of words differs.
    """

    dataset: Choices
    """Images with right and wrong captions."""
    max_images: int | None = Field(gt=0)
    """Take only choices about the first so many images; null for all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "mean", *self.dataset.categories

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        return partial(self._run, *open_choices(data, self.dataset, self.max_images))

    def _run(self, inputs: Inputs, choices: Sequence[Question], encoder: Encoder) -> Report:
        images = torch.tensor([choice.image for choice in choices])
        names = self.dataset.categories
        categories = torch.tensor([names.index(choice.category) for choice in choices])
        most = max(len(choice.wrong) for choice in choices)
        texts = [text for choice in choices for text in (choice.right, *choice.wrong)]
        features = encoder.encode("image", inputs)[images]
        text_features = encoder.encode("text", texts)
        counts = torch.tensor([1 + len(choice.wrong) for choice in choices])
        owners = torch.arange(len(choices)).repeat_interleave(counts)
        places = torch.arange(len(texts)) - (counts.cumsum(0) - counts)[owners]
        scores = torch.full((len(choices), 1 + most), -torch.inf)
        scores[owners, places] = cosines(features[owners], text_features)
        hits = choice_hits(scores[:, 0], scores[:, 1:])
        metrics = by_category(hits, categories, images, 1 / counts, names)
        shown = [estimate for estimate in metrics.values() if isinstance(estimate, Estimate)]
        values, chance = [one.value for one in shown], [one.chance or 0 for one in shown]
        title = f"right caption chosen, of {len(choices):,} choices"
        return Report(metrics, {"categories": partial(figures.bars, list(metrics), values, title, chance)})
