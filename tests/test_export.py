"""The laws of taking a model away: the other library gives the same features for the same images and texts."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import TINY, composed
from PIL import Image
from test_hf_text import make_config, make_tokenizer

from multimodal.assemble import assemble
from multimodal.cli import CONF
from multimodal.config import TrainConfig, check
from multimodal.export.card import write_card
from multimodal.export.exported import Exported, Record, pictures, read_record
from multimodal.export.huggingface import HuggingFace
from multimodal.export.onnx import Onnx
from multimodal.export.open_clip import OpenClip
from multimodal.export.sentence_transformers import SentenceTransformers
from multimodal.interop.towers_to_cfg import to_open_clip
from multimodal.parts import Format
from multimodal.trainer import Trainer

FORMATS: dict[str, Format] = {
    "open_clip": OpenClip(),
    "huggingface": HuggingFace(),
    "onnx": Onnx(),
    "sentence_transformers": SentenceTransformers(),
}
MODELS = {
    "default": (),
    "clip_bpe": ("tokenizer@towers.text.tokenizer=clip_bpe", "towers.text.context_length=77"),
    "quick_gelu": (
        "towers.image.resize=squash",
        "towers.image.interpolation=bilinear",
        "towers.image.activation=quick_gelu",
        "towers.text.activation=quick_gelu",
    ),
    "resnet": ("tower@towers.image=resnet_tiny", "towers.image.image_size=32", "towers.image.width=8"),
    "average": (
        "towers.image.pool=avg",
        "towers.image.resize=longest",
        "towers.text.causal=false",
        "towers.text.projection=linear_bias",
    ),
    "attention": ("towers.image.pool=attn", "towers.image.pool_heads=1", "towers.image.grad_checkpointing=true"),
    "timm": ("tower@towers.image=timm", "towers.image.name=convnext_atto", "towers.image.image_size=32"),
    "sigmoid": ("model.logit_bias=-10", "model.logit_scale=10", "towers.text.too_long=refuse"),
    "bert": ("tower@towers.text=hf_text", "towers.text.context_length=20", "towers.text.pretrained=false"),
}
REFUSED = {
    "huggingface": {"resnet", "average", "attention", "timm", "sigmoid", "bert"},
    "open_clip": {"bert"},  # its architecture is in a local folder
    "sentence_transformers": {"bert"},
    "onnx": set[str](),
}


def exported(name: str, tmp_path: Path, *more: str) -> Exported:
    overrides = [*MODELS[name], *more]
    replaced = [word.split("@")[1].split("=")[0] for word in overrides if word.startswith("tower@")]
    base = [word for word in TINY if not any(part in word for part in replaced)]
    if name == "clip_bpe":
        base = [word for word in base if "tokenizer.vocab_size" not in word]
    if name == "bert":
        make_config("bert", tmp_path / "bert")
        overrides.append(f"towers.text.name={make_tokenizer('bert', tmp_path / 'bert')}")
    config = check(composed(*base, *overrides), TrainConfig)
    assembled = assemble(config, config.dataset.build(Path("nowhere")), None)
    record = Record(8, 64, "fp32", {"eval/shapes/top1": 0.5}, {"torch": "2.15.0"})
    return Exported(config, assembled.model.eval(), assembled.readers, record)


def cases() -> list[Any]:
    """Every format with every model; some of those that take long only in the slow suite."""
    often = {
        "open_clip": set(MODELS),
        "huggingface": set(MODELS),
        "onnx": {"bert"},
        "sentence_transformers": {"resnet"},
    }
    return [
        pytest.param(form, model, marks=() if model in often[form] else pytest.mark.slow)
        for form in FORMATS
        for model in MODELS
    ]


@pytest.mark.parametrize(("form", "model"), cases())
def test_another_library_gives_the_same_features(form: str, model: str, tmp_path: Path) -> None:
    taken, folder = exported(model, tmp_path), tmp_path / "export"
    folder.mkdir()
    if model in REFUSED[form]:
        with pytest.raises(ValueError, match=r"to=open_clip can do|to=onnx can do"):
            FORMATS[form].write(taken, folder)
        assert not list(folder.iterdir())
        return
    usage = FORMATS[form].write(taken, folder)
    differences = FORMATS[form].differences(taken, folder)
    assert {"image features", "text features"} <= differences.keys()
    assert max(differences.values()) < 1e-5, differences
    assert ("logit bias" in differences) == (model == "sigmoid" and form in ("open_clip", "onnx"))
    assert ("trust_remote_code" in usage) == (form == "sentence_transformers" and model in REFUSED["huggingface"])


@pytest.mark.parametrize("form", FORMATS)
def test_a_difference_is_seen(form: str, tmp_path: Path) -> None:
    taken = exported("default", tmp_path)
    FORMATS[form].write(taken, tmp_path)
    with torch.no_grad():
        for tower in taken.model.towers.values():
            for parameter in tower.projection.parameters():  # type: ignore[union-attr]
                parameter += 0.01 * torch.randn_like(parameter)
        taken.model.logit_scale += 0.01
    differences = FORMATS[form].differences(taken, tmp_path)
    assert form == "sentence_transformers" or differences["logit scale"] > 1e-3
    assert differences["image features"] > 1e-4
    assert differences["text features"] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("model", ["default", "resnet"])
@pytest.mark.parametrize("form", FORMATS)
def test_what_a_card_says_gives_our_numbers(
    form: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if model in REFUSED[form]:
        return
    taken, folder = exported(model, tmp_path), tmp_path / "moved"
    folder.mkdir()
    usage = FORMATS[form].write(taken, folder)
    image = pictures()[1]
    image.save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "onnx_model", raising=False)
    found: dict[str, Any] = {}
    with torch.no_grad():
        exec(usage.replace("FOLDER", str(folder)), found)
        pixels = taken.readers["image"].preprocessor(Image.open("a.jpg"), None)[None]
        ids = torch.stack([taken.text(text, None) for text in ("a photo of a cat", "a photo of a dog")])
        cosines = taken.model.encode("image", pixels) @ taken.model.encode("text", ids).T
    theirs = torch.as_tensor(found["probabilities" if form == "huggingface" else "cosines"])
    ours = (taken.logit_scale * cosines).softmax(-1) if form == "huggingface" else cosines
    torch.testing.assert_close(theirs.float(), ours, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_onnx_program_needs_nothing_of_ours(tmp_path: Path) -> None:
    taken = exported("default", tmp_path)
    Onnx().write(taken, tmp_path)
    code = (
        "import sys\n"
        "from onnx_model import ImageTextModel\n"
        "from PIL import Image\n"
        "Image.new('RGB', (50, 40), 'red').save('a.png')\n"
        "model = ImageTextModel(batch_size=2)\n"
        "print((model.encode_image(['a.png']) @ model.encode_text(['a', 'b', 'c']).T).shape)\n"
        "assert not {'torch', 'multimodal', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["(1,", "3)"]


def test_the_card_says_what_the_model_is(tmp_path: Path) -> None:
    taken = exported("default", tmp_path)
    write_card(taken, tmp_path, "open_clip", "import open_clip", {"pixels": 1e-7})
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "open_clip"
    for told in (
        "eval/shapes/top1 | 0.5000",
        "ViT",
        "TextTransformer",
        "torch | 2.15.0",
        "pixels | 1.0e-07",
        "8 steps",
    ):
        assert told in card
    write_card(exported("bert", tmp_path), tmp_path, "onnx", "import onnxruntime", {"pixels": 1e-7})
    card = (tmp_path / "README.md").read_text()
    assert "name: bert" in card
    assert str(tmp_path) not in card


@pytest.mark.parametrize("knob", ["projection=linear_bias", "pool=max"])
def test_what_open_clip_fails_at_is_refused_before(knob: str, tmp_path: Path) -> None:
    taken = exported("bert", tmp_path, f"towers.text.{knob}")
    with pytest.raises(ValueError, match="cannot have"):
        to_open_clip(taken.config.towers, taken.config.model, taken.text.encoding)


def test_metrics_of_a_card_are_those_of_its_checkpoint(tmp_path: Path) -> None:
    metrics = ("evals=[shapes]", "evals.shapes.every=4steps", "evals.shapes.dataset.size=80", "checkpoint.every=4steps")
    config = check(composed(*[w for w in TINY if w != "evals=[]"], *metrics, f"paths.runs={tmp_path}"), TrainConfig)
    Trainer(config).run()
    rows = [yaml.safe_load(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    for step in (4, 8):
        record = read_record(tmp_path / "tiny", tmp_path / "tiny" / "checkpoints" / f"step-{step:08d}")
        wanted = {k: v for row in rows if row["step"] == step for k, v in row.items() if k.startswith("eval/")}
        assert record.step == step
        assert record.num_samples == 64
        assert record.metrics == wanted
        assert record.versions["torch"] == torch.__version__.split("+")[0]


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
    assert export("to=open_clip", "overwrite=true").returncode == 0
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years")
    refused = export("to=open_clip", "overwrite=true", f"out={tmp_path / 'precious'}")
    assert refused.returncode == 1
    assert "no export of ours" in refused.stderr
    assert (tmp_path / "precious" / "thesis.txt").exists()
    (tmp_path / "tiny" / "checkpoints" / "step-00000008" / "x.pkl").write_bytes(b"")
    refused = export("to=onnx")
    assert refused.returncode == 1
    assert "may hold code" in refused.stderr
    assert "Traceback" not in refused.stderr
