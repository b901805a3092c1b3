"""What made a run: command, code, versions and hardware, with secrets removed."""

import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

NAME = r"(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|secret|token|password|passwd|credentials?)"
VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s"',]+)"""
SECRETS = [
    re.compile(rf"""(?ix) (?<![a-z]) ({NAME} ["']? \s* [=:] \s*) {VALUE}"""),  # token=..., "api_key": ...
    re.compile(rf"(?ix) (--[a-z-]*{NAME} \s+) {VALUE}"),  # --token ...
    re.compile(rf"""(?ix) (authorization ["']? \s* [=:] \s* ["']? \w+ \s+) {VALUE}"""),  # Authorization: Bearer ...
    re.compile(r"(?x) (\w+://) [^\s@\"']+ (?=@)"),  # scheme://user:password@host
]


def redact(text: str) -> str:
    """The text with the values of keys, tokens and passwords, and the user part of addresses, replaced by ***."""
    for secret in SECRETS:
        text = secret.sub(r"\1***", text)
    return text


def _git(*arguments: str) -> str | None:
    command = ["git", *arguments]
    try:
        result = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.decode(errors="replace") if result.returncode in (0, 1) else None  # 1: there is a difference


def facts() -> dict[str, Any]:
    """Of this start of the program; `revision` is None outside a git checkout."""
    revision = _git("rev-parse", "HEAD")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redact(shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])),
        "revision": revision and revision.strip(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": {d.name: d.version for d in distributions() if d.name},
    }


NOT_COMPARED = ("time", "command", "cpus")
"""Facts that say nothing of what is computed."""


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """The facts that are not the same at two starts, by dotted path; None is what was not recorded, or is not there."""
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key), new.get(key)
        if key in NOT_COMPARED or was == is_now:
            continue
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            yield from ((f"{key}.{path}", before, after) for path, before, after in differences(was, is_now))
        else:
            yield key, str(was), str(is_now)


def uncommitted() -> str:
    """How the code that runs differs from its revision, files that git does not know included."""
    changes = [_git("diff", "HEAD") or ""]
    for name in (_git("ls-files", "--others", "--exclude-standard") or "").splitlines():
        changes.append(_git("diff", "--no-index", "/dev/null", name) or "")
    return redact("".join(changes))
