"""The laws of embedding and classifying files: nothing is lost, stopped is continued, formats hold the same."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY, composed
from PIL import Image

import multimodal
from multimodal import embeddings
from multimodal.cli import CONF
from multimodal.config import TrainConfig, check
from multimodal.trainer import Trainer

FACTS = {"run": "tiny", "checkpoint": "step-00000008", "source": "here"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = check(composed(*TINY, f"paths.runs={tmp_path_factory.mktemp('runs')}"), TrainConfig)
    Trainer(config).run()
    return config.folder


@pytest.fixture(scope="module")
def model(run: Path) -> multimodal.ImageTextModel:
    return multimodal.load(run, device="cpu")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "below").mkdir(parents=True)
    noise = np.random.default_rng(0)
    for place in range(10):
        picture = Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.save(folder / ("below" if place % 3 else "") / f"{place}.png")
    (folder / "5.png").write_text("no image")
    (folder / "notes.txt").write_text("not looked at")
    return folder


def embed(model: multimodal.ImageTextModel, images: Path, out: Path, kind: Any = "npy", **facts: Any) -> Path:
    paths = embeddings.find_images(images)
    ids = [str(path.relative_to(images)) for path in paths]
    return embeddings.embed(model, paths, ids, out, kind, 3, {**FACTS, **facts})


def test_images_are_found_at_any_depth_in_order(images: Path) -> None:
    found = embeddings.find_images(images)
    assert len(found) == 11
    assert found == sorted(found)
    assert embeddings.find_images(found[0]) == [found[0]]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        embeddings.find_images(images / "nowhere")
    (images / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        embeddings.find_images(images / "empty")


def test_rows_are_the_model_s_with_their_ids_and_what_is_unreadable_is_marked(
    model: multimodal.ImageTextModel, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = np.load(embed(model, images, tmp_path / "out"))
    ids = json.loads((tmp_path / "out.ids.json").read_text())
    broken = ids.index("5.png")
    assert "5.png" in caplog.text
    assert np.isnan(rows[broken]).all()
    for place, name in enumerate(ids):
        if place != broken:
            expected = model.encode_image(images / name)[0].numpy()
            np.testing.assert_allclose(rows[place], expected, rtol=0, atol=1e-6)
    assert not (tmp_path / "out.parts").exists()


def test_parquet_and_npy_hold_the_same(model: multimodal.ImageTextModel, images: Path, tmp_path: Path) -> None:
    rows = np.load(embed(model, images, tmp_path / "out"))
    table = pq.read_table(embed(model, images, tmp_path / "out", "parquet"))
    assert table["id"].to_pylist() == json.loads((tmp_path / "out.ids.json").read_text())
    for row, stored in zip(rows, table["embedding"].to_pylist(), strict=True):
        assert stored is None if np.isnan(row).any() else row.tolist() == stored


def test_what_was_stopped_is_continued_and_ends_as_if_it_had_not_been(
    model: multimodal.ImageTextModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.load(embed(model, images, tmp_path / "whole"))
    encode, calls = embeddings._encode, 0

    def stop_at_the_third(*args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(embeddings, "_encode", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(model, images, tmp_path / "out")
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(ValueError, match=r"checkpoint: step-00000008 -> step-00000009"):
        embed(model, images, tmp_path / "out", checkpoint="step-00000009")
    calls = 10
    rows = np.load(embed(model, images, tmp_path / "out"))
    assert calls == 12
    np.testing.assert_array_equal(rows, whole)


def launched(script: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONF.parent / "scripts" / script), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_the_programs_do_as_the_model_does(run: Path, model: multimodal.ImageTextModel, images: Path) -> None:
    common = [f"run={run.name}", f"paths.runs={run.parent}", "device=cpu"]
    out = images.parent / "found, with=signs.csv"
    done = launched("classify.py", *common, f"images={images}", "classes=red circle,blue square", f"out={out}")
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 11
    for row in rows:
        if row["error"]:
            assert row["path"].endswith("5.png")
            continue
        probabilities = model.classify(row["path"], ["red circle", "blue square"])[0]
        assert float(row["red circle"]) == pytest.approx(probabilities[0].item(), abs=1e-4)
        assert row["class"] == ["red circle", "blue square"][int(probabilities.argmax())]
    texts = images.parent / "captions.txt"
    texts.write_text("a red circle\ntwo blue squares\n")
    done = launched("embed.py", *common, f"source={texts}", "format=npy")
    assert done.returncode == 0, done.stderr
    (file,) = (run / "embeddings").glob("step-00000008-captions-*.npy")
    written = np.load(file)
    np.testing.assert_allclose(written, model.encode_text(texts.read_text().splitlines()).numpy(), rtol=0, atol=1e-6)
    done = launched("embed.py", *common, "source=nowhere")
    assert done.returncode == 1
    assert "source: there is no image or folder of images 'nowhere'" in done.stderr


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 16, 16, 3), dtype=np.uint8)
    for place, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{place:05d}.png")
    code = f"""
import resource, multimodal
from pathlib import Path
from multimodal.embeddings import embed, find_images
model = multimodal.load({str(run)!r}, device="cpu")
paths = find_images(Path({str(folder)!r}))
for count in (2_000, 10_000):
    ids = [path.name for path in paths[:count]]
    embed(model, paths[:count], ids, Path({str(tmp_path)!r}) / str(count), "parquet", 500, {{}})
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 30, f"{few} MiB at 2,000 images, {many} MiB at 10,000"
    assert pq.read_metadata(tmp_path / "10000.parquet").num_rows == 10_000
