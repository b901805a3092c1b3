"""Laws of zero-shot classification with any number of classes an image."""

import math
import pickle
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import BrokenEncoder, PixelEncoder, SameEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from test_clip_benchmark import write

from multimodal.data.clip_benchmark import ClipBenchmark
from multimodal.evals.multi_label import MultiLabel, average_precision, average_precisions, chance_precision
from multimodal.parts import Dataset, Source, Sources


def drawn(seed, n=40, classes=6, levels=None):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(n, classes)) if levels is None else rng.integers(levels, size=(n, classes)) / levels
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(rng.random((n, classes)) < 0.3)


def once(statistic, n):
    """With each of n samples taken once."""
    return statistic(torch.ones(1, n, dtype=torch.float64))[0]


@given(st.integers(0, 10**6), st.integers(1, 5) | st.none())
@settings(deadline=None, max_examples=60)
def test_average_precision_is_that_of_scikit_learn_with_ties_and_weights(seed, levels):
    scores, positive = drawn(seed, n=17, classes=1, levels=levels)
    scores, positive = scores[:, 0], positive[:, 0]
    positive[seed % 17] = True
    weights = torch.tensor(np.random.default_rng(seed + 1).integers(0, 3, (2, 17)), dtype=torch.float64)
    weights[:, seed % 17] = 1
    ours = average_precision(scores, positive)
    assert once(ours, 17) == pytest.approx(average_precision_score(positive, scores), abs=1e-12)
    for row, found in zip(weights, ours(weights), strict=True):
        wanted = average_precision_score(positive, scores, sample_weight=row)
        assert found == pytest.approx(wanted, abs=1e-12)


def test_the_mean_is_the_macro_average_of_scikit_learn():
    scores, positive = drawn(0)
    wanted = average_precision_score(positive, scores, average="macro")
    assert once(average_precisions(scores, positive), 40).mean() == pytest.approx(wanted, abs=1e-12)


def test_without_ties_it_is_the_mean_precision_where_positives_stand():
    scores, positive = drawn(1)
    for score, right in zip(scores.T, positive.T, strict=True):
        order = score.argsort(descending=True)
        ranks = [rank for rank, place in enumerate(order, start=1) if right[place]]
        precisions = [(hit + 1) / rank for hit, rank in enumerate(ranks)]
        found = once(average_precision(score, right), 40)
        assert found == pytest.approx(sum(precisions) / len(precisions), abs=1e-12)


def test_counts_are_samples_taken_so_often():
    scores, positive = drawn(2, levels=4)
    counts = torch.tensor(np.random.default_rng(0).integers(0, 3, (3, 40)), dtype=torch.float64)
    found = average_precisions(scores, positive)(counts)
    for row, values in zip(counts, found, strict=True):
        repeated = torch.arange(40).repeat_interleave(row.long())
        wanted = once(average_precisions(scores[repeated], positive[repeated]), len(repeated))
        torch.testing.assert_close(values, wanted)


def test_a_class_without_a_positive_is_no_number_and_left_out():
    scores, positive = drawn(3)
    positive[:, 2] = False
    found = once(average_precisions(scores, positive), 40)
    assert found.isnan().tolist() == [False, False, True, False, False, False]


def test_what_is_no_number_has_the_worst_place():
    positive = torch.tensor([True, False, True, False])
    scores = torch.tensor([3.0, 2, torch.nan, torch.nan], dtype=torch.float64)
    found, wanted = (once(average_precision(one, positive), 4) for one in (scores, torch.tensor([3.0, 2, 1, 4])))
    assert found == wanted


class Scenes(Source):
    """Images of classes; their picture says nothing."""

    def __init__(self, knobs):
        self.labels, self.class_names, self.templates = knobs.labels, knobs.names, knobs.templates

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        raise AssertionError("an image was read")

    def captions(self, index):
        return ()

    def labels_of(self, index):
        return self.labels[index]


class SceneData(Dataset):
    names: tuple[str, ...] = ("cat", "dog", "owl")
    templates: tuple[str, ...] = ("a {}.", "the {}")
    labels: tuple[tuple[int, ...] | None, ...] = ((0, 1), (), (2,), (0,))

    def build(self, root):
        return Scenes(self)


def build(data=None, templates=None, class_names=None, max_samples=None, root=None, **knobs):
    part = MultiLabel(
        every="never",
        dataset=data or SceneData(**knobs),
        templates=templates,
        class_names=class_names,
        max_samples=max_samples,
    )
    return part.build(Sources(root or Path()))


class RandomEncoder:
    logit_scale = 1.0

    def encode(self, tower, inputs):
        seed = 0 if tower == "image" else 1
        return torch.nn.functional.normalize(
            torch.randn(len(inputs), 32, generator=torch.Generator().manual_seed(seed))
        )


def test_labels_that_have_nothing_to_do_with_the_images_give_chance():
    rng = np.random.default_rng(0)
    labels = tuple(tuple(np.flatnonzero(rng.random(4) < 0.25).tolist()) for _ in range(3000))
    report = build(labels=labels, names=("a", "b", "c", "d"))(RandomEncoder())
    found = report.metrics["map"]
    assert found.chance == pytest.approx(0.25, abs=0.02)
    width = (found.high - found.low) / (2 * 1.96)
    assert abs(found.value - found.chance) < 3.29 * width
    assert found.low < found.value < found.high
    assert found.count == 3000


@pytest.mark.parametrize("encoder", [SameEncoder(), BrokenEncoder()])
def test_a_collapsed_model_is_no_better_than_chance(encoder):
    found = build()(encoder).metrics["map"]
    assert found.value <= found.chance + 1e-12
    assert not math.isnan(found.low)


def test_a_folder_of_clip_benchmark_is_evaluated_as_it_is(tmp_path):
    write(tmp_path, "multilabel")
    run = pickle.loads(pickle.dumps(build(ClipBenchmark(path="wds_things"), root=tmp_path)))
    report = run(PixelEncoder())
    assert set(report.metrics) == {"map"}
    assert 0 < report.metrics["map"].value <= 1
    axes = report.figures["average_precision"]().axes[0]
    assert {label.get_text() for label in axes.get_yticklabels()} == {"red thing", "T-shirt/top"}  # of some image


def test_given_templates_and_names_stand_for_those_of_the_dataset():
    class Asked(SameEncoder):
        def encode(self, tower, inputs):
            self.texts = list(inputs) if tower == "text" else self.texts
            return super().encode(tower, inputs)

    encoder = Asked()
    build(templates=["{}!"], class_names=["x", "y", "z"])(encoder)
    assert encoder.texts == ["x!", "y!", "z!"]
    build()(encoder)
    assert encoder.texts[:2] == ["a cat.", "the cat"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"names": ()}, "no class names: set class_names"),
        ({"class_names": ["one"]}, "sample 0 has labels from 0 to 1 but there are 1 class names: set class_names"),
        ({"templates": None, "data": SceneData(templates=())}, "brings no templates: set templates"),
        ({"labels": ((0,), None)}, "sample 1 of the dataset has no labels"),
        ({"labels": ((), ())}, "none of the 2 samples is of any class"),
        ({"labels": ()}, "none of the 0 samples"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)


def test_a_label_of_each_image_is_a_case_of_any_number():
    class Single(Scenes):
        labels_of = Source.labels_of

        def label(self, index):
            return index % 3

    class SingleData(SceneData):
        def build(self, root):
            return Single(self)

    chance = (2 * chance_precision(torch.tensor([1]), 4) + chance_precision(torch.tensor([2]), 4)) / 3
    assert build(SingleData())(SameEncoder()).metrics["map"].chance == pytest.approx(chance.item())


@pytest.mark.parametrize("num_positive", [1, 2, 4, 5])
def test_chance_is_the_mean_over_all_orders(num_positive):
    positive = torch.arange(5) < num_positive
    orders = [torch.tensor(order, dtype=torch.float64) for order in permutations(range(5))]
    expected = torch.stack([once(average_precision(order, positive), 5) for order in orders]).mean().item()
    assert chance_precision(torch.tensor([num_positive]), 5).item() == pytest.approx(expected)


def test_a_part_of_the_samples_is_drawn_from_all_of_them():
    labels = tuple((int(i >= 50),) for i in range(100))  # sorted by class
    run = build(labels=labels, max_samples=30)
    places = run.args[0].images.places
    assert len(places) == 30 == len(set(places))
    assert min(places) < 50 < max(places)
    assert list(places) == sorted(places)
