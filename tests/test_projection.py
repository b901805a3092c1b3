"""Laws of removing a subspace."""

import json
import math
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import SameEncoder, direction, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.decomposition import PCA

from multimodal.batch import Sample
from multimodal.data.arrays import Arrays
from multimodal.evals.projection import Projection, bias_subspace, project_out, removed_share
from multimodal.parts import Dataset, Source, Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")
GENDERED = {"she": -1, "woman": -1, "he": 1, "man": 1, "nurse": -1, "teacher": -1, "pilot": 1, "boss": 1}
PROFESSIONS = {
    "targ1": {"category": "Nurses", "examples": ["nurse", "teacher", "a nurse", "a teacher"]},
    "targ2": {"category": "Pilots", "examples": ["pilot", "boss", "a pilot", "a boss"]},
    "attr1": {"category": "Women", "examples": ["she", "woman"]},
    "attr2": {"category": "Men", "examples": ["he", "man"]},
}
PAIRS = [("she", "he"), ("woman", "man")]


def orthonormal(rows, dim, seed=0):
    return torch.linalg.qr(unit(dim, dim, seed=seed)).Q[:rows]


class Animals(Source):
    """Images that are words."""

    class_names = ("cat", "dog", "owl")

    def __init__(self, knobs):
        self.knobs = knobs

    def __len__(self):
        return len(self.knobs.labels)

    def __getitem__(self, index):
        assert self.knobs.readable
        return Sample(str(index), {"image": self.class_names[self.knobs.labels[index]]})

    def captions(self, index):
        return ()

    def label(self, index):
        return self.knobs.labels[index]


class AnimalData(Dataset):
    labels: tuple[int | None, ...] = (0, 1, 2) * 4
    readable: bool = True

    def build(self, root):
        return Animals(self)


class Gendered:
    """A direction for every word, with gender along the first axis where the word has one."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        return torch.stack([self.feature(text) for text in inputs])

    def feature(self, text):
        word = text.rstrip(".").split()[-1]
        feature = direction(word, 16).clone()
        if word in ("she", "he", "woman", "man"):  # she and he alike, but for gender and a little
            feature = 0.1 * feature + unit(16, seed=int(word in ("she", "he"))).float()
        feature[0] = 2.0 * GENDERED.get(word, 0)
        return F.normalize(feature, dim=0)


def evaluation(pairs=PAIRS, components=1, tests=("professions",), dataset=None, class_names=None, **data):
    return Projection(
        every="never",
        pairs=pairs,
        components=components,
        path="tests.json",
        member=None,
        tests=tests,
        template=None,
        permutations=99,
        dataset=dataset or AnimalData(**data),
        templates=("a {}.",),
        class_names=class_names,
    )


def build(folder, **knobs):
    (folder / "tests.json").write_text(json.dumps({"professions": PROFESSIONS}))
    return evaluation(**knobs).build(Sources(folder))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(1, 6))
def test_the_subspace_is_the_principal_components_of_pairs_about_their_middles(seed, num_pairs, components):
    components = min(components, num_pairs)
    first, second = unit(num_pairs, 8, seed=seed), unit(num_pairs, 8, seed=seed + 1)
    middle = (first + second) / 2
    pca = PCA(components).fit(torch.cat([first - middle, second - middle]).numpy())  # its mean is 0
    found = bias_subspace(first, second, components)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(components), atol=1e-9)
    np.testing.assert_allclose(
        found.basis.T @ found.basis, pca.components_.T @ pca.components_, atol=1e-6
    )  # the same subspace
    assert found.explained == pytest.approx(pca.explained_variance_ratio_.sum())


def test_pairs_that_differ_in_one_direction_are_explained_by_it():
    direction = orthonormal(2, 8)
    first = direction[1] + torch.tensor([[0.1], [0.7], [-0.3]]) * direction[0]
    found = bias_subspace(first, direction[1].expand(3, -1), 2)
    assert found.explained == pytest.approx(1)
    assert found.basis.shape == (1, 8)  # there is no second one
    assert abs(float(found.basis[0] @ direction[0])) == pytest.approx(1)


def test_pairs_that_are_the_same_have_no_subspace_and_nothing_is_removed():
    same = unit(3, 8)
    found = bias_subspace(same, same, 2)
    assert len(found.basis) == 0
    assert math.isnan(found.explained)
    torch.testing.assert_close(project_out(same, found.basis), same)
    assert removed_share(same, found.basis) == 0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 5))
def test_what_is_left_is_orthogonal_of_unit_norm_and_stays_as_it_is(seed, components):
    x, basis = unit(10, 8, seed=seed), orthonormal(components, 8, seed=seed + 1)
    left = project_out(x, basis)
    assert (left @ basis.T).abs().max() < 1e-9
    np.testing.assert_allclose(left.norm(dim=1), 1)
    torch.testing.assert_close(project_out(left, basis), left)
    one = x[0] - sum((x[0] @ row) * row for row in basis)
    torch.testing.assert_close(left[0], one / one.norm())
    assert removed_share(x, basis) == pytest.approx(1 - float((x - x @ basis.T @ basis).square().sum()) / 10)


def test_what_lies_in_the_subspace_entirely_is_nothing():
    assert project_out(torch.eye(3)[:1], torch.eye(3, dtype=torch.float64)[:1]).tolist() == [[0, 0, 0]]


def test_an_association_along_the_direction_goes_and_animals_are_told_apart_as_before(tmp_path):
    report = build(tmp_path)(Gendered())
    metrics = report.metrics
    assert set(metrics) == set(evaluation().metrics)
    assert metrics["professions_effect"].value > 1.5
    assert metrics["professions_p"] < 0.05 < metrics["professions_p_projected"]
    assert abs(metrics["professions_effect_projected"].value) < metrics["professions_effect"].value / 2
    assert metrics["mean_absolute_effect_projected"].value < metrics["mean_absolute_effect"].value
    assert metrics["top1"].value == metrics["top1_projected"].value == 1
    assert metrics["top1"].chance == pytest.approx(1 / 3)
    assert (metrics["top1_change"].value, metrics["top1_change"].low) == (0, 0)
    assert 0.95 < metrics["explained"].value < 1
    assert metrics["removed_text"].value < 0.01
    report.figures["effects"]()


def test_removing_what_classes_differ_in_costs_accuracy(tmp_path):
    metrics = build(tmp_path, pairs=[("cat", "dog"), ("cat", "owl")], components=2)(Gendered()).metrics
    assert metrics["top1"].value == 1
    assert metrics["top1_projected"].value <= 1 / 3  # all look the same
    assert metrics["top1_change"].value == metrics["top1_projected"].value - 1


def test_a_collapsed_model_has_a_report_too(tmp_path):
    report = build(tmp_path)(SameEncoder())
    assert report.metrics["top1"].value == report.metrics["top1_projected"].value == 0
    assert math.isnan(report.metrics["explained"].value)
    report.figures["effects"]()


def test_without_names_of_tests_only_what_all_have_together_is_known_before(tmp_path):
    known = evaluation(tests=None).metrics
    assert "professions_effect" not in known
    found = build(tmp_path, tests=None)(Gendered()).metrics
    assert set(found) == {*known, *(f"professions_{n}{a}" for n in ("effect", "p") for a in ("", "_projected"))}


def test_building_reads_no_image_and_its_result_travels_to_other_processes(tmp_path):
    assert isinstance(pickle.loads(pickle.dumps(build(tmp_path, readable=False))), partial)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"components": 3}, "components: 2 pairs differ in that many directions at most"),
        ({"pairs": [("she", " ")]}, r"pairs: \['she', ' '\] should be two different texts"),
        ({"pairs": [("she", "she")]}, "should be two different texts"),
        ({"tests": ["profession"]}, "has no test 'profession'. Did you mean 'professions'"),
        ({"labels": (0, None)}, "sample 1 of the dataset has no label"),
        ({"class_names": ["cat"]}, "labels go from 0 to 2 but there are 1 class names"),
    ],
)
def test_what_cannot_be_run_is_refused_before_the_run(tmp_path, knobs, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, **knobs)


@pytest.mark.parametrize("pairs", [[], [("she",)], [("she", "he", "it")]])
def test_pairs_are_of_two(pairs):
    with pytest.raises(ValidationError, match="pairs"):
        evaluation(pairs=pairs)


class Guess:
    """Towers that know nothing."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        if tower == "image":
            return unit(len(inputs), 16, seed=1).float()
        return torch.stack([direction(text, 16) for text in inputs])


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_published_tests_and_photos_go_all_the_way_and_towers_that_know_nothing_are_at_chance():
    part = evaluation(tests=["weat6", "weat8"], dataset=Arrays(path="cifar10_testA.npz"))
    part = part.model_copy(update={"path": "weat_seat.tar.gz", "member": "weat_seat/weat_seat.json"})
    metrics = part.build(Sources(Path(DATASETS)))(Guess()).metrics
    assert set(metrics) == set(part.metrics)
    for name in ("top1", "top1_projected"):
        assert abs(metrics[name].value - 0.1) < 3.3 * math.sqrt(0.1 * 0.9 / 5000)
    assert metrics["top1_change"].low < 0 < metrics["top1_change"].high
    assert metrics["weat6_p"] > 0.0005
