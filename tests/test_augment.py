"""Laws of the augmentations: repeatable by their random state, inside the image, and nothing when switched off."""

from pathlib import Path
from random import Random

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image, ImageOps
from pydantic import ValidationError

from multimodal.data.augment import Keep, RandomCrop
from multimodal.parts import Augment
from multimodal.resolve import resolve

CONF = Path(__file__).parents[1] / "conf"
BICUBIC = Image.Resampling.BICUBIC
WHOLE = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def composed(name: str) -> dict[str, object]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose(f"augment/{name}")["augment"])


def test_keep_returns_the_image_itself() -> None:
    image = picture(5, 7)
    assert Keep()(image, 4, Random(0)) is image


def test_the_same_random_state_gives_the_same_image_and_another_gives_another() -> None:
    image = picture(40, 30)
    strong = RandomCrop(scale=[0.2, 1.0], flip=0.5, brightness=0.4, contrast=0.4, saturation=0.4, grayscale=0.2)
    first = [strong(image, 16, Random(seed)).tobytes() for seed in range(20)]
    np.random.seed(1)
    assert [strong(image, 16, Random(seed)).tobytes() for seed in range(20)] == first
    assert len(set(first)) == 20


@settings(max_examples=100, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)).map(sorted),
    st.tuples(st.floats(0.05, 20), st.floats(0.05, 20)).map(sorted),
    st.integers(0, 2**32),
)
def test_a_crop_lies_inside_its_image(width: int, height: int, scale: list[float], ratio: list[float], n: int) -> None:
    augment = RandomCrop(scale=scale, ratio=ratio)
    left, top, right, bottom = augment.box(width, height, Random(n))
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert augment(picture(width, height), 6, Random(n)).size == (6, 6)


def test_area_ratio_and_place_of_crops_are_drawn_from_their_whole_ranges() -> None:
    augment = RandomCrop(scale=[0.25, 0.5], ratio=[0.5, 2.0])
    rng = Random(0)
    left, top, right, bottom = np.array([augment.box(1000, 1000, rng) for _ in range(4000)]).T
    width, height = right - left, bottom - top
    area, log_ratio = width * height / 1000**2, np.log2(width / height)
    for values, low, high in ((area, 0.25, 0.5), (log_ratio, -1, 1), (left / (1000 - width), 0, 1)):
        edges = np.quantile(values, [0, 0.25, 0.5, 0.75, 1])
        np.testing.assert_allclose(edges, np.linspace(low, high, 5), atol=0.05 * (high - low))
    np.testing.assert_allclose(np.quantile(top / (1000 - height), [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)


@pytest.mark.parametrize(
    ("size", "box"),
    [((100, 10), (43, 0, 57, 10)), ((10, 100), (0, 43, 10, 57)), ((1, 1000), (0, 499, 1, 500))],
)
def test_where_no_shape_fits_the_crop_is_central_with_the_nearest_ratio(
    size: tuple[int, int], box: tuple[int, ...]
) -> None:
    augment = RandomCrop(scale=[1.0, 1.0], ratio=[0.7, 1.4])
    assert augment.box(*size, Random(0)) == box


@pytest.mark.parametrize("size", [8, 32, 50])
def test_the_whole_of_a_square_image_is_plain_bicubic_resizing(size: int) -> None:
    image = picture(32, 32)
    assert RandomCrop(**WHOLE)(image, size, Random(0)).tobytes() == image.resize((size, size), BICUBIC).tobytes()


def test_a_crop_equals_cropping_first_away_from_its_border() -> None:
    image, augment = picture(64, 48), RandomCrop(scale=[0.3, 0.4])
    fused = np.asarray(augment(image, 24, Random(3)))
    apart = np.asarray(image.crop(augment.box(64, 48, Random(3))).resize((24, 24), BICUBIC))
    np.testing.assert_allclose(fused[3:-3, 3:-3].astype(int), apart[3:-3, 3:-3].astype(int), atol=1)


def test_flip_and_grayscale_come_as_often_as_they_are_asked_for() -> None:
    image = picture(16, 16)
    flipped, gray = ImageOps.mirror(image).tobytes(), image.convert("L").convert("RGB").tobytes()
    for knob, changed in (("flip", flipped), ("grayscale", gray)):
        for probability in (0.0, 0.25, 1.0):
            augment = RandomCrop(**WHOLE, **{knob: probability})
            count = sum(augment(image, 16, Random(seed)).tobytes() == changed for seed in range(400))
            assert abs(count / 400 - probability) <= (0.07 if 0 < probability < 1 else 0)


def test_each_colour_strength_bounds_its_own_change() -> None:
    flat = Image.new("RGB", (8, 8), (100, 50, 25))
    values = [RandomCrop(brightness=0.4)(flat, 4, Random(seed)).getpixel((0, 0))[0] for seed in range(300)]
    assert 60 <= min(values) < 65
    assert 135 < max(values) <= 140
    contrast = {RandomCrop(contrast=0.9)(flat, 4, Random(seed)).convert("L").getpixel((0, 0)) for seed in range(50)}
    assert max(contrast) - min(contrast) <= 2  # an image of one colour: the mean stays
    textured = picture(8, 8)
    saturation = RandomCrop(**WHOLE, saturation=0.9)
    original = np.asarray(textured.convert("L")).astype(int)
    changed = [saturation(textured, 8, Random(seed)) for seed in range(20)]
    assert all(image.tobytes() != textured.tobytes() for image in changed)
    less = [image for image in changed if np.ptp(np.asarray(image), axis=2).sum() < np.ptp(textured, axis=2).sum()]
    assert 3 < len(less) < 17
    assert all(abs(np.asarray(image.convert("L")).astype(int) - original).max() <= 2 for image in less)


@pytest.mark.parametrize(
    ("knobs", "path"),
    [
        ({"scale": [1.0, 0.5]}, ("scale",)),
        ({"scale": [0.0, 0.5]}, ("scale",)),
        ({"scale": [0.5, 1.5]}, ("scale",)),
        ({"ratio": [2.0, 1.0]}, ("ratio",)),
        ({"ratio": [-1.0, 1.0]}, ("ratio",)),
        ({"ratio": ["wide", 1.0]}, ("ratio", 0)),
        ({"scale": [0.5]}, ("scale", 1)),
        ({"flip": 1.5}, ("flip",)),
        ({"contrast": -0.1}, ("contrast",)),
        ({"brightness": 1.1}, ("brightness",)),
    ],
)
def test_ranges_and_strengths_out_of_bounds_are_refused_by_name(knobs: dict[str, object], path: tuple[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        RandomCrop(**knobs)
    assert [error["loc"] for error in caught.value.errors()] == [path]


@pytest.mark.parametrize(("name", "part"), [("none", Keep()), ("crop", RandomCrop())])
def test_base_yaml_sets_every_knob_to_its_default(name: str, part: Augment) -> None:
    values = composed(name)
    assert list(values) == ["_target_", *type(part).model_fields]
    assert resolve(values, Augment) == part
    assert resolve(part.model_dump(mode="json"), Augment) == part


def test_the_preset_with_flips_differs_from_the_crop_in_that_alone() -> None:
    assert composed("crop_flip") == composed("crop") | {"flip": 0.5}
