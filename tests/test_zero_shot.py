"""Laws of zero-shot classification."""

import pickle
from functools import partial
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from multimodal.batch import Sample
from multimodal.evals.zero_shot import (
    ZeroShot,
    class_embeddings,
    confusion_counts,
    label_ranks,
    mean_per_class_recall,
    top_k_accuracy,
)
from multimodal.parts import Dataset, Source, Sources

TEMPLATES = ("a photo of a {}.", "the {} over there", "{}!")


class Words(Source):
    """Images that are words: the class name, or "?" for one that looks like nothing known."""

    def __init__(self, knobs):
        self.knobs, self.class_names = knobs, knobs.names

    def __len__(self):
        return len(self.knobs.labels)

    def __getitem__(self, index):
        label = self.knobs.labels[index]
        return Sample(str(index), {"image": self.knobs.seen_as[label]}, label)

    def captions(self, index):
        return ()

    def label(self, index):
        return self.knobs.labels[index]


class WordData(Dataset):
    names: tuple[str, ...] = ("cat", "dog", "owl")
    labels: tuple[int | None, ...] = (2, 0, 1, 1, 2, 2)
    seen_as: tuple[str, ...] = ("cat", "dog", "owl")

    def build(self, root):
        return Words(self)


def direction(word, dim=64):
    generator = torch.Generator().manual_seed(int.from_bytes(sha256(word.encode()).digest()[:4], "big"))
    return F.normalize(torch.randn(dim, generator=generator), dim=0)


class WordEncoder:
    """A fixed direction for every string; an image is the mean of its word's prompts."""

    logit_scale = 100.0

    def encode(self, tower, inputs):
        if tower == "text":
            return torch.stack([direction(text) for text in inputs])
        prompts = [[template.replace("{}", word) for template in TEMPLATES] for word in inputs]
        return torch.stack([F.normalize(sum(direction(prompt) for prompt in row), dim=0) for row in prompts])


class SameEncoder:
    """A collapsed model: one direction for everything."""

    logit_scale = 100.0

    def encode(self, tower, inputs):
        return direction("anything").expand(len(inputs), -1)


def evaluation(templates=TEMPLATES, class_names=None, **data):
    return ZeroShot(every="never", dataset=WordData(**data), templates=templates, class_names=class_names)


def build(**knobs):
    return evaluation(**knobs).build(Sources(Path()))


@pytest.fixture(scope="module")
def open_clip_model():
    open_clip = pytest.importorskip("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    return open_clip.CLIP(32, vision, text).eval(), open_clip.SimpleTokenizer()


def test_the_classifier_is_that_of_open_clip(open_clip_model):
    import open_clip

    model, tokenizer = open_clip_model
    names = ["cat", "steam engine", "owl", "T-shirt/top"]
    expected = open_clip.build_zero_shot_classifier(model, tokenizer, names, TEMPLATES)
    prompts = [template.format(name) for name in names for template in TEMPLATES]
    with torch.no_grad():
        features = model.encode_text(tokenizer(prompts), normalize=True)
    found = class_embeddings(features.view(4, 3, -1))
    torch.testing.assert_close(found, expected.T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", range(5))
def test_top_k_is_that_of_open_clip_where_nothing_ties(seed):
    generator = torch.Generator().manual_seed(seed)
    logits, labels = torch.randn(40, 12, generator=generator), torch.randint(12, (40,), generator=generator)
    correct = logits.topk(5, 1, True, True)[1].t().eq(labels.view(1, -1).expand(5, -1))
    for k in (1, 5):
        assert top_k_accuracy(logits, labels, k) == pytest.approx(float(correct[:k].reshape(-1).float().sum()) / 40)


def test_ties_and_not_a_number_count_against_the_model():
    nan = torch.nan
    logits = torch.tensor([[3.0, 2, 1], [2, 2, 1], [0, 0, 0], [nan, nan, nan], [2, nan, 1], [nan, 2, 1]])
    assert label_ranks(logits, torch.zeros(6, dtype=torch.long)).tolist() == [1, 2, 3, 3, 2, 3]


def test_a_collapsed_model_scores_no_better_than_chance():
    metrics = build()(SameEncoder()).metrics
    assert metrics["top1"] == metrics["mean_per_class"] == 0 < metrics["chance"] == pytest.approx(1 / 3)


def test_a_model_blind_to_the_image_scores_no_better_than_chance():
    logits = torch.randn(10, generator=torch.Generator().manual_seed(0)).expand(100, -1)
    labels = torch.arange(100) % 10
    assert top_k_accuracy(logits, labels, 1) == pytest.approx(0.1)
    assert top_k_accuracy(logits.round(), labels, 1) <= 0.1
    assert top_k_accuracy(logits, labels, 5) == pytest.approx(0.5)


def test_accuracy_counts_images_and_recall_counts_classes():
    logits, labels = torch.eye(4)[[0, 0, 0, 0, 2, 0]], torch.tensor([0, 0, 0, 0, 2, 2])
    assert top_k_accuracy(logits, labels, 1) == pytest.approx(5 / 6)
    assert mean_per_class_recall(logits, labels) == pytest.approx((1 + 0.5) / 2)  # classes 1 and 3 do not occur


def test_mean_per_class_is_top_1_when_classes_are_balanced():
    logits = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 6
    assert mean_per_class_recall(logits, labels) == pytest.approx(top_k_accuracy(logits, labels, 1))


def test_the_confusion_matrix_counts_every_image_once_and_agrees_with_top_1():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(3, (50, 5), generator=generator).float()  # many ties
    labels = torch.randint(5, (50,), generator=generator)
    counts = confusion_counts(logits, labels)
    assert counts.sum(dim=1).tolist() == torch.bincount(labels, minlength=5).tolist()
    assert counts.trace() / 50 == pytest.approx(top_k_accuracy(logits, labels, 1))
    assert confusion_counts(torch.eye(3)[[1, 1, 2]], torch.tensor([0, 1, 2])).tolist() == [
        [0, 1, 0],
        [0, 1, 0],
        [0, 0, 1],
    ]


def test_every_class_is_known_by_the_mean_of_its_own_prompts():
    report = build()(WordEncoder())
    assert report.metrics == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0, "chance": pytest.approx(1 / 3)}
    assert set(report.figures) == {"confusion_matrix"}


def test_an_image_taken_for_another_class_is_wrong():
    metrics = build(seen_as=("cat", "owl", "owl"))(WordEncoder()).metrics  # two of six images are dogs
    assert metrics["top1"] == pytest.approx(4 / 6)
    assert metrics["mean_per_class"] == pytest.approx(2 / 3)


def test_given_class_names_stand_for_those_of_the_dataset():
    assert build(class_names=["cat", "dog", "owl"], names=("x", "y", "z"))(WordEncoder()).metrics["top1"] == 1
    assert build(class_names=["dog", "cat", "owl"])(WordEncoder()).metrics["top1"] == pytest.approx(3 / 6)


def test_building_reads_no_image_and_its_result_travels_to_other_processes():
    run = build(seen_as=())  # reading any image would fail
    assert isinstance(pickle.loads(pickle.dumps(run)), partial)


@pytest.mark.parametrize("template", ["a photo", "a {} and a {}", "a {c}", ""])
def test_a_template_holds_one_place_for_the_name(template):
    with pytest.raises(ValidationError, match=r"(?s)templates\.1.*should contain \{\} exactly once") as error:
        evaluation(templates=["a {}", template])
    assert error.value.errors()[0]["loc"] == ("templates", 1)


def test_there_is_at_least_one_template():
    with pytest.raises(ValidationError, match="templates"):
        evaluation(templates=[])


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"names": ()}, "no class names: set class_names"),
        ({"class_names": []}, "at least 1 item"),
        ({"names": ("cat", " ", "owl")}, "class name of label 1 is empty: set class_names"),
        ({"class_names": ["", "dog", "owl"]}, "class name of label 0 is empty: set class_names"),
        ({"names": ("cat", "crane", "crane")}, "2 classes are named 'crane'.*set class_names"),
        ({"class_names": ["cat", "dog"]}, "labels go from 0 to 2 but there are 2 class names: set class_names"),
        ({"labels": (0, -1)}, "labels go from -1 to 0"),
        ({"labels": (0, None, 1)}, "sample 1 of the dataset has no label.*needs a dataset whose samples all have one"),
        ({"labels": (None, None)}, "sample 0 of the dataset has no label"),
        ({"labels": ()}, "dataset is empty"),
    ],
)
def test_what_cannot_be_classified_is_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)
