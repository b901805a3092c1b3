"""Attributes in class names: "striped red circle" has a colour and a shape, "waterbird on land" a bird and a place."""

import re
from collections.abc import Callable, Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import AfterValidator
from torch import Tensor

from multimodal.parts import did_you_mean


class Attribute(NamedTuple):
    """What classes have one value of each."""

    names: tuple[str, ...]
    """Of its values, sorted."""
    of_class: Tensor
    """int64 [K] the value of each class."""


def read_attribute(
    class_names: Sequence[str],
    pattern: str | None,
    name: str,
) -> Attribute:
    """The part of each class name that the pattern's group `name` matches; without a pattern the whole name.

    ValueError, naming the class, where the pattern does not match a name from its beginning to its end.
    """
    values = list(class_names)
    if pattern is not None:
        found = [re.fullmatch(pattern, class_name) for class_name in class_names]
        missing = [
            class_name for class_name, match in zip(class_names, found, strict=True) if not (match and match[name])
        ]
        if missing:
            raise ValueError(f"pattern: '{pattern}' finds no {name} in the class name '{missing[0]}'")
        values = [match[name].strip() for match in found if match]
    names = tuple(sorted(set(values)))
    return Attribute(names, torch.tensor([names.index(value) for value in values], dtype=torch.int64))


def with_groups(*names: str) -> Callable[[str | None], str | None]:
    """The check that a pattern, if there is one, is a regular expression with groups of these names."""

    def check(pattern: str | None) -> str | None:
        if pattern is None:
            return None
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        for name in names:
            if name not in groups:
                raise ValueError(f"should have a group (?P<{name}>...), got '{pattern}'.{did_you_mean(name, groups)}")
        return pattern

    return check


AttributePattern = Annotated[str | None, AfterValidator(with_groups("attribute"))]
ClassAndGroupPattern = Annotated[str | None, AfterValidator(with_groups("class", "group"))]
