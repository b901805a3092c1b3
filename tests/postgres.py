"""A server of PostgreSQL for tests: one that runs, by its address, or one of our own from Debian's package."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


def _programs() -> Path | None:
    """The folder of the newest version's programs."""
    found = shutil.which("initdb")
    places = [Path(found)] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return places[-1].parent if places else None


POSTGRES = _programs()


def _as_nobody(command: Sequence[str]) -> list[str]:
    """PostgreSQL refuses to run as root; Debian's package makes a user for it."""
    return ["runuser", "-u", "postgres", "--", *command] if os.getuid() == 0 else list(command)


@contextmanager
def database() -> Iterator[str]:
    """Its address, for SQLAlchemy: of MULTIMODAL_POSTGRES, or of a server of our own, while inside."""
    if given := os.environ.get("MULTIMODAL_POSTGRES"):
        yield given
        return
    with tempfile.TemporaryDirectory() as place:  # pytest's own folders are closed to other users
        yield from _server(Path(place))


def _server(folder: Path) -> Iterator[str]:
    assert POSTGRES is not None
    if os.getuid() == 0:
        shutil.chown(folder, "postgres")
    data, control = folder / "data", _as_nobody([str(POSTGRES / "pg_ctl"), "-D", str(folder / "data"), "-w"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    make = [str(POSTGRES / "initdb"), "-D", str(data), "-A", "trust", "-U", "tests", "--no-sync"]
    subprocess.run(_as_nobody(make), check=True, capture_output=True)
    options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
    log = ["-l", str(folder / "log.txt")]
    subprocess.run([*control, "-o", options, *log, "start"], check=True, stdout=subprocess.DEVNULL)
    try:
        yield f"postgresql+psycopg://tests@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], check=True, stdout=subprocess.DEVNULL)
