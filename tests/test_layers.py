"""The laws of the house: imports go down the numbers, and parts are light to load."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import multimodal

ROOT = Path(multimodal.__file__).parent
FAMILIES = ("towers", "losses", "data", "evals")
LAYERS = (
    (
        "batch",
        "checksums",
        "clock",
        "distributed",
        "files",
        "lengths",
        "offline",
        "patience",
        "progress",
        "threads",
        "units",
    ),
    ("resolve",),
    ("parts",),
    FAMILIES,
    (
        "config",
        "model",
        "optim",
        "optimizers",
        "encoder",
        "hardware",
        "not_finite",
        "profiling",
        "run_lock",
        "sharding",
    ),
    ("ema", "remembering", "step", "checkpoint", "tracker", "provenance", "interop"),
    (
        "assemble",
        "compiling",
        "endings",
        "finished_run",
        "memory",
        "outline",
        "rehearsal",
        "results",
        "results_table",
        "retold",
        "run_folder",
        "run_names",
        "saving",
    ),
    ("export",),
    ("dry_run", "journal", "kept_features", "plan", "report", "trainer"),
    ("api", "cli", "comparison", "inventory", "repeats", "scaling"),
    ("adapters", "embeddings", "grids", "search", "subjects"),
    ("__init__",),
)
LEVELS = {f"multimodal.{name}".removesuffix(".__init__"): level for level, names in enumerate(LAYERS) for name in names}
PARTS = (*FAMILIES, "optim", "optimizers", "tracker")
HEAVY = (
    "open_clip",
    "torchvision",
    "timm",
    "transformers",
    "wandb",
    "matplotlib",
    "hydra",
    "datasets",
    "faiss",
    "sklearn",
)


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT.parent).with_suffix("")
    return ".".join(relative.parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def level(module: str) -> int:
    """Of a module, or of the folder that it is in."""
    return LEVELS[".".join(module.split(".")[:2])]


def imports(module: str) -> Iterator[str]:
    """Our modules that a module imports anywhere in its source, type checking included."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "multimodal":
                yield name if name in MODULES else name.rpartition(".")[0]


def test_every_module_has_a_place_in_the_house() -> None:
    assert {".".join(module.split(".")[:2]) for module in MODULES} == set(LEVELS)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down_the_numbers_only(module: str) -> None:
    upward = [f"{name} ({level(name)})" for name in imports(module) if level(name) > level(module)]
    assert not upward, f"{module} ({level(module)}) imports {', '.join(upward)}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: set(imports(module)) - {"multimodal"} for module in MODULES}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(graph) - 1


def test_towers_losses_data_and_evaluations_do_not_know_each_other_across() -> None:
    """But for evaluations, which may read what the data gives."""
    for module in MODULES:
        folder = module.split(".")[1:2]
        if folder and folder[0] in FAMILIES:
            others = {name.split(".")[1] for name in imports(module) if name.split(".")[1] in FAMILIES} - set(folder)
            assert others <= ({"data"} if folder == ["evals"] else set()), f"{module} imports from {others}"


def test_a_part_is_loaded_with_nothing_heavier_than_torch() -> None:
    modules = [module for module in MODULES if module.split(".")[1:2] and module.split(".")[1] in PARTS]
    assert len(modules) > 15
    code = f"import sys, {', '.join(modules)}; print(*(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


WIDTHS = """
import sys
from conftest import composed
from multimodal.config import TrainConfig, check

words = ("run.name=x", "tower@towers.image=vit_tiny", "model.embed_dim=30")
for knob in ("image.projection=none", "image.pool=attn", "text.projection=none"):
    tower = check(composed(*words, f"towers.{knob}"), TrainConfig).towers[knob.split(".")[0]]
    preprocessor = tower.preprocessor(lambda: ["a caption"], None, None) if tower.reads == "image" else text
    try:
        tower.build(preprocessor, 30)
    except ValueError as error:
        print("told")
"""


@pytest.mark.slow
def test_widths_that_do_not_meet_are_told_before_open_clip_is_loaded() -> None:
    stands_for = "from types import SimpleNamespace as S; text = S(encoding=S(vocab_size=300, pad=0, end=299))"
    code = f"{stands_for}{WIDTHS}print(*({{'open_clip', 'timm', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.stdout.split() == ["told"] * 3, done.stderr
