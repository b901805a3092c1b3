"""The laws of the embedded data set: what is held out is never shown, and every caption is true."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf
from pydantic import ValidationError

from multimodal.data.shapes import COLOURS, SHAPES, TEXTURES, Shapes, ShapesSource, kinds
from multimodal.data.shapes_captions import OPPOSITES, PATTERNS, SYNONYMS, TEMPLATES, Kind
from multimodal.parts import Dataset
from multimodal.resolve import resolve

MANY = 4000
NOWHERE = Path("nowhere")


@pytest.fixture(scope="module")
def train() -> ShapesSource:
    return Shapes().build(NOWHERE)


@pytest.fixture(scope="module")
def unseen() -> ShapesSource:
    return Shapes(split="unseen").build(NOWHERE)


def digest(source: ShapesSource, indices: list[int]) -> str:
    """Of everything in these samples, in the order of their keys."""
    samples = sorted((source[index] for index in indices), key=lambda sample: sample.key)
    parts = [f"{s.key}{s.label}{s.inputs['text']}".encode() + s.inputs["image"].tobytes() for s in samples]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def alternatives(words: tuple[str, ...]) -> str:
    """A pattern for any of the words or their synonyms."""
    return "|".join(re.escape(other) for word in words for other in (word, *SYNONYMS.get(word, ())))


def read_noun_phrases(caption: str) -> list[dict[str, str]]:
    """The objects that a caption names, in its order, as words of the vocabulary; reads what the templates write."""
    canonical = {other: word for word, others in SYNONYMS.items() for other in others}
    canonical |= {pattern: texture for texture, pattern in PATTERNS.items()}
    vocabulary = {"size": ("small", "large"), "colour": (*COLOURS,), "texture": (*TEXTURES,), "shape": (*SHAPES,)}
    named = {name: f"(?P<{name}>{alternatives(words)})" for name, words in vocabulary.items()}
    patterns = f"(?P<pattern>{alternatives((*PATTERNS.values(),))})"
    orders = ("{texture} {colour} {shape}", "{colour} {texture} {shape}", "{colour} {shape} with {pattern}")
    found = []
    for order in orders:
        for match in re.finditer(rf"\ban? (?:{named['size']} )?" + order.format(**named, pattern=patterns), caption):
            words = {k: canonical.get(v, v) for k, v in match.groupdict().items() if v}
            if "pattern" in words:
                words["texture"] = words.pop("pattern")
            found.append((match.start(), words))
    return [words for _, words in sorted(found, key=lambda item: item[0])]


# --- zero-shot means never seen -------------------------------------------------------------------------------------


def test_a_held_out_combination_occurs_in_no_training_scene_or_caption(
    train: ShapesSource, unseen: ShapesSource
) -> None:
    held_out = set(unseen.class_names)
    for index in range(MANY):
        scene = train.scene(index)
        assert held_out.isdisjoint(thing.kind.name for thing in scene.things)
        for caption in train.captions(index):
            named = {Kind(w["colour"], w["texture"], w["shape"]).name for w in read_noun_phrases(caption)}
            assert len(named) == len(scene.things)
            assert held_out.isdisjoint(named)


def test_unseen_shows_one_object_and_its_class(unseen: ShapesSource) -> None:
    for index in range(300):
        scene = unseen.scene(index)
        label = unseen[index].label
        assert label is not None
        assert [thing.kind.name for thing in scene.things] == [unseen.class_names[label]]


@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.25, 0.33, 0.5])
def test_every_pair_of_attribute_values_remains_in_training(held_out: float) -> None:
    training, unseen = kinds(held_out)
    assert len(unseen) == round(held_out * 320)
    assert len({*training, *unseen}) == len(training) + len(unseen) == 320
    values = (COLOURS, TEXTURES, SHAPES)
    for one, other in combinations(range(3), 2):
        assert len({(kind[one], kind[other]) for kind in training}) == len(values[one]) * len(values[other])


def test_every_attribute_value_occurs_in_training_scenes(train: ShapesSource) -> None:
    things = [thing for index in range(500) for thing in train.scene(index).things]
    assert {thing.kind.colour for thing in things} == set(COLOURS)
    assert {thing.kind.texture for thing in things} == set(TEXTURES)
    assert {thing.kind.shape for thing in things} == set(SHAPES)
    assert {thing.size for thing in things} == {"small", "large"}


def test_at_least_64_classes_balanced_to_within_one(unseen: ShapesSource) -> None:
    assert len(set(unseen.class_names)) == len(unseen.class_names) >= 64
    source = Shapes(split="unseen", size=1001).build(NOWHERE)
    assert source.class_names == unseen.class_names
    counts = Counter(source.scene(index).things[0].kind.name for index in range(1001))
    assert set(counts) == set(source.class_names)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_seed_changes_the_scenes_but_not_the_classes(unseen: ShapesSource) -> None:
    other = Shapes(split="unseen", seed=1).build(NOWHERE)
    assert other.class_names == unseen.class_names
    assert all(other.scene(index) != unseen.scene(index) for index in range(20))


# --- the same sample, always ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_sample_does_not_depend_on_process_order_or_hash_seed(train: ShapesSource, unseen: ShapesSource) -> None:
    code = (
        "import pickle, sys; from tests.test_shapes import digest;"
        "print(*(digest(source, list(range(39, -1, -1))) for source in pickle.load(sys.stdin.buffer)))"
    )
    here = Path(__file__).parents[1]
    env = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(here)}
    there = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps((train, unseen)),
        capture_output=True,
        env=env,
        cwd=here,
        check=True,
    )
    assert there.stdout.decode().split() == [digest(source, list(range(40))) for source in (train, unseen)]


def test_two_sources_agree_whatever_was_read_before(train: ShapesSource) -> None:
    fresh = Shapes().build(NOWHERE)
    train.captions(5), train[3]
    assert digest(fresh, [9, 5, 8]) == digest(train, [8, 9, 5])


def test_indices_splits_and_seeds_have_numbers_of_their_own() -> None:
    sources = [Shapes(split=s, seed=seed).build(NOWHERE) for s in ("train", "unseen") for seed in range(3)]
    places = [source.scene(index).things[0].x for source in sources for index in range(100)]
    assert len(set(places)) == len(places)


@pytest.mark.parametrize("split", ["train", "unseen"])
def test_captions_equal_those_in_the_sample(split: str) -> None:
    source = Shapes(split=split, num_captions=4).build(NOWHERE)  # type: ignore[arg-type]
    for index in range(100):
        sample = source[index]
        assert sample.inputs["text"] == source.captions(index)
        assert len(set(source.captions(index))) == 4
        assert sample.key == f"shapes/{split}/{index}"


@pytest.mark.parametrize("index", [-1, 10])
def test_an_index_outside_is_refused(index: int) -> None:
    source = Shapes(size=10).build(NOWHERE)
    with pytest.raises(IndexError, match="outside the 10 samples"):
        source[index]
    with pytest.raises(IndexError):
        source.captions(index)


# --- captions are true ----------------------------------------------------------------------------------------------


def test_captions_name_what_is_there_and_how_it_stands(train: ShapesSource) -> None:
    relations = {word: alternatives((word,)) for word in OPPOSITES}
    pairs = 0
    for index in range(1500):
        scene = train.scene(index)
        for caption in train.captions(index):
            named = read_noun_phrases(caption)
            things = list(scene.things)
            if not all(words.items() <= facts(things[i]).items() for i, words in enumerate(named)):
                things.reverse()
            assert len(named) == len(things)
            assert all(words.items() <= facts(thing).items() for words, thing in zip(named, things, strict=True))
            said = [relation for relation, words in relations.items() if re.search(rf" ({words}) an? ", caption)]
            assert len(said) == len(things) - 1, caption
            if said:
                pairs += 1
                dx, dy = things[0].x - things[1].x, things[0].y - things[1].y
                true = ("left of" if dx < 0 else "right of") if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
                assert said == [true], caption
    assert pairs > 1000


def facts(thing) -> dict[str, str]:  # type: ignore[no-untyped-def]
    return {**thing.kind._asdict(), "size": thing.size}


def test_objects_lie_inside_the_image_and_apart_and_sizes_do_not_overlap(train: ShapesSource) -> None:
    extents: dict[str, list[float]] = {"small": [], "large": []}
    relations = Counter(train.scene(index).relation for index in range(1000))
    assert set(relations) == {None, *OPPOSITES}
    assert 600 < relations[None] < 800
    for index in range(1000):
        scene = train.scene(index)
        for thing in scene.things:
            extents[thing.size].append(thing.extent)
            assert thing.extent / 2 <= min(thing.x, thing.y)
            assert max(thing.x, thing.y) <= 1 - thing.extent / 2
        if scene.relation is not None:
            one, other = scene.things
            apart = max(abs(one.x - other.x), abs(one.y - other.y))
            assert apart > (one.extent + other.extent) / 2
    assert max(extents["small"]) < min(extents["large"])


def test_wording_varies(train: ShapesSource) -> None:
    every = [caption for index in range(500) for caption in train.captions(index)]
    outer = [re.escape(template).replace(r"\{\}", "an? .*") for template in TEMPLATES]
    assert sum(any(re.fullmatch(pattern, caption) for caption in every) for pattern in outer) >= 12
    text = "\n".join(every)
    for word, others in SYNONYMS.items():
        assert all(re.search(rf"\b{re.escape(w)}\b", text) for w in (word, *others)), word
    sized = sum("size" in words for caption in every for words in read_noun_phrases(caption))
    assert 0 < sized < len(every)


# --- the picture is of the scene ------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [48, 64])
def test_the_image_shows_each_object_in_its_place_and_colour(image_size: int) -> None:
    source = Shapes(image_size=image_size).build(NOWHERE)
    for index in range(150):
        image = source[index].inputs["image"]
        assert (image.mode, image.size) == ("RGB", (image_size, image_size))
        pixels = np.asarray(image, dtype=int)
        ys, xs = (np.mgrid[:image_size, :image_size] + 0.5) / image_size
        inside = np.zeros((image_size, image_size), bool)
        for thing in source.scene(index).things:
            box = np.maximum(abs(xs - thing.x), abs(ys - thing.y)) <= thing.extent / 2
            near = abs(pixels - COLOURS[thing.kind.colour]).max(axis=-1) < 40
            assert (near & box).sum() > 0.05 * box.sum(), thing
            inside |= np.maximum(abs(xs - thing.x), abs(ys - thing.y)) <= thing.extent / 2 + 2 / image_size
        saturation = pixels.max(axis=-1) - pixels.min(axis=-1)
        assert saturation[~inside].max() <= 60  # nothing but the background


def test_textures_differ_by_how_they_darken_the_object(unseen: ShapesSource) -> None:
    shares: dict[str, list[float]] = {texture: [] for texture in TEXTURES}
    for index in range(400):
        thing = unseen.scene(index).things[0]
        if thing.size == "large":
            pixels = np.asarray(unseen[index].inputs["image"], dtype=int)
            dark = (pixels.max(axis=-1) < 85).sum()
            shares[thing.kind.texture].append(float(dark / (thing.extent * 64) ** 2))
    mean = {texture: float(np.mean(values)) for texture, values in shares.items()}
    assert mean["plain"] == 0
    assert 0.02 < mean["dotted"] < min(mean["striped"], mean["checkered"], mean["two-toned"])


# --- knobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs",
    [
        {"held_out": 0.0},
        {"held_out": 0.6},
        {"two_objects": 1.5},
        {"size": 0},
        {"image_size": 16},
        {"seed": -1},
        {"num_captions": 9},
        {"split": "test"},
        {"size": "many"},
        {"heldout": 0.25},
    ],
)
def test_bad_knobs_are_refused(knobs: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=next(iter(knobs))):
        Shapes.model_validate(knobs)


def test_the_yaml_is_the_part_with_its_defaults() -> None:
    path = Path(__file__).parents[1] / "conf/dataset/shapes.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert isinstance(config, dict)
    assert resolve(config, Dataset) == Shapes()
    assert list(config) == ["_target_", *Shapes.model_fields]


def test_the_share_of_two_objects_is_kept() -> None:
    for share in (0.0, 1.0):
        source = Shapes(two_objects=share).build(NOWHERE)
        assert {len(source.scene(index).things) for index in range(50)} == {1 + int(share)}
