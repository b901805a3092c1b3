"""Text in a file of its own, or in members of a tar archive, compressed or not: nothing is unpacked."""

import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from multimodal.data.files import locate
from multimodal.data.texts import decoded
from multimodal.parts import did_you_mean

BROKEN = (tarfile.TarError, EOFError, OSError, OverflowError, ValueError, lzma.LZMAError, zlib.error)
"""What reading a damaged archive raises."""


def described(path: str | Path, member: str | None) -> str:
    """A file, or a member of an archive, in messages: "stsb.tar.gz:stsb/dev.csv"."""
    return str(path) if member is None else f"{path}:{member}"


def read_text(root: Path, path: str, member: str | None) -> str:
    """All of a text file below `root`, or of a `member` of an archive; an error names the file and what it holds."""
    (file,) = locate(root, path)
    archive = _is_archive(file)
    if member is None:
        if archive:
            names, _ = read_members(file, lambda _: False)
            raise ValueError(f"{file} is an archive: set `member` to one of {', '.join(names)}")
        return decoded(file.read_bytes(), str(file))
    if not archive:
        raise ValueError(f"{file} is no tar archive, whole and readable: set `member` to null for a plain file")
    names, found = read_members(file, lambda name: name == member)
    if member not in found:
        hint = did_you_mean(member, names)
        raise ValueError(f"{file} has no file '{member}' in it, only {', '.join(names)}.{hint}")
    return decoded(found[member], described(file, member))


def read_members(
    file: Path,
    wanted: Callable[[str], bool],  # by name
) -> tuple[list[str], dict[str, bytes]]:
    """The names of all files in an archive, and what the wanted ones hold; ValueError, saying where it is damaged."""
    names: list[str] = []
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(file) as tar:
            for member in regular(tar):
                names.append(member.name)
                if wanted(member.name) and (opened := tar.extractfile(member)):
                    found[member.name] = opened.read()
    except BROKEN as error:
        where = f", at '{names[-1]}' or after it" if names else ""
        raise ValueError(f"{file} is not a whole tar archive ({str(error).partition(chr(10))[0]}){where}") from None
    return names, found


def regular(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Its files, without links, which may lead to each other or to nothing; tarfile.ReadError for a false size."""
    for member in tar:
        if member.size < 0:  # after which tarfile would go back, and on for ever
            raise tarfile.ReadError(f"'{member.name}' has the size {member.size}")
        if member.isreg():
            yield member


def _is_archive(file: Path) -> bool:
    try:
        return tarfile.is_tarfile(file)
    except BROKEN:
        return False
