"""Embed images or captions: `scripts/embed.py run=NAME source=DIR`; writes Parquet or npy with ids, resumable."""

import hashlib
import logging
from pathlib import Path
from typing import Literal

import hydra
from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import CONF, launch, plain
from multimodal.config import ConfigError, check
from multimodal.finished_run import FinishedRun

logger = logging.getLogger(__name__)


class EmbedConfig(FinishedRun):
    """Which run, and what of."""

    source: str = Field(min_length=1)
    """A folder, with all images below it (ids are paths within), or a text file of captions (ids are line numbers)."""
    format: Literal["parquet", "npy"]
    """Of the file that is written."""
    out: str | None
    """A file, without ending; null for one in the run's folder."""
    chunk: int = Field(gt=0)
    """Rows that are in memory, and written, at a time."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="embed")
def main(composed: DictConfig) -> None:
    """Load the checkpoint and embed, continuing where an earlier call was stopped."""
    asked = check(plain(composed), EmbedConfig)
    folder = asked.find_checkpoint()

    from multimodal.api import load
    from multimodal.embeddings import embed, find_images

    source = Path(asked.source)
    items: list[Path] | list[str]
    try:
        if source.suffix == ".txt":
            items = source.read_text(encoding="utf-8").removesuffix("\n").split("\n")
            ids = [str(line) for line in range(len(items))]
        else:
            items = find_images(source)
            ids = [str(path.relative_to(source)) if source.is_dir() else path.name for path in items]
        if not items:
            raise ValueError(f"'{source}' is empty")
    except (ValueError, OSError) as error:
        raise ConfigError([("source", str(error))]) from None
    place = hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]  # folders may have the same name
    name = f"{folder.name}-{source.resolve().stem}-{place}"
    out = Path(asked.out) if asked.out else asked.folder / "embeddings" / name
    if (target := out.with_name(f"{out.name}.{asked.format}")).exists():
        logger.info("%s is there already; another out, or delete it", target)
        return
    model = load(folder, device=asked.device, workers=asked.workers)
    facts = {"run": asked.run, "checkpoint": folder.name, "source": str(source.resolve())}
    if source.suffix == ".txt":
        facts["captions"] = hashlib.sha256(source.read_bytes()).hexdigest()
    try:
        written = embed(model, items, ids, out, asked.format, asked.chunk, facts)
    except ValueError as error:
        raise ConfigError([("out", str(error))]) from None
    logger.info("%d embeddings of %d dimensions: %s", len(ids), model.embed_dim, written)


if __name__ == "__main__":
    launch(main, verbatim=("run", "source", "out"))
