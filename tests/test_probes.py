"""Laws of probes: linear classifiers, nearest neighbours and few shots on image features."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import BrokenEncoder, PixelEncoder, SameEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from multimodal.data.arrays import Arrays
from multimodal.data.shapes import Shapes
from multimodal.evals.accuracy import accuracies
from multimodal.evals.few_shot import FewShot, draw_shots
from multimodal.evals.knn import KNN, nearest_neighbours, vote
from multimodal.evals.linear_probe import COARSEST, LinearProbe, fit, search, split
from multimodal.evals.probes import Examples
from multimodal.parts import Dataset, Source, Sources

KNOBS = {
    LinearProbe: {"validation": 0.25, "refinements": 1, "max_iter": 100},
    KNN: {"k": 5, "temperature": 0.07},
    FewShot: {"shots": (1, 4), "draws": 3, "c": 10.0, "max_iter": 100},
}


def clouds(seed, n=200, classes=4, dim=8, noise=1.0):
    """Unit-norm float64 features around a direction for each class, far from the origin, and labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, dim, generator=generator, dtype=torch.float64) + 3
    labels = torch.arange(n) % classes
    features = centres[labels] + noise * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return F.normalize(features, dim=-1), labels


# --- linear probe ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("c", [0.1, 10.0, 300.0])
def test_the_classifier_is_that_of_scikit_learn(c, classes):
    features, labels = clouds(0, classes=classes)
    labels = labels + 3  # not from 0
    wanted = LogisticRegression(C=c, max_iter=100_000, tol=1e-10).fit(features.numpy(), labels.numpy())
    found = fit(features, labels, c, max_iter=100_000, tol=1e-10)
    logits = features @ found.weight.T + found.bias
    probabilities = torch.from_numpy(wanted.predict_proba(features.numpy()))
    torch.testing.assert_close(logits.softmax(dim=1), probabilities, atol=1e-4, rtol=0)
    assert (found(features).numpy() == wanted.predict(features.numpy())).all()


def test_the_search_finds_the_best_of_eight_values_a_decade_with_fifteen_scores():
    asked = []

    def score(c):
        asked.append(c)
        return -abs(np.log10(c) - 1.3)

    assert search(score, 4) == pytest.approx(10**1.25)
    assert len(asked) == len(COARSEST) + 2 * 4 == len(set(asked))


def test_of_equally_good_strengths_the_most_regularised_is_taken():
    assert search(lambda c: float(c >= 1e-2), 0) == pytest.approx(1e-2)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.floats(0.05, 0.9))
@settings(deadline=None, max_examples=50)
def test_validation_images_are_a_share_of_each_class_and_no_training_images(labels, share):
    labels = np.array(labels)
    training, held = split(labels, share, 0)
    assert sorted([*training, *held]) == list(range(len(labels)))
    for label in set(labels.tolist()):
        assert (labels[held] == label).sum() == int(share * (labels == label).sum())


def test_both_accuracies_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice(5, 60, p=[0.5, 0.2, 0.2, 0.1, 0]))
    predicted = torch.where(torch.from_numpy(rng.random(60) < 0.6), labels, torch.zeros_like(labels))
    found = accuracies({"top1": predicted == labels}, labels, {"top1": 0.2, "mean_per_class": 0.2})
    assert found["top1"].value == pytest.approx((predicted == labels).double().mean().item())
    assert found["mean_per_class"].value == pytest.approx(balanced_accuracy_score(labels, predicted))
    for estimate in found.values():
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.chance, estimate.count) == (0.2, 60)


# --- nearest neighbours ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 7, 20])
def test_the_majority_vote_is_that_of_scikit_learn(k):
    features, labels = clouds(0, n=300)
    queries, _ = clouds(0, n=101, noise=2.0)
    wanted = KNeighborsClassifier(k, metric="cosine", algorithm="brute").fit(features, labels).predict(queries)
    cosines, places = nearest_neighbours(queries, features, k, tile=16)
    assert vote(labels[places], torch.ones_like(cosines), 4).tolist() == wanted.tolist()


def test_the_weighted_vote_is_a_sum_over_neighbours():
    features, labels = clouds(1)
    queries, _ = clouds(1, n=37, noise=2.0)
    examples = Examples(features, labels, queries, labels[:37], ["a", "b", "c", "d"])
    part = KNN(every="never", train=Shapes(), dataset=Shapes(), max_train=None, k=9, temperature=0.07)
    right = []
    for query, label in zip(queries, labels, strict=False):
        nearest = sorted(range(len(features)), key=lambda place: -float(query @ features[place]))[:9]
        ballots = [
            sum(np.exp(float(query @ features[place]) / 0.07) for place in nearest if labels[place] == one)
            for one in range(4)
        ]
        right.append(int(np.argmax(ballots)) == label)
    assert part.probe(examples).metrics["weighted"].value == pytest.approx(np.mean(right))


@pytest.mark.parametrize("tile", [1, 7, 1000])
def test_neighbours_are_the_same_in_tiles_of_any_size(tile):
    features, _ = clouds(2)
    torch.testing.assert_close(
        nearest_neighbours(features[:50], features, 5, tile), nearest_neighbours(features[:50], features, 5)
    )


def test_equal_votes_go_to_the_lowest_label():
    assert vote(torch.tensor([[3, 1, 2], [2, 2, 1]]), torch.ones(2, 3), 4).tolist() == [1, 2]


# --- few shots ------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_a_draw_has_as_many_of_each_class_and_fewer_are_a_part_of_more(seed, shots):
    labels = np.random.default_rng(seed).permutation(np.repeat([0, 2, 5], 6))
    few, more = draw_shots(labels, shots, seed), draw_shots(labels, shots + 1, seed)
    assert np.bincount(labels[few]).tolist() == [shots, 0, shots, 0, 0, shots]
    assert set(few) < set(more)


def test_more_images_of_a_class_help():
    features, labels = clouds(3, n=400)
    examples = Examples(features[:200], labels[:200], features[200:], labels[200:], ["a", "b", "c", "d"])
    metrics = part(FewShot, shots=(1, 32)).probe(examples).metrics
    assert metrics["top1_1"].value < metrics["top1_32"].value
    assert metrics["std_1"] > 0


# --- evaluation -----------------------------------------------------------------------------------------------------


class Coloured(Source):
    """Pictures of shapes with the labels that they are given."""

    def __init__(self, knobs):
        self.knobs, self.class_names = knobs, knobs.names
        self.pictures = Shapes(split="unseen", size=max(1, len(knobs.labels)), image_size=32).build(Path())

    def __len__(self):
        return len(self.knobs.labels)

    def __getitem__(self, index):
        return self.pictures[index]

    def captions(self, index):
        return ()

    def label(self, index):
        return self.knobs.labels[index]


class ColouredData(Dataset):
    names: tuple[str, ...] = ("one", "two", "three")
    labels: tuple[int | None, ...] = (0, 1, 2) * 8
    part: str = "test"

    def build(self, root):
        return Coloured(self)


def part(kind, train=None, dataset=None, max_train=None, **knobs):
    return kind(
        every="never",
        train=train or ColouredData(part="train"),
        dataset=dataset or ColouredData(),
        max_train=max_train,
        **{**KNOBS[kind], **knobs},
    )


def built(kind, root=None, **knobs):
    return part(kind, **knobs).build(Sources(root or Path()))


@pytest.mark.parametrize("kind", KNOBS)
def test_a_probe_reports_what_it_says_with_chance_and_interval(kind):
    shapes = {"split": "unseen", "image_size": 32, "held_out": 0.05}
    run = built(kind, train=Shapes(size=160, seed=1, **shapes), dataset=Shapes(size=80, **shapes))
    report = pickle.loads(pickle.dumps(run))(PixelEncoder())
    assert set(report.metrics) == set(part(kind).metrics)
    accuracy = next(iter(report.metrics.values()))
    assert accuracy.chance == pytest.approx(1 / 16)
    assert accuracy.low <= accuracy.value <= accuracy.high
    assert accuracy.count == 80
    for figure in report.figures.values():
        figure()
    assert part(kind).towers == ("image",)


@pytest.mark.parametrize("kind", KNOBS)
def test_the_same_again_is_the_same(kind):
    run = built(kind)
    assert run(PixelEncoder()).metrics == run(PixelEncoder()).metrics


@pytest.mark.parametrize("kind", KNOBS)
@pytest.mark.parametrize("encoder", [SameEncoder(), BrokenEncoder()])
def test_a_collapsed_model_is_at_chance(kind, encoder):
    metrics = built(kind)(encoder).metrics
    accuracy = next(iter(metrics.values()))
    assert accuracy.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("kind", KNOBS)
def test_permuted_labels_give_chance(kind):
    features, labels = clouds(5, n=2000, noise=100.0)
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1))
    examples = Examples(features[:1000], labels[:1000][order], features[1000:], labels[1000:], ["a", "b", "c", "d"])
    accuracy = next(iter(part(kind).probe(examples).metrics.values()))
    width = (accuracy.high - accuracy.low) / (2 * 1.96)
    assert abs(accuracy.value - 0.25) < 3.29 * width


def test_probes_of_the_same_data_ask_for_the_same_images():
    runs = [built(LinearProbe, max_train=16), built(KNN, max_train=16), built(FewShot, max_train=16, shots=[2])]
    assert len({tuple(run.args[0].places) for run in runs}) == 1
    assert len(runs[0].args[0]) == 16


@pytest.mark.parametrize(
    ("kind", "knobs", "message"),
    [
        (KNN, {"train": ColouredData(labels=(0, None))}, "sample 1 of the dataset `train` has no label"),
        (KNN, {"dataset": ColouredData(labels=())}, "the dataset is empty"),
        (KNN, {"dataset": ColouredData(labels=(0, 7))}, "labels go from 0 to 7 but there are 3 class names"),
        (KNN, {"train": ColouredData(names=("one", "zwei", "three"))}, "label 1 is 'zwei' and 'two'; set class_names"),
        (KNN, {"train": ColouredData(names=("one", "two"))}, "there are 2 and 3; set class_names"),
        (KNN, {"train": ColouredData(labels=(0, 1) * 9)}, r"of the class 2 \('three'\).*set max_train higher"),
        (KNN, {"train": ColouredData(labels=(1,) * 9), "dataset": ColouredData(labels=(1,))}, "all images of `train`"),
        (KNN, {"k": 30}, "k=30 neighbours are asked for, but `train` has 24"),
        (LinearProbe, {"validation": 0.1}, "validation=0.1 of each class of `train` is not one image"),
        (FewShot, {"shots": (1, 9)}, "9 images of each class are asked for, but `train` has 8 of label 0: set shots"),
    ],
)
def test_what_cannot_be_probed_is_refused_before_the_run(kind, knobs, message):
    with pytest.raises(ValueError, match=message):
        built(kind, **knobs)


@pytest.mark.skipif("MULTIMODAL_DATASETS" not in os.environ, reason="needs the files of data sets")
@pytest.mark.parametrize("kind", KNOBS)
def test_pixels_of_cifar_10_tell_classes_better_than_chance(kind):
    data = {"train": Arrays(path="cifar10_train_jpeg.npz"), "dataset": Arrays(path="cifar10_testA.npz")}
    run = built(kind, Path(os.environ["MULTIMODAL_DATASETS"]), max_train=1000, **data)
    metrics = run(PixelEncoder()).metrics
    accuracy = next(iter(metrics.values()))
    assert accuracy.low > accuracy.chance == pytest.approx(0.1)


def test_chance_is_what_is_left_when_labels_are_permuted():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.tensor([0] * 90 + [1] * 10)[torch.randperm(100, generator=generator)] for _ in range(2))
    features = torch.randn(2, 100, 4, generator=generator)
    examples = Examples(features[0], train, features[1], test, ["often", "rare", "never"])
    assert examples.chance == pytest.approx(0.9**2 + 0.1**2)
    assert examples.chance_per_class == 1 / 2
