"""Laws of scripts/evaluate.py: mistakes are told before a model is loaded, all at once; what it writes and prints."""

import copy
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import TINY, composed
from programs import run_program

from multimodal import journal, run_folder, subjects
from multimodal.cli import register_plugins
from multimodal.config import ConfigError, TrainConfig, check
from multimodal.trainer import Trainer

SMALL = ("evals.shapes.dataset.size=80", "evals.shapes.dataset.image_size=32")

Evaluate = Callable[..., None]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two small runs, small_a and small_b, and one whose towers have other names."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder.provenance, "facts", dict)
        patch.setattr(journal, "write_figures", lambda *_: [])
        patch.setattr(journal.figures, "curves", lambda rows: SimpleNamespace(savefig=lambda path, dpi: None))
        words = [word for word in TINY if not word.startswith(("evals=", "duration="))]
        raw = composed(*words, "duration=2steps", "evals=[shapes]", *SMALL, f"paths.runs={folder}")
        raw["run"]["name"] = "small_a"
        Trainer(check(raw, TrainConfig)).run()
        renamed = copy.deepcopy(raw)
        renamed["run"]["name"] = "renamed"
        renamed["evals"] = {}
        renamed["towers"] = {"picture": renamed["towers"]["image"], "words": renamed["towers"]["text"]}
        for loss in renamed["loss"].values():
            loss["pair"] = ["picture", "words"]
        Trainer(check(renamed, TrainConfig)).run()
    shutil.rmtree(folder / "small_a" / "evaluations")
    shutil.copytree(folder / "small_a", folder / "small_b")
    return folder


@pytest.fixture
def evaluate(runs: Path, tmp_path: Path) -> Evaluate:
    """The program without Hydra's main, on a copy of the runs."""
    shutil.copytree(runs, tmp_path / "runs")
    (tmp_path / "data").mkdir()

    def run(*words: str) -> None:
        register_plugins()
        paths = [f"paths.runs={tmp_path / 'runs'}", f"paths.datasets={tmp_path / 'data'}"]
        run_program("evaluate", *paths, "device=cpu", "workers=0", *words)

    return run


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading one is an error of another kind."""

    def load(subject: subjects.Subject) -> Any:
        raise AssertionError(f"{subject.name} was loaded")

    monkeypatch.setattr(subjects.Subject, "load", load)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multimodal.results.write_figures", lambda *_: [])


def images(path: Path, labels: list[int], names: list[str]) -> None:
    pixels = np.zeros((len(labels), 32, 32, 3), np.uint8)
    np.savez(path, image=pixels, label=np.array(labels), class_names=np.array(names))


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["run=smal_a"], {"run": "there is no run 'smal_a' in .*Did you mean 'small_a'?"}),
        (["run=other_*"], {"run": "no run in .* is named like 'other_*'"}),
        (["run=small_a", "checkpoint=7"], {"run": "7"}),
        (["run=small_a", "weights=ema"], {"weights": "has kept no mean of its weights"}),
        (["run=small_a", "evals=[cifar10]"], {"evals.cifar10": "cifar10_testA.npz"}),
        (
            ["run=small_a", "evals=[shapes]", "evals.shapes.dataset.size=79"],
            {"evals.shapes": "1 of 80 classes have no"},
        ),
        (
            ["run=small_a", "evals=[shapes]", "evals.shapes.class_names=[cat,' ']"],
            {"evals.shapes": "class name of label 1 is empty"},
        ),
        (
            ["run=small_a", "evals=[shapes]", "evals.shapes.class_names=[cat,dog]"],
            {"evals.shapes": "labels go from 0 to 79 but there are 2 class names"},
        ),
        (
            ["run=small_a", "evals=[shapes]", "evals.shapes.templates=['a {}','a photo']"],
            {"evals.shapes.templates.1": "should contain {} exactly once"},
        ),
        (
            ["run=small_a", "evals=[shapes]", "evals.shapes.templates=[]"],
            {"evals.shapes.templates": "at least 1"},
        ),
        (["run=small_a", "evals=[shapes]", "evals.shapes.k=1"], {"evals.shapes.k": "unknown key"}),
        (["run=renamed", "evals=[shapes]"], {"evals.shapes": "needs towers named image, text; renamed has: picture"}),
        (["run=renamed"], {"evals": "renamed was trained with none: name some"}),
        (["run='open_clip:ViT-B-32'", "evals=[shapes]", "weights=ema"], {"weights": "has no running mean"}),
        (["run='open_clip:ViT-B-33'", "evals=[shapes]"], {"run": "no architecture 'ViT-B-33'.*Did you mean 'ViT-B-32"}),
        (["run='open_clip:ViT-B-32/opnai'", "evals=[shapes]"], {"run": "no tag of ViT-B-32.*Did you mean 'openai'"}),
        (["run='open_clip:ViT-B-32'"], {"evals": "open_clip:ViT-B-32 was trained with none"}),
    ],
)
def test_a_mistake_is_told_before_a_model_is_loaded(
    evaluate: Evaluate, words: list[str], problems: dict[str, str]
) -> None:
    with pytest.raises(ConfigError) as error:
        evaluate(*(word if "evals.shapes.k" not in word else f"+{word}" for word in words))
    found = dict(error.value.problems)
    assert len(found) == len(error.value.problems)
    assert found.keys() == problems.keys()
    for key, told in problems.items():
        rest = found[key]
        for piece in told.split(".*"):
            assert piece in rest
            rest = rest.split(piece, 1)[1] if piece else rest


@pytest.mark.usefixtures("no_model")
def test_all_mistakes_in_names_and_data_are_told_at_once(evaluate: Evaluate, tmp_path: Path) -> None:
    images(tmp_path / "data" / "cifar10_testA.npz", [0, 1, 2], ["cat", "", "owl"])
    images(tmp_path / "data" / "two.npz", [0, 1, 2], ["cat", "dog"])
    with pytest.raises(ConfigError) as error:
        evaluate(
            "run=[smal_a,renamed,'open_clip:ViT-B-33','open_clip:ViT-B-32','other_*']",
            "weights=ema",
            "evals=[shapes,cifar10,cifar10_prompts,cifar10_knn,fashion_mnist,flickr8k]",
            "evals.shapes.dataset.size=79",
            "evals.cifar10_prompts.dataset.path=two.npz",
        )
    told = [f"{path}: {text}" for path, text in error.value.problems]
    for piece in (
        "run: there is no run 'smal_a'",
        f"weights: {tmp_path}/runs/renamed/checkpoints",
        "run: open_clip has no architecture 'ViT-B-33'",
        "weights: open_clip:ViT-B-32 has no running mean",
        "run: no run in",
        "evals.shapes: 1 of 80 classes have no image",
        f"evals.cifar10: {tmp_path}/data/cifar10_testA.npz: `class_names` is empty for the label 1",
        f"evals.cifar10_prompts: {tmp_path}/data/two.npz: ",
        "evals.cifar10_knn: ",
        "evals.fashion_mnist: ",
        "evals.flickr8k: ",
    ):
        assert any(one.startswith(piece) for one in told), (piece, told)


def results(runs: Path, name: str, step: int = 2) -> dict[str, dict[str, float]]:
    return json.loads((runs / name / "evaluations" / f"step-{step:08d}" / "results.json").read_text())


@pytest.mark.usefixtures("no_pictures")
def test_a_second_evaluation_adds_to_the_numbers_of_the_first(evaluate: Evaluate, tmp_path: Path) -> None:
    evaluate("run=small_a", "evals=[]")  # those that it was trained with
    first = results(tmp_path / "runs", "small_a")
    assert {key.split("/")[1] for key in first} == {"shapes"}
    for numbers in first.values():
        assert numbers.keys() == {"value", "low", "high", "chance", "count"}
    top1 = first["eval/shapes/top1"]
    assert (top1["chance"], top1["count"]) == (1 / 80, 80)
    assert top1["low"] <= top1["value"] <= top1["high"]
    evaluate(
        "run=small_a", "evals=[worst_group]", "evals.worst_group.dataset.size=80", "evals.worst_group.min_samples=5"
    )
    both = results(tmp_path / "runs", "small_a")
    assert {key.split("/")[1] for key in both} == {"shapes", "worst_group"}
    assert {key: both[key] for key in first} == first


@pytest.mark.usefixtures("no_pictures")
def test_several_runs_and_a_pattern_are_columns_of_a_table(
    evaluate: Evaluate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        evaluate("run=['small_*',small_a]", "evals=[shapes]", *SMALL)
    table = caplog.messages[-1].splitlines()
    assert table[0].split() == ["small_a", "small_b", "chance", "n"]
    numbers = results(tmp_path / "runs", "small_a")
    assert numbers == results(tmp_path / "runs", "small_b")
    assert [line.split()[0] for line in table[1:]] == list(numbers)
    top1 = numbers["eval/shapes/top1"]
    cell = f"{top1['value']:.4f} [{top1['low']:.4f}, {top1['high']:.4f}]"
    assert table[1].count(cell) == 2
    assert table[1].split()[-2:] == ["0.0125", "80"]


@pytest.mark.usefixtures("no_pictures")
def test_texts_that_are_cut_are_told_once_each(
    evaluate: Evaluate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = " ".join(["very"] * 100)
    evaluate(
        "run=small_a", "evals=[shapes]", *SMALL, f"evals.shapes.templates=['a {{}}','{long} {{}}','{long} a {{}}']"
    )
    assert "shapes: 160 texts are longer than the context of their tower and were cut" in caplog.messages


@pytest.mark.usefixtures("no_pictures")
def test_one_run_is_told_with_chance_and_count(evaluate: Evaluate, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        evaluate("run=small_a")
    (line,) = [line for line in caplog.messages[-1].splitlines() if line.startswith("eval/shapes/top1")]
    assert line.endswith("(chance 0.0125, n 80)")


@pytest.mark.usefixtures("no_pictures")
def test_a_model_of_open_clip_has_a_folder_of_its_own_beside_runs(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multimodal.interop import architectures

    known = architectures.describe

    def smaller(name: str, tag: str | None = None) -> Any:
        model_cfg, preprocess_cfg = known(name, tag)
        model_cfg["vision_cfg"] |= {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1}
        model_cfg["text_cfg"] |= {"width": 64, "heads": 1, "layers": 1}
        return {**model_cfg, "embed_dim": 16}, preprocess_cfg

    monkeypatch.setattr(architectures, "describe", smaller)
    evaluate("run='open_clip:ViT-S-32'", "evals=[shapes]", *SMALL)
    found = results(tmp_path / "runs", "open_clip-ViT-S-32", step=0)
    assert found["eval/shapes/top1"]["count"] == 80
