"""Features of frozen towers, computed once before training and kept in the run's folder."""

import hashlib
import json
import logging
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from multimodal import distributed
from multimodal.assemble import Assembled, Problems
from multimodal.config import RunError, TrainConfig
from multimodal.data.loader import Reader, read_inputs
from multimodal.data.views import Inputs
from multimodal.files import write_json
from multimodal.parts import BadSample, Source
from multimodal.sharding import gathered

logger = logging.getLogger(__name__)

FOLDER, BATCH = "features", 256
PROBES = 16
"""So many samples are read to see whether the data are still the same."""


class KeptFeatures:
    """What a frozen tower made of every training sample, in a file that is mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = np.load(path, mmap_mode="r")  # float32 [num_samples, W]

    def __reduce__(self) -> tuple[type["KeptFeatures"], tuple[Path]]:
        return KeptFeatures, (self.path,)  # mapped where it arrives, not sent

    def __call__(self, index: int) -> Tensor:
        """float32 [W]; BadSample if the sample was broken when the features were computed."""
        row = torch.from_numpy(np.array(self.rows[index]))
        if row.isnan().all():
            raise BadSample(f"sample {index} could not be read when {self.path} was computed")
        return row


def keep_features(config: TrainConfig, assembled: Assembled, source: Source) -> dict[str, KeptFeatures]:
    """For every tower that wants it: its features of all samples, from the run's folder or computed now.

    Computed once for the same weights and data; every rank computes its share. RunError if one is not finite.
    """
    kept = {}
    for name, tower in config.towers.items():
        if tower.tuning.keep_features:
            path = config.folder / FOLDER / f"{name}.npy"
            made_of = _fingerprint(name, config, assembled, source)
            if not distributed.on_first_rank(partial(_is_there, path, made_of)):
                logger.info(
                    "computes the features of tower %s of %d samples, to be kept in %s", name, len(source), path
                )
                _compute(name, config, assembled, source, path, made_of)
            kept[name] = KeptFeatures(path)
    return kept


def check_kept_features(config: TrainConfig, source: Source, problems: Problems) -> None:
    """Note the towers whose samples may read differently each time, so that features cannot be kept."""
    for name, tower in config.towers.items():
        if tower.tuning.keep_features and tower.reads == "text":
            several = next((index for index in range(len(source)) if len(source.captions(index)) > 1), None)
            if several is not None:
                told = f"sample {source.key(several)} has several captions, of which another one is drawn each time"
                problems.append((f"towers.{name}.tuning.keep_features", told))


def _fingerprint(name: str, config: TrainConfig, assembled: Assembled, source: Source) -> dict[str, str | int]:
    """What the features are of: the weights, the settings, every sample's key, and what some samples read as."""
    digest = hashlib.sha256()
    for key, tensor in assembled.model.towers[name].state_dict().items():
        if not key.startswith("projection."):
            digest.update(key.encode())
            values = distributed.whole(tensor).detach().cpu().contiguous()
            digest.update(values.view(-1).view(torch.uint8).numpy().tobytes())
    described = [part.model_dump(mode="json") for part in (config.towers[name], config.dataset)]
    return {
        "weights": digest.hexdigest(),
        "config": hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest(),
        "precision": assembled.precision,
        "num_samples": len(source),
        "samples": _samples(assembled.readers[name], source),
    }


def _samples(reader: Reader, source: Source) -> str:
    digest = hashlib.sha256()
    for index in range(len(source)):
        digest.update(f"{source.key(index)}\0".encode())
    for index in range(0, len(source), max(1, len(source) // PROBES)):
        try:
            digest.update(reader.preprocessor(source[index].inputs[reader.reads], None).numpy().tobytes())
        except BadSample as error:
            digest.update(str(error).encode())
    return digest.hexdigest()


def _is_there(path: Path, made_of: dict[str, str | int]) -> bool:
    facts = path.with_suffix(".json")
    return path.exists() and facts.exists() and json.loads(facts.read_text()) == made_of


@torch.no_grad()
def _compute(
    name: str, config: TrainConfig, assembled: Assembled, source: Source, path: Path, made_of: dict[str, str | int]
) -> None:
    """Every rank writes its rows of one file, which gets its name when all are done."""
    unfinished = path.with_name(f".partial-{path.name}")
    model = assembled.model
    shape = len(source), int(model.towers[name].width)  # type: ignore[arg-type]

    def create() -> None:
        path.parent.mkdir(exist_ok=True)
        rows = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.float32, shape=shape)
        rows[:] = np.nan
        rows.flush()

    def finish() -> None:
        path.with_suffix(".json").unlink(missing_ok=True)  # what it says is not true of the new file
        unfinished.replace(path)
        write_json(path.with_suffix(".json"), made_of)

    distributed.on_first_rank(create)
    rank, ranks = distributed.rank(), distributed.world_size()
    mine = range(len(source) * rank // ranks, len(source) * (rank + 1) // ranks)
    rows = np.lib.format.open_memmap(unfinished, mode="r+")
    model.eval()
    hide = True if rank else None  # None hides it where there is no terminal
    reader = assembled.readers[name]
    with (
        gathered(model.towers[name]),
        tqdm(total=len(mine), desc=f"features of {name}", unit="", leave=False, disable=hide) as bar,
        closing(read_inputs(Inputs(source, reader.reads), reader, mine, BATCH, config.workers)) as batches,
    ):
        for batch in batches:
            if unexpected := [error for error in batch.broken.values() if not isinstance(error, BadSample)]:
                raise unexpected[0]
            if batch.places:
                lengths = model.lengths({name: batch.values}).get(name)
                with assembled.context:
                    features = model.pool(name, batch.values.to(model.logit_scale.device), lengths).float().cpu()
                if not features.isfinite().all():
                    raise RunError(f"tower {name} makes features that are not finite of some samples: other weights")
                rows[batch.places] = features.numpy()
            bar.update(len(batch.places) + len(batch.broken))
    rows.flush()
    distributed.total(len(mine))  # waits for all ranks
    distributed.on_first_rank(finish)
