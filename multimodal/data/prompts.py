"""Class names and prompts: in a configuration, in a text file, or open_clip's own for ImageNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import PlainSerializer, ValidatorFunctionWrapHandler, WrapValidator

from multimodal.data.files import ClassNames, Templates, one_slot
from multimodal.data.texts import read_lines

IMAGENET = "imagenet"
"""Stands for open_clip's names of ImageNet's classes, and for its 80 prompts, OpenAI's."""
IMAGENET_SIMPLE = "imagenet_simple"
"""Stands for the seven of these that OpenAI found to do as well."""


def _or_named(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
    """A list, or one string that says where the list is."""
    return value if isinstance(value, str) and value else handler(value)


_as_it_is = PlainSerializer(lambda value: value if isinstance(value, str) else list(value))

if TYPE_CHECKING:
    NamedClasses = tuple[str, ...] | str
    NamedTemplates = tuple[str, ...] | str
else:
    NamedClasses = Annotated[ClassNames, WrapValidator(_or_named), _as_it_is]
    NamedTemplates = Annotated[Templates, WrapValidator(_or_named), _as_it_is]


def named_classes(named: "NamedClasses | None", root: Path, own: Sequence[str]) -> tuple[str, ...]:
    """The names by label: a list, the lines of a .txt file below `root`, ImageNet's, or the data set's `own`."""
    if named is None:
        return tuple(own)
    if not isinstance(named, str):
        return named
    if named == IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    return read_list(root, named, "class_names", IMAGENET)


def named_templates(named: "NamedTemplates | None", root: Path, own: Sequence[str]) -> tuple[str, ...]:
    """Prompts with one {}: a list, the lines of a .txt file below `root`, OpenAI's for ImageNet, or the `own` ones."""
    if named is None:
        if not own:
            raise ValueError(f"the dataset brings no templates: set templates, a list, a .txt file, or {IMAGENET}")
        return tuple(own)
    if not isinstance(named, str):
        return named
    if named in (IMAGENET, IMAGENET_SIMPLE):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        known = OPENAI_IMAGENET_TEMPLATES if named == IMAGENET else SIMPLE_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in known)
    return read_templates(root / _text_file(named, "templates", f"{IMAGENET} or {IMAGENET_SIMPLE}"))


def read_templates(file: Path) -> tuple[str, ...]:
    """The templates in a text file, one a line; {c}, as CLIP_benchmark writes the place of the name, is {} as well."""
    found = []
    for number, line in enumerate(read_lines(file), start=1):
        if line.strip():
            try:
                found.append(one_slot(line.strip().replace("{c}", "{}")))
            except ValueError as error:
                raise ValueError(f"{file}, line {number}: {error}") from None
    if not found:
        raise ValueError(f"{file} is empty")
    return tuple(found)


def read_list(root: Path, named: str, knob: str, known: str) -> tuple[str, ...]:
    """The lines of a .txt file; an empty one among them counts, as what follows belongs to the label behind it."""
    file = root / _text_file(named, knob, known)
    lines = read_lines(file)
    if lines == [""]:
        raise ValueError(f"{file} is empty")
    return tuple(line.strip() for line in lines)


def _text_file(named: str, knob: str, known: str) -> str:
    if not named.endswith(".txt"):
        raise ValueError(f"{knob} should be a list, a .txt file with one a line, or {known}, got '{named}'")
    return named
