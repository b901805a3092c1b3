"""Weights to start from: read from files without running what is pickled in them, fitted to a model, and reported."""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multimodal import checkpoint, distributed
from multimodal.interop import names
from multimodal.model import Model
from multimodal.resolve import did_you_mean

SCHEME = "open_clip:"
PREFERRED = (  # open_clip's order, in a folder
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
    "model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
)
PICKLED = (".pt", ".pth", ".bin", ".ckpt")
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI keeps beside the weights."""
MANY = 5
"""Names in a line of a report."""

Shape = tuple[int, ...]


@dataclass
class Report:
    """What became of weights that a model was started from; names are the model's."""

    source: str
    loaded: list[str] = field(default_factory=list)
    """Those that fitted, the resized ones among them."""
    resized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Position embeddings made to fit: shapes in the source and in the model."""
    missing: list[str] = field(default_factory=list)
    """In the model, not in the source: they stay as they were."""
    unexpected: list[str] = field(default_factory=list)
    """In the source, not in the model."""
    mismatched: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    """Of different shapes, in the source and in the model: they stay as they were."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.loaded)} tensors loaded"]
        lines += _line("resized", [f"{name} {_shapes(*pair)}" for name, pair in self.resized.items()])
        lines += _line("not in the source, left as initialised", self.missing)
        lines += _line("not in the model, left out", self.unexpected)
        lines += _line(
            "of another shape, left as initialised",
            [f"{name} {_shapes(*pair)}" for name, pair in self.mismatched.items()],
        )
        return "\n".join(lines)


def _shapes(old: Shape, new: Shape) -> str:
    return f"{list(old)} -> {list(new)}"


def _line(what: str, entries: list[str]) -> list[str]:
    return [f"  {len(entries)} {what}: {_few(entries)}"] if entries else []


def _few(entries: Iterable[str]) -> str:
    known = list(entries)
    return ", ".join(known[:MANY]) + (f", ... ({len(known) - MANY} more)" if len(known) > MANY else "")


# --- finding --------------------------------------------------------------------------------------------------------


def tag(architecture: str, name: str) -> Path:
    """The file of pretrained weights that open_clip knows, downloaded unless it is there; ValueError if not."""
    from open_clip.pretrained import (
        download_pretrained,
        get_pretrained_cfg,
        list_pretrained,
        list_pretrained_tags_by_model,
    )

    known = list_pretrained_tags_by_model(architecture)
    if not known:
        models = {model for model, _ in list_pretrained()}
        raise ValueError(f"open_clip has no weights of '{architecture}'.{did_you_mean(architecture, models)}")
    found = get_pretrained_cfg(architecture, name)
    if not found:
        have = ", ".join(known)
        raise ValueError(
            f"open_clip has no weights '{name}' of {architecture}; there are: {have}.{did_you_mean(name, known)}"
        )
    try:
        return Path(download_pretrained(found))
    except Exception as error:  # of urllib, huggingface_hub and what they are built on
        place = found.get("hf_hub") or found.get("url")
        why = str(error).strip().splitlines()[-1][:200] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{SCHEME}{architecture}/{name} cannot be downloaded from {place} ({why}); on a machine without network, "
            "bring the file there and give its path instead (init.weights=PATH)"
        ) from None


def locate(source: str, runs: Path) -> Path:
    """The file or folder that a source names: open_clip:ARCHITECTURE/TAG, a path, or a run below `runs`."""
    if source.startswith(SCHEME):
        architecture, _, name = source.removeprefix(SCHEME).partition("/")
        if not name:
            raise ValueError(f"'{source}' should be {SCHEME}ARCHITECTURE/TAG, such as {SCHEME}ViT-B-32/openai")
        return tag(architecture, name)
    if (path := Path(source)).exists():
        return path
    if source and (runs / source).is_dir():
        return runs / source
    have = sorted(path.name for path in runs.glob("*") if checkpoint.steps(path))
    raise ValueError(
        f"there is no file or folder '{source}', and no run of this name in {runs} (with checkpoints: "
        f"{_few(have) or 'none'}).{did_you_mean(source, have)}"
    )


def checkpoint_of(source: str, runs: Path) -> Path | None:
    """The checkpoint of ours that a source names, if it is one: what its towers have learnt of captions goes along."""
    if source.startswith(SCHEME):
        return None
    path = locate(source, runs)
    folder = checkpoint.find(path) if path.is_dir() and checkpoint.steps(path) else path
    if not (folder / "state.json").is_file():
        return None
    checkpoint.verify(folder, unread={checkpoint.OPTIMIZER})
    return folder


# --- reading --------------------------------------------------------------------------------------------------------


def read(source: Path) -> dict[str, Tensor]:
    """The weights in a file or folder, on the CPU; ValueError if there are none, or more than weights.

    A folder is a run or checkpoint of ours, one that open_clip's training has left, or one as on the Hugging Face Hub.
    """
    file = _file(source)
    if file.suffix == ".safetensors":
        return _tidy(checkpoint.load_tensors(file), file)
    if file.suffix in PICKLED:
        return _tidy(_read_pickled(file), file)
    raise ValueError(f"{file} is not a file of weights: known are .safetensors, {', '.join(PICKLED)}")


def _file(source: Path) -> Path:
    if not source.is_dir():
        return source
    if checkpoint.steps(source):
        return checkpoint.find(source) / "model.safetensors"
    for name in PREFERRED:
        if (source / name).is_file():
            return source / name
    epochs = sorted(source.glob("**/epoch_*.pt"), key=_epoch)
    if places := sorted({str(path.parent) for path in epochs}):
        if len(places) > 1:
            raise ValueError(f"the folder {source} has checkpoints of several runs ({_few(places)}): name one")
        return epochs[-1]
    files = [path for path in sorted(source.iterdir()) if path.suffix in (".safetensors", *PICKLED)]
    if len(files) == 1:
        return files[0]
    have = (
        f"several files of weights ({_few(path.name for path in files)}): name one" if files else "no file of weights"
    )
    raise ValueError(f"the folder {source} has {have}")


def _epoch(path: Path) -> int:
    found = re.search(r"(\d+)\.pt$", path.name)
    return int(found[1]) if found else -1


def _read_pickled(file: Path) -> Any:
    """What torch.save has written, if that is tensors and plain data; nothing in the file is run."""
    archive = zipfile.is_zipfile(file)
    if archive:
        with zipfile.ZipFile(file) as opened:
            if any(name.endswith("/constants.pkl") for name in opened.namelist()):
                raise ValueError(
                    f"{file} is a TorchScript archive, a program and not weights alone, which is not run; where you "
                    "trust it: torch.save(torch.jit.load(file).state_dict(), ...)"
                )
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=archive)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)|(?:class|function|instruction) (\S+)", str(error))
        what = f" ({(found[1] or found[2]).rstrip('.,')})" if found else ""
        raise ValueError(
            f"{file} holds more than tensors and plain data{what}, or is no file of weights; nothing in it was run. "
            "Where you trust it, save its state_dict alone, best as .safetensors"
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not a sound file of weights: {why}") from None


def _tidy(found: Any, file: Path) -> dict[str, Tensor]:
    """Only the weights, without the names that wrappers put before them."""
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{file} holds no weights by name but {type(found).__name__}")
    state: dict[str, Tensor] = {}
    for name, tensor in found.items():
        if name in NOT_WEIGHTS:
            continue
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(f"{file} holds '{name}', which is not a tensor but {type(tensor).__name__}")
        state[".".join(part for part in name.split(".") if part != "_orig_mod")] = tensor
    while state and all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return state


# --- fitting --------------------------------------------------------------------------------------------------------


def initialise(
    model: Model,
    source: str,  # open_clip:ARCHITECTURE/TAG, a path, or the name of a run
    runs: Path,
) -> Report:
    """Copy into the model what fits, position embeddings resized; ValueError if no tower's weights do."""
    path = Path(distributed.on_first_rank(lambda: str(locate(source, runs))))
    return fit(model, read(path), source)


def fit(model: Model, state: Mapping[str, Tensor], source: str) -> Report:
    """Copy weights under our names or open_clip's into the model, in its own dtype; what fits not stays as it is."""
    given = names.from_open_clip(state, model) if names.is_open_clip(state) else dict(state)
    own = model.state_dict()
    report = Report(source, missing=[name for name in own if name not in given])
    fitting = {}
    for name, tensor in given.items():
        if name not in own:
            if not name.endswith("position_ids"):  # of older versions of transformers, which kept them
                report.unexpected.append(name)
            continue
        old, new = tuple(tensor.shape), tuple(own[name].shape)
        fitted = _fitted(name, tensor, own[name], model)
        if fitted is None:
            report.mismatched[name] = (old, new)
            continue
        if tensor.numel() != fitted.numel():
            report.resized[name] = (old, new)
        report.loaded.append(name)
        fitting[name] = fitted
    if not any(name.startswith("towers.") for name in fitting):
        shapes = _few(f"{name} {_shapes(*pair)}" for name, pair in report.mismatched.items())
        raise ValueError(
            f"nothing in {source} fits the model's towers. Names there: {_few(state) or 'none'}; in the model: "
            f"{_few(name for name in own if name.startswith('towers.'))}"
            + (f"; other shapes: {shapes}" if shapes else "")
        )
    with torch.no_grad():
        for name, tensor in fitting.items():
            own[name].copy_(distributed.placed_as(own[name], tensor))
    return report


def _fitted(name: str, tensor: Tensor, own: Tensor, model: Model) -> Tensor | None:
    """A tensor in the shape of the model's own, if it can be."""
    if tensor.shape == own.shape:
        return tensor
    if tensor.numel() == own.numel() == 1:
        return tensor.reshape(own.shape)
    match = re.fullmatch(r"towers\.(\w+)\.net\.(.*)", name)
    if match is None or tensor.shape[-1] != own.shape[-1] or tensor.ndim != own.ndim:
        return None
    net = model.towers[match[1]].net
    assert isinstance(net, nn.Module)
    if not tensor.is_floating_point():
        return None
    values = tensor if tensor.dtype == torch.float64 else tensor.float()
    if match[2] == "trunk.pos_embed" and tensor.ndim == 3:
        return _resized_timm(values, own, net)
    if match[2] == "positional_embedding" and hasattr(net, "token_embedding"):
        return resized_text(values, len(own))
    if match[2] in ("positional_embedding", "attnpool.positional_embedding"):
        return resized_grid(values, len(own))
    return None


def resized_grid(
    embedding: Tensor,  # [1 + h * h, W], the class token's first
    length: int,
) -> Tensor | None:  # [length, W]
    """Position embeddings of a square grid for another one, bicubic, as open_clip's `resize_pos_embed`."""
    old, new = math.isqrt(len(embedding) - 1), math.isqrt(length - 1)
    if old < 1 or new < 1 or old**2 != len(embedding) - 1 or new**2 != length - 1:
        return None
    first, grid = embedding[:1], embedding[1:]
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([first, grid.permute(0, 2, 3, 1).reshape(new * new, -1)])


def resized_text(
    embedding: Tensor,  # [l, W]
    length: int,
) -> Tensor:  # [length, W]
    """Position embeddings of a context for another one, linear, as open_clip's `resize_text_pos_embed`."""
    return F.interpolate(embedding.T[None], size=length, mode="linear", align_corners=False)[0].T


def _resized_timm(embedding: Tensor, own: Tensor, net: nn.Module) -> Tensor | None:
    """The same for timm's vision transformers, by timm: [1, n, W] with the tokens before the patches left alone."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    trunk: Any = net.trunk
    grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    prefix = 0 if getattr(trunk, "no_embed_class", False) else getattr(trunk, "num_prefix_tokens", 0)
    if grid is None or math.isqrt(embedding.shape[1] - prefix) ** 2 != embedding.shape[1] - prefix:
        return None
    resized: Tensor = resample_abs_pos_embed(embedding, new_size=list(grid), num_prefix_tokens=prefix)
    return resized if resized.shape == own.shape else None
