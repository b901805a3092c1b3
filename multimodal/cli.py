"""What our programs share: Hydra composes, problems are shown without a traceback, rank 0 writes to the terminal."""

import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from multimodal import distributed
from multimodal.config import ConfigError, DamagedCheckpoint, RunError
from multimodal.interop import config_source
from multimodal.parts import BadSample
from multimodal.resolve import ENTRY_POINT_GROUP, allowed_packages, announced
from multimodal.retold import retold
from multimodal.run_names import run_name

T = TypeVar("T")

CONF = Path(__file__).parent.parent / "conf"
TO_MEND = (ConfigError, DamagedCheckpoint, RunError, BadSample)
"""What users can mend: told in lines, without a traceback."""

OPTIONS = ("--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd", "--package", "-p", "--info", "-i")
"""Those of Hydra that a value follows."""

NO_FILES = [  # our run directory is the only one, also when a stored configuration is launched
    "hydra/hydra_logging=none",
    "hydra/job_logging=none",
    "hydra.output_subdir=null",
    "hydra.run.dir=.",
    "hydra.sweep.dir=${paths.runs}/.multirun",
    "hydra.sweep.subdir=.",
]


class PartsSearchPath(SearchPathPlugin):
    """Puts the `conf/` of packages that announce parts behind the program's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for point in entry_points(group=ENTRY_POINT_GROUP):
            spec = find_spec(announced(point))
            for place in (spec.submodule_search_locations or []) if spec else []:
                search_path.append(point.name, f"file://{place}/conf")


def register_plugins() -> None:
    """Let Hydra find what is not in our own `conf/`: that of other packages, and open_clip's architectures."""
    Plugins.instance().register(PartsSearchPath)
    config_source.register()


def program(config: str) -> Callable[[Callable[[DictConfig], T]], Callable[[], Any]]:
    """Make a main of what takes the composed configuration of this name in `conf/`; for `launch`.

    In a sweep an error ends one job, and is told after the last; Hydra would tell one of its own before it.
    """

    def decorate(main: Callable[[DictConfig], T]) -> Callable[[], Any]:
        @wraps(main)
        def guarded(composed: DictConfig) -> T:
            try:
                return main(composed)
            except TO_MEND as error:
                if HydraConfig.get().mode == RunMode.RUN:
                    _refuse(str(error))
                raise

        decorated: Any = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config)(guarded)
        decorated.config = config
        return cast(Callable[[], Any], decorated)

    return decorate


def launch(
    task: Callable[[], Any],
    verbatim: Sequence[str] = (),
    listed: str | None = None,
    rewritten: Callable[[Sequence[str]], list[str]] = list,  # makes other words of those of the command line
) -> None:
    """Run a program under Hydra's main; what users can mend is said in lines without traceback, with exit status 1.

    Values of `verbatim` keys are text as it stands: "classes=cat,dog" is not a sweep, and a path may hold anything.
    Words that are no overrides are the list of the `listed` key.
    """
    _start_logging()
    register_plugins()
    try:
        words = rewritten(sys.argv[1:])
    except TO_MEND as error:
        _refuse(str(error))
    words = words if listed is None else _gathered(words, listed)
    sys.argv[1:] = [_quoted(word, verbatim) for word in words]
    overrides = (place for place, word in enumerate(sys.argv) if place and "=" in word and not word.startswith("-"))
    place = next(overrides, len(sys.argv))
    sys.argv[place:place] = NO_FILES  # beside other overrides: the parser wants them in one row
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then passes exceptions on as they are
    try:
        task()
    except TO_MEND as error:
        _refuse(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(str(_explained(error, getattr(task, "config", ""), sys.argv[1:])))


def compose(config: str, overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What a program would make of these words, and the groups that files are chosen of; ConfigError if it cannot."""
    with _hydra():
        try:
            composed = hydra.compose(config, list(overrides), return_hydra_config=True)
            combined = GlobalHydra.instance().config_loader().list_groups("")  # those with several choices are not told
            groups = {*map(str, composed.hydra.runtime.choices), *combined}
            with open_dict(composed):
                del composed["hydra"]
            return plain(composed), sorted(group for group in groups if not group.startswith("hydra"))
        except (HydraException, OmegaConfBaseException) as error:
            raise _explained(error, config, overrides) from None


@contextmanager
def _hydra() -> Iterator[None]:
    """The one that a program runs under, or else one over `conf/`."""
    if GlobalHydra.instance().is_initialized():
        yield
    else:
        register_plugins()
        with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            yield


def _explained(error: Exception, config: str, words: Sequence[str]) -> ConfigError:
    """What could not be composed of the words of a command line, as a problem of ours."""
    return ConfigError([retold(str(error), CONF, lambda: _keys_of(config, words))])


def _keys_of(config: str, words: Sequence[str]) -> list[str]:
    """All keys, dotted, and groups of a configuration with the parts that are chosen, without values; for a hint."""

    def keys(value: Any, path: str) -> Iterator[str]:
        for key, inner in value.items() if isinstance(value, dict) else ():
            yield f"{path}{key}"
            yield from keys(inner, f"{path}{key}.")

    parts = [word for word in words if "=" in word and (CONF / re.split("[@=]", word)[0]).is_dir()]
    try:
        with _hydra():
            composed: Any = OmegaConf.to_container(hydra.compose(config, parts, return_hydra_config=True))
            groups = composed.pop("hydra")["runtime"]["choices"]
            return [*keys(composed, ""), *groups]
    except (HydraException, OmegaConfBaseException):
        return []


def _start_logging() -> None:
    """Messages of our own, and of packages with parts; other libraries, and other ranks, only warn."""
    first = distributed.rank() == 0
    form = "%(message)s" if first else f"rank {distributed.rank()}: %(message)s"
    logging.basicConfig(level=logging.WARNING, format=form, handlers=[_TerminalHandler()], force=True)
    for name in ("__main__", *allowed_packages()):
        logging.getLogger(name).setLevel(logging.INFO if first else logging.WARNING)


def _quoted(word: str, verbatim: Sequence[str]) -> str:
    """An override that Hydra and OmegaConf read as the text that it is; one that is quoted, or a list, stays."""
    key, given, value = word.partition("=")
    if not given or key not in verbatim or value in ("", "null") or re.fullmatch(r"'.+'|\".+\"|\[.*\]", value, re.S):
        return word
    return f"{key}={literal(value)}"


def literal(value: str) -> str:
    """Text in quotes, as Hydra and OmegaConf read it."""
    escaped = re.sub(
        r"(\\*)('|\Z)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), not_interpolated(value)
    )  # Hydra: a quote
    return f"'{escaped}'"


def not_interpolated(text: str) -> str:
    """Text as OmegaConf reads it: backslashes count where an interpolation would follow."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _gathered(words: Sequence[str], key: str) -> list[str]:
    """The words with those that are no overrides as one: "key=['a','b']". A folder's name may look like an override."""
    kept: list[str] = []
    gathered: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        option = word.startswith("-") or before in OPTIONS
        override = re.match(r"(\+{0,2}|~)(hydra/)?[\w.@]+=", word) and not Path(word).is_dir()
        (kept if option or override else gathered).append(word)
    if gathered and any(word.startswith(f"{key}=") for word in kept):
        _refuse(str(ConfigError([(key, f"given twice: as {key}=, and as {' '.join(gathered)}")])))
    return [*kept, f"{key}=[{','.join(map(literal, gathered))}]"] if gathered else kept


def _refuse(message: str) -> NoReturn:
    print(message if distributed.rank() == 0 else f"rank {distributed.rank()}: {message}", file=sys.stderr)
    sys.exit(1)


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def plain(composed: DictConfig) -> dict[str, Any]:
    """What Hydra composed as plain data, interpolations resolved, missing values still "???"."""
    named = isinstance(composed.get("run"), DictConfig)
    if named and HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        overrides = list(HydraConfig.get().overrides.task)
        OmegaConf.update(composed, "run.name", run_name(composed.run.name, overrides, sys.argv))
    data = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(data, dict)
    return {str(key): value for key, value in data.items()}
