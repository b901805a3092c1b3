"""Overrides as the command line has them: of a trial, and as an experiment file."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from multimodal.cli import literal


def override(key: str, value: Any) -> str:
    """A word that `train.py` reads as this value."""
    if isinstance(value, str):
        return f"{key}={literal(value)}"
    if isinstance(value, list | tuple):
        return f"{key}=[{','.join(override('', item)[1:] for item in value)}]"
    if isinstance(value, Mapping):
        inner = ",".join(f"{name}:{override('', item)[1:]}" for name, item in value.items())
        return f"{key}={{{inner}}}"
    return f"{key}={json.dumps(value)}"


def typed(key: str, value: str) -> str:
    """The same for text, without quotes where people would type none."""
    plain = f"{key}={value}"
    is_plain = re.fullmatch(r"[./]*[A-Za-z_][\w./-]*", value) and parsed(plain)[2] == value
    return plain if is_plain else override(key, value)


def is_group(key: str, groups: Iterable[str]) -> bool:
    """Whether a key chooses a file: one of the groups that are composed, or another place for one ("group@place")."""
    return key in groups or "@" in key or "/" in key


def parsed(word: str) -> tuple[str, bool, Any]:
    """Of an override: its key, whether it adds to what is composed, and the value as plain data."""
    (found,) = OverridesParser.create().parse_overrides([word])
    return found.get_key_element().lstrip("+"), found.is_add(), found.value()


def merged(words: Iterable[str]) -> list[str]:
    """The words without those that a later one takes the place of; Hydra refuses some that are given twice."""
    return list({parsed(word)[0]: word for word in words}.values())


def put(data: dict[str, Any], path: str, value: Any) -> None:
    """Set what is at a dotted path of nested mappings."""
    *parents, last = path.split(".")
    for key in parents:
        inner = data.get(key)
        data[key] = inner = inner if isinstance(inner, dict) else {}
        data = inner
    data[last] = value


def experiment(words: Iterable[str], groups: Iterable[str], title: str) -> str:
    """The file of an experiment that says the same as these overrides do; later ones win."""
    base: list[Any] = []
    choices: dict[str, Any] = {}
    values: dict[str, Any] = {}
    groups = list(groups)
    for word in words:
        key, added, value = parsed(word)
        if key == "experiment":
            base = [f"/experiment/{value}"]
        elif is_group(key, groups):
            choices[f"/{key}" if added else f"override /{key}"] = value
        else:
            put(values, key, value)
    choices = dict(sorted(choices.items(), key=lambda one: one[0].startswith("override ")))  # Hydra wants those last
    body = {"defaults": [*base, *({key: value} for key, value in choices.items())], **values}
    return f"# @package _global_\n{title}\n{yaml.safe_dump(body, sort_keys=False, allow_unicode=True)}"
