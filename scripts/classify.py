"""Classify images zero-shot: `scripts/classify.py run=NAME images=DIR classes="cat,dog"`; prints, and writes CSV."""

import csv
import json
import logging
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from omegaconf import DictConfig
from pydantic import AfterValidator, BeforeValidator, Field
from tqdm import tqdm

from multimodal.api import load, require_distinct
from multimodal.cli import launch, plain, program
from multimodal.config import check
from multimodal.data.files import ClassNames, ImageFiles, Templates
from multimodal.data.texts import read_lines
from multimodal.data.views import Slice
from multimodal.finished_run import FinishedRun

logger = logging.getLogger(__name__)

PRINTED = 50  # images
CHUNK = 4096  # rows in memory at a time


def _lines(value: Any) -> Any:
    """The lines of a .txt file that a string names; a string by itself; a list as it is."""
    if not isinstance(value, str) or not value.endswith(".txt"):
        return (value,) if isinstance(value, str) else value
    try:
        return tuple(line.strip() for line in read_lines(Path(value)) if line.strip())
    except OSError as error:
        raise ValueError(str(error)) from None


def _names(value: Any) -> Any:
    """The same, but a string is cut at its commas."""
    if isinstance(value, str) and not value.endswith(".txt"):
        return tuple(name.strip() for name in value.split(",") if name.strip())
    return _lines(value)


def _images_are_there(config: "ClassifyConfig") -> Iterator[tuple[str, str]]:
    try:
        _ = config.files
    except (ValueError, OSError) as error:
        yield "images", str(error)


class ClassifyConfig(FinishedRun):
    """Which run, which images, which classes."""

    rules = (_images_are_there,)

    images: str = Field(min_length=1)
    """A folder, with all images below it, or one image."""
    classes: Annotated[ClassNames, AfterValidator(require_distinct), BeforeValidator(_names)]
    """Names with commas between, a list, or a .txt file with one a line."""
    templates: Annotated[Templates, BeforeValidator(_lines)]
    """Prompts with one {} for the class name, averaged: one, a list, or a .txt file with one a line."""
    out: str | None
    """A CSV file; null for one in the run's folder."""

    @cached_property
    def files(self) -> ImageFiles:
        """The images."""
        return ImageFiles(Path(self.images))


@program("classify")
def main(composed: DictConfig) -> None:
    """Load the checkpoint, classify every image, and write the best class and the probabilities of all.

    Rows are written as they are computed, to a file that gets its name at the end. The first 50 images are printed too.
    """
    asked = check(plain(composed), ClassifyConfig)
    folder = asked.find_checkpoint()
    if asked.out is None:
        question = json.dumps([str(Path(asked.images).resolve()), asked.classes, asked.templates])
        name = asked.output("classified", folder, Path(asked.images).resolve().stem, question)
        out = name.with_name(f"{name.name}.csv")
    else:
        out = Path(asked.out)
    model = load(folder, device=asked.device, workers=asked.workers, weights=asked.weights)
    classifier = model.classifier(asked.classes, asked.templates)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, total, unreadable = out.with_name(f".partial-{out.name}"), len(asked.files), 0
    with (
        partial.open("w", newline="", encoding="utf-8", errors="replace") as file,
        tqdm(total=total, desc="classified", unit="", disable=None) as bar,
    ):
        writer = csv.writer(file)
        writer.writerow(["path", "class", "probability", *asked.classes, "error"])
        for start in range(0, total, CHUNK):
            paths = Slice(asked.files, range(start, min(start + CHUNK, total)))
            features, broken = model.encode_readable(model.tower("image"), paths)
            unreadable += len(broken)
            for place, row in enumerate(model.probabilities(features, classifier).tolist()):
                if place in broken:
                    logger.warning("%s", broken[place])
                    writer.writerow([paths[place], "", "", *("" for _ in row), broken[place]])
                    continue
                best = max(range(len(row)), key=row.__getitem__)
                writer.writerow([paths[place], asked.classes[best], *(f"{p:.6f}" for p in (row[best], *row)), ""])
                if start + place < PRINTED:
                    logger.info("%s: %s %.3f", paths[place], asked.classes[best], row[best])
            bar.update(len(paths))
    partial.replace(out)
    more = f", {PRINTED} of them above" if total > PRINTED else ""
    logger.info("%d images%s, %d unreadable: %s", total, more, unreadable, out)


if __name__ == "__main__":
    launch(main, verbatim=("run", "images", "classes", "templates", "out"))
