"""Conditions on settings of runs: `loss.infonce.weight=1`, `optimizer.lr>=1e-3`, `optimizer=lion`."""

import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from multimodal.report.folders import number

FORM = re.compile(r"([^\s=<>!]+?)\s*(!=|>=|<=|==?|<|>)\s*(.*)", re.S)
ORDERS = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt}
ABSENT = object()


@dataclass(frozen=True)
class Condition:
    """On one setting."""

    path: str
    """Dotted."""
    relation: str
    value: str
    """As it was typed."""

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """ValueError says how one is written."""
        found = FORM.fullmatch(text.strip())
        if found is None or (found[2] in ORDERS and number(_read(found[3])) is None):
            raise ValueError(
                f"should be a setting and its value, such as optimizer.lr=0.001 (also !=, <, >, <=, >= a number), "
                f"got '{text}'"
            )
        return cls(found[1], found[2], found[3])

    def holds(self, config: Mapping[str, Any]) -> bool:
        """Of a run that has no such setting, only != holds."""
        found = setting(config, self.path)
        if self.relation in ORDERS:
            known, wanted = number(found), number(_read(self.value))
            return known is not None and wanted is not None and bool(ORDERS[self.relation](known, wanted))
        return self._is(found) != (self.relation == "!=")

    def _is(self, found: object) -> bool:
        if isinstance(found, Mapping):  # a part is known by its class, and by its file
            names = str(found.get("_target_", "")).lower().split(".")[-2:]
            return self.value.lower() in names
        wanted = _read(self.value)
        same = type(wanted) is type(found) or (number(wanted) is not None and number(found) is not None)
        return (same and wanted == found) or (isinstance(found, str) and found == self.value)


def _read(text: str) -> Any:
    """As YAML has it, where 1e-3 is a number too."""
    try:
        return float(text) if re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", text) else yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def setting(config: Mapping[str, Any], path: str) -> object:
    """What stands at a dotted path; ABSENT if nothing does."""
    found: Any = config
    for key in path.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return ABSENT
        found = found[key]
    return found


def paths(configs: Iterable[Mapping[str, Any]]) -> list[str]:
    """All dotted paths of some configurations."""

    def inside(value: Mapping[str, Any], before: str) -> Iterator[str]:
        for key, inner in value.items():
            yield f"{before}{key}"
            if isinstance(inner, Mapping):
                yield from inside(inner, f"{before}{key}.")

    return list(dict.fromkeys(path for config in configs for path in inside(config, "")))
