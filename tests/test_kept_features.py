"""The laws of frozen towers in training, and of features that are computed once."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY, TinyConfig, composed
from PIL import Image
from safetensors.torch import load_file

from multimodal import checkpoint
from multimodal.config import ConfigError, RunError, TrainConfig, check
from multimodal.dry_run import dry_run
from multimodal.kept_features import KeptFeatures
from multimodal.parts import BadSample, Sample
from multimodal.trainer import Trainer

FROZEN = ("towers.image.tuning.frozen=tower", "towers.image.patch_dropout=0.5")
KEPT = (*FROZEN, "towers.image.tuning.keep_features=true")


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_frozen_tower_has_no_gradients_and_does_not_change(tiny_config: TinyConfig) -> None:
    config = tiny_config(*FROZEN)
    trainer = Trainer(config)
    trainer._assemble(None)
    before = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    features = trainer.model.train()(next(trainer_batches(trainer)).inputs)
    torch.stack([tensor.sum() for tensor in features.values()]).sum().backward()
    image = trainer.model.towers["image"]
    assert all(p.grad is None for name, p in image.named_parameters() if not name.startswith("projection"))
    assert image.projection.weight.grad is not None  # type: ignore[union-attr]
    trainer.run()
    after = load_file(checkpoint.find(config.folder) / "model.safetensors")
    for name, weight in before.items():
        frozen = name.startswith("towers.image.net")
        assert torch.equal(after[name], weight) == (frozen or name.endswith("num_batches_tracked")), name


def trainer_batches(trainer: Trainer) -> Any:
    trainer.kept = {}
    return trainer._batches()


@pytest.mark.parametrize("workers", [0, 1])
def test_training_on_kept_features_is_training_on_images(tiny_config: TinyConfig, workers: int) -> None:
    plain, kept = tiny_config(*FROZEN, "run.name=plain"), tiny_config(*KEPT, "run.name=kept", f"workers={workers}")
    Trainer(plain).run()
    Trainer(kept).run()
    for ours, theirs in zip(rows(kept.folder), rows(plain.folder), strict=True):
        for key in ("train/loss", "train/grad_norm", "train/truncated_captions"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5)
    weights = [load_file(checkpoint.find(c.folder) / "model.safetensors") for c in (plain, kept)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=0, atol=1e-5)


def test_features_are_computed_once(tiny_config: TinyConfig) -> None:
    config = tiny_config(*KEPT)
    Trainer(config).run()
    path = config.folder / "features" / "image.npy"
    assert np.load(path).shape == (64, 32)
    assert np.isfinite(np.load(path)).all()
    made = path.stat().st_mtime_ns
    Trainer(tiny_config(*KEPT, "duration=9steps")).run()
    assert path.stat().st_mtime_ns == made
    path.with_suffix(".json").write_text("{}")
    Trainer(tiny_config(*KEPT, "duration=10steps")).run()
    assert path.stat().st_mtime_ns > made


def image_folder(folder: Path, shade: int) -> Path:
    for place in range(64):
        image = Image.new("RGB", (8, 8), (shade, place, 0))
        image.save((folder / "class" / f"{place:02d}.png").as_posix())
    return folder


def test_features_are_computed_again_when_the_data_are_others(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name / "pets" / "class").mkdir(parents=True)
        image_folder(tmp_path / name / "pets", 0 if name == "one" else 200)
    folder = ("dataset=image_folder", "dataset.path=pets", "dataset.templates=['a {}']")
    base = [word for word in TINY if not word.startswith("dataset.")]

    def trained(place: str, duration: int) -> int:
        places = (f"paths.datasets={tmp_path / place}", f"paths.runs={tmp_path / 'runs'}")
        config = check(composed(*base, *KEPT, *folder, *places, f"duration={duration}steps"), TrainConfig)
        Trainer(config).run()
        return (config.folder / "features" / "image.npy").stat().st_mtime_ns

    first = trained("one", 8)
    assert trained("one", 9) == first
    assert trained("two", 10) > first


def test_features_that_are_not_finite_stop_the_run(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(tiny_config(*KEPT))
    trainer._assemble(None)
    with torch.no_grad():
        trainer.model.towers["image"].net.ln_post.weight[0] = torch.nan  # type: ignore[union-attr]
    with pytest.raises(RunError, match="tower image makes features that are not finite"):
        trainer._train()


def test_images_are_not_read_again(tiny_config: TinyConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(*KEPT)
    trainer = Trainer(config)
    trainer._assemble(None)
    source = type(trainer.source)
    original, read = source.__getitem__, list[int]()

    def counted(self: Any, index: int) -> Sample:
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(source, "__getitem__", counted)
    trainer._train()
    probed = list(range(0, 64, 4))
    assert sorted(read) == sorted([*range(64), *probed])


def test_kept_features_are_mapped_where_they_arrive_and_not_sent(tmp_path: Path) -> None:
    np.save(tmp_path / "image.npy", np.arange(40_000, dtype=np.float32).reshape(1000, 40))
    sent = pickle.dumps(KeptFeatures(tmp_path / "image.npy"))
    assert len(sent) < 1000
    assert pickle.loads(sent)(3).tolist() == list(range(120, 160))


def test_a_sample_that_was_broken_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "image.npy"
    np.save(path, np.array([[1, 2], [np.nan, np.nan]], dtype=np.float32))
    kept = KeptFeatures(path)
    assert kept(0).tolist() == [1, 2]
    with pytest.raises(BadSample, match="sample 1"):
        kept(1)


def test_features_that_would_differ_each_time_are_not_kept(tiny_config: TinyConfig) -> None:
    with pytest.raises(ConfigError, match=r"towers\.image\.tuning\.keep_features.*augment=none"):
        tiny_config(*KEPT, "augment=crop")
    several = tiny_config("towers.text.tuning.frozen=tower", "towers.text.tuning.keep_features=true")
    for start in (lambda: Trainer(several).run(), lambda: dry_run(several)):
        with pytest.raises(ConfigError, match=r"towers\.text\.tuning\.keep_features.*several captions"):
            start()
    assert not several.folder.exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("towers.image.tuning.keep_features=true",), "needs a wholly frozen tower"),
        (("towers.image.tuning.unfrozen_blocks=1",), "frozen is none"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tiny_config: TinyConfig, overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(*overrides)


def test_captions_that_are_cut_are_counted(tiny_config: TinyConfig) -> None:
    config = tiny_config("towers.text.context_length=5", "workers=1")
    Trainer(config).run()
    assert rows(config.folder)[-1]["train/truncated_captions"] == 8 * 16


def test_captions_that_are_too_long_may_be_refused(tiny_config: TinyConfig) -> None:
    config = tiny_config("towers.text.context_length=5", "towers.text.too_long=refuse")
    with pytest.raises(BadSample, match=r"caption of \d+ tokens, more than context_length=5"):
        Trainer(config).run()
