"""A model without memory, held against the weights of a checkpoint before it is built."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

from multimodal import checkpoint
from multimodal.model import Model

SPARE = 4
"""Networks make so many times their parameters at most, and drop some (a decoder, a classifier)."""
BESIDE = 2**30
"""Bytes that networks may hold beside their weights (a mask), on top of as many as the weights have."""


@contextmanager
def outlined(folder: Path) -> Iterator[Callable[[Model], None]]:
    """Modules that are built inside take no memory; what is given then holds their model against the stored weights.

    So a configuration that asks for much more than its weights are is refused for the price of reading their names.
    ValueError if a model is not the stored one, or has so many parameters that it cannot be.
    """
    file, config = folder / checkpoint.WEIGHTS, folder / "config.yaml"
    stored = checkpoint.stored_shapes(folder)
    count, most = 0, SPARE * len(stored) + 1000

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > most:
            raise ValueError(f"{file} does not hold the weights of its config.yaml: {len(stored)} are far too few")

    def check(model: Model) -> None:
        checkpoint.require_same(file, stored, model)
        kept = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
        beside = sum(buffer.nbytes for buffer in model.buffers() if id(buffer) not in kept)
        if beside > file.stat().st_size + BESIDE:
            raise ValueError(f"{config} asks for {beside:,} bytes beside the weights in {file}")

    hook = register_module_parameter_registration_hook(registered)
    try:
        with torch.device("meta"):
            yield check
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:  # of sizes that torch cannot even name
        why = str(error).partition("\n")[0]
        raise ValueError(f"{config} describes no model that can be built: {why}") from None
    finally:
        hook.remove()
