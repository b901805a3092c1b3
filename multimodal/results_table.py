"""What evaluations found, as text for a terminal."""

from collections.abc import Iterable, Mapping, Sequence

from multimodal.parts import Estimate


def table(found: Mapping[str, Mapping[str, Estimate]]) -> str:
    """Numbers as text: a line for each, or, of several models, a column for each; intervals in brackets.

    Chance and counts that models do not share are those of each in turn.
    """
    keys = dict.fromkeys(key for numbers in found.values() for key in numbers)
    if len(found) == 1:
        return "\n".join(f"{key} {_told(one)}{_against(one)}" for key, one in next(iter(found.values())).items())
    cells = [["", *found, "chance", "n"]]
    for key in keys:
        known = [numbers[key] for numbers in found.values() if key in numbers]
        chance = _shared(f"{one.chance:.4f}" for one in known if one.chance is not None)
        count = _shared(f"{one.count:,}" for one in known if one.count is not None)
        cells.append([key, *(_told(numbers.get(key)) for numbers in found.values()), chance, count])
    return aligned(cells)


def aligned(cells: Sequence[Sequence[str]]) -> str:
    """Rows of text in columns."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def _shared(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts)) or "-"


def _told(one: Estimate | None) -> str:
    if one is None:
        return "-"
    sure = one.low is not None and one.high is not None
    return f"{one.value:.4f}" + (f" [{one.low:.4f}, {one.high:.4f}]" if sure else "")


def _against(one: Estimate) -> str:
    facts = [] if one.chance is None else [f"chance {one.chance:.4f}"]
    facts += [] if one.count is None else [f"n {one.count:,}"]
    return f" ({', '.join(facts)})" if facts else ""
