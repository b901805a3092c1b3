"""Text files, and those that are read line by line."""

from pathlib import Path


def decoded(raw: bytes, name: str) -> str:
    """UTF-8 as text, without the mark that may stand before it; ValueError, with its `name`, if it is none."""
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8 text ({error})") from None


def lines_of(text: str) -> list[str]:
    r"""The lines, ended by \n, \r\n or \r alone: `str.splitlines` would also cut a caption at U+2028 or a form feed."""
    return text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")


def read_lines(file: Path) -> list[str]:
    """The lines of a text file; FileNotFoundError, or ValueError if it is no text."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file '{file}'")
    return lines_of(decoded(file.read_bytes(), f"'{file}'"))
