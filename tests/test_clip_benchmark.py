"""Laws of data sets in the form of CLIP_benchmark: what its exporter writes is what is read."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multimodal.data.clip_benchmark import ClipBenchmark
from multimodal.data.shapes import Shapes
from multimodal.parts import BadSample

NAMES = ("red thing", "blue thing", "T-shirt/top")
TEMPLATES = ("a photo of a {c}.", "the {c} over there")
KINDS = {"classification": None, "multilabel": "multilabel", "retrieval": "retrieval"}


def picture(index):
    return Shapes(size=16, image_size=32).build(Path())[index].inputs["image"]


def encoded(image, file_format):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **({"lossless": True} if file_format == "WEBP" else {}))
    return buffer.getvalue()


def array(values):
    buffer = io.BytesIO()
    np.save(buffer, np.array(values))
    return buffer.getvalue()


MEMBERS = {
    "classification": {"cls": lambda index: str(index % 3).encode()},
    "multilabel": {"npy": lambda index: array([index % 2, 0, int(index > 2)])},
    "retrieval": {"txt": lambda index: f"caption {index}\n another one \n\n".encode()},
}


def write_shard(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def samples(kind, indices, file_format="WEBP", suffix="webp"):
    found = {}
    for index in indices:
        for ending, make in MEMBERS[kind].items():
            found[f"s{index:07d}.{ending}"] = make(index)
        found[f"s{index:07d}.{suffix}"] = encoded(picture(index), file_format)
    return found


def write(root, kind="classification", split="test", names=NAMES, templates=TEMPLATES, shards=2, **options):
    """A folder as `clip_benchmark_export_wds` leaves it; five samples."""
    folder = root / "wds_things"
    (folder / split).mkdir(parents=True, exist_ok=True)
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(names) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(templates) + "\n")
    if KINDS[kind]:
        (folder / "dataset_type.txt").write_text(KINDS[kind] + "\n")
    (folder / split / "nshards.txt").write_text(f"{shards}\n")
    for number, indices in enumerate((range(3), range(3, 5))[:shards]):
        write_shard(folder / split / f"{number}.tar", samples(kind, indices, **options))
    return folder


def opened(root, **knobs):
    return ClipBenchmark(path="wds_things", **knobs).build(root)


@pytest.mark.parametrize(
    ("file_format", "suffix"), [("WEBP", "webp"), ("PNG", "png"), ("JPEG", "jpg"), ("JPEG", "jpeg")]
)
def test_images_labels_names_and_templates_are_those_of_the_files(tmp_path, file_format, suffix):
    write(tmp_path, file_format=file_format, suffix=suffix)
    source = opened(tmp_path)
    assert len(source) == 5
    assert source.class_names == NAMES
    assert source.templates == ("a photo of a {}.", "the {} over there")
    assert [source.label(i) for i in range(5)] == [0, 1, 2, 0, 1] == [source[i].label for i in range(5)]
    assert source.captions(2) == ("a photo of a T-shirt/top.", "the T-shirt/top over there")
    assert source.key(3) == "1.tar/s0000003"
    for index in (4, 0):
        wanted = Image.open(io.BytesIO(encoded(picture(index), file_format))).convert("RGB")
        np.testing.assert_array_equal(np.asarray(source[index].inputs["image"]), np.asarray(wanted))


def test_a_vector_of_classes_is_the_places_of_its_ones(tmp_path):
    write(tmp_path, "multilabel")
    source = opened(tmp_path)
    assert [source.labels_of(i) for i in range(5)] == [(), (0,), (), (0, 2), (2,)]
    assert [source.label(i) for i in range(5)] == [None] * 5 == [source[i].label for i in range(5)]
    assert source.captions(3) == (
        "a photo of a red thing.",
        "the red thing over there",
        "a photo of a T-shirt/top.",
        "the T-shirt/top over there",
    )
    assert source.class_names == NAMES
    assert source.templates == ("a photo of a {}.", "the {} over there")


def test_captions_are_the_lines_of_the_text(tmp_path):
    write(tmp_path, "retrieval")
    source = opened(tmp_path)
    assert source.captions(4) == ("caption 4", "another one") == source[4].inputs["text"]
    assert (source.class_names, source.templates, source.label(0)) == ((), (), None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_source_travels_to_other_processes(tmp_path, kind):
    write(tmp_path, kind)
    source = opened(tmp_path)
    other = pickle.loads(pickle.dumps(source))
    assert (other.key(4), other.captions(4), other.labels_of(4)) == (
        source.key(4),
        source.captions(4),
        source.labels_of(4),
    )
    assert np.array_equal(other[4].inputs["image"], source[4].inputs["image"])


def test_splits_are_folders(tmp_path):
    write(tmp_path)
    write(tmp_path, split="train", shards=1)
    assert (len(opened(tmp_path)), len(opened(tmp_path, split="train"))) == (5, 3)
    with pytest.raises(FileNotFoundError, match=r"no split 'val' in .*wds_things', which has test, train"):
        opened(tmp_path, split="val")
    with pytest.raises(ValueError, match="name of a folder"):
        ClipBenchmark(path="x", split="../elsewhere")


def test_a_broken_image_is_a_bad_sample_and_no_error_before_the_run(tmp_path):
    folder = write(tmp_path, shards=1)
    write_shard(folder / "test/0.tar", {"a.png": b"not an image", "a.cls": b"1"})
    source = opened(tmp_path)
    assert source.label(0) == 1
    with pytest.raises(BadSample, match=r"0\.tar/a: not an image"):
        source[0]


def change(name, text):
    return lambda folder: (folder / name).write_text(text)


def lose(name):
    return lambda folder: (folder / name).unlink()


def put(members):
    return lambda folder: write_shard(folder / "test/1.tar", members)


PNG = encoded(picture(0), "PNG")


@pytest.mark.parametrize(
    ("kind", "damage", "message"),
    [
        ("classification", lose("classnames.txt"), "no file .*classnames.txt"),
        ("multilabel", lose("zeroshot_classification_templates.txt"), "no file .*templates.txt"),
        ("classification", lose("test/nshards.txt"), "nshards.txt"),
        ("classification", lose("test/1.tar"), "says 2 shards, from 0.tar on, but 1 are there: 1.tar is missing"),
        ("classification", change("test/nshards.txt", "1"), "says 1 shards.*but 2 are there: 1.tar is not one of them"),
        ("classification", change("test/nshards.txt", "two"), "should be the number of shards, it is 'two'"),
        ("classification", change("test/nshards.txt", "0"), "should be the number of shards, it is '0'"),
        ("classification", change("classnames.txt", "one\ntwo\n"), r"0.tar/s0000002.cls is 2, beyond the 2 names"),
        ("classification", change("classnames.txt", "one\n\nthree\n"), "`class_names` is empty for the label 1"),
        ("classification", change("classnames.txt", "\n"), "classnames.txt is empty"),
        (
            "classification",
            change("zeroshot_classification_templates.txt", "a photo\n"),
            r"line 1: .*\{\} exactly once",
        ),
        ("classification", change("dataset_type.txt", "retreival"), "it says 'retreival'.*mean 'retrieval'"),
        (
            "classification",
            change("dataset_type.txt", "retrieval"),
            r"no key.txt .*it has key.cls, as 'classification'",
        ),
        ("classification", put({"a.png": PNG}), "1.tar/a: no key.cls beside its image.*1 of 4 images"),
        ("classification", put({"a.png": PNG, "a.cls": b"cat"}), "1.tar/a.cls should be an integer, got 'cat'"),
        ("classification", put({"a.png": PNG, "a.cls": b"-1"}), "1.tar/a.cls is -1"),
        ("classification", put({"a.cls": b"1"}), "no image"),
        ("multilabel", put({"a.png": PNG, "a.npy": array([1, 0])}), r"a.npy has the shape \[2\], should be \[3\]"),
        ("multilabel", put({"a.png": PNG, "a.npy": array([1, 0, 3])}), "a.npy should be 0 or 1 for each class, got 3"),
        ("multilabel", put({"a.png": PNG, "a.npy": b"junk"}), "1.tar/a.npy is not a NumPy array"),
        ("multilabel", put({"a.png": PNG, "a.npy": array([{}] * 3)}), "1.tar/a.npy is not a NumPy array"),
        ("retrieval", put({"a.png": PNG, "a.txt": b" \n \n"}), "1.tar/a.txt has no caption"),
        ("retrieval", put({"a.png": PNG, "a.txt": b"\xff"}), "1.tar/a.txt is not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_before_the_run(tmp_path, kind, damage, message):
    damage(write(tmp_path, kind))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        opened(tmp_path)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder 'wds_things' below"):
        opened(tmp_path)


@pytest.mark.skipif("MULTIMODAL_DATASETS" not in os.environ, reason="needs the files of data sets")
def test_every_list_of_names_and_templates_of_clip_benchmark_is_read_as_it_is(tmp_path):
    with tarfile.open(Path(os.environ["MULTIMODAL_DATASETS"]) / "prompts.tar.gz") as tar:
        lists = {
            Path(member.name).stem: json.load(tar.extractfile(member))
            for member in tar
            if Path(member.name).name.startswith("clip_benchmark_en")
        }
    names, templates = lists["clip_benchmark_en_classnames"], lists["clip_benchmark_en_templates"]
    shared = [key for key in names if isinstance(templates.get(key), list) and len(names[key]) > 2]
    assert len(shared) > 5
    for key in shared:
        write(tmp_path, names=names[key], templates=templates[key])
        if "" in names[key]:  # one of CLEVR's, whose prompt would say nothing of the class
            with pytest.raises(ValueError, match="`class_names` is empty for the label"):
                opened(tmp_path)
            continue
        source = opened(tmp_path)
        assert source.class_names == tuple(name.strip() for name in names[key])
        assert [t.replace("{}", "{c}") for t in source.templates] == [t.strip() for t in templates[key]]
