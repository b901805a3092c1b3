"""Embed many images or captions into a file, part by part: it can be stopped and continued, and memory stays flat."""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from multimodal.api import ImageTextModel
from multimodal.data.files import ImageFiles, PackedStrings
from multimodal.data.texts import read_lines
from multimodal.data.views import Captions, Inputs, Mapped, Slice
from multimodal.files import write_json
from multimodal.parts import Source

logger = logging.getLogger(__name__)

Format = Literal["parquet", "npy"]
FACTS = "facts.json"
DIGESTS = ("weights", "texts", "ids")  # facts that say nothing to a reader


# --- what is embedded -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Images or texts with their ids, each read when it is indexed; BadSample where it is broken."""

    reads: str
    """What a tower must read: "image", "text"."""
    inputs: Sequence[Any]
    ids: Sequence[str]
    facts: dict[str, Any]
    """What tells them from others, besides their ids."""


def from_path(source: Path) -> Rows:
    """All images below a folder, by their paths in it, or the lines of a .txt file, by their numbers from 0."""
    facts = {"source": str(source.resolve())}
    if source.suffix == ".txt":
        lines = read_lines(source)
        if not "".join(lines).strip():
            raise ValueError(f"'{source}' is empty")
        texts = PackedStrings(lines)
        facts["texts"] = hashlib.sha256(texts.bytes.tobytes() + texts.ends.tobytes()).hexdigest()
        return Rows("text", texts, Mapped(str, range(len(texts))), facts)
    files = ImageFiles(source)
    return Rows("image", files, files.names, facts)


def from_dataset(source: Source, reads: str, facts: dict[str, Any]) -> Rows:
    """The images of samples, by key, or all of their captions, by key and number: "shard.tar/000123#0"."""
    if reads == "text":
        captions = Captions(source)
        return Rows(reads, captions, Mapped(captions.key, range(len(captions))), {**facts, "texts": captions.digest})
    return Rows(reads, Inputs(source, reads), Mapped(source.key, range(len(source))), facts)


# --- where it is written --------------------------------------------------------------------------------------------


class Embeddings:
    """A file of unit-norm float32 embeddings with their ids, or the parts of one that is not finished.

    `out.parquet`, or `out.npy` beside `out.ids.json`; parts are in `out.parts/`. What a file is of is said beside it,
    in `out.parquet.json` or `out.npy.json`.
    """

    def __init__(self, out: Path, kind: Format, rows: Rows, facts: dict[str, Any]) -> None:
        self.rows, self.kind = rows, kind
        self.target, self.parts = (out.with_name(f"{out.name}.{ending}") for ending in (kind, "parts"))
        self.facts_file, self.ids_file = (
            out.with_name(f"{out.name}.{ending}") for ending in (f"{kind}.json", "ids.json")
        )
        digest = hashlib.sha256()
        for name in rows.ids:
            digest.update(_text(name).encode() + b"\n")
        self.facts = {**facts, **rows.facts, "rows": len(rows.ids), "ids": digest.hexdigest()}

    def are_written(self) -> bool:
        """Whether the file is there; ValueError if it is, or has begun as, that of something else."""
        if self.target.exists():
            _require_same(self.target, self.facts_file, self.facts)
            return True
        if (self.parts / FACTS).exists():
            _require_same(self.parts, self.parts / FACTS, self.facts)
        return False

    def write(self, model: ImageTextModel, tower: str, chunk: int) -> None:
        """Embed, `chunk` rows in memory at a time; rows that an earlier call has written are not embedded again.

        The row of what cannot be read is null (NaN in npy), and a warning names it.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        write_json(self.parts / FACTS, self.facts)
        total = len(self.rows.ids)
        if begun := len([*self.parts.glob("*.npz")]):
            logger.info("continues: %d parts are there already", begun)
        files = []
        with tqdm(total=total, desc="embedded", unit="", disable=None) as bar:
            for start in range(0, total, chunk):
                places = range(start, min(start + chunk, total))
                files.append(self.parts / f"{places.start:012d}-{places.stop:012d}.npz")
                if not files[-1].exists():
                    self._write_part(files[-1], model, tower, places)
                bar.update(len(places))
        partial = self.target.with_name(f".partial-{self.target.name}")
        (self._join_parquet if self.kind == "parquet" else self._join_npy)(files, partial, model.embed_dim)
        write_json(self.facts_file, self.facts)
        partial.replace(self.target)
        shutil.rmtree(self.parts)

    def _write_part(self, file: Path, model: ImageTextModel, tower: str, places: range) -> None:
        features, broken = model.encode_readable(tower, Slice(self.rows.inputs, places))
        for problem in broken.values():
            logger.warning("%s", problem)
        readable = np.ones(len(places), dtype=bool)
        readable[list(broken)] = False
        partial = file.with_name(f".partial-{file.name}")
        with partial.open("wb") as opened:
            np.savez(opened, features=features.numpy(), readable=readable)
        partial.replace(file)

    def _join_parquet(self, files: list[Path], partial: Path, width: int) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema([("id", pa.string()), ("embedding", pa.list_(pa.float32(), width))])
        ids = map(_text, self.rows.ids)
        with pq.ParquetWriter(partial, schema) as writer:
            for features, readable in map(_read_part, files):
                values = pa.FixedSizeListArray.from_arrays(pa.array(features.ravel()), width, mask=pa.array(~readable))
                writer.write_table(pa.table([pa.array(islice(ids, len(features))), values], schema=schema))

    def _join_npy(self, files: list[Path], partial: Path, width: int) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.rows.ids), width)}
        with partial.open("wb") as opened:
            np.lib.format.write_array_header_1_0(opened, header)
            for features, _ in map(_read_part, files):
                opened.write(features.astype("<f4").tobytes())
        with self.ids_file.open("w", encoding="utf-8") as opened_ids:
            for number, name in enumerate(map(_text, self.rows.ids)):
                opened_ids.write(f"{',' if number else '['}\n{json.dumps(name)}")
            opened_ids.write("\n]\n")


def _read_part(file: Path) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    with np.load(file) as part:
        return part["features"], part["readable"]


def _text(name: str) -> str:
    """An id that can be written: names of files may hold bytes that are no text."""
    return name.encode("utf-8", "replace").decode()


def _require_same(what: Path, facts_file: Path, facts: dict[str, Any]) -> None:
    ways_out = "delete it, or give another out"
    if not facts_file.exists():
        raise ValueError(f"{what} is there without {facts_file.name}, which says what it holds: {ways_out}")
    before = json.loads(facts_file.read_text())
    changed = [
        key if key in DIGESTS else f"{key}: {before.get(key)} -> {facts.get(key)}"
        for key in dict.fromkeys([*before, *facts])
        if before.get(key) != facts.get(key)
    ]
    if changed:
        raise ValueError(f"{what} holds other embeddings ({', '.join(changed)}): {ways_out}")
