"""The page itself, one file: styles, programs and pictures are inside, and nothing is fetched."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from multimodal.report import results
from multimodal.report.curves import SIDE, Curves, curves
from multimodal.report.folders import Run
from multimodal.report.overview import Fact, columns, differences
from multimodal.report.pictures import Shown, groups

LIMIT = 10_000_000
"""Bytes of a page."""
SPARE = 500_000
"""Of them, for the words around pictures."""
COLOURS = 8
"""Of curves, before they repeat with another dash; the styles say which."""


@dataclass(frozen=True)
class Grid:
    """A table of a section; the first cell of a row is its head."""

    title: str
    heads: list[str]
    rows: list[list[Fact]]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """What a page says besides of its runs."""

    title: str
    text: str
    """Of what is shown, in a paragraph."""
    grids: list[Grid]
    picture: Shown | None = None
    caption: str = ""
    """Of the picture."""

    @property
    def anchor(self) -> str:
        """Its place in the page."""
        return self.title.lower().replace(" ", "-")


def render(runs: Sequence[Run], limit: int = LIMIT, sections: Sequence[Section] = ()) -> str:
    """The page of these runs; pictures are left out, the largest first, where it would be larger than the limit."""
    environment = Environment(
        loader=PackageLoader("multimodal.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["title"] = results.title
    program = _text("page.js")
    drawn = curves(runs)
    facts: dict[str, Any] = {
        "runs": runs,
        "style": Markup(_text("page.css")),
        "program": Markup(program),
        "digest": base64.b64encode(hashlib.sha256(program.encode()).digest()).decode(),
        "columns": columns(runs),
        "differences": differences([run.config for run in runs]),
        "sections": sections,
        "tables": results.tables(runs),
        "curves": drawn,
        "points": _points(drawn),
        "side": SIDE,
        "colours": COLOURS,
    }
    template = environment.get_template("page.html.j2")
    bare = len(template.render(**facts, groups=[], left_out=[]).encode("utf-8", "replace"))
    shown, left_out = groups(runs, max(0, limit - SPARE - bare))
    return template.render(**facts, groups=shown, left_out=left_out)


def write(path: Path, page: str) -> None:
    """Replace the file in one piece."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(page, encoding="utf-8", errors="replace")
    partial.replace(path)


def _text(name: str) -> str:
    return (files("multimodal.report") / name).read_text(encoding="utf-8")


def _points(drawn: Curves) -> list[dict[str, Any]]:
    """What the page's program tells the values under the pointer from, in five digits."""
    return [
        {
            "x": panel.x,
            "scale": panel.scale,
            "curves": [[curve.run, [(x, float(f"{y:.5g}")) for x, y in curve.points]] for curve in panel.curves],
        }
        for panel in (*drawn.loss, *drawn.evaluations, *drawn.others)
    ]
