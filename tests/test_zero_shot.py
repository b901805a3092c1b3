"""Laws of zero-shot classification."""

import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from encoders import SameEncoder, direction
from pydantic import ValidationError

from multimodal.batch import Sample
from multimodal.evals.zero_shot import (
    ZeroShot,
    accuracies,
    calibration_error,
    class_embeddings,
    confusion_counts,
    in_order_of_names,
    label_ranks,
    surest_failures,
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


class WordEncoder:
    """A fixed direction for every string; an image is the mean of its word's prompts."""

    logit_scale = 100.0

    def encode(self, tower, inputs):
        if tower == "text":
            return torch.stack([direction(text) for text in inputs])
        prompts = [[template.replace("{}", word) for template in TEMPLATES] for word in inputs]
        return torch.stack([F.normalize(sum(direction(prompt) for prompt in row), dim=0) for row in prompts])


def evaluation(templates=TEMPLATES, class_names=None, **data):
    return ZeroShot(every="never", dataset=WordData(**data), templates=templates, class_names=class_names)


def build(**knobs):
    return evaluation(**knobs).build(Sources(Path()))


def values(report):
    return {name: float(found) for name, found in report.metrics.items()}


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
    metrics = values(build()(SameEncoder()))
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
    found = accuracies(logits, labels)["mean_per_class"].value  # classes 1 and 3 do not occur
    assert found == pytest.approx((1 + 0.5) / 2)


def test_mean_per_class_is_top_1_when_classes_are_balanced():
    logits = torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(60) % 6
    assert accuracies(logits, labels)["mean_per_class"].value == pytest.approx(top_k_accuracy(logits, labels, 1))


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


def test_the_failures_shown_are_the_surest_wrong_ones_few_of_a_class():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (200,), generator=rng)
    probabilities = torch.randn(200, 4, generator=rng).softmax(dim=1)
    probabilities[:7] = torch.nan
    wrong = [
        (-value, place)
        for place, (value, found) in enumerate(zip(*probabilities.max(dim=1), strict=True))
        if found != labels[place] and place >= 7
    ]
    everything = surest_failures(probabilities, labels, limit=200, of_a_class=200)
    assert everything == [place for _, place in sorted(wrong)]
    shown = surest_failures(probabilities, labels, limit=5, of_a_class=2)
    firsts = {place for label in range(4) for place in [i for i in everything if labels[i] == label][:2]}
    assert shown == [place for place in everything if place in firsts][:5]
    assert surest_failures(torch.eye(4), torch.arange(4)) == []


def test_every_class_is_known_by_the_mean_of_its_own_prompts():
    report = build()(WordEncoder())
    found = values(report)
    assert found.pop("ece") == pytest.approx(0, abs=1e-6)
    assert found == {"top1": 1.0, "top5": 1.0, "mean_per_class": 1.0, "chance": pytest.approx(1 / 3)}
    assert {name: report.metrics[name].chance for name in found if name != "chance"} == {
        "top1": pytest.approx(1 / 3),
        "top5": 1,
        "mean_per_class": pytest.approx(1 / 3),
    }
    assert set(report.figures) == {"confusion_matrix", "failures"}


def test_an_image_taken_for_another_class_is_wrong():
    metrics = values(build(seen_as=("cat", "owl", "owl"))(WordEncoder()))  # two of six images are dogs
    assert metrics["top1"] == pytest.approx(4 / 6)
    assert metrics["mean_per_class"] == pytest.approx(2 / 3)


def test_given_class_names_stand_for_those_of_the_dataset():
    assert values(build(class_names=["cat", "dog", "owl"], names=("x", "y", "z"))(WordEncoder()))["top1"] == 1
    assert values(build(class_names=["dog", "cat", "owl"])(WordEncoder()))["top1"] == pytest.approx(3 / 6)


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
        ({"labels": (2, 0, 2)}, "1 of 3 classes have no image, such as label 1, 'dog'.*allow_empty_classes"),
        ({"templates": None}, "dataset brings no templates: set templates"),
        ({"templates": "imagnet"}, "should be a list, a .txt file with one a line, or imagenet"),
        ({"templates": "none.txt"}, "there is no file"),
        ({"class_names": "imagenet", "templates": "none.txt"}, "there is no file"),
    ],
)
def test_what_cannot_be_classified_is_refused_before_the_run(knobs, message):
    with pytest.raises((ValueError, OSError), match=message):
        build(**knobs)


def test_names_and_prompts_come_from_files_from_open_clip_or_from_the_dataset(tmp_path):
    import open_clip

    (tmp_path / "classnames.txt").write_text("cat\ndog\nowl\n")
    (tmp_path / "templates.txt").write_text("a photo of a {c}.\n\nthe {} over there\n{c}!\n")
    part = evaluation("templates.txt", "classnames.txt", names=("x", "y", "z"))
    stored = part.model_dump(mode="json")
    assert (stored["templates"], stored["class_names"]) == ("templates.txt", "classnames.txt")
    run = part.build(Sources(tmp_path))
    assert values(run(WordEncoder()))["top1"] == 1
    assert run.args[0][1:] == (("cat", "dog", "owl"), TEMPLATES)
    run = evaluation("imagenet", "imagenet", labels=tuple(range(1000))).build(Sources(tmp_path))
    assert run.args[0].class_names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert run.args[0].templates == tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    run = evaluation("imagenet_simple").build(Sources(tmp_path))
    assert run.args[0].templates == tuple(template("{}") for template in open_clip.SIMPLE_IMAGENET_TEMPLATES)


def test_a_file_of_prompts_is_refused_by_its_line(tmp_path):
    (tmp_path / "templates.txt").write_text("a {}\na photo\n")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match=r"templates.txt, line 2: a template should contain \{\} exactly once"):
        evaluation("templates.txt").build(Sources(tmp_path))
    for knobs in ({"templates": "empty.txt"}, {"class_names": "empty.txt"}):
        with pytest.raises(ValueError, match=r"empty.txt is empty"):
            evaluation(**knobs).build(Sources(tmp_path))


def test_classes_without_images_are_out_where_that_is_allowed():
    part = ZeroShot(
        every="never", dataset=WordData(labels=(2, 0)), templates=TEMPLATES, class_names=None, allow_empty_classes=True
    )
    assert values(part.build(Sources(Path()))(WordEncoder()))["mean_per_class"] == 1


# --- how sure, how calibrated ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_calibration_error_and_accuracies_are_those_of_torchmetrics(seed):
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(300, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (300,), generator=generator)
    probabilities = logits.softmax(dim=1)
    error = functional.multiclass_calibration_error(probabilities, labels, 7, n_bins=15, norm="l1")
    assert calibration_error(logits, labels).value == pytest.approx(error.item(), abs=1e-6)
    for name, k, average in (("top1", 1, "micro"), ("top5", 5, "micro"), ("mean_per_class", 1, "macro")):
        expected = functional.multiclass_accuracy(logits, labels, 7, average=average, top_k=k)
        assert accuracies(logits, labels)[name].value == pytest.approx(expected.item(), abs=1e-6)


def test_the_calibration_error_of_a_known_table():
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.6], dtype=torch.float64)  # right three times of four, in two bins
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    found = calibration_error(logits, torch.tensor([0, 0, 1, 0]))
    assert found.value == pytest.approx((3 * abs(0.9 - 2 / 3) + abs(0.6 - 1)) / 4)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_interval_of_an_accuracy_is_that_of_the_binomial(share):
    from scipy.stats import binom

    count, num_hits = 2000, int(2000 * share)
    labels = torch.zeros(count, dtype=torch.int64)
    logits = torch.tensor([[1.0, 0.0]]).repeat(count, 1)
    logits[num_hits:] = torch.tensor([0.0, 1.0])
    for name in ("top1", "mean_per_class"):
        found = accuracies(logits, labels)[name]
        assert found.low * count == pytest.approx(binom.ppf(0.025, count, share), abs=6)
        assert found.high * count == pytest.approx(binom.ppf(0.975, count, share), abs=6)


def test_labels_at_random_score_what_chance_says():
    """Within the interval of 99.9%."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(4000, 10, generator=generator), torch.arange(4000) % 10
    found = accuracies(logits, labels[torch.randperm(4000, generator=generator)])
    for name, chance in (("top1", 0.1), ("top5", 0.5), ("mean_per_class", 0.1)):
        assert found[name].chance == pytest.approx(chance)
        assert abs(found[name].value - chance) < 3.29 * (chance * (1 - chance) / 4000) ** 0.5


def test_classes_of_one_name_come_in_their_order_as_topk_puts_them():
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))[:, [0, 1, 2, 1, 3, 1]]
    found = in_order_of_names(logits, ["a", "twin", "c", "twin", "d", "twin"])
    assert torch.equal(found.argsort(dim=1, descending=True), logits.argsort(dim=1, descending=True, stable=True))
    assert torch.equal(found[:, [0, 1, 2, 4]], logits[:, [0, 1, 2, 4]])
