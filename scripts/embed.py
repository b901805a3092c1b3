"""Embed images or texts: `scripts/embed.py run=NAME source=DIR`; writes Parquet or npy with ids, resumable."""

import hashlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import Field

from multimodal.api import load
from multimodal.assemble import Problems
from multimodal.checkpoint import load_config, weights_file
from multimodal.cli import launch, plain, program
from multimodal.config import TrainedConfig, check
from multimodal.embeddings import Embeddings, Rows, from_dataset, from_path
from multimodal.finished_run import FinishedRun
from multimodal.parts import Dataset, did_you_mean

logger = logging.getLogger(__name__)


def _of_one_thing(config: "EmbedConfig") -> Iterator[tuple[str, str]]:
    if config.source is None and config.dataset is None:
        yield "source", "no value given: a folder of images or a file of captions; or choose a dataset"
    if config.source is not None and config.dataset is not None:
        yield "source", "is given beside a dataset: which of them?"
    if config.dataset is not None and config.input is None:
        yield "input", "no value given: what of the dataset, input=image or input=text?"
    if config.source is not None and config.input is not None:
        yield "input", "is about a dataset; a source is images or text by itself"


class EmbedConfig(FinishedRun):
    """Which run, and what of."""

    rules = (_of_one_thing,)

    source: str | None = Field(min_length=1)
    """A folder, with all images below it (ids are paths within), or a .txt file of captions (ids are line numbers)."""
    dataset: Dataset | None
    """Instead of a source: what training reads. Ids are keys of samples; of captions with their number, KEY#0."""
    input: str | None
    """Of a dataset: which input of its samples, image or text."""
    format: Literal["parquet", "npy"]
    """Of the file that is written."""
    out: str | None
    """A file, without ending; null for one in the run's folder."""
    chunk: int = Field(gt=0)
    """Rows that are in memory, and written, at a time."""

    def rows(self) -> Rows:
        """What is embedded."""
        if self.source is not None:
            return from_path(Path(self.source))
        root = Path(self.paths.datasets)
        facts = {"dataset": self.dataset.model_dump(mode="json"), "datasets": str(root.resolve())}
        return from_dataset(self.dataset.build(root), self.input, facts)


@program("embed")
def main(composed: DictConfig) -> None:
    """Load the checkpoint and embed, continuing where an earlier call was stopped."""
    asked = check(plain(composed), EmbedConfig)
    folder = asked.find_checkpoint()
    towers = {tower.reads: name for name, tower in reversed(check(load_config(folder), TrainedConfig).towers.items())}
    problems = Problems()
    with problems.at("input"):
        if asked.input not in (None, *towers):
            raise ValueError(f"no tower of the run reads '{asked.input}'.{did_you_mean(asked.input, towers)}")
    with problems.at("source" if asked.dataset is None else "dataset"):
        rows = asked.rows()
        if rows.reads not in towers:
            raise ValueError(f"no tower of the run reads {rows.reads}")
    problems.report()

    of = {key: value for key, value in rows.facts.items() if key != "texts"}  # where they are, not what they say
    name = HydraConfig.get().runtime.choices["dataset"] if asked.source is None else Path(asked.source).resolve().stem
    out = Path(asked.out) if asked.out else asked.output("embeddings", folder, f"{name}-{rows.reads}", json.dumps(of))
    with weights_file(folder, asked.weights).open("rb") as weights:
        digest = hashlib.file_digest(weights, "sha256").hexdigest()
    facts = {"run": asked.run, "checkpoint": folder.name, "weights": digest, "tower": towers[rows.reads]}
    embeddings = Embeddings(out, asked.format, rows, facts)
    with problems.at("out"):
        if embeddings.are_written():
            logger.info("%s is there already; delete it to compute it again", embeddings.target)
            return
    problems.report()
    model = load(folder, device=asked.device, workers=asked.workers, weights=asked.weights)
    embeddings.write(model, towers[rows.reads], asked.chunk)
    logger.info("%d embeddings of %d dimensions: %s", len(rows.ids), model.embed_dim, embeddings.target)


if __name__ == "__main__":
    launch(main, verbatim=("run", "source", "out"))
