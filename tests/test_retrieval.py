"""Laws of retrieval."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from multimodal.batch import Sample
from multimodal.evals.ranking import METRICS, Matches, best_ranks, chance_metrics, ndcg, rank_metrics, ranked
from multimodal.evals.retrieval import DIRECTIONS, Retrieval, digests, nearest, pick_queries
from multimodal.parts import Dataset, Source, Sources


def pairs_only(owners, num_images):
    """That a caption is right for its own image, whatever else is equal."""
    return Matches.of(owners, torch.arange(num_images), torch.arange(len(owners)))


def retrieval_ranks(images, texts, owners, tile=2**20):
    """Both directions, where nothing is there twice."""
    matches = pairs_only(owners, len(images))
    return ranked(images, texts, matches, tile)[0], ranked(texts, images, matches.reversed, tile)[0]


def metrics_of(ranks):
    """Of ranks alone, each query with one right item among 100."""
    found = rank_metrics(ranks, 1 / torch.log2(1 + ranks.double()), torch.ones_like(ranks), 100)
    return {name: one.value for name, one in found.items()}


def brute_force(images, texts, owners):
    """Ranks by counting, one pair at a time."""
    scores = images @ texts.T
    image_to_text, text_to_image = [], []
    for i, row in enumerate(scores):
        best = max(row[j] for j in range(len(row)) if owners[j] == i)
        image_to_text.append(1 + sum(row[j] >= best for j in range(len(row)) if owners[j] != i))
    for j, column in enumerate(scores.T):
        text_to_image.append(1 + sum(column[i] >= column[owners[j]] for i in range(len(column)) if i != owners[j]))
    return image_to_text, text_to_image


def features(seed, values=None, dtype=torch.float32, num_images=9, max_captions=4, dim=3):
    """Random features with one to `max_captions` captions an image; whole numbers below `values`, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    captions = torch.randint(1, max_captions + 1, (num_images,), generator=generator)
    owners = torch.arange(num_images).repeat_interleave(captions)
    owners = owners[torch.randperm(len(owners), generator=generator)]
    shapes = (num_images, dim), (len(owners), dim)
    if values is None:
        images, texts = (F.normalize(torch.randn(shape, generator=generator), dim=1) for shape in shapes)
    else:
        images, texts = (torch.randint(values, shape, generator=generator) for shape in shapes)
    return images.to(dtype), texts.to(dtype), owners


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([None, 2, 3]),
    st.integers(1, 50),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_ranks_are_those_found_by_counting_whatever_the_chunk(seed, values, chunk, dtype):
    images, texts, owners = features(seed, values, dtype)
    expected = brute_force(images.double().numpy(), texts.double().numpy(), owners.numpy())
    found = retrieval_ranks(images, texts, owners, chunk * 20)
    assert [ranks.tolist() for ranks in found] == [list(ranks) for ranks in expected]


def test_recalls_are_those_of_the_usual_formula_where_nothing_ties():
    images, texts, owners = features(1, num_images=60, dim=16)
    image_to_text, text_to_image = retrieval_ranks(images, texts, owners)
    scores, positive = (images @ texts.T).numpy(), owners.numpy() == np.arange(60)[:, None]
    for k in (1, 5, 10):
        nearest_texts, nearest_images = np.argsort(-scores, axis=1)[:, :k], np.argsort(-scores.T, axis=1)[:, :k]
        i2t = np.take_along_axis(positive, nearest_texts, axis=1).any(axis=1).mean()
        t2i = np.take_along_axis(positive.T, nearest_images, axis=1).any(axis=1).mean()
        assert metrics_of(image_to_text)[f"r{k}"] == pytest.approx(i2t)
        assert metrics_of(text_to_image)[f"r{k}"] == pytest.approx(t2i)


def test_known_ranks():
    scores = torch.tensor([[0.9, 0.1, 0.5, 0.8], [0.9, 0.3, 0.2, 0.1], [0.5, 0.5, 0.5, 0.4], [0.1, 0.2, 0.3, 0.4]])
    right = torch.tensor([[1, 0, 0, 1], [0, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    assert best_ranks(scores, right).tolist() == [1, 2, 3, 4]


def test_other_captions_of_the_image_do_not_stand_in_the_way():
    images, owners = torch.eye(2), torch.tensor([0, 0, 0, 1])
    texts = torch.tensor([[0.7, 0.0], [0.7, 0.0], [0.9, 0.0], [0.8, 0.9]])
    assert retrieval_ranks(images, texts, owners)[0].tolist() == [1, 1]


def test_not_a_number_comes_last():
    images, texts, owners = torch.full((3, 2), torch.nan), torch.full((6, 2), torch.nan), torch.arange(6) // 2
    image_to_text, text_to_image = retrieval_ranks(images, texts, owners)
    assert image_to_text.tolist() == [5] * 3  # after the four captions of others
    assert text_to_image.tolist() == [3] * 6


def test_an_image_without_a_caption_comes_after_all():
    assert retrieval_ranks(torch.eye(2), torch.eye(2), torch.tensor([0, 0]))[0].tolist() == [1, 3]


@pytest.mark.parametrize("collapsed", ["image", "text", "both"])
def test_a_collapsed_model_scores_no_better_than_chance(collapsed):
    images, texts, _ = features(0, num_images=40, dim=8, max_captions=1)
    owners = torch.arange(40)
    images = images if collapsed == "text" else images[:1].expand(40, -1)
    texts = texts if collapsed == "image" else texts[:1].expand(40, -1)
    image_to_text, text_to_image = retrieval_ranks(images, texts, owners)
    for k in (1, 5, 10):
        assert metrics_of(image_to_text)[f"r{k}"] <= k / 40 + 1e-9
        assert metrics_of(text_to_image)[f"r{k}"] <= k / 40 + 1e-9


@pytest.mark.parametrize("values", [None, 2])
def test_the_order_of_images_and_captions_does_not_matter(values):
    images, texts, owners = features(3, values)
    image_to_text, text_to_image = retrieval_ranks(images, texts, owners)
    image_order, text_order = torch.randperm(len(images)), torch.randperm(len(texts))
    new_owners = image_order.argsort()[owners][text_order]
    moved = retrieval_ranks(images[image_order], texts[text_order], new_owners)
    assert torch.equal(moved[0], image_to_text[image_order])
    assert torch.equal(moved[1], text_to_image[text_order])


def test_metrics_of_known_ranks():
    ranks = [1, 2, 5, 10, 11, 31]
    metrics = metrics_of(torch.tensor(ranks))
    expected = {"r1": 1 / 6, "r5": 3 / 6, "r10": 4 / 6, "median_rank": 7.5, "mean_rank": 10}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert metrics["mrr"] == pytest.approx(np.mean([1 / rank for rank in ranks]))


def test_the_order_shown_for_a_query_agrees_with_its_rank():
    for seed in range(20):
        images, texts, owners = features(seed, values=2)
        ranks = retrieval_ranks(images, texts, owners)[1]
        for text, own, rank in zip(texts, owners.tolist(), ranks.tolist(), strict=True):
            scores = images @ text
            right = torch.arange(len(images)) == own
            order = nearest(scores, right, own, rank, len(images))
            assert sorted(order) == list(range(len(images)))
            assert order.index(own) == rank - 1
            assert scores[order].tolist() == sorted(scores.tolist(), reverse=True)
            assert nearest(scores, right, own, rank, 4) == order[:4]


def test_queries_for_the_picture_are_half_found_and_half_missed_if_there_are_enough():
    ranks = torch.tensor([1, 4, 1, 1, 9, 1, 2, 1, 30, 1])
    assert pick_queries(ranks, 6) == [0, 3, 7, 1, 4, 6]
    assert pick_queries(torch.ones(2), 6) == [0, 1]
    assert pick_queries(torch.full((60,), 7), 6) == [0, 10, 20, 30, 40, 50]
    assert pick_queries(torch.tensor([1, 1, 8, 1, 1]), 4) == [0, 1, 3, 2]


# --- the evaluation -------------------------------------------------------------------------------------------------


class Greys(Source):
    """Image i is grey of level i and has captions that say so, i % 3 + 1 of them."""

    def __init__(self, size, mute):
        self.size, self.mute, self.reads = size, mute, []

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        self.reads.append(index)
        return Sample(str(index), {"image": Image.new("L", (8, 8), index), "text": self.captions(index)})

    def captions(self, index):
        return () if index in self.mute else tuple(f"grey {index} {'again ' * n}" for n in range(index % 3 + 1))


class GreyData(Dataset):
    size: int = 50
    mute: tuple[int, ...] = ()

    def build(self, root):
        return Greys(self.size, self.mute)


class GreyEncoder:
    """The grey level as an angle; texts say one more than they mean, if the encoder is told to be `off`."""

    logit_scale = 100.0

    def __init__(self, off=0):
        self.off = off

    def encode(self, tower, inputs):
        if tower == "image":
            levels = torch.tensor([float(image.getpixel((0, 0))) for image in inputs])
        else:
            levels = torch.tensor([float(text.split()[1]) + self.off for text in inputs])
        return torch.stack([(levels / 100).cos(), (levels / 100).sin()], dim=1)


def evaluation(max_samples=None, **data):
    return Retrieval(every="never", dataset=GreyData(**data), max_samples=max_samples)


def test_a_perfect_model_finds_everything_first():
    metrics = evaluation().build(Sources(Path()))(GreyEncoder()).metrics
    assert sorted(metrics) == sorted(f"{direction}_{metric}" for direction in DIRECTIONS for metric in METRICS)
    assert [(one.value, one.low, one.high) for one in metrics.values()] == [pytest.approx((1, 1, 1))] * len(metrics)


def test_a_model_off_by_one_finds_nothing_first():
    metrics = evaluation().build(Sources(Path()))(GreyEncoder(off=0.9)).metrics
    assert metrics["t2i_r1"].value == pytest.approx(metrics["i2t_r1"].value, abs=0.02)
    assert metrics["t2i_r1"].value == pytest.approx(0.02, abs=0.02)
    assert metrics["t2i_r5"].value == 1


def test_only_the_first_so_many_images_are_taken():
    run = evaluation(max_samples=7).build(Sources(Path()))
    assert len(run.images) == 7
    assert run(GreyEncoder()).metrics["t2i_r1"].value == 1
    assert evaluation(max_samples=10**9).build(Sources(Path()))(GreyEncoder()).metrics["t2i_r1"].value == 1


def test_figures_read_the_images_they_show_and_only_when_drawn():
    run = evaluation().build(Sources(Path()))
    source = run.images.source
    assert source.reads == []
    report = run(GreyEncoder(off=0.9))
    assert sorted(report.figures) == ["retrieval_grid", "similarity_matrix"]
    assert len(source.reads) == 100  # once to embed them, once to see which are equal
    run(GreyEncoder(off=0.9))
    assert len(source.reads) == 150
    report.figures["similarity_matrix"]()
    assert len(source.reads) == 150
    report.figures["retrieval_grid"]()
    assert 150 < len(source.reads) <= 150 + 6 * 6


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"mute": (4,)}, "sample 4 of the dataset has no caption"), ({"size": 0}, "dataset is empty")],
)
def test_images_without_captions_are_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**knobs).build(Sources(Path()))
    with pytest.raises(ValueError, match="max_samples"):
        evaluation(max_samples=0)


# --- what is there twice --------------------------------------------------------------------------------------------


def test_equal_captions_and_equal_images_are_as_right_as_what_belongs_together():
    owners = torch.tensor([0, 1, 2, 3])
    matches = Matches.of(owners, images=torch.tensor([7, 8, 7, 9]), texts=torch.tensor([1, 1, 2, 3]))
    expected = [[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 1]]
    assert matches.right(torch.arange(4)).int().tolist() == expected
    assert matches.counts.tolist() == [3, 2, 3, 1]
    assert matches.reversed.right(torch.arange(4)).int().T.tolist() == expected
    assert matches.reversed.counts.tolist() == [3, 3, 2, 1]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 15))
def test_what_is_right_is_what_some_pair_of_the_same_says(seed, num_images, num_texts):
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(num_images, (num_texts,), generator=generator)
    images, texts = (torch.randint(4, (count,), generator=generator) for count in (num_images, num_texts))
    matches = Matches.of(owners, images, texts)
    told = {(int(images[owner]), int(text)) for owner, text in zip(owners, texts, strict=True)}
    expected = [[(image, text) in told for text in texts.tolist()] for image in images.tolist()]
    assert matches.right(torch.arange(num_images)).tolist() == expected
    assert matches.counts.tolist() == [sum(row) for row in expected]


class Twice(Greys):
    """Every grey level twice, and every caption of all levels alike."""

    def __getitem__(self, index):
        return super().__getitem__(index // 2)

    def captions(self, index):
        return (f"grey {index // 2}",)


class TwiceData(GreyData):
    def build(self, root):
        return Twice(self.size, self.mute)


@pytest.mark.parametrize(("duplicates", "r1"), [("right", 1.0), ("wrong", 0.0)])
def test_duplicates_are_right_unless_papers_are_followed(duplicates, r1):
    part = Retrieval(every="never", dataset=TwiceData(size=20), max_samples=None, duplicates=duplicates)
    metrics = part.build(Sources(Path()))(GreyEncoder()).metrics
    assert {metrics[f"{direction}_r1"].value for direction in DIRECTIONS} == {r1}


def test_images_are_equal_if_size_and_pixels_are():
    images = [Image.new("L", (4, 8), 3), Image.new("L", (8, 4), 3), Image.new("L", (4, 8), 3), Image.new("L", (4, 8))]
    found = digests(images).tolist()
    assert found[0] == found[2]
    assert len(set(found)) == 3


# --- gain and chance ------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 40))
def test_the_gain_is_that_of_scikit_learn_where_nothing_ties(seed, num_items):
    from sklearn.metrics import ndcg_score

    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, num_items, generator=generator, dtype=torch.float64)
    right = torch.rand(5, num_items, generator=generator) < 0.3
    right[:, 0] = True
    expected = [ndcg_score([row], [values], k=10) for row, values in zip(right.numpy(), scores.numpy(), strict=True)]
    assert ndcg(scores, right).tolist() == pytest.approx(expected)


def test_a_tie_is_the_worst_order_of_what_ties():
    scores, right = torch.tensor([[0.5, 0.5, 0.5, 0.1]]), torch.tensor([[True, False, False, True]])
    worst = (1 / np.log2(4) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert ndcg(scores, right).item() == pytest.approx(worst)
    assert ndcg(torch.full((1, 4), torch.nan), right).item() == pytest.approx(worst)
    assert ndcg(scores, torch.zeros(1, 4, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize("seed", range(3))
def test_features_that_know_nothing_score_what_chance_says(seed):
    """Within the interval of 99.9% over 400 draws of features."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(12, (30,), generator=generator).sort().values
    owners[-1], owners[:2] = 11, 0
    images = torch.arange(12) // 2 * 2  # each twice
    matches = Matches.of(owners, images, torch.randint(20, (30,), generator=generator))
    chance = chance_metrics(matches.counts, 30)
    found = []
    for _ in range(400):
        scores = torch.rand(12, 30, generator=generator)
        right = matches.right(torch.arange(12))
        ranks, gains = best_ranks(scores, right), ndcg(scores, right)
        metrics = rank_metrics(ranks, gains, matches.counts, 30) if not found else None
        assert metrics is None or all(one.chance == chance[name] for name, one in metrics.items())
        hits = [(ranks <= k).double().mean() for k in (1, 5, 10)]
        found.append([*hits, (1 / ranks).mean(), gains.mean(), ranks.double().mean()])
    found = torch.tensor(found)
    for name, values in zip(("r1", "r5", "r10", "mrr", "ndcg10", "mean_rank"), found.T, strict=True):
        assert abs(values.mean() - chance[name]) < 3.29 * values.std() / 20, name
