"""How a part is described, and how its description becomes the part.

A part is a frozen pydantic model whose fields are its knobs. Its YAML names the class in `_target_`; `resolve` turns
such a mapping into the part, from allowed packages only: this one, and installed packages with the entry point group
`multimodal.parts`. A field annotated with a contract (`loss: dict[str, Loss]`) resolves by itself.
"""

import difflib
import importlib
import inspect
import re
from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetCoreSchemaHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

ENTRY_POINT_GROUP = "multimodal.parts"


# --- describing -----------------------------------------------------------------------------------------------------


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The hint "Did you mean 'x'?" for the nearest known word, or nothing."""
    near = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def problem(message: str, *path: str | int, value: object = None) -> InitErrorDetails:
    """One line of a ValidationError, at `path` below the value under validation."""
    return InitErrorDetails(
        type=PydanticCustomError("problem", "{message}", {"message": message}), loc=path, input=value
    )


T = TypeVar("T")
Operational = Annotated[T, "operational"]
"""Marks a field that changes where, how fast or how often watched, and not what is computed."""


class Section(BaseModel):
    """Typed fields and nothing beside them: unknown keys are refused, with the nearest known name; strict scalars."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_names(cls, value: Any, handler: Callable[[Any], Self]) -> Self:
        try:
            return handler(value)
        except ValidationError as error:
            lines = []
            for line in error.errors(include_url=False):
                message = line["msg"]
                if line["type"] == "extra_forbidden" and len(line["loc"]) == 1:
                    message = "unknown key." + did_you_mean(str(line["loc"][0]), cls.model_fields)
                elif line["type"] == "missing":
                    message = "no value given"
                elif line["type"] not in ("problem", "value_error", "extra_forbidden"):
                    message = f"{message[:1].lower()}{message[1:]}, got {line['input']!r}"
                lines.append(problem(message.removeprefix("Value error, "), *line["loc"], value=line["input"]))
            raise ValidationError.from_exception_data(cls.__name__, lines) from None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """What does not fit among fields that are valid by themselves: (the field to change, what is wrong)."""
        yield from ()

    @model_validator(mode="after")
    def _has_no_conflicts(self) -> Self:
        lines = [problem(message, name, value=getattr(self, name)) for name, message in self.conflicts()]
        if lines:
            raise ValidationError.from_exception_data(type(self).__name__, lines)
        return self


class Part(Section, ABC):
    """Base of every contract: a part is its knobs; the subclass says what it does with them."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if inspect.isabstract(cls):  # a contract: the value says by `_target_` which of its parts it is
            return core_schema.no_info_plain_validator_function(lambda value: resolve(value, cls))
        return handler(source)

    @classmethod
    def contract(cls) -> "type[Part]":
        """What it derives from first, below this class: one of the contracts in `parts`."""
        return next((base for base in cls.__mro__ if Part in base.__bases__), Part)

    @classmethod
    def target(cls) -> str:
        """What `_target_` says of this part."""
        return f"{cls.__module__}.{cls.__qualname__}"

    @model_serializer(mode="wrap")
    def _name_target(self, handler: Callable[[Self], dict[str, Any]]) -> dict[str, Any]:
        return {"_target_": self.target(), **handler(self)}


P = TypeVar("P", bound=Part)


# --- finding --------------------------------------------------------------------------------------------------------


def announced(point: EntryPoint) -> str:
    """The package that an entry point announces."""
    return point.value.partition(":")[0].strip()


@cache
def allowed_packages() -> frozenset[str]:
    """Packages that parts may come from: ours, and those installed ones that announce themselves, as they do.

    Announced may be a package inside another one, which then stays closed: `google.foo` does not open all of `google`.
    """
    return frozenset({"multimodal", *map(announced, entry_points(group=ENTRY_POINT_GROUP))})


def find_part(target: str, contract: type[Part]) -> type[Part]:
    """The class that `target` names; ValueError if it is not an allowed `contract`, before anything is imported."""
    if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", target):
        raise ValueError(f"'{target}' is not a dotted path to a class")
    module_name, _, name = target.rpartition(".")
    if not any(target.startswith(f"{package}.") for package in allowed_packages()):
        allowed = ", ".join(sorted(allowed_packages()))
        raise ValueError(f"'{target}' is outside the packages that parts may come from ({allowed})")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ValueError(f"'{module_name}' needs the package '{error.name}', which is not installed") from None
        raise ValueError(f"there is no module '{error.name}'") from None
    except (ImportError, SyntaxError) as error:
        raise ValueError(f"'{module_name}' cannot be imported: {error}") from None
    parts = {k: v for k, v in vars(module).items() if inspect.isclass(v) and issubclass(v, Part)}
    found = parts.get(name)
    if found is None:
        raise ValueError(f"'{module_name}' has no part '{name}'.{did_you_mean(name, parts)}")
    if inspect.isabstract(found):
        raise ValueError(f"'{name}' is what parts derive from, not a part itself")
    if not issubclass(found, contract):
        kinds = f"wanted is one of kind {contract.__name__}, this is of kind {found.contract().__name__}"
        raise ValueError(f"'{name}' is the wrong kind of part: {kinds}")
    return found


def resolve(value: Any, contract: type[P]) -> P:
    """The part that a mapping with `_target_` describes; every problem in it is reported at its own path."""
    if isinstance(value, contract):
        return value
    if not isinstance(value, Mapping) or not isinstance(value.get("_target_"), str):
        message = f"should be a {contract.__name__}: a mapping whose `_target_` names one"
        raise ValidationError.from_exception_data(contract.__name__, [problem(message, value=value)])
    try:
        found = find_part(value["_target_"], contract)
    except ValueError as error:
        line = problem(str(error), "_target_", value=value["_target_"])
        raise ValidationError.from_exception_data(contract.__name__, [line]) from None
    return found.model_validate({key: item for key, item in value.items() if key != "_target_"})  # type: ignore[return-value]
