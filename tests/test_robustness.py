"""Laws of zero-shot classification of images that were made worse, and of its dependence on templates."""

import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from encoders import BrokenEncoder, PixelEncoder, SameEncoder, direction
from PIL import Image
from pydantic import ValidationError

from multimodal.data.arrays import Arrays
from multimodal.data.shapes import Shapes
from multimodal.data.views import Inputs
from multimodal.evals.corruptions import LEVELS, Corrupted, corrupt
from multimodal.evals.prompt_sensitivity import PromptSensitivity, spread
from multimodal.evals.robustness import Robustness, relative
from multimodal.evals.zero_shot import ZeroShot
from multimodal.parts import Sources

SHAPES = Shapes(split="unseen", size=80, image_size=32)
TEMPLATES = ("a photo of a {}.", "the {} over there", "{}!")


def pictures(count=6, size=64):
    return Inputs(Shapes(size=count, image_size=size).build(Path()), "image")


def tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


def distance(one, other):
    return (one.float() - other.float()).abs().mean().item()


def robustness(**knobs):
    given = {
        "every": "never",
        "dataset": SHAPES,
        "templates": TEMPLATES,
        "class_names": None,
        "corruptions": ("noise", "occlusion"),
        "severities": (1, 5),
        "max_samples": None,
        "seed": 0,
    }
    return Robustness(**{**given, **knobs})


def prompts(**knobs):
    given = {"every": "never", "dataset": SHAPES, "templates": TEMPLATES, "class_names": None, "max_samples": None}
    return PromptSensitivity(**{**given, **knobs})


def built(part, root=None):
    return part.build(Sources(root or Path()))


# --- corruptions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corruption", LEVELS)
def test_a_corrupted_image_is_the_same_each_time_and_in_every_process(corruption):
    one = Corrupted(pictures(), corruption, 3, seed=7)
    other = pickle.loads(pickle.dumps(one))
    for index in (3, 0, 3, -1):
        assert one[index].tobytes() == other[index].tobytes()
        assert (one[index].mode, one[index].size) == ("RGB", (64, 64))
    assert len(one) == 6


@pytest.mark.parametrize("corruption", ["noise", "occlusion"])
def test_what_is_random_depends_on_the_seed_and_the_place(corruption):
    same = [Image.new("RGB", (32, 32), (90, 90, 90))] * 2
    first, second = Corrupted(same, corruption, 3), Corrupted(same, corruption, 3, seed=1)
    assert first[0].tobytes() != first[1].tobytes()
    assert first[0].tobytes() != second[0].tobytes()


@pytest.mark.parametrize("corruption", LEVELS)
def test_a_higher_severity_is_further_from_the_image(corruption):
    images = [tensor(image) for image in pictures(8)]
    means = [
        np.mean([distance(image, corrupt(image, corruption, severity, seed)) for seed, image in enumerate(images)])
        for severity in range(1, 6)
    ]
    assert means[0] > 0
    assert means == sorted(means)
    assert means[4] > 1.3 * means[0]


@pytest.mark.parametrize("corruption", LEVELS)
@pytest.mark.parametrize("size", [(1, 1), (3, 40), (41, 8)])
def test_images_of_any_size_keep_it(corruption, size):
    image = torch.randint(256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for severity in (1, 5):
        changed = corrupt(image, corruption, severity, 0)
        assert (changed.shape, changed.dtype) == (image.shape, torch.uint8)


def test_a_square_covers_the_share_of_the_area_that_is_said():
    image = torch.zeros(3, 50, 50, dtype=torch.uint8)
    for severity, area in enumerate(LEVELS["occlusion"], start=1):
        covered = (corrupt(image, "occlusion", severity, 3) == 128).all(dim=0).double().mean()
        assert covered == pytest.approx(area, abs=0.02)


def test_the_image_itself_is_not_changed():
    image = tensor(pictures()[0])
    before = image.clone()
    for corruption in LEVELS:
        corrupt(image, corruption, 5, 0)
    assert torch.equal(image, before)


# --- robustness -----------------------------------------------------------------------------------------------------


class TextureBlind(PixelEncoder):
    """Texts are the mean pixels of images that it was shown."""

    def __init__(self, source):
        super().__init__()
        features = super().encode("image", Inputs(source, "image"))
        labels = torch.tensor([source.label(i) for i in range(len(source))])
        self.known = {name: features[labels == i].mean(dim=0) for i, name in enumerate(source.class_names)}

    def encode(self, tower, inputs):
        if tower == "image":
            return super().encode(tower, inputs)
        found = [next(self.known[name] for name in self.known if name in text) for text in inputs]
        return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def test_clean_accuracy_is_that_of_zero_shot_and_noise_costs_some_of_it():
    encoder = TextureBlind(SHAPES.build(Path()))
    metrics = built(robustness(corruptions=tuple(LEVELS)))(encoder).metrics
    knobs = {"every": "never", "dataset": SHAPES, "templates": TEMPLATES, "class_names": None}
    assert metrics["clean"].value == built(ZeroShot(**knobs))(encoder).metrics["top1"].value
    assert set(metrics) == {"clean", "mean", "relative", *LEVELS}
    assert metrics["mean"].value == pytest.approx(np.mean([metrics[name].value for name in LEVELS]))
    assert metrics["relative"].value == pytest.approx(metrics["mean"].value / metrics["clean"].value)
    assert metrics["relative"].value < 1
    for name in ("clean", "mean", *LEVELS):
        assert metrics[name].chance == pytest.approx(1 / 80)
        assert metrics[name].low <= metrics[name].value <= metrics[name].high
        assert metrics[name].count == 80


def test_the_figure_has_a_line_for_each_corruption_from_the_clean_images_on():
    run = pickle.loads(pickle.dumps(built(robustness(max_samples=20))))
    encoder = PixelEncoder()
    report = run(encoder)
    assert encoder.images == 20 * (1 + 2 * 2)
    axes = report.figures["severity"]().axes[0]
    assert [line.get_label() for line in axes.lines] == ["noise", "occlusion"]
    assert all(list(line.get_xdata()) == [0, 1, 5] for line in axes.lines)


def test_a_collapsed_model_has_nothing_to_lose():
    for encoder in (SameEncoder(), BrokenEncoder()):
        metrics = built(robustness(max_samples=10))(encoder).metrics
        assert metrics["clean"].value == metrics["mean"].value == 0
        assert math.isnan(metrics["relative"].value)


def test_labels_that_have_nothing_to_do_with_the_images_give_chance():
    part = robustness(dataset=Shapes(split="unseen", size=1000, image_size=32, held_out=0.05), severities=[1])
    found = built(part)(PixelEncoder()).metrics["mean"]
    assert found.chance == pytest.approx(1 / 16)
    assert abs(found.value - found.chance) < 3.29 * (found.high - found.low) / (2 * 1.96) + 0.02


def test_what_is_left_is_the_ratio_of_the_means():
    clean, corrupted = torch.tensor([1.0, 1, 0, 1]), torch.tensor([0.5, 1, 0.1, 0.2])
    found = relative(clean, corrupted)
    assert found.value == pytest.approx(1.8 / 3)
    assert found.low < found.value < found.high


def test_of_nothing_nothing_can_be_left():
    nothing = relative(torch.zeros(4), torch.tensor([0.0, 1, 0, 0.5]))
    assert [math.isnan(one) for one in (nothing.value, nothing.low, nothing.high)] == [True] * 3
    rare = relative(torch.tensor([1.0, 0, 0]), torch.tensor([0.5, 0, 1]))  # samples without the first have no ratio
    assert rare.value == 1.5
    assert all(math.isfinite(end) for end in (rare.low, rare.high))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"corruptions": ()}, "corruptions"),
        ({"corruptions": ("fog",)}, r"corruptions\.0"),
        ({"corruptions": ("blur", "blur")}, "each should be there once"),
        ({"severities": (0,)}, r"severities\.0"),
        ({"severities": (6,)}, r"severities\.0"),
        ({"severities": (2, 2)}, "each should be there once"),
    ],
)
def test_unknown_corruptions_and_severities_are_refused(knobs, message):
    with pytest.raises(ValidationError, match=message):
        robustness(**knobs)


@pytest.mark.parametrize("part", [robustness, prompts])
def test_what_cannot_be_classified_is_refused_before_the_run(part):
    with pytest.raises(ValueError, match="no class names: set class_names"):
        built(part(dataset=Shapes(size=10)))
    with pytest.raises(ValueError, match="no templates: set templates"):
        built(part(templates=None))
    with pytest.raises(ValueError, match="there are 2 class names: set class_names"):
        built(part(class_names=["one", "two"]))
    with pytest.raises(ValueError, match="sample 0 of the dataset has no label"):
        built(part(dataset=Shapes(size=10), class_names=["one", "two"]))


# --- templates ------------------------------------------------------------------------------------------------------


def test_metrics_are_those_of_zero_shot_with_each_template():
    encoder = PixelEncoder()
    report = pickle.loads(pickle.dumps(built(prompts())))(encoder)

    def top1(*templates):
        knobs = {"every": "never", "dataset": SHAPES, "templates": templates, "class_names": None}
        return built(ZeroShot(**knobs))(encoder).metrics["top1"].value

    single = [top1(template) for template in TEMPLATES]
    found = {name: estimate.value for name, estimate in report.metrics.items()}
    wanted = [np.mean(single), np.std(single, ddof=1), max(single), min(single), top1(*TEMPLATES)]
    assert found == pytest.approx(dict(zip(("mean", "std", "best", "worst", "ensemble"), wanted, strict=True)))
    chance = {name: estimate.chance for name, estimate in report.metrics.items()}
    assert chance["mean"] == pytest.approx(1 / 80)
    assert chance["ensemble"] == pytest.approx(1 / 80)
    assert chance["worst"] < 1 / 80 < chance["best"]
    assert report.metrics["std"].chance is None
    report.figures["templates"]()


def test_a_template_that_matters_makes_a_spread():
    class Listening(TextureBlind):
        def encode(self, tower, inputs):
            found = super().encode(tower, inputs)
            if tower == "text":
                found = torch.stack(
                    [direction(t) if t.endswith("!") else f for t, f in zip(inputs, found, strict=True)]
                )
            return found

    metrics = built(prompts())(Listening(SHAPES.build(Path()))).metrics
    assert metrics["worst"].value < 0.2 < 0.5 < metrics["best"].value
    assert metrics["worst"].high < metrics["best"].low
    assert metrics["std"].value > 0.2


def test_the_spread_is_of_the_last_dimension():
    assert spread(torch.tensor([[0.0, 1.0, 0.5], [0.2, 0.2, 0.2]])).tolist() == [
        pytest.approx([0.5, 0.5, 1, 0]),
        pytest.approx([0.2, 0, 0.2, 0.2]),
    ]


def test_one_template_alone_has_no_spread():
    with pytest.raises(ValueError, match=r"there is only the template 'a \{\}': set templates, at least two"):
        built(prompts(templates=["a {}"]))


@pytest.mark.skipif("MULTIMODAL_DATASETS" not in os.environ, reason="needs the files of data sets")
@pytest.mark.parametrize("part", [robustness, prompts])
def test_images_of_cifar_10_are_evaluated(part):
    run = built(
        part(dataset=Arrays(path="cifar10_testA.npz"), max_samples=100), Path(os.environ["MULTIMODAL_DATASETS"])
    )
    metrics = run(PixelEncoder()).metrics
    assert metrics["mean"].count == 100
    assert metrics["mean"].chance == pytest.approx(0.1, abs=0.02)  # 100 images are not as many of each class
