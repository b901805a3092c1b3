"""The laws of taking a model away: the other library gives the same features for the same images and texts."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, composed

from multimodal.assemble import assemble
from multimodal.cli import CONF
from multimodal.config import TrainConfig, check
from multimodal.interop.exported import Exported, write_card
from multimodal.interop.huggingface import HuggingFace
from multimodal.interop.open_clip_folder import OpenClipFolder
from multimodal.parts import Format
from multimodal.trainer import Trainer

CLIP = "tokenizer@towers.text.tokenizer=clip_bpe"
RESNET = ("tower@towers.image=resnet_tiny", "towers.image.image_size=32", "towers.image.width=8")
FORMATS: dict[str, Format] = {"open_clip": OpenClipFolder(), "huggingface": HuggingFace()}


def exported(*overrides: str) -> Exported:
    base = [word for word in TINY if not (RESNET[0] in overrides and "towers.image" in word)]
    if CLIP in overrides:
        base = [word for word in base if "tokenizer.vocab_size" not in word]
    config = check(composed(*base, *overrides), TrainConfig)
    assembled = assemble(config, config.dataset.build(Path("nowhere")), None)
    return Exported(config, assembled.model.eval(), assembled.readers, {"eval/shapes/top1": 0.5})


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (CLIP, "towers.text.context_length=77"),
        (
            "towers.image.resize=squash",
            "towers.image.interpolation=bilinear",
            "towers.image.activation=quick_gelu",
            "towers.text.activation=quick_gelu",
        ),
        (*RESNET,),
        ("towers.image.pool=avg", "towers.text.causal=false", "towers.text.projection=linear_bias"),
    ],
)
def test_another_library_gives_the_same_features(name: str, overrides: tuple[str, ...], tmp_path: Path) -> None:
    taken = exported(*overrides)
    if name == "huggingface" and (overrides == RESNET or "towers.image.pool=avg" in overrides):
        with pytest.raises(ValueError, match="to=open_clip can do others"):
            FORMATS[name].write(taken, tmp_path)
        return
    FORMATS[name].write(taken, tmp_path)
    differences = FORMATS[name].differences(taken, tmp_path)
    assert differences["token ids"] == 0
    assert differences["pixels"] < 1e-5
    assert differences["image features"] < 1e-5
    assert differences["text features"] < 1e-5
    write_card(taken, tmp_path, FORMATS[name].usage(), differences)
    card = (tmp_path / "README.md").read_text()
    assert "eval/shapes/top1: 0.5000" in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_the_program_checks_and_keeps_what_it_wrote(tmp_path: Path) -> None:
    config = check(composed(*TINY, f"paths.runs={tmp_path}"), TrainConfig)
    Trainer(config).run()

    def export(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(CONF.parent / "scripts" / "export.py"), "run=tiny", f"paths.runs={tmp_path}"]
        return subprocess.run([*command, *words], capture_output=True, text=True, timeout=200)

    done = export("to=open_clip")
    assert done.returncode == 0, done.stderr
    assert "largest difference of image features" in done.stdout
    assert (tmp_path / "tiny" / "export" / "open_clip" / "README.md").exists()
    assert "overwrite=true" in export("to=open_clip").stderr
    assert [path.name for path in (tmp_path / "tiny" / "export").iterdir()] == ["open_clip"]
