"""The laws of a search's database that cannot be used: one line, before anything starts."""

import socket
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from searches import raw_search

from multimodal.config import ConfigError, check
from multimodal.search import storage
from multimodal.search.checks import checked
from multimodal.search.config import SweepConfig
from multimodal.search.storage import open_storage


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    return raw_search(tmp_path)


def refused(raw: dict[str, Any], storage: str) -> str:
    with pytest.raises(ConfigError) as caught:
        open_storage(checked({**raw, "storage": storage}))
    ((path, told),) = caught.value.problems
    assert path == "storage"
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    ("place", "told"),
    [
        ("sqlite:////proc/nowhere/study.db", "unable to open"),
        ("sqlite:///:memory:", "in memory only"),
        ("sqlite:///file::memory:?uri=true", "in memory only"),
        ("sqlite:///file:shared?mode=memory&uri=true", "in memory only"),
        ("sqlite:////proc/nowhere/study.db?timeout=x", "could not convert"),
        ("postgresql+psycopg://me:secret@127.0.0.1:1/study", "Connection refused"),
        ("postgresql+psycopg://me:secret@nowhere.invalid/study", "nowhere.invalid"),
        ("postgresql+nothing://me:secret@nowhere.invalid/study", "nothing"),
    ],
)
def test_a_database_that_cannot_be_used_is_named_without_its_password(
    raw: dict[str, Any], place: str, told: str
) -> None:
    found = refused(raw, place)
    assert place.replace("secret", "***") in found
    assert told in found.replace(place.replace("secret", "***"), "")
    assert "secret" not in refused(raw, f"{place}{'&' if '?' in place else '?'}password=secret")


@pytest.mark.parametrize(
    "place", ["postgresql+psycopg://me:secret@host:54x/study", "postgresql://me:p@secret:word@host/a"]
)
def test_what_is_no_address_is_told_without_any_of_it(raw: dict[str, Any], place: str) -> None:
    found = refused(raw, place)
    assert "is no address of a database" in found
    assert "secret" not in found


def test_a_driver_that_is_lacking_is_told_with_what_installs_it(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    found = refused(raw, "postgresql+psycopg://me@127.0.0.1/study")
    assert "psycopg" in found.partition("driver is not installed")[2]
    assert "uv sync --extra postgres" in found


@pytest.mark.timeout(120)
def test_a_server_that_never_answers_is_not_waited_for_without_end(
    raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "CONNECTING", 2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        assert "timeout" in refused(raw, f"postgresql+psycopg://me@{address}/study")


@pytest.mark.parametrize(
    ("revision", "told"),
    [("v1.3.0.a", "optuna storage upgrade --storage sqlite:///"), ("v99.0.0.a", "a newer Optuna")],
)
def test_a_database_of_another_optuna_is_told_with_what_to_do(
    raw: dict[str, Any], tmp_path: Path, revision: str, told: str
) -> None:
    place = tmp_path / "study.db"
    open_storage(check({**raw, "storage": f"sqlite:///{place}"}, SweepConfig))
    with closing(sqlite3.connect(place)) as file, file:
        file.execute("UPDATE alembic_version SET version_num = ?", [revision])
    found = refused(raw, f"sqlite:///{place}")
    assert told in found
    assert str(place) in found
