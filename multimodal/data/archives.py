"""Text in a file of its own, or in a member of a tar archive, compressed or not: nothing is unpacked."""

import tarfile
import zlib
from pathlib import Path

from multimodal.data.files import locate
from multimodal.parts import did_you_mean

BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error)


def read_text(root: Path, path: str, member: str | None) -> str:
    """All of a text file below `root`, or of a `member` of an archive; an error names the file and what it holds."""
    (file,) = locate(root, path)
    archive = tarfile.is_tarfile(file)
    if member is None:
        if archive:
            raise ValueError(f"{file} is an archive: set `member` to one of {', '.join(_members(file))}")
        return _decoded(file.read_bytes(), str(file))
    if not archive:
        raise ValueError(f"{file} is no tar archive, whole and readable: set `member` to null for a plain file")
    try:
        with tarfile.open(file) as tar:
            opened = tar.extractfile(member)
            if opened is None:
                raise ValueError(f"'{member}' in {file} is no file")
            return _decoded(opened.read(), f"{file}:{member}")
    except KeyError:
        names = _members(file)
        hint = did_you_mean(member, names)
        raise ValueError(f"{file} has no member '{member}', only {', '.join(names)}.{hint}") from None
    except BROKEN as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _members(file: Path) -> list[str]:
    try:
        with tarfile.open(file) as tar:
            return [one.name for one in tar if one.isreg()]
    except BROKEN as error:
        raise ValueError(f"{file} cannot be read: {error}") from None


def _decoded(raw: bytes, name: str) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error})") from None
