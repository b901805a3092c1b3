"""The laws of captions of different lengths: less padding is computed, and nobody can tell from what comes out."""

from collections.abc import Iterator
from itertools import combinations, product

import numpy as np
import pytest
import torch
from conftest import TinyConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from test_one_token import CONTEXT, END, KNOBS, PAD, TEXTS, captions, made, text
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from multimodal import lengths, memory
from multimodal.batch import Batch, Features
from multimodal.config import ModelSection
from multimodal.data.loader import Reader
from multimodal.encoder import Encoder
from multimodal.lengths import OVERHEAD, by_length, chunks
from multimodal.model import Model
from multimodal.parts import Loss, TowerModule
from multimodal.towers.text import TextPreprocessor
from multimodal.towers.text_transformer import TextTransformerEncoder
from multimodal.trainer import Trainer

SECTION = ModelSection(embed_dim=8, logit_scale=10.0, max_logit_scale=100.0, learn_logit_scale=True, logit_bias=None)
FP32 = torch.autocast("cpu", enabled=False)
CUT = ("causal", "masked", "masked, first")


@pytest.fixture
def chunks_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few captions already make several."""
    monkeypatch.setattr(lengths, "OVERHEAD", 1)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what text transformers are given."""
    shapes: list[tuple[int, ...]] = []
    whole = TextTransformerEncoder.forward

    def forward(self: TextTransformerEncoder, inputs: Tensor, embedded: Tensor | None = None) -> Tensor:
        shapes.append(tuple(inputs.shape))
        return whole(self, inputs, embedded)

    monkeypatch.setattr(TextTransformerEncoder, "forward", forward)
    return shapes


# --- chunks ---------------------------------------------------------------------------------------------------------


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    for count in range(len(rows)):
        for cuts in combinations(range(1, len(rows)), count):
            yield [rows[a:b] for a, b in zip((0, *cuts), (*cuts, len(rows)), strict=True)]


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=7).map(sorted))
def test_no_other_division_costs_less(rows: list[int]) -> None:
    found = chunks(np.array(rows))
    assert sum(count for count, _ in found) == len(rows)
    done = 0
    for count, length in found:
        assert length == max(rows[done : done + count])
        done += count
    cost = sum(count * length + OVERHEAD for count, length in found)
    assert cost == min(sum(len(part) * max(part) + OVERHEAD for part in parts) for parts in partitions(rows))


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=20))
def test_rows_come_back_in_their_order(rows: list[int]) -> None:
    generator, longest = torch.Generator().manual_seed(0), 310
    mask = torch.arange(longest) < torch.tensor(rows)[:, None]
    inputs = (torch.randn(len(rows), longest, generator=generator, dtype=torch.float64) * mask).requires_grad_()
    computed = 0

    def encode(x: Tensor) -> Tensor:
        nonlocal computed
        computed += x.numel()
        return torch.stack([x.sum(1), (x * torch.arange(1, x.shape[1] + 1)).sum(1)], dim=1)

    weights = torch.randn(len(rows), 2, generator=generator, dtype=torch.float64)
    results = []
    for run in (encode, lambda x: by_length(encode, x, torch.tensor(rows))):
        computed = 0
        features = run(inputs)
        (grad,) = torch.autograd.grad((features * weights).sum(), inputs)
        results.append((features, grad * mask, computed))
    (features, grad, whole), (ours, our_grad, less) = results
    torch.testing.assert_close(ours, features, rtol=0, atol=1e-9)
    torch.testing.assert_close(our_grad, grad, rtol=0, atol=1e-10)
    assert less <= len(rows) * max(rows) < whole


@pytest.mark.parametrize(("longest", "expected"), [(1, 16), (16, 16), (17, 32), (49, 64), (65, 77), (77, 77)])
def test_a_device_that_prepares_kernels_for_each_shape_sees_few(longest: int, expected: int) -> None:
    shapes: list[tuple[int, ...]] = []
    lengths = torch.randint(1, longest + 1, (9,), generator=torch.Generator().manual_seed(0))
    lengths[4] = longest
    by_length(lambda x: shapes.append(tuple(x.shape)) or x, torch.zeros(9, 77, device="meta"), lengths)  # type: ignore[func-returns-value]
    assert shapes == [(9, expected)]


# --- towers ---------------------------------------------------------------------------------------------------------


def model(module: TowerModule) -> Model:
    return Model({"text": module}, SECTION).double()


def cut(module: TowerModule, ids: Tensor) -> Tensor:
    return by_length(module, ids, module.lengths(ids))  # type: ignore[arg-type]


@pytest.mark.usefixtures("chunks_are_free")
@pytest.mark.parametrize(("kind", "knobs"), list(product(CUT, ["plain", "one block", "layer scale", "checkpointed"])))
def test_features_and_gradients_are_those_of_padded_captions(
    kind: str, knobs: str, seen: list[tuple[int, ...]]
) -> None:
    one = model(text(**{**TEXTS[kind], **KNOBS[knobs], "drop_path": 0.0})).train()
    ids = captions()
    features, grads = made(one, lambda one, ids: one.encode("text", ids, one.lengths({"text": ids})["text"]), ids)
    assert len(seen) > 2
    assert sum(rows * length for rows, length in seen) < ids.numel()
    expected, expected_grads = made(one, lambda one, ids: one.encode("text", ids), ids)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-10)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected_grads[name], rtol=0, atol=1e-10, msg=name)
    assert grads["towers.text.net.positional_embedding"] is not None


@pytest.mark.usefixtures("chunks_are_free")
def test_the_gradient_of_the_table_is_made_once(seen: list[tuple[int, ...]]) -> None:
    one, ids = model(text()), captions()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        one.encode("text", ids, one.lengths({"text": ids})["text"]).sum().backward()
    assert len(seen) > 2
    assert [event.count for event in profiled.key_averages() if event.key == "aten::embedding_dense_backward"] == [1]


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(CUT),
    st.lists(st.lists(st.sampled_from([PAD, 1, 2, END]), min_size=5, max_size=5), min_size=1, max_size=5),
)
def test_any_tokens_are_read_as_if_padded(kind: str, rows: list[list[int]]) -> None:
    module, ids = text(**TEXTS[kind]).double(), torch.tensor(rows)
    expected = module(ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lengths, "OVERHEAD", 1)
        torch.testing.assert_close(cut(module, ids), expected, rtol=0, atol=1e-10, equal_nan=True)
    if kind == "causal":
        beyond = torch.arange(5) >= module.lengths(ids)[:, None]  # type: ignore[index]
        torch.testing.assert_close(module(torch.where(beyond, 7, ids)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", sorted(set(TEXTS) - set(CUT)))
def test_where_padding_is_seen_it_stays(kind: str) -> None:
    module, ids = text(**TEXTS[kind]).double(), captions()
    assert model(module).lengths({"text": ids}) == {}
    other = torch.where(torch.arange(CONTEXT) == CONTEXT - 1, 7, ids)
    assert not torch.allclose(module(other)[1], module(ids)[1], atol=1e-3)


def test_lengths_are_to_the_end_token_or_to_the_last_word() -> None:
    ids = captions()
    assert text().lengths(ids).tolist() == [9, 4, 2, 6, 7, 1]  # type: ignore[union-attr]
    assert text(**TEXTS["masked"]).lengths(ids).tolist() == [9, 4, 2, 6, 9, 9]  # type: ignore[union-attr]


def test_a_batch_of_one_length_is_not_reordered(seen: list[tuple[int, ...]]) -> None:
    module = text()
    ids = captions()[1:2].expand(3, -1)
    torch.testing.assert_close(cut(module, ids), module(ids), rtol=0, atol=1e-6)
    assert seen == [(3, 4), (3, CONTEXT)]


# --- who uses them --------------------------------------------------------------------------------------------------


class Words:
    """One token a word."""

    vocab_size, pad, end = 300, PAD, END

    def __call__(self, said: str) -> list[int]:
        return [*(len(word) for word in said.split()), END]


def test_prompts_are_encoded_without_padding(seen: list[tuple[int, ...]]) -> None:
    one = model(text()).float()
    reader = Reader("text", TextPreprocessor(Words(), CONTEXT))  # type: ignore[arg-type]
    prompts = ["a cat", "a red dog", "one"]
    features = Encoder(one, {"text": reader}, FP32).encode("text", prompts)
    assert seen == [(3, 4)]
    ids = torch.stack([reader.preprocessor(prompt, None) for prompt in prompts])
    torch.testing.assert_close(features, one.encode("text", ids), rtol=0, atol=1e-6)


def test_a_run_trains_and_evaluates_without_padding(tiny_config: TinyConfig, seen: list[tuple[int, ...]]) -> None:
    context = 60
    Trainer(tiny_config(f"towers.text.context_length={context}", "duration=2steps")).run()
    assert sum(rows for rows, _ in seen) == 2 * 16
    assert all(length < context for _, length in seen)


class Free(Loss):
    """Takes no memory."""

    def needs(self) -> frozenset[str]:
        return frozenset({"text_features"})

    def __call__(self, features: Features) -> Tensor:
        return features.tensors["text_features"].sum()


def test_the_micro_batch_that_fits_has_room_for_captions_that_fill_the_context(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = model(text()).float()
    ids = torch.full((64, CONTEXT), PAD)
    ids[:, 1] = END
    short = Batch({"text": ids}, torch.arange(64), lengths=one.lengths({"text": ids}))
    full = Batch({"text": torch.full((64, CONTEXT), 1)}, torch.arange(64))
    found = []
    for free in (1e6, 2e6, 1e8):
        monkeypatch.setattr(memory, "free_bytes", lambda _, free=free: int(free))
        found.append([memory.micro_batch_that_fits(one, {"none": Free()}, batch, FP32) for batch in (short, full)])
    assert all(of_short == of_full for of_short, of_full in found)
    assert found[0] != found[-1]


def test_a_micro_batch_is_found_in_bf16_with_checkpointed_blocks() -> None:
    one = model(text(grad_checkpointing=True)).float().train()
    data, context = Batch({"text": captions()}, torch.arange(6)), torch.autocast("cpu", torch.bfloat16)
    found = memory.micro_batch_that_fits(one, {"none": Free()}, data, context)
    assert found == 6
