"""Association tests on the image tower (iEAT): whether images of two groups lie nearer to one attribute's images."""

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

from pydantic import BeforeValidator, Field

from multimodal.data.pictures import Pictures
from multimodal.data.views import Inputs
from multimodal.evals import weat_figures
from multimodal.evals.weat import association_test
from multimodal.parts import Dataset, Encoder, Eval, Report, Sources


def _pictures(value: Any) -> Any:
    return Pictures(path=value) if isinstance(value, str) else value


Concept = Annotated[Dataset, BeforeValidator(_pictures)]
"""Images of one kind: a data set, or the path of a folder."""


class _Images(NamedTuple):
    """What is compared, in the order of `association_test`."""

    target_x: Inputs
    target_y: Inputs
    attribute_a: Inputs
    attribute_b: Inputs


class ImageAssociation(Eval):
    """Image embedding association test: stereotypes in the image tower, from pictures of two groups and two attributes.

    Metrics: `effect` in standard deviations, above 0 where X is nearer to A (and Y to B); `p`, one-sided. It is WEAT's
    arithmetic on images. Steed and Caliskan 2021.
    """

    towers: ClassVar[tuple[str, ...]] = ("image",)

    target_x: Concept
    """Images of one group: a dataset, or a folder."""
    target_y: Concept
    """Of the other group."""
    attribute_a: Concept
    """Images of what is asked to be nearer to X."""
    attribute_b: Concept
    """Of what is asked to be nearer to Y."""
    max_samples: int | None = Field(ge=2)
    """Take only the first so many images of each; null for all."""
    permutations: int = Field(ge=99)
    """Random divisions of the targets for a p-value, where there are too many (100,000) to go through all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return "effect", "p"

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        images = {name: Inputs(data.open(getattr(self, name)), "image", self.max_samples) for name in _Images._fields}
        for name, found in images.items():
            least = 2 if name.startswith("target") else 1
            if len(found) < least:
                raise ValueError(f"{name}: {len(found)} images; an effect needs {least} or more")
        return partial(self._run, _Images(**images))

    def _run(self, images: _Images, encoder: Encoder) -> Report:
        x, y, a, b = (encoder.encode("image", one) for one in images)
        found = association_test(x, y, a, b, self.permutations)
        drawn = partial(weat_figures.effects, {"images": found.effect})
        return Report({"effect": found.effect, "p": found.p}, {"effect": drawn})
