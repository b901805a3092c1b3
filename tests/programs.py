"""The programs in scripts/, as modules."""

import importlib.util
import sys
from functools import cache
from types import ModuleType
from typing import Any

from hydra import compose, initialize_config_dir

from multimodal.cli import CONF, plain


@cache
def loaded(program: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(program, CONF.parent / "scripts" / f"{program}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[program] = module  # where pydantic looks names up
    spec.loader.exec_module(module)
    return module


def config_of(program: str) -> Any:
    """The class of a program's configuration."""
    return getattr(loaded(program), f"{program.capitalize()}Config")


def composed_of(program: str, *words: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return plain(compose(program, list(words)))


def run_program(program: str, *words: str) -> None:
    """Without Hydra's main, in this process; errors come as they are."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose(program, list(words))
    loaded(program).main.__wrapped__.__wrapped__(composed)
