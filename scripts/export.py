"""Take a run to another library: `scripts/export.py run=NAME to=open_clip`; checks what it wrote with that library."""

import logging
import os
import shutil
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pydantic import Field

from multimodal.cli import CONF, launch, plain
from multimodal.config import ConfigError, RunError, check
from multimodal.finished_run import FinishedRun
from multimodal.parts import Format

logger = logging.getLogger(__name__)


class ExportConfig(FinishedRun):
    """Which run, and to what."""

    to: Format
    """The other library's form."""
    out: str | None
    """A folder; null for one in the run's folder."""
    overwrite: bool
    """Whether a folder that is there is replaced."""
    tolerance: float = Field(gt=0)
    """Features may differ by so much."""


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="export")
def main(composed: DictConfig) -> None:
    """Write into a folder beside, compare, and give it its name; nothing is left where features differ."""
    asked = check(plain(composed), ExportConfig)
    folder = asked.find_checkpoint()
    name = HydraConfig.get().runtime.choices["to"]
    out = Path(asked.out) if asked.out else asked.folder / "export" / str(name)
    if out.exists() and not asked.overwrite:
        raise ConfigError([("out", f"{out} is there already: overwrite=true replaces it")])

    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of a second, for every file
    from multimodal.assemble import load
    from multimodal.export.card import write_card
    from multimodal.export.exported import Exported, read_record

    config, assembled = load(folder, device="cpu")
    exported = Exported(config, assembled.model.eval(), assembled.readers, read_record(asked.folder, folder))
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        try:
            usage = asked.to.write(exported, partial)
        except ValueError as error:
            raise ConfigError([("to", str(error))]) from None
        differences = asked.to.differences(exported, partial)
        for what, difference in differences.items():
            logger.info("largest difference of %s: %.1e", what, difference)
        if max(differences.values()) > asked.tolerance:
            raise RunError(f"what was written differs by more than tolerance={asked.tolerance}: it is not kept")
        write_card(exported, partial, asked.to.library, usage, differences)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s", out)


if __name__ == "__main__":
    launch(main, verbatim=("run", "out"))
