"""Embed many images or captions into a file, part by part: it can be stopped and continued, and memory stays flat."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from multimodal.api import ImageTextModel
from multimodal.data.files import IMAGE_SUFFIXES, open_image
from multimodal.files import write_json

logger = logging.getLogger(__name__)

Format = Literal["parquet", "npy"]
FACTS = "facts.json"


def find_images(place: Path) -> list[Path]:
    """An image, or all images below a folder, sorted; ValueError if there are none."""
    if place.is_file():
        if place.suffix[1:].lower() not in IMAGE_SUFFIXES:
            raise ValueError(f"'{place}' is no image ({', '.join(IMAGE_SUFFIXES)})")
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"there is no image or folder of images '{place}'")
    found = sorted(path for path in place.rglob("*") if path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise ValueError(f"'{place}' has no images ({', '.join(IMAGE_SUFFIXES)}) in it")
    return found


def encode_readable(model: ImageTextModel, paths: Sequence[Path]) -> tuple[Tensor, dict[int, str]]:
    """Features [n, D] of image files, and what is wrong with those that cannot be read, whose rows are NaN."""
    try:
        return model.encode_image(list(paths)), {}
    except (ValueError, OSError):
        unreadable: dict[int, str] = {}
        for place, path in enumerate(paths):
            try:
                open_image(path, str(path))
            except (ValueError, OSError) as error:
                unreadable[place] = str(error)
        if not unreadable:
            raise
    features = torch.full((len(paths), model.embed_dim), torch.nan)
    good = [place for place in range(len(paths)) if place not in unreadable]
    features[good] = model.encode_image([paths[place] for place in good])
    return features, unreadable


def embed(
    model: ImageTextModel,
    items: Sequence[Path] | Sequence[str],  # image files, or captions
    ids: Sequence[str],
    out: Path,  # without ending
    kind: Format,
    chunk: int,  # rows in memory at a time
    facts: dict[str, Any],  # what the embeddings are of: they are only continued with the same
) -> Path:
    """Write unit-norm float32 embeddings with their ids: `out.parquet`, or `out.npy` beside `out.ids.json`.

    Parts are written to `out.parts/` and joined at the end; the same call again continues behind those that are
    complete. The row of an image that cannot be read is null (NaN in npy), and a warning names it. ValueError if the
    parts that are there are of something else.
    """
    target, parts = out.with_name(f"{out.name}.{kind}"), out.with_name(f"{out.name}.parts")
    made_of = {**facts, "rows": len(ids), "ids": hashlib.sha256("\n".join(ids).encode()).hexdigest()}
    made_of |= {"dimensions": model.embed_dim, "chunk": chunk}
    facts_file = parts / FACTS
    if facts_file.exists() and (before := json.loads(facts_file.read_text())) != made_of:
        changed = [f"{key}: {before.get(key)} -> {made_of[key]}" for key in made_of if before.get(key) != made_of[key]]
        raise ValueError(f"{parts} holds other embeddings ({', '.join(changed)}): delete it, or give another out")
    parts.mkdir(parents=True, exist_ok=True)
    write_json(facts_file, made_of)
    files = [parts / f"{number:06d}.npy" for number in range(-(-len(ids) // chunk))]
    with tqdm(total=len(ids), desc="embedded", unit="", disable=None) as bar:
        for number, file in enumerate(files):
            rows = items[number * chunk : (number + 1) * chunk]
            if not file.exists():
                _write_part(file, _encode(model, rows))
            bar.update(len(rows))
    (_join_parquet if kind == "parquet" else _join_npy)(files, ids, model.embed_dim, chunk, target)
    shutil.rmtree(parts)
    return target


def _encode(model: ImageTextModel, rows: Sequence[Path] | Sequence[str]) -> Tensor:
    if isinstance(rows[0], str):
        return model.encode_text([str(row) for row in rows])
    features, unreadable = encode_readable(model, [Path(row) for row in rows])
    for problem in unreadable.values():
        logger.warning("%s", problem)
    return features


def _write_part(file: Path, features: Tensor) -> None:
    partial = file.with_name(f".partial-{file.name}")
    with partial.open("wb") as opened:
        np.save(opened, features.numpy())
    partial.replace(file)


def _join_parquet(files: list[Path], ids: Sequence[str], width: int, chunk: int, target: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
    partial = target.with_name(f".partial-{target.name}")
    with pq.ParquetWriter(partial, schema) as writer:
        for number, file in enumerate(files):
            rows = np.load(file)
            missing = np.isnan(rows).any(axis=1)
            values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), width, mask=pa.array(missing))
            writer.write_table(pa.table([pa.array(ids[number * chunk : (number + 1) * chunk]), values], schema=schema))
    partial.replace(target)


def _join_npy(files: list[Path], ids: Sequence[str], width: int, chunk: int, target: Path) -> None:
    partial = target.with_name(f".partial-{target.name}")
    joined = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(len(ids), width))
    for number, file in enumerate(files):
        joined[number * chunk : (number + 1) * chunk] = np.load(file)
    joined.flush()
    write_json(target.with_name(f"{target.stem}.ids.json"), list(ids))
    partial.replace(target)
