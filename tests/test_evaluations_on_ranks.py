"""Evaluations on several ranks give the numbers of one process."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from test_processes import run

from multimodal.cli import CONF
from multimodal.results import folder_of

pytestmark = pytest.mark.slow

STEPS = 300
TRAIN = [
    "run.name=small",
    "tower@towers.image=vit_tiny",
    "towers.image.image_size=32",
    "towers.image.patch_size=16",
    "towers.image.width=32",
    "towers.image.layers=2",
    "towers.image.heads=2",
    "towers.text.width=32",
    "towers.text.layers=1",
    "towers.text.heads=2",
    "model.embed_dim=16",
    "dataset.image_size=32",
    "dataset.size=3200",
    "optimizer.lr=2e-3",
    "global_batch_size=32",
    f"duration={STEPS}steps",
    "evals=[]",
    "checkpoint.best=null",
    "precision=fp32",
    "tracker=none",
    "workers=0",
    "device=cpu",
]
EVALS = {  # every one that needs no file, with numbers of samples that no number of ranks divides
    "shapes": ["dataset.size=211"],
    "shapes_retrieval": ["dataset.size=97"],
    "geometry": ["dataset.size=97"],
    "shapes_binding": ["dataset.size=97"],
    "shapes_knn": ["train.size=211", "dataset.size=97"],
    "shapes_few_shot": ["train.size=211", "dataset.size=97", "shots=[1,2]", "draws=3"],
    "shapes_linear_probe": ["train.size=211", "dataset.size=97", "validation=0.5", "refinements=1"],
    "shapes_prompts": ["dataset.size=211", "max_samples=97"],
    "shapes_robustness": ["dataset.size=211", "max_samples=97", "severities=[1,5]"],
    "worst_group": ["dataset.size=211"],
    "max_skew": ["dataset.size=211"],
    "multi_label": ["dataset.split=unseen", "dataset.size=97", "templates=['a {}.']"],
    "ieat": [f"{role}={{_target_:multimodal.data.shapes.Shapes,size:{size}}}" for role, size in (
        ("target_x", 7), ("target_y", 5), ("attribute_a", 11), ("attribute_b", 3)
    )],
}  # fmt: skip
NEEDS_FILES = {
    *("aro", "imagenet", "projection", "retrieval", "stsb", "sugarcrepe", "weat", "winoground", "zero_shot"),
    "one_batch",  # which wants the data of training
}
ELSEWHERE = ("cifar10", "fashion_mnist", "flickr8k")


def evaluate(runs: Path, ranks: int) -> dict[str, dict[str, Any]]:
    """What is in results.json."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [f"evals.{name}.dataset.image_size=32" for name in EVALS if name != "ieat"]
    words += [f"evals.{name}.{word}" for name, words in EVALS.items() for word in words]
    words += ["dataset@evals.multi_label.dataset=shapes", f"evals=[{','.join(EVALS)}]", "device=cpu", "workers=0"]
    run([*launcher, "scripts/evaluate.py", "run=small", f"paths.runs={runs}", *words])
    found = json.loads((folder_of(runs / "small", STEPS) / "results.json").read_text())
    assert {key.split("/")[1] for key in found} == set(EVALS)
    return found


def unlike(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> list[str]:
    """Where two files of results differ, null being like null alone."""
    return [
        f"{key}.{field}: {value} and {other[key][field]}"
        for key, numbers in one.items()
        for field, value in numbers.items()
        if value != other[key][field] and value != pytest.approx(other[key][field], rel=1e-5, abs=1e-5)
    ]


def test_every_evaluation_without_a_file_is_among_those_that_are_compared() -> None:
    names = {path.stem for path in (CONF / "evals").glob("*.yaml")}
    assert {name for name in names if not name.startswith(ELSEWHERE)} == NEEDS_FILES | set(EVALS)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of runs with a model that knows a little: with one that knows nothing, rounding decides."""
    runs = tmp_path_factory.mktemp("trained")
    run([sys.executable, "train.py", f"paths.runs={runs}", *TRAIN])
    return runs


@pytest.fixture(scope="module")
def alone(trained: Path) -> dict[str, dict[str, Any]]:
    return evaluate(trained, 1)


@pytest.mark.parametrize("ranks", [2, 3])
def test_numbers_and_intervals_on_several_ranks_are_those_of_one_process(
    trained: Path, alone: dict[str, dict[str, Any]], tmp_path: Path, ranks: int
) -> None:
    shutil.copytree(trained / "small" / "checkpoints", tmp_path / "small" / "checkpoints")
    found = evaluate(tmp_path, ranks)
    assert alone.keys() == found.keys()
    assert not unlike(alone, found)
