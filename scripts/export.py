"""Take a run to another library: `scripts/export.py run=NAME to=open_clip`; checks what it wrote with that library."""

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import launch, plain, program
from multimodal.config import ConfigError, RunError, check
from multimodal.files import write_json
from multimodal.finished_run import FinishedRun
from multimodal.parts import Format

logger = logging.getLogger(__name__)

FACTS = "export.json"
"""What it is an export of; also the mark of a folder that may be replaced."""


class ExportConfig(FinishedRun):
    """Which run, and to what."""

    to: Format
    """The other library's form."""
    out: str | None
    """A folder; null for one in the run's folder."""
    overwrite: bool
    """Whether an earlier export in that place is replaced."""
    tolerance: float = Field(gt=0)
    """Features may differ by so much."""


@program("export")
def main(composed: DictConfig) -> None:
    """Write into a folder beside, compare, and give it its name; nothing is left where features differ."""
    asked = check(plain(composed), ExportConfig)
    folder = asked.find_checkpoint()
    name = str(HydraConfig.get().runtime.choices["to"])
    out = (Path(asked.out) if asked.out else asked.folder / "export" / asked.named(name)).absolute()
    _may_write(out, asked.overwrite)

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of a second, for every file
    from multimodal.assemble import Problems, load
    from multimodal.export.card import write_card
    from multimodal.export.exported import Exported, read_record

    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    problems = Problems()
    try:
        with problems.at("run"):
            config, assembled = load(folder, asked.weights, device="cpu")
        problems.report()
        with problems.at("to"):
            record = read_record(asked.folder, folder, asked.weights)
            exported = Exported(config, assembled.model.eval(), assembled.readers, record)
            usage = asked.to.write(exported, partial)
        problems.report()
        differences = _compare(asked.to, exported, partial)
        for what, difference in differences.items():
            logger.info("largest difference of %s: %.1e", what, difference)
        if max(differences.values()) > asked.tolerance:
            raise RunError(f"what was written differs by more than tolerance={asked.tolerance}: it is not kept")
        write_card(exported, partial, asked.to.library, usage, differences)
        of = {"run": asked.run, "checkpoint": folder.name, "weights": asked.weights}
        write_json(partial / FACTS, {"to": name, **of, "differences": differences})
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s", out)


def _may_write(out: Path, overwrite: bool) -> None:
    """Only an earlier export is replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise ConfigError([("out", f"{out} is there already: overwrite=true replaces it")])
    if not (out / FACTS).is_file():
        raise ConfigError([("out", f"{out} is no export of ours (it has no {FACTS}): it is left as it is")])


def _compare(to: Format, exported: Any, folder: Path) -> dict[str, float]:
    try:
        return to.differences(exported, folder)
    except Exception as error:  # of a library that is not ours
        told = f"{type(error).__name__}: {error}".strip()
        raise RunError(f"{to.library} does not load what was written, which is not kept: {told}") from error


if __name__ == "__main__":
    launch(main, verbatim=("run", "out"))
