"""Checksums of the files in a folder, in the form that `sha256sum --check` reads too."""

import hashlib
from collections.abc import Collection
from pathlib import Path

NAME = "SHA256SUMS"


def write(folder: Path) -> None:
    """Note the checksum of every file in the folder, beside them."""
    (folder / NAME).write_text("".join(f"{_sha256(path)}  {name}\n" for name, path in _files(folder)))


def damage(folder: Path, unread: Collection[str] = ()) -> str | None:
    """The first file of the folder that is not what was written, and why; `unread` ones are passed over.

    No file is opened because the list names it: it must be there in the folder.
    """
    try:
        lines = (folder / NAME).read_text().splitlines()
        noted = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError):
        return f"{NAME} cannot be read"
    found = dict(_files(folder))
    for name in sorted((noted.keys() | found.keys()) - set(unread)):
        if name not in found:
            return f"{name} is missing"
        if name not in noted:
            return f"{name} is not in {NAME}"
        try:
            if _sha256(found[name]) != noted[name]:
                return f"{name} is not what was written: its checksum differs"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Regular files by name within the folder; hidden ones are of file systems and desktops."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
    return [(path.relative_to(folder).as_posix(), path) for path in paths if path.name != NAME]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
