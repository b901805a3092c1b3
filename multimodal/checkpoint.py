"""Save, find and load checkpoints: atomic to write, safe to open (safetensors and JSON, no pickle).

`checkpoints/step-00000500/` holds `model.safetensors`, the running mean of the weights in `ema.safetensors` if there is
one, `optimizer.safetensors`, `state.json`, `config.yaml`, what preprocessors have learnt, and the checksums of them all
in `SHA256SUMS`; `checkpoints/best` points to the best of them.
"""

import logging
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from multimodal import checksums, distributed
from multimodal.config import DamagedCheckpoint, Weights
from multimodal.data.loader import Reader
from multimodal.ema import Ema
from multimodal.files import from_yaml
from multimodal.model import Model
from multimodal.patience import Patience

logger = logging.getLogger(__name__)

FOLDER, BEST = "checkpoints", "best"
PARTIAL = ".partial-"
"""Begins the name of what is being written or deleted."""
REPLACED = ".replaced-"
"""Begins the name of a checkpoint while another one of its step takes its place."""
DAMAGED = "damaged-"
"""Begins the name of a checkpoint that was found damaged."""
Shape = tuple[int, ...]

WEIGHTS, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
FILES: dict[Weights, str] = {"raw": WEIGHTS, "ema": "ema.safetensors"}
UNSOUND = (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError, MemoryError)
"""What reading a safetensors file that is none ends in."""
RUNNABLE = frozenset({".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".py", ".pyc", ".so"})
"""Endings of files that may hold code."""


class TrainerState(BaseModel):
    """Where a run stands, apart from its tensors; the position in the data is a function of the step."""

    run_id: str
    """Of the run in the tracker."""
    num_samples: int
    """In the training data, which its order depends on."""
    precision: str
    """What precision=auto means here."""
    total_steps: int
    step: int = 0
    evaluated: bool = True
    """Whether evaluations that are due at this step are in the log; if not, a run that continues begins with them."""
    best_of: str | None = None
    """The metric that checkpoints are judged by, and whether more of it is better: "eval/shapes/top1 max"."""
    best: float | None = None
    """Its best value so far."""
    best_step: int | None = None
    """The step that had it."""
    patience: Patience = Patience()
    """Whether what the run may stop early for becomes better."""
    stopped_early: bool = False
    """Whether it did not, for as long as was asked for."""
    broken: int = 0
    """Samples replaced so far."""
    truncated: int = 0
    """Captions cut to fit the context so far."""
    skipped_updates: int = 0
    """Updates that were left out since the last log entry."""
    grad_scaler: dict[str, int | float] | None = None
    """State of torch's GradScaler, in precision fp16."""
    log_bytes: int = 0
    """Length of metrics.jsonl; what is behind it belongs to steps that will be taken again."""
    checksums: bool = False
    """Whether they were written beside it, which older versions did not do."""

    @property
    def is_last(self) -> bool:
        """Whether no step is left to take."""
        return self.stopped_early or self.step >= self.total_steps

    @property
    def is_over(self) -> bool:
        """Whether no step is left to take, and no evaluation to make."""
        return self.is_last and self.evaluated

    @property
    def status(self) -> str:
        """What the summary says of a run that has ended without an error."""
        if self.stopped_early and self.step < self.total_steps:
            return "stopped early"
        return "finished" if self.is_last else "stopped"

    def improves(self, value: float, mode: Literal["max", "min"]) -> bool:
        """Whether a value at this step is the best so far, which is noted; what is no number never is."""
        sign = 1 if mode == "max" else -1
        if not math.isfinite(value) or (self.best is not None and sign * value <= sign * self.best):
            return False
        self.best, self.best_step = value, self.step
        return True


def step_folder(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / FOLDER / f"step-{step:08d}"


def steps(run: Path) -> list[int]:
    """The steps of all complete checkpoints, ascending."""
    matches = (re.fullmatch(r"step-(\d+)", path.name) for path in (run / FOLDER).glob("step-*"))
    return sorted(int(match[1]) for match in matches if match)


def find(run: Path, which: str = "last") -> Path:
    """The folder of the "last" or "best" checkpoint, or that of a step; FileNotFoundError says what there is."""
    saved = steps(run)
    if which == "last" and saved:
        return step_folder(run, saved[-1])
    if which == BEST and (best := (run / FOLDER / BEST).resolve()).exists():
        if best.parent != (run / FOLDER).resolve():
            raise ValueError(f"{run / FOLDER / BEST} leads out of the run, to {best}: it is not followed")
        return best
    if which.isdigit() and int(which) in saved:
        return step_folder(run, int(which))
    have = ", ".join(map(str, saved)) or "none"
    raise FileNotFoundError(f"{run} has no checkpoint '{which}'; steps with one: {have}; or last, best")


def whole_tensors(
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    copy: bool = True,  # also of what is on the CPU, so that training may go on
) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint's safetensors files hold, by name, for rank 0; sharded ones are gathered, by all ranks.

    One after the other, and onto the CPU: a device never holds more than one whole tensor.
    """
    files = {FILES[kind]: tensors for kind, tensors in ema.state_dicts().items()}
    files[OPTIMIZER] = _optimizer_tensors(ema.model, optimizer)
    return {file: dict(_whole(tensors, copy)) for file, tensors in files.items()}


def _whole(tensors: Mapping[str, Tensor], copy: bool) -> Iterator[tuple[str, Tensor]]:
    """Contiguous, and none in the memory of another, as safetensors wants them."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = distributed.whole(tensor)
        if distributed.rank() == 0:
            whole = whole.to("cpu", copy=copy, memory_format=torch.contiguous_format).contiguous()
            place = whole.untyped_storage().data_ptr()
            yield name, whole.clone() if place in seen else whole
            seen.add(place)


def save(
    run: Path,
    state: TrainerState,
    files: Mapping[str, Mapping[str, Tensor]],  # by name, what each holds
    readers: Mapping[str, Reader],
    config: str,
) -> None:
    """Write the checkpoint of `state.step` under a temporary name, flush it to disk, then rename it."""
    target, partial = step_folder(run, state.step), _partial(run, state.step)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "state.json").write_text(state.model_copy(update={"checksums": True}).model_dump_json(indent=2))
    (partial / "config.yaml").write_text(config)
    for name, tensors in files.items():
        file = partial / name
        save_file(dict(tensors), file)
        shutil.copymode(partial / "state.json", file)  # safetensors makes it readable by its owner only
    for tower, reader in readers.items():
        (partial / tower).mkdir()
        reader.preprocessor.save(partial / tower)
    checksums.write(partial)
    for path in [*partial.rglob("*"), partial]:
        _flush(path)
    replaced = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        target.rename(replaced)
    partial.rename(target)
    _flush(target.parent)
    if replaced.exists():
        _remove(replaced)


def discard(run: Path, step: int) -> None:
    """Delete what there is of a checkpoint that could not be written."""
    _remove(_partial(run, step))


def _partial(run: Path, step: int) -> Path:
    return run / FOLDER / f"{PARTIAL}{step_folder(run, step).name}"


def mark_best(run: Path, step: int) -> None:
    """Let `checkpoints/best` point to the checkpoint of a step."""
    partial = run / FOLDER / f"{PARTIAL}{BEST}"
    partial.unlink(missing_ok=True)
    partial.symlink_to(step_folder(run, step).name)
    partial.replace(run / FOLDER / BEST)
    _flush(run / FOLDER)


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    best = (run / FOLDER / BEST).resolve()
    delete(run, [place for step in steps(run)[:-keep] if (place := step_folder(run, step)).resolve() != best])


def delete(run: Path, folders: Iterable[Path]) -> list[Path]:
    """Delete checkpoints of a run, or damaged ones that were set aside; `best` no longer points to one that goes.

    What is left of those that could not be deleted, which may have another name.
    """
    link = run / FOLDER / BEST
    remaining = []
    for folder in folders:
        if link.is_symlink() and link.resolve() == folder.resolve():
            link.unlink()
        remaining += _remove(folder)
    return remaining


def damaged(run: Path) -> list[Path]:
    """The checkpoints that were set aside."""
    return sorted((run / FOLDER).glob(f"{DAMAGED}*"))


def _remove(path: Path) -> list[Path]:
    """Delete a checkpoint, or what is left of one; what cannot be deleted is left for the next start, with a warning.

    Neither a kill nor an error half way leaves one that looks complete. What is left, under the name that it has then.
    """
    try:
        if not path.name.startswith(PARTIAL):
            path = path.rename(path.with_name(f"{PARTIAL}old-{path.name}"))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s cannot be deleted, and is left for the next start: %s", path, error)
        return [path]
    return []


def clean(run: Path) -> None:
    """Delete what a kill in the middle of saving or deleting has left, and take back what was not replaced yet."""
    for path in (run / FOLDER).glob(f"{REPLACED}*"):
        target = path.with_name(path.name.removeprefix(REPLACED))
        if target.exists():
            _remove(path)
        else:
            path.rename(target)
    for path in (run / FOLDER).glob(f"{PARTIAL}*"):
        _remove(path)


def set_aside(run: Path, step: int) -> None:
    """Rename checkpoints behind the step that the run continues from: they are damaged, and not deleted."""
    for later in (later for later in steps(run) if later > step):
        aside = run / FOLDER / f"{DAMAGED}{step_folder(run, later).name}"
        shutil.rmtree(aside, ignore_errors=True)
        step_folder(run, later).rename(aside)


def verify(folder: Path, unread: Collection[str] = ()) -> None:
    """DamagedCheckpoint, naming the file, if one was cut, changed or lost since it was saved; `unread` ones may be."""
    if (folder / checksums.NAME).exists() or _is_sealed(folder):
        told = checksums.damage(folder, unread)
        if told is not None:
            raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: {told}")


def _is_sealed(folder: Path) -> bool:
    """Whether there should be checksums."""
    try:
        return load_state(folder).checksums
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        raise DamagedCheckpoint(f"the checkpoint {folder} is damaged: state.json cannot be read") from None


def load_state(folder: Path) -> TrainerState:
    """Where the run stood."""
    return TrainerState.model_validate_json((folder / "state.json").read_text())


def load_config(folder: Path) -> dict[str, Any]:
    """The configuration as data; ValueError, before anything else is read, if the folder is not what we write.

    Refused are files that may hold code (pickles, Python), and links that lead out of the folder.
    """
    for path in folder.rglob("*"):
        if path.suffix.lower() in RUNNABLE:
            raise ValueError(f"{path} may hold code, which no checkpoint of ours does: nothing of {folder} is opened")
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{path} leads out of the checkpoint: nothing of {folder} is opened")
    file = folder / "config.yaml"
    if not file.exists():
        raise FileNotFoundError(f"{folder} is not a checkpoint: it has no config.yaml")
    return read_config(file)


def read_config(file: Path) -> dict[str, Any]:
    """A configuration as data; ValueError where the YAML is not plain.

    Refused are tags that name classes, and aliases, which can make a small file fill the memory.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not plain YAML: {error}") from None
    raw = from_yaml(text, str(file))
    if not isinstance(raw, dict):
        raise ValueError(f"{file} is not a configuration: it holds no mapping")
    return raw


def load_tensors(file: Path) -> dict[str, Tensor]:
    """What a safetensors file holds; ValueError if its header is not true."""
    try:
        return load_file(file)
    except UNSOUND as error:
        raise ValueError(f"{file} is not a sound safetensors file: {error}") from None


def weights_file(folder: Path, weights: Weights) -> Path:
    """The file of the "raw" weights or of their running mean, "ema"; ValueError if there is none."""
    if weights not in FILES:
        raise ValueError(f"weights should be {' or '.join(FILES)}, got {weights!r}")
    file = folder / FILES[weights]
    if weights == "ema" and not file.exists():
        raise ValueError(f"{folder} has no {file.name}: its run has kept no mean of its weights (ema.decay)")
    return file


def load_model(folder: Path, model: Model, weights: Weights = "raw") -> None:
    """Fill the model's parameters and buffers; every one of them, and nothing else, must be there."""
    file = weights_file(folder, weights)
    tensors = load_tensors(file)
    require_same(file, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, model)
    for name, own in model.state_dict().items():
        own.copy_(distributed.placed_as(own, tensors[name]))


def stored_shapes(folder: Path) -> dict[str, Shape]:
    """The shapes of the weights by name, of which none is read."""
    file = folder / WEIGHTS
    try:
        with safe_open(file, "pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except UNSOUND as error:
        raise ValueError(f"{file} is not a sound safetensors file: {error}") from None


def require_same(file: Path, stored: Mapping[str, Shape], model: Model) -> None:
    """ValueError if the model does not have what is stored, and nothing else."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if stored != wanted:
        missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
        other = sorted(k for k in stored.keys() & wanted.keys() if stored[k] != wanted[k])
        told = [f"{len(k)} {what} ({k[0]})" for what, k in (("missing", missing), ("extra", extra)) if k]
        told += [f"{len(other)} of other shape ({k}: {list(stored[k])}, not {list(wanted[k])})" for k in other[:1]]
        raise ValueError(f"{file} does not hold the weights of its config.yaml: {', '.join(told)}")


def load_optimizer(folder: Path, model: Model, optimizer: torch.optim.Optimizer) -> None:
    """Fill the optimizer's state."""
    places = {name: place for place, name in enumerate(_parameter_names(model, optimizer))}
    parameters = dict(model.named_parameters())
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in load_tensors(folder / OPTIMIZER).items():
        name, _, entry = key.rpartition("/")
        if tensor.shape == parameters[name].shape:  # in the weights' own memory format, which fused kernels rely on
            like = torch.empty_like(parameters[name], dtype=tensor.dtype)
            tensor = like.copy_(distributed.placed_as(like, tensor))
        state.setdefault(places[name], {})[entry] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _parameter_names(model: Model, optimizer: torch.optim.Optimizer) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: Model, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _parameter_names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{names[place]}/{entry}": value for place, entries in state.items() for entry, value in entries.items()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
