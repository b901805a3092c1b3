"""Laws of the geometry of the space."""

import math
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import SameEncoder, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydantic import ValidationError
from scipy import stats

from multimodal.batch import Sample
from multimodal.data.shapes import Shapes
from multimodal.data.shards import Shards
from multimodal.evals.geometry import Geometry
from multimodal.evals.ranking import Matches
from multimodal.evals.space import (
    alignment,
    anisotropy,
    centred,
    effective_rank,
    hubness,
    k_occurrence,
    margins,
    modality_gap,
    retrieval_after,
    separability,
    skewness,
    spectrum,
    uniformity,
    whitened,
)
from multimodal.parts import Dataset, Source, Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")


class Colours(Source):
    """Images of one colour, with captions that name it."""

    def __init__(self, knobs):
        self.knobs = knobs

    def __len__(self):
        return self.knobs.size

    def __getitem__(self, index):
        assert self.knobs.readable
        colour = index % self.knobs.colours
        return Sample(str(index), {"image": Image.new("RGB", (2, 2), (colour, 0, 0)), "text": self.captions(index)})

    def captions(self, index):
        number = index % self.knobs.colours
        return tuple(f"{number} {word}" for word in ("is seen", "is here")[: self.knobs.captions])


class ColourData(Dataset):
    size: int = 24
    colours: int = 24
    captions: int = 2
    readable: bool = True

    def build(self, root):
        return Colours(self)


class ColourEncoder:
    """A direction for every colour and a little noise for the words; texts may lie apart from images."""

    logit_scale = 100.0

    def __init__(self, apart=0.0):
        self.apart = apart

    def encode(self, tower, inputs):
        if tower == "image":
            return torch.stack([unit(16, seed=image.getpixel((0, 0))[0]) for image in inputs]).float()
        noise = unit(len(inputs), 16, seed=999)
        features = torch.stack([unit(16, seed=int(text.split()[0])) for text in inputs]) + 0.3 * noise
        features[:, 0] += self.apart
        return F.normalize(features, dim=1).float()


def evaluation(max_samples=None, k=3, **data):
    return Geometry(every="never", dataset=ColourData(**data), max_samples=max_samples, k=k)


def build(**knobs):
    return evaluation(**knobs).build(Sources(Path()))


# --- distances ------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 5))
def test_alignment_and_uniformity_are_those_of_wang_and_isola(seed, n, tile):
    x, y = unit(n, 4, seed=seed), unit(n, 4, seed=seed + 1)
    expected = (x - y).norm(dim=1).pow(2).mean()
    assert alignment(x, y).mean().item() == pytest.approx(expected.item())
    expected = torch.pdist(x).pow(2).mul(-2).exp().mean().log()  # their code
    assert uniformity(x, torch.arange(n), tile=tile) == pytest.approx(expected.item())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_uniformity_leaves_positives_out(seed, n):
    x, y = unit(n, 4, seed=seed), unit(2 * n, 4, seed=seed + 1)
    owners = torch.arange(n).repeat(2)
    across = [
        math.exp(-2 * float((x[i] - y[j]).square().sum())) for i in range(n) for j in range(2 * n) if owners[j] != i
    ]
    within = [
        math.exp(-2 * float((y[i] - y[j]).square().sum()))
        for i in range(2 * n)
        for j in range(2 * n)
        if owners[j] != owners[i]
    ]
    assert uniformity(x, torch.arange(n), y, owners) == pytest.approx(math.log(np.mean(across)))
    assert uniformity(y, owners) == pytest.approx(math.log(np.mean(within)))


def test_uniformity_of_one_place_is_0_and_of_two_opposite_ones_as_low_as_it_gets_for_two():
    same = unit(1, 4).expand(5, -1)
    assert uniformity(same, torch.arange(5)) == pytest.approx(0)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]]), torch.arange(2)) == pytest.approx(-8)
    assert math.isnan(uniformity(same, torch.zeros(5)))


def test_uniformity_of_many_directions_nears_its_bound():
    assert uniformity(unit(1500, 512), torch.arange(1500)) == pytest.approx(-4, abs=0.05)


def test_the_gap_is_the_distance_of_the_means():
    x = torch.tensor([[1.0, 0], [0, 1]])
    assert modality_gap(x, x) == 0
    assert modality_gap(x, -x) == pytest.approx(2 * math.sqrt(0.5))


def test_modalities_that_are_mixed_cannot_be_told_apart_and_those_with_a_gap_can():
    x, y = unit(2, 200, 8).unbind()
    hits = separability(x, y)
    assert len(hits) == 400
    assert stats.binomtest(int(hits.sum()), 400, 0.5).pvalue > 0.001
    assert separability(unit(50, 8, shift=3.0), unit(50, 8, shift=-3.0)).mean() == 1


# --- spread ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_the_effective_rank_of_an_orthonormal_set_is_its_size_and_of_one_vector_1(seed, n):
    q = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q
    assert effective_rank(spectrum(q[:n])) == pytest.approx(n)
    assert effective_rank(spectrum(q[:1].expand(5, -1))) == pytest.approx(1)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 20), st.integers(2, 6))
def test_the_effective_rank_is_the_entropy_of_the_spectrum_and_does_not_mind_rotation(seed, n, dim):
    x = unit(n, dim, seed=seed)
    values = np.linalg.svd(x.numpy(), compute_uv=False)
    np.testing.assert_allclose(spectrum(x), values, atol=1e-12)
    expected = math.exp(stats.entropy(values))
    assert effective_rank(spectrum(x)) == pytest.approx(expected)
    assert 1 <= expected <= min(n, dim) + 1e-9
    q = torch.linalg.qr(unit(dim, dim, seed=seed + 1)).Q
    assert effective_rank(spectrum(x @ q)) == pytest.approx(expected)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 20))
def test_anisotropy_is_the_mean_cosine_of_all_pairs_in_every_sample_drawn(seed, n):
    x = unit(n, 4, seed=seed, shift=0.5)
    cosines = (x @ x.T).numpy()
    ones = torch.ones(1, n, dtype=torch.float64)
    assert anisotropy(x)(ones).item() == pytest.approx(cosines[~np.eye(n, dtype=bool)].mean())
    counts = np.random.default_rng(seed).integers(0, 3, size=n)
    counts[:2] = 1
    rows = np.repeat(np.arange(n), counts)
    different = rows[:, None] != rows
    expected = cosines[rows][:, rows][different].mean()
    assert anisotropy(x)(torch.from_numpy(counts).double()[None]).item() == pytest.approx(expected)
    groups = torch.arange(n) // 2  # drawn two by two
    together = torch.randint(1, 3, (3, int(groups.max()) + 1), generator=torch.Generator().manual_seed(seed)).double()
    torch.testing.assert_close(anisotropy(x, groups)(together), anisotropy(x)(together[:, groups]))


def test_anisotropy_of_one_repeated_vector_is_1_and_of_an_orthonormal_set_0():
    opposite = torch.cat([torch.eye(3), -torch.eye(3)])
    for features, expected in ((unit(1, 5).expand(7, -1), 1), (torch.eye(5), 0), (opposite, -1 / 5)):
        ones = torch.ones(1, len(features), dtype=torch.float64)
        assert anisotropy(features)(ones).item() == pytest.approx(expected)


# --- neighbours -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 9))
def test_every_item_is_counted_for_each_query_that_has_it_among_its_nearest(seed, k, tile):
    queries, items = unit(7, 3, seed=seed), unit(5, 3, seed=seed + 1)
    expected = [0] * 5
    for query in queries:
        for item in sorted(range(5), key=lambda j: -float(query @ items[j]))[:k]:
            expected[item] += 1
    assert k_occurrence(queries, items, k, tile).tolist() == expected


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=20))
def test_skewness_is_that_of_scipy(values):
    expected = stats.skew(values) if len(set(values)) > 1 else 0
    assert skewness(torch.tensor(values)) == pytest.approx(expected, abs=1e-9)


def test_items_found_at_random_have_the_hubness_and_the_anti_hubs_of_chance():
    rng = np.random.default_rng(0)
    found = np.concatenate([rng.choice(400, size=5, replace=False) for _ in range(300)])
    skewed, never = hubness(torch.from_numpy(np.bincount(found, minlength=400)), 300)
    assert skewed.chance == pytest.approx(stats.binom(300, 5 / 400).stats("s"))
    assert never.chance == pytest.approx(stats.binom(300, 5 / 400).pmf(0))
    assert abs(skewed.value - skewed.chance) < 3.3 * math.sqrt(6 / 400) * 2
    assert stats.binomtest(round(400 * never.value), 400, never.chance).pvalue > 0.001


def test_one_item_that_is_near_to_everything_is_a_hub_and_leaves_the_others_alone():
    items = torch.cat([torch.ones(1, 8), -unit(9, 8).abs()])
    skewed, never = hubness(k_occurrence(unit(50, 8).abs(), items, 1), 50)
    assert never.value == 0.9 > never.chance
    assert skewed.value > 2 > skewed.chance


def all_different(owners):
    return Matches.of(owners, torch.arange(int(owners.max()) + 1), torch.arange(len(owners)))


def naive_margins(images, texts, owners, image_ids, caption_ids):
    """Pair by pair."""
    n, m = len(images), len(texts)
    of_image = [{int(caption_ids[j]) for j in range(m) if image_ids[owners[j]] == image_ids[i]} for i in range(n)]
    to_text, to_image = [], []
    for j in range(m):
        own = int(owners[j])
        pair = float(images[own] @ texts[j])
        wrong_texts = [
            c for c in range(m) if int(caption_ids[c]) not in of_image[own] and image_ids[owners[c]] != image_ids[own]
        ]
        wrong_images = [
            i for i in range(n) if image_ids[i] != image_ids[own] and int(caption_ids[j]) not in of_image[i]
        ]
        to_text.append(pair - max((float(images[own] @ texts[c]) for c in wrong_texts), default=math.nan))
        to_image.append(pair - max((float(images[i] @ texts[j]) for i in wrong_images), default=math.nan))
    return to_text, to_image


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 6), st.integers(2, 9), st.integers(1, 9))
def test_margins_are_those_found_pair_by_pair_with_what_is_the_same_left_out(seed, n, num_images, num_texts, tile):
    rng = np.random.default_rng(seed)
    owners = torch.from_numpy(np.repeat(np.arange(n), rng.integers(1, 4, size=n)))
    image_ids = torch.from_numpy(rng.integers(num_images, size=n))
    caption_ids = torch.from_numpy(rng.integers(num_texts, size=len(owners)))
    images, texts = unit(n, 4, seed=seed), unit(len(owners), 4, seed=seed + 1)
    found = margins(images, texts, owners, Matches.of(owners, image_ids, caption_ids), tile)
    for one, expected in zip(found, naive_margins(images, texts, owners, image_ids, caption_ids), strict=True):
        np.testing.assert_allclose(one, expected, atol=1e-12)


def test_a_pair_that_is_there_twice_is_not_its_own_negative():
    images = torch.eye(3)[[0, 0, 1]]
    ids = torch.tensor([0, 0, 1])
    twice = margins(images, images, torch.arange(3), Matches.of(torch.arange(3), ids, ids))
    assert twice.image_to_text.tolist() == twice.text_to_image.tolist() == [1, 1, 1]
    once = margins(images, images, torch.arange(3), all_different(torch.arange(3)))
    assert once.image_to_text.tolist() == once.text_to_image.tolist() == [0, 0, 1]


# --- centring and whitening -----------------------------------------------------------------------------------------


def test_centring_takes_the_mean_of_others_away_and_leaves_unit_norms():
    x, fit = unit(50, 6, shift=1.0), unit(40, 6, seed=1, shift=1.0)
    expected = x - fit.mean(dim=0)
    torch.testing.assert_close(centred(x, fit), expected / expected.norm(dim=1, keepdim=True))


def test_whitening_makes_all_directions_alike():
    scales = torch.tensor([3.0, 1, 0.3, 0.1], dtype=torch.float64)
    x = torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scales + 2
    shares = torch.linalg.eigvalsh(torch.cov(whitened(x[:10_000], x[10_000:]).T)) * 4
    torch.testing.assert_close(shares, torch.ones(4, dtype=torch.float64), atol=0.06, rtol=0)


def test_statistics_of_one_half_do_not_see_the_other():
    images, texts = unit(20, 6), unit(20, 6, seed=1)
    owners, order = torch.arange(20), np.random.default_rng(0).permutation(20)
    before = retrieval_after(images, texts, owners, all_different(owners))
    changed = images.clone()
    changed[order[:10]] = unit(10, 6, seed=2)
    after = retrieval_after(changed, texts, owners, all_different(owners))
    assert before["i2t_r1"] == after["i2t_r1"]
    assert before["t2i_r1"].count == 10
    assert before["t2i_r1"].chance == pytest.approx(0.1)
    assert before["i2t_r1"].chance == pytest.approx(0.1)


def test_centring_closes_a_gap_that_hides_what_is_right():
    images = unit(200, 16)
    texts = images + 0.05 * unit(200, 16, seed=1)
    apart = torch.zeros(16, dtype=torch.float64)
    apart[0] = 8.0
    away = F.normalize(images * torch.linspace(0.5, 2, 200)[:, None] + apart, dim=1)
    found = retrieval_after(
        away, F.normalize(texts - apart, dim=1), torch.arange(200), all_different(torch.arange(200))
    )
    assert found["t2i_r1_centred"].value > found["t2i_r1"].value


def test_permuted_pairs_are_at_chance_in_every_variant():
    images, texts = unit(600, 32, shift=0.3), unit(1800, 32, seed=1, shift=-0.2)
    owners = torch.arange(600).repeat_interleave(3)
    found = retrieval_after(images, texts, owners, all_different(owners))
    assert set(found) == {f"{d}_r1{c}" for d in ("i2t", "t2i") for c in ("", "_centred", "_whitened")}
    for name, one in found.items():
        most = stats.binom(300, one.chance).ppf(0.9995) / 300
        assert one.value <= most, name
        assert one.count == (300 if name.startswith("i2t") else 900)


# --- evaluation -----------------------------------------------------------------------------------------------------


def test_a_space_without_a_gap_and_one_with_it_are_told_apart():
    together, apart = build()(ColourEncoder()), build()(ColourEncoder(apart=1.5))
    assert set(together.metrics) == {*evaluation().metrics, "alignment_text"}
    for name, found in together.metrics.items():
        if found.low is not None:
            assert found.low <= found.high, name
    assert together.metrics["i2t_r1"].value == together.metrics["t2i_r1"].value == 1
    assert together.metrics["margin_i2t"].value > 0
    assert together.metrics["modality_gap"].value < 0.2 < 0.6 < apart.metrics["modality_gap"].value
    assert together.metrics["modality_separability"].value < 0.8 < apart.metrics["modality_separability"].value
    assert together.metrics["anisotropy_text"].value < 0.1 < 0.3 < apart.metrics["anisotropy_text"].value
    assert set(together.figures) == {"spectrum", "map"}
    for draw in together.figures.values():
        assert len(draw().axes) == 1


def test_with_one_caption_an_image_texts_have_no_alignment_among_themselves():
    assert set(build(captions=1)(ColourEncoder()).metrics) == set(evaluation().metrics)


def test_a_collapsed_model_looks_collapsed():
    report = build()(SameEncoder())
    metrics = {name: found.value for name, found in report.metrics.items()}
    for name in ("anisotropy_image", "anisotropy_text", "effective_rank_image", "effective_rank_text"):
        assert metrics[name] == pytest.approx(1, abs=1e-3), name
    for name in ("uniformity_image", "uniformity_cross", "margin_i2t", "margin_t2i", "alignment", "modality_gap"):
        assert metrics[name] == pytest.approx(0, abs=1e-6), name
    assert metrics["i2t_r1"] == metrics["t2i_r1"] == 0
    assert metrics["modality_separability"] <= 0.5
    for draw in report.figures.values():
        draw()


def test_images_and_captions_that_are_there_twice_are_no_negatives():
    once, twice = build(), build(size=48)  # every colour again
    assert twice(ColourEncoder()).metrics["margin_t2i"].value > 0
    assert once(ColourEncoder()).metrics["margin_t2i"].value == pytest.approx(
        twice(ColourEncoder()).metrics["margin_t2i"].value, abs=0.15
    )


def test_only_the_first_samples_are_taken_if_so_many_are_asked_for():
    assert build(max_samples=12)(ColourEncoder()).metrics["anisotropy_image"].count == 12


def test_building_reads_no_image_and_its_result_travels_to_other_processes():
    run = build(readable=False)
    assert isinstance(pickle.loads(pickle.dumps(run)), partial)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"size": 9}, "the dataset has 9 images: its geometry needs at least 10"),
        ({"k": 25}, "the dataset has 24 images: its geometry needs at least 25, as k says"),
        ({"captions": 0}, r"sample 0 of the dataset \(0\) has no caption: each image needs one"),
    ],
)
def test_what_has_no_geometry_is_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        build(**knobs)


@pytest.mark.parametrize("knobs", [{"k": 0}, {"max_samples": 9}])
def test_too_few_samples_or_neighbours_are_no_setting(knobs):
    with pytest.raises(ValidationError):
        evaluation(**knobs)


class Pixels:
    """Images by their mean colours, texts by their letters: towers that know nothing of each other."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        if tower == "image":
            rows = [np.asarray(image.convert("RGB").resize((3, 3)), dtype=np.float32).reshape(-1) for image in inputs]
            return F.normalize(torch.from_numpy(np.stack(rows)) - 100, dim=1)
        counts = [[float(text.lower().count(chr(97 + i))) for i in range(26)] + [1.0] for text in inputs]
        return F.normalize(torch.tensor(counts), dim=1)


def test_scenes_of_shapes_go_all_the_way():
    part = Geometry(every="never", dataset=Shapes(size=30, image_size=32), max_samples=20, k=5)
    metrics = part.build(Sources(Path()))(Pixels()).metrics
    assert set(metrics) == {*part.metrics, "alignment_text"}
    assert metrics["alignment_text"].count == 60


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_photos_go_all_the_way_and_towers_that_know_nothing_are_at_chance():
    part = Geometry(every="never", dataset=Shards(urls="flickr8k-val-000.tar"), max_samples=200, k=10)
    metrics = part.build(Sources(Path(DATASETS)))(Pixels()).metrics
    assert metrics["anisotropy_text"].count == 1000
    assert metrics["modality_separability"].low > 0.9
    for name in ("i2t_r1", "t2i_r1", "t2i_r1_centred", "i2t_r1_whitened"):
        assert metrics[name].low <= metrics[name].chance + 0.01
        assert metrics[name].value < 0.06
