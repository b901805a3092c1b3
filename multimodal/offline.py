"""Keeping the Hugging Face libraries off the network."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def offline() -> Iterator[None]:
    """What huggingface_hub is asked for meanwhile is an error unless it is on this machine.

    A second bolt: towers ask for nothing while a checkpoint is opened.
    """
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
