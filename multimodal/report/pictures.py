"""Figures of runs as they stand in a page: side by side by kind, small enough for one file."""

import base64
import io
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from multimodal.report.folders import Picture, Run

logger = logging.getLogger(__name__)

SMALL = 60_000
"""Bytes up to which a PNG stays as it is."""
WIDEST = 1600
"""Pixels."""
QUALITY = 82

ORDER = ("confusion_matrix", "retrieval_grid", "failures", "similarity_matrix")
"""Kinds of figures that come first."""


@dataclass(frozen=True)
class Shown:
    """A run's figure."""

    run: int
    step: int | None
    kind: str
    """Of its data, such as image/png."""
    data: str
    """In base64."""
    width: int
    height: int


@dataclass(frozen=True)
class Group:
    """The same figure of several runs."""

    evaluation: str
    figure: str
    shown: list[Shown]

    @property
    def title(self) -> str:
        """What the figure shows."""
        return self.figure.replace("_", " ")


def groups(runs: Sequence[Run], budget: int) -> tuple[list[Group], list[str]]:
    """All figures by kind and evaluation, in at most so many bytes; and which are left out."""
    shown: dict[Picture, Shown] = {}
    left_out: list[str] = []
    for index, run in enumerate(runs):
        for picture in run.pictures:
            try:
                shown[picture] = encoded(picture, index)
            except (OSError, ValueError) as error:
                logger.warning("%s cannot be shown: %s", picture.path, error)
                left_out.append(f"{run.name}: {picture.path.name} (cannot be read)")
    total = sum(len(one.data) for one in shown.values())
    for picture in sorted(shown, key=lambda picture: len(shown[picture].data), reverse=True):
        if total <= budget:
            break
        one = shown.pop(picture)
        total -= len(one.data)
        left_out.append(f"{runs[one.run].name}: {picture.path.name} ({len(one.data) / 1e6:.1f} MB)")
    return list(_grouped(shown)), left_out


def _grouped(shown: dict[Picture, Shown]) -> Iterator[Group]:
    kinds: dict[tuple[str, str], list[Shown]] = {}
    for picture, one in shown.items():
        kinds.setdefault((picture.evaluation, picture.figure), []).append(one)
    figures = list(dict.fromkeys(figure for _, figure in kinds))
    known = [figure for figure in ORDER if figure in figures]
    ordered = [*known, *(figure for figure in figures if figure not in known)]
    for evaluation, figure in sorted(
        kinds, key=lambda kind: (not kind[0], ordered.index(kind[1]), kind[0].startswith("eval_ema/"))
    ):
        yield Group(evaluation, figure, kinds[evaluation, figure])


def encoded(picture: Picture, run: int) -> Shown:
    """A figure as base64; a large one as WebP, if that is smaller, and no wider than a screen."""
    data, kind = picture.path.read_bytes(), "image/png"
    size, smaller = _webp(picture.path, len(data) > SMALL)
    if smaller is not None and len(smaller) < len(data):
        data, kind = smaller, "image/webp"
    return Shown(run, picture.step, kind, base64.b64encode(data).decode(), *size)


def _webp(path: Path, wanted: bool) -> tuple[tuple[int, int], bytes | None]:
    """Width and height, and the figure anew, if it is wanted."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            if not wanted:
                return image.size, None
            white = Image.new("RGBA", image.size, "white")
            opaque = Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    except Exception as error:  # decoders raise SyntaxError, struct.error, DecompressionBombError and more
        raise ValueError(str(error)) from error
    opaque.thumbnail((WIDEST, 4 * WIDEST))
    buffer = io.BytesIO()
    opaque.save(buffer, "WEBP", quality=QUALITY, method=4)
    return opaque.size, buffer.getvalue()
