"""The database of a study."""

import shlex
import warnings
from typing import Any

import optuna
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
    place = address = config.storage or f"sqlite:///{(config.folder / 'study.db').absolute()}"
    try:
        url = make_url(address)
        if url.password is not None:
            place = url.render_as_string()  # without it
        config.folder.mkdir(parents=True, exist_ok=True)
        if url.get_backend_name() == "sqlite" and url.database in (None, "", ":memory:"):
            raise OSError("it is in memory only, where nobody could continue the search")
        return RDBStorage(address, {"pool_pre_ping": True, "connect_args": _limits(url)})
    except ImportError as error:
        lacking = f"its driver is not installed ({error.__cause__ or error})"
        told = f"{lacking}: uv sync --extra postgres" if place.startswith("postgresql") else lacking
    except (SQLAlchemyError, OSError) as error:
        told = str(getattr(error, "orig", None) or error).splitlines()[0]
    except RuntimeError as error:  # Optuna's, of its tables
        told = f"{str(error).partition('. ')[0]}. {_ways(str(error), place)}"
    raise ConfigError([("storage", f"the database {place} cannot be opened: {told}")])


def _limits(url: URL) -> dict[str, Any]:
    """Of waiting, for a driver; what is given stays."""
    if url.get_backend_name() == "sqlite":
        return {"timeout": PATIENCE}
    known = url.get_backend_name() == "postgresql" and url.get_driver_name().startswith("psycopg")
    return {"connect_timeout": CONNECTING} if known and "connect_timeout" not in url.query else {}


def _ways(message: str, place: str) -> str:
    if "storage upgrade" in message:
        return f"Copy it, then: uv run optuna storage upgrade --storage {shlex.quote(place)}; or use another database"
    return "It is of a newer Optuna: install that, or use another database"
