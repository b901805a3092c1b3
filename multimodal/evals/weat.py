"""Association tests on the text tower: whether two groups of texts lie nearer to one set of attributes than to another.

With words this is WEAT (Caliskan et al. 2017), with sentences SEAT (May et al. 2019).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, Strict
from torch import Tensor

from multimodal.data.archives import described, read_text
from multimodal.evals import weat_figures
from multimodal.evals.intervals import bootstrap
from multimodal.files import from_json
from multimodal.parts import Encoder, Estimate, Eval, Report, Sources, did_you_mean

ENUMERATED = 100_000
"""Up to so many ways to divide the targets all of them are gone through."""
SIGNIFICANT = 0.05
ROUNDING = 1e-9
"""Associations nearer to each other than this are equal: sums in another order differ by less."""

# --- metrics --------------------------------------------------------------------------------------------------------


def associations(
    targets: Tensor,  # [n, D] unit norm
    attribute_a: Tensor,  # [p, D] unit norm
    attribute_b: Tensor,  # [q, D] unit norm
) -> Tensor:  # float64 [n]
    """How much nearer each target is to attribute A than to B: the difference of its mean cosines, s(w, A, B)."""
    return targets.double() @ (attribute_a.double().mean(dim=0) - attribute_b.double().mean(dim=0))


def effect_size(
    x: Tensor,  # [n] associations of one group of targets
    y: Tensor,  # [m] of the other
) -> float:
    """The difference of their means in standard deviations of all of them: Cohen's d, between -2 and 2 for n = m.

    Not a number where all associations are equal, as with a collapsed model. The deviation is that of a sample
    (n + m - 1), as in the code of May et al. 2019. Caliskan et al. 2017.
    """
    return _effect_sizes(torch.cat([x, y]), len(x), torch.ones(1, len(x) + len(y))).item()


def _effect_sizes(
    values: Tensor,  # [n + m] associations, those of X first
    first: int,  # n
    counts: Tensor,  # [R, n + m] how often each target is there
) -> Tensor:  # float64 [R]
    values, counts = values.double(), counts.double()
    in_x, in_y = counts[:, :first], counts[:, first:]
    total = counts.sum(dim=1)
    difference = in_x @ values[:first] / in_x.sum(dim=1) - in_y @ values[first:] / in_y.sum(dim=1)
    mean = counts @ values / total
    deviation = ((counts * (values - mean[:, None]) ** 2).sum(dim=1) / (total - 1)).sqrt()
    return torch.where(deviation > ROUNDING, difference / deviation, torch.nan)


@lru_cache(maxsize=32)
def _divisions(count: int, first: int, permutations: int, seed: int) -> tuple[NDArray[Any], bool]:
    """Which `first` of `count` targets are X, by row: every way, or so many at random; and whether it is every way."""
    if math.comb(count, first) <= ENUMERATED:
        return np.array(list(combinations(range(count), first)), dtype=np.int16), True
    rng, places = np.random.default_rng(seed), np.arange(count, dtype=np.int32)
    rows = max(1, 2**22 // count)
    drawn = [
        rng.permuted(np.tile(places, (min(rows, permutations - start), 1)), axis=1)[:, :first]
        for start in range(0, permutations, rows)
    ]
    return np.concatenate(drawn), False


class NullDifferences(NamedTuple):
    """What chance makes of the difference of the two groups' means."""

    values: NDArray[Any]
    """float64 [R] by division of the targets."""
    exact: bool
    """Whether these are all divisions, the one that is tested among them."""


def null_differences(
    x: Tensor,  # [n] associations of one group of targets
    y: Tensor,  # [m] of the other
    permutations: int,
    seed: int = 0,
) -> NullDifferences:
    """The difference of means if targets are divided into X and Y at random.

    For every division where there are at most 100,000, otherwise for so many `permutations`, always the same ones.
    """
    values = torch.cat([x, y]).double().numpy()
    divisions, exact = _divisions(len(values), len(x), permutations, seed)
    rows = max(1, 2**22 // len(x))
    chunks = [divisions[start : start + rows] for start in range(0, len(divisions), rows)]
    sums = np.concatenate([values[chunk].sum(axis=1) for chunk in chunks])
    return NullDifferences(sums / len(x) - (values.sum() - sums) / len(y), exact)


def p_value(
    x: Tensor,  # [n] associations of one group of targets
    y: Tensor,  # [m] of the other
    null: NullDifferences,
) -> float:
    """How often chance associates X with A at least as much as it is; one-sided.

    Where divisions were drawn, the division as it is counts as one more, so that it is never 0 (Phipson and Smyth
    2010). Not a number where an association is none.
    """
    least = (x.double().mean() - y.double().mean()).item() - ROUNDING
    if not math.isfinite(least):
        return math.nan
    as_much = int((null.values >= least).sum())
    return as_much / len(null.values) if null.exact else (as_much + 1) / (len(null.values) + 1)


class Association(NamedTuple):
    """What a test found."""

    effect: Estimate
    p: float
    """One-sided: how often chance makes as large an effect."""
    null: float
    """The mean effect without its sign that chance makes."""


def association_test(
    target_x: Tensor,  # [n, D] unit norm
    target_y: Tensor,  # [m, D] unit norm
    attribute_a: Tensor,  # [p, D] unit norm
    attribute_b: Tensor,  # [q, D] unit norm
    permutations: int,
) -> Association:
    """Effect size with its interval, over targets drawn again within their groups, and the p-value."""
    x, y = (associations(targets, attribute_a, attribute_b) for targets in (target_x, target_y))
    values = torch.cat([x, y])
    in_y = (torch.arange(len(values)) >= len(x)).long()
    low, high = bootstrap(partial(_effect_sizes, values, len(x)), len(values), strata=in_y)
    effect = Estimate(effect_size(x, y), low.item(), high.item(), chance=0.0, count=len(values))
    null = null_differences(x, y, permutations)
    deviation = values.std().item()
    by_chance = float(np.abs(null.values).mean()) / deviation if deviation > ROUNDING else math.nan
    return Association(effect, p_value(x, y, null), by_chance)


def summary(found: Mapping[str, Association]) -> dict[str, float | Estimate]:
    """Of all tests: the mean of effects without their signs, and the share that is significant at 5%."""
    effect = sum(abs(one.effect.value) for one in found.values()) / len(found)
    by_chance = sum(one.null for one in found.values()) / len(found)
    known = not any(math.isnan(one.p) for one in found.values())
    significant = sum(one.p < SIGNIFICANT for one in found.values()) / len(found) if known else math.nan
    return {
        "mean_absolute_effect": Estimate(effect, chance=by_chance, count=len(found)),
        "share_significant": Estimate(significant, chance=SIGNIFICANT, count=len(found)),
    }


# --- data -----------------------------------------------------------------------------------------------------------

ROLES = ("targ1", "targ2", "attr1", "attr2")


class Concepts(NamedTuple):
    """The texts of a test."""

    target_x: tuple[str, ...]
    target_y: tuple[str, ...]
    attribute_a: tuple[str, ...]
    attribute_b: tuple[str, ...]


def read_tests(text: str, name: str, wanted: Sequence[str] | None) -> dict[str, Concepts]:
    """The tests of a JSON file {test: {targ1, targ2, attr1, attr2: {category, examples}}}, or the `wanted` of them.

    ValueError, naming the test, for one that is not there or of another form.
    """
    tests = from_json(text, name)
    if not isinstance(tests, dict) or not tests:
        raise ValueError(f"{name} should be a mapping of tests by name")
    for test in wanted or ():
        if test not in tests:
            hint = did_you_mean(test, tests) or f" There are: {', '.join(tests)}."
            raise ValueError(f"tests: {name} has no test '{test}'.{hint}")
    names = tests if wanted is None else wanted
    return {test: Concepts(*(_examples(tests[test], role, f"{name}: {test}") for role in ROLES)) for test in names}


def open_tests(root: Path, path: str, member: str | None, wanted: Sequence[str] | None) -> dict[str, Concepts]:
    """The tests of a file below `root`, or of a member of an archive, as `read_tests` reads them."""
    return read_tests(read_text(root, path, member), described(path, member), wanted)


def _examples(test: object, role: str, name: str) -> tuple[str, ...]:
    concept = test.get(role) if isinstance(test, dict) else None
    examples = concept.get("examples") if isinstance(concept, dict) else None
    if not isinstance(examples, list) or not all(isinstance(one, str) and one.strip() for one in examples):
        raise ValueError(f"{name}.{role}.examples should be a list of texts, none of them empty")
    least = 2 if role.startswith("targ") else 1
    if len(examples) < least:
        raise ValueError(f"{name}.{role}.examples has {len(examples)} texts; an effect needs {least} or more")
    return tuple(examples)


def in_template(template: str | None, text: str) -> str:
    """The text within the template, unless it is a sentence already, which ends with a mark."""
    return text if template is None or text.rstrip().endswith((".", "!", "?")) else template.replace("{}", text)


def _one_slot(template: str | None) -> str | None:
    if template is not None and template.count("{}") != 1:
        raise ValueError(f"should contain {{}} exactly once, for the word, got '{template}'")
    return template


Template = Annotated[str | None, AfterValidator(_one_slot)]
Tests = Annotated[tuple[str, ...], Strict(False), Field(min_length=1)]


def run_tests(
    tests: Mapping[str, Concepts],
    permutations: int,
    encode: Callable[[list[str]], Tensor],  # texts to [n, D] unit norm
    template: str | None,
) -> dict[str, Association]:
    """Every test; a text that several of them have is embedded once."""
    texts = list(dict.fromkeys(in_template(template, one) for test in tests.values() for part in test for one in part))
    features, place = encode(texts), {text: row for row, text in enumerate(texts)}

    def of(part: Sequence[str]) -> Tensor:
        return features[[place[in_template(template, one)] for one in part]]

    return {
        name: association_test(
            of(test.target_x), of(test.target_y), of(test.attribute_a), of(test.attribute_b), permutations
        )
        for name, test in tests.items()
    }


# --- evaluation -----------------------------------------------------------------------------------------------------


class WordAssociation(Eval):
    """Word and sentence embedding association tests: stereotypes in the text tower, such as of names and professions.

    Metrics: `mean_absolute_effect` and `share_significant` (p < 5%) of all tests, and for each of them `<test>_effect`,
    in standard deviations, and `<test>_p`, one-sided. An effect near 0 is no proof that there is no bias: a tower that
    does not know the words has none either. And p-values of sentences (`sent-`) are too small: they take each word's
    sentences for so many words.
    """

    towers: ClassVar[tuple[str, ...]] = ("text",)

    path: str
    """JSON {test: {targ1, targ2, attr1, attr2: {category, examples}}}, as of May et al. 2019, or an archive of it."""
    member: str | None
    """Where in the tar archive; null if `path` is the file itself."""
    tests: Tests | None
    """Names of tests in the file; null for all."""
    template: Template
    """A text with one {} that words are set into; sentences stay as they are. null: words by themselves."""
    permutations: int = Field(ge=99)
    """Random divisions of the targets for a p-value, where there are too many (100,000) to go through all."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """With the tests' own only if `tests` names them; other names are in the file."""
        own = (f"{test}_{number}" for test in self.tests or () for number in ("effect", "p"))
        return "mean_absolute_effect", "share_significant", *own

    def build(self, data: Sources) -> Callable[[Encoder], Report]:
        return partial(self._run, open_tests(data.root, self.path, self.member, self.tests))

    def _run(self, tests: Mapping[str, Concepts], encoder: Encoder) -> Report:
        found = run_tests(tests, self.permutations, partial(encoder.encode, "text"), self.template)
        metrics = summary(found)
        for test, one in found.items():
            metrics |= {f"{test}_effect": one.effect, f"{test}_p": one.p}
        effects = {test: one.effect for test, one in found.items()}
        return Report(metrics, {"effects": partial(weat_figures.effects, effects)})
