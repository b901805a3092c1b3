"""Classify images zero-shot: `scripts/classify.py run=NAME images=DIR classes="cat,dog"`; prints, and writes CSV."""

import csv
import logging
from pathlib import Path

import hydra
from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import CONF, launch, plain
from multimodal.config import ConfigError, check
from multimodal.data.files import Templates
from multimodal.finished_run import FinishedRun

logger = logging.getLogger(__name__)


class ClassifyConfig(FinishedRun):
    """Which run, which images, which classes."""

    images: str = Field(min_length=1)
    """A folder, with all images below it, or one image."""
    classes: str = Field(min_length=1)
    """Names with commas between, or a text file with one a line."""
    templates: Templates
    """Prompts with one {} for the class name, averaged."""
    out: str | None
    """A CSV file; null for one in the run's folder."""

    def names(self) -> list[str]:
        """The class names."""
        file = Path(self.classes)
        given = file.read_text().splitlines() if file.suffix == ".txt" else self.classes.split(",")
        return [name.strip() for name in given if name.strip()]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="classify")
def main(composed: DictConfig) -> None:
    """Load the checkpoint, classify every image, print the best class and write the probabilities of all."""
    asked = check(plain(composed), ClassifyConfig)
    folder = asked.find_checkpoint()

    from multimodal.api import load
    from multimodal.embeddings import encode_readable, find_images

    model = load(folder, device=asked.device, workers=asked.workers)
    try:
        names, paths = asked.names(), find_images(Path(asked.images))
        classifier = model.classifier(names, asked.templates)
    except (ValueError, OSError) as error:
        raise ConfigError([("images" if "image" in str(error) else "classes", str(error))]) from None
    features, unreadable = encode_readable(model, paths)
    probabilities = model.probabilities(features, classifier)

    out = Path(asked.out) if asked.out else asked.folder / "classified" / f"{folder.name}-{Path(asked.images).stem}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "class", "probability", *names, "error"])
        for place, path in enumerate(paths):
            if place in unreadable:
                logger.warning("%s", unreadable[place])
                writer.writerow([path, "", "", *("" for _ in names), unreadable[place]])
                continue
            best = int(probabilities[place].argmax())
            row = [f"{p:.6f}" for p in probabilities[place].tolist()]
            writer.writerow([path, names[best], row[best], *row, ""])
            logger.info("%s: %s %.3f", path, names[best], probabilities[place, best])
    logger.info("%d images, %d of them unreadable: %s", len(paths), len(unreadable), out)


if __name__ == "__main__":
    launch(main, verbatim=("run", "images", "classes", "out"))
