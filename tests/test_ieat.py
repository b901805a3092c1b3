"""Laws of association tests on images."""

import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import ValidationError

from multimodal.data.arrays import Arrays
from multimodal.data.pictures import Pictures
from multimodal.evals.ieat import ImageAssociation
from multimodal.evals.weat import association_test
from multimodal.parts import BadSample, Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")
COLOURS = {"apples": (250, 20, 20), "limes": (20, 250, 20), "warm": (240, 60, 40), "cold": (40, 240, 60)}


class Colour:
    """Images by their mean colour."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        assert tower == "image"
        rows = [np.asarray(image, dtype=np.float32).mean(axis=(0, 1)) for image in inputs]
        return F.normalize(torch.from_numpy(np.stack(rows)), dim=1)


@pytest.fixture
def folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / name / "deep").mkdir(parents=True)
        for number in range(6):
            pixels = np.clip(np.array(colour) + rng.integers(-20, 20, size=(4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / ("deep" if number % 2 else ".") / f"{number}.png")
    return tmp_path


def evaluation(x="apples", y="limes", a="warm", b="cold", max_samples=None):
    return ImageAssociation(
        every="never",
        target_x=x,
        target_y=y,
        attribute_a=a,
        attribute_b=b,
        max_samples=max_samples,
        permutations=99,
    )


def test_an_association_that_is_there_is_found_and_its_sign_follows_the_targets(folders):
    report = evaluation().build(Sources(folders))(Colour())
    assert set(report.metrics) == set(evaluation().metrics)
    assert report.metrics["effect"].value > 1.5
    assert report.metrics["effect"].count == 12
    assert report.metrics["p"] == pytest.approx(1 / 924)
    report.figures["effect"]()
    swapped = evaluation(x="limes", y="apples").build(Sources(folders))(Colour()).metrics
    assert swapped["effect"].value == pytest.approx(-report.metrics["effect"].value)
    assert swapped["p"] > 0.99


def test_it_is_the_arithmetic_of_weat(folders):
    part = evaluation(max_samples=4)
    data = Sources(folders)
    parts = []
    for name in COLOURS:
        source = data.open(Pictures(path=name))
        parts.append(Colour().encode("image", [source[i].inputs["image"] for i in range(4)]))
    found = part.build(data)(Colour()).metrics
    expected = association_test(*parts, 99)
    assert found == {"effect": expected.effect, "p": expected.p}


def test_a_folder_and_a_data_set_of_its_images_are_the_same(folders):
    written = {"_target_": "multimodal.data.pictures.Pictures", "path": "apples"}
    assert evaluation(x=written) == evaluation()
    assert evaluation().target_x == Pictures(path="apples")


def test_a_folder_is_read_at_any_depth_in_order_and_a_broken_image_is_named(folders):
    source = Pictures(path="apples").build(folders)
    assert [Path(source.key(i)).name for i in range(len(source))] == [
        "0.png",
        "2.png",
        "4.png",
        "1.png",
        "3.png",
        "5.png",
    ]
    assert source.captions(0) == ()
    (folders / "apples" / "0.png").write_bytes(b"no image")
    with pytest.raises(BadSample, match=r"apples/0\.png"):
        source[0]


def test_building_reads_no_image_and_its_result_travels_to_other_processes(folders):
    for file in folders.rglob("*.png"):
        file.write_bytes(b"no image")
    assert isinstance(pickle.loads(pickle.dumps(evaluation().build(Sources(folders)))), partial)
    assert ImageAssociation.towers == ("image",)


@pytest.mark.parametrize(
    ("knobs", "error", "message"),
    [
        ({"x": "pears"}, FileNotFoundError, "no image or folder of images '.*pears'"),
        ({"b": "empty"}, ValueError, "empty' has no images"),
        ({"y": "apples/0.png"}, ValueError, "target_y: 1 images; an effect needs 2 or more"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_the_run(folders, knobs, error, message):
    (folders / "empty").mkdir()
    with pytest.raises(error, match=message):
        evaluation(**knobs).build(Sources(folders))


def test_an_attribute_may_be_one_image(folders):
    assert evaluation(a="warm/0.png", b="cold/0.png").build(Sources(folders))(Colour()).metrics["effect"].value > 1


def test_a_concept_is_a_folder_or_a_data_set():
    with pytest.raises(ValidationError, match="target_x"):
        evaluation(x=3)


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_photos_of_two_halves_of_one_class_have_no_effect_worth_a_name(tmp_path):
    source = Arrays(path="cifar10_testA.npz").build(Path(DATASETS))
    ships = [i for i in range(len(source)) if source.label(i) == source.class_names.index("ship")]
    frogs = [i for i in range(len(source)) if source.label(i) == source.class_names.index("frog")]
    wanted = {"apples": ships[:40], "limes": ships[40:80], "warm": ships[80:120], "cold": frogs[:40]}
    for name, places in wanted.items():
        (tmp_path / name).mkdir()
        for place in places:
            source.image(place).save(tmp_path / name / f"{place}.png")
    run = evaluation().build(Sources(tmp_path))(Colour()).metrics
    assert run["p"] > 0.001
    assert run["effect"].low < 0.4
    (tmp_path / "frogs").mkdir()
    for place in frogs[40:80]:
        source.image(place).save(tmp_path / "frogs" / f"{place}.png")
    assert evaluation(y="frogs").build(Sources(tmp_path))(Colour()).metrics["p"] <= 0.02
