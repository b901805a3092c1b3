"""Laws of the sources that read files: what was written is what is read, and what is wrong is named."""

import gzip
import io
import json
import multiprocessing
import os
import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from pydantic import ValidationError

from multimodal.data import tars
from multimodal.data.arrays import Arrays
from multimodal.data.files import locate
from multimodal.data.image_folder import ImageFolder
from multimodal.data.manifest import Manifest
from multimodal.data.shapes import Shapes
from multimodal.data.shards import Shards
from multimodal.parts import BadSample, Dataset, Source
from multimodal.resolve import resolve

CONF = Path(__file__).parents[1] / "conf"


def picture(seed: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_shard(path: Path, seeds: range) -> None:
    members = {}
    for seed in seeds:
        members[f"{seed:04}.png"] = encoded(picture(seed))
        members[f"{seed:04}.json"] = json.dumps({"captions": [f"picture {seed}", f"number {seed}"]}).encode()
        members[f"{seed:04}.txt"] = f"picture {seed}".encode()
    write_tar(path, members)


def pixels(source: Source, index: int) -> np.ndarray:
    image = source[index].inputs["image"]
    assert image.mode == "RGB"
    return np.asarray(image)


def refused(dataset: Dataset, root: Path, *words: str, error: type[Exception] = ValueError) -> str:
    """The message with which `dataset` refuses to open; it contains all `words`."""
    with pytest.raises(error) as caught:
        dataset.build(root)
    message = str(caught.value)
    assert not [word for word in words if word not in message], message
    return message


# --- shards ---------------------------------------------------------------------------------------------------------


def test_random_access_to_shards_equals_reading_the_tars_from_start_to_end(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-000.tar", range(5))
    write_shard(tmp_path / "a-001.tar", range(5, 8))
    sequential = []
    for name in ("a-000.tar", "a-001.tar"):
        with tarfile.open(tmp_path / name) as tar:
            files = {member.name: tar.extractfile(member).read() for member in tar}
        for member in (member for member in files if member.endswith(".png")):
            captions = tuple(json.loads(files[member.replace("png", "json")])["captions"])
            sequential.append((f"{name}/{member[:-4]}", np.asarray(Image.open(io.BytesIO(files[member]))), captions))
    source = Shards(urls="a-{000..001}.tar").build(tmp_path)
    assert len(source) == len(sequential) == 8
    for index in (7, 0, 5, 4, 1, 6, 3, 2):
        key, image, captions = sequential[index]
        assert (source[index].key, source[index].inputs["text"]) == (key, captions)
        np.testing.assert_array_equal(pixels(source, index), image)
    for outside in (8, -1):
        with pytest.raises(IndexError):
            source[outside]


def test_a_key_is_the_path_up_to_the_first_dot_and_its_members_may_lie_apart(tmp_path: Path) -> None:
    members = {
        "./one/a.b.txt": b"not a caption",
        "./one/a.PNG": encoded(picture(1)),
        "two/a.jpeg": encoded(picture(2), "JPEG"),
        "two/a.seg.png": b"not an image",
        "lone.txt": b"without an image",
        ".hidden.png": b"no key",
        "one/a.txt": b" first \n\n second\n",
        "two/a.txt": "\u00e9t\u00e9".encode(),
    }
    write_tar(tmp_path / "s.tar", members)
    source = Shards(urls=["s.tar"]).build(tmp_path)
    assert [source[i].key for i in range(len(source))] == ["s.tar/one/a", "s.tar/two/a"]
    assert [source.captions(i) for i in range(2)] == [("first", "second"), ("\u00e9t\u00e9",)]
    np.testing.assert_array_equal(pixels(source, 0), np.asarray(picture(1)))


def test_captions_come_from_the_json_field_or_else_from_the_text(tmp_path: Path) -> None:
    image = encoded(picture(0))
    members = {"a.png": image, "a.json": b'{"captions": "one", "title": ["x", " ", "y"]}', "a.txt": b"plain"}
    write_tar(tmp_path / "s.tar", members | {"b.png": image, "b.txt": b"only text"})
    read = {
        field: [Shards(urls="s.tar", json_field=field).build(tmp_path).captions(i) for i in range(2)]
        for field in ("captions", "title", None)
    }
    assert read == {
        "captions": [("one",), ("only text",)],
        "title": [("x", "y"), ("only text",)],
        None: [("plain",), ("only text",)],
    }


def test_a_json_field_that_is_not_there_is_refused_or_warned_of(tmp_path: Path) -> None:
    members = {"a.png": encoded(picture(0)), "a.json": b'{"caption": "one", "url": "x"}'}
    write_tar(tmp_path / "s.tar", members)
    refused(Shards(urls="s.tar"), tmp_path, "s.tar/a.json", "'captions'", "caption, url", "Did you mean 'caption'?")
    write_tar(tmp_path / "t.tar", members | {"a.txt": b"plain"})
    with pytest.warns(UserWarning, match=r"t.tar/a.json has no field 'captions'.*from .txt"):
        source = Shards(urls="t.tar").build(tmp_path)
    assert source.captions(0) == ("plain",)


def test_all_missing_shards_are_named_at_once(tmp_path: Path) -> None:
    write_shard(tmp_path / "a-1.tar", range(1))
    message = refused(Shards(urls=["a-{0..2}.tar", "b.tar"]), tmp_path, str(tmp_path), error=FileNotFoundError)
    assert message.startswith("3 of 4 files")
    assert message.endswith("a-0.tar, a-2.tar, b.tar")


def test_shards_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    write_shard(tmp_path / "whole.tar", range(2))
    whole = (tmp_path / "whole.tar").read_bytes()
    with tarfile.open(tmp_path / "whole.tar") as tar:
        last = tar.getmembers()[-1]
    broken_header = bytearray(whole)
    broken_header[last.offset : last.offset + 10] = b"\xff" * 10
    contents = {
        "in-data.tar": whole[:700],
        "in-padding.tar": whole[: last.offset_data + last.size + 1],
        "in-header.tar": whole[: last.offset + 100],
        "between-members.tar": whole[: last.offset],
        "broken-header.tar": bytes(broken_header),
        "empty.tar": b"",
        "noise.tar": b"noise" * 1000,
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(Shards(urls=name), tmp_path, f"{tmp_path / name}: not a whole tar file")
    (tmp_path / "c.tar").write_bytes(gzip.compress(whole))
    refused(Shards(urls="c.tar"), tmp_path, f"{tmp_path / 'c.tar'}: compressed with gzip", "unpack")
    write_tar(tmp_path / "t.tar", {"a.txt": b"text"})
    refused(Shards(urls=["whole.tar", "t.tar"]), tmp_path, f"{tmp_path / 't.tar'}: no image")
    write_tar(tmp_path / "i.tar", {"a.png": b"image"})
    refused(Shards(urls="i.tar"), tmp_path, f"{tmp_path / 'i.tar'}: no captions")


def test_a_broken_sample_names_its_shard_and_key_and_spoils_no_other(tmp_path: Path) -> None:
    image, noise = encoded(picture(0)), encoded(picture(0, (64, 64)), "JPEG")
    members = {
        "fine.png": image,
        "fine.txt": b"\n a caption\n ",
        "cut.jpg": noise[: len(noise) // 2],
        "cut.txt": b"cut",
        "text.png": b"no image",
        "text.txt": b"text",
        "blank.png": image,
        "blank.txt": b" \n ",
        "mute.png": image,
        "bytes.png": image,
        "bytes.txt": b"\xff\xfe",
        "json.png": image,
        "json.json": b'{"captions": ',
        "list.png": image,
        "list.json": b'["captions"]',
        "number.png": image,
        "number.json": b'{"captions": ["x", 3]}',
    }
    write_tar(tmp_path / "s.tar", members)
    source = Shards(urls="s.tar").build(tmp_path)
    wrong = {
        "cut": "truncated",
        "text": "not an image",
        "blank": "no caption",
        "mute": "no caption",
        "bytes": "utf-8",
        "json": "line 1 column 14",
        "list": "not a mapping",
        "number": "string or a list of strings",
    }
    assert source[0].inputs["text"] == source.captions(0) == ("a caption",)
    for index, (key, reason) in enumerate(wrong.items(), start=1):
        with pytest.raises(BadSample, match=rf"^s\.tar/{key}: .*{reason}"):
            source[index]
    assert [source.captions(i) for i in range(1, 9)] == [("cut",), ("text",), *[()] * 6]


def test_a_key_is_told_without_reading_its_sample(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", range(3))
    (tmp_path / "classes" / "cat").mkdir(parents=True)
    picture(0).save(tmp_path / "classes" / "cat" / "0.png")
    (tmp_path / "m.csv").write_text("image,caption\nclasses/cat/0.png,a cat\n")
    np.savez(tmp_path / "a.npz", image=np.zeros((2, 8, 8), np.uint8), label=[0, 0], class_names=["cat"])
    for dataset in (
        Shards(urls=("s.tar",)),
        ImageFolder(path="classes"),
        Manifest(path="m.csv"),
        Arrays(path="a.npz"),
        Shapes(size=3),
    ):
        source = dataset.build(tmp_path)
        assert [source.key(index) for index in range(len(source))] == [source[i].key for i in range(len(source))]
    (tmp_path / "classes" / "cat" / "0.png").write_text("broken")
    assert ImageFolder(path="classes").build(tmp_path).key(0) == "classes/cat/0.png"
    assert Shapes(size=3).build(tmp_path).key(2) == "shapes/train/2"


def test_a_decompression_bomb_is_a_bad_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "s.tar", range(1))
    source = Shards(urls="s.tar").build(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(BadSample, match=r"^s\.tar/0000: .*bomb"):
        source[0]


def test_maps_are_opened_by_use_and_never_more_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tars, "MAX_MAPS", 2)
    for number in range(4):
        write_shard(tmp_path / f"{number}.tar", range(number, number + 1))
    source = Shards(urls="{0..3}.tar").build(tmp_path)
    for index in (0, 1, 2, 3, 0, 3, 1):
        assert source.captions(index)[0] == f"picture {index}"
        assert len(source.tars.maps) <= 2


@pytest.mark.parametrize(
    ("urls", "word"), [([], "at least 1"), ("a-{0..3.tar", "brace"), ([3], "string"), (3, "tuple")]
)
def test_urls_are_checked_before_any_file_is_looked_for(urls: object, word: str) -> None:
    with pytest.raises(ValidationError, match=word):
        Shards(urls=urls)


# --- arrays ---------------------------------------------------------------------------------------------------------

NAMES = np.array(["cat", "sea_lion"])


def save(path: Path, **arrays: object) -> Arrays:
    np.savez(path, **arrays)
    return Arrays(path=path.name)


def test_both_layouts_of_arrays_give_back_the_images(tmp_path: Path) -> None:
    images = np.stack([np.asarray(picture(seed)) for seed in range(3)])
    files = [encoded(Image.fromarray(image)) for image in images]
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    offset = np.cumsum([0, *map(len, files)])
    label = np.array([1, 0, 1], np.uint8)
    layouts = [
        save(tmp_path / "rgb.npz", image=images, label=label, class_names=NAMES),
        save(tmp_path / "jpeg.npz", jpeg=jpeg, offset=offset, label=label, class_names=NAMES),
    ]
    for dataset in layouts:
        source = dataset.build(tmp_path)
        assert (len(source), source.class_names) == (3, ("cat", "sea lion"))
        assert [source[i].label for i in range(3)] == [1, 0, 1]
        assert source[2].key == f"{dataset.path}/2"
        np.testing.assert_array_equal(np.stack([pixels(source, i) for i in range(3)]), images)
    gray = save(tmp_path / "gray.npz", image=images[..., 0], label=label, class_names=NAMES).build(tmp_path)
    np.testing.assert_array_equal(pixels(gray, 1), images[1, ..., :1].repeat(3, axis=2))


def test_captions_are_every_template_filled_in_with_the_class_name(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", image=np.zeros((2, 4, 4), np.uint8), label=np.array([1, 0]), class_names=NAMES)
    source = Arrays(path="a.npz", templates=["a {}", "{} on a chair"]).build(tmp_path)
    assert source[0].inputs["text"] == source.captions(0) == ("a sea lion", "sea lion on a chair")
    renamed = Arrays(path="a.npz", class_names=["dog", "hot_dog"]).build(tmp_path)
    assert renamed.class_names == ("dog", "hot dog")
    assert renamed.captions(0) == ("a photo of a hot dog.",)


@pytest.mark.parametrize("template", ["a photo", "{} and {}", "a {name}"])
@pytest.mark.parametrize("part", [Arrays, ImageFolder])
def test_a_template_without_exactly_one_slot_is_refused_at_its_place(part: type[Dataset], template: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(template)) as caught:
        part(path="x", templates=["a {}", template])
    assert caught.value.errors()[0]["loc"] == ("templates", 1)


def test_arrays_that_do_not_fit_are_refused_by_file_and_key(tmp_path: Path) -> None:
    image, label = np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 1])
    jpeg, offset = np.zeros(9, np.uint8), np.array([0, 4, 9])
    whole = {"image": image, "label": label, "class_names": NAMES}
    packed = {"jpeg": jpeg, "offset": offset, "label": label, "class_names": NAMES}
    wrong: list[tuple[dict[str, object], str]] = [
        ({"image": image, "lable": label, "class_names": NAMES}, "no array 'label'; it has image, lable, class_names"),
        ({"image": image, "label": label}, "no array 'class_names' or set the knob"),
        ({"label": label, "class_names": NAMES}, "no array 'image'"),
        ({"jpeg": jpeg, "label": label, "class_names": NAMES}, "no array 'offset'"),
        (whole | {"label": np.array([0, 2])}, "`label` 1 is 2, beyond the 2 class names"),
        (whole | {"label": np.array([-1, 0])}, "`label` 0 is -1"),
        (whole | {"label": np.array([0.0, 1.0])}, "`label` should be integers [N], got float64 [2]"),
        (whole | {"label": np.array([0])}, "`image` should be as long as `label` (1)"),
        (whole | {"class_names": np.array(["cat", "_"])}, "`class_names` is empty for the label 1"),
        (whole | {"class_names": np.array(["cat", "dog"], dtype=object)}, "'class_names' cannot be read"),
        (whole | {"image": image.astype(float)}, "`image` should be uint8"),
        (whole | {"image": image[..., :2]}, "`image` should be uint8 [N, H, W, 3]"),
        (packed | {"offset": offset[:2]}, "`offset` should be integers [3]"),
        (packed | {"offset": np.array([0, 10, 9])}, "`offset` should be rising"),
        (packed | {"offset": np.array([0, 4, 10])}, "within the 9 bytes"),
        (packed | {"offset": np.array([-1, 4, 9])}, "within the 9 bytes"),
    ]
    for number, (arrays, message) in enumerate(wrong):
        path = tmp_path / f"{number}.npz"
        refused(save(path, **arrays), tmp_path, f"{path}: ", message)
    with pytest.raises(BadSample, match=r"^packed\.npz/1: not an image"):
        save(tmp_path / "packed.npz", **packed).build(tmp_path)[1]
    (tmp_path / "text.npz").write_text("text")
    refused(Arrays(path="text.npz"), tmp_path, f"{tmp_path / 'text.npz'}: not an .npz")
    refused(Arrays(path="none.npz"), tmp_path, "none.npz", str(tmp_path), error=FileNotFoundError)


# --- manifest -------------------------------------------------------------------------------------------------------


def images_in(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        (folder / name).write_bytes(encoded(picture(seed)))


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_rows_with_the_same_image_make_one_sample_in_the_order_of_the_file(tmp_path: Path, separator: str) -> None:
    images_in(tmp_path / "set", "b.png", "a.png")
    rows = [
        ("image", "caption", "number"),
        ("b.png", '"one; a, b | c\td"', "1"),
        ("a.png", '"two\nlines"', "2"),
        ("b.png", " three ", "3"),
        ("b.png", " ", "4"),
    ]
    text = "\ufeff" + "\n".join(separator.join(row) for row in rows) + "\n\n"  # as spreadsheets write it
    (tmp_path / "set" / "m.csv").write_text(text, "utf-8")
    source = Manifest(path="set/m.csv").build(tmp_path)
    assert [source[i].key for i in range(len(source))] == ["m.csv/b.png", "m.csv/a.png"]
    assert [source.captions(i) for i in range(2)] == [("one; a, b | c\td", "three"), ("two\nlines",)]
    assert source[1].inputs["text"] == source.captions(1)
    np.testing.assert_array_equal(pixels(source, 0), np.asarray(picture(0)))


def test_json_lines_hold_one_caption_or_several(tmp_path: Path) -> None:
    images_in(tmp_path / "pictures", "a.png", "b.png")
    rows = [
        {"file": "a.png", "text": ["one", "", "two"]},
        {"file": "b.png", "text": " "},
        {"file": "a.png", "text": "three \ud83d"},
    ]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    dataset = Manifest(path="m.jsonl", image_column="file", caption_column="text", images="pictures")
    source = dataset.build(tmp_path)
    assert source[0].inputs["text"] == source.captions(0) == ("one", "two", "three ?")
    assert source.captions(1) == ()
    with pytest.raises(BadSample, match=r"^m\.jsonl/b\.png: no caption"):
        source[1]


def test_tables_that_cannot_be_used_are_refused_by_file_and_line(tmp_path: Path) -> None:
    images_in(tmp_path, "a.png")
    row = '{"image": "a.png", "caption": "x"}\n'
    wrong = {
        "column.csv": ("image,captoin\na.png,x\n", "no column 'caption', only image, captoin. Did you mean 'captoin'?"),
        "field.jsonl": (row + '{"image": "a.png", "title": 1}', "line 2: no column 'caption', only image, title"),
        "cells.csv": ('image,caption\na.png,"x\ny"\na.png,x, y\n', "line 4: 3 cells under a header of 2"),
        "quote.csv": ('image,caption\na.png,x\na.png,"x" y\n', "line 3: "),
        "open.csv": ('image,caption\na.png,"x\na.png,y\n', "line 2: "),
        "json.jsonl": (row + "\n" + '{"image": \n', "line 3: not JSON"),
        "list.jsonl": ('["a.png", "x"]\n', "line 1: should be a mapping"),
        "caption.jsonl": (row + '{"image": "a.png", "caption": 3}', "line 2: captions should be a string or a list"),
        "header.csv": ("image,caption\n", "no rows"),
        "empty.csv": ("", "no rows"),
    }
    for name, (content, message) in wrong.items():
        (tmp_path / name).write_text(content)
        refused(Manifest(path=name), tmp_path, str(tmp_path / name), message)
    (tmp_path / "latin.csv").write_bytes(b"image,caption\na.png,\xe9t\xe9\n")
    refused(Manifest(path="latin.csv"), tmp_path, str(tmp_path / "latin.csv"), "not UTF-8")
    refused(Manifest(path="none.csv"), tmp_path, "none.csv", error=FileNotFoundError)
    with pytest.raises(ValidationError, match=r"should end in one of \.csv"):
        Manifest(path="table.parquet")


def test_missing_images_are_counted_and_the_first_lines_named(tmp_path: Path) -> None:
    images_in(tmp_path, "0.png")
    rows = "".join(f"{number}.png,x\n" for number in range(8))
    (tmp_path / "m.csv").write_text(f"image,caption\n{rows},no name\n1.png,again\n")
    message = refused(Manifest(path="m.csv"), tmp_path, str(tmp_path / "m.csv"), "8 of 9 images are missing")
    assert re.findall(r"line (\d+): '(\d).png'", message) == [(str(n + 2), str(n)) for n in range(1, 6)]


# --- folders --------------------------------------------------------------------------------------------------------


def test_class_folders_are_labels_in_the_order_of_their_names(tmp_path: Path) -> None:
    images_in(tmp_path / "zebra", "1.png")
    images_in(tmp_path / "hot_dog", "2.png", "1.JPG", "notes.txt")
    images_in(tmp_path / "hot_dog" / "more", "0.webp")
    images_in(tmp_path / ".hidden", "1.png")
    source = ImageFolder(path=".", templates=["a {}", "the {}"]).build(tmp_path)
    files = ["hot_dog/1.JPG", "hot_dog/2.png", "hot_dog/more/0.webp", "zebra/1.png"]
    assert [source[i].key for i in range(len(source))] == [f"{tmp_path.name}/{file}" for file in files]
    assert [source[i].label for i in range(4)] == [0, 0, 0, 1]
    assert source.class_names == ("hot dog", "zebra")
    assert source[3].inputs["text"] == source.captions(3) == ("a zebra", "the zebra")
    np.testing.assert_array_equal(pixels(source, 0), np.asarray(picture(1)))
    renamed = ImageFolder(path=str(tmp_path), class_names=["sausage", "horse"]).build(Path("/elsewhere"))
    assert renamed.class_names == ("sausage", "horse")
    (tmp_path / "zebra" / "1.png").write_bytes(b"no image")
    with pytest.raises(BadSample, match=rf"^{tmp_path.name}/zebra/1\.png: not an image"):
        source[3]


def test_folders_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    refused(ImageFolder(path="none"), tmp_path, "'none'", str(tmp_path), error=FileNotFoundError)
    images_in(tmp_path / "flat", "a.png")
    refused(ImageFolder(path="flat"), tmp_path, f"{tmp_path / 'flat'}: no folders")
    images_in(tmp_path / "flat" / "cat", "a.png")
    images_in(tmp_path / "flat" / "dog", "a.txt")
    refused(ImageFolder(path="flat"), tmp_path, str(tmp_path / "flat"), "no images", "['dog']")
    refused(ImageFolder(path="flat", class_names=["cat"]), tmp_path, str(tmp_path / "flat"), "2 class folders", "1 ")


# --- all of them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "L", "1", "CMYK", "I;16"])
def test_every_colour_mode_is_read_as_rgb(tmp_path: Path, mode: str) -> None:
    colour = picture(0)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(colour.convert("L")).astype(np.uint16) * 257)
        expected = colour.convert("L").convert("RGB")
    else:
        image = colour.convert(mode)
        expected = image.convert("RGB")
    name = "a.jpg" if mode == "CMYK" else "a.png"
    folder = tmp_path / "class"
    folder.mkdir()
    image.save(folder / name)
    read = pixels(ImageFolder(path=".").build(tmp_path), 0)
    tolerance = 60 if mode == "CMYK" else 0  # JPEG is lossy
    np.testing.assert_allclose(read.astype(int), np.asarray(expected).astype(int), atol=tolerance)


def a_source_of_each_kind(root: Path) -> dict[str, Source]:
    write_shard(root / "s.tar", range(3))
    (root / "folder").mkdir()
    images_in(root / "folder" / "cat", "0.png", "1.png", "2.png")
    (root / "m.csv").write_text("image,caption\n" + "".join(f"folder/cat/{i}.png,number {i}\n" for i in range(3)))
    save(root / "a.npz", image=np.stack([np.asarray(picture(i)) for i in range(3)]), label=[0] * 3)
    return {
        "shards": Shards(urls="s.tar").build(root),
        "arrays": Arrays(path="a.npz", class_names=["cat"]).build(root),
        "manifest": Manifest(path="m.csv").build(root),
        "image_folder": ImageFolder(path="folder").build(root),
    }


def contents(source: Source) -> list[tuple[str, bytes, tuple[str, ...]]]:
    samples = [source[index] for index in range(len(source))]
    return [(sample.key, sample.inputs["image"].tobytes(), sample.inputs["text"]) for sample in samples]


@pytest.mark.parametrize("kind", ["shards", "arrays", "manifest", "image_folder"])
def test_a_source_reads_the_same_after_pickling_and_in_a_forked_process(tmp_path: Path, kind: str) -> None:
    source = a_source_of_each_kind(tmp_path)[kind]
    expected = contents(source)
    assert [image for _, image, _ in expected] == [picture(seed).tobytes() for seed in range(3)]
    assert [source.captions(index) for index in range(3)] == [text for _, _, text in expected]
    assert contents(pickle.loads(pickle.dumps(source))) == expected
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=lambda: there.send(contents(source)))
    child.start()
    assert here.poll(30)
    assert here.recv() == expected
    child.join()


@pytest.mark.parametrize("kind", ["shards", "arrays", "manifest", "image_folder"])
def test_base_yaml_sets_every_knob_to_its_default(kind: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"dataset/{kind}")["dataset"]
    required = {key for key in config if OmegaConf.is_missing(config, key)}
    assert next(iter(config)) == "_target_"
    values = OmegaConf.to_container(config) | dict.fromkeys(required, "some.csv")
    part = resolve(values, Dataset)
    fields = type(part).model_fields
    assert set(config) - {"_target_"} == set(fields)
    assert required == {name for name, field in fields.items() if field.is_required()}
    assert part == type(part)(**{key: values[key] for key in required})
    assert all(field.description for field in fields.values())
    assert resolve(part.model_dump(mode="json"), Dataset) == part


# --- real data ------------------------------------------------------------------------------------------------------

needs_data = pytest.mark.skipif("MULTIMODAL_DATASETS" not in os.environ, reason="MULTIMODAL_DATASETS is not set")


@needs_data
def test_a_real_shard_has_its_images_and_five_captions_each() -> None:
    source = Shards(urls="flickr8k-extra-000.tar").build(Path(os.environ["MULTIMODAL_DATASETS"]))
    assert len(source) == 91
    samples = [source[index] for index in range(91)]
    assert {len(sample.inputs["text"]) for sample in samples} == {5}
    assert {sample.inputs["image"].size for sample in samples} == {(128, 128)}
    assert len({sample.key for sample in samples}) == 91


@needs_data
def test_real_arrays_have_their_classes_in_both_layouts() -> None:
    root = Path(os.environ["MULTIMODAL_DATASETS"])
    source = Arrays(path="cifar10_testA.npz").build(root)
    assert (len(source), len(source.class_names)) == (5000, 10)
    assert np.bincount(source.labels).tolist() == [500] * 10
    train = Arrays(path="cifar10_train_jpeg.npz").build(root)
    assert (len(train), train.class_names) == (50000, source.class_names)
    assert pixels(train, 49999).shape == pixels(source, 0).shape == (32, 32, 3)


def test_of_many_files_that_are_missing_the_first_are_named(tmp_path: Path) -> None:
    names = [f"{index:05d}.tar" for index in range(332)]
    (tmp_path / names[0]).touch()
    with pytest.raises(FileNotFoundError, match=r"331 of 332 .*00001\.tar, .*00005\.tar, and 326 more$"):
        locate(tmp_path, *names)
