"""The recipes for real scale: what their first lines say is there and composes; each makes its first batch."""

import io
import re
import shlex
import tarfile
from pathlib import Path

import pytest
from conftest import composed
from PIL import Image

from multimodal.cli import CONF
from multimodal.config import TrainConfig, check
from multimodal.dry_run import dry_run

RECIPES = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml") if not path.stem.endswith("_tiny"))
SMALL = ("debug=no_evals", "global_batch_size=4", "micro_batch_size=null", "device=cpu", "workers=0")


def head(recipe: str) -> list[str]:
    """The first lines, after the package: the command, the hardware, the number to expect."""
    lines = (CONF / "experiment" / f"{recipe}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    return [line.removeprefix("# ") for line in lines[1:4]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_says_its_command_its_hardware_and_the_published_number(recipe: str) -> None:
    command, hardware, expected = head(recipe)
    words = shlex.split(command.partition("        ")[0])
    assert f"experiment={recipe}" in words
    ours = [word for word in words[words.index("train.py") + 1 :] if "=" in word and not word.startswith("hydra")]
    check(composed(*ours, "run.name=x"), TrainConfig)
    assert re.match(r"\d+ A100.*: [\d,.]+ (hours|days|minutes)", hardware), hardware
    assert "(source: " in expected or "No number is published" in (CONF / "experiment" / f"{recipe}.yaml").read_text()


def shard(path: Path, size: int) -> None:
    """As img2dataset writes them."""
    with tarfile.open(path, "w") as tar:
        for number in range(size):
            picture = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 0, 0)).save(picture, "jpeg")
            for name, content in (("jpg", picture.getvalue()), ("json", f'{{"caption": "number {number}"}}'.encode())):
                member = tarfile.TarInfo(f"{number:09d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_makes_its_model_and_its_first_batch(
    tmp_path: Path, recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard(tmp_path / "pairs.tar", 8)
    weights = ["towers.image.pretrained=false"] if "lit" in recipe else []  # they would be downloaded
    place = [f"dataset.urls={tmp_path / 'pairs.tar'}", f"paths.runs={tmp_path}", "warmup=5%", "run.name=x"]
    dry_run(check(composed(f"experiment={recipe}", *SMALL, *weights, *place), TrainConfig))
    assert "samples: 8; steps: " in capsys.readouterr().out
    assert (tmp_path / "x-batch.png").exists()
