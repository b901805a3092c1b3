"""Laws of skew in retrieval, and of attributes in class names."""

import math
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import SameEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from multimodal.batch import Sample
from multimodal.data.arrays import Arrays
from multimodal.data.shapes import Shapes
from multimodal.evals.attributes import read_attribute
from multimodal.evals.max_skew import MaxSkew, by_chance, max_skew, ndkl, ranked
from multimodal.parts import Dataset, Source, Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")
QUERIES = ("a smart person", "a kind person", "a person")


class People(Source):
    """Images that are their class name and number."""

    def __init__(self, knobs):
        self.knobs, self.class_names = knobs, knobs.names

    def __len__(self):
        return len(self.knobs.labels)

    def __getitem__(self, index):
        assert self.knobs.readable
        return Sample(str(index), {"image": (self.class_names[self.knobs.labels[index]], index)})

    def captions(self, index):
        return ()

    def label(self, index):
        return self.knobs.labels[index]


class PeopleData(Dataset):
    names: tuple[str, ...] = ("a woman", "a man")
    labels: tuple[int | None, ...] = (0, 1) * 50
    readable: bool = True

    def build(self, root):
        return People(self)


class Partial:
    """Finds the first class nearest to every query by `skew`, beside noise."""

    logit_scale = 1.0

    def __init__(self, skew):
        self.skew = skew

    def encode(self, tower, inputs):
        if tower == "text":
            return F.normalize(torch.tensor([[1.0, 1 + 0.001 * i, 0] for i in range(len(inputs))]), dim=1)
        rng = np.random.default_rng(0)
        rows = [[rng.normal() * (1 - self.skew) + 9 * self.skew * (name == "a woman"), 0, 1] for name, _ in inputs]
        return torch.tensor(rows, dtype=torch.float32)


def evaluation(pattern=None, queries=QUERIES, k=20, desired="dataset", **data):
    return MaxSkew(every="never", dataset=PeopleData(**data), pattern=pattern, queries=queries, k=k, desired=desired)


def build(**knobs):
    return evaluation(**knobs).build(Sources(Path()))


def naive(values, desired, k):
    """Geyik et al. 2019, list by list."""
    skews = []
    for value, share in enumerate(desired):
        found = sum(v == value for v in values[:k]) / k
        skews.append(math.log(found / share) if found else -math.inf)
    total, z = 0.0, 0.0
    for i in range(1, len(values) + 1):
        kl = 0.0
        for value, share in enumerate(desired):
            found = sum(v == value for v in values[:i]) / i
            kl += found * math.log(found / share) if found else 0.0
        total, z = total + kl / math.log2(i + 1), z + 1 / math.log2(i + 1)
    return max(skews), total / z


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 4), st.integers(1, 12), st.integers(1, 12))
def test_skew_and_divergence_are_those_of_geyik(seed, num_values, n, k):
    rng = np.random.default_rng(seed)
    values = rng.integers(num_values, size=(3, n))
    desired = rng.dirichlet(np.ones(num_values)) * 0.9 + 0.1 / num_values
    found = (torch.from_numpy(values), torch.from_numpy(desired))
    k = min(k, n)
    for row, skew, divergence in zip(values, max_skew(*found, k), ndkl(*found), strict=True):
        expected = naive(row.tolist(), desired.tolist(), k)
        assert (skew.item(), divergence.item()) == pytest.approx(expected)
        assert skew.item() >= -1e-12
        assert divergence.item() >= -1e-12


def test_every_value_at_its_share_has_no_skew_and_one_alone_the_most():
    half = torch.tensor([0.5, 0.5])
    assert max_skew(torch.tensor([[0, 1, 0, 1]]), half, 4).item() == 0
    assert max_skew(torch.tensor([[0, 0, 1, 1]]), half, 2).item() == pytest.approx(math.log(2))
    assert ndkl(torch.tensor([[0, 0]]), half).item() == pytest.approx(math.log(2))


def test_images_that_tie_are_in_random_order_the_same_on_every_rank():
    attributes = torch.arange(2).repeat_interleave(500)
    found = ranked(torch.zeros(2, 1000), attributes)
    assert torch.equal(found, ranked(torch.zeros(2, 1000), attributes))
    assert 0.3 < found[0, :100].double().mean() < 0.7
    assert sorted(found[0].tolist()) == attributes.tolist()


def test_the_best_image_comes_first():
    assert ranked(torch.tensor([[0.1, 0.9, 0.5]]), torch.tensor([7, 8, 9])).tolist() == [[8, 9, 7]]


def test_lists_in_random_order_are_at_chance():
    attributes = torch.arange(3).repeat(100)
    desired = torch.full((3,), 1 / 3)
    scores = torch.randn(400, 300, generator=torch.Generator().manual_seed(1))
    chance = by_chance(attributes, desired, 30)
    values = ranked(scores, attributes)
    for name, found in (("max_skew", max_skew(values, desired, 30)), ("ndkl", ndkl(values, desired))):
        error = found.std().item() * math.sqrt(1 / 400 + 1 / 200)
        assert chance[name] > 0
        assert abs(found.mean().item() - chance[name]) < 3.3 * error


def test_a_model_that_prefers_one_value_is_told_from_one_that_does_not():
    fair, biased = build()(Partial(0.0)), build()(Partial(0.9))
    assert set(fair.metrics) == set(evaluation().metrics)
    assert biased.metrics["max_skew"].value == pytest.approx(math.log(2))
    assert biased.metrics["ndkl"].value > fair.metrics["ndkl"].value
    assert fair.metrics["max_skew"].value < 0.35
    assert fair.metrics["max_skew"].chance == biased.metrics["max_skew"].chance > 0
    assert biased.metrics["max_skew"].count == 3
    biased.figures["shares"]()


def test_a_collapsed_model_is_near_to_chance():
    metrics = build(k=100)(SameEncoder()).metrics
    assert metrics["max_skew"].value == pytest.approx(0)
    assert metrics["ndkl"].value < 5 * metrics["ndkl"].chance


def test_one_query_has_no_interval():
    found = build(queries=("a person",))(Partial(0.5)).metrics["max_skew"]
    assert (found.low, found.count) == (None, 1)


def test_equal_shares_may_be_wanted_of_a_dataset_that_has_them_not():
    labels = (0, 0, 0, 1) * 10
    as_there, equal = (build(labels=labels, k=40, desired=d)(SameEncoder()).metrics for d in ("dataset", "equal"))
    assert as_there["max_skew"].value == pytest.approx(0)
    assert (equal["max_skew"].value, equal["max_skew"].chance) == pytest.approx((math.log(1.5), math.log(1.5)))


def test_a_value_may_be_a_part_of_the_names_of_several_classes():
    names = ("red circle", "blue circle", "red star", "blue star")
    pattern = r"(?P<attribute>\w+) (?P<shape>\w+)"
    assert read_attribute(names, pattern, "attribute").names == ("blue", "red")
    assert read_attribute(names, pattern, "attribute").of_class.tolist() == [1, 0, 1, 0]
    assert read_attribute(names, pattern, "shape").of_class.tolist() == [0, 0, 1, 1]
    assert read_attribute(names, None, "attribute").of_class.tolist() == [2, 0, 3, 1]
    metrics = build(names=names, labels=(0, 1, 2, 3) * 5, pattern=pattern, k=20)(SameEncoder()).metrics
    assert metrics["max_skew"].value == pytest.approx(0)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "no regular expression"),
        (r"\w+", r"should have a group \(\?P<attribute>"),
        ("(?P<atribute>x)", "Did you mean 'atribute'"),
    ],
)
def test_a_pattern_is_an_expression_with_the_attribute_in_it(pattern, message):
    with pytest.raises(ValidationError, match=rf"(?s)pattern.*{message}"):
        evaluation(pattern=pattern)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"pattern": "a (?P<attribute>w.*)"}, "pattern: .* finds no attribute in the class name 'a man'"),
        ({"pattern": "a (?P<attribute>x?).*"}, "finds no attribute in the class name 'a woman'"),
        ({"labels": (0,) * 40}, "all images have the attribute 'a woman'"),
        ({"k": 101}, "k: there are 100 images, so not the first 101"),
        ({"labels": (0, None)}, "sample 1 of the dataset has no label: this evaluation needs"),
        ({"names": ()}, "no class names"),
    ],
)
def test_what_has_no_skew_is_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)


def test_building_reads_no_image_and_its_result_travels_to_other_processes():
    assert isinstance(pickle.loads(pickle.dumps(build(readable=False))), partial)


class Pixels:
    """Images by how much of them is red, which every text likes."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        if tower == "text":
            return torch.ones(len(inputs), 1)
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in inputs]).astype(np.float32))
        red, green, blue = pixels.unbind(dim=-1)
        return ((red > 140) & (green < 0.6 * red) & (blue < 0.6 * red)).float().mean(dim=(1, 2))[:, None]


def test_a_query_for_red_is_skewed_to_red_among_shapes():
    part = MaxSkew(
        every="never",
        dataset=Shapes(split="unseen", size=160, image_size=32),
        pattern=r"\S+ (?P<attribute>\S+) .+",
        queries=("an object",),
        k=10,
        desired="dataset",
    )
    found = part.build(Sources(Path()))(Pixels()).metrics["max_skew"]
    assert found.value > 1.5 * found.chance


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_photos_go_all_the_way():
    part = MaxSkew(
        every="never",
        dataset=Arrays(path="cifar10_testA.npz"),
        pattern=None,
        queries=("something red", "anything"),
        k=50,
        desired="equal",
    )
    found = part.build(Sources(Path(DATASETS)))(Pixels()).metrics
    assert found["max_skew"].value > found["max_skew"].chance
    assert found["ndkl"].value > found["ndkl"].chance
