"""Laws of semantic text similarity, and of reading text out of archives."""

import io
import os
import pickle
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats

from multimodal.data.archives import read_text
from multimodal.evals import intervals
from multimodal.evals.sts import TextSimilarity, correlation, midranks, pearson, read_pairs, spearman
from multimodal.parts import Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")
ROWS = "".join(
    f"main-captions\tMSRvid\t2012test\t{n:04}\t{score}\t{first}\t{second}\n"
    for n, (score, first, second) in enumerate(
        [
            (5.0, "a cat", "a cat"),
            (2.5, "a cat", "a dog"),
            (0.0, 'one "quote', "a dog"),
            (1, "one", "a cat\textra\tmore"),
        ]
    )
)


class Letters:
    """Texts by how often they have each letter; asked for nothing but text."""

    logit_scale = 1.0

    def encode(self, tower, inputs):
        assert tower == "text"
        counts = torch.tensor([[float(text.count(chr(97 + i))) for i in range(26)] for text in inputs])
        return F.normalize(counts + 0.01, dim=1)


class Oracle:
    """The cosine of the two texts "left N" and "right N" is whatever is wanted of pair N."""

    logit_scale = 1.0

    def __init__(self, cosines):
        self.cosines = cosines

    def encode(self, tower, inputs):
        angles = [0.0 if text.startswith("left") else float(np.arccos(self.cosines[int(text[6:])])) for text in inputs]
        return torch.tensor([[np.cos(a), np.sin(a)] for a in angles], dtype=torch.float32)


def table(scores):
    return "".join(f"g\tf\ty\t{n}\t{score}\tleft {n}\tright {n}\n" for n, score in enumerate(scores))


def similarity(path="pairs.csv", member=None):
    return TextSimilarity(every="never", path=path, member=member)


def build(folder, text=ROWS):
    (folder / "pairs.csv").write_text(text)
    return similarity().build(Sources(folder))


def archive(folder, name="pairs.tar.gz"):
    with tarfile.open(folder / name, "w:gz") as tar:
        for member, content in {"sts/dev.csv": ROWS.encode(), "sts/bad.csv": b"\xff\xfe\xfa"}.items():
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return name


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(3, 30), st.sampled_from([2, 5, 1000]))
@example(6401, 10, 2)  # all drawn are equal, and their mean is rounded
def test_correlations_are_those_of_scipy_in_every_sample_drawn(seed, count, values):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(values, size=count).astype(float), rng.normal(size=count)
    drawn = np.stack([np.ones(count, dtype=int), np.bincount(rng.integers(count, size=count), minlength=count)])
    tensors = torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(drawn)
    for row, times in enumerate(drawn):
        rows = np.repeat(np.arange(count), times)
        ranks = midranks(tensors[0], tensors[2])[row]
        np.testing.assert_allclose(ranks[rows], stats.rankdata(x[rows]))
        if len(set(x[rows])) > 1 and len(set(y[rows])) > 1:
            assert spearman(*tensors)[row].item() == pytest.approx(stats.spearmanr(x[rows], y[rows]).statistic)
            assert pearson(*tensors)[row].item() == pytest.approx(stats.pearsonr(x[rows], y[rows]).statistic)
        else:
            assert spearman(*tensors)[row].isnan()


def test_ranks_do_not_mind_the_scale_and_pearson_does():
    x = torch.arange(1.0, 11)
    once = torch.ones(1, 10)
    assert spearman(x, x**9, once).item() == pytest.approx(1)
    assert spearman(x, -(x**9), once).item() == pytest.approx(-1)
    assert pearson(x, 3 * x - 7, once).item() == pytest.approx(1)
    assert pearson(x, x**9, once).item() < 0.8


def test_what_does_not_vary_has_no_correlation():
    assert torch.isnan(pearson(torch.ones(5), torch.arange(5.0), torch.ones(1, 5))).all()
    assert torch.isnan(spearman(torch.full((5,), 0.1), torch.arange(5.0), torch.ones(1, 5))).all()


def test_scores_that_know_nothing_have_intervals_around_zero_95_times_of_100(monkeypatch):
    monkeypatch.setattr(intervals, "RESAMPLES", 250)
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for _ in range(200):
        found = correlation(spearman, *torch.randn(2, 60, generator=generator))
        covered += found.low <= 0 <= found.high
    assert stats.binomtest(covered, 200, 0.95).pvalue > 0.001


def test_a_model_that_agrees_with_people_scores_one(tmp_path):
    scores = [0, 1.2, 2.5, 3.8, 5]
    metrics = build(tmp_path, table(scores))(Oracle([0.1, 0.2, 0.5, 0.6, 0.99])).metrics
    assert set(metrics) == set(similarity().metrics) == {"spearman", "pearson"}
    assert metrics["spearman"].value == pytest.approx(1)
    assert metrics["spearman"].chance == 0
    assert metrics["pearson"].count == 5
    reverse = build(tmp_path, table(scores))(Oracle([0.99, 0.6, 0.5, 0.2, 0.1])).metrics
    assert reverse["spearman"].value == pytest.approx(-1)


def test_permuted_pairs_are_at_chance(tmp_path):
    rng = np.random.default_rng(0)
    metrics = build(tmp_path, table(rng.uniform(0, 5, size=1000)))(Oracle(rng.uniform(-1, 1, size=1000))).metrics
    for found in metrics.values():
        assert abs(found.value) < stats.norm.ppf(0.9995) / np.sqrt(999)
        assert found.low < 0 < found.high


def test_rows_may_hold_quotes_and_carry_further_columns():
    pairs = read_pairs(ROWS, "pairs.csv")
    assert [pair.score for pair in pairs] == [5, 2.5, 0, 1]
    assert pairs[2].first == 'one "quote'
    assert pairs[3].second == "a cat"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a\tb\n", r"pairs.csv, line 1: 2 columns by tabs instead of seven \(genre, file"),
        (ROWS + ROWS.replace("5.0", "high"), "line 5: the fifth column should be a score, 0 to 5, got 'high'"),
        (ROWS.replace("2.5", "5.5"), "line 2: the fifth column should be a score, 0 to 5, got '5.5'"),
        (ROWS.replace("2.5", "nan"), "line 2: .*got 'nan'"),
        (ROWS.replace("a dog", " "), "line 2: a sentence is empty"),
        ("", "pairs.csv: 0 pairs with not two different scores"),
        (table([3, 3, 3]), "pairs.csv: 3 pairs with not two different scores"),
    ],
)
def test_a_file_of_another_form_is_refused_by_line(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, text)


def test_text_is_read_from_a_file_or_straight_from_an_archive(tmp_path):
    (tmp_path / "plain.csv").write_text(ROWS)
    assert read_text(tmp_path, "plain.csv", None) == read_text(tmp_path, archive(tmp_path), "sts/dev.csv") == ROWS


@pytest.mark.parametrize(
    ("path", "member", "message"),
    [
        ("pairs.tar.gz", "sts/dve.csv", "has no file 'sts/dve.csv' in it, only sts/.*Did you mean 'sts/dev.csv'"),
        ("pairs.tar.gz", None, "is an archive: set `member` to one of sts/dev.csv, sts/bad.csv"),
        ("pairs.tar.gz", "sts/bad.csv", "pairs.tar.gz:sts/bad.csv is not UTF-8"),
        ("plain.csv", "dev.csv", "plain.csv is no tar archive.*set `member` to null"),
        ("binary.csv", None, "binary.csv is not UTF-8"),
        ("cut.tar.gz", "sts/dev.csv", "cut.tar.gz"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, path, member, message):
    archive(tmp_path)
    (tmp_path / "plain.csv").write_text(ROWS)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\xfa")
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "pairs.tar.gz").read_bytes()[:150])
    with pytest.raises(ValueError, match=message):
        similarity(path, member).build(Sources(tmp_path))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        similarity("nowhere.csv").build(Sources(tmp_path))


def test_it_asks_the_text_tower_alone_and_travels_to_other_processes(tmp_path):
    assert TextSimilarity.towers == ("text",)
    assert isinstance(pickle.loads(pickle.dumps(build(tmp_path))), partial)


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_the_development_pairs_are_all_read_and_common_letters_already_say_something():
    run = similarity("stsb.tar.gz", "stsb/sts-dev.csv").build(Sources(Path(DATASETS)))
    found = run(Letters()).metrics["spearman"]
    assert found.count == 1500
    assert 0.3 < found.low < found.value < found.high < 0.8
