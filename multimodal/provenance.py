"""What made a run: command, code, versions and hardware, with secrets removed."""

import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch

SECRET = re.compile(
    r"""(?ix) (?P<name> [\w.-]* (?:api_?key|token|secret|passw(?:or)?d) [\w.-]* ["']? \s* [=:] \s* ["']?) [^\s"',]+
    | (?P<scheme> \w+://) [^/\s@]+ @"""
)


def redact(text: str) -> str:
    """The text with the values of keys, tokens and passwords, and the user part of addresses, replaced by ***."""
    return SECRET.sub(lambda match: f"{match['name'] or match['scheme']}***{'@' if match['scheme'] else ''}", text)


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout


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
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": {d.name: d.version for d in sorted(distributions(), key=lambda d: d.name.lower())},
    }


def uncommitted() -> str:
    """The difference between the code that runs and its revision."""
    return redact(_git("diff", "HEAD") or "")
