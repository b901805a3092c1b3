"""Laws of association tests."""

import itertools
import json
import math
import os
import pickle
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from encoders import SameEncoder, direction, unit
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from multimodal.evals import weat
from multimodal.evals.weat import (
    Concepts,
    WordAssociation,
    association_test,
    associations,
    effect_size,
    in_template,
    null_differences,
    p_value,
    read_tests,
)
from multimodal.parts import Sources

DATASETS = os.environ.get("MULTIMODAL_DATASETS")
FLOWERS = {
    "targ1": {"category": "Flowers", "examples": ["rose", "tulip", "lily"]},
    "targ2": {"category": "Insects", "examples": ["wasp", "flea", "moth"]},
    "attr1": {"category": "Pleasant", "examples": ["love", "peace"]},
    "attr2": {"category": "Unpleasant", "examples": ["filth", "agony"]},
}


def naive(x, y, a, b):
    """Caliskan et al. 2017, word by word."""

    def cosine(u, v):
        return float(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)))

    def s(w):
        return np.mean([cosine(w, v) for v in a]) - np.mean([cosine(w, v) for v in b])

    of_x, of_y = [s(w) for w in x], [s(w) for w in y]
    effect = (np.mean(of_x) - np.mean(of_y)) / np.std(of_x + of_y, ddof=1)
    total, as_much = 0, 0
    for rows in itertools.combinations(range(len(of_x + of_y)), len(of_x)):
        inside = sum(value for i, value in enumerate(of_x + of_y) if i in rows)
        total, as_much = total + 1, as_much + (inside >= sum(of_x) - 1e-12)
    return effect, as_much / total


class Words:
    """A direction for every text, and words of one kind near to one another."""

    logit_scale = 1.0
    kinds = (["rose", "tulip", "lily", "love", "peace"], ["wasp", "flea", "moth", "filth", "agony"])

    def encode(self, tower, inputs):
        assert tower == "text"
        return torch.stack([self.feature(text) for text in inputs]) if inputs else torch.zeros(0, 16)

    def feature(self, text):
        kind = [float(any(word in text for word in words)) for words in self.kinds]
        return F.normalize(0.3 * direction(text, 16) + torch.tensor([*kind, *[0.0] * 14]), dim=0)


def evaluation(path="tests.json", member=None, tests=None, template=None, permutations=99):
    return WordAssociation(
        every="never", path=path, member=member, tests=tests, template=template, permutations=permutations
    )


def build(folder, content, **knobs):
    (folder / "tests.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return evaluation(**knobs).build(Sources(folder))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 5), st.integers(2, 5), st.integers(1, 4), st.integers(1, 4))
def test_effect_and_p_are_those_of_the_definition_word_by_word(seed, n, m, p, q):
    parts = [unit(rows, 6, seed=seed + i) for i, rows in enumerate((n, m, p, q))]
    found = association_test(*parts, permutations=99)
    effect, expected_p = naive(*(part.numpy() for part in parts))
    assert found.effect.value == pytest.approx(effect)
    assert found.p == pytest.approx(expected_p)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6))
def test_swapped_targets_and_swapped_attributes_change_the_sign(seed, n):
    x, y, a, b = (unit(n, 6, seed=seed + i) for i in range(4))

    def effect(*parts):
        return association_test(*parts, permutations=99).effect.value

    assert effect(y, x, a, b) == pytest.approx(-effect(x, y, a, b))
    assert effect(x, y, b, a) == pytest.approx(-effect(x, y, a, b))
    assert effect(y, x, b, a) == pytest.approx(effect(x, y, a, b))


def test_targets_that_are_the_attributes_have_the_largest_effect_there_is():
    a, b = torch.eye(4)[:1].expand(4, -1), torch.eye(4)[1:2].expand(4, -1)
    found = association_test(a, b, a, b, permutations=99)
    assert found.effect.value == pytest.approx(2 * math.sqrt(7 / 8))  # 2 with the deviation of a population
    assert found.p == pytest.approx(1 / math.comb(8, 4))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 9), st.integers(2, 9))
def test_the_effect_stays_within_its_bounds_for_groups_of_one_size(seed, n, m):
    x, y = torch.randn(2, n, generator=torch.Generator().manual_seed(seed)).unbind()
    assert abs(effect_size(x, y)) <= 2


def test_intervals_keep_the_sizes_of_groups_and_so_the_bounds():
    x, y = torch.tensor([1.0, 1, 1, 0.9]), torch.tensor([-1.0, -1, -1, -0.9])
    features = torch.stack([torch.cat([x, y]), (1 - torch.cat([x, y]) ** 2).sqrt()], dim=1)
    effect = association_test(
        features[:4], features[4:], torch.tensor([[1.0, 0]]), torch.tensor([[-1.0, 0]]), 99
    ).effect
    assert effect.low <= effect.value <= 2 * math.sqrt(7 / 8)
    assert effect.high <= 2 * math.sqrt(7 / 8) + 1e-9


def test_a_model_that_finds_all_alike_has_no_effect_and_no_significance():
    same = unit(1, 8).expand(6, -1)
    found = association_test(same, same, unit(3, 8, seed=1), unit(3, 8, seed=2), permutations=99)
    assert math.isnan(found.effect.value)
    assert math.isnan(found.null)
    assert found.p == 1


def test_p_is_uniform_where_there_is_nothing_whether_divisions_are_counted_or_drawn(monkeypatch):
    values = torch.randn(400, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for limit in (weat.ENUMERATED, 10):
        monkeypatch.setattr(weat, "ENUMERATED", limit)
        weat._divisions.cache_clear()
        found = [p_value(v[:5], v[5:], null_differences(v[:5], v[5:], 999)) for v in values]
        assert stats.kstest(found, "uniform").pvalue > 0.001
        assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09
    weat._divisions.cache_clear()


def test_drawn_divisions_agree_with_all_of_them_and_are_never_impossible(monkeypatch):
    x, y = torch.randn(2, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64).unbind()
    exact = null_differences(x, y, 99)
    weat._divisions.cache_clear()
    monkeypatch.setattr(weat, "ENUMERATED", 10)
    drawn = null_differences(x, y, 20_000)
    assert exact.exact
    assert len(exact.values) == math.comb(14, 7)
    assert not drawn.exact
    assert abs(p_value(x, y, drawn) - p_value(x, y, exact)) < 0.015
    assert p_value(x + 100, y, null_differences(x + 100, y, 999)) == pytest.approx(1 / 1000, abs=1 / 1000)
    assert p_value(x + 100, y, null_differences(x + 100, y, 999)) > 0
    np.testing.assert_array_equal(drawn.values, null_differences(x, y, 20_000).values)  # on every rank
    weat._divisions.cache_clear()


def test_a_target_is_as_near_to_an_attribute_as_its_mean_cosine_says():
    x, a, b = unit(5, 8), unit(3, 8, seed=1), unit(4, 8, seed=2)
    np.testing.assert_allclose(associations(x, a, b), (x @ a.T).mean(dim=1) - (x @ b.T).mean(dim=1))


def test_tests_are_read_and_chosen_by_name():
    text = json.dumps({"one": FLOWERS, "two": FLOWERS})
    assert list(read_tests(text, "t.json", None)) == ["one", "two"]
    found = read_tests(text, "t.json", ["two"])
    assert found == {
        "two": Concepts(("rose", "tulip", "lily"), ("wasp", "flea", "moth"), ("love", "peace"), ("filth", "agony"))
    }


def without(role, examples):
    return {"one": {**FLOWERS, role: {"category": "", "examples": examples}}}


@pytest.mark.parametrize(
    ("content", "knobs", "message"),
    [
        ("{", {}, r"tests\.json: not JSON"),
        ("[]", {}, r"tests\.json should be a mapping of tests"),
        ({}, {}, "should be a mapping of tests"),
        ({"weat1": FLOWERS}, {"tests": ["weat2"]}, "tests: .*has no test 'weat2'. Did you mean 'weat1'"),
        ({"weat1": FLOWERS}, {"tests": ["x"]}, "has no test 'x'. There are: weat1"),
        ({"one": {}}, {}, r"tests\.json: one\.targ1\.examples should be a list of texts"),
        (without("attr2", ["a", 1]), {}, r"one\.attr2\.examples should be a list of texts"),
        (without("attr2", ["a", " "]), {}, r"one\.attr2\.examples should be a list of texts, none of them empty"),
        (without("attr1", []), {}, r"one\.attr1\.examples has 0 texts; an effect needs 1 or more"),
        (without("targ2", ["x"]), {}, r"one\.targ2\.examples has 1 texts; an effect needs 2"),
    ],
)
def test_a_file_of_another_form_is_refused_by_the_name_of_the_test(tmp_path, content, knobs, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, content, **knobs)


@pytest.mark.parametrize("template", ["a photo", "{} {}", "{x}"])
def test_a_template_has_one_place_for_the_word(template):
    with pytest.raises(ValidationError, match=r"(?s)template.*exactly once"):
        evaluation(template=template)


def test_words_are_set_into_the_template_and_sentences_are_not():
    assert in_template("a photo of a {}.", "rose") == "a photo of a rose."
    assert in_template("a photo of a {}.", "This is a rose.") == "This is a rose."
    assert in_template(None, "rose") == "rose"


def test_an_association_that_is_there_is_found(tmp_path):
    report = build(tmp_path, {"flowers": FLOWERS}, tests=["flowers"])(Words())
    assert report.metrics["flowers_effect"].value > 1
    assert report.metrics["flowers_effect"].low > 0
    assert report.metrics["flowers_p"] == 1 / math.comb(6, 3)
    assert report.metrics["share_significant"].value == 0  # three words a group are too few: 1 / 20 at best
    assert report.metrics["mean_absolute_effect"].value > report.metrics["mean_absolute_effect"].chance
    assert set(report.metrics) == set(evaluation(tests=["flowers"]).metrics)
    report.figures["effects"]()


def test_without_names_only_what_all_tests_have_together_is_known_before(tmp_path):
    assert evaluation().metrics == ("mean_absolute_effect", "share_significant")
    metrics = build(tmp_path, {"a": FLOWERS, "b": FLOWERS}, template="a {} here")(Words()).metrics
    assert set(metrics) == {*evaluation().metrics, "a_effect", "a_p", "b_effect", "b_p"}


def test_a_collapsed_model_has_a_report_and_a_figure_too(tmp_path):
    report = build(tmp_path, {"flowers": FLOWERS})(SameEncoder())
    assert report.metrics["flowers_p"] == 1
    report.figures["effects"]()


def test_it_asks_the_text_tower_alone_and_travels_to_other_processes(tmp_path):
    assert WordAssociation.towers == ("text",)
    assert isinstance(pickle.loads(pickle.dumps(build(tmp_path, {"flowers": FLOWERS}))), partial)


@pytest.mark.skipif(not DATASETS, reason="needs the folder that MULTIMODAL_DATASETS names")
def test_the_published_tests_are_all_read():
    knobs = {"path": "weat_seat.tar.gz", "member": "weat_seat/weat_seat.json"}
    tests = evaluation(**knobs).build(Sources(Path(DATASETS))).args[0]
    assert len(tests) == 46
    assert len(tests["weat1"].target_x) == len(tests["weat1"].attribute_b) == 25
    metrics = evaluation(**knobs, tests=["weat6", "sent-weat6"]).build(Sources(Path(DATASETS)))(Words()).metrics
    assert 0 < metrics["weat6_p"] <= 1
    assert metrics["sent-weat6_effect"].count == 128
