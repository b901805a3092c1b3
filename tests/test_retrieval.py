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
from multimodal.evals.retrieval import Retrieval, best_ranks, nearest, pick_queries, rank_metrics, retrieval_ranks
from multimodal.parts import Dataset, Source, Sources

NAMES = ["i2t_r1", "i2t_r5", "i2t_r10", "i2t_median_rank", "i2t_mean_rank"]


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
    found = retrieval_ranks(images, texts, owners, chunk)
    assert [ranks.tolist() for ranks in found] == [list(ranks) for ranks in expected]


def test_recalls_are_those_of_the_usual_formula_where_nothing_ties():
    images, texts, owners = features(1, num_images=60, dim=16)
    image_to_text, text_to_image = retrieval_ranks(images, texts, owners)
    scores, positive = (images @ texts.T).numpy(), owners.numpy() == np.arange(60)[:, None]
    for k in (1, 5, 10):
        nearest_texts, nearest_images = np.argsort(-scores, axis=1)[:, :k], np.argsort(-scores.T, axis=1)[:, :k]
        i2t = np.take_along_axis(positive, nearest_texts, axis=1).any(axis=1).mean()
        t2i = np.take_along_axis(positive.T, nearest_images, axis=1).any(axis=1).mean()
        assert rank_metrics(image_to_text, "i2t")[f"i2t_r{k}"] == pytest.approx(i2t)
        assert rank_metrics(text_to_image, "t2i")[f"t2i_r{k}"] == pytest.approx(t2i)


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
        assert rank_metrics(image_to_text, "i2t")[f"i2t_r{k}"] <= k / 40 + 1e-9
        assert rank_metrics(text_to_image, "t2i")[f"t2i_r{k}"] <= k / 40 + 1e-9


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
    metrics = rank_metrics(torch.tensor([1, 2, 5, 10, 11, 31]), "i2t")
    assert metrics == pytest.approx(dict(zip(NAMES, [1 / 6, 3 / 6, 4 / 6, 7.5, 10], strict=True)))


def test_the_order_shown_for_a_query_agrees_with_its_rank():
    for seed in range(20):
        images, texts, owners = features(seed, values=2)
        ranks = retrieval_ranks(images, texts, owners)[1]
        for text, own, rank in zip(texts, owners.tolist(), ranks.tolist(), strict=True):
            scores = images @ text
            order = nearest(scores, own, rank, len(images))
            assert sorted(order) == list(range(len(images)))
            assert order.index(own) == rank - 1
            assert scores[order].tolist() == sorted(scores.tolist(), reverse=True)
            assert nearest(scores, own, rank, 4) == order[:4]


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
    assert list(metrics) == NAMES + [name.replace("i2t", "t2i") for name in NAMES]
    assert set(metrics.values()) == {1.0}


def test_a_model_off_by_one_finds_nothing_first():
    metrics = evaluation().build(Sources(Path()))(GreyEncoder(off=0.9)).metrics
    assert metrics["t2i_r1"] == pytest.approx(metrics["i2t_r1"], abs=0.02) == pytest.approx(0.02, abs=0.02)
    assert metrics["t2i_r5"] == 1


def test_only_the_first_so_many_images_are_taken():
    run = evaluation(max_samples=7).build(Sources(Path()))
    assert len(run.args[0]) == 7
    assert run(GreyEncoder()).metrics["t2i_r1"] == 1
    assert evaluation(max_samples=10**9).build(Sources(Path()))(GreyEncoder()).metrics["t2i_r1"] == 1


def test_figures_read_the_images_they_show_and_only_when_drawn():
    run = evaluation().build(Sources(Path()))
    source = run.args[0].source
    assert source.reads == []
    report = run(GreyEncoder(off=0.9))
    assert sorted(report.figures) == ["retrieval_grid", "similarity_matrix"]
    assert len(source.reads) == 50
    report.figures["similarity_matrix"]()
    assert len(source.reads) == 50
    report.figures["retrieval_grid"]()
    assert 50 < len(source.reads) <= 50 + 6 * 6


@pytest.mark.parametrize(
    ("knobs", "message"),
    [({"mute": (4,)}, "sample 4 of the dataset has no caption"), ({"size": 0}, "dataset is empty")],
)
def test_images_without_captions_are_refused_before_the_run(knobs, message):
    with pytest.raises(ValueError, match=message):
        evaluation(**knobs).build(Sources(Path()))
    with pytest.raises(ValueError, match="max_samples"):
        evaluation(max_samples=0)
