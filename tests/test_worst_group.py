"""Laws of accuracy by group."""

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
from multimodal.evals.accuracy import group_accuracies
from multimodal.evals.worst_group import WorstGroup, guessing, worst_and_gap
from multimodal.parts import Dataset, Source, Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")
NAMES = ("waterbird on water", "waterbird on land", "landbird on water", "landbird on land")
PATTERN = "(?P<class>.*) on (?P<group>.*)"


class Birds(Source):
    """Images that are their class names."""

    def __init__(self, knobs):
        self.knobs, self.class_names = knobs, knobs.names

    def __len__(self):
        return len(self.knobs.labels)

    def __getitem__(self, index):
        assert self.knobs.readable
        return Sample(str(index), {"image": self.class_names[self.knobs.labels[index]]})

    def captions(self, index):
        return ()

    def label(self, index):
        return self.knobs.labels[index]


class BirdData(Dataset):
    names: tuple[str, ...] = NAMES
    labels: tuple[int | None, ...] = (0,) * 30 + (1,) * 10 + (2,) * 10 + (3,) * 50
    readable: bool = True

    def build(self, root):
        return Birds(self)


class Spurious:
    """Takes the place for the bird, or looks at the bird."""

    logit_scale = 1.0

    def __init__(self, by_place):
        self.by_place = by_place

    def encode(self, tower, inputs):
        def water(text):
            words = text.split(" on ") if " on " in text and self.by_place else [text, text.split(" on ")[0]]
            return float("water" in words[-1])

        return F.normalize(torch.tensor([[water(text), 1 - water(text)] for text in inputs]), dim=1)


def evaluation(pattern=PATTERN, groups=None, by_class=True, min_samples=1, **data):
    return WorstGroup(
        every="never",
        dataset=BirdData(**data),
        groups=groups,
        pattern=pattern,
        by_class=by_class,
        min_samples=min_samples,
        templates=("a {}.",),
    )


def build(**knobs):
    return evaluation(**knobs).build(Sources(Path()))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 30), st.integers(1, 5))
def test_accuracies_are_those_found_group_by_group_in_every_sample(seed, n, num_groups):
    rng = np.random.default_rng(seed)
    hits, groups = rng.integers(2, size=n), rng.integers(num_groups, size=n)
    groups[0] = num_groups - 1
    counts = np.stack([np.ones(n, dtype=int), rng.integers(3, size=n)])
    counts[1, 0] = 1
    tensors = [torch.from_numpy(array) for array in (hits, groups, counts)]
    found, three = group_accuracies(*tensors), worst_and_gap(*tensors)
    for row, times in enumerate(counts):
        rows = np.repeat(np.arange(n), times)
        expected = [
            hits[rows[groups[rows] == g]].mean() if (groups[rows] == g).any() else np.nan for g in range(num_groups)
        ]
        np.testing.assert_allclose(found[row], expected)
        mean, worst = hits[rows].mean(), np.nanmin(expected)
        np.testing.assert_allclose(three[row], [mean, worst, mean - worst])
    assert torch.equal(worst_and_gap(*tensors[:2])[0], three[0])


def test_guessing_has_a_worst_group_below_its_mean_and_less_so_the_larger_groups_are():
    small, large = guessing(torch.tensor([10] * 8), 0.25), guessing(torch.tensor([1000] * 8), 0.25)
    assert small[0] == large[0] == 0.25
    assert small[1] < large[1] < 0.25
    assert small[2] == pytest.approx(0.25 - small[1])
    exact = sum(  # of two groups with one image each
        p * min(a, b) for a, b, p in [(0, 0, 0.5625), (0, 1, 0.1875), (1, 0, 0.1875), (1, 1, 0.0625)]
    )
    assert guessing(torch.tensor([1, 1]), 0.25, draws=200_000)[1] == pytest.approx(exact, abs=0.003)


def test_labels_at_random_are_at_chance():
    rng = np.random.default_rng(0)
    groups = torch.from_numpy(np.repeat(np.arange(5), 40))
    hits = torch.from_numpy((rng.random((500, 200)) < 0.25).astype(float))
    found = torch.cat([worst_and_gap(row, groups) for row in hits])
    chance = guessing(torch.tensor([40] * 5), 0.25)
    for values, expected in zip(found.T, chance, strict=True):
        assert abs(values.mean().item() - expected) < 3.3 * values.std().item() * (1 / 500 + 1 / 2000) ** 0.5


def test_a_model_that_sees_the_place_fails_birds_out_of_theirs():
    report = build()(Spurious(by_place=True))
    values = {name: found.value for name, found in report.metrics.items()}
    assert values["top1"] == pytest.approx(0.8)
    assert values["worst_group"] == 0
    assert values["gap"] == pytest.approx(0.8)
    assert values["top1_waterbird, land"] == 0
    assert values["top1_landbird, land"] == 1
    assert report.metrics["top1_landbird, land"].count == 50
    assert report.metrics["worst_group"].chance < report.metrics["top1"].chance == 0.5
    assert set(evaluation().metrics) <= set(report.metrics)
    report.figures["groups"]()


def test_a_model_that_sees_the_bird_has_no_gap():
    metrics = build()(Spurious(by_place=False)).metrics
    assert (metrics["worst_group"].value, metrics["gap"].value, metrics["gap"].high) == (1, 0, 0)


def test_groups_may_be_of_all_classes_together():
    metrics = build(by_class=False)(Spurious(by_place=True)).metrics
    assert metrics["top1_land"].value == pytest.approx(50 / 60)
    assert metrics["top1_water"].value == metrics["worst_group"].value == pytest.approx(30 / 40)


def test_groups_may_come_from_another_dataset_of_the_same_images():
    birds = (0,) * 40 + (1,) * 60
    places = (0,) * 30 + (1,) * 10 + (0,) * 10 + (1,) * 50
    named = build()(Spurious(by_place=True)).metrics
    groups = BirdData(names=("water", "land"), labels=places)
    run = build(pattern=None, groups=groups, names=("waterbird", "landbird"), labels=birds)
    assert run.args[1].sum() == 100
    found = run(Spurious(by_place=False)).metrics
    assert set(found) == set(named)
    assert found["worst_group"].value == 1


def test_small_groups_are_left_out_of_everything():
    metrics = build(min_samples=20)(Spurious(by_place=True)).metrics
    assert metrics["worst_group"].value == metrics["top1"].value == 1
    assert metrics["top1"].count == 80
    assert "top1_waterbird, land" not in metrics


def test_a_slash_in_a_name_does_not_divide_the_key_of_the_metric():
    names = ("waterbird on and/or", "waterbird on land", "landbird on and/or", "landbird on land")
    assert "top1_landbird, and_or" in build(names=names)(Spurious(by_place=True)).metrics


def test_a_collapsed_model_is_never_right():
    metrics = build()(SameEncoder()).metrics
    assert metrics["top1"].value == metrics["worst_group"].value == 0


def test_building_reads_no_image_and_its_result_travels_to_other_processes():
    assert isinstance(pickle.loads(pickle.dumps(build(readable=False))), partial)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"pattern": None}, "groups: should say which image is in which group, or pattern, and not both"),
        ({"groups": BirdData()}, "or pattern, and not both"),
        ({"pattern": None, "groups": BirdData(labels=(0, 1))}, "groups: 2 images, but 100 in the dataset"),
        ({"pattern": None, "groups": BirdData(labels=(0, None))}, "sample 1 .* has no label: this evaluation needs"),
        ({"pattern": "(?P<class>.*) in (?P<group>.*)"}, "finds no class in the class name 'waterbird on water'"),
        ({"names": ("a on b", "a on c"), "labels": (0, 1)}, "there is one class only, 'a'"),
        ({"min_samples": 31}, "min_samples: 1 of 4 groups have 31 images or more; two are needed"),
        ({"labels": ()}, "dataset is empty"),
        (
            {"names": ("a on b/c", "d on b/c", "a on b_c", "d on b_c"), "by_class": False},
            "groups: 'b/c' and 'b_c' would both be the metric top1_b_c",
        ),
    ],
)
def test_what_has_no_groups_is_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)


def test_a_pattern_names_class_and_group():
    with pytest.raises(ValidationError, match=r"(?s)pattern.*should have a group \(\?P<group>"):
        evaluation(pattern="(?P<class>.*)")


class Redness:
    """Every image and text by one number."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        if tower == "text":
            seeds = [sum(map(ord, text)) for text in inputs]
        else:
            seeds = [int(np.asarray(image, dtype=np.int64).sum()) for image in inputs]
        rows = [torch.randn(8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return F.normalize(torch.stack(rows), dim=1)


def test_shapes_go_all_the_way_by_colour():
    part = WorstGroup(
        every="never",
        dataset=Shapes(split="unseen", size=400, image_size=32),
        groups=None,
        pattern=r"\S+ (?P<group>\S+) (?P<class>.+)",
        by_class=False,
        min_samples=10,
        templates=("a {}.",),
    )
    metrics = part.build(Sources(Path()))(Redness()).metrics
    assert {"top1_red", "top1_blue"} <= set(metrics)
    assert metrics["top1"].chance == 1 / 8
    assert metrics["worst_group"].low - 0.1 < metrics["worst_group"].chance < metrics["worst_group"].high + 0.1


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_photos_go_all_the_way_with_groups_from_another_dataset():
    names = ["machine", "machine", *["animal"] * 6, "machine", "machine"]
    part = WorstGroup(
        every="never",
        dataset=Arrays(path="cifar10_testA.npz"),
        groups=Arrays(path="cifar10_testA.npz", class_names=tuple(f"{kind} {i}" for i, kind in enumerate(names))),
        pattern=None,
        by_class=False,
        min_samples=10,
        templates=("a {}.",),
    )
    metrics = part.build(Sources(Path(DATASETS)))(Redness()).metrics
    assert len(metrics) == 3 + 10
    assert abs(metrics["top1"].value - 0.1) < 0.02
