"""How numbers of a report are written, and what is known of a metric by its name."""

import re
from collections.abc import Iterable

from multimodal.report.folders import Value

NONE = "\N{EN DASH}"

SHARE = re.compile(
    r"(^|_)((r|top|hits?|recall|precision|m?ap|acc|accuracy|auc|auroc|f1|mrr|ndcg)(_?at_?|@)?\d*|mean_per_class|share|ece)$"
    r"|^std(_\d+)?$"
)
MEASURE = re.compile(
    r"(^|_)(rank|gap|distance|effect_size|effect|cosine|alignment|uniformity|entropy|norm|variance|scale|margin|p"
    r"|anisotropy|hubness|anti_hubs|margin|effective_rank)(_projected|_image|_text|_i2t|_t2i)?$"
    r"|(^|_)(mean_absolute_effect|share_significant)(_projected)?$"
)
"""No fractions of which more is better, although they may have a chance level."""
CORRELATION = re.compile(r"(^|_)(spearman|pearson|kendall|correlation)$")
LESS_IS_BETTER = re.compile(r"(^|_)(median_rank|mean_rank|loss|error|perplexity|ece|fid|max_skew|ndkl)$")


def is_share(metric: str, values: Iterable[Value]) -> bool:
    """Whether a metric is a fraction, shown in percent: its name says so, or it has a chance level; all in 0 to 1."""
    values = list(values)
    known = [x for v in values for x in (v.value, v.low, v.high, v.chance) if x is not None]
    named = SHARE.search(metric) is not None
    other = any(pattern.search(metric) for pattern in (MEASURE, CORRELATION, LESS_IS_BETTER))
    compared = any(v.chance is not None for v in values)
    return (named or (compared and not other)) and all(0 <= x <= 1 for x in known)


def better(metric: str, share: bool) -> int:
    """1 if more of the metric is better, -1 if less is, 0 if its name does not say."""
    if LESS_IS_BETTER.search(metric):
        return -1
    return int(share or CORRELATION.search(metric) is not None)


def plain(value: float | None) -> str:
    """A number in about four digits, or a dash; thousands are set apart."""
    if value is None:
        return NONE
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def amount(value: float | None, share: bool) -> str:
    """A value of a metric: fractions in percent."""
    return plain(value) if value is None or not share else f"{100 * value:.1f}"


def interval(value: Value, share: bool) -> str:
    """Such as "[89.6, 92.1]", or nothing."""
    if value.low is None or value.high is None:
        return ""
    return f"[{amount(value.low, share)}, {amount(value.high, share)}]"


def chance(value: float | None, share: bool) -> str:
    """What guessing gives, which may be much less than 1%."""
    return f"{100 * value:.3g}" if value is not None and share else plain(value)


def short(count: float | None) -> str:
    """A large count in three digits: 1.88M."""
    if count is None:
        return NONE
    for size, sign in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g}{sign}"
    return plain(count)
