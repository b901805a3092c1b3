"""Laws over all evaluations: they say what they report, and what they call chance is what guessing gives.

Chance is measured: a model that knows what images show is asked again with its images, or its texts, permuted, many
times over. Its mean is within the 99.9% interval of Student's t around what the report states; for choices, whose
questions stay the same, within that of the binomial over questions.
"""

import importlib
import json
import math
import pkgutil
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from encoders import direction
from torch import Tensor

from multimodal import evals
from multimodal.batch import Sample
from multimodal.data import shapes_drawing
from multimodal.data.choices import Choice as Question
from multimodal.data.choices import Choices, ChoiceSource
from multimodal.data.shapes import Shapes
from multimodal.data.shapes_binding import ShapesBinding
from multimodal.evals import intervals
from multimodal.evals.choice import Choice
from multimodal.evals.corruptions import Corrupted
from multimodal.evals.few_shot import FewShot
from multimodal.evals.geometry import Geometry
from multimodal.evals.ieat import ImageAssociation
from multimodal.evals.knn import KNN
from multimodal.evals.linear_probe import LinearProbe
from multimodal.evals.max_skew import MaxSkew
from multimodal.evals.multi_label import MultiLabel
from multimodal.evals.one_batch import OneBatch
from multimodal.evals.projection import Projection
from multimodal.evals.prompt_sensitivity import PromptSensitivity
from multimodal.evals.retrieval import Retrieval
from multimodal.evals.robustness import Robustness
from multimodal.evals.sts import TextSimilarity
from multimodal.evals.weat import WordAssociation
from multimodal.evals.winoground import Winoground
from multimodal.evals.worst_group import WorstGroup
from multimodal.evals.zero_shot import ZeroShot
from multimodal.parts import Estimate, Eval, Report, Sources

PERMUTATIONS = 25
WITHIN = 3.745
"""Student's t: of 24 degrees of freedom 99.9% are nearer to 0."""
NORMAL = 3.291
"""Likewise of a normal distribution."""

# --- a model that knows ---------------------------------------------------------------------------------------------


@cache
def described(text: str) -> Tensor:
    """Its words, and which comes where."""
    words = re.findall(r"\w+", text)
    return F.normalize(sum(direction(word) + direction(f"{place} {word}") for place, word in enumerate(words)), dim=0)


class Knowing:
    """An image is what its captions say, and noise."""

    logit_scale = 20.0

    def __init__(self) -> None:
        self.seen: dict[tuple[Any, int], Tensor] = {}

    def encode(self, tower: str, inputs: Any) -> Tensor:
        if tower == "text":
            return torch.stack([described(text) for text in inputs])
        images = inputs.images if isinstance(inputs, Corrupted) else inputs
        return torch.stack([self.image(images.source, place) for place in images.places])

    def image(self, source: Any, place: int) -> Tensor:
        if (source, place) not in self.seen:
            said = sum(described(caption) for caption in source.captions(place))
            noise = torch.randn(64, generator=torch.Generator().manual_seed(place)) / 8
            self.seen[source, place] = F.normalize(F.normalize(said, dim=0) + 0.3 * noise, dim=0)
        return self.seen[source, place]


class Permuted:
    """Takes every image, or every text, for another one."""

    logit_scale = 20.0

    def __init__(self, encoder: Knowing, towers: tuple[str, ...], seed: int) -> None:
        self.encoder, self.towers, self.generator = encoder, towers, torch.Generator().manual_seed(seed)

    def encode(self, tower: str, inputs: Any) -> Tensor:
        found = self.encoder.encode(tower, inputs)
        return found[torch.randperm(len(found), generator=self.generator)] if tower in self.towers else found


# --- every evaluation -----------------------------------------------------------------------------------------------

UNSEEN = Shapes(split="unseen", size=160, image_size=32)
OTHERS = Shapes(split="unseen", size=160, image_size=32, seed=7)
SCENES = Shapes(size=100, image_size=32, seed=1000)
TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "a {}.")
NAMED = {"dataset": UNSEEN, "templates": TEMPLATES, "class_names": None}
PROBE = {"train": OTHERS, "dataset": UNSEEN, "max_train": None}
COLOURS = [f"{colour} {colour}" for colour in shapes_drawing.COLOURS]
COLOUR = r"\S+ (?P<attribute>\S+) .+"
TESTS = {"path": "tests.json", "member": None, "tests": None, "template": None, "permutations": 999}


class TwoByTwo(ChoiceSource):
    """Pairs of images and captions, each of which is the wrong one of the other."""

    def __init__(self) -> None:
        self.scenes = Shapes(size=300, image_size=32).build(Path())
        said = [self.scenes.captions(place)[0] for place in range(300)]
        self.choices = [Question(i, said[i], (said[i ^ 1],), "caption") for i in range(300)]

    def __len__(self) -> int:
        return 300

    def __getitem__(self, index: int) -> Sample:
        return self.scenes[index]


class Pairs(Choices):
    @property
    def categories(self) -> tuple[str, ...]:
        return ("caption",)

    def build(self, root: Path) -> TwoByTwo:
        return TwoByTwo()


def part(kind: type[Eval], **knobs: Any) -> Eval:
    return kind(every="never", **knobs)


EVERY = {
    "zero_shot": part(ZeroShot, **NAMED),
    "multi_label": part(MultiLabel, **NAMED, max_samples=None),
    "prompt_sensitivity": part(PromptSensitivity, **NAMED, max_samples=None),
    "robustness": part(Robustness, **NAMED, corruptions=["noise", "blur"], severities=[1, 5], max_samples=None, seed=0),
    "worst_group": part(
        WorstGroup,
        dataset=Shapes(split="unseen", size=400, image_size=32),
        groups=None,
        pattern=r"\S+ (?P<group>\S+) (?P<class>.+)",
        by_class=False,
        min_samples=10,
        templates=TEMPLATES,
    ),
    "max_skew": part(MaxSkew, dataset=UNSEEN, pattern=COLOUR, queries=COLOURS, k=20, desired="dataset"),
    "knn": part(KNN, **PROBE, k=5, temperature=0.07),
    "few_shot": part(FewShot, **PROBE, shots=[1, 2], draws=2, c=10.0, max_iter=30),
    "linear_probe": part(LinearProbe, **PROBE, validation=0.5, refinements=0, max_iter=10),
    "retrieval": part(Retrieval, dataset=SCENES, max_samples=None, duplicates="right"),
    "retrieval_by_papers": part(Retrieval, dataset=SCENES, max_samples=None, duplicates="wrong"),
    "geometry": part(Geometry, dataset=SCENES, max_samples=None, k=10),
    "choice": part(Choice, dataset=ShapesBinding(size=200, image_size=32), max_images=None),
    "winoground": part(Winoground, dataset=Pairs(), max_images=None),
    "sts": part(TextSimilarity, path="pairs.tsv", member=None),
    "weat": part(WordAssociation, **TESTS),
    "projection": part(Projection, **TESTS, **NAMED, pairs=[["red", "blue"], ["circle", "square"]], components=1),
    "ieat": part(
        ImageAssociation,
        **{
            name: Shapes(size=6, image_size=32, seed=seed)
            for seed, name in enumerate(("target_x", "target_y", "attribute_a", "attribute_b"))
        },
        max_samples=None,
        permutations=999,
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The files that some of them read."""
    root = tmp_path_factory.mktemp("data")
    said = [SCENES.build(root).captions(place)[0] for place in range(100)]
    pairs = [(a, b, 5 * len(set(a.split()) & set(b.split())) / 12) for a in said for b in said[:3] if a != b]
    rows = [f"shapes\tfile\t2000\t{i}\t{min(score, 5)}\t{a}\t{b}" for i, (a, b, score) in enumerate(pairs)]
    (root / "pairs.tsv").write_text("\n".join(rows))
    sides = {"targ1": "a red {}", "targ2": "a blue {}", "attr1": "red {} here", "attr2": "some blue {}"}
    shapes = ["circle", "square", "heart", "ring", "triangle", "star", "cross", "diamond"]
    tests = {
        f"test{i}": {
            role: {"category": role, "examples": [text.replace("{}", f"{one} {i}") for one in shapes]}
            for role, text in sides.items()
        }
        for i in range(6)
    }
    (root / "tests.json").write_text(json.dumps(tests))
    return Sources(root)


class Asked(NamedTuple):
    part: Eval
    run: Any
    report: Report


@pytest.fixture(scope="module")
def asked(data: Sources) -> dict[str, Asked]:
    runs = {name: one.build(data) for name, one in EVERY.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 100)
        return {name: Asked(EVERY[name], run, run(Knowing())) for name, run in runs.items()}


def test_every_evaluation_is_asked() -> None:
    found = set()
    for module in pkgutil.iter_modules(evals.__path__, f"{evals.__name__}."):
        for value in vars(importlib.import_module(module.name)).values():
            if isinstance(value, type) and issubclass(value, Eval) and not value.__abstractmethods__:
                found.add(value)
    assert found - {OneBatch} == {type(one) for one in EVERY.values()}  # which is retrieval


KNOWN_FROM_DATA = re.compile(r"top1_|test\d_|alignment_text")
"""Metrics, as their evaluations say, of groups and tests that data name, and of several captions an image."""


@pytest.mark.parametrize("name", EVERY)
def test_what_is_promised_is_reported_and_is_a_number(asked: dict[str, Asked], name: str) -> None:
    part, _, report = asked[name]
    assert set(part.metrics) <= set(report.metrics)
    assert all(KNOWN_FROM_DATA.match(metric) for metric in set(report.metrics) - set(part.metrics))
    for metric, found in report.metrics.items():
        estimate = found if isinstance(found, Estimate) else Estimate(found)
        ends = [end for end in (estimate.low, estimate.chance, estimate.high) if end is not None]
        assert all(math.isfinite(one) for one in (float(found), *ends)), metric
        assert estimate.low is None or estimate.low <= estimate.high, metric
        assert estimate.count is None or estimate.count > 0, metric


PROBES = "knn", "few_shot", "linear_probe"
"""Features that are no numbers are all alike to them: they may name the class that most test images have."""
ACCURACIES = re.compile(
    r"top\d|mean_per_class|.*2._(r\d+|mrr|ndcg10)|map|clean|mean$|best|worst|ensemble|majority|weighted"
    r"|(swap|replace)_|text$|image$|group$|noise|blur|caption|.*separability|spearman|pearson"
)
CHANGES = ("top1_change",)


@pytest.mark.parametrize("name", EVERY)
def test_what_is_like_an_accuracy_has_chance_count_and_interval(asked: dict[str, Asked], name: str) -> None:
    for metric, found in asked[name].report.metrics.items():
        if ACCURACIES.match(metric) and metric not in CHANGES:
            assert isinstance(found, Estimate), metric
            assert None not in (found.chance, found.count, found.low, found.high), metric
            assert found.low <= found.value <= found.high, metric


class Nowhere(Knowing):
    """A model whose weights have become no numbers."""

    def encode(self, tower: str, inputs: Any) -> Tensor:
        return torch.full((len(inputs), 64), torch.nan)


@pytest.mark.parametrize("name", EVERY)
def test_a_model_without_numbers_is_evaluated_and_is_never_better_than_chance(
    asked: dict[str, Asked], name: str
) -> None:
    part, run, _ = asked[name]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "RESAMPLES", 10)
        report = run(Nowhere())
    assert set(part.metrics) <= set(report.metrics)
    for metric, found in report.metrics.items():
        if isinstance(found, Estimate) and found.chance is not None and ACCURACIES.match(metric):
            assert not found.value > found.chance + (name in PROBES), metric
        if "significant" in metric or metric.endswith("_p") or metric in ("p", "max_skew", "ndkl"):
            assert math.isnan(float(found)), metric


# --- chance ---------------------------------------------------------------------------------------------------------

IMAGES, TEXTS = ("image",), ("text",)
PERMUTED = {
    **dict.fromkeys(
        ("zero_shot", "multi_label", "prompt_sensitivity", "robustness", "worst_group", "max_skew"), IMAGES
    ),
    **dict.fromkeys(("knn", "few_shot", "linear_probe"), IMAGES),
    **dict.fromkeys(("retrieval", "retrieval_by_papers", "geometry", "sts", "weat"), TEXTS),
    "choice": IMAGES,
    "winoground": ("image", "text"),
}
WITHOUT_PAIRS = re.compile("modality_separability|anisotropy|hubness|anti_hubs")
"""Of images and texts each by themselves: who belongs to whom is not asked."""
AS_BEFORE = re.compile("gap|top1_|test\\d|share_significant|std")
"""Which need not be far from chance in a model that knows."""


@pytest.mark.parametrize("name", PERMUTED)
def test_with_images_and_texts_permuted_every_number_is_at_chance(
    asked: dict[str, Asked], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run, before = asked[name]
    monkeypatch.setattr(intervals, "RESAMPLES", 2)  # intervals are not asked for
    encoder = Knowing()
    reports = [run(Permuted(encoder, PERMUTED[name], seed)) for seed in range(PERMUTATIONS)]
    wrong, checked = [], 0
    for metric, known in before.metrics.items():
        if not isinstance(known, Estimate) or known.chance is None or WITHOUT_PAIRS.match(metric):
            continue
        found = [report.metrics[metric] for report in reports]
        off = torch.tensor([one.value - one.chance for one in found], dtype=torch.float64)
        within = WITHIN * off.std().item() / PERMUTATIONS**0.5 + 1e-9
        if name in ("choice", "winoground"):
            within = NORMAL * (known.chance * (1 - known.chance) / known.count) ** 0.5
        if metric.endswith("median_rank"):
            within += 1  # a place, not a mean
        if abs(off.mean().item()) > within:
            wrong.append(f"{metric}: {off.mean().item():+.5f} from {known.chance:.5f}, more than {within:.5f}")
        if not AS_BEFORE.match(metric) and abs(known.value - known.chance) < 5 * off.std().item():
            wrong.append(f"{metric} is not far from chance before: {known.value:.4f}, {known.chance:.4f}")
        checked += 1
    assert checked
    assert not wrong, "\n".join(wrong)
