"""The database of a study."""

import shlex
import warnings
from typing import Any

import optuna
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError

from multimodal.config import ConfigError
from multimodal.search.config import SweepConfig

PATIENCE = 60
"""Seconds to wait for another process's write to a SQLite file."""
CONNECTING = 20
"""Seconds to wait for a server of PostgreSQL."""


def open_storage(config: SweepConfig) -> BaseStorage:
    """The database, made ready; ConfigError if it cannot be used."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    address = config.storage or f"sqlite:///{(config.folder / 'study.db').absolute()}"
    try:
        url = make_url(address)
    except (SQLAlchemyError, ValueError):  # what they say may be a part of the password
        form = "dialect+driver://user:password@host:port/name, with @, : and / of a password as %40, %3A and %2F"
        told = f"is no address of a database, which is {form}"
        raise ConfigError([("storage", told)]) from None
    secret = url.password is not None or "password" in url.query
    place = url.difference_update_query(["password"]).render_as_string() if secret else address
    try:
        config.folder.mkdir(parents=True, exist_ok=True)
        if url.get_backend_name() == "sqlite" and _in_memory(url):
            raise OSError("it is in memory only, where nobody could continue the search")
        return RDBStorage(address, {"pool_pre_ping": True, "connect_args": _limits(url)})
    except ImportError as error:
        lacking = f"its driver is not installed ({error.__cause__ or error})"
        told = f"{lacking}: uv sync --extra postgres" if place.startswith("postgresql") else lacking
    except (SQLAlchemyError, OSError, ValueError, StorageInternalError) as error:
        told = str(getattr(error, "orig", None) or error).splitlines()[0]
    except RuntimeError as error:  # Optuna's, of its tables
        told = f"{str(error).partition('. ')[0]}. {_ways(str(error), place)}"
    raise ConfigError([("storage", f"the database {place} cannot be opened: {told}")])


def _in_memory(url: URL) -> bool:
    return not url.database or ":memory:" in url.database or url.query.get("mode") == "memory"


def _limits(url: URL) -> dict[str, Any]:
    """Of waiting, for a driver; what is given stays."""
    if url.get_backend_name() == "sqlite":
        return {} if "timeout" in url.query else {"timeout": PATIENCE}
    known = url.get_backend_name() == "postgresql" and url.get_driver_name().startswith("psycopg")
    return {"connect_timeout": CONNECTING} if known and "connect_timeout" not in url.query else {}


def _ways(message: str, place: str) -> str:
    if "storage upgrade" in message:
        return f"Copy it, then: uv run optuna storage upgrade --storage {shlex.quote(place)}; or use another database"
    return "It is of a newer Optuna: install that, or use another database"
