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
from programs import composed_of, config_of

import multimodal
from multimodal.cli import CONF
from multimodal.config import ConfigError, RunError, TrainConfig, check
from multimodal.data.files import ImageFiles
from multimodal.data.manifest import Manifest
from multimodal.embeddings import Embeddings, Rows, from_dataset, from_path
from multimodal.trainer import Trainer

FACTS = {"run": "tiny", "checkpoint": "step-00000008"}


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


def embed(
    model: multimodal.ImageTextModel, rows: Rows, out: Path, kind: Any = "npy", chunk: int = 3, **facts: Any
) -> Path:
    embeddings = Embeddings(out, kind, rows, {**FACTS, **facts})
    if not embeddings.are_written():
        embeddings.write(model, rows.reads, chunk)
    return embeddings.target


def test_images_are_found_at_any_depth_in_order(images: Path) -> None:
    (images / "jpg").write_text("without an ending")
    found = ImageFiles(images)
    assert len(found) == 11
    assert list(found.names) == sorted(found.names)
    assert set(found) == set(images.rglob("*.png"))
    assert list(ImageFiles(found[0])) == [found[0]]
    with pytest.raises(FileNotFoundError, match="nowhere"):
        ImageFiles(images / "nowhere")
    (images / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        ImageFiles(images / "empty")


@pytest.mark.parametrize("workers", [0, 1])
def test_rows_are_the_model_s_with_their_ids_and_what_is_unreadable_is_marked(
    run: Path, model: multimodal.ImageTextModel, images: Path, tmp_path: Path, workers: int, caplog: Any
) -> None:
    rows = np.load(embed(multimodal.load(run, device="cpu", workers=workers), from_path(images), tmp_path / "out"))
    ids = json.loads((tmp_path / "out.ids.json").read_text())
    broken = ids.index("5.png")
    assert caplog.messages == [f"{images / '5.png'}: not an image that Pillow can read"]
    assert np.isnan(rows[broken]).all()
    for place, name in enumerate(ids):
        if place != broken:
            expected = model.encode_image(images / name)[0].numpy()
            np.testing.assert_allclose(rows[place], expected, rtol=0, atol=1e-6)
    assert not (tmp_path / "out.parts").exists()


def test_parquet_and_npy_hold_the_same(model: multimodal.ImageTextModel, images: Path, tmp_path: Path) -> None:
    rows = np.load(embed(model, from_path(images), tmp_path / "one"))
    table = pq.read_table(embed(model, from_path(images), tmp_path / "two", "parquet"))
    assert rows.dtype == np.float32
    assert table["id"].to_pylist() == json.loads((tmp_path / "one.ids.json").read_text())
    for row, stored in zip(rows, table["embedding"].to_pylist(), strict=True):
        assert stored is None if np.isnan(row).any() else row.tolist() == stored


def test_what_was_stopped_is_continued_and_ends_as_if_it_had_not_been(
    model: multimodal.ImageTextModel, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = np.load(embed(model, from_path(images), tmp_path / "whole"))
    encode, calls = model.encode_readable, 0

    def stop_at_the_third(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode(*args)

    monkeypatch.setattr(model, "encode_readable", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed(model, from_path(images), tmp_path / "out")
    assert not (tmp_path / "out.npy").exists()
    with pytest.raises(ValueError, match=r"out\.parts holds other .*checkpoint: step-00000008 -> step-00000009"):
        embed(model, from_path(images), tmp_path / "out", checkpoint="step-00000009")
    calls = 10
    rows = np.load(embed(model, from_path(images), tmp_path / "out"))
    assert calls == 12
    np.testing.assert_array_equal(rows, whole)


def test_a_finished_file_is_passed_over_only_if_it_is_of_the_same(
    model: multimodal.ImageTextModel, images: Path, tmp_path: Path
) -> None:
    target = embed(model, from_path(images), tmp_path / "out")
    made = target.stat().st_mtime_ns
    assert embed(model, from_path(images), tmp_path / "out", chunk=5) == target
    assert target.stat().st_mtime_ns == made
    with pytest.raises(ValueError, match=r"out\.npy holds other embeddings \(run: tiny -> small\)"):
        embed(model, from_path(images), tmp_path / "out", run="small")
    (images / "9.png").rename(images / "renamed.png")
    with pytest.raises(ValueError, match=r"\(ids\)"):
        embed(model, from_path(images), tmp_path / "out")
    embed(model, from_path(images), tmp_path / "out", "parquet")  # tells nothing of the other one
    with pytest.raises(ValueError, match=r"\(ids\)"):
        embed(model, from_path(images), tmp_path / "out")
    (tmp_path / "out.npy.json").unlink()
    with pytest.raises(ValueError, match=r"without out\.npy\.json"):
        embed(model, from_path(images), tmp_path / "out")


def test_other_captions_in_the_same_file_are_something_else(model: multimodal.ImageTextModel, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text("a red circle\ntwo blue squares\n")
    rows = np.load(embed(model, from_path(file), tmp_path / "out"))
    np.testing.assert_allclose(rows, model.encode_text(["a red circle", "two blue squares"]).numpy(), atol=1e-6)
    file.write_text("a red circle\ntwo green squares\n")
    with pytest.raises(ValueError, match=r"\(texts\)"):
        embed(model, from_path(file), tmp_path / "out")
    for text, message in (("\n", "is empty"), (b"\xff", "is not UTF-8 text")):
        file.write_bytes(text.encode() if isinstance(text, str) else text)
        with pytest.raises(ValueError, match=message):
            from_path(file)
    with pytest.raises(FileNotFoundError, match=r"no file 'nowhere\.txt'"):
        from_path(Path("nowhere.txt"))


def test_a_model_that_gives_nan_is_not_taken_for_images_that_cannot_be_read(
    run: Path, images: Path, tmp_path: Path
) -> None:
    diverged = multimodal.load(run, device="cpu")
    for weight in diverged.model.parameters():
        weight.data.fill_(torch.nan)
    with pytest.raises(RunError, match=rf"{run.name}.*step-00000008 gives features that are not finite, for 2 of 3"):
        embed(diverged, from_path(images), tmp_path / "out")


# --- data sets ------------------------------------------------------------------------------------------------------


@pytest.fixture
def table(images: Path) -> Manifest:
    """Two captions, one, none; an image that is broken."""
    rows = [("0.png", "a circle"), ("0.png", "a square"), ("3.png", "a star"), ("6.png", " "), ("5.png", "a heart")]
    (images / "table.jsonl").write_text("\n".join(json.dumps({"image": i, "caption": c}) for i, c in rows))
    return Manifest(path="table.jsonl")


def test_the_images_of_a_dataset_are_rows_by_key_and_broken_samples_are_named(
    model: multimodal.ImageTextModel, images: Path, table: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = np.load(embed(model, from_dataset(table.build(images), "image", {}), tmp_path / "out"))
    assert json.loads((tmp_path / "out.ids.json").read_text()) == [f"table.jsonl/{n}.png" for n in (0, 3, 6, 5)]
    np.testing.assert_allclose(rows[:2], model.encode_image([images / "0.png", images / "3.png"]).numpy(), atol=1e-6)
    assert np.isnan(rows[2:]).all()
    assert [message.split(":")[0] for message in caplog.messages] == ["table.jsonl/6.png", "table.jsonl/5.png"]


def test_every_caption_of_a_dataset_is_a_row_by_key_and_number(
    model: multimodal.ImageTextModel, images: Path, table: Manifest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = table.build(images)
    rows = np.load(embed(model, from_dataset(source, "text", {}), tmp_path / "out", chunk=2))
    numbered = ["0.png#0", "0.png#1", "3.png#0", "6.png#0", "5.png#0"]
    assert json.loads((tmp_path / "out.ids.json").read_text()) == [f"table.jsonl/{name}" for name in numbered]
    texts = model.encode_text(["a circle", "a square", "a star", "a heart"]).numpy()
    np.testing.assert_allclose(rows[[0, 1, 2, 4]], texts, atol=1e-6)
    assert np.isnan(rows[3]).all()
    assert caplog.messages == ["table.jsonl/6.png: no caption, or only empty ones"]
    other = (images / "table.jsonl").read_text().replace("a star", "a ring")
    (images / "table.jsonl").write_text(other)
    with pytest.raises(ValueError, match=r"\(texts\)"):
        embed(model, from_dataset(table.build(images), "text", {}), tmp_path / "out")


# --- the programs ---------------------------------------------------------------------------------------------------


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
    (file,) = (run / "embeddings").glob("step-00000008-captions-text-*.npy")
    written = np.load(file)
    np.testing.assert_allclose(written, model.encode_text(texts.read_text().splitlines()).numpy(), rtol=0, atol=1e-6)
    (images / "table.csv").write_text("image,caption\n0.png,a red circle\n3.png,two blue squares\n")
    dataset = ["dataset=manifest", "dataset.path=table.csv", f"paths.datasets={images}"]
    done = launched("embed.py", *common, *dataset, "input=text", f"out={images.parent / 'of a table'}")
    assert done.returncode == 0, done.stderr
    stored = pq.read_table(images.parent / "of a table.parquet")
    assert stored["id"].to_pylist() == ["table.csv/0.png#0", "table.csv/3.png#0"]
    np.testing.assert_allclose(np.array(stored["embedding"].to_pylist()), written, rtol=0, atol=1e-6)
    done = launched("embed.py", *common, *dataset, "input=text", f"out={images.parent / 'of a table'}")
    assert "is there already" in done.stdout
    done = launched("embed.py", *common, *dataset, "input=image", f"out={images.parent / 'of a table'}")
    assert done.returncode == 1
    assert "out: " in done.stderr
    assert "holds other embeddings (tower: text -> image, " in done.stderr


@pytest.mark.parametrize(
    ("program", "words", "problems"),
    [
        ("embed", [], {"source": "no value given"}),
        ("embed", ["dataset=shapes", "source=x"], {"source": "beside a dataset", "input": "no value given"}),
        ("embed", ["source=x", "input=text"], {"input": "is about a dataset"}),
        ("embed", ["dataset=shards"], {"dataset.urls": "no value given", "input": "no value given"}),
        (
            "classify",
            ["images=nowhere", "classes=no.txt", "templates=none.txt"],
            {"images": "there is no image", "classes": "no file 'no.txt'", "templates": "no file 'none.txt'"},
        ),
        ("classify", ["images=nowhere", "classes='a,b,a'"], {"images": "", "classes": "2 classes are named 'a'"}),
    ],
)
def test_all_that_is_wrong_is_said_at_once_by_key(program: str, words: list[str], problems: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check(composed_of(program, "run=x", *words), config_of(program))
    found = dict(caught.value.problems)
    assert found.keys() == problems.keys()
    for key, problem in problems.items():
        assert problem in found[key]


@pytest.mark.parametrize("program", ["classify", "embed", "evaluate", "export"])
def test_a_program_s_yaml_says_every_field_and_no_other(program: str) -> None:
    assert composed_of(program, "run=x").keys() == config_of(program).model_fields.keys()


def test_classes_and_templates_are_a_word_or_a_list_or_a_file(images: Path) -> None:
    (images / "names.txt").write_text("a, b\n\nc\n")
    kind = config_of("classify")
    for words, classes, templates in (
        (["classes='cat, dog'", "templates='a {}, here'"], ("cat", "dog"), ("a {}, here",)),
        (["classes=[cat,dog]", "templates=['{}','a {}']"], ("cat", "dog"), ("{}", "a {}")),
        ([f"classes={images}/names.txt"], ("a, b", "c"), ("a photo of a {}.",)),
    ):
        config = check(composed_of("classify", "run=x", f"images={images}", *words), kind)
        assert (config.classes, config.templates) == (classes, templates)


@pytest.mark.slow
def test_rows_of_a_classification_come_in_one_piece_and_questions_do_not_meet(run: Path, images: Path) -> None:
    common = [f"run={run.name}", f"paths.runs={run.parent}", "device=cpu"]
    for place in range(60):
        (images / f"copy-{place}.png").write_bytes((images / "0.png").read_bytes())
    (images / "classes.txt").write_text("red circle\nblue, square\n")
    for classes in (f"{images}/classes.txt", "red circle,a ${b}'s square"):
        done = launched("classify.py", *common, f"images={images}", f"classes={classes}", "templates=a {}, on a table")
        assert done.returncode == 0, done.stderr
        assert len([line for line in done.stdout.splitlines() if ".png: " in line and "not an image" not in line]) <= 50
    files = sorted((run / "classified").iterdir())
    assert len(files) == 2
    headers = {tuple(next(csv.reader(file.open()))[3:5]) for file in files}
    assert headers == {("red circle", "blue, square"), ("red circle", "a ${b}'s square")}
    assert [len(file.read_text().splitlines()) for file in files] == [72, 72]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "npy"])
def test_memory_does_not_grow_with_the_number_of_images(run: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (10_000, 16, 16, 3), dtype=np.uint8)
    for place, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{place:05d}.png")
    code = f"""
import resource, sys, multimodal
from dataclasses import replace
from pathlib import Path
from multimodal.data.views import Slice
from multimodal.embeddings import Embeddings, from_path
model = multimodal.load({str(run)!r}, device="cpu")
rows = from_path(Path({str(folder)!r}))
for count in (2_000, 10_000):
    part = replace(rows, inputs=Slice(rows.inputs, range(count)), ids=Slice(rows.ids, range(count)))
    Embeddings(Path({str(tmp_path)!r}) / str(count), sys.argv[1], part, {{}}).write(model, "image", 500)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code, kind], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 30, f"{few} MiB at 2,000 images, {many} MiB at 10,000"
    assert (tmp_path / f"10000.{kind}").exists()
