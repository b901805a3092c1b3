"""Refresh the pins: every package at the newest version that `dependencies` allow, in `pyproject.toml`; see --help.

A lock file would also hold addresses of a package index, which differ from place to place; names and versions do not.
The versions hold on every platform and Python that the project supports, since `uv lock` resolves for all of them.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parent.parent / "pyproject.toml"
KEY = "constraint-dependencies"
LIST = re.compile(rf"^{KEY} = \[(?:\]|\n.*?^\])", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^\[tool\.uv\]\n", re.MULTILINE)


def with_pins(text: str, pins: list[str]) -> str:
    """The text of a `pyproject.toml` with `pins` as its list; everything else stays as it is, comments too."""
    entry = "\n".join([f"{KEY} = [", *(f'    "{pin}",' for pin in pins), "]"]) if pins else f"{KEY} = []"
    if LIST.search(text):
        changed = LIST.sub(lambda _: entry, text, count=1)
    elif TABLE.search(text):
        changed = TABLE.sub(lambda found: f"{found[0]}{entry}\n", text, count=1)
    else:
        changed = f"{text.rstrip()}\n\n[tool.uv]\n{entry}\n"
    before, after = tomllib.loads(text), tomllib.loads(changed)
    before.setdefault("tool", {}).setdefault("uv", {})[KEY] = pins
    if before != after:
        raise ValueError(f"pyproject.toml has {KEY} in a form that this program does not know; nothing is changed")
    return changed


def pins_of(lock: dict[str, Any]) -> list[str]:
    """All packages in a lock file but the project itself, as "name==version"; with a marker where versions differ."""
    versions: dict[str, list[dict[str, Any]]] = {}
    for package in lock["package"]:
        if "registry" in package["source"]:
            versions.setdefault(package["name"], []).append(package)
    pins = []
    for name, found in sorted(versions.items()):
        for package in found:
            version = package["version"].partition("+")[0]  # a build for one kind of hardware is not for all
            markers = package.get("resolution-markers", []) if len(found) > 1 else []
            if len(found) > 1 and not markers:
                print(f"{name} has several versions without markers: left out", file=sys.stderr)
                break
            condition = " or ".join(f"({marker})" for marker in markers) if len(markers) > 1 else "".join(markers)
            pins.append(f"{name}=={version}" + (f" ; {condition}" if condition else ""))
    return list(dict.fromkeys(pins))


def resolve(text: str) -> list[str]:
    """The newest versions that fit together, whatever the pins are now."""
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "pyproject.toml").write_text(with_pins(text, []))
        subprocess.run(["uv", "lock", "--upgrade", "--quiet", "--no-progress"], cwd=place, check=True)
        return pins_of(tomllib.loads((Path(place) / "uv.lock").read_text()))


def main() -> int:
    """Resolve, say what changes, and write it unless told not to; the exit status."""
    parser = argparse.ArgumentParser(description="Refresh the pinned versions in pyproject.toml (needs the network).")
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if newer versions are out")
    check = parser.parse_args().check
    if shutil.which("uv") is None:
        print("uv is missing: python -m pip install uv", file=sys.stderr)
        return 2
    text = PYPROJECT.read_text()
    old = tomllib.loads(text).get("tool", {}).get("uv", {}).get(KEY, [])
    try:
        new = resolve(text)
        changed = with_pins(text, new)
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # uv has said why
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for pin in sorted({*old, *new}):
        if (pin in old) != (pin in new):
            print(f"{'-' if pin in old else '+'} {pin}")
    if sorted(old) == sorted(new):
        print(f"up to date: {len(new)} pins")
        return 0
    if check:
        print("not up to date; without --check this writes pyproject.toml", file=sys.stderr)
        return 1
    PYPROJECT.write_text(changed)
    print(f"wrote {len(new)} pins to pyproject.toml")
    return 0


if __name__ == "__main__":
    sys.exit(main())
