"""Laws of the encoder that evaluations share: everything is embedded once, and as if it were not remembered."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from conftest import TinyConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from multimodal.assemble import assemble
from multimodal.data.views import Inputs
from multimodal.encoder import Encoder
from multimodal.parts import Source, Sources
from multimodal.remembering import Remembering

WORDS = [
    f"a {size} {colour} circle" for size in ("small", "large", "very large") for colour in ("red", "blue", "green")
]


class Counting(Encoder):
    """Counts what it is given."""

    def __init__(self, *args: Any, **knobs: Any) -> None:
        super().__init__(*args, **knobs)
        self.embedded: list[tuple[str, int]] = []

    def encode(self, tower: str, inputs: Sequence[Any]) -> Tensor:
        if len(inputs):
            self.embedded.append((tower, len(inputs)))
        return super().encode(tower, inputs)


@pytest.fixture
def made(tiny_config: TinyConfig) -> tuple[Remembering, Counting, Encoder, Source]:
    """One that remembers, what it asks, one of the same weights that does not, and some data."""
    config = tiny_config()
    source = Sources(config.paths.datasets).open(config.dataset)
    assembled = assemble(config, source, None)
    knobs = assembled.model, assembled.readers, assembled.context
    counting = Counting(*knobs, batch_size=4)
    return Remembering(counting), counting, Encoder(*knobs, batch_size=256), source


def test_a_text_is_embedded_once(made: tuple[Remembering, Counting, Encoder, Source]) -> None:
    remembering, counting, plain, _ = made
    first = remembering.encode("text", WORDS[:4] * 2)
    second = remembering.encode("text", WORDS)
    assert counting.embedded == [("text", 4), ("text", 5)]
    torch.testing.assert_close(first, plain.encode("text", WORDS[:4] * 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(second, plain.encode("text", WORDS), atol=1e-6, rtol=0)
    assert torch.equal(first[:4], second[:4])
    assert remembering.encode("text", []).shape == (0, counting.model.embed_dim)


def test_an_image_is_embedded_once_whichever_part_is_asked_for(
    made: tuple[Remembering, Counting, Encoder, Source],
) -> None:
    remembering, counting, plain, source = made
    some = remembering.encode("image", Inputs(source, "image", 5))
    everything = remembering.encode("image", Inputs(source, "image"))
    again = remembering.encode("image", Inputs(source, "image", 7))
    assert counting.embedded == [("image", 5), ("image", len(source) - 5)]
    torch.testing.assert_close(everything, plain.encode("image", Inputs(source, "image")), atol=1e-6, rtol=0)
    assert torch.equal(some, everything[:5])
    assert torch.equal(again, everything[:7])


def test_other_images_are_embedded_each_time(made: tuple[Remembering, Counting, Encoder, Source]) -> None:
    remembering, counting, _, source = made
    pictures = [source[0].inputs["image"], source[1].inputs["image"]]
    for _ in range(2):
        remembering.encode("image", pictures)
    assert counting.embedded == [("image", 2)] * 2


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(st.sampled_from(WORDS), max_size=12), min_size=1, max_size=5))
def test_whatever_was_asked_before_changes_nothing(
    made: tuple[Remembering, Counting, Encoder, Source], asked: list[list[str]]
) -> None:
    remembering, _, plain, _ = made
    for texts in asked:
        torch.testing.assert_close(remembering.encode("text", texts), plain.encode("text", texts), atol=1e-6, rtol=0)


@pytest.mark.parametrize("frozen", [False, True])
def test_when_weights_change_only_frozen_towers_are_remembered(
    made: tuple[Remembering, Counting, Encoder, Source], frozen: bool
) -> None:
    remembering, counting, plain, source = made
    for weight in counting.model.tower_parameters("text"):
        weight.requires_grad_(not frozen)
    remembering.encode("text", WORDS)
    remembering.encode("image", Inputs(source, "image", 3))
    with torch.no_grad():
        for weight in counting.model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    remembering.forget()
    counting.embedded.clear()
    torch.testing.assert_close(remembering.encode("text", WORDS), plain.encode("text", WORDS), atol=1e-6, rtol=0)
    remembering.encode("image", Inputs(source, "image", 3))
    assert counting.embedded == [*([] if frozen else [("text", len(WORDS))]), ("image", 3)]


def test_prompts_are_tokenised_once_for_all_evaluations(made: tuple[Remembering, Counting, Encoder, Source]) -> None:
    remembering, _, plain, _ = made
    calls = []
    inner = remembering.readers["text"].preprocessor.preprocessor  # type: ignore[attr-defined]
    original = type(inner.encoding).__call__

    def counted(self: Any, text: str) -> list[int]:
        calls.append(text)
        ids: list[int] = original(self, text)
        return ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(inner.encoding), "__call__", counted)
        for _ in range(3):
            remembering.forget()
            found = remembering.encode("text", WORDS)
        assert calls == WORDS
    torch.testing.assert_close(found, plain.encode("text", WORDS), atol=1e-6, rtol=0)
