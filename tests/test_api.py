"""The laws of the Python API: a loaded model is the trained one, whatever form its inputs have."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image

import multimodal
from multimodal import checkpoint
from multimodal.data.files import open_image
from multimodal.data.views import Inputs
from multimodal.encoder import Encoder
from multimodal.parts import Sample, Source
from multimodal.trainer import Trainer

TEXTS = ["a red circle", "a blue square on a table", "two green stars"]


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> multimodal.ImageTextModel:
    return multimodal.load(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    noise = np.random.default_rng(0)
    return [Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(5)]


def test_a_loaded_model_is_the_trained_one(tiny_trainer: Trainer, model: multimodal.ImageTextModel) -> None:
    encoder = Encoder(tiny_trainer.model, tiny_trainer.assembled.readers, tiny_trainer.assembled.context)
    images = Inputs(tiny_trainer.source, "image", 7)
    assert torch.equal(model.encode_image(list(images)), encoder.encode("image", images))
    assert torch.equal(model.encode_text(TEXTS), encoder.encode("text", TEXTS))
    assert model.embed_dim == 16
    assert model.logit_scale == pytest.approx(tiny_trainer.model.logit_scale.exp().item())


def test_a_checkpoint_folder_and_a_step_are_the_run(tiny_run: Path, model: multimodal.ImageTextModel) -> None:
    for other in (multimodal.load(checkpoint.find(tiny_run)), multimodal.load(str(tiny_run), checkpoint=8)):
        assert torch.equal(other.encode_text(TEXTS), model.encode_text(TEXTS))


def test_an_image_is_the_same_as_picture_path_and_pixels(
    model: multimodal.ImageTextModel, pictures: list[Image.Image], tmp_path: Path
) -> None:
    features = model.encode_image(pictures)
    assert features.shape == (5, 16)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=-1), torch.ones(5))
    paths: list[str | Path] = []
    for place, picture in enumerate(pictures):
        paths.append(tmp_path / f"{place}.png")
        picture.save(paths[-1])
    pixels = torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])
    assert torch.equal(model.encode_image(paths), features)
    assert torch.equal(model.encode_image([str(path) for path in paths]), features)
    assert torch.equal(model.encode_image(pixels), features)
    torch.testing.assert_close(model.encode_image(pictures[2]), features[2:3])


def test_the_size_of_batches_changes_nothing(
    tiny_run: Path, model: multimodal.ImageTextModel, pictures: list[Image.Image]
) -> None:
    small = multimodal.load(tiny_run, batch_size=2)
    torch.testing.assert_close(small.encode_image(pictures), model.encode_image(pictures), rtol=0, atol=1e-6)
    torch.testing.assert_close(small.encode_text(TEXTS), model.encode_text(TEXTS), rtol=0, atol=1e-6)
    assert model.encode_text([]).shape == (0, 16)


def test_classification_is_the_softmax_over_class_embeddings(
    model: multimodal.ImageTextModel, pictures: list[Image.Image]
) -> None:
    names, templates = ["circle", "square"], ["a {}.", "a photo of a {}"]
    probabilities = model.classify(pictures, names, templates)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(5))
    mean = [model.encode_text([t.replace("{}", n) for t in templates]).mean(0) for n in names]
    classifier = torch.nn.functional.normalize(torch.stack(mean), dim=-1)
    expected = (model.logit_scale * model.encode_image(pictures) @ classifier.T).softmax(1)
    torch.testing.assert_close(probabilities, expected)
    torch.testing.assert_close(
        model.similarity(pictures, TEXTS), model.encode_image(pictures) @ model.encode_text(TEXTS).T
    )


def test_texts_that_are_cut_are_counted(model: multimodal.ImageTextModel, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model.encode_text(["word " * 100, "short", "word " * 90])
    assert "2 of 3 texts were longer than the context" in caplog.text


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: m.encode_image(torch.zeros(2, 3, 8, 8)), ValueError, r"uint8 \[n, 3, H, W\], got torch.float32"),
        (lambda m: m.encode_image(["nowhere.png"]), FileNotFoundError, r"there is no file 'nowhere\.png'"),
        (lambda m: m.encode_image([3]), ValueError, "image 0 should be a PIL image, a path or a tensor, got int"),
        (
            lambda m: m.encode_image(np.zeros((8, 8, 3), np.uint8)),
            ValueError,
            r"got ndarray; Image\.fromarray makes one",
        ),
        (lambda m: m.encode_image([torch.zeros(3, 8, 8)]), ValueError, r"image 0 should be uint8 \[3, H, W\]"),
        (
            lambda m: m.encode_image(Image.new("F", (8, 8))),
            ValueError,
            "image 0: pixels of Pillow's mode F have no range",
        ),
        (lambda m: m.encode_text(["a", 3]), ValueError, "should be strings, got int"),
        (lambda m: m.classify([], ["a", "a"]), ValueError, "2 classes are named 'a'"),
        (lambda m: m.classify([], ["a", " "]), ValueError, "none of them empty"),
        (lambda m: m.classify([], ["a"], ["no slot"]), ValueError, r"one \{\} each"),
        (lambda m: m.classify([], ["a"], []), ValueError, r"one \{\} each"),
        (lambda m: m.classify([], "cat"), ValueError, "names should be a list of strings"),
        (
            lambda _: multimodal.open_clip("ViT-S-32-alt", device="gpu"),
            ValueError,
            "device: should be auto, cpu or cuda",
        ),
        (
            lambda _: multimodal.open_clip("ViT-S-32-alt", precision="fp16"),
            ValueError,
            "precision should be auto, fp32",
        ),
        (lambda _: multimodal.load("nowhere"), FileNotFoundError, "no run or checkpoint 'nowhere'"),
        (lambda _: multimodal.open_clip("ViT-B-33"), ValueError, "ViT-B-33"),
    ],
)
def test_what_cannot_be_is_told(model: multimodal.ImageTextModel, call: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        call(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_by_all(tiny_run: Path) -> None:
    for opened in (
        lambda: multimodal.load(tiny_run, device="cuda"),
        lambda: multimodal.open_clip("ViT-S-32-alt", device="cuda"),
    ):
        with pytest.raises(ValueError, match="device: torch sees no GPU here"):
            opened()


def test_inputs_may_be_one_or_many_or_come_one_by_one(
    model: multimodal.ImageTextModel, pictures: list[Image.Image], tmp_path: Path
) -> None:
    features = model.encode_image(pictures)
    pixels = [torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures]  # not contiguous
    for same in (tuple(pictures), (picture for picture in pictures), pixels, Inputs(Images(pictures), "image")):
        assert torch.equal(model.encode_image(same), features)
    torch.testing.assert_close(model.encode_image(pixels[2]), features[2:3])
    sizes = [pixels[0], pixels[1][:, :20]]
    torch.testing.assert_close(model.encode_image(sizes)[:1], features[:1])
    assert model.encode_image([]).shape == (0, 16)
    assert model.encode_image(torch.empty(0, 3, 8, 8, dtype=torch.uint8)).shape == (0, 16)
    texts = model.encode_text(TEXTS)
    assert torch.equal(model.encode_text(text for text in TEXTS), texts)
    torch.testing.assert_close(model.encode_text(TEXTS[1]), texts[1:2])
    assert model.classify([], ["a", "b"]).shape == (0, 2)
    assert torch.equal(model.classifier(name for name in "ab"), model.classifier(["a", "b"]))


class Images(Source):
    def __init__(self, images: list[Image.Image]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        return Sample(str(index), {"image": self.images[index]})

    def captions(self, index: int) -> tuple[str, ...]:
        return ()


def test_images_of_other_modes_are_read_as_what_they_show(model: multimodal.ImageTextModel, tmp_path: Path) -> None:
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 30), dtype=np.uint8))
    shown = model.encode_image(grey.convert("RGB"))
    wide = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert wide.mode == "I;16"
    rgba = grey.convert("RGBA")
    rgba.putalpha(0)
    palette = grey.convert("P")
    palette.info["transparency"] = 3
    for image in (grey, wide, rgba, palette, grey.convert("LA")):
        assert torch.equal(model.encode_image(image), shown), image.mode
        image.save(tmp_path / "file.png")
        assert torch.equal(model.encode_image(tmp_path / "file.png"), shown), image.mode
    others = [Image.new("L", (30, 40), level) for level in (0, 255)]
    palette.save(tmp_path / "moving.gif", save_all=True, append_images=others)
    assert torch.equal(model.encode_image(tmp_path / "moving.gif"), shown)
    red = Image.new("RGB", (30, 40), (255, 0, 0))
    red.convert("CMYK").save(tmp_path / "print.tiff")
    assert torch.equal(model.encode_image(tmp_path / "print.tiff"), model.encode_image(red))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_picture_that_is_cut_off_is_told_by_its_number(
    tiny_run: Path, pictures: list[Image.Image], workers: int, tmp_path: Path
) -> None:
    pictures[0].save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    model = multimodal.load(tiny_run, device="cpu", workers=workers)
    for images, message in (
        ([pictures[0], Image.open(tmp_path / "cut.jpg")], "^image 1: .*truncated"),
        ([tmp_path / "whole.jpg", tmp_path / "cut.jpg"], r"^.*cut\.jpg: .*truncated"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_image(images)


def test_files_that_pillow_has_opened_may_be_read_by_workers_again_and_again(tiny_run: Path, tmp_path: Path) -> None:
    noise = np.random.default_rng(3)
    for place in range(4):  # larger than what is buffered of a file
        Image.fromarray(noise.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tmp_path / f"{place}.png")
    files = [tmp_path / f"{place}.png" for place in range(4)]
    parallel = multimodal.load(tiny_run, device="cpu", workers=2, batch_size=2)
    opened = [Image.open(file) for file in files]
    for _ in range(2):
        assert torch.equal(parallel.encode_image(opened), parallel.encode_image(files))
    alone = multimodal.load(tiny_run, device="cpu", batch_size=2)
    assert torch.equal(alone.encode_image(opened), parallel.encode_image(files))


@pytest.mark.parametrize("mode", ["RGB", "L", "rotated"])
def test_pixels_are_those_of_open_clips_transform(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (300, 420, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which open_clip does not
    image.convert("L" if mode == "L" else "RGB").save(
        tmp_path / "a.png", **({"exif": exif} if mode == "rotated" else {})
    )
    _, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt")
    ours = multimodal.open_clip("ViT-S-32-alt", device="cpu")
    pixels = ours.readers["image"].preprocessor(open_image(tmp_path / "a.png", "a"), None)
    mean, std = (torch.tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD))
    theirs = preprocess(Image.open(tmp_path / "a.png"))
    torch.testing.assert_close((pixels / 255 - mean) / std, theirs, rtol=0, atol=1e-5)


def test_a_file_that_is_no_image_is_named(model: multimodal.ImageTextModel, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png"):
        model.encode_image([tmp_path / "text.png"])


def test_a_model_of_open_clip_is_that_of_open_clip(pictures: list[Image.Image], tmp_path: Path) -> None:
    theirs, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32-alt")
    torch.save({"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}}, tmp_path / "epoch_1.pt")
    ours = multimodal.open_clip("ViT-S-32-alt", weights=tmp_path / "epoch_1.pt", device="cpu")
    with torch.no_grad():
        images = theirs.eval().encode_image(torch.stack([preprocess(p) for p in pictures]), normalize=True)
        texts = theirs.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS), normalize=True)
    torch.testing.assert_close(ours.encode_image(pictures), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encode_text(TEXTS), texts, rtol=0, atol=1e-5)
