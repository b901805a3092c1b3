"""Laws of samples that are drawn from a source: they are embedded once, and are those at their places."""

import pytest
import torch

from multimodal.data.views import Inputs
from multimodal.evals.classes import drawn_places
from multimodal.trainer import Trainer


@pytest.mark.parametrize("some", [None, 5, [3, 5, 60], drawn_places(64, 20), drawn_places(64, 64)])
def test_an_encoder_that_remembers_gives_the_features_of_the_places_that_are_asked_for(
    tiny_trainer: Trainer, some: object
) -> None:
    source, remembering = tiny_trainer.source, tiny_trainer.assembled.encoder(0)
    everything = remembering.encoder.encode("image", Inputs(source, "image"))
    places = range(64)[:some] if some is None or isinstance(some, int) else some
    for _ in range(2):
        found = remembering.encode("image", Inputs(source, "image", some))
        torch.testing.assert_close(found, everything[list(places)])
    torch.testing.assert_close(remembering.encode("image", Inputs(source, "image", [0, 63])), everything[[0, 63]])
    torch.testing.assert_close(remembering.encode("image", Inputs(source, "image")), everything)


@pytest.mark.parametrize(("count", "limit"), [(10, None), (10, 10), (10, 20), (10, 3), (1000, 300)])
def test_drawn_places_are_so_many_in_rising_order_and_the_same_again(count: int, limit: int | None) -> None:
    places = list(drawn_places(count, limit))
    assert places == sorted(set(places)) == list(drawn_places(count, limit))
    assert len(places) == min(count, limit or count)
    assert set(places) <= set(range(count))
